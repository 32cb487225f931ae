"""GPU kernels of the layer norm: one pass over memory each way, every row in the registers of a few threads."""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ahead
from .._triton import DTYPES, as_rows, cdiv, kernel, last_first, next_power_of_2, sigmoid, sum_parts
from . import empty_results, sum_dtype

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
def _load(pointer, inside, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr = 0):
    """The rows that `pointer` (BLOCK_R, 1) points to, in float32.

    EVEN: Bytes that all rows start at multiples of, where the compiler is to be told.
    """
    chunks = ()
    for i in tl.static_range(0, (CHANNELS + WIDTH - 1) // WIDTH):
        channel, valid = _channels(i, inside, CHANNELS, WIDTH)
        pointers = pointer + channel
        if EVEN:
            pointers = tl.multiple_of(pointers, (1, EVEN))
        chunks = chunks + (tl.load(pointers, valid, 0.0).to(tl.float32),)
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
def _scale(row, factor):
    chunks = ()
    for i in tl.static_range(0, len(row)):
        chunks = chunks + (row[i] * factor,)
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


# A row may be a whole token. Its groups lie in several chunks, and two share one. Such rows are bound by instructions.


@triton.jit
def _times_silu(row, gate):
    chunks = ()
    for i in tl.static_range(0, len(row)):
        chunks = chunks + (row[i] * (gate[i] * sigmoid(gate[i])),)
    return chunks


@triton.jit
def _means_of_groups(row, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SQUARED: tl.constexpr):
    """Means of each of the groups of CHANNELS, GROUPS tensors (BLOCK_R, 1), of their numbers or those squared."""
    means = ()
    for group in tl.static_range(0, GROUPS):
        total = tl.zeros((row[0].shape[0], WIDTH), tl.float32)
        for i in tl.static_range(group * CHANNELS // WIDTH, ((group + 1) * CHANNELS + WIDTH - 1) // WIDTH):
            part = row[i]
            channel = i * WIDTH + tl.arange(0, WIDTH)[None, :]
            if i * WIDTH < group * CHANNELS:
                part = tl.where(channel >= group * CHANNELS, part, 0.0)
            if (i + 1) * WIDTH > (group + 1) * CHANNELS:
                part = tl.where(channel < (group + 1) * CHANNELS, part, 0.0)
            if SQUARED:
                part = part * part
            if i == group * CHANNELS // WIDTH:
                total = part
            else:
                total += part
        means = means + (tl.div_rn(tl.sum(total, 1)[:, None], CHANNELS),)
    return means


@triton.jit
def _of_chunk(values, i: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """One value for each group, (BLOCK_R, 1), as the channels of chunk i have them."""
    value = values[i * WIDTH // CHANNELS]
    for group in tl.static_range(i * WIDTH // CHANNELS + 1, len(values)):
        if group * CHANNELS < (i + 1) * WIDTH:
            value = tl.where(i * WIDTH + tl.arange(0, WIDTH)[None, :] < group * CHANNELS, value, values[group])
    return value


@triton.jit
def _standardize_groups(row, eps, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of groups of CHANNELS, each of mean 0 and variance 1."""
    means = _means_of_groups(row, CHANNELS, GROUPS, WIDTH, False)
    centred = ()
    for i in tl.static_range(0, len(row)):
        centred = centred + (row[i] - _of_chunk(means, i, CHANNELS, WIDTH),)
    variances = _means_of_groups(centred, CHANNELS, GROUPS, WIDTH, True)
    inverses = ()
    for group in tl.static_range(0, GROUPS):
        inverses = inverses + (tl.rsqrt(variances[group] + eps),)
    normal = ()
    for i in tl.static_range(0, len(row)):
        normal = normal + (centred[i] * _of_chunk(inverses, i, CHANNELS, WIDTH),)
    return normal


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
def _store_columns(pointer, inside, COLUMNS: tl.constexpr, TAIL: tl.constexpr):
    """A one and zeros, COLUMNS numbers, at most TAIL."""
    column = tl.arange(0, TAIL)[None, :]
    tail = tl.where(column == 0, 1.0, 0.0).to(pointer.dtype.element_ty)
    tl.store(pointer + column, tail, inside & (column < COLUMNS))


@triton.jit
def _place(tile, rows, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Tokens of the rows of a tile, and which of them are inside, (BLOCK_R, 1)."""
    row = tl.full((1, 1), tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    return row // GROUPS, row < rows


@triton.jit
def _first_channel(program, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """First channel of the rows of a program's tiles, (BLOCK_R, 1): in all its tiles they are of the same groups."""
    return ((program * BLOCK_R + tl.arange(0, BLOCK_R)) % GROUPS * CHANNELS)[:, None]


@kernel
def layer_norm_fwd_kernel(
    x,
    branch,
    second,
    weight,
    bias,
    gate,
    factor,
    y,
    total,
    rows,
    tokens,
    eps,
    x_token: tl.constexpr,
    branch_token: tl.constexpr,
    second_token: tl.constexpr,
    gate_token: tl.constexpr,
    SUM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of rows, which are groups of a token's channels: all maps are (rows / GROUPS, GROUPS, CHANNELS).

    A row may be INNER groups. Behind each of y's tokens are COLUMNS more numbers. As many `tokens` of branch share a
    factor. Sums are rounded to SUM. Rows of gate start at multiples of EVEN bytes, see `_load`.
    """
    program = last_first()
    channel = _first_channel(program, CHANNELS, GROUPS, BLOCK_R)
    token, inside = _place(program, rows, GROUPS, BLOCK_R)
    start = token * (GROUPS * CHANNELS) + channel
    row = _load(x + token * x_token + channel, inside, CHANNELS, WIDTH)
    if branch is not None:
        added = _load(branch + token * branch_token + channel, inside, CHANNELS, WIDTH)
        if factor is not None:
            added = _scale(added, tl.load(factor + token // tokens, inside, 0.0).to(tl.float32))
        row = _add(row, added)
        if second is not None:
            row = _add(row, _load(second + token * second_token + channel, inside, CHANNELS, WIDTH))
        row = _round(row, SUM)
        if total is not None:
            _store(total + start, row, inside, CHANNELS, WIDTH)
    if gate is not None:
        z = _load(gate + token * gate_token + channel, inside, CHANNELS, WIDTH, EVEN)
    if INNER > 1:
        normal = _standardize_groups(row, eps, CHANNELS // INNER, INNER, WIDTH)
    else:
        normal, inverse = _standardize(row, inside, eps, CHANNELS, WIDTH)
    out = _affine(normal, weight, bias, channel, CHANNELS, WIDTH)
    if gate is not None:
        if INNER > 1:
            out = _times_silu(out, z)
        else:
            values, slopes = _silu(z)
            out = _multiply(out, values)
    y += token * (GROUPS * CHANNELS + COLUMNS)
    _store(y + channel, out, inside, CHANNELS, WIDTH)
    if COLUMNS > 0:
        _store_columns(y + GROUPS * CHANNELS, inside & (channel == (GROUPS - 1) * CHANNELS), COLUMNS, TAIL)


@kernel
def layer_norm_bwd_kernel(
    g,
    g_total,
    x,
    branch,
    second,
    weight,
    bias,
    gate,
    factor,
    gx,
    g_branch,
    g_second,
    g_gate,
    parts,
    rows,
    tokens,
    eps,
    g_token: tl.constexpr,
    g_total_token: tl.constexpr,
    x_token: tl.constexpr,
    branch_token: tl.constexpr,
    second_token: tl.constexpr,
    gate_token: tl.constexpr,
    SUM: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradients of the rows of every so many tiles, and this program's part of the parameters' gradients.

    `parts` is (programs * SUMS / GROUPS, 2, GROUPS, CHANNELS), of weight and bias: sums over rows of one group.
    """
    channel = _first_channel(tl.program_id(0), CHANNELS, GROUPS, BLOCK_R)
    known = channel >= 0
    of_weight = ()
    of_bias = ()
    for _ in tl.static_range(0, (CHANNELS + WIDTH - 1) // WIDTH):
        of_weight = of_weight + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
        of_bias = of_bias + (tl.zeros((BLOCK_R, WIDTH), tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        token, inside = _place(tile, rows, GROUPS, BLOCK_R)
        start = token * (GROUPS * CHANNELS) + channel
        row = _load(x + token * x_token + channel, inside, CHANNELS, WIDTH)
        if branch is not None:
            added = _load(branch + token * branch_token + channel, inside, CHANNELS, WIDTH)
            if factor is not None:
                share = tl.load(factor + token // tokens, inside, 0.0).to(tl.float32)
                added = _scale(added, share)
            row = _add(row, added)
            if second is not None:
                row = _add(row, _load(second + token * second_token + channel, inside, CHANNELS, WIDTH))
            row = _round(row, SUM)
            if g_total is not None:
                direct = _load(g_total + token * g_total_token + channel, inside, CHANNELS, WIDTH)
        of_out = _load(g + token * g_token + channel, inside, CHANNELS, WIDTH)
        if gate is not None:
            z = _load(gate + token * gate_token + channel, inside, CHANNELS, WIDTH)
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
        if g_total is not None:
            of_row = _add(of_row, direct)
        if branch is not None:
            of_branch = of_row if factor is None else _scale(of_row, share)
            _store(g_branch + start, of_branch, inside, CHANNELS, WIDTH)
        if second is not None:
            _store(g_second + start, of_row, inside, CHANNELS, WIDTH)
        _store(gx + start, of_row, inside, CHANNELS, WIDTH)
    if parts is not None:
        row = tl.program_id(0) * SUMS + tl.arange(0, SUMS)[:, None]
        parts += row // GROUPS * (2 * GROUPS * CHANNELS) + row % GROUPS * CHANNELS
        if weight is not None:
            _store_sums(parts, of_weight, CHANNELS, SUMS, WIDTH, BLOCK_R)
        if bias is not None:
            _store_sums(parts + GROUPS * CHANNELS, of_bias, CHANNELS, SUMS, WIDTH, BLOCK_R)


@triton.jit
def _store_sums(parts, rows, CHANNELS: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Stores sums, each over every SUMS-th row, where `parts` (SUMS, 1) points to."""
    total = ()
    for i in tl.static_range(0, len(rows)):
        total = total + (tl.sum(tl.reshape(rows[i], (BLOCK_R // SUMS, SUMS, WIDTH)), 0),)
    _store(parts, total, tl.full((SUMS, 1), True, tl.int1), CHANNELS, WIDTH)


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


# Channels above which an addition without a gate is faster with 2 channels of every chunk for a thread.
_SHORT = 128


@cache
def _whole(channels: int) -> dict:
    """Constants of the forward for rows of several groups: in narrow chunks, of which few have two groups."""
    width = 32
    while channels > 14 * width:
        width *= 2
    return dict(CHANNELS=channels, GROUPS=1, WIDTH=width, BLOCK_R=8, num_warps=4)


def _inner(channels: int, groups: int) -> int:
    """Groups that a row of the forward has: 1, or a token's few, told apart by masks, if they begin at odd places.

    Groups of an odd number of channels would be read one channel at a time.
    """
    return groups if 1 < groups <= 8 and channels % 2 > 0 else 1


def _evenness(x: Tensor | None, distance: int) -> int:
    """Bytes, a power of two, that rows at this distance start at multiples of, if a compiler cannot tell; else 0."""
    start = 0 if x is None else _ahead.address(x) % 16
    return 0 if start == 0 else math.gcd(16, start, distance * x.element_size())


def _empty(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _tokens(*maps: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Maps as rows of neighbouring channels, and the distances of those."""
    rows = [None if x is None else as_rows(x) for x in maps]
    return rows, [0 if x is None else x.stride(0) for x in rows]


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
    columns: int = 0,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    y, total = empty_results(x, branch, dtype, columns, second, with_sum)
    if x.numel() > 0:
        inner = _inner(x.shape[-1] // groups, groups)
        groups //= inner
        channels = x.shape[-1] // groups
        rows = x.numel() // channels
        constants = _config(channels, groups)[0] if inner == 1 else _whole(channels)
        if branch is not None and gate is None and channels > _SHORT:
            constants = constants | dict(num_warps=min(32, 2 * constants["num_warps"]))
        (x, branch, second, gate), distances = _tokens(x, branch, second, gate)
        layer_norm_fwd_kernel[(cdiv(rows, constants["BLOCK_R"]),)](
            x,
            branch,
            second,
            _contiguous(weight),
            _contiguous(bias),
            gate,
            _contiguous(factor),
            y,
            total if branch is not None and with_sum else None,
            rows,
            1 if factor is None else rows // groups // len(factor),
            eps,
            *distances,
            SUM=DTYPES.get(total.dtype, tl.float32),
            **constants,
            COLUMNS=columns,
            TAIL=next_power_of_2(columns),
            INNER=inner,
            EVEN=_evenness(gate, distances[3]) if inner > 1 else 0,
        )
    return y, total


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
    columns: int = 0,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> list[Tensor | None]:
    if x.numel() == 0:
        return [None] * 7
    g, g_total = grads[0], grads[1] if branch is not None and with_sum else None
    width, total_dtype = x.shape[-1], sum_dtype(x, branch, second)
    channels = width // groups
    rows = x.numel() // channels
    constants, sums_of_program, period = _config(channels, groups)
    tiles = cdiv(rows, constants["BLOCK_R"])
    limit = 2 * _PROGRAMS if width <= 128 else _PROGRAMS
    programs = min(cdiv(tiles, period), max(1, limit // period)) * period
    gx, g_branch, g_second, g_gate = _empty(x), _empty(branch), _empty(second), _empty(gate)
    parts = g_weight = g_bias = None
    if weight is not None or bias is not None:
        parts = x.new_empty(programs * sums_of_program // groups, 2 * width, dtype=torch.float32)
    (g, g_total, x, branch, second, gate), distances = _tokens(g, g_total, x, branch, second, gate)
    layer_norm_bwd_kernel[(programs,)](
        g,
        g_total,
        x,
        branch,
        second,
        _contiguous(weight),
        _contiguous(bias),
        gate,
        _contiguous(factor),
        gx,
        g_branch,
        g_second,
        g_gate,
        parts,
        rows,
        1 if factor is None else rows // groups // len(factor),
        eps,
        *distances,
        SUM=DTYPES.get(total_dtype, tl.float32),
        SUMS=sums_of_program,
        **constants,
    )
    if parts is not None:
        sums = sum_parts(parts)
        g_weight = None if weight is None else sums[:width]
        g_bias = None if bias is None else sums[width:]
    return [gx, g_branch, g_weight, g_bias, g_gate, None, g_second]
