"""The operators on a GPU, in the shapes of models and of the official kernels' measurements."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vla import ops

from ..checks import Cuts, check_operator
from ..registry import Measurement, Options, case

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CROSS = ["row", "col", "row_rev", "col_rev"]
SWEEPS = ["right", "down", "left", "up"]


@dataclass(frozen=True)
class Problem:
    """A call of an operator.

    Args:
        label: Its shape, for readers.
        function: The operator.
        dtype: dtype of the activations.
        make: Makes the tensor arguments on the default device.
        like: Argument that the output has the size of.
        options: Other arguments.
        cuts: A part of each argument that is independent of the rest, on which the result is checked.
        out_cut: The same of the output.
        official: Milliseconds of the official forward and backward on an H200.
        copies: The output is so many times as large as `like`.
    """

    label: str
    function: Callable
    dtype: torch.dtype
    make: Callable[[], dict[str, Tensor]]
    like: str
    options: dict = field(default_factory=dict)
    cuts: Cuts = field(default_factory=dict)
    out_cut: dict[int, int] = field(default_factory=dict)
    official: tuple[float | None, float | None] = (None, None)
    copies: int = 1


def _measure(problem: Problem, device: torch.device) -> Iterator[Measurement]:
    """A forward without a graph, and a backward by itself.

    The floors count every argument and result once: a backward reads the arguments and the incoming gradient and
    writes a gradient of every argument.
    """
    function, options = problem.function, problem.options
    with torch.device("meta"):
        sizes = {name: t.numel() * t.element_size() for name, t in problem.make().items()}
    checked = False
    inputs, output = sum(sizes.values()), problem.copies * sizes[problem.like]

    def prepare() -> dict[str, Tensor]:
        nonlocal checked
        torch.manual_seed(0)
        with torch.device(device):
            tensors = problem.make()
        if not checked:
            check_operator(function, tensors, options, problem.cuts, problem.out_cut)
            checked = True
        return tensors

    def forward() -> Callable[[], object]:
        tensors = prepare()

        def run() -> object:
            with torch.no_grad():
                return function(**tensors, **options)

        return run

    def backward() -> Callable[[], object]:
        leaves = {name: t.detach().requires_grad_() for name, t in prepare().items()}
        out = function(**leaves, **options)
        weight = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, list(leaves.values()), weight, retain_graph=True)

    dtype = str(problem.dtype).removeprefix("torch.")
    details = {"shape": problem.label, "dtype": dtype, "check": "output and gradients, float64, on a part"}
    for name, setup, moved, official in (
        ("forward", forward, inputs + output, problem.official[0]),
        ("backward", backward, 2 * inputs + output, problem.official[1]),
    ):
        yield Measurement(
            f"{problem.label} {dtype} {name}",
            setup,
            kernels=True,
            details=details | {"pass": name},
            bytes=moved,
            official_ms=official,
        )


def _measure_all(problems: list[Problem], options: Options) -> Iterator[Measurement]:
    comparable = options.batch is None and options.on_official_gpu
    for problem in problems:
        yield from _measure(problem if comparable else replace(problem, official=(None, None)), options.device)


def _maps(dtype: torch.dtype, *size: int) -> Tensor:
    """Activations (..., C, H, W), channels last in memory."""
    return torch.randn(*size[:-3], *size[-2:], size[-3], dtype=dtype).movedim(-1, -3)


@case()
def selective_scan(options: Options) -> Iterator[Measurement]:
    """Selective scan in the shapes of VMamba, MambaVision and of language models."""

    def problem(batch, channels, length, states, groups, dtype, official=(None, None)) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(
                u=torch.randn(batch, channels, length, dtype=dtype),
                delta=torch.randn(batch, channels, length, dtype=dtype),
                A=-torch.arange(1.0, states + 1).repeat(channels, 1),
                B=torch.randn(batch, groups, states, length, dtype=dtype),
                C=torch.randn(batch, groups, states, length, dtype=dtype),
                D=torch.ones(channels),
                delta_bias=torch.full((channels,), -3.0),
            )

        batch = options.batch or batch
        part = min(64, channels // groups)
        row, group, per_channel = {0: 1, 1: part}, {0: 1, 1: 1}, {0: part}
        cuts = dict(u=row, delta=row, A=per_channel, B=group, C=group, D=per_channel, delta_bias=per_channel)
        label = f"B{batch} D{channels} L{length} N{states} G{groups}"
        return Problem(label, ops.selective_scan, dtype, make, "u", dict(delta_softplus=True), cuts, row, official)

    problems = [
        problem(128, 384, 3136, 1, 4, BF16, (1.04, 2.57)),
        problem(128, 384, 3136, 1, 4, FP32, (1.10, 2.58)),
        problem(128, 768, 784, 1, 4, BF16, (0.53, 1.37)),
        problem(1024, 160, 196, 8, 1, BF16, (0.69, 1.67)),
        problem(8, 1536, 4096, 16, 1, BF16, (0.82, 3.39)),
        problem(1, 1536, 65536, 16, 1, BF16, (2.08, 7.3)),
        problem(128, 384, 3136, 16, 4, BF16, (5.69, 20.9)),
    ]
    yield from _measure_all(problems, options)


@case()
def scan2d(options: Options) -> Iterator[Measurement]:
    """Directional scan in the shapes of VMamba-T, GroupMamba-T and MambaVision-T, and at high resolution."""

    def problem(batch, channels, height, width, rank, dtype=BF16, states=1, grouped=False, directions=CROSS) -> Problem:
        k = len(directions)

        def make() -> dict[str, Tensor]:
            # One projection of the pixels gives dt, B and C, which are views of it, as in the models.
            projected = _maps(dtype, batch, k * (rank + 2 * states), height, width)
            dt, B, C = projected.unflatten(1, (k, rank + 2 * states)).split([rank, states, states], dim=2)
            return dict(
                x=_maps(dtype, batch, k * channels if grouped else channels, height, width),
                dt=dt,
                A=-torch.arange(1.0, states + 1).repeat(k, channels, 1),
                B=B,
                C=C,
                D=torch.ones(k, channels),
                dt_weight=torch.randn(k, channels, rank) * rank**-0.5,
                dt_bias=torch.full((k, channels), -3.0),
            )

        batch = options.batch or batch
        first = {0: 1}
        kind = "grouped " if grouped else ""
        label = f"{kind}B{batch} K{k} D{channels} {height}x{width} N{states} R{rank}"
        choices = dict(directions=directions, grouped=grouped)
        return Problem(label, ops.scan2d, dtype, make, "x", choices, dict(x=first, dt=first, B=first, C=first), first)

    problems = [
        problem(128, 96, 56, 56, 6),
        problem(128, 96, 56, 56, 6, FP32),
        problem(128, 192, 28, 28, 12),
        problem(128, 384, 14, 14, 24),
        problem(128, 768, 7, 7, 48),
        problem(1, 96, 512, 512, 6),
        problem(16, 192, 56, 56, 12, states=16),
        problem(128, 16, 56, 56, 1, grouped=True),
        problem(128, 87, 14, 14, 6, grouped=True),
        problem(128, 160, 1, 196, 20, states=8, directions=["row"]),
        problem(128, 320, 1, 49, 40, states=8, directions=["row"]),
    ]
    yield from _measure_all(problems, options)


@case()
def bi_wkv(options: Options) -> Iterator[Measurement]:
    """Bi-WKV in the shapes of Vision-RWKV from 224 to 2048 pixels."""

    def problem(batch, length, channels, dtype, official=(None, None), gated=False) -> Problem:
        maps = "k", "v", *(("gate",) if gated else ())

        def make() -> dict[str, Tensor]:
            tensors = {name: torch.randn(batch, length, channels, dtype=dtype) for name in maps}
            return tensors | dict(w=torch.linspace(0.1, 5.0, channels) / length, u=torch.randn(channels))

        batch = options.batch or batch
        first = {0: 1}
        label = f"{'gated ' if gated else ''}B{batch} T{length} C{channels}"
        return Problem(label, ops.bi_wkv, dtype, make, "v", {}, dict.fromkeys(maps, first), first, official)

    problems = [
        problem(128, 196, 192, FP32, (0.60, 1.37)),
        problem(128, 196, 192, BF16),
        problem(128, 196, 192, BF16, gated=True),
        problem(128, 196, 768, FP32, (2.40, 5.05)),
        problem(128, 196, 768, BF16),
        problem(16, 3136, 192, FP32, (0.59, 2.75)),
        problem(4, 16384, 384, FP32, (2.80, 12.9)),
        problem(4, 16384, 384, BF16),
    ]
    yield from _measure_all(problems, options)


@case()
def wkv6(options: Options) -> Iterator[Measurement]:
    """Bidirectional WKV6 in the shapes of Vision-RWKV 6."""

    def problem(batch, length, heads, dtype) -> Problem:
        def make() -> dict[str, Tensor]:
            tensors = {name: torch.randn(batch, length, heads * 64, dtype=dtype) for name in "rkvw"}
            return tensors | {"w": tensors["w"] - 3, "u": torch.randn(heads, 64)}

        batch = options.batch or batch
        first = {0: 1}
        cuts = dict.fromkeys("rkvw", first)
        return Problem(f"B{batch} T{length} {heads} heads of 64", ops.wkv6, dtype, make, "v", {}, cuts, first)

    problems = [
        problem(128, 196, 3, BF16),
        problem(128, 196, 3, FP32),
        problem(128, 196, 12, BF16),
        problem(1, 16384, 6, BF16),
    ]
    yield from _measure_all(problems, options)


@case()
def q_shift(options: Options) -> Iterator[Measurement]:
    """Q-Shift in the shapes of Vision-RWKV."""

    def problem(batch, channels, side, dtype, head_dim=None) -> Problem:
        batch = options.batch or batch
        label = f"B{batch} C{channels} {side}x{side}" + (f" heads of {head_dim}" if head_dim else "")
        return Problem(
            label,
            ops.q_shift,
            dtype,
            lambda: dict(x=_maps(dtype, batch, channels, side, side)),
            "x",
            dict(head_dim=head_dim),
            dict(x={0: 1}),
            {0: 1},
        )

    problems = [
        problem(128, 192, 14, BF16),
        problem(128, 768, 14, BF16),
        problem(128, 192, 14, BF16, head_dim=64),
        problem(1, 192, 128, BF16),
    ]
    yield from _measure_all(problems, options)


@case()
def q_shift_mix(options: Options) -> Iterator[Measurement]:
    """All mixes of a map with its shifted self, in the shapes of Vision-RWKV and Vision-RWKV 6."""

    def problem(batch, channels, side, mixes, rank=0) -> Problem:
        def make() -> dict[str, Tensor]:
            tensors = dict(x=_maps(BF16, batch, channels, side, side), weight=torch.rand(mixes, channels))
            if rank > 0:
                tensors["low"] = torch.randn(batch, side * side, mixes * rank, dtype=BF16)
                tensors["up"] = torch.randn(mixes, rank, channels) * 0.1
            return tensors

        batch = options.batch or batch
        label = f"B{batch} C{channels} {side}x{side} {mixes} mixes" + (f" rank {rank}" if rank else "")
        choices = dict(head_dim=64 if rank else None)
        cuts = dict(x={0: 1}, low={0: 1})
        return Problem(label, ops.q_shift_mix, BF16, make, "x", choices, cuts, {1: 1}, copies=mixes)

    problems = [
        problem(128, 192, 14, 3),
        problem(128, 768, 14, 3),
        problem(1, 192, 128, 3),
        problem(128, 192, 14, 5, rank=32),
    ]
    yield from _measure_all(problems, options)


@case()
def depthwise_conv2d(options: Options) -> Iterator[Measurement]:
    """Depthwise convolution and activation, in the shapes of the models' stages."""

    def problem(channels, height, width, kernel, act, bias=False) -> Problem:
        def make() -> dict[str, Tensor]:
            tensors = dict(
                x=_maps(BF16, batch, channels, height, width), weight=torch.randn(channels, 1, *kernel) * 0.3
            )
            return tensors | (dict(bias=torch.randn(channels)) if bias else {})

        batch = options.batch or 128
        label = f"B{batch} C{channels} {height}x{width} kernel {kernel[0]}x{kernel[1]} {act or 'linear'}"
        return Problem(label, ops.depthwise_conv2d, BF16, make, "x", dict(act=act), dict(x={0: 1}), {0: 1})

    problems = [
        problem(96, 56, 56, (3, 3), "silu"),
        problem(384, 14, 14, (3, 3), "silu"),
        problem(512, 56, 56, (3, 3), "gelu", bias=True),
        problem(1392, 14, 14, (3, 3), "gelu", bias=True),
        problem(144, 56, 56, (7, 7), None),
        problem(576, 14, 14, (7, 7), None),
        problem(320, 1, 196, (1, 3), "silu"),
    ]
    yield from _measure_all(problems, options)


