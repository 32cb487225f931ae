"""What must hold before a time is worth anything."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vla.ops import use_backend

# Norm of the difference over the norm of the reference, which is computed in float64 from the same rounded inputs.
LIMITS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}

# Per argument of an operator, its dimensions that are cut, and to which size.
Cuts = Mapping[str, Mapping[int, int]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN where `actual` is not finite."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check_close(name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Raises `AssertionError` unless the relative error is within the limit."""
    error = relative_error(actual, expected)
    assert error <= limit, f"{name}: relative error {error:.2g}, allowed {limit:.2g}"


def check_operator(function: Callable, tensors: dict[str, Tensor], options: dict, cuts: Cuts, out_cut: dict) -> None:
    """Compares a call and all its gradients with PyTorch's path in float64, on a part of the problem.

    The call runs whole, as it is timed. The part is independent of the rest (some of the batch, some channels): with a
    loss that only looks at the part's outputs, the gradients of shared tensors are those of the part as well.

    Args:
        function: Operator of `vla.ops`.
        tensors: Its tensor arguments.
        options: Its other arguments.
        cuts: What of each tensor belongs to the part.
        out_cut: What of the output.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = function(**leaves, **options)
    weight = torch.zeros_like(out)
    part = _cut(weight, out_cut)
    part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    grads = torch.autograd.grad(out, list(leaves.values()), weight)

    exact = {n: _cut(t, cuts.get(n, {})).detach().double().requires_grad_() for n, t in tensors.items()}
    with use_backend("torch"):
        expected = function(**exact, **options)
        expected_grads = torch.autograd.grad(expected, list(exact.values()), part.double())
    limit = LIMITS[out.dtype]
    check_close("output", _cut(out, out_cut), expected, limit)
    for (name, tensor), grad, reference in zip(tensors.items(), grads, expected_grads, strict=True):
        check_close(f"gradient of {name}", _cut(grad, cuts.get(name, {})), reference, max(limit, LIMITS[tensor.dtype]))


def _cut(tensor: Tensor, cut: Mapping[int, int]) -> Tensor:
    for dim, size in cut.items():
        tensor = tensor.narrow(dim, 0, size)
    return tensor
