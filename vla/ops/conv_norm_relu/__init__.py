"""Convolution, batch norm and ReLU of a network that is evaluated."""

import torch
from torch import Tensor

from .._checks import check_convolution, check_float, check_shape, check_window, convolved_size
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
) -> Tensor:
    check_convolution(_OP, x, weight)
    if padding_h < 0 or padding_w < 0:
        raise ValueError(f"{_OP}: padding_h is {padding_h} and padding_w {padding_w}, expected 0 or more")
    size = convolved_size(x, weight, 1, (padding_h, padding_w))
    check_window(_OP, x, weight, size)
    channels = weight.shape[0]
    if mean.dim() != 1 or len(mean) == 0 or channels % len(mean) != 0:
        raise ValueError(f"{_OP}: mean has shape {tuple(mean.shape)}, expected (N,), N a divisor of D = {channels}")
    for name, tensor in (("var", var), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(_OP, name, tensor, (len(mean),), "(N,)")
    check_float(_OP, x=x, weight=weight, mean=mean, var=var, norm_weight=norm_weight, norm_bias=norm_bias)
    return x.new_empty(x.shape[0], *size, channels).permute(0, 3, 1, 2)


def _flops(x, weight, mean, var, norm_weight, norm_bias, padding_h, padding_w, eps) -> int:
    height, width = x[2] + 2 * padding_h - weight[2] + 1, x[3] + 2 * padding_w - weight[3] + 1
    return 2 * x[0] * height * width * weight.numel()


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor norm_weight, Tensor norm_bias, int padding_h, "
    "int padding_w, float eps) -> Tensor",
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
) -> Tensor:
    r"""A convolution of stride 1, a batch norm with given statistics, and ReLU, for inference in one pass over memory.

        y = max(0, (conv(x) - mean) / sqrt(var + eps) * norm_weight + norm_bias)

    Up to 32 channels of x by a kernel, above in 16 bits by cuDNN. The products are of numbers in the dtype of x,
    everything else is computed in float32 (float64 for float64 x). Every tensor argument is differentiable, by
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

    Returns:
        (B, D, H + 2 padding_h - KH + 1, W + 2 padding_w - KW + 1) in the dtype of x, channels last in memory.

    Raises:
        ValueError: For a shape, device or padding that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.conv_norm_relu(x, weight, mean, var, norm_weight, norm_bias, padding_h, padding_w, eps)
    else:
        return operator(x, weight, mean, var, norm_weight, norm_bias, padding_h, padding_w, eps)
