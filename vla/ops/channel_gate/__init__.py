"""GroupMamba's gate of channels, a squeeze-and-excitation, https://arxiv.org/abs/2407.13772."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["channel_gate"]

_OP = "channel_gate"


def _infer(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, scale: Tensor) -> Tensor:
    check_ndim(_OP, "x", x, (2,), "(B, C)")
    channels = x.shape[1]
    check_ndim(_OP, "weight1", weight1, (2,), "(H, C)")
    hidden = weight1.shape[0]
    check_shape(_OP, "weight1", weight1, (hidden, channels), "(H, C)")
    check_shape(_OP, "bias1", bias1, (hidden,), "(H,)")
    check_shape(_OP, "weight2", weight2, (channels, hidden), "(C, H)")
    check_shape(_OP, "bias2", bias2, (channels,), "(C,)")
    check_shape(_OP, "scale", scale, (1,), "(1,)")
    check_float(_OP, x=x, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, scale=scale)
    return x.new_empty(x.shape)


def _flops(x, weight1, bias1, weight2, bias2, scale) -> int:
    return 2 * x[0] * (weight1.numel() + weight2.numel())


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor scale) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
)


def channel_gate(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, scale: Tensor) -> Tensor:
    r"""Factors of channels from their means: two linear layers, for inference in one launch.

        gate = scale sigmoid(weight2 relu(weight1 x + bias1) + bias2)

    Computed in float32 (float64 for float64 inputs). Every tensor argument is differentiable, by PyTorch's own
    operators.

    Args:
        x: Mean of every channel, (B, C).
        weight1: Weight of the first layer, (H, C).
        bias1: Its bias, (H,).
        weight2: Weight of the second layer, (C, H).
        bias2: Its bias, (C,).
        scale: Factor of all, (1,).

    Returns:
        Contiguous (B, C).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.channel_gate(x, weight1, bias1, weight2, bias2, scale)
    else:
        return operator(x, weight1, bias1, weight2, bias2, scale)
