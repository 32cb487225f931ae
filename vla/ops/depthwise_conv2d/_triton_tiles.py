"""Depthwise convolution with many taps, in 16 bits, on tensor cores: strips walked down as in `_triton_strips`.

A warp has 16 strips of four columns and 8 channels: four lanes, a quad, with two channels each, eight times. The
product of two tiles is PTX's mma.m16n8k16, in which lane `4 r + q` has

    of the left tile    rows r and r + 8, k = 2 q, 2 q + 1, 2 q + 8 and 2 q + 9
    of the right tile   column r, the same k
    of the product      rows r and r + 8, columns 2 q and 2 q + 1

For the convolution rows are strips, k are four channels with four neighbouring columns each, and the right tile has the
kernels' taps for the results in two columns. Its k of other channels than the result's are zero.

A tensor here is one register, (32 * WARPS,): its entries are the threads, an arrangement that leaves Triton no choice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    INTERPRETED,
    cdiv,
    kernel,
    last_first,
    load_apart,
    pack,
    repeat,
    starts_at_pair,
    store_apart,
    sum_parts,
    unpack,
)
from ._triton_strips import (
    DTYPES,
    MULTIPROCESSORS,
    SMALL,
    activation,
    in_pairs,
    load_row,
    on_map,
    place,
    segment_of,
    shares,
    store_row,
    strides_of,
    vec_of,
    walk,
)

# Strips and channels of a warp, as PTX has them, and warps of a program: a sector of memory has the channels of two.
STRIPS, CHANNELS, WARPS = 16, 8, 2
# Columns of a strip.
COLUMNS = 4
# Rows and columns of kernels up to which there are registers for their sums.
MOST = 7

# Instructions of a whole warp are called pure, which lets a compiler move them: no branch here parts the lanes of one.


@triton.jit
def _halves(low, high):
    """The lower halves of two integers as one, and the upper ones."""
    if INTERPRETED:
        return (low & 65535) | (high << 16), ((low >> 16) & 65535) | (high & -65536)
    else:
        lower = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], tl.int32, True, 1)
        upper = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [low, high], tl.int32, True, 1)
        return lower, upper


@triton.jit
def _of_lane(x, lane):
    """The register x of other threads of the warp, lanes 0 to 31."""
    if INTERPRETED:
        WARPS: tl.constexpr = x.shape[0] // 32
        same = lane.reshape(WARPS, 32, 1) == tl.arange(0, 32)[None, None, :]
        return tl.sum(tl.where(same, x.reshape(WARPS, 1, 32), 0), 2).reshape(32 * WARPS)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], tl.int32, True, 1
        )


@triton.jit
def _load(pointers, number, height, row_stride, stride: tl.constexpr, masks):
    """The row of this number of all strips, one after the other."""
    row = ()
    for i in tl.static_range(len(pointers)):
        row = row + load_row(pointers[i], number, height, row_stride, stride, masks[i])
    return row


@triton.jit
def _with_neighbours(row, lane, around, COLUMNS: tl.constexpr, LEFT: tl.constexpr):
    """A row of both strips of a thread, each with LEFT columns on both sides, from the threads that have them.

    Args:
        row: Own columns of the first strip, and of the second, which begins where that ends. Then, for the warp's first
            strip, the columns before it; for its last, those behind it.
        lane: Numbers of the threads.
        around: Whether there are columns before and behind the first strip, and the second.
    """
    lower, upper, edge = row[:COLUMNS], row[COLUMNS : 2 * COLUMNS], row[2 * COLUMNS :]
    is_first, is_last = lane % 32 < 4, lane % 32 >= 28
    lower_left, lower_right, upper_left, upper_right = (), (), (), ()
    for j in tl.static_range(LEFT):
        before = _of_lane(upper[COLUMNS - LEFT + j], (lane + 28) % 32)
        lower_left = lower_left + (tl.where(is_first, edge[j], tl.where(around[0], before, 0)),)
        lower_right = lower_right + (tl.where(around[1], upper[j], 0),)
        upper_left = upper_left + (tl.where(around[2], lower[COLUMNS - LEFT + j], 0),)
        behind = _of_lane(lower[j], (lane + 4) % 32)
        upper_right = upper_right + (tl.where(is_last, edge[j], tl.where(around[3], behind, 0)),)
    return lower_left + lower + lower_right, upper_left + upper + upper_right


@triton.jit
def _by_channel(row, COUNT: tl.constexpr):
    """Columns of two channels each as pairs of columns of the first channel, and of the second.

    There may be fewer than COUNT: the last then stands for those that are multiplied with zero.
    """
    first, second = (), ()
    for j in tl.static_range(0, len(row), 2):
        lower, upper = _halves(row[j], row[j + 1])
        first, second = first + (lower,), second + (upper,)
    for _ in tl.static_range(len(row) // 2, COUNT):
        first, second = first + (first[len(row) // 2 - 1],), second + (second[len(row) // 2 - 1],)
    return first, second


@triton.jit
def _quarter(a, DTYPE: tl.constexpr):
    """A quarter of a tile, (WARPS, 8, 8) in float32, from a register of every thread."""
    return unpack(a.reshape(a.shape[0] // 4, 4), DTYPE).reshape(a.shape[0] // 32, 8, 8)


@triton.jit
def _products(a_left, a_right, b_left, b_right):
    """Rows of `a`, in two quarters of k, times columns of b, as a register of every thread for even and odd columns."""
    product = tl.sum(a_left[:, :, None, :] * b_left[:, None, :, :], 3)
    product += tl.sum(a_right[:, :, None, :] * b_right[:, None, :, :], 3)
    return product.reshape(product.shape[0] * 32, 2).split()


@triton.jit
def _multiply_add(a_left, a_right, b_left, b_right, c, DTYPE: tl.constexpr):
    """c + a @ b of each warp's tiles (16, 16) and (16, 8), in the registers of PTX's mma.m16n8k16."""
    if INTERPRETED:
        left, right = _quarter(b_left, DTYPE), _quarter(b_right, DTYPE)
        d0, d1 = _products(_quarter(a_left[0], DTYPE), _quarter(a_right[0], DTYPE), left, right)
        d2, d3 = _products(_quarter(a_left[1], DTYPE), _quarter(a_right[1], DTYPE), left, right)
        return c[0] + d0, c[1] + d1, c[2] + d2, c[3] + d3
    else:
        TYPES: tl.constexpr = "f32.f16.f16.f32" if tl.float16 == DTYPE else "f32.bf16.bf16.f32"
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col." + TYPES + " "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a_left[0], a_left[1], a_right[0], a_right[1], b_left, b_right, c[0], c[1], c[2], c[3]],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            1,
        )


@triton.jit
def _tap(weight, channel, inside, row: tl.constexpr, column, FLIP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    inside = inside & (column >= 0) & (column < KW)
    tap = (KH - 1 - row) * KW + KW - 1 - column if FLIP else row * KW + column
    return load_apart(weight + channel * (KH * KW) + tap, inside, 0.0).to(tl.float32)


@triton.jit
def _load_kernels(
    weight, pair, lane, inside, FLIP: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DTYPE: tl.constexpr
):
    """The right tiles of all products: for each row of the kernels, four columns and both channels, two registers."""
    # Column `lane % 32 // 4` of the tile is of results of pair `column // 2`, in the first or second of two columns.
    column = lane % 32 // 4
    own = inside & (column // 2 == lane % 4)
    shift = column % 2
    tiles = ()
    for i in tl.static_range(KH):
        for first in tl.static_range(0, KW + 1, 4):
            for odd in tl.static_range(2):
                for j in tl.static_range(first, first + 4, 2):
                    low = _tap(weight, 2 * pair + odd, own, i, j - shift, FLIP, KH, KW)
                    high = _tap(weight, 2 * pair + odd, own, i, j + 1 - shift, FLIP, KH, KW)
                    tiles = tiles + (pack(low, high, DTYPE),)
    return tiles


@triton.jit
def _correlate(
    sums, lower, upper, kernels, KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr
):
    """Adds a row of the input to the KH rows of the output that it is in the window of, from the first to the last.

    Args:
        sums: For each row, two columns and both channels, four registers.
        lower: The row of the thread's first strip, pairs of columns of both channels.
        upper: The same of its second strip.
        kernels: From `_load_kernels`.
    """
    QUADS: tl.constexpr = KW // 4 + 1
    out = ()
    for i in tl.static_range(KH):
        for j in tl.static_range(COLUMNS // 2):
            for odd in tl.static_range(2):
                total = sums[((i * (COLUMNS // 2) + j) * 2 + odd) * 4 : ((i * (COLUMNS // 2) + j) * 2 + odd + 1) * 4]
                for quad in tl.static_range(QUADS):
                    total = _multiply_add(
                        (lower[odd][j + 2 * quad], upper[odd][j + 2 * quad]),
                        (lower[odd][j + 2 * quad + 1], upper[odd][j + 2 * quad + 1]),
                        kernels[(((KH - 1 - i) * QUADS + quad) * 2 + odd) * 2],
                        kernels[(((KH - 1 - i) * QUADS + quad) * 2 + odd) * 2 + 1],
                        total,
                        DTYPE,
                    )
                out = out + total
    return out


@triton.jit
def _finish(sums, OF: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """A row of the result of the thread's first (OF 0) or second (OF 2) strip, both channels of each column."""
    out = ()
    for j in tl.static_range(COLUMNS):
        low = activation(sums[j // 2 * 8 + OF + j % 2], ACT)
        high = activation(sums[j // 2 * 8 + OF + j % 2 + 4], ACT)
        out = out + (pack(low, high, DTYPE),)
    return out


@kernel(do_not_specialize=["pairs", "height", "width", "strips", "segment", "x_batch", "x_row", "y_batch", "y_row"])
def depthwise_conv2d_tiles_fwd_kernel(
    x,
    weight,
    bias,
    y,
    pairs,
    height,
    width,
    strips,
    segment,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    y_batch,
    y_row,
    y_column: tl.constexpr,
    ACT: tl.constexpr,
    FLIP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A segment of the rows of 16 strips, 8 channels for each warp. x and y are integers, pairs of channels."""
    TOP: tl.constexpr = KH // 2
    LEFT: tl.constexpr = KW // 2
    ROW: tl.constexpr = 4 * COLUMNS
    PAIRS: tl.constexpr = COLUMNS // 2 - 1 + KW // 4 * 2 + 2
    blocks = tl.cdiv(pairs, 4 * WARPS)
    lane = tl.arange(0, 32 * WARPS)
    program = last_first()
    pair = program % blocks * (4 * WARPS) + lane // 32 * 4 + lane % 4
    exists = pair < pairs
    kernels = _load_kernels(weight, pair, lane, exists, FLIP, KH, KW, DTYPE)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    first_bias, second_bias = zero, zero
    if bias is not None:
        first_bias = load_apart(bias + 2 * pair, exists, 0.0).to(tl.float32)
        second_bias = load_apart(bias + 2 * pair + 1, exists, 0.0).to(tl.float32)
    empty = ()
    for _ in tl.static_range(COLUMNS // 2):
        empty = empty + repeat(first_bias, 4) + repeat(second_bias, 4)

    lower_strip = program // blocks * 16 + lane % 32 // 4 * 2
    upper_strip = lower_strip + 1
    lower_image, lower_column = place(lower_strip, width, COLUMNS)
    upper_image, upper_column = place(upper_strip, width, COLUMNS)
    lower_inside, upper_inside = exists & (lower_strip < strips), exists & (upper_strip < strips)
    lower_x = x + lower_image * x_batch + lower_column * x_column + pair
    upper_x = x + upper_image * x_batch + upper_column * x_column + pair
    lower_y = y + lower_image * y_batch + lower_column * y_column + pair
    upper_y = y + upper_image * y_batch + upper_column * y_column + pair
    lower_masks = on_map(lower_column, lower_inside, width, COLUMNS, 0, EVEN)
    upper_masks = on_map(upper_column, upper_inside, width, COLUMNS, 0, EVEN)
    around = (
        lower_column > 0,
        lower_column + COLUMNS < width,
        upper_column > 0,
        upper_column + COLUMNS < width,
    )
    is_first, is_last = lane % 32 < 4, lane % 32 >= 28
    edge_x = tl.where(is_first, lower_x - LEFT * x_column, upper_x + COLUMNS * x_column)
    edge_masks = ()
    for j in tl.static_range(LEFT):
        behind = is_last & upper_inside & (upper_column + COLUMNS + (0 if EVEN else j) < width)
        edge_masks = edge_masks + ((is_first & lower_inside & around[0]) | behind,)

    first, last, begin, end = walk(height, segment, TOP)
    # Rows of the output whose window is at the row of the input, from the one that this row completes.
    sums = ()
    for _ in tl.static_range(KH):
        sums = sums + empty
    pointers, masks = (lower_x, upper_x, edge_x), (lower_masks, upper_masks, edge_masks)
    following = _load(pointers, begin, height, x_row, x_column, masks)
    after = _load(pointers, begin + 1, height, x_row, x_column, masks)
    for row in range(begin, end):
        lower, upper = _with_neighbours(following, lane, around, COLUMNS, LEFT)
        following = after
        after = _load(pointers, row + 2, height, x_row, x_column, masks)
        lower, upper = _by_channel(lower, PAIRS), _by_channel(upper, PAIRS)
        sums = _correlate(sums, lower, upper, kernels, KH, KW, COLUMNS, DTYPE)
        done, own = tl.maximum(row - TOP, first).to(tl.int64) * y_row, row - TOP >= first
        store_row(lower_y + done, y_column, lower_masks, own, _finish(sums, 0, COLUMNS, ACT, DTYPE))
        store_row(upper_y + done, y_column, upper_masks, own, _finish(sums, 2, COLUMNS, ACT, DTYPE))
        sums = sums[ROW:] + empty
    for i in tl.static_range(TOP):
        done, rest = end - TOP + i, sums[i * ROW : (i + 1) * ROW]
        own, at = (done >= first) & (done < last), done.to(tl.int64) * y_row
        store_row(lower_y + at, y_column, lower_masks, own, _finish(rest, 0, COLUMNS, ACT, DTYPE))
        store_row(upper_y + at, y_column, upper_masks, own, _finish(rest, 2, COLUMNS, ACT, DTYPE))


@triton.jit
def _pairs_of_strips(rows, U: tl.constexpr, COUNT: tl.constexpr):
    """Entry U of each of the four strips' COUNT as the left and right half of k of both channels, four registers."""
    left = _halves(rows[U], rows[COUNT + U])
    right = _halves(rows[2 * COUNT + U], rows[3 * COUNT + U])
    return left[0], right[0], left[1], right[1]


@triton.jit
def _of_taps(row, lane, around, LEFT: tl.constexpr, COUNT: tl.constexpr):
    """A row of x as left tiles: COUNT pairs of columns from LEFT before the strip on, each as of `_pairs_of_strips`.

    Args:
        row: Of four strips after each other two columns with one between them; then the same of the strip before the
            quad's first in the first thread of a quad, of the one behind its last in the last.
        lane: Numbers of the threads.
        around: Of each strip, whether there are columns before and behind it.
    """
    is_odd, quad = lane % 32 >= 16, lane % 4
    # The pair of columns that a thread's first own column is in, of threads with the even and the odd ones.
    EVEN_PAIR: tl.constexpr = (LEFT + 1) // 2
    ODD_PAIR: tl.constexpr = LEFT // 2
    before, behind = lane % 32 // 4 * 4 + (lane + 3) % 4, lane % 32 // 4 * 4 + (lane + 1) % 4
    left, right = (), ()
    for j in tl.static_range(2):
        left = left + (tl.where(quad == 0, row[8 + j], _of_lane(row[6 + j], before)),)
        right = right + (tl.where(quad == 3, row[8 + j], _of_lane(row[j], behind)),)
    whole = left + row[:8] + right
    columns = ()
    for strip in tl.static_range(4):
        near = ()
        for j in tl.static_range(2):
            near = near + (tl.where(around[strip][0], whole[2 * strip + j], 0),)
        near = near + whole[2 * strip + 2 : 2 * strip + 4]
        for j in tl.static_range(2):
            near = near + (tl.where(around[strip][1], whole[2 * strip + 4 + j], 0),)
        for pair in tl.static_range(COUNT):
            columns = columns + (tl.where(is_odd, near[2 + pair - ODD_PAIR], near[2 + pair - EVEN_PAIR]),)
    tiles = ()
    for pair in tl.static_range(COUNT):
        tiles = tiles + _pairs_of_strips(columns, pair, COUNT)
    return tiles


@triton.jit
def _of_gradient(row):
    """A row of the gradient as right tiles: for two pairs of columns what `_pairs_of_strips` returns."""
    return _pairs_of_strips(row, 0, 2) + _pairs_of_strips(row, 1, 2)


@triton.jit
def _correlate_taps(sums, rows, row, KH: tl.constexpr, KW: tl.constexpr, DTYPE: tl.constexpr):
    """Adds the products of KH rows of the gradient (`_of_gradient`) and of the row of x between them (`_of_taps`)."""
    QUADS: tl.constexpr = KW // 4 + 1
    out = ()
    for i in tl.static_range(KH):
        for odd in tl.static_range(2):
            for quad in tl.static_range(QUADS):
                total = sums[((i * 2 + odd) * QUADS + quad) * 4 : ((i * 2 + odd) * QUADS + quad + 1) * 4]
                for pair in tl.static_range(2):
                    total = _multiply_add(
                        (row[4 * (pair + 2 * quad) + 2 * odd], row[4 * (pair + 2 * quad) + 2 * odd + 4]),
                        (row[4 * (pair + 2 * quad) + 2 * odd + 1], row[4 * (pair + 2 * quad) + 2 * odd + 5]),
                        rows[8 * (KH - 1 - i) + 4 * pair + 2 * odd],
                        rows[8 * (KH - 1 - i) + 4 * pair + 2 * odd + 1],
                        total,
                        DTYPE,
                    )
                out = out + total
    return out


@kernel(do_not_specialize=["pairs", "height", "width", "strips", "segment", "g_batch", "g_row", "x_batch", "x_row"])
def depthwise_conv2d_tiles_bwd_kernel(
    g,
    x,
    parts,
    pairs,
    height,
    width,
    strips,
    segment,
    g_batch,
    g_row,
    g_column: tl.constexpr,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Two partial sums of the gradient of the kernels, (C, KH * KW), over a segment of the rows of some strips.

    Here k are the strips, four neighbouring ones a lane. Rows of the left tile are four channels with four neighbouring
    columns of x, columns of the right one the same channels with two of the gradient. Of their products those of a
    channel with itself count, a quarter; they belong to the tap that their columns are apart.
    """
    TOP: tl.constexpr = KH // 2
    LEFT: tl.constexpr = KW // 2
    QUADS: tl.constexpr = KW // 4 + 1
    COUNT: tl.constexpr = 2 * QUADS + 1
    blocks = tl.cdiv(pairs, 4 * WARPS)
    lane = tl.arange(0, 32 * WARPS)
    quad, odd_columns = lane % 4, lane % 32 // 16
    pair = tl.program_id(0) % blocks * (4 * WARPS) + lane // 32 * 4 + lane // 4 % 4
    exists = pair < pairs
    own = (LEFT + odd_columns) % 2

    first, last, begin, end = walk(height, segment, TOP)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    nothing = tl.zeros((32 * WARPS,), tl.int32)
    sums = repeat(zero, KH * 2 * QUADS * 4)
    for group in range(tl.program_id(0) // blocks, tl.cdiv(strips, 16), tl.num_programs(0) // blocks):
        x_at, x_masks, g_at, g_masks, around, insides, columns = (), (), (), (), (), (), ()
        for i in tl.static_range(4):
            strip = group * 16 + quad * 4 + i
            image, column = place(strip, width, COLUMNS)
            inside = exists & (strip < strips)
            x_at = x_at + (x + image * x_batch + (column + own) * x_column + pair,)
            g_at = g_at + (g + image * g_batch + (column + odd_columns) * g_column + pair,)
            x_mask, g_mask = (), ()
            for j in tl.static_range(0, COLUMNS, 2):
                x_mask = x_mask + (inside if EVEN else inside & (column + own + j < width),)
                g_mask = g_mask + (inside if EVEN else inside & (column + odd_columns + j < width),)
            x_masks, g_masks = x_masks + (x_mask,), g_masks + (g_mask,)
            around = around + ((column > 0, column + COLUMNS < width),)
            insides, columns = insides + (inside,), columns + (column,)
        is_before = (quad == 0) & insides[0] & (columns[0] > 0)
        edge = tl.where(quad == 0, x_at[0] - COLUMNS * x_column, x_at[3] + COLUMNS * x_column)
        edge_mask = ()
        for j in tl.static_range(COLUMNS, 2 * COLUMNS, 2):
            is_behind = (quad == 3) & insides[3] & (columns[3] + (0 if EVEN else own) + j < width)
            edge_mask = edge_mask + (is_before | is_behind,)
        x_at, x_masks = x_at + (edge,), x_masks + (edge_mask,)

        # Rows of the gradient around the row of x, as far as they are the program's own.
        rows = repeat(nothing, KH * 8)
        for row in range(first - TOP, begin):
            following = _load(g_at, row + TOP, last, g_row, 2 * g_column, g_masks)
            rows = rows[8:] + _of_gradient(following)
        x_following = _load(x_at, begin, height, x_row, 2 * x_column, x_masks)
        g_following = _load(g_at, begin + TOP, last, g_row, 2 * g_column, g_masks)
        for row in range(begin, end):
            current = _of_taps(x_following, lane, around, LEFT, COUNT)
            rows = rows[8:] + _of_gradient(g_following)
            x_following = _load(x_at, row + 1, height, x_row, 2 * x_column, x_masks)
            g_following = _load(g_at, row + 1 + TOP, last, g_row, 2 * g_column, g_masks)
            sums = _correlate_taps(sums, rows, current, KH, KW, DTYPE)

    # A lane has products of its own channels in one of its two columns, if any. Two lanes have the same tap.
    part = tl.program_id(0) // blocks * tl.num_programs(1) + tl.program_id(1)
    parts += (part * 2 + quad // 2).to(tl.int64) * (2 * pairs * KH * KW) + 2 * pair * (KH * KW)
    exists &= lane % 16 // 8 == quad % 2
    is_first = lane // 4 % 2 == 0
    for i in tl.static_range(KH):
        for odd in tl.static_range(2):
            for step in tl.static_range(2 * QUADS):
                tap = 2 * step + odd_columns - quad // 2
                value = tl.where(
                    is_first,
                    sums[2 * ((i * 2 + odd) * QUADS * 2 + step)],
                    sums[2 * ((i * 2 + odd) * QUADS * 2 + step) + 1],
                )
                to = parts + odd * (KH * KW) + i * KW + tap
                store_apart(to, value, exists & (tap >= 0) & (tap < KW))


def _has_instructions(device: torch.device) -> bool:
    """Whether a device has the products, or none is asked: kernels are interpreted, or compiled ahead of time."""
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type in ("cpu", "meta")


def _strips(x: Tensor) -> int:
    return x.shape[0] * cdiv(x.shape[3], COLUMNS)


def suits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels have registers for the taps, take this dtype beside a map's, and are the faster."""
    kh, kw = weight.shape[2:]
    fits = kh * kw > SMALL and max(kh, kw) <= MOST
    paired = x.element_size() == 2 and x.dtype == dtype and vec_of(x) == 2 and starts_at_pair(x)
    return fits and paired and _strips(x) >= STRIPS and _has_instructions(x.device)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, flip: bool, y: Tensor) -> None:
    """Writes the convolution of a channels-last map, with `flip` its adjoint, to a channels-last map y."""
    _, channels, height, width = x.shape
    strips = _strips(x)
    programs = cdiv(strips, STRIPS) * cdiv(channels, WARPS * CHANNELS)
    # At least half as many programs as a GPU runs at once; of long walks more, as it else waits for the last ones.
    segment = min(
        segment_of(programs, height, 2 * MULTIPROCESSORS), segment_of(programs, height, 8 * MULTIPROCESSORS, rows=20)
    )
    dtype = x.dtype
    x, y = in_pairs(x, y)
    depthwise_conv2d_tiles_fwd_kernel[(programs, cdiv(height, segment))](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        channels // 2,
        height,
        width,
        strips,
        segment,
        *strides_of(x, 1),
        *strides_of(y, 1),
        ACT=act,
        FLIP=flip,
        KH=weight.shape[2],
        KW=weight.shape[3],
        COLUMNS=COLUMNS,
        EVEN=width % COLUMNS == 0,
        DTYPE=DTYPES[dtype],
        WARPS=WARPS,
        num_warps=WARPS,
    )


def kernels_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the kernels in float32, of channels-last maps."""
    _, channels, height, width = x.shape
    strips, blocks = _strips(x), cdiv(channels, WARPS * CHANNELS)
    groups, segment = shares(cdiv(strips, STRIPS), blocks, height, 4 * MULTIPROCESSORS)
    segments = cdiv(height, segment)
    parts = x.new_empty(2 * groups * segments, weight.numel(), dtype=torch.float32)
    dtype = x.dtype
    g, x = in_pairs(g, x)
    depthwise_conv2d_tiles_bwd_kernel[(groups * blocks, segments)](
        g,
        x,
        parts,
        channels // 2,
        height,
        width,
        strips,
        segment,
        *strides_of(g, 1),
        *strides_of(x, 1),
        KH=weight.shape[2],
        KW=weight.shape[3],
        COLUMNS=COLUMNS,
        EVEN=width % COLUMNS == 0,
        DTYPE=DTYPES[dtype],
        WARPS=WARPS,
        num_warps=WARPS,
    )
    return sum_parts(parts).view(weight.shape)
