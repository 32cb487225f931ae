"""The scans' CPU backends side by side, forward and forward with backward."""

from collections.abc import Callable, Iterator

import torch

from vla.ops import scan2d, selective_scan, use_backend

from ..registry import Measurement, case

CROSS = ["row", "col", "row_rev", "col_rev"]


def _compare_backends(
    label: str, function: Callable, tensors: dict, backends: tuple[str, ...], **options
) -> Iterator[Measurement]:
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}

    def forward(backend: str) -> torch.Tensor:
        with use_backend(backend), torch.no_grad():
            return function(**leaves, **options)

    def both(backend: str, arguments: dict) -> list[torch.Tensor]:
        with use_backend(backend):
            y = function(**arguments, **options)
            return [y, *torch.autograd.grad(y.square().sum(), list(arguments.values()))]

    def check(backend: str) -> None:
        for actual, expected in zip(both(backend, leaves), both("torch", exact), strict=True):
            error = (actual - expected).abs().max() / expected.abs().max()
            assert error < 1e-3, f"{label} {backend}: relative error {error:.2g}"

    for backend in backends:
        details = {"backend": backend, "case": label, "dtype": "float32"}
        slow = backend == "naive"
        yield Measurement(
            f"{label} forward, {backend}",
            lambda b=backend: forward(b),
            lambda b=backend: check(b),
            slow,
            details | {"pass": "forward"},
        )
        yield Measurement(
            f"{label} forward + backward, {backend}",
            lambda b=backend: both(b, leaves),
            lambda: None,
            slow,
            details | {"pass": "forward + backward"},
        )


@case
def cpu_selective_scan(device: torch.device) -> Iterator[Measurement]:
    """Selective scan, batch 1, 384 channels, 3136 steps."""
    for states in (1, 16):
        torch.manual_seed(0)
        tensors = dict(
            u=torch.randn(1, 384, 3136),
            delta=torch.randn(1, 384, 3136) - 1,
            A=-torch.rand(384, states) - 0.1,
            B=torch.randn(1, 4, states, 3136),
            C=torch.randn(1, 4, states, 3136),
            D=torch.randn(384),
            delta_bias=torch.randn(384),
        )
        label = f"B1 D384 L3136 N{states}"
        yield from _compare_backends(label, selective_scan, tensors, ("naive", "torch", "numba"), delta_softplus=True)


@case
def cpu_scan2d(device: torch.device) -> Iterator[Measurement]:
    """Directional scan in the shapes of VMamba-T's four stages, batch 1."""
    for channels, side in ((96, 56), (192, 28), (384, 14), (768, 7)):
        torch.manual_seed(0)
        rank = channels // 16
        tensors = dict(
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
        yield from _compare_backends(label, scan2d, tensors, ("torch", "numba"), directions=CROSS)
