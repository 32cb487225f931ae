"""Convolutions of channels-last maps in 16 bits, by programs that walk down the map.

A program has BLOCK_P pixels that stand side by side, the result's columns of all maps counted through, and takes one
row after the other. Of a row of x it loads once what the pixels' windows have there, KW * C numbers that are neighbours
in memory, as rows of a matrix, and multiplies it with the taps' matrices for all rows of the result whose windows it is
part of. Their sums are handed on until they are complete: every number of x is loaded KW times instead of KH * KW.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._maps import channels_last
from ._triton import DTYPES, cdiv, dot_add, lead_and_rest, next_power_of_2, tile_columns

# Pixels and channels of a program, and processors of a GPU, which have two or three programs at once.
BLOCK_P = 64
CHANNELS = 64
PROCESSORS = 132
# Rows that a program could walk while it loads its weights.
START = 3
# Numbers that windows may have in a row, and sums of a pixel that a program may keep, its channels for several rows.
WIDEST = 128
MOST_SUMS = 256


@triton.jit
def load_taps(weight, d, D: tl.constexpr, KH: tl.constexpr, SIZE: tl.constexpr, LEAD: tl.constexpr, REST: tl.constexpr):
    """Of weights (KH, SIZE, D) the channels d (WIDTH,) as KH matrices (LEAD, WIDTH), and as many (REST, WIDTH)."""
    taps = ()
    for part in tl.static_range(2 if REST > 0 else 1):
        k = tile_columns(part, LEAD, REST)[:, None]
        for i in tl.static_range(KH):
            taps = taps + (tl.load(weight + (i * SIZE + k) * D + d[None, :], (k < SIZE) & (d < D)[None, :], 0.0),)
    return taps


@triton.jit
def place(
    program, columns, out_width, chunks, rows,
    STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Pictures and columns of a program's pixels, and which of them exist, (BLOCK_P,); the first of its rows; and the
    columns and the row where their windows begin."""
    column, first = program // chunks, program % chunks * rows
    column = column.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = column < columns
    image, column = column // out_width, (column % out_width).to(tl.int32)
    return image, column, exists, first, column * COLUMN_STRIDE - LEFT, first * STRIDE - TOP


