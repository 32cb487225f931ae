"""Depthwise convolution by Triton kernels: on tensor cores where that is faster, else by multiply-adds."""

import torch
from torch import Tensor

from .._maps import channels_last
from . import _triton_strips as strips
from . import _triton_tiles as tiles


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    dtype: torch.dtype | None,
    zeros: int = 0,
    flip: bool = False,
) -> Tensor:
    """The convolution, with `flip` its adjoint, as a channels-last map with `zeros` channels behind it."""
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, channels + zeros, dtype=dtype).permute(0, 3, 1, 2)
    if y.numel() > 0:
        x = channels_last(x)
        kernels = tiles if zeros == 0 and tiles.suits(x, weight, y.dtype) else strips
        kernels.convolve(x, weight, bias, act, flip, y)
    return y


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None, zeros: int = 0
) -> Tensor:
    return _convolved(x, weight, bias, act, dtype, zeros)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    dtype: torch.dtype | None,
    zeros: int = 0,
) -> list[Tensor | None]:
    g = grads[0][:, : x.shape[1]]
    if g.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, weight, bias)]
    g, x = channels_last(g), channels_last(x)
    if act is None and bias is None and tiles.suits(x, weight, g.dtype) and tiles.suits(g, weight, x.dtype):
        gx, g_weight, g_bias = None, tiles.kernels_gradient(g, x, weight), None
    else:
        gx, g_weight, g_bias = strips.backward(g, x, weight, bias, act)
    if gx is None:
        gx = _convolved(g, weight, None, None, x.dtype, flip=True)
    return [gx, g_weight, g_bias]
