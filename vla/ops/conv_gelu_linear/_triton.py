"""Depthwise convolution in strips that are walked down in registers, whose pixels are then rows of a product."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    at_most,
    cdiv,
    dot_add,
    gelu,
    kernel,
    last_first,
    lead_and_rest,
    load_apart,
    mean_of_rows,
    repeat,
    starts_at_pair,
    tile_columns,
    unpack,
)
from ..depthwise_conv2d._triton_strips import correlate, on_map
from ..layer_norm import _triton as layer_norm
from . import empty_results

COLUMNS = 4
# Pixels of a strip, of which a power of two can be rows of a product.
PIXELS = 32
# Columns of the result that a program has registers for.
WIDEST = 192
# Strips and channels of a program's block: two channels for each thread.
BLOCK_S = 2
BLOCK_C = 128
# Rows of the next block that are loaded ahead, by columns of the result up to which there are registers for them, and
# registers that leave room for three programs where there are fewer columns still.
ROWS_AHEAD = {96: 4, 128: 2}
FEW_COLUMNS = 64
REGISTERS = 168
# Numbers between rows of which ten, a strip's with those around it, are no number of 32 bits.
FAR = 2**27


@triton.jit
def on_rows(row, height, ROWS: tl.constexpr):
    """Which rows of a strip from `row` on are on the map."""
    masks = ()
    for i in tl.static_range(ROWS):
        masks = masks + (row + i < height,)
    return masks


@triton.jit
def join_halves(tensors):
    HALF: tl.constexpr = len(tensors) // 2
    out = ()
    for i in tl.static_range(HALF):
        out = out + (tl.join(tensors[i], tensors[HALF + i]),)
    return out


@triton.jit
def join_all(tensors):
    """32 tensors (M, N) as one, (M, N, 2, 2, 2, 2, 2), of which every thread keeps what it has."""
    for _ in tl.static_range(5):
        tensors = join_halves(tensors)
    return tensors[0]


@triton.jit
def pile(tensors, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """32 tensors (BLOCK_S, BLOCK_C) as rows (BLOCK_S * 32, BLOCK_C)."""
    return join_all(tensors).permute(0, 2, 3, 4, 5, 6, 1).reshape(BLOCK_S * 32, BLOCK_C)


@triton.jit
def load_rows(x, stride, column: tl.constexpr, columns, rows, exists, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The numbers of rows from FIRST to LAST - 1 one after the other, zero outside of the masks."""
    out = ()
    for i in tl.static_range(FIRST, LAST):
        pointers = x + i * stride
        for j in tl.static_range(len(columns)):
            out = out + (load_apart(pointers + j * column, columns[j] & rows[i] & exists, 0),)
    return out


@triton.jit
def load_parameters(taps, bias, c, exists, C: tl.constexpr):
    """Kernels (9, C) and bias (C,) of channels c."""
    kernels = ()
    for t in tl.static_range(9):
        kernels = kernels + (load_apart(taps + t * C + c, exists, 0.0),)
    return kernels + (load_apart(bias + c, exists, 0.0),)