@case()
def layer_norm(options: Options) -> Iterator[Measurement]:
    """Layer norm in the shapes of the T models."""

    def problem(batch, tokens, channels, groups=1) -> Problem:
        def make() -> dict[str, Tensor]:
            tensors = dict(x=torch.randn(batch, tokens, channels, dtype=BF16))
            if groups > 1:
                tensors["gate"] = torch.randn(batch, tokens, channels, dtype=BF16)
            return tensors | dict(weight=torch.randn(channels), bias=torch.randn(channels))

        batch = options.batch or batch
        label = f"B{batch} T{tokens} C{channels}" + (f" gated, {groups} groups" if groups > 1 else "")
        cuts = dict(x={0: 1}, gate={0: 1})
        return Problem(label, ops.layer_norm, BF16, make, "x", dict(groups=groups), cuts, {0: 1})

    problems = [
        problem(128, 3136, 96),
        problem(128, 784, 192),
        problem(128, 196, 384),
        problem(128, 49, 768),
        problem(128, 3136, 64, groups=4),
        problem(128, 196, 348, groups=4),
        problem(128, 196, 192, groups=3),
    ]
    yield from _measure_all(problems, options)


@case()
def layer_norm_grn(options: Options) -> Iterator[Measurement]:
    """LayerNorm with global response normalisation in the shapes of GSPN-T."""

    def problem(channels, side) -> Problem:
        def make() -> dict[str, Tensor]:
            parameters = {n: torch.randn(channels) for n in ("norm_weight", "norm_bias", "weight", "bias")}
            return dict(x=_maps(BF16, batch, channels, side, side), **parameters)

        batch = options.batch or 128
        label = f"B{batch} C{channels} {side}x{side}"
        return Problem(label, ops.layer_norm_grn, BF16, make, "x", {}, dict(x={0: 1}), {0: 1})

    problems = [problem(144, 56), problem(288, 28), problem(576, 14), problem(1152, 7)]
    yield from _measure_all(problems, options)


