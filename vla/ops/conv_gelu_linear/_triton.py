"""Depthwise convolution in strips that are walked down in registers, whose pixels are then rows of a product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, gelu, kernel, next_power_of_2, repeat
from ..depthwise_conv2d._triton import correlate, on_map

COLUMNS = 4
# Pixels of a strip, of which a power of two can be rows of a product.
PIXELS = 32
# Columns of the result that a program has registers for.
WIDEST = 256


@triton.jit
def widen(x):
    """A tensor of 16 bits in float32.

    A bfloat16 number is the upper half of that; told so, the compiler takes one instruction for each of two neighbours.
    """
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


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
def pile(tensors, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """32 tensors (BLOCK_S, BLOCK_C) as one, (BLOCK_S * 32, BLOCK_C), of which every thread keeps what it has."""
    for _ in tl.static_range(5):
        tensors = join_halves(tensors)
    return tensors[0].permute(0, 2, 3, 4, 5, 6, 1).reshape(BLOCK_S * 32, BLOCK_C)


@triton.jit
def add_product(
    total,
    rows,
    weight,
    first_d,
    first_c,
    D: tl.constexpr,
    C: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`total` (M, N) and what rows (M, K), channels from `first_c` on, add to columns of y from `first_d` on."""
    d = first_d + tl.arange(0, total.shape[1])[:, None]
    c = first_c + tl.arange(0, rows.shape[1])[None, :]
    pointers = weight + d.to(tl.int64) * C + c
    if EVEN_D and EVEN_C:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, (d < D) & (c < C), 0.0)
    return tl.dot(rows.to(DTYPE), block.to(DTYPE).trans(), total)


@triton.jit
def store_columns(y, bias, total, pixel, exists, first_d, D: tl.constexpr):
    """Stores columns from `first_d` on of pixels (M, 1) of y."""
    d = first_d + tl.arange(0, total.shape[1])[None, :]
    out = total + tl.load(bias + d, d < D, 0.0).to(tl.float32)
    tl.store(y + pixel * D + d, out.to(y.dtype.element_ty), exists & (d < D))


