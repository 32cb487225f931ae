"""Mixes of a map with its shifted self in one pass; with low-rank shares their expansion too is in the kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import product, product_precision
from ..q_shift._triton import groups, load_shifted, place, shifted


@triton.jit
def share_of(
    weight,
    low,
    up,
    mix,
    pixel,
    channel,
    inside_p,
    channels,
    low_token,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share of the shifted map in a mix, (1 or BLOCK_P, BLOCK_C)."""
    share = tl.load(weight + mix * channels + channel, channel < channels, 0.0).to(tl.float32)  # (1, BLOCK_C)
    if RANK > 0:
        r = tl.arange(0, BLOCK_R)
        inside = inside_p & (r < RANK)[None, :]
        left = tl.load(
            low + pixel.to(tl.int64) * low_token + mix * RANK + r[None, :], inside, 0.0
        )  # (BLOCK_P, BLOCK_R)
        inside = (r < RANK)[:, None] & (channel < channels)
        right = tl.load(up + (mix * RANK + r)[:, None] * channels + channel, inside, 0.0)  # (BLOCK_R, BLOCK_C)
        share = share + product(left, right, PRECISION)
    return share


@triton.jit(do_not_specialize=["mixes", "step"])
def q_shift_mix_fwd_kernel(
    x,
    weight,
    low,
    up,
    y,
    images,
    channels,
    height,
    width,
    mixes,
    step,
    x_batch,
    x_channel,
    x_row,
    x_column,
    low_batch,
    low_token,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All mixes of a tile of pixels and channels; y is (mixes, B, H, W, C) contiguous."""
    image, _, first, start = place(tl.program_id(0), channels, height, width, BLOCK_P, BLOCK_C)
    pixel = first + tl.arange(0, BLOCK_P)[:, None]
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    row, column = pixel // width, pixel % width
    inside_p = row < height
    inside = inside_p & (channel < channels)
    x += image * x_batch + channel.to(tl.int64) * x_channel
    value = tl.load(x + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column, inside, 0.0).to(tl.float32)
    change = load_shifted(
        x, row, column, channel, inside, height, width, x_row, x_column, step, END1, END2, END3, END4, HEAD_DIM
    )  # (BLOCK_P, BLOCK_C)
    change -= value
    if RANK > 0:
        low += image * low_batch
    for mix in range(mixes):
        share = share_of(weight, low, up, mix, pixel, channel, inside_p, channels, low_token, RANK, BLOCK_R, PRECISION)
        out = y + ((mix * images + image) * height * width + pixel) * channels + channel
        tl.store(out, (value + change * share).to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["mixes", "step"])
def q_shift_mix_bwd_kernel(
    g,
    x,
    weight,
    low,
    up,
    gx,
    moved,
    g_weight,
    g_share,
    images,
    channels,
    height,
    width,
    mixes,
    step,
    g_mix,
    g_batch,
    g_channel,
    g_row,
    g_column,
    x_batch,
    x_channel,
    x_row,
    x_column,
    low_batch,
    low_token,
    gx_batch,
    gx_channel,
    gx_row,
    gx_column,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of x for a tile of pixels and channels, and the tile's part of the weights'.

    With shares that differ between pixels, gx gets only what stays at the pixel, `moved` what goes to its neighbours,
    both (B, H, W, C), and `g_share` the gradient of every share, (mixes, B, H, W, C).
    """
    image, tile, first, start = place(tl.program_id(0), channels, height, width, BLOCK_P, BLOCK_C)
    pixel = first + tl.arange(0, BLOCK_P)[:, None]
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    row, column = pixel // width, pixel % width
    inside_p = row < height
    inside = inside_p & (channel < channels)
    x += image * x_batch + channel.to(tl.int64) * x_channel
    change = load_shifted(
        x, row, column, channel, inside, height, width, x_row, x_column, step, END1, END2, END3, END4, HEAD_DIM
    )  # (BLOCK_P, BLOCK_C)
    change -= tl.load(x + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column, inside, 0.0).to(tl.float32)
    if RANK > 0:
        low += image * low_batch
    g += image * g_batch + channel.to(tl.int64) * g_channel
    here = row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
    natural = (image * height * width + pixel) * channels + channel
    stays = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    moves = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for mix in range(mixes):
        g_chunk = tl.load(g + here, inside, 0.0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        share = share_of(weight, low, up, mix, pixel, channel, inside_p, channels, low_token, RANK, BLOCK_R, PRECISION)
        stays += g_chunk * (1.0 - share)
        of_share = g_chunk * change
        if RANK > 0:
            moves += g_chunk * share
            out = g_share + ((mix * images + image) * height * width + pixel) * channels + channel
            tl.store(out, of_share.to(g_share.dtype.element_ty), inside)
        else:
            moves += share * load_shifted(
                g, row, column, channel, inside, height, width, g_row, g_column, -step, END1, END2, END3, END4, HEAD_DIM
            )
        # (tiles of pixels, mixes, C)
        out = g_weight + (tile * mixes + mix) * channels + channel
        tl.store(out, tl.sum(of_share, 0)[None, :], channel < channels)
        g += g_mix
    if RANK > 0:
        tl.store(gx + natural, stays, inside)
        tl.store(moved + natural, moves, inside)
    else:
        gx += image * gx_batch + channel.to(tl.int64) * gx_channel
        gx += row.to(tl.int64) * gx_row + column.to(tl.int64) * gx_column
        tl.store(gx, (stays + moves).to(gx.dtype.element_ty), inside)


def _tile(channels: int, rank: int) -> tuple[int, int, int]:
    """BLOCK_P, BLOCK_C and warps."""
    block_c = min(64, max(16 if rank > 0 else 1, triton.next_power_of_2(channels)))
    return 2048 // block_c, block_c, 4


def _sizes(
    x: Tensor, low: Tensor | None, up: Tensor | None, gamma: float, head_dim: int | None
) -> tuple[int, int, dict]:
    """Tiles of pixels, all tiles, and the kernels' constants."""
    batch, channels, height, width = x.shape
    rank = 0 if up is None else up.shape[1]
    block_p, block_c, num_warps = _tile(channels, rank)
    tiles = batch * triton.cdiv(height * width, block_p)
    constants = groups(channels, gamma, head_dim) | dict(
        RANK=rank,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        PRECISION="tf32" if low is None else product_precision(low),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )
    return tiles, tiles * triton.cdiv(channels, block_c), constants


def _rows(low: Tensor | None) -> Tensor | None:
    return low if low is None or low.stride(2) == 1 else low.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    shift: int,
    gamma: float,
    head_dim: int | None,
    dtype: torch.dtype | None,
) -> Tensor:
    batch, channels, height, width = x.shape
    mixes = weight.shape[0]
    y = x.new_empty(mixes, batch, height, width, channels, dtype=dtype)
    if y.numel() > 0:
        low, up, weight = _rows(low), None if up is None else up.contiguous(), weight.contiguous()
        _, programs, constants = _sizes(x, low, up, gamma, head_dim)
        q_shift_mix_fwd_kernel[(programs,)](
            x,
            weight,
            low,
            up,
            y,
            batch,
            channels,
            height,
            width,
            mixes,
            shift,
            *x.stride(),
            *((0, 0) if low is None else low.stride()[:2]),
            **constants,
        )
    return y.permute(0, 1, 4, 2, 3)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    shift: int,
    gamma: float,
    head_dim: int | None,
    dtype: torch.dtype | None,
) -> list[Tensor | None]:
    g = grads[0]
    batch, channels, height, width = x.shape
    mixes = weight.shape[0]
    if g.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, weight, low, up)]
    low, up, weight = _rows(low), None if up is None else up.contiguous(), weight.contiguous()
    tiles, programs, constants = _sizes(x, low, up, gamma, head_dim)
    gx = torch.empty_like(x)
    g_weight = x.new_empty(tiles, mixes, channels, dtype=torch.float32)
    stays, moved, g_share = gx, None, None
    if low is not None:
        stays, moved = x.new_empty(2, batch, height, width, channels, dtype=torch.float32)
        g_share = low.new_empty(mixes, batch * height * width, channels)
    q_shift_mix_bwd_kernel[(programs,)](
        g,
        x,
        weight,
        low,
        up,
        stays,
        moved,
        g_weight,
        g_share,
        batch,
        channels,
        height,
        width,
        mixes,
        shift,
        *g.stride(),
        *x.stride(),
        *((0, 0) if low is None else low.stride()[:2]),
        *gx.stride(),
        **constants,
    )
    g_low = g_up = None
    if low is not None:
        shifted(moved.permute(0, 3, 1, 2), -shift, gamma, head_dim, rest=stays, out=gx)
        up = up.to(low.dtype)
        g_low = low.new_empty(batch * height * width, mixes, up.shape[1])
        torch.matmul(g_share, up.mT, out=g_low.transpose(0, 1))
        g_up = low.unflatten(2, (mixes, -1)).flatten(0, 1).permute(1, 2, 0) @ g_share
        g_low = g_low.view(batch, height * width, -1)
    return [gx, g_weight.sum(0), g_low, g_up]
