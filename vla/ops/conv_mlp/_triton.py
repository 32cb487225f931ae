"""First product, convolution and second product of strips of pixels, between which nothing leaves a program."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, dot, dot_add, gelu, kernel, last_first, next_power_of_2, repeat
from ..conv_gelu_linear import _triton as conv_gelu_linear
from ..conv_gelu_linear import empty_results
from ..conv_gelu_linear._triton import finish, join_all, load_weight, rows_of_strip
from ..depthwise_conv2d._triton_strips import correlate

COLUMNS = 4
# Strips of a program: as many threads have neighbouring columns of a product.
BLOCK_S = 4
# Pixels of a strip, of which a power of two can be rows of a product, and those with all around it.
PIXELS = 32
WINDOW = 64
# Features of a program's block: two for each thread.
BLOCK_F = 64
# Channels before and behind, for whose sums four warps have registers.
WIDEST = 64
# Features of a program that makes the table.
BLOCK_TABLE = 128


@kernel
def table_kernel(weight, bias, in_bias, table, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """Kernels (F, 9) as (9, F) and, for nine places of a pixel on the map, what its sum begins with.

    That is the convolution's bias and what the first product's gives, which is nothing outside of the map.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    exists = f < F
    kernels = ()
    for t in tl.static_range(9):
        value = tl.load(weight + f * 9 + t, exists, 0.0).to(tl.float32)
        tl.store(table + t * F + f, value, exists)
        kernels = kernels + (value,)
    start = tl.load(bias + f, exists, 0.0).to(tl.float32)
    first = tl.load(in_bias + f, exists, 0.0).to(tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            total = tl.zeros((BLOCK_F,), tl.float32)
            for t in tl.static_range(9):
                # Above the first row there is nothing, nor below the last one; so it is with columns.
                if (t // 3 + i > 0) and (t // 3 + i < 4) and (t % 3 + j > 0) and (t % 3 + j < 4):
                    total += kernels[t]
            tl.store(table + (9 + i * 3 + j) * F + f, start + first * total, exists)


@triton.jit
def halves_of(tensors):
    """The even ones of the last axis of all tensors, then the odd ones."""
    even = ()
    odd = ()
    for k in tl.static_range(len(tensors)):
        low, high = tl.split(tensors[k])
        even = even + (low,)
        odd = odd + (high,)
    return even + odd


@triton.jit
def take_apart(tile, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr):
    """Columns of a product (BLOCK_F, 32 * BLOCK_S) as 32 tensors (BLOCK_F, BLOCK_S); a thread keeps what it has."""
    tile = tile.reshape(BLOCK_F, 16, BLOCK_S, 2).permute(0, 2, 1, 3)
    tensors = (tile.reshape(BLOCK_F, BLOCK_S, 2, 2, 2, 2, 2),)
    for _ in tl.static_range(5):
        tensors = halves_of(tensors)
    return tensors


@triton.jit
def load_features(vectors, f, BLOCK_S: tl.constexpr, F: tl.constexpr, EVEN_F: tl.constexpr):
    """Numbers f (BLOCK_F, 1) of a vector (F,), (BLOCK_F, BLOCK_S)."""
    # So few that all threads may load what they need, instead of handing it on.
    values = tl.load(vectors + f) if EVEN_F else tl.load(vectors + f, f < F, 0.0)
    return tl.broadcast_to(values.to(tl.float32), (f.shape[0], BLOCK_S))


@triton.jit
def load_starts(
    table,
    f,
    i,
    up,
    down,
    left,
    right,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    F: tl.constexpr,
    EVEN_F: tl.constexpr,
):
    """What sums of a strip's row i begin with."""
    row = ()
    for j in tl.static_range(3):
        value = load_features(table + (12 + j) * F, f, BLOCK_S, F, EVEN_F)
        if i == 0:
            value = tl.where(up, load_features(table + (9 + j) * F, f, BLOCK_S, F, EVEN_F), value)
        elif i == ROWS - 1:
            value = tl.where(down, load_features(table + (15 + j) * F, f, BLOCK_S, F, EVEN_F), value)
        row = row + (value,)
    out = (tl.where(left, row[0], row[1]),)
    for _ in tl.static_range(COLUMNS - 2):
        out = out + (row[1],)
    return out + (tl.where(right, row[2], row[1]),)


@triton.jit
def add_bias(pixels, bias, row, column, height, width):
    """A row of the first product from `column` on with its bias, zeros beside the map."""
    out = ()
    for j in tl.static_range(len(pixels)):
        exists = (row >= 0) & (row < height) & (column + j >= 0) & (column + j < width)
        out = out + (tl.where(exists, pixels[j] + bias, 0.0),)
    return out


@kernel(do_not_specialize=["height", "width", "strips", "strips_of_row", "segments"])
def conv_mlp_fwd_kernel(
    x,
    in_weight,
    in_bias,
    table,
    bias,
    weight,
    out_bias,
    stream,
    branch,
    norm_weight,
    norm_bias,
    total,
    y,
    height,
    width,
    strips,
    strips_of_row,
    segments,
    eps,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_D: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    """y for BLOCK_S strips of ROWS x COLUMNS pixels.

    EVEN: Strips divide the map, so that of a strip's rows and columns only those around it may be beside the map.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    program = last_first()
    HALF: tl.constexpr = WINDOW // 2
    # Columns of the first product by pairs of pixels, strip and pixel: of those a thread has all pixels of one strip.
    n = tl.arange(0, HALF * BLOCK_S)
    strip = program * BLOCK_S + n // 2 % BLOCK_S
    line = strip // strips_of_row
    picture = x + (line // segments).to(tl.int64) * x_batch
    c = tl.arange(0, DEPTH)[None, :]
    halves = ()
    for half in tl.static_range(2):
        p = half * HALF + n // (2 * BLOCK_S) * 2 + n % 2
        row = line % segments * ROWS + p // (COLUMNS + 2) - 1
        column = strip % strips_of_row * COLUMNS + p % (COLUMNS + 2) - 1
        exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        exists = (exists & (strip < strips) & (p < (ROWS + 2) * (COLUMNS + 2)))[:, None]
        pixel = (picture + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column)[:, None]
        halves = halves + (tl.load(pixel + c, exists if EVEN_C else exists & (c < C), 0.0),)

    strip = program * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    row = strip // strips_of_row % segments * ROWS - 1
    column = strip % strips_of_row * COLUMNS - 1
    up, down, left, right = row < 0, row + ROWS + 1 == height, column < 0, column + COLUMNS + 1 == width
    out = tl.zeros((BLOCK_S * PIXELS, WIDTH), tl.float32)
    f = tl.arange(0, BLOCK_F)[:, None]
    block = load_weight(in_weight, 0, 0, BLOCK_F, DEPTH, C, F, EVEN_C, EVEN_F)
    for first_f in tl.range(0, F, BLOCK_F, num_stages=1):
        kernels = ()
        for t in tl.static_range(9):
            kernels = kernels + (load_features(table + t * F, first_f + f, BLOCK_S, F, EVEN_F),)
        if EVEN:
            starts = load_starts(table, first_f + f, 0, up, down, left, right, ROWS, COLUMNS, BLOCK_S, F, EVEN_F)
        else:
            first = load_features(in_bias, first_f + f, BLOCK_S, F, EVEN_F)
            starts = repeat(load_features(bias, first_f + f, BLOCK_S, F, EVEN_F), COLUMNS)
        # As in the depthwise convolution: of rows of the result whose window is at the row of the input.
        sums = starts + starts + starts
        pixels = ()
        window = take_apart(dot(block, halves[0].trans()), BLOCK_F, BLOCK_S)
        for i in tl.static_range(ROWS + 2):
            if (COLUMNS + 2) * i <= HALF and (COLUMNS + 2) * (i + 1) > HALF:
                window = window + take_apart(dot(block, halves[1].trans()), BLOCK_F, BLOCK_S)
            current = window[i * (COLUMNS + 2) : (i + 1) * (COLUMNS + 2)]
            if not EVEN:
                current = add_bias(current, first, row + i, column, height, width)
            sums = correlate(sums, current, kernels, 3, 3)
            if i >= 2:
                for j in tl.static_range(COLUMNS):
                    pixels = pixels + (gelu(sums[j]).to(dtype),)
            if EVEN and i + 1 < ROWS:
                starts = load_starts(
                    table, first_f + f, i + 1, up, down, left, right, ROWS, COLUMNS, BLOCK_S, F, EVEN_F
                )
            sums = sums[COLUMNS:] + starts
        # Both weights behind the convolution, whose registers they would take: the first one's next block.
        next_f = tl.where(first_f + BLOCK_F < F, first_f + BLOCK_F, 0)
        block = load_weight(in_weight, next_f, 0, BLOCK_F, DEPTH, C, F, EVEN_C, EVEN_F)
        pixels = pixels + repeat(tl.zeros((BLOCK_F, BLOCK_S), dtype), PIXELS - ROWS * COLUMNS)
        hidden = join_all(pixels).reshape(BLOCK_F, BLOCK_S * PIXELS)
        out_block = load_weight(weight, 0, first_f, WIDTH, BLOCK_F, F, D, EVEN_F, EVEN_D)
        out = dot_add(hidden.trans(), out_block.trans(), out)

    finish(
        (out,),
        program,
        0,
        out_bias,
        stream,
        branch,
        norm_weight,
        norm_bias,
        total,
        y,
        height,
        width,
        strips,
        strips_of_row,
        segments,
        eps,
        D,
        ROWS,
        COLUMNS,
        PIXELS,
        WIDTH,
        0,
        BLOCK_S,
        WITH_SUM,
    )


def forward(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    stream: Tensor | None,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    with_sum: bool,
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    out, features = out_weight.shape
    if max(channels, out) > WIDEST:
        hidden = F.linear(x, in_weight.to(x.dtype), in_bias.to(x.dtype))
        others = (stream, branch, norm_weight, norm_bias, eps, dtype, with_sum)
        return conv_gelu_linear.forward(hidden, weight, bias, out_weight, out_bias, *others)
    y, total = empty_results(x, out, stream, branch, dtype, with_sum)
    if y.numel() == 0:
        return y, total
    if x.stride(3) != 1:
        x = x.contiguous()
    rows, depth, columns = rows_of_strip(height), *(max(16, next_power_of_2(size)) for size in (channels, out))
    segments, strips_of_row = cdiv(height, rows), cdiv(width, COLUMNS)
    strips = batch * segments * strips_of_row
    bias, in_bias = bias.contiguous(), in_bias.contiguous()
    table = x.new_empty(18, features, dtype=torch.float32)
    table_kernel[(cdiv(features, BLOCK_TABLE),)](
        weight.contiguous(), bias, in_bias, table, F=features, BLOCK_F=BLOCK_TABLE, num_warps=4
    )
    conv_mlp_fwd_kernel[(cdiv(strips, BLOCK_S),)](
        x,
        in_weight.to(x.dtype).contiguous(),
        in_bias,
        table,
        bias,
        out_weight.to(x.dtype).contiguous(),
        out_bias.contiguous(),
        *(None if t is None else t.contiguous() for t in (stream, branch, norm_weight, norm_bias)),
        total,
        y,
        height,
        width,
        strips,
        strips_of_row,
        segments,
        eps,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        C=channels,
        F=features,
        D=out,
        ROWS=rows,
        COLUMNS=COLUMNS,
        PIXELS=PIXELS,
        WINDOW=WINDOW,
        EVEN=height % rows == 0 and width % COLUMNS == 0,
        EVEN_C=channels == depth,
        EVEN_F=features % BLOCK_F == 0,
        EVEN_D=out == columns,
        DEPTH=depth,
        WIDTH=columns,
        BLOCK_S=BLOCK_S,
        BLOCK_F=BLOCK_F,
        WITH_SUM=with_sum,
        num_warps=4,
    )
    return y, total
