"""The end of GroupMamba's mixer: a program takes some pixels from the scan's output to the mixer's.

Rows of channels are tiles (BLOCK_R, WIDTH), whose entries beyond the channels are zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, kernel, next_power_of_2, product, product_precision
from . import KERNEL_CHANNELS, _torch

BLOCK_R = 64


@triton.jit
def normalize(rows, eps, inside, SIZE: tl.constexpr):
    """The SIZE channels inside normalised, the others as they are."""
    mean = tl.sum(tl.where(inside, rows, 0.0), 1)[:, None] / SIZE
    centred = tl.where(inside, rows - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / SIZE
    return tl.where(inside, centred * tl.rsqrt(variance + eps), rows)


@triton.jit
def linear(rows, matrix, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """The rows times the transpose of a matrix (CHANNELS, CHANNELS)."""
    row, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    block = tl.load(matrix + row * CHANNELS + column, (row < CHANNELS) & (column < CHANNELS), 0.0)
    return product(rows.to(block.dtype), tl.trans(block), PRECISION)


@kernel(do_not_specialize=["count", "pixels"])
def group_modulation_fwd_kernel(
    y,
    z,
    n,
    gate,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    norm_weight,
    norm_bias,
    proj,
    proj_bias,
    out,
    count,
    pixels,
    y_row,
    z_row,
    n_row,
    out_eps,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_R of the `count` rows of y, z, n and out; `pixels` rows share a row of gate."""
    SIZE: tl.constexpr = CHANNELS // GROUPS
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    exists = channel < CHANNELS
    inside = (row < count) & exists

    rows = tl.load(y + row * y_row + channel, inside, 0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
    for group in tl.static_range(GROUPS):
        rows = normalize(rows, out_eps, (channel >= group * SIZE) & (channel < (group + 1) * SIZE), SIZE)
    rows *= tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
    rows += tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
    factor = tl.load(z + row * z_row + channel, inside, 0.0).to(tl.float32)
    # 1 / x by a square root: a division takes four times the instructions.
    root = tl.rsqrt(1.0 + tl.exp2(factor * -LOG2E))
    rows = linear(rows * factor * root * root, out_proj, CHANNELS, WIDTH, PRECISION)

    rows *= tl.load(n + row * n_row + channel, inside, 0.0).to(tl.float32)
    rows *= tl.load(gate + row // pixels * CHANNELS + channel, inside, 0.0).to(tl.float32)
    rows = normalize(rows, eps, exists, CHANNELS)
    rows *= tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)
    rows += tl.load(norm_bias + channel, exists, 0.0).to(tl.float32)
    rows = linear(rows, proj, CHANNELS, WIDTH, PRECISION)
    rows += tl.load(proj_bias + channel, exists, 0.0).to(tl.float32)
    tl.store(out + row * CHANNELS + channel, rows.to(out.dtype.element_ty), inside)


def _rows(x: Tensor) -> Tensor:
    """Map (B, H, W, C) as rows (B * H * W, C), a copy unless its pixels lie at equal distances."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def forward(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    groups: int,
    out_eps: float,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    channels = y.shape[3]
    if channels > KERNEL_CHANNELS or y.dtype.itemsize > 2:
        vectors = (out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias)
        return _torch.forward(y, z, n, gate, *vectors, groups, out_eps, eps, dtype)
    out = y.new_empty(y.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    maps = [_rows(x) for x in (y, z, n)]
    count = maps[0].shape[0]
    group_modulation_fwd_kernel[(cdiv(count, BLOCK_R),)](
        *maps,
        gate.contiguous(),
        out_norm_weight.contiguous(),
        out_norm_bias.contiguous(),
        out_proj.to(y.dtype).contiguous(),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        proj.to(y.dtype).contiguous(),
        proj_bias.contiguous(),
        out,
        count,
        y.shape[1] * y.shape[2],
        *(x.stride(0) for x in maps),
        out_eps,
        eps,
        CHANNELS=channels,
        GROUPS=groups,
        WIDTH=max(16, next_power_of_2(channels)),
        BLOCK_R=BLOCK_R,
        PRECISION=product_precision(y),
        num_warps=4,
    )
    return out
