"""Whole models beside timm's peers in the same run: throughput, latency, growth with the resolution, first call."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import timm
import torch
from torch import Tensor, nn

import vla  # noqa: F401  registers its models with timm
from vla.ops import use_backend
from vla.timing import WARM_UP_CALLS, Timing, evaluation, training
from vla.train.weights import has_fixed_size

from ..checks import check_close, relative_error
from ..registry import MODES, Measurement, Options, case

T = TypeVar("T")

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "mambaout_tiny", "deit_small_patch16_224")
# Pictures a second of the official code on an H200: evaluation, training.
OFFICIAL: dict[str, tuple[float | None, float | None]] = {
    "vmamba_tiny_s1l8": (3145, 1184),
    "vmamba_small_s2l15": (1698, 597),
    "vmamba_base_s2l15": (1337, 468),
    "mambavision_tiny": (13279, 3301),
    "vrwkv_tiny": (7197, 1884),
    "vrwkv_small": (3892, 1134),
    "vrwkv_base": (1969, None),
    "vrwkv6_tiny": (6489, 1507),
    "gspn_tiny": (1063, 345),
    "gspn_base": (465, 148),
    "groupmamba_tiny": (1855, 499),
    "groupmamba_base": (844, None),
}
MODELS = tuple(OFFICIAL)
TINY = tuple(name for name in MODELS if name.endswith("_tiny") or "tiny_" in name)
# Milliseconds of one picture, official code, eager, on an H200.
LATENCY = {"vmamba_tiny_s1l8": 14.9, "vrwkv_tiny": 9.6, "gspn_tiny": 16.7, "groupmamba_tiny": 63.6}

# Relative error of logits and of all gradients together. A wrong kernel is off by its whole result.
LIMITS = {"float32": (1e-3, 1e-2), "bfloat16 autocast": (3e-2, 1e-1)}
# Checked in float64 at most at this size; beyond it that would take longer than everything else.
CHECKED_SIZE = 512


def build(name: str, size: int, options: Options) -> nn.Module:
    """A model with random weights for pictures of `size` pixels, channels last."""
    arguments: dict = dict(drop_path_rate=options.drop_path)
    if has_fixed_size(name):
        arguments["img_size"] = size
    torch.manual_seed(0)
    with torch.device(options.device):
        model = timm.create_model(name, **arguments)
    return model.to(memory_format=torch.channels_last)


def images(batch: int, size: int, device: torch.device) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(device).contiguous(memory_format=torch.channels_last)


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def precision(device: torch.device) -> str:
    return "bfloat16 autocast" if device.type != "cpu" else "float32"


def check_model(model: nn.Module, x: Tensor, train: bool) -> None:
    """Compares logits, and for training the gradients of all weights, with float64 by PyTorch's path.

    Of a deep model with random weights, bfloat16 alone can make more than the limit: up to twice of it is allowed where
    PyTorch's path in the same precision, whose roundings are others, is as far off to within a quarter.
    """

    def outcome(network: nn.Module, pictures: Tensor, context: AbstractContextManager) -> list[Tensor]:
        with torch.set_grad_enabled(train), context:
            logits = network(pictures)
        if not train:
            return [logits]
        parameters = list(network.parameters())
        grads = torch.autograd.grad(logits.double().logsumexp(1).sum(), parameters, materialize_grads=True)
        return [logits, torch.cat([grad.flatten() for grad in grads])]

    model.eval()
    actual = outcome(model, x, autocast(x.device))
    with use_backend("torch"):
        expected = outcome(copy.deepcopy(model).double(), x.double(), nullcontext())
        own = None
        for i, limit in enumerate(LIMITS[precision(x.device)][: len(actual)]):
            if relative_error(actual[i], expected[i]) > limit:
                own = own or outcome(model, x, autocast(x.device))
                limit = min(max(limit, 1.25 * relative_error(own[i], expected[i])), 2 * limit)
            check_close(("logits", "gradients")[i], actual[i], expected[i], limit)


def in_mode(
    mode: str, step: Callable[[nn.Module], Callable[[], Tensor]], model: nn.Module, device: torch.device
) -> Callable[[], Tensor]:
    """The model's call in one of `MODES`, checked against the eager one's."""
    call = step(model)
    if mode == "eager":
        return call
    expected = call().clone()
    if "compiled" in mode:
        call = step(torch.compile(model))
    if "graph" in mode:
        call = captured(call)
    check_close(f"{mode} against eager", call(), expected, LIMITS[precision(device)][0])
    return call


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """A call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> T:
        graph.replay()
        return result

    # The graph reads tensors that it does not own, such as weights and labels. They live in the call.
    replay.call = call
    return replay


def throughput(name: str, train: bool, mode: str, size: int, batch: int, options: Options, label: str) -> Measurement:
    """Many batches in a row."""
    device = options.device

    def setup() -> Callable[[], Tensor]:
        model = build(name, size, options)
        # Peers keep the size that they were built for, ours take any.
        checked = min(size, CHECKED_SIZE) if name not in PEERS else size
        if checked <= CHECKED_SIZE:
            check_model(model, images(min(batch, 2), checked, device), train)
        x = images(batch, size, device)

        def step(network: nn.Module) -> Callable[[], Tensor]:
            return (training if train else evaluation)(network, x, lambda: autocast(device))

        return in_mode(mode, step, model, device)

    comparable = (size, batch) == (224, 128) and options.on_official_gpu
    official = OFFICIAL.get(name, (None, None))[train] if comparable else None
    return Measurement(
        label,
        setup,
        items=batch,
        official_ms=1e3 * batch / official if official else None,
        details=details(name, size, batch, options) | {"pass": "train" if train else "eval", "mode": mode},
    )