@triton.jit
def find_windows(
    column,
    exists,
    width,
    x_column: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Where the numbers of windows that begin in `column` (BLOCK_P,) are, (1, LEAD), and which are inside the map.

    TOGETHER neighbouring pixels of a window are inside, or none of them.
    """
    offsets = ()
    masks = ()
    for part in tl.static_range(2 if REST > 0 else 1):
        k = tile_columns(part, LEAD, REST)[None, :]
        # A column left of the map is, without its sign, right of it.
        inside = (column[:, None] + k // (C * TOGETHER) * TOGETHER).to(tl.uint32) < width
        # The compiler sees neighbours in memory only where it is told so.
        offsets = offsets + ((k if x_column == C else k // C * x_column + k % C),)
        masks = masks + (inside & (k < SIZE) & exists[:, None],)
    return offsets, masks


@triton.jit
def load_rows(x, row, height, x_row, offsets, masks, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    """STRIDE rows of the windows, from `row` on, of which x are the first numbers (BLOCK_P, 1)."""
    patches = ()
    for j in tl.static_range(STRIDE):
        inside = (row + j).to(tl.uint32) < height
        for part in tl.static_range(len(offsets)):
            patch = tl.load(x + j * x_row + offsets[part], masks[part] & inside, 0)
            patches = patches + (patch.to(DTYPE, bitcast=patch.dtype == tl.int16),)
    return patches


@triton.jit
def no_sums(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr):
    """What `add_rows` takes with the first row."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((BLOCK_P, WIDTH), tl.int32),)
    return sums


@triton.jit
def add_rows(patches, taps, sums, KH: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr):
    """The sums (BLOCK_P, WIDTH) of the row of the result that STRIDE rows of x complete, and those of the others.

    `sums` are the bits of those, the oldest first. To hand a sum on, the compiler would move it to other registers
    before the product that makes it is known to be through, and for that have every product wait for the one before. So
    there is an operation behind the product, which it has to keep: with a zero that it does not know to be one.
    """
    zero = tl.program_id(1)
    parts: tl.constexpr = len(patches) // STRIDE
    done = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    following = ()
    for i in tl.static_range(len(sums) + 1):
        if i < len(sums):
            total = sums[i].to(tl.float32, bitcast=True)
        else:
            total = tl.zeros((BLOCK_P, WIDTH), tl.float32)
        for j in tl.static_range(STRIDE):
            if (len(sums) - i) * STRIDE + j < KH:
                for part in tl.static_range(parts):
                    tap = taps[part * KH + (len(sums) - i) * STRIDE + j]
                    total = dot_add(patches[j * parts + part], tap, total)
        if i == 0:
            done = total
        else:
            following = following + (total.to(tl.int32, bitcast=True) ^ zero,)
    return done, following


def suits(dtype: torch.dtype, weight: Tensor, stride: int) -> bool:
    """Whether weights (D, C, KH, KW), for such a stride down maps, are such that a program can keep what it walks with.

    dtype: That of the products.
    """
    out, channels, kh, kw = weight.shape
    sums = cdiv(kh, stride) * _width(out)
    return dtype in DTYPES and channels * kw <= WIDEST and sums <= MOST_SUMS


def _width(channels: int) -> int:
    return min(CHANNELS, max(16, next_power_of_2(channels)))


def windows(x: Tensor, bits: bool) -> Tensor:
    """Maps (B, C, H, W) as a kernel takes them, the channels of a pixel side by side.

    As integers, the numbers' `bits`: what is no load's direct result goes into a product from registers, which read it
    from shared memory once instead of for every product.
    """
    x = channels_last(x)
    return x.view(torch.int16) if bits else x


def matrices(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (D, C, KH, KW) as (KH, KW, C, D)."""
    out, channels, kh, kw = weight.shape
    return weight.new_empty(kh, kw, channels, out, dtype=dtype).copy_(weight.permute(2, 3, 1, 0))


@cache
def _chunks(height: int, strips: int, before: int, at_once: int) -> int:
    """Into how many parts, one below the other, maps are divided: those that take the fewest steps."""

    def steps(chunks: int) -> int:
        return cdiv(strips * chunks, at_once) * (cdiv(height, chunks) + before + START)

    # As many as there are for some number of rows: of others the last would have none.
    return min((cdiv(height, rows) for rows in range(height, 0, -1)), key=steps)


def launch(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[tuple[int], list[int], dict]:
    """Grid of a kernel for `windows` x, products of `dtype`, and a result of `size`, and arguments and constants.

    Programs are numbered by their pixels, rows and channels, the last first.
    """
    out, channels, kh, kw = weight.shape
    height, width = size
    columns, before = x.shape[0] * width, (kh - 1) // stride[0]
    strips, blocks = cdiv(columns, BLOCK_P), cdiv(out, _width(out))
    at_once = PROCESSORS * (3 if (before + 1) * _width(out) <= 96 else 2)
    chunks = _chunks(height, strips * blocks, before, at_once)
    rows = cdiv(height, chunks)
    numbers = [columns, *x.shape[2:], *size, chunks, rows, x.stride(0), x.stride(2), x.stride(3)]
    lead, rest = lead_and_rest(kw * channels)
    constants = dict(
        C=channels,
        D=out,
        KH=kh,
        SIZE=kw * channels,
        STRIDE=stride[0],
        COLUMN_STRIDE=stride[1],
        TOP=padding[0],
        LEFT=padding[1],
        LEAD=lead,
        REST=rest,
        TOGETHER=math.gcd(stride[1], padding[1], x.shape[3]),
        WIDTH=_width(out),
        BLOCK_P=BLOCK_P,
        DTYPE=DTYPES[dtype],
        num_warps=4,
        num_stages=3,
    )
    return (strips * chunks * blocks,), numbers, constants
