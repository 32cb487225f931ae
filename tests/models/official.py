"""Running a module on weights with official names, so that their gradients can be compared one by one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.golden import fill_state_dict
from tests.tolerance import assert_close


def check(name: str, actual: Tensor, expected: Tensor, relative: float | None = None) -> None:
    """`assert_close` to what is stored: float64, float32, or a gradient that vanishes up to rounding noise."""
    if expected.numel() and expected.abs().max() < 1e-12:
        assert actual.abs().max() < (1e-10 if actual.dtype == torch.float64 else 1e-4), name
        return
    if relative is None and actual.dtype == torch.float64:
        relative = 1e-9 if expected.dtype == torch.float64 else 2e-7
    assert_close(name, actual, expected, relative)


class Official:
    """Official weights, and the module that computes with them through its checkpoint filter.

    The filter is made of differentiable operations, so a backward ends in the official tensors themselves.

    Args:
        module: Module under test, whose own weights are not used.
        filter_fn: From the official state dict to the module's.
        shapes: Shapes of the official weights by name.
        dtype: dtype of weights and computation.
    """

    def __init__(self, module: nn.Module, filter_fn: Callable, shapes: dict, dtype: torch.dtype):
        self.module = module.to(dtype)
        self.filter_fn = filter_fn
        self.weights = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in fill_state_dict(shapes).items()
        }
        for name, value in self.weights.items():
            value.requires_grad_(value.is_floating_point() and ".running_" not in f".{name}")

    def __call__(self, x: Tensor, method: str = "forward", **kwargs):
        native = self.filter_fn(self.weights)
        expected, given = set(self.module.state_dict()), set(native)
        assert expected == given, f"missing {sorted(expected - given)}, unexpected {sorted(given - expected)}"
        caller = _Method(self.module, method)
        return torch.func.functional_call(caller, {f"module.{k}": v for k, v in native.items()}, (x,), kwargs)

    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.weights.items() if value.grad is not None}


class _Method(nn.Module):
    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args, **kwargs):
        return getattr(self.module, self.method)(*args, **kwargs)
