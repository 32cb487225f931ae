"""Convolution, layer norm of its channels, and GELU or a second norm: the first layers of a backbone."""

import torch
from torch import Tensor

from .._checks import check_convolution, check_float, check_result_dtype, check_shape, check_window, convolved_size
from .._registry import Operator
from ._torch import forward

__all__ = ["conv_layer_norm", "conv_layer_norm_twice"]

_OP = "conv_layer_norm"


def _infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    stride: int,
    padding: int,
    eps: float,
    next_eps: float,
    act: str | None,
    dtype: torch.dtype | None,
    next_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    check_convolution(_OP, x, weight)
    if stride < 1 or padding < 0:
        raise ValueError(f"{_OP}: stride is {stride} and padding {padding}, expected at least 1 and 0")
    out, size = weight.shape[0], convolved_size(x, weight, (stride, stride), (padding, padding))
    check_window(_OP, x, weight, size)
    vectors = dict(
        bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, next_weight=next_weight, next_bias=next_bias
    )
    for name, tensor in vectors.items():
        if tensor is not None:
            check_shape(_OP, name, tensor, (out,), "(D,)")
    if act not in (None, "gelu"):
        raise ValueError(f"{_OP}: act is {act!r}, expected 'gelu' or None")
    check_float(_OP, x=x, weight=weight, **vectors)
    for result in (dtype, next_dtype):
        check_result_dtype(_OP, result)
    y = x.new_empty(x.shape[0], *size, out, dtype=dtype).permute(0, 3, 1, 2)
    # An empty map like the other.
    return y, torch.empty_like(y if next_weight is not None else y[:0], dtype=next_dtype)


def _flops(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    next_weight,
    next_bias,
    stride,
    padding,
    eps,
    next_eps,
    act,
    dtype,
    next_dtype,
) -> int:
    pixels = x[0]
    for i in (2, 3):
        pixels *= (x[i] + 2 * padding - weight[i]) // stride + 1
    return pixels * weight[0] * (2 * weight[1] * weight[2] * weight[3] + (8 if next_weight is None else 16))


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor norm_weight, Tensor norm_bias, Tensor? next_weight, "
    "Tensor? next_bias, int stride, int padding, float eps, float next_eps, str? act, ScalarType? dtype, "
    "ScalarType? next_dtype) -> (Tensor, Tensor)",
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
    vectors = (bias, norm_weight, norm_bias, None, None)
    return _call(x, weight, *vectors, stride, padding, eps, 0.0, act, dtype, None)[0]


def conv_layer_norm_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    next_weight: Tensor,
    next_bias: Tensor,
    stride: int = 1,
    padding: int = 0,
    eps: float = 1e-5,
    next_eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    next_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`conv_layer_norm`, and the layer norm of its result that the first block of a network begins with.

    For inference: gradients are by PyTorch's own operators.

    Args:
        x: Maps (B, C, H, W), in any memory format.
        weight: (D, C, KH, KW).
        bias: (D,).
        norm_weight: Scale per channel of the first norm, (D,).
        norm_bias: Its shift per channel, (D,).
        next_weight: Scale per channel of the second norm, (D,).
        next_bias: Its shift per channel, (D,).
        stride: Pixels from one window to the next, in both directions.
        padding: Zeros around the map.
        eps: Added to the variance by the first norm.
        next_eps: Added to the variance by the second norm.
        dtype: dtype of the first norm; None for that of `x`.
        next_dtype: dtype of the second norm; None for that of the first.

    Returns:
        Both norms, (B, D, ~H / stride, ~W / stride), channels last in memory.

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    vectors = (bias, norm_weight, norm_bias, next_weight, next_bias)
    return _call(x, weight, *vectors, stride, padding, eps, next_eps, None, dtype, next_dtype)


def _call(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    if x.requires_grad and torch.is_grad_enabled():
        _infer(x, *args)
        return forward(x, *args)
    return operator(x, *args)
