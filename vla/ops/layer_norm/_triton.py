"""GPU kernels of the layer norm: one pass over memory each way, every row in the registers of a few threads."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, next_power_of_2

# A row is a tuple of chunks (BLOCK_R, WIDTH): its width need not be a power of two, as a tile's must, and only the last
# chunk has a mask along the channels. Entries outside are zero.


@triton.jit
def _channels(i, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels of chunk i, (1, WIDTH), and which of its entries are inside."""
    channel = i * WIDTH + tl.arange(0, WIDTH)[None, :]
    if (i + 1) * WIDTH > CHANNELS:
        inside = inside & (channel < CHANNELS)
    return channel, inside


@triton.jit
def _load(pointer, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The rows that `pointer` (BLOCK_R, 1) points to, in float32."""
    chunks = ()
    for i in tl.static_range(0, (CHANNELS + WIDTH - 1) // WIDTH):
        channel, valid = _channels(i, inside, CHANNELS, WIDTH)
        chunks = chunks + (tl.load(pointer + channel, valid, 0.0).to(tl.float32),)
    return chunks


@triton.jit
def _store(pointer, row, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    for i in tl.static_range(0, len(row)):
        channel, valid = _channels(i, inside, CHANNELS, WIDTH)
        tl.store(pointer + channel, row[i].to(pointer.dtype.element_ty), valid)


@triton.jit
def _add(first, second):
    chunks = ()
    for i in tl.static_range(0, len(first)):
        chunks = chunks + (first[i] + second[i],)
    return chunks


@triton.jit
def _multiply(first, second):
    chunks = ()
    for i in tl.static_range(0, len(first)):
        chunks = chunks + (first[i] * second[i],)
    return chunks


@triton.jit
def _round(row, dtype: tl.constexpr):
    chunks = ()
    for i in tl.static_range(0, len(row)):
        chunks = chunks + (row[i].to(dtype).to(tl.float32),)
    return chunks


@triton.jit
def _mean(row, CHANNELS: tl.constexpr):
    """Means of the rows, (BLOCK_R, 1)."""
    total = row[0]
    for i in tl.static_range(1, len(row)):
        total += row[i]
    # A product with the reciprocal, or a division which is not exact, gives a row of equal numbers a variance.
    return tl.div_rn(tl.sum(total, 1)[:, None], CHANNELS)


@triton.jit
def _standardize(row, inside, eps, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of mean 0 and variance 1, and the inverse of their standard deviation, (BLOCK_R, 1)."""
    mean = _mean(row, CHANNELS)
    centred = ()
    for i in tl.static_range(0, len(row)):
        channel, valid = _channels(i, inside, CHANNELS, WIDTH)
        centred = centred + (tl.where(valid, row[i] - mean, 0.0) if (i + 1) * WIDTH > CHANNELS else row[i] - mean,)
    # Rows outside are summed with the others in the backward, where an infinity would not stay zero.
    inverse = tl.where(inside, tl.rsqrt(_mean(_multiply(centred, centred), CHANNELS) + eps), 0.0)
    normal = ()
    for i in tl.static_range(0, len(row)):
        normal = normal + (centred[i] * inverse,)
    return normal, inverse


@triton.jit
def _affine(normal, weight, bias, channel, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows scaled and shifted by the parameters from `channel` (BLOCK_R, 1) on."""
    if weight is not None:
        normal = _multiply(normal, _load(weight + channel, channel >= 0, CHANNELS, WIDTH))
    if bias is not None:
        normal = _add(normal, _load(bias + channel, channel >= 0, CHANNELS, WIDTH))
    return normal


@triton.jit
def _silu(row):
    """SiLU of a row, and its derivative."""
    values = ()
    slopes = ()
    for i in tl.static_range(0, len(row)):
        share = tl.sigmoid(row[i])
        values = values + (row[i] * share,)
        slopes = slopes + (share * (1.0 + row[i] * (1.0 - share)),)
    return values, slopes


@triton.jit
def _place(tile, rows, channel, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where the rows of a tile start, and which of them are inside, (BLOCK_R, 1)."""
    row = tl.full((1, 1), tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    return row // GROUPS * (GROUPS * CHANNELS) + channel, row < rows


@triton.jit
def _first_channel(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """First channel of the rows of a program's tiles, (BLOCK_R, 1): in all its tiles they are of the same groups."""
    return ((tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)) % GROUPS * CHANNELS)[:, None]


@kernel
def layer_norm_fwd_kernel(
    x,
    branch,
    weight,
    bias,
    gate,
    y,
    total,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of rows, which are groups of a token's channels: all maps are (rows / GROUPS, GROUPS, CHANNELS)."""
    channel = _first_channel(CHANNELS, GROUPS, BLOCK_R)
    start, inside = _place(tl.program_id(0), rows, channel, CHANNELS, GROUPS, BLOCK_R)
    row = _load(x + start, inside, CHANNELS, WIDTH)
    if branch is not None:
        row = _add(row, _load(branch + start, inside, CHANNELS, WIDTH))
        row = _round(row, total.dtype.element_ty)
        _store(total + start, row, inside, CHANNELS, WIDTH)
    if gate is not None:
        z = _load(gate + start, inside, CHANNELS, WIDTH)
    normal, inverse = _standardize(row, inside, eps, CHANNELS, WIDTH)
    out = _affine(normal, weight, bias, channel, CHANNELS, WIDTH)
    if gate is not None:
        values, slopes = _silu(z)
        out = _multiply(out, values)
    _store(y + start, out, inside, CHANNELS, WIDTH)


@kernel
def layer_norm_bwd_kernel(
    g,
    g_total,
    x,
    branch,
    weight,
    bias,
    gate,
    gx,
    g_branch,
    g_gate,
    sums,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradients of the rows of every so many tiles, and this program's part of the parameters' gradients.

    `sums` is (2, programs, SUMS, CHANNELS), the first half for the weight: sums over rows that are of one group.
    """
    channel = _first_channel(CHANNELS, GROUPS, BLOCK_R)
    known = channel >= 0
    of_weight = ()
    of_bias = ()
    for _ in tl.static_range(0, (CHANNELS + WIDTH - 1) // WIDTH):
        of_weight = of_weight + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
        of_bias = of_bias + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        start, inside = _place(tile, rows, channel, CHANNELS, GROUPS, BLOCK_R)
        row = _load(x + start, inside, CHANNELS, WIDTH)
        if branch is not None:
            row = _add(row, _load(branch + start, inside, CHANNELS, WIDTH))
            row = _round(row, g_total.dtype.element_ty)
            direct = _load(g_total + start, inside, CHANNELS, WIDTH)
        of_out = _load(g + start, inside, CHANNELS, WIDTH)
        if gate is not None:
            z = _load(gate + start, inside, CHANNELS, WIDTH)
        normal, inverse = _standardize(row, inside, eps, CHANNELS, WIDTH)
        if gate is not None:
            values, slopes = _silu(z)
            out = _affine(normal, weight, bias, channel, CHANNELS, WIDTH)
            _store(g_gate + start, _multiply(_multiply(of_out, out), slopes), inside, CHANNELS, WIDTH)
            of_out = _multiply(of_out, values)
        if bias is not None:
            of_bias = _add(of_bias, of_out)
        if weight is not None:
            of_weight = _add(of_weight, _multiply(of_out, normal))
            of_out = _multiply(of_out, _load(weight + channel, known, CHANNELS, WIDTH))
        mean = _mean(of_out, CHANNELS)
        slope = _mean(_multiply(of_out, normal), CHANNELS)
        of_row = ()
        for i in tl.static_range(0, len(normal)):
            of_row = of_row + (inverse * (of_out[i] - mean - normal[i] * slope),)
        if branch is not None:
            of_row = _add(of_row, direct)
            _store(g_branch + start, of_row, inside, CHANNELS, WIDTH)
        _store(gx + start, of_row, inside, CHANNELS, WIDTH)
    if weight is not None:
        _store_sums(sums, of_weight, tl.program_id(0), CHANNELS, SUMS, WIDTH, BLOCK_R)
    if bias is not None:
        _store_sums(sums, of_bias, tl.num_programs(0) + tl.program_id(0), CHANNELS, SUMS, WIDTH, BLOCK_R)


@triton.jit
def _store_sums(
    sums, rows, place, CHANNELS: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Stores (SUMS, CHANNELS) sums, each over every SUMS-th row."""
    total = ()
    for i in tl.static_range(0, len(rows)):
        total = total + (tl.sum(tl.reshape(rows[i], (BLOCK_R // SUMS, SUMS, WIDTH)), 0),)
    row = tl.full((1, 1), place, tl.int64) * SUMS + tl.arange(0, SUMS)[:, None]
    _store(sums + row * CHANNELS, total, row >= 0, CHANNELS, WIDTH)


# Of the backward: enough to fill a GPU, few enough that their sums are quickly added. Twice as many up to 128 channels.
_PROGRAMS = 264


@cache
def _config(channels: int, groups: int) -> tuple[dict, int, int]:
    """Constants of both kernels, SUMS, and the least number of programs that meet the same groups in all their tiles.

    A thread has 4 channels of every chunk, 16 bytes in float32, of one row, and at most 6 chunks: the backward keeps
    four numbers of each channel.
    """
    width = max(8, min(32, next_power_of_2(channels)))
    while channels > 6 * width:
        width *= 2
    block_r = max(1, 512 // width)
    constants = dict(
        CHANNELS=channels, GROUPS=groups, WIDTH=width, BLOCK_R=block_r, num_warps=min(32, block_r * width // 128)
    )
    reducible = groups <= block_r and groups & (groups - 1) == 0
    return constants, groups if reducible else block_r, groups // math.gcd(groups, block_r)


def _empty(like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if like is None else torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    sum_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    total = None if branch is None else _empty(x, sum_dtype)
    y = _empty(x, dtype or sum_dtype)
    if x.numel() > 0:
        channels = x.shape[-1] // groups
        rows = x.numel() // channels
        constants, _, _ = _config(channels, groups)
        layer_norm_fwd_kernel[(cdiv(rows, constants["BLOCK_R"]),)](
            x.contiguous(),
            _contiguous(branch),
            _contiguous(weight),
            _contiguous(bias),
            _contiguous(gate),
            y,
            total,
            rows,
            eps,
            **constants,
        )
    return y, x.new_empty(0) if total is None else total


def backward(
    grads: list[Tensor],
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor | None]:
    if x.numel() == 0:
        return [None] * 5
    g, g_total = grads
    channels = x.shape[-1] // groups
    rows = x.numel() // channels
    constants, sums_of_program, period = _config(channels, groups)
    tiles = cdiv(rows, constants["BLOCK_R"])
    limit = 2 * _PROGRAMS if x.shape[-1] <= 128 else _PROGRAMS
    programs = min(cdiv(tiles, period), max(1, limit // period)) * period
    gx, g_branch, g_gate = _empty(x), _empty(branch), _empty(gate)
    sums = g_weight = g_bias = None
    if weight is not None or bias is not None:
        shape = (2, programs * sums_of_program // groups, x.shape[-1])
        sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    layer_norm_bwd_kernel[(programs,)](
        g.contiguous(),
        None if branch is None else g_total.contiguous(),
        x.contiguous(),
        _contiguous(branch),
        _contiguous(weight),
        _contiguous(bias),
        _contiguous(gate),
        gx,
        g_branch,
        g_gate,
        sums,
        rows,
        eps,
        SUMS=sums_of_program,
        **constants,
    )
    if sums is not None:
        sums = sums.sum(1)
        g_weight = None if weight is None else sums[0]
        # Not another view of the same memory, which an operator's results must not be.
        g_bias = None if bias is None else sums[1].clone()
    return [gx, g_branch, g_weight, g_bias, g_gate]
