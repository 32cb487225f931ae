"""The clock of `vla bench` and of the benchmarks, and what a figure must carry with it."""

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPEATS = 3
WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """Times of one call in seconds.

    Args:
        median: Median over repetitions.
        fastest: Fastest repetition.
        calls: Calls that were timed.
        peak_memory: Bytes allocated at most meanwhile, on a GPU.
    """

    median: float
    fastest: float
    calls: int
    peak_memory: int | None = None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(
    run: Callable[[], object], device: torch.device, calls: int = 20, seconds: float = 10.0, alone: bool = False
) -> Timing:
    """Time of a call among others in a row, which is what throughput is made of.

    Three repetitions of `calls` calls, fewer where they would take longer than `seconds`, after a warm-up. On CUDA,
    events take the time, otherwise the clock around the repetition.

    Args:
        run: What to time.
        device: Where it runs.
        calls: Calls in one repetition.
        seconds: About how long all may take.
        alone: On CUDA, let the device wait until the calls of a repetition are queued, so that the time is that of
            the kernels alone, without Python's, however short they are.
    """
    _reset_peak(device)
    for _ in range(WARM_UP_CALLS):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    synchronize(device)
    once = time.perf_counter() - start
    calls = max(1, min(calls, int(seconds / max(once, 1e-9) / REPEATS)))
    times = [_repeat(run, device, calls, host if alone else None) / calls for _ in range(REPEATS)]
    return Timing(statistics.median(times), min(times), REPEATS * calls, _peak(device))


def measure_latency(run: Callable[[], object], device: torch.device, calls: int = 50, seconds: float = 5.0) -> Timing:
    """Time from a call to its result, nothing else running: the median over single calls."""
    _reset_peak(device)
    for _ in range(WARM_UP_CALLS):
        run()
    synchronize(device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < calls and (len(times) < 3 or time.perf_counter() - started < seconds):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return Timing(statistics.median(times), min(times), len(times), _peak(device))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = source.new_zeros(source.shape)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device, seconds=2.0).fastest


def environment(device: torch.device) -> dict:
    """Everything that figures depend on and that is the same for all of a run."""
    packages = {name: _version(name) for name in ("triton", "numba", "timm", "vision-linear-attention")}
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": None,
        "tf32": None,
        "packages": {"torch": torch.__version__} | packages,
    }
    if device.type == "cuda":
        result["cuda"] = torch.version.cuda or torch.version.hip
        result["tf32"] = torch.backends.cuda.matmul.allow_tf32
        result["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    return result


def device_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def evaluation(
    model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[], Tensor]:
    """The call that classifies a batch."""

    def call() -> Tensor:
        with torch.inference_mode(), autocast():
            return model(images)

    model.eval()
    return call


def training(
    model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Callable[[], Tensor]:
    """The call that computes the loss of a batch and all gradients, and drops them: a step without the optimizer."""
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def call() -> Tensor:
        with autocast():
            outputs = model(images)
            # In training, a model with a head for distillation has an output of each head.
            heads = (outputs,) if isinstance(outputs, Tensor) else outputs
            loss = torch.stack([F.cross_entropy(head.float(), labels) for head in heads]).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    model.train()
    return call


def _repeat(run: Callable[[], object], device: torch.device, calls: int, host: float | None) -> float:
    """Seconds that `calls` calls take; with the seconds `host` that the host needs for one, those of the device."""
    if device.type != "cuda":
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if host is not None:
        torch.cuda._sleep(int(min(1.5 * calls * host, 0.1) * 2e9))  # cycles
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