@case()
def squared_relu(options: Options) -> Iterator[Measurement]:
    """Squared ReLU in the shapes of Vision-RWKV's channel mix."""

    def problem(tokens, channels) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(x=torch.randn(batch, tokens, channels, dtype=BF16))

        label = f"B{batch} T{tokens} C{channels}"
        return Problem(label, ops.squared_relu, BF16, make, "x", {}, dict(x={0: 1}), {0: 1})

    batch = options.batch or 128
    yield from _measure_all([problem(196, 768), problem(196, 3072)], options)


@case()
def mlp(options: Options) -> Iterator[Measurement]:
    """MLP in the shapes of VMamba-T."""

    def problem(tokens, channels) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(
                x=torch.randn(batch, tokens, channels, dtype=BF16),
                weight1=torch.randn(4 * channels, channels, dtype=BF16) / channels**0.5,
                bias1=torch.randn(4 * channels, dtype=BF16),
                weight2=torch.randn(channels, 4 * channels, dtype=BF16) / (4 * channels) ** 0.5,
                bias2=torch.randn(channels, dtype=BF16),
            )

        label = f"B{batch} T{tokens} C{channels}"
        return Problem(label, ops.mlp, BF16, make, "x", {}, dict(x={0: 1}), {0: 1})

    batch = options.batch or 128
    yield from _measure_all([problem(3136, 96), problem(784, 192), problem(196, 384), problem(49, 768)], options)


