"""The scans' CPU backends side by side, forward and forward with backward."""

from collections.abc import Callable, Iterator

import torch

from vla.ops import scan2d, selective_scan, use_backend

from ..checks import check_operator
from ..registry import Measurement, Options, case

CROSS = ["row", "col", "row_rev", "col_rev"]


def _compare_backends(
    label: str, function: Callable, make: Callable[[], dict], backends: tuple[str, ...], **choices
) -> Iterator[Measurement]:
    def checked(backend: str) -> dict:
        tensors = make()
        with use_backend(backend):
            check_operator(function, tensors, choices, {}, {})
        return tensors

    def forward(backend: str) -> Callable[[], torch.Tensor]:
        tensors = checked(backend)

        def run() -> torch.Tensor:
            with use_backend(backend), torch.no_grad():
                return function(**tensors, **choices)

        return run

    def both(backend: str) -> Callable[[], list[torch.Tensor]]:
        leaves = {name: t.detach().requires_grad_() for name, t in checked(backend).items()}

        def run() -> list[torch.Tensor]:
            with use_backend(backend):
                y = function(**leaves, **choices)
                return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

        return run

    for backend in backends:
        for what, setup in (("forward", forward), ("forward + backward", both)):
            yield Measurement(
                f"{label} {what}, {backend}",
                lambda setup=setup, backend=backend: setup(backend),
                slow=backend == "naive",
                details={"backend": backend, "case": label, "dtype": "float32", "pass": what},
            )


@case(in_turns=True)
def cpu_selective_scan(options: Options) -> Iterator[Measurement]:
    """Selective scan, batch 1, 384 channels, 3136 steps."""
    for states in (1, 16):

        def make(states: int = states) -> dict:
            torch.manual_seed(0)
            return dict(
                u=torch.randn(1, 384, 3136),
                delta=torch.randn(1, 384, 3136) - 1,
                A=-torch.rand(384, states) - 0.1,
                B=torch.randn(1, 4, states, 3136),
                C=torch.randn(1, 4, states, 3136),
                D=torch.randn(384),
                delta_bias=torch.randn(384),
            )

        label = f"B1 D384 L3136 N{states}"
        yield from _compare_backends(label, selective_scan, make, ("naive", "torch", "numba"), delta_softplus=True)


@case(in_turns=True)
def cpu_scan2d(options: Options) -> Iterator[Measurement]:
    """Directional scan in the shapes of VMamba-T's four stages, batch 1."""
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):

        def make(channels: int = channels, side: int = side) -> dict:
            torch.manual_seed(0)
            rank = channels // 16
            return dict(
                x=torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last),
                dt=torch.randn(1, side, side, 4, rank).permute(0, 3, 4, 1, 2),
                A=-torch.rand(4, channels, 1) - 0.1,
                B=torch.randn(1, 4, 1, side, side),
                C=torch.randn(1, 4, 1, side, side),
                D=torch.randn(4, channels),
                dt_weight=torch.randn(4, channels, rank) / rank**0.5,
                dt_bias=torch.randn(4, channels) - 3,
            )

        label = f"B1 D{channels} {side}x{side} N1"
        yield from _compare_backends(label, scan2d, make, ("torch", "numba"), directions=CROSS)
