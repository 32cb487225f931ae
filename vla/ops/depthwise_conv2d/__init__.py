"""Depthwise convolution of a channels-last map with its activation: the local mixing in front of every scan."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["ACTIVATIONS", "depthwise_conv2d"]

_OP = "depthwise_conv2d"
ACTIVATIONS = ("silu", "gelu")


def _infer(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None, zeros: int
) -> Tensor:
    check_ndim(_OP, "x", x, (4,), "(B, C, H, W)")
    batch, channels, height, width = x.shape
    check_ndim(_OP, "weight", weight, (4,), "(C, 1, kh, kw)")
    rows, columns = weight.shape[2:]
    check_shape(_OP, "weight", weight, (channels, 1, rows, columns), "(C, 1, kh, kw)")
    if rows % 2 == 0 or columns % 2 == 0:
        raise ValueError(f"{_OP}: weight has shape {tuple(weight.shape)}, expected odd kh and kw")
    if bias is not None:
        check_shape(_OP, "bias", bias, (channels,), "(C,)")
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"{_OP}: act is {act!r}, expected None or one of {', '.join(ACTIVATIONS)}")
    if zeros < 0:
        raise ValueError(f"{_OP}: zeros is {zeros}, expected none or more")
    check_float(_OP, x=x, weight=weight, bias=bias)
    check_result_dtype(_OP, dtype)
    return x.new_empty(batch, height, width, channels + zeros, dtype=dtype).permute(0, 3, 1, 2)


def _flops(x, weight, bias, act, dtype, zeros) -> int:
    return 2 * x[0] * x[1] * x[2] * x[3] * weight[2] * weight[3]


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, str? act, ScalarType? dtype, int zeros) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    dtype: torch.dtype | None = None,
    zeros: int = 0,
) -> Tensor:
    r"""Depthwise convolution of stride 1, padded with zeros to the same size, and an activation, in one pass.

        y[b, c, h, w] = act(bias[c] + sum_ij weight[c, 0, i, j] x[b, c, h + i - kh // 2, w + j - kw // 2])

    Computed in float32 (float64 for float64 inputs). NVIDIA's GPUs may round kernels of more than 9 taps to the dtype
    of a map of 16 bits first, as autocast does, and spread what is not finite to channels and columns beside it. Every
    tensor argument is differentiable; of the forward only the arguments are kept, the backward computes the
    activation's derivative anew.

    Args:
        x: Map, (B, C, H, W), any memory format; `torch.channels_last` needs no copy.
        weight: Kernels, (C, 1, kh, kw), kh and kw odd.
        bias: Bias, (C,).
        act: None, `'silu'` or `'gelu'` (with the exact error function).
        dtype: dtype of the result; None for that of `x`.
        zeros: Channels of zeros behind those of the result, with which the pixels of any number of channels start at
            addresses that tensor cores like.

    Returns:
        Map (B, C + zeros, H, W), in channels-last memory.

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.depthwise_conv2d(x, weight, bias, act, dtype, zeros)
    else:
        return operator(x, weight, bias, act, dtype, zeros)
