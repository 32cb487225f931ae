"""Squared ReLU, the activation of Vision-RWKV's channel mix: https://arxiv.org/abs/2109.08668."""

import torch
from torch import Tensor

from .._checks import check_float
from .._registry import Operator

__all__ = ["squared_relu"]

_OP = "squared_relu"


class _SavesOutput(Operator):
    """Saves the output for the backward, which the linear layer that follows saves anyway."""

    def _setup_context(self, ctx, inputs, output, saved=()) -> None:
        super()._setup_context(ctx, (output,), output, saved)


def _infer(x: Tensor) -> Tensor:
    check_float(_OP, x=x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


operator = _SavesOutput(
    _OP,
    "(Tensor x) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=lambda x: 2 * x.numel(),
)


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`, keeping only the result for the backward.

    Args:
        x: Any shape.

    Returns:
        The squares, contiguous, in the dtype of `x`.

    Raises:
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.squared_relu(x)
    else:
        return operator(x)