@case()
def line_scan(options: Options) -> Iterator[Measurement]:
    """Line scan with coefficients from memory, as the official kernel has them, and expanded from a proxy."""

    def dense(batch, channels, side, chunk, official) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(
                x=torch.randn(batch, channels, side, side, dtype=FP16),
                gates=torch.randn(batch, 3, 1, channels, side, side, dtype=FP16),
                lam=torch.randn(batch, 1, channels, side, side, dtype=FP16),
            )

        batch = options.batch or batch
        part = min(16, channels)
        row = {0: 1, 1: part}
        cuts = dict(x=row, gates={0: 1, 3: part}, lam={0: 1, 2: part})
        label = f"dense B{batch} C{channels} {side}x{side} " + (f"chunk {chunk}" if chunk else "global")
        choices = dict(directions=["right"], chunk=chunk)
        return Problem(label, ops.line_scan, FP16, make, "x", choices, cuts, row, official)

    def proxied(batch, channels, side, chunk, aligned=False, dtype=BF16) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(
                x=_maps(dtype, batch, channels, side, side),
                gates=torch.randn(3, 4, channels, 8),
                lam=torch.randn(4, channels, 8),
                u=torch.randn(4, channels, 8),
                skip=torch.randn(4, channels, 8),
                proxy=_maps(dtype, batch, 8, side, side),
            )

        batch = options.batch or batch
        first = {0: 1}
        label = f"proxy B{batch} D{channels} {side}x{side} " + (f"chunk {chunk}" if chunk else "global")
        choices = dict(directions=SWEEPS, chunk=chunk, aligned=aligned)
        return Problem(label, ops.line_scan, dtype, make, "x", choices, dict(x=first, proxy=first), first)

    problems = [
        dense(128, 576, 56, 2, (2.20, 3.98)),
        dense(128, 2304, 14, 0, (2.68, 6.53)),
        dense(1, 576, 256, 0, (8.67, 20.9)),
        dense(1, 576, 1024, 0, (163, 369)),
        proxied(128, 144, 56, 2),
        proxied(128, 288, 28, 2),
        proxied(128, 576, 14, 0),
        proxied(1, 144, 512, 0),
    ]
    yield from _measure_all(problems, options)
