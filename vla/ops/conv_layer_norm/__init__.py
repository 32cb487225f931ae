"""Convolution of a picture, layer norm of its channels, and GELU: the first layers of a backbone."""

import torch
from torch import Tensor

from .._checks import check_convolution, check_float, check_result_dtype, check_shape, check_window, convolved_size
from .._registry import Operator
from ._torch import forward

__all__ = ["conv_layer_norm"]

_OP = "conv_layer_norm"


def _infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    padding: int,
    eps: float,
    act: str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    check_convolution(_OP, x, weight)
    if stride < 1 or padding < 0:
        raise ValueError(f"{_OP}: stride is {stride} and padding {padding}, expected at least 1 and 0")
    out, size = weight.shape[0], convolved_size(x, weight, (stride, stride), (padding, padding))
    check_window(_OP, x, weight, size)
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (out,), "(D,)")
    if act not in (None, "gelu"):
        raise ValueError(f"{_OP}: act is {act!r}, expected 'gelu' or None")
    check_float(_OP, x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check_result_dtype(_OP, dtype)
    return x.new_empty(x.shape[0], *size, out, dtype=dtype).permute(0, 3, 1, 2)


def _flops(x, weight, bias, norm_weight, norm_bias, stride, padding, eps, act, dtype) -> int:
    pixels = x[0]
    for i in (2, 3):
        pixels *= (x[i] + 2 * padding - weight[i]) // stride + 1
    return pixels * weight[0] * (2 * weight[1] * weight[2] * weight[3] + 8)


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, int stride, int padding, float eps, "
    "str? act, ScalarType? dtype) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    without_gradient=("x",),
)


def conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    eps: float = 1e-5,
    act: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A convolution, the layer norm of its output's channels, and GELU, in one pass over memory.

        s = conv(x) + bias
        n = (s - mean(s)) / sqrt(var(s) + eps)
        y = gelu(n * norm_weight + norm_bias)               (GELU only if given)

    For a few channels, as a picture has: a kernel computes the convolution anew in the backward. The products are of
    numbers in the dtype of the result, everything else is computed in float32. The gradient of `x` is the one that is
    left to PyTorch's own operators, with all of the operator where it is wanted. Maps of 16 channels or more in 16 bits
    have a kernel for inference: for a float32 result too where `weight` has 16 bits, as the products then are the same.

    Args:
        x: Pictures (B, C, H, W), in any memory format.
        weight: (D, C, KH, KW).
        bias: (D,).
        norm_weight: Scale per channel of the output, (D,).
        norm_bias: Shift per channel of the output, (D,).
        stride: Pixels from one window to the next, in both directions.
        padding: Zeros around the picture.
        eps: Added to the variance.
        act: `'gelu'` or None.
        dtype: dtype of the result, under autocast that of the layer which follows; None for that of `x`.

    Returns:
        (B, D, ~H / stride, ~W / stride), channels last in memory.

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    args = (x, weight, bias, norm_weight, norm_bias, stride, padding, eps, act, dtype)
    if x.requires_grad and torch.is_grad_enabled():
        _infer(*args)
        return forward(*args)
    return operator(*args)
