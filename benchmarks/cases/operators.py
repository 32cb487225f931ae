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
        like: Argument that the output has the shape and dtype of.
        options: Other arguments.
        cuts: A part of each argument that is independent of the rest, on which the result is checked.
        out_cut: The same of the output.
        official: Milliseconds of the official forward and backward on an H200.
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


def _measure(problem: Problem, device: torch.device) -> Iterator[Measurement]:
    """A forward without a graph, and a backward by itself.

    The floors count every argument and result once: a backward reads the arguments and the incoming gradient and
    writes a gradient of every argument.
    """
    function, options = problem.function, problem.options
    with torch.device("meta"):
        sizes = {name: t.numel() * t.element_size() for name, t in problem.make().items()}
    inputs, output = sum(sizes.values()), sizes[problem.like]

    def prepare() -> dict[str, Tensor]:
        torch.manual_seed(0)
        with torch.device(device):
            tensors = problem.make()
        check_operator(function, tensors, options, problem.cuts, problem.out_cut)
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
    comparable = options.device.type == "cuda" and options.batch is None
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
    """Directional scan in the shapes of VMamba-T's and GroupMamba-T's stages, and at high resolution."""

    def problem(batch, channels, side, rank, dtype=BF16, states=1, grouped=False) -> Problem:
        def make() -> dict[str, Tensor]:
            # One projection of the pixels gives dt, B and C, which are views of it, as in the models.
            projected = _maps(dtype, batch, 4 * (rank + 2 * states), side, side)
            dt, B, C = projected.unflatten(1, (4, rank + 2 * states)).split([rank, states, states], dim=2)
            return dict(
                x=_maps(dtype, batch, 4 * channels if grouped else channels, side, side),
                dt=dt,
                A=-torch.arange(1.0, states + 1).repeat(4, channels, 1),
                B=B,
                C=C,
                D=torch.ones(4, channels),
                dt_weight=torch.randn(4, channels, rank) * rank**-0.5,
                dt_bias=torch.full((4, channels), -3.0),
            )

        batch = options.batch or batch
        first = {0: 1}
        kind = "grouped " if grouped else ""
        label = f"{kind}B{batch} D{channels} {side}x{side} N{states} R{rank}"
        choices = dict(directions=CROSS, grouped=grouped)
        return Problem(label, ops.scan2d, dtype, make, "x", choices, dict(x=first, dt=first, B=first, C=first), first)

    problems = [
        problem(128, 96, 56, 6),
        problem(128, 96, 56, 6, FP32),
        problem(128, 192, 28, 12),
        problem(128, 384, 14, 24),
        problem(128, 768, 7, 48),
        problem(1, 96, 512, 6),
        problem(16, 192, 56, 12, states=16),
        problem(128, 16, 56, 1, grouped=True),
        problem(128, 87, 14, 6, grouped=True),
    ]
    yield from _measure_all(problems, options)


@case()
def bi_wkv(options: Options) -> Iterator[Measurement]:
    """Bi-WKV in the shapes of Vision-RWKV from 224 to 2048 pixels."""

    def problem(batch, length, channels, dtype, official=(None, None)) -> Problem:
        def make() -> dict[str, Tensor]:
            return dict(
                w=torch.linspace(0.1, 5.0, channels) / length,
                u=torch.randn(channels),
                k=torch.randn(batch, length, channels, dtype=dtype),
                v=torch.randn(batch, length, channels, dtype=dtype),
            )

        batch = options.batch or batch
        first = {0: 1}
        return Problem(
            f"B{batch} T{length} C{channels}", ops.bi_wkv, dtype, make, "v", {}, dict(k=first, v=first), first, official
        )

    problems = [
        problem(128, 196, 192, FP32, (0.60, 1.37)),
        problem(128, 196, 192, BF16),
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
