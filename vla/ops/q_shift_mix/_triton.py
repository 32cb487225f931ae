"""Mixes of a map with its shifted self in one pass; with low-rank shares their expansion too is in the kernel."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, next_power_of_2, product, product_precision, rounded_product
from ..q_shift._triton import groups, load_from, load_shifted, place, shifted


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
    KEEPS: tl.constexpr,
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
    return 1.0 - share if KEEPS else share


@kernel(do_not_specialize=["mixes", "step"])
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
    KEEPS: tl.constexpr,
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
        share = share_of(
            weight, low, up, mix, pixel, channel, inside_p, channels, low_token, RANK, KEEPS, BLOCK_R, PRECISION
        )
        out = y + ((mix * images + image) * height * width + pixel) * channels + channel
        tl.store(out, (value + change * share).to(y.dtype.element_ty), inside)


@kernel(do_not_specialize=["step"])
def q_shift_mix_bwd_kernel(
    g,
    x,
    weight,
    gx,
    g_weight,
    channels,
    height,
    width,
    chunks,
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
    gx_batch,
    gx_channel,
    gx_row,
    gx_column,
    MIXES: tl.constexpr,
    KEEPS: tl.constexpr,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of x in a chunk of an image's pixels, and the chunk's part of the weights', with constant shares.

    Channels are vectors of neighbours with the same shift, so that one load does for all directions.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    start, chunk, image = program % blocks * BLOCK_C, program // blocks % chunks, program // blocks // chunks
    size = tl.cdiv(height * width, chunks)
    end = tl.minimum((chunk + 1) * size, height * width)

    vector = start + VECTOR * tl.arange(0, BLOCK_C // VECTOR)[None, :, None]
    channel = vector + tl.arange(0, VECTOR)[None, None, :]
    inside_c = channel < channels
    c = vector % HEAD_DIM
    across = tl.where(c < END1, -step, tl.where(c < END2, step, 0))
    down = tl.where((c >= END2) & (c < END3), -step, tl.where((c >= END3) & (c < END4), step, 0))

    image = image.to(tl.int64)
    x += image * x_batch + channel.to(tl.int64) * x_channel
    g += image * g_batch + channel.to(tl.int64) * g_channel
    gx += image * gx_batch + channel.to(tl.int64) * gx_channel
    shares, sums = (), ()
    for mix in tl.static_range(MIXES):
        share = tl.load(weight + mix * channels + channel, inside_c, 0.0).to(tl.float32)
        shares += (1.0 - share if KEEPS else share,)  # (1, C / V, V)
        sums += (tl.zeros((BLOCK_P, BLOCK_C // VECTOR, VECTOR), tl.float32),)

    for first in range(chunk * size, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)[:, None, None]
        inside_p = pixel < end
        row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
        inside = inside_p & inside_c
        change = load_from(x, row + down, column + across, inside, height, width, x_row, x_column)
        change -= load_from(x, row, column, inside, height, width, x_row, x_column)
        out = tl.zeros((BLOCK_P, BLOCK_C // VECTOR, VECTOR), tl.float32)
        products, g_chunk = (), g
        for mix in tl.static_range(MIXES):
            own = load_from(g_chunk, row, column, inside, height, width, g_row, g_column)
            moved = load_from(g_chunk, row - down, column - across, inside, height, width, g_row, g_column)
            out += own + shares[mix] * (moved - own)
            products += (sums[mix] - own * change if KEEPS else sums[mix] + own * change,)
            g_chunk += g_mix
        sums = products
        tl.store(gx + row * gx_row + column * gx_column, out.to(gx.dtype.element_ty), inside)

    # (mixes, C, images * chunks)
    parts = tl.num_programs(0) // blocks
    g_weight += channel.to(tl.int64) * parts + program // blocks
    for mix in tl.static_range(MIXES):
        tl.store(g_weight + mix * channels * parts, tl.sum(sums[mix], 0)[None], inside_c)


@kernel(do_not_specialize=["mixes", "step"])
def q_shift_mix_low_rank_bwd_kernel(
    g,
    x,
    weight,
    low,
    up,
    stays,
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
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What of x's gradient stays at a tile's pixels and what goes to their neighbours, with shares that differ.

    stays, moved (B, H, W, C); also the tile's part of the weights' gradient, and that of every share in `g_share`,
    (mixes, B, H, W, C).
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
    low += image * low_batch
    g += image * g_batch + channel.to(tl.int64) * g_channel + row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
    natural = (image * height * width + pixel) * channels + channel
    tiles = tl.num_programs(0) // tl.cdiv(channels, BLOCK_C)
    stay = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    move = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for mix in range(mixes):
        g_chunk = tl.load(g, inside, 0.0).to(tl.float32)  # (BLOCK_P, BLOCK_C)
        share = share_of(
            weight, low, up, mix, pixel, channel, inside_p, channels, low_token, RANK, KEEPS, BLOCK_R, PRECISION
        )
        stay += g_chunk * (1.0 - share)
        move += g_chunk * share
        of_share = rounded_product(g_chunk, -change if KEEPS else change)
        out = g_share + ((mix * images + image) * height * width + pixel) * channels + channel
        tl.store(out, of_share.to(g_share.dtype.element_ty), inside)
        # (mixes, C, tiles of pixels)
        out = g_weight + (mix * channels + channel).to(tl.int64) * tiles + tile
        tl.store(out, tl.sum(of_share, 0)[None, :], channel < channels)
        g += g_mix
    tl.store(stays + natural, stay, inside)
    tl.store(moved + natural, move, inside)


# Programs of the backward with constant shares to aim at: few, so that their sums of the weights' gradients are.
_PROGRAMS = 800


def _chunks(programs: int, tiles: int) -> int:
    """Chunks of an image, of `tiles` tiles: as few as give a GPU enough programs."""
    wanted = max(1, min(tiles, _PROGRAMS // max(1, programs)))
    return cdiv(tiles, cdiv(tiles, wanted))


def _tile(channels: int, low_rank: bool) -> tuple[int, int, int]:
    """BLOCK_P, BLOCK_C and warps, with products of low-rank shares or without."""
    block_c = min(64, max(16 if low_rank else 1, next_power_of_2(channels)))
    return 2048 // block_c, block_c, 4


def _constants(
    x: Tensor, low: Tensor | None, up: Tensor | None, gamma: float, head_dim: int | None, keeps: bool
) -> dict:
    """Constants of the kernels that may have low-rank shares."""
    rank = 0 if up is None else up.shape[1]
    block_p, block_c, num_warps = _tile(x.shape[1], low is not None)
    return groups(x.shape[1], gamma, head_dim) | dict(
        RANK=rank,
        KEEPS=keeps,
        BLOCK_R=max(16, next_power_of_2(rank)),
        PRECISION="tf32" if low is None else product_precision(low),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=num_warps,
    )


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
    keeps: bool,
) -> Tensor:
    batch, channels, height, width = x.shape
    mixes = weight.shape[0]
    y = x.new_empty(mixes, batch, height, width, channels, dtype=dtype)
    if y.numel() > 0:
        low, up, weight = _rows(low), None if up is None else up.contiguous(), weight.contiguous()
        constants = _constants(x, low, up, gamma, head_dim, keeps)
        tiles = cdiv(height * width, constants["BLOCK_P"]) * cdiv(channels, constants["BLOCK_C"])
        q_shift_mix_fwd_kernel[(batch * tiles,)](
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
    keeps: bool,
) -> list[Tensor | None]:
    g = grads[0]
    batch, channels, height, width = x.shape
    mixes = weight.shape[0]
    if g.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, weight, low, up)]
    low, up, weight = _rows(low), None if up is None else up.contiguous(), weight.contiguous()
    gx = torch.empty_like(x)
    block_p, block_c, num_warps = _tile(channels, low is not None)
    programs = batch * cdiv(channels, block_c)
    if low is None:
        constants = groups(channels, gamma, head_dim)
        # Neighbouring channels that move the same way.
        vector = math.gcd(4, *constants.values())
        block_p, num_warps = 32 * 4 * vector // block_c, 4
        chunks = _chunks(programs, cdiv(height * width, block_p))
        g_weight = x.new_empty(mixes, channels, batch * chunks, dtype=torch.float32)
        q_shift_mix_bwd_kernel[(programs * chunks,)](
            g,
            x,
            weight,
            gx,
            g_weight,
            channels,
            height,
            width,
            chunks,
            shift,
            *g.stride(),
            *x.stride(),
            *gx.stride(),
            MIXES=mixes,
            KEEPS=keeps,
            **constants,
            VECTOR=vector,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            num_warps=num_warps,
        )
        return [gx, g_weight.sum(2), None, None]
    tiles = batch * cdiv(height * width, block_p)
    g_weight = x.new_empty(mixes, channels, tiles, dtype=torch.float32)
    stays, moved = x.new_empty(2, batch, height, width, channels, dtype=torch.float32)
    g_share = low.new_empty(mixes, batch * height * width, channels)
    q_shift_mix_low_rank_bwd_kernel[(tiles * cdiv(channels, block_c),)](
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
        *low.stride()[:2],
        **_constants(x, low, up, gamma, head_dim, keeps),
    )
    shifted(moved.permute(0, 3, 1, 2), -shift, gamma, head_dim, rest=stays, out=gx)
    up = up.to(low.dtype)
    g_low = low.new_empty(batch * height * width, mixes, up.shape[1])
    torch.matmul(g_share, up.mT, out=g_low.transpose(0, 1))
    g_up = low.unflatten(2, (mixes, -1)).flatten(0, 1).permute(1, 2, 0) @ g_share
    return [gx, g_weight.sum(2), g_low.view(batch, height * width, -1), g_up]
