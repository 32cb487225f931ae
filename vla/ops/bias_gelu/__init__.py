"""GELU of a linear layer's output with its bias, https://arxiv.org/abs/1606.08415."""

import torch
from torch import Tensor

from .._checks import check_float, check_shape
from .._registry import Operator

__all__ = ["bias_gelu"]

_OP = "bias_gelu"


def _infer(x: Tensor, bias: Tensor) -> Tensor:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected (..., C) with C > 0")
    check_shape(_OP, "bias", bias, (x.shape[-1],), "(C,)")
    check_float(_OP, x=x, bias=bias)
    return x.new_empty(x.shape)


def _flops(x, bias) -> int:
    # As many as one polynomial and one exponential.
    return 10 * x.numel()


operator = Operator(
    _OP,
    "(Tensor x, Tensor bias) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x + bias)`, whose backward sums the gradient of the bias in the pass that computes that of x.

    Computed in float32 (float64 for float64 inputs) whatever the inputs are.

    Args:
        x: Tokens or a map with its channels last, (..., C).
        bias: (C,).

    Returns:
        Contiguous (..., C), in the dtype of x.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.bias_gelu(x, bias)
    else:
        return operator(x, bias)
