"""Depthwise convolution, GELU and the linear layer behind them: GroupMamba's MLP from its hidden map on."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["conv_gelu_linear"]

_OP = "conv_gelu_linear"


def _infer(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    check_ndim(_OP, "x", x, (4,), "(B, H, W, C)")
    channels = x.shape[3]
    if channels == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected (B, H, W, C) with C > 0")
    check_shape(_OP, "weight", weight, (channels, 1, 3, 3), "(C, 1, 3, 3)")
    check_shape(_OP, "bias", bias, (channels,), "(C,)")
    if out_weight.dim() != 2 or out_weight.shape[1] != channels:
        raise ValueError(f"{_OP}: out_weight has shape {tuple(out_weight.shape)}, expected (D, C) with C = {channels}")
    check_shape(_OP, "out_bias", out_bias, out_weight.shape[:1], "(D,)")
    check_float(_OP, x=x, weight=weight, bias=bias, out_weight=out_weight, out_bias=out_bias)
    return x.new_empty(*x.shape[:3], out_weight.shape[0])


def _flops(x, weight, bias, out_weight, out_bias) -> int:
    return 2 * x[0] * x[1] * x[2] * (weight.numel() + out_weight.numel())


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor bias, Tensor out_weight, Tensor out_bias) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
    # Tensor cores multiply.
    kernel_dtypes=(torch.bfloat16, torch.float16),
)


def conv_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    r"""A depthwise 3x3 convolution, GELU and a linear layer, for inference without the map between them in memory.

        s[b, h, w, c] = bias[c] + sum_ij weight[c, 0, i, j] x[b, h + i - 1, w + j - 1, c]
        y             = gelu(s) out_weight^T + out_bias

    Sums are float32 (float64 for float64 x); the activated channels and the linear layer's weight are rounded to the
    dtype of x. Every tensor argument is differentiable, by PyTorch's own operators.

    Args:
        x: Map, (B, H, W, C).
        weight: Kernels, (C, 1, 3, 3).
        bias: Their bias, (C,).
        out_weight: Weight of the linear layer, (D, C).
        out_bias: Its bias, (D,).

    Returns:
        Contiguous (B, H, W, D) in the dtype of x.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.conv_gelu_linear(x, weight, bias, out_weight, out_bias)
    else:
        return operator(x, weight, bias, out_weight, out_bias)