@triton.jit
def load_weight(
    weight,
    first_d,
    first_c,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """The weight (D, C) from there on, (WIDTH, BLOCK_C)."""
    d = tl.arange(0, WIDTH)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    pointers = weight + tl.cast(first_d, tl.int64) * C + first_c + (d * C + c)
    if EVEN_D and EVEN_C:
        return tl.load(pointers)
    else:
        return tl.load(pointers, (first_d + d < D) & (first_c + c < C), 0.0)


@triton.jit
def columns_of(i, first_d, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Numbers (1, WIDTH) or (1, REST) of the columns of a program's tile i, of which the first has `first_d`."""
    return (first_d + tile_columns(i, WIDTH, REST))[None, :]


@triton.jit
def load_vector(vector, d, D: tl.constexpr):
    """Numbers d of a vector (D,)."""
    return tl.load(vector + d, d < D, 0.0).to(tl.float32)


@triton.jit
def add_streams(
    tiles,
    stream,
    branch,
    total,
    pixel,
    exists,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    """Tiles of whole rows, of pixels (.., 1), added to those of maps and rounded as in `total`, where they may go."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        d = columns_of(i, 0, WIDTH, REST)
        at, valid = pixel * D + d, exists & (d < D)
        out = tl.load(stream + at, valid, 0.0).to(tl.float32)
        if branch is not None:
            out += tl.load(branch + at, valid, 0.0).to(tl.float32)
        out = (out.reshape(tiles[i].shape) + tiles[i]).to(total.dtype.element_ty)
        if WITH_SUM:
            tl.store(total + at, out.reshape(at.shape), valid)
        sums = sums + (out.to(tl.float32),)
    return sums


@triton.jit
def normalize(tiles, weight, bias, eps, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Layer norm of tiles of whole rows, whose columns from D on are zero."""
    mean = mean_of_rows(tiles, D)
    centred = ()
    squares = ()
    for i in tl.static_range(len(tiles)):
        d = columns_of(i, 0, WIDTH, REST)
        centre = tl.where(d < D, tiles[i] - mean, 0.0)
        centred = centred + (centre,)
        squares = squares + (centre * centre,)
    inverse = tl.rsqrt(mean_of_rows(squares, D) + eps)
    out = ()
    for i in tl.static_range(len(tiles)):
        d = columns_of(i, 0, WIDTH, REST)
        out = out + (centred[i] * inverse * load_vector(weight, d, D) + load_vector(bias, d, D),)
    return out


@triton.jit
def finish(
    tiles,
    program,
    first_d,
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
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    """Tiles of the product of a program's strips with all that is added, and normalised if there is a stream, as y."""
    # Rows of the product by strip, row and column: of one number, the compiler would find the rows of the weight in it.
    strip = program * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None, None]
    line = strip // strips_of_row
    row_of_strip = tl.arange(0, PIXELS // COLUMNS)[None, :, None, None]
    row = line % segments * ROWS + row_of_strip
    column = strip % strips_of_row * COLUMNS + tl.arange(0, COLUMNS)[None, None, :, None]
    stored = (strip < strips) & (row_of_strip < ROWS) & (row < height) & (column < width)
    pixel = ((line // segments).to(tl.int64) * height + row) * width + column
    out = ()
    for i in tl.static_range(len(tiles)):
        out = out + (tiles[i] + load_vector(out_bias, columns_of(i, first_d, WIDTH, REST), D),)
    if stream is not None:
        out = add_streams(out, stream, branch, total, pixel, stored, D, WIDTH, REST, WITH_SUM)
        out = normalize(out, norm_weight, norm_bias, eps, D, WIDTH, REST)
    for i in tl.static_range(len(out)):
        d = columns_of(i, first_d, WIDTH, REST)
        at = pixel * D + d
        tl.store(y + at, out[i].to(y.dtype.element_ty).reshape(at.shape), stored & (d < D))


@kernel(do_not_specialize=["height", "width", "strips", "strips_of_row", "segments"])
def conv_gelu_linear_fwd_kernel(
    x,
    taps,
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
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    """WIDTH + REST columns of y for BLOCK_S strips of ROWS x COLUMNS pixels.

    x is of pairs of channels, as are its strides. EVEN: Strips divide the map, so that of a strip's rows and columns
    only those around it may be beside the map. AHEAD: Rows of the next channels that are loaded before the product.
    """
    program = last_first()
    strip = program * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    # Instead of one that does not exist the last one again, which is not stored.
    strip = tl.minimum(strip, strips - 1)
    line = strip // strips_of_row
    row = line % segments * ROWS
    column = (strip % strips_of_row * COLUMNS).to(tl.int64)
    x += (line // segments).to(tl.int64) * x_batch + (row - 1).to(tl.int64) * x_row + (column - 1) * x_column
    pair = tl.arange(0, BLOCK_C // 2)[None, :] + 0 * strip
    x += pair
    c = tl.arange(0, BLOCK_C)[None, :] + 0 * strip
    whole = tl.full((BLOCK_S, 1), True, tl.int1)
    columns = on_map(column, whole, width, COLUMNS, 1, EVEN)
    rows = ((row > 0),) + (repeat(whole, ROWS) if EVEN else on_rows(row, height, ROWS)) + ((row + ROWS < height),)

    dtype = weight.dtype.element_ty
    first_d = tl.program_id(1) * (WIDTH + REST)
    lead = tl.zeros((BLOCK_S * PIXELS, WIDTH), tl.float32)
    if REST > 0:
        rest = tl.zeros((BLOCK_S * PIXELS, REST), tl.float32)
    ahead = load_rows(x, x_row, x_column, columns, rows, whole, 0, AHEAD)
    if AHEAD > 0:
        parameters = load_parameters(taps, bias, c, whole, C)
    for first_c in tl.range(0, C, BLOCK_C, num_stages=1):
        exists = whole if EVEN_C else first_c + c < C
        if AHEAD == 0:
            parameters = load_parameters(taps, bias, first_c + c, exists, C)
        # Early, though needed last.
        block = load_weight(weight, first_d, first_c, WIDTH, BLOCK_C, C, D, EVEN_C, EVEN_D)
        kernels = ()
        for t in tl.static_range(9):
            kernels = kernels + (parameters[t].to(tl.float32),)
        start = parameters[9].to(tl.float32)
        # As in the depthwise convolution: of rows of the result whose window is at the row of the input.
        sums = repeat(start, 3 * COLUMNS)
        pixels = ()
        for i in tl.static_range(ROWS + 2):
            if i < AHEAD:
                loaded = ahead[i * (COLUMNS + 2) : (i + 1) * (COLUMNS + 2)]
            else:
                exists = whole if EVEN_C else first_c + 2 * pair < C
                loaded = load_rows(x + first_c // 2, x_row, x_column, columns, rows, exists, i, i + 1)
            current = ()
            for j in tl.static_range(COLUMNS + 2):
                current = current + (unpack(loaded[j], dtype),)
            sums = correlate(sums, current, kernels, 3, 3)
            if i >= 2:
                for j in tl.static_range(COLUMNS):
                    pixels = pixels + (gelu(sums[j]).to(dtype),)
            sums = sums[COLUMNS:] + repeat(start, COLUMNS)
        if AHEAD > 0:
            next_c = tl.minimum(first_c + BLOCK_C, C - BLOCK_C)
            ahead = load_rows(x + next_c // 2, x_row, x_column, columns, rows, whole, 0, AHEAD)
            parameters = load_parameters(taps, bias, next_c + c, whole, C)
        pixels = pixels + repeat(tl.zeros((BLOCK_S, BLOCK_C), dtype), PIXELS - ROWS * COLUMNS)
        hidden = pile(pixels, BLOCK_S, BLOCK_C)
        lead = dot_add(hidden, block.trans(), lead)
        if REST > 0:
            block = load_weight(weight, first_d + WIDTH, first_c, REST, BLOCK_C, C, D, EVEN_C, EVEN_D)
            rest = dot_add(hidden, block.trans(), rest)

    tiles = (lead,)
    if REST > 0:
        tiles = tiles + (rest,)
    finish(
        tiles,
        program,
        first_d,
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
        REST,
        BLOCK_S,
        WITH_SUM,
    )


def rows_of_strip(height: int) -> int:
    """Rows of a strip: the number that leaves fewer beside the map."""
    return min((8, 7), key=lambda rows: cdiv(height, rows) * rows)


def _rows_ahead(columns: int) -> int:
    return next((rows for most, rows in ROWS_AHEAD.items() if columns <= most), 0)


def _pairs(x: Tensor) -> Tensor:
    """A map (..., C) as pairs of channels (..., C / 2 rounded up), a copy unless all pixels start at whole pairs.

    So is a map whose rows lie too far apart for a kernel to count a strip's in 32 bits.
    """
    odd, strides = x.shape[-1] % 2, x.stride()
    even = not odd and all(stride % 2 == 0 for stride in strides[:-1]) and starts_at_pair(x)
    if strides[-1] != 1 or not even or strides[-3] >= FAR:
        x = (F.pad(x, (0, 1)) if odd else x).clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


def forward(
    x: Tensor,
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
    out = out_weight.shape[0]
    if stream is not None and out > WIDEST:
        y, _ = forward(x, weight, bias, out_weight, out_bias, None, None, None, None, eps, None, False)
        branch, second = (y, None) if branch is None else (branch, y)
        options = dict(second=second, with_sum=with_sum)
        return layer_norm.forward(stream, branch, norm_weight, norm_bias, None, 1, eps, dtype, **options)
    y, total = empty_results(x, out, stream, branch, dtype, with_sum)
    if y.numel() == 0:
        return y, total
    pairs, rows, widths = _pairs(x), rows_of_strip(height), lead_and_rest(min(out, WIDEST))
    segments, strips_of_row = cdiv(height, rows), cdiv(width, COLUMNS)
    strips = batch * segments * strips_of_row
    even, even_c = height % rows == 0 and width % COLUMNS == 0, channels % BLOCK_C == 0
    # Where a row has masks of its own, it would take long to compile.
    ahead = _rows_ahead(sum(widths)) if even and even_c else 0
    vectors = (stream, branch, norm_weight, norm_bias)
    conv_gelu_linear_fwd_kernel[(cdiv(strips, BLOCK_S), cdiv(out, sum(widths)))](
        pairs,
        # Neighbouring channels next to each other.
        weight.flatten(1).t().contiguous(),
        bias.contiguous(),
        out_weight.to(x.dtype).contiguous(),
        out_bias.contiguous(),
        *(None if t is None else t.contiguous() for t in vectors),
        total,
        y,
        height,
        width,
        strips,
        strips_of_row,
        segments,
        eps,
        pairs.stride(0),
        pairs.stride(1),
        pairs.stride(2),
        C=channels,
        D=out,
        ROWS=rows,
        COLUMNS=COLUMNS,
        PIXELS=PIXELS,
        EVEN=even,
        EVEN_C=even_c,
        EVEN_D=out % sum(widths) == 0,
        AHEAD=ahead,
        WIDTH=widths[0],
        REST=widths[1],
        BLOCK_S=BLOCK_S,
        BLOCK_C=BLOCK_C,
        WITH_SUM=with_sum,
        num_warps=4,
        **at_most(REGISTERS if ahead > 0 and sum(widths) <= FEW_COLUMNS else None),
    )
    return y, total