@kernel(do_not_specialize=["height", "width", "strips"])
def conv_gelu_linear_fwd_kernel(
    x,
    taps,
    bias,
    out_weight,
    out_bias,
    y,
    height,
    width,
    strips,
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
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """WIDTH + REST columns of y for BLOCK_S strips of ROWS x COLUMNS pixels.

    EVEN: Strips divide the map, so that of a strip's rows and columns only those around it may be beside the map.
    """
    strip = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    # Instead of one that does not exist the last one again, which is not stored.
    strip = tl.minimum(strip, strips - 1)
    strips_of_row, segments = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    line = strip // strips_of_row
    row = line % segments * ROWS
    column = (strip % strips_of_row * COLUMNS).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :] + 0 * strip
    x += (line // segments).to(tl.int64) * x_batch + (row - 1).to(tl.int64) * x_row + (column - 1) * x_column + c
    always = tl.full((BLOCK_S, 1), True, tl.int1)
    masks = on_map(column, always, width, COLUMNS, 1, EVEN)
    between = repeat(always, ROWS) if EVEN else on_rows(row, height, ROWS)
    lines = ((row > 0),) + between + ((row + ROWS < height),)

    first_d = tl.program_id(1) * (WIDTH + REST)
    total = tl.zeros((BLOCK_S * PIXELS, WIDTH), tl.float32)
    if REST > 0:
        rest = tl.zeros((BLOCK_S * PIXELS, REST), tl.float32)
    for first_c in tl.range(0, C, BLOCK_C, num_stages=1):
        exists = always if EVEN_C else first_c + c < C
        start = tl.load(bias + first_c + c, exists, 0.0).to(tl.float32)  # (BLOCK_S, BLOCK_C)
        kernels = ()
        for t in tl.static_range(9):
            kernels = kernels + (tl.load(taps + t * C + first_c + c, exists, 0.0).to(tl.float32),)
        # As in the depthwise convolution: of rows of the result whose window is at the row of the input.
        sums = repeat(start, 3 * COLUMNS)
        pixels = ()
        for i in tl.static_range(ROWS + 2):
            pointers = x + first_c + i * x_row
            current = ()
            for j in tl.static_range(COLUMNS + 2):
                value = tl.load(pointers + j * x_column, masks[j] & lines[i] & exists, 0.0)
                current = current + (widen(value),)
            sums = correlate(sums, current, kernels, 3, 3)
            if i >= 2:
                for j in tl.static_range(COLUMNS):
                    pixels = pixels + (gelu(sums[j]).to(y.dtype.element_ty),)
            sums = sums[COLUMNS:] + repeat(start, COLUMNS)
        pixels = pixels + repeat(tl.zeros((BLOCK_S, BLOCK_C), y.dtype.element_ty), PIXELS - ROWS * COLUMNS)
        hidden = pile(pixels, BLOCK_S, BLOCK_C)
        total = add_product(total, hidden, out_weight, first_d, first_c, D, C, EVEN_D, EVEN_C, DTYPE)
        if REST > 0:
            rest = add_product(rest, hidden, out_weight, first_d + WIDTH, first_c, D, C, EVEN_D, EVEN_C, DTYPE)

    m = tl.arange(0, BLOCK_S * PIXELS)[:, None]
    strip = tl.program_id(0) * BLOCK_S + m // PIXELS
    line = strip // strips_of_row
    row = line % segments * ROWS + m % PIXELS // COLUMNS
    column = strip % strips_of_row * COLUMNS + m % COLUMNS
    stored = (strip < strips) & (m % PIXELS < ROWS * COLUMNS) & (row < height) & (column < width)
    pixel = ((line // segments).to(tl.int64) * height + row) * width + column
    store_columns(y, out_bias, total, pixel, stored, first_d, D)
    if REST > 0:
        store_columns(y, out_bias, rest, pixel, stored, first_d + WIDTH, D)


def _rows(height: int) -> int:
    """Rows of a strip: the number that leaves fewer beside the map."""
    return min((8, 7), key=lambda rows: cdiv(height, rows) * rows)


def _widths(out: int) -> tuple[int, int]:
    """Powers of two whose sum is the number of columns of the result that a program has; the second may be 0."""
    width = min(next_power_of_2(out + 1) // 2, WIDEST // 2)
    rest = min(out, WIDEST) - width
    return max(16, width), 0 if rest <= 0 else max(16, next_power_of_2(rest))


def forward(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    out = out_weight.shape[0]
    y = x.new_empty(batch, height, width, out)
    if y.numel() == 0:
        return y
    x = x if x.stride(3) == 1 else x.contiguous()
    rows, widths = _rows(height), _widths(out)
    strips = batch * cdiv(height, rows) * cdiv(width, COLUMNS)
    block_s, block_c = 4, 64
    interpreted = x.device.type == "cpu"
    conv_gelu_linear_fwd_kernel[(cdiv(strips, block_s), cdiv(out, sum(widths)))](
        x,
        # Neighbouring channels next to each other.
        weight.flatten(1).t().contiguous(),
        bias.contiguous(),
        out_weight.to(x.dtype).contiguous(),
        out_bias.contiguous(),
        y,
        height,
        width,
        strips,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        C=channels,
        D=out,
        ROWS=rows,
        COLUMNS=COLUMNS,
        PIXELS=PIXELS,
        EVEN=height % rows == 0 and width % COLUMNS == 0,
        EVEN_C=channels % block_c == 0,
        EVEN_D=out % sum(widths) == 0,
        # Triton's interpreter cannot multiply bfloat16.
        DTYPE=tl.float32 if interpreted else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype],
        WIDTH=widths[0],
        REST=widths[1],
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return y
