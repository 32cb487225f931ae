"""Convolution, batch norm and ReLU of a network that is evaluated."""

import torch
from torch import Tensor

from .._checks import check_convolution, check_float, check_result_dtype, check_shape, check_window, convolved_size
from .._registry import Operator

__all__ = ["conv_norm_relu"]

_OP = "conv_norm_relu"


def _infer(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    padding_h: int,
    padding_w: int,
    eps: float,
    stride_h: int,
    stride_w: int,
    dtype: torch.dtype | None,
) -> Tensor:
    check_convolution(_OP, x, weight)
    if padding_h < 0 or padding_w < 0:
        raise ValueError(f"{_OP}: padding_h is {padding_h} and padding_w {padding_w}, expected 0 or more")
    if stride_h < 1 or stride_w < 1:
        raise ValueError(f"{_OP}: stride_h is {stride_h} and stride_w {stride_w}, expected 1 or more")
    check_result_dtype(_OP, dtype)
    size = convolved_size(x, weight, (stride_h, stride_w), (padding_h, padding_w))
    check_window(_OP, x, weight, size)
    channels = weight.shape[0]
    if mean.dim() != 1 or len(mean) == 0 or channels % len(mean) != 0:
        raise ValueError(f"{_OP}: mean has shape {tuple(mean.shape)}, expected (N,), N a divisor of D = {channels}")
    for name, tensor in (("var", var), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(_OP, name, tensor, (len(mean),), "(N,)")
    check_float(_OP, x=x, weight=weight, mean=mean, var=var, norm_weight=norm_weight, norm_bias=norm_bias)
    return x.new_empty(x.shape[0], *size, channels, dtype=dtype).permute(0, 3, 1, 2)


def _flops(x, weight, mean, var, norm_weight, norm_bias, padding_h, padding_w, eps, stride_h, stride_w, dtype) -> int:
    height = (x[2] + 2 * padding_h - weight[2]) // stride_h + 1
    width = (x[3] + 2 * padding_w - weight[3]) // stride_w + 1
    return 2 * x[0] * height * width * weight.numel()


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor norm_weight, Tensor norm_bias, int padding_h, "
    "int padding_w, float eps, int stride_h, int stride_w, ScalarType? dtype) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
)


def conv_norm_relu(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    padding_h: int = 0,
    padding_w: int = 0,
    eps: float = 1e-5,
    stride_h: int = 1,
    stride_w: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""A convolution, a batch norm with given statistics, and ReLU, for inference in one pass over memory.

        y = max(0, (conv(x) - mean) / sqrt(var + eps) * norm_weight + norm_bias)

    Up to 32 channels of x by a kernel, above in 16 bits by cuDNN. The products are of numbers in the dtype of the
    result, everything else is computed in float32 (float64 for float64 x). Every tensor argument is differentiable, by
    PyTorch's own operators.

    Args:
        x: Maps, (B, C, H, W), in any memory format.
        weight: Kernels, (D, C, KH, KW).
        mean: Mean per channel of the result, (N,), repeated for D = N, 2 N, ... channels like the other three.
        var: Variance, (N,).
        norm_weight: Scale, (N,).
        norm_bias: Shift, (N,).
        padding_h: Zeros above and below the map.
        padding_w: Zeros on both its sides.
        eps: Added to the variance.
        stride_h: Rows from one window to the next.
        stride_w: Columns from one window to the next.
        dtype: dtype of the result, to which pictures in float32 are rounded as they are read; None for that of x.

    Returns:
        (B, D, (H + 2 padding_h - KH) // stride_h + 1, (W + 2 padding_w - KW) // stride_w + 1), channels last in memory.

    Raises:
        ValueError: For a shape, device, padding or stride that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.conv_norm_relu(
            x, weight, mean, var, norm_weight, norm_bias, padding_h, padding_w, eps, stride_h, stride_w, dtype
        )
    else:
        vectors = (mean, var, norm_weight, norm_bias)
        return operator(x, weight, *vectors, padding_h, padding_w, eps, stride_h, stride_w, dtype)
