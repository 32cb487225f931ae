"""The convolution as products of pixels and taps on tensor cores, normed before it reaches memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import convolved_size
from .._triton import cdiv, kernel, next_power_of_2, product, product_precision

BLOCK_P = 128


@triton.jit
def _channel(pointer, i, exists):
    """A number of every channel, (1, WIDTH)."""
    return tl.load(pointer + i, exists, 0.0).to(tl.float32)[None, :]


@kernel(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_norm_relu_fwd_kernel(
    x,
    weight,
    mean,
    var,
    norm_weight,
    norm_bias,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_P pixels of y (pixels, D), from x (B, H, W, C) and weight (KH, KW, C, D)."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    line = pixel // out_width
    row = (line % out_height).to(tl.int32) - TOP
    column = (pixel % out_width).to(tl.int32) - LEFT
    c, d = tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    x += (line // out_height * x_batch + row.to(tl.int64) * x_row + column * x_column)[:, None] + c[None, :]
    weight += c[:, None] * D + d[None, :]
    sums = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    for i in range(KH):
        # A row above the map is, without its sign, below it.
        inside = ((row + i).to(tl.uint32) < height) & (pixel < pixels)
        for j in tl.static_range(KW):
            mask = inside & ((column + j).to(tl.uint32) < width)
            patch = tl.load(x + j * x_column, mask[:, None] & (c < C)[None, :], 0.0)
            tap = tl.load(weight + (i * KW + j) * C * D, (c < C)[:, None] & (d < D)[None, :], 0.0)
            sums += product(patch, tap, PRECISION)
        x += x_row

    normed, exists = d % NORMED, d < D
    scale = _channel(norm_weight, normed, exists) * tl.rsqrt(_channel(var, normed, exists) + eps)
    out = (sums - _channel(mean, normed, exists)) * scale + _channel(norm_bias, normed, exists)
    out = tl.maximum(out, 0.0).to(y.dtype.element_ty)
    tl.store(y + pixel[:, None] * D + d[None, :], out, (pixel < pixels)[:, None] & exists[None, :])


def forward(
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
    out_channels, channels, kh, kw = weight.shape
    height, width = convolved_size(x, weight, 1, (padding_h, padding_w))
    y = x.new_empty(x.shape[0], height, width, out_channels)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    x = x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)
    pixels = y.numel() // out_channels
    conv_norm_relu_fwd_kernel[(cdiv(pixels, BLOCK_P),)](
        x,
        x.new_empty(kh, kw, channels, out_channels).copy_(weight.permute(2, 3, 1, 0)),
        mean.contiguous(),
        var.contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        y,
        pixels,
        x.shape[2],
        x.shape[3],
        height,
        width,
        x.stride(0),
        x.stride(2),
        x.stride(3),
        eps,
        C=channels,
        D=out_channels,
        NORMED=len(mean),
        KH=kh,
        KW=kw,
        TOP=padding_h,
        LEFT=padding_w,
        DEPTH=max(16, next_power_of_2(channels)),
        WIDTH=max(16, next_power_of_2(out_channels)),
        BLOCK_P=BLOCK_P,
        PRECISION=product_precision(x),
        num_warps=8,
        num_stages=1,
    )
    return y.permute(0, 3, 1, 2)
