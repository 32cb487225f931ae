"""The end of GroupMamba's mixer: a program takes some pixels from the scan's output to the mixer's.

Rows of channels are tiles (BLOCK_R, WIDTH), whose entries beyond the channels are zero. Where the rows of all channels
don't fit in registers, one kernel takes each group to its modulated projection, and another the whole from there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, as_rows, cdiv, kernel, next_power_of_2, product, product_precision
from . import WHOLE, _torch

# Numbers of pixels from which programs with more rows each still fill a GPU.
MANY = 2**12
# Programs that share the rows of a group, each of which loads its matrix once.
PROGRAMS = 132


@triton.jit
def normalize(rows, eps, inside, SIZE: tl.constexpr):
    """The SIZE channels inside normalised, the others as they are."""
    mean = tl.sum(tl.where(inside, rows, 0.0), 1)[:, None] / SIZE
    centred = tl.where(inside, rows - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / SIZE
    return tl.where(inside, centred * tl.rsqrt(variance + eps), rows)


@triton.jit
def silu(x):
    # 1 / x by a square root: a division takes four times the instructions.
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return x * root * root


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
    factor = tl.arange(0, WIDTH)[:, None]
    exists = channel < CHANNELS
    inside = (row < count) & exists

    rows = tl.load(y + row * y_row + channel, inside, 0.0)  # (BLOCK_R, WIDTH)
    dtype = rows.dtype
    rows = rows.to(tl.float32)
    for group in tl.static_range(GROUPS):
        rows = normalize(rows, out_eps, (channel >= group * SIZE) & (channel < (group + 1) * SIZE), SIZE)
    rows *= tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
    rows += tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
    rows *= silu(tl.load(z + row * z_row + channel, inside, 0.0).to(tl.float32))
    # Blocks on the diagonal of a matrix (WIDTH, WIDTH).
    block = tl.load(
        out_proj + channel * SIZE + factor % SIZE, (channel // SIZE == factor // SIZE) & exists, 0.0
    )  # (WIDTH, WIDTH)
    rows = product(rows.to(dtype), block.to(dtype), PRECISION)

    rows *= tl.load(n + row * n_row + channel, inside, 0.0).to(tl.float32)
    rows *= tl.load(gate + row // pixels * CHANNELS + channel, inside, 0.0).to(tl.float32)
    rows = normalize(rows, eps, exists, CHANNELS)
    rows *= tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)
    rows += tl.load(norm_bias + channel, exists, 0.0).to(tl.float32)
    block = tl.load(proj + channel * CHANNELS + factor, exists & (factor < CHANNELS), 0.0)
    rows = product(rows.to(dtype), block.to(dtype), PRECISION)
    rows += tl.load(proj_bias + channel, exists, 0.0).to(tl.float32)
    tl.store(out + row * CHANNELS + channel, rows.to(out.dtype.element_ty), inside)


@kernel(do_not_specialize=["count", "pixels"])
def group_modulation_groups_kernel(
    y,
    z,
    n,
    gate,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    modulated,
    count,
    pixels,
    y_row,
    z_row,
    n_row,
    out_eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One group of some of the `count` rows up to the product with n and gate."""
    group = tl.program_id(0) % GROUPS
    lane = tl.arange(0, WIDTH)[None, :]
    factor = tl.arange(0, WIDTH)[:, None]
    channel = group * SIZE + lane
    exists = lane < SIZE
    dtype: tl.constexpr = y.dtype.element_ty
    block = tl.load(out_proj + channel * SIZE + factor, exists & (factor < SIZE), 0.0).to(dtype)  # (WIDTH, WIDTH)
    scale = tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
    shift = tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
    step = tl.num_programs(0) // GROUPS
    for first in range(tl.program_id(0) // GROUPS, tl.cdiv(count, BLOCK_R), step):
        row = tl.cast(first, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < count) & exists
        rows = tl.load(y + row * y_row + channel, inside, 0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
        rows = normalize(rows, out_eps, exists, SIZE) * scale + shift
        rows *= silu(tl.load(z + row * z_row + channel, inside, 0.0).to(tl.float32))
        rows = product(rows.to(dtype), block, PRECISION)
        rows *= tl.load(n + row * n_row + channel, inside, 0.0).to(tl.float32)
        rows *= tl.load(gate + row // pixels * (GROUPS * SIZE) + channel, inside, 0.0).to(tl.float32)
        tl.store(modulated + row * (GROUPS * SIZE) + channel, rows.to(dtype), inside)


@kernel(do_not_specialize=["count"])
def group_modulation_proj_kernel(
    modulated,
    norm_weight,
    norm_bias,
    proj,
    proj_bias,
    out,
    count,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Norm and projection of BLOCK_R rows, BLOCK_O channels of the result."""
    blocks_o = tl.cdiv(CHANNELS, BLOCK_O)
    row = (tl.program_id(0) // blocks_o).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    output = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    lane = tl.arange(0, BLOCK_C)
    modulated += row * CHANNELS
    exists = row < count

    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        total += tl.load(modulated + channel, exists & (channel < CHANNELS), 0.0).to(tl.float32)
    mean = tl.sum(total, 1)[:, None] / CHANNELS
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        rows = tl.load(modulated + channel, exists & (channel < CHANNELS), 0.0).to(tl.float32)
        centred = tl.where(channel < CHANNELS, rows - mean, 0.0)
        total += centred * centred
    scale = tl.rsqrt(tl.sum(total, 1)[:, None] / CHANNELS + eps)

    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        inside = channel < CHANNELS
        rows = tl.load(modulated + channel, exists & inside, 0.0)
        dtype = rows.dtype
        rows = (rows.to(tl.float32) - mean) * scale
        rows = rows * tl.load(norm_weight + channel, inside, 0.0).to(tl.float32)
        rows += tl.load(norm_bias + channel, inside, 0.0).to(tl.float32)
        factor = first + lane[:, None]
        block = tl.load(proj + output * CHANNELS + factor, (output < CHANNELS) & (factor < CHANNELS), 0.0)
        sums += product(rows.to(dtype), block.to(dtype), PRECISION)  # (BLOCK_R, BLOCK_O)
    sums += tl.load(proj_bias + output, output < CHANNELS, 0.0).to(tl.float32)
    tl.store(out + row * CHANNELS + output, sums.to(out.dtype.element_ty), exists & (output < CHANNELS))


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
    out_eps: float,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    channels, (groups, size, _) = y.shape[3], out_proj.shape
    if size > WHOLE or y.dtype.itemsize > 2:
        vectors = (out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias)
        return _torch.forward(y, z, n, gate, *vectors, out_eps, eps, dtype)
    out = y.new_empty(y.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    maps = [as_rows(x) for x in (y, z, n)]
    count = maps[0].shape[0]
    pixels = y.shape[1] * y.shape[2]
    strides = [x.stride(0) for x in maps]
    precision = product_precision(y)
    block_r = 64 if count >= MANY else 16
    first = (*maps, gate.contiguous(), out_norm_weight.contiguous(), out_norm_bias.contiguous(), out_proj.contiguous())
    # Many programs read the matrix, few its cast.
    proj = proj.contiguous() if count < MANY else proj.to(y.dtype)
    last = (norm_weight.contiguous(), norm_bias.contiguous(), proj, proj_bias.contiguous(), out)
    if channels <= WHOLE:
        group_modulation_fwd_kernel[(cdiv(count, block_r),)](
            *first,
            *last,
            count,
            pixels,
            *strides,
            out_eps,
            eps,
            CHANNELS=channels,
            GROUPS=groups,
            WIDTH=max(16, next_power_of_2(channels)),
            BLOCK_R=block_r,
            PRECISION=precision,
            num_warps=4,
        )
        return out
    modulated = torch.empty_like(maps[0], memory_format=torch.contiguous_format)
    group_modulation_groups_kernel[(min(cdiv(count, 32), PROGRAMS) * groups,)](
        *first,
        modulated,
        count,
        pixels,
        *strides,
        out_eps,
        GROUPS=groups,
        SIZE=size,
        WIDTH=max(16, next_power_of_2(size)),
        BLOCK_R=32,
        PRECISION=precision,
        num_warps=8,
        num_stages=1,
    )
    block_o = 128 if count >= MANY else 32
    group_modulation_proj_kernel[(cdiv(count, 2 * block_r) * cdiv(channels, block_o),)](
        modulated,
        *last,
        count,
        eps,
        CHANNELS=channels,
        BLOCK_R=2 * block_r,
        BLOCK_C=64,
        BLOCK_O=block_o,
        PRECISION=precision,
        num_warps=8 if count >= MANY else 4,
    )
    return out