def details(name: str, size: int, batch: int, options: Options) -> dict:
    return {
        "model": name,
        "size": size,
        "batch": batch,
        "dtype": precision(options.device),
        "layout": "channels last",
        "drop_path": options.drop_path,
        "check": f"float64, up to {CHECKED_SIZE} pixels; other modes against eager",
    }


def chosen(options: Options, default: tuple[str, ...], peers: tuple[str, ...] = PEERS) -> tuple[str, ...]:
    return (options.models or default) + (peers if options.peers else ())


@case()
def models(options: Options) -> Iterator[Measurement]:
    """Pictures a second at 224 pixels in batches, evaluation and training: eager, compiled, that as a CUDA graph."""
    for mode in options.modes_of("eager", "compiled", "compiled+graph"):
        for size in options.sizes or (224,):
            for name in chosen(options, MODELS):
                for train in (False, True):
                    label = f"{name} {'train' if train else 'eval'} {mode}" + (f" {size}" if size != 224 else "")
                    yield throughput(name, train, mode, size, options.batch or 128, options, label)


@case()
def latency(options: Options) -> Iterator[Measurement]:
    """Time of one picture from call to result: eager and compiled, each also as a CUDA graph."""
    device, size = options.device, (options.sizes or (224,))[0]

    def setup(name: str, mode: str) -> Callable[[], Tensor]:
        model = build(name, size, options)
        x = images(1, size, device)
        check_model(model, x, False)

        def step(network: nn.Module) -> Callable[[], Tensor]:
            return evaluation(network, x, lambda: autocast(device))

        return in_mode(mode, step, model, device)

    for mode in options.modes_of(*MODES):
        for name in chosen(options, TINY):
            yield Measurement(
                f"{name} {mode}",
                lambda name=name, mode=mode: setup(name, mode),
                latency=True,
                items=1,
                official_ms=LATENCY.get(name) if mode == "eager" and options.on_official_gpu else None,
                details=details(name, size, 1, options) | {"pass": "eval", "mode": mode},
            )


@case()
def resolution(options: Options) -> Iterator[Measurement]:
    """Time and memory from 224 to 2048 pixels, evaluation and training, eager: linear in the pixels?

    In eager mode small models wait for the host up to 1024 pixels; as CUDA graphs the device alone is timed.
    """
    batch = options.batch or 8
    for mode in options.modes_of("eager"):
        for name in chosen(options, TINY):
            for train in (False, True):
                for size in options.sizes or (224, 512, 1024, 1536, 2048):
                    label = f"{name} {'train' if train else 'eval'} {size}" + (f" {mode}" if mode != "eager" else "")
                    yield throughput(name, train, mode, size, batch, options, label)


FIRST_CALL = """
import sys, time
import timm, torch, vla
name, device, batch = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3])
from vla.train.weights import has_fixed_size
from vla.timing import evaluation, synchronize, training
model = timm.create_model(name).to(device, memory_format=torch.channels_last)
x = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
# What every program pays: the libraries' start.
torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3, device=device)).flatten(1) @ x.new_ones(8 * 222 * 222, 8)
def autocast():
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")
for step in (evaluation, training):
    synchronize(device)
    start = time.perf_counter()
    step(model, x, autocast)()
    synchronize(device)
    print(time.perf_counter() - start)
"""


@case()
def first_call(options: Options) -> Iterator[Measurement]:
    """The first evaluation and the first training step of a process, without and with Triton's cache on disk.

    A process before them, which is not timed, has the system read PyTorch's and CUDA's libraries from its disk.
    """
    batch = options.batch or 8
    folder = tempfile.TemporaryDirectory()
    seconds: dict[tuple[str, str], list[float]] = {}

    def in_process(name: str, cache: str) -> list[float]:
        surroundings = os.environ | {"TRITON_CACHE_DIR": str(Path(folder.name) / cache / name)}
        command = [sys.executable, "-c", FIRST_CALL, name, str(options.device), str(batch)]
        process = subprocess.run(command, env=surroundings, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr.strip().splitlines()[-1]
        return [float(line) for line in process.stdout.split()]

    def once(name: str, cache: str, train: bool) -> Timing:
        if (name, cache) not in seconds:
            if cache == "cold":
                in_process(name, "untimed")
            seconds[name, cache] = in_process(name, "timed")
        return Timing(seconds[name, cache][train], seconds[name, cache][train], 1)

    with folder:
        for name in chosen(options, TINY):
            for cache in ("cold", "warm"):
                for train in (False, True):
                    yield Measurement(
                        f"{name} {'train' if train else 'eval'}, {cache} cache",
                        lambda name=name, cache=cache, train=train: once(name, cache, train),
                        details={"model": name, "batch": batch, "cache": cache, "pass": "train" if train else "eval"},
                    )
