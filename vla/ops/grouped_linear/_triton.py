"""The linear layer of each group: a program multiplies some pixels of one group with its matrices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    as_rows,
    cdiv,
    kernel,
    next_power_of_2,
    product,
    product_precision,
    sum_parts,
)
from . import TOGETHER, _torch

# Numbers of pixels from which programs with more rows each still fill a GPU.
MANY = 2**12
# Programs that share the rows of all groups, each of which loads its matrices once: three for each of an H100's
# multiprocessors.
PROGRAMS = 396


@triton.jit
def load_block(matrix, output, channel, OUT_WIDTH: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, dtype):
    """Entries of the block-diagonal matrix (GROUPS * OUT_WIDTH, GROUPS * WIDTH) of some groups' matrices."""
    group = channel // WIDTH
    exists = (output // OUT_WIDTH == group) & (group < GROUPS)
    return tl.load(matrix + output * WIDTH + channel % WIDTH, exists, 0.0).to(dtype)


@kernel(do_not_specialize=["count"])
def grouped_linear_fwd_kernel(
    x,
    weight,
    weight2,
    out,
    out2,
    sums,
    count,
    x_row,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One of BLOCKS times GROUPS groups of some of a picture's `count` rows, by each weight (K, OUT_WIDTH, WIDTH).

    `sums` over a program's rows of every picture are (programs, pictures, channels).
    """
    first_group = tl.program_id(0) % BLOCKS * GROUPS
    picture = tl.program_id(1).to(tl.int64)
    output = tl.arange(0, BLOCK_O)[None, :]
    channel = tl.arange(0, BLOCK_I)[None, :]
    factor = tl.arange(0, BLOCK_I)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    OUT_ROW: tl.constexpr = BLOCKS * GROUPS * OUT_WIDTH
    x += first_group * WIDTH + channel
    start = first_group * OUT_WIDTH
    weight += start * WIDTH
    block = load_block(weight, output, factor, OUT_WIDTH, WIDTH, GROUPS, dtype)  # (BLOCK_I, BLOCK_O)
    if weight2 is not None:
        weight2 += start * WIDTH
        block2 = load_block(weight2, output, factor, OUT_WIDTH, WIDTH, GROUPS, dtype)
    if sums is not None:
        total = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    program = tl.program_id(0) // BLOCKS
    for tile in range(program, tl.cdiv(count, BLOCK_R), tl.num_programs(0) // BLOCKS):
        index = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = picture * count + index
        rows = tl.load(x + row * x_row, (index < count) & (channel < GROUPS * WIDTH), 0.0)  # (BLOCK_R, BLOCK_I)
        place = row * OUT_ROW + start + output
        inside = (index < count) & (output < GROUPS * OUT_WIDTH)
        tl.store(out + place, product(rows, block, PRECISION).to(dtype), inside)
        if weight2 is not None:
            tl.store(out2 + place, product(rows, block2, PRECISION).to(dtype), inside)
        if sums is not None:
            total += rows.to(tl.float32)
    if sums is not None:
        column = tl.arange(0, BLOCK_I)
        sums += (program * tl.num_programs(1) + picture) * (BLOCKS * GROUPS * WIDTH) + first_group * WIDTH
        tl.store(sums + column, tl.sum(total, 0), column < GROUPS * WIDTH)


@kernel(do_not_specialize=["count"])
def grouped_linear_bwd_kernel(
    g,
    g2,
    x,
    weight,
    weight2,
    gx,
    parts,
    count,
    g_row,
    g2_row,
    x_row,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of x and of the weights for the rows and groups of `grouped_linear_fwd_kernel`.

    `parts` of a program are sums over its rows: of the gradients of the weights, (K, OUT_WIDTH, WIDTH) each.
    """
    first_group = tl.program_id(0) % BLOCKS * GROUPS
    output = tl.arange(0, BLOCK_O)[None, :]
    result = tl.arange(0, BLOCK_O)[:, None]
    channel = tl.arange(0, BLOCK_I)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    ROW: tl.constexpr = BLOCKS * GROUPS * WIDTH
    SIZE: tl.constexpr = ROW * OUT_WIDTH
    start = first_group * OUT_WIDTH * WIDTH
    g += first_group * OUT_WIDTH + output
    x += first_group * WIDTH + channel
    gx += first_group * WIDTH + channel
    block = load_block(weight + start, result, channel, OUT_WIDTH, WIDTH, GROUPS, dtype)  # (BLOCK_O, BLOCK_I)
    g_block = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if weight2 is not None:
        g2 += first_group * OUT_WIDTH + output
        block2 = load_block(weight2 + start, result, channel, OUT_WIDTH, WIDTH, GROUPS, dtype)
        g_block2 = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    program = tl.program_id(0) // BLOCKS
    for tile in range(program, tl.cdiv(count, BLOCK_R), tl.num_programs(0) // BLOCKS):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < count) & (channel < GROUPS * WIDTH)
        out_inside = (row < count) & (output < GROUPS * OUT_WIDTH)
        rows = tl.load(x + row * x_row, inside, 0.0)  # (BLOCK_R, BLOCK_I)
        g_rows = tl.load(g + row * g_row, out_inside, 0.0)  # (BLOCK_R, BLOCK_O)
        g_block += product(tl.trans(g_rows), rows, PRECISION)
        g_x = product(g_rows, block, PRECISION)
        if weight2 is not None:
            g_rows = tl.load(g2 + row * g2_row, out_inside, 0.0)
            g_block2 += product(tl.trans(g_rows), rows, PRECISION)
            g_x += product(g_rows, block2, PRECISION)
        tl.store(gx + row * ROW, g_x.to(dtype), inside)

    inside = (result // OUT_WIDTH == channel // WIDTH) & (channel < GROUPS * WIDTH)
    place = program * (SIZE if weight2 is None else 2 * SIZE) + start + result * WIDTH + channel % WIDTH
    tl.store(parts + place, g_block, inside)
    if weight2 is not None:
        tl.store(parts + SIZE + place, g_block2, inside)


def _is_served(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether the groups' matrices fit where the kernels have them: of 16 bits, and up to `most` channels a side."""
    return x.dtype.itemsize == 2 and max(weight.shape[1:]) <= most


def _constants(count: int, weight: Tensor, *maps: Tensor) -> dict[str, int | str]:
    """What all kernels are compiled for: sizes, rows and channels of a program, and its warps."""
    groups, out_width, width = weight.shape
    widest = max(width, out_width)
    together = max(k for k in range(1, groups + 1) if groups % k == 0 and (k == 1 or k * widest <= TOGETHER))
    block_i, block_o = (max(16, next_power_of_2(together * n)) for n in (width, out_width))
    wide = max(block_i, block_o) == 128
    return dict(
        BLOCKS=groups // together,
        GROUPS=together,
        WIDTH=width,
        OUT_WIDTH=out_width,
        BLOCK_R=64 if count >= MANY else 16,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
        PRECISION=product_precision(*maps),
        num_warps=8 if wide else 4,
        num_stages=1 if wide else 3,
    )


def _programs(count: int, constants: dict[str, int | str]) -> int:
    """How many programs share the rows of each block of groups."""
    return min(cdiv(count, constants["BLOCK_R"]), cdiv(PROGRAMS, constants["BLOCKS"]))


def _programs_of_picture(blocks: int, tiles: int) -> int:
    """How many programs share the tiles of a block of groups of a picture: the fewest that are done first."""
    most = min(tiles, max(8, PROGRAMS // blocks))
    return min(range(1, most + 1), key=lambda n: cdiv(n * blocks, PROGRAMS) * cdiv(tiles, n))


def forward(
    x: Tensor, weight: Tensor, weight2: Tensor | None, with_mean: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    pictures, *size, channels = x.shape
    if not _is_served(x, weight, 128) or x.numel() == 0 or weight.numel() == 0:
        return _torch.forward(x, weight, weight2, with_mean)
    out = x.new_empty(pictures, *size, weight.shape[0] * weight.shape[1])
    out2, mean = x.new_empty(0 if weight2 is None else out.shape), x.new_empty(0)
    rows = as_rows(x)
    constants = _constants(len(rows), weight, x)
    sums, count = None, len(rows)
    if with_mean:
        count //= pictures
        tiles = cdiv(count, constants["BLOCK_R"])
        programs = _programs_of_picture(pictures * constants["BLOCKS"], tiles)
        sums = x.new_empty(programs, pictures * channels, dtype=torch.float32)
    else:
        pictures, programs = 1, _programs(count, constants)
    grouped_linear_fwd_kernel[(programs * constants["BLOCKS"], pictures)](
        rows,
        weight.contiguous(),
        None if weight2 is None else weight2.contiguous(),
        out,
        out2,
        sums,
        count,
        rows.stride(0),
        **constants,
    )
    if with_mean:
        mean = sum_parts(sums, 1 / count, x.dtype).view(pictures, channels)
    return out, out2, mean


def backward(
    grads: list[Tensor], x: Tensor, weight: Tensor, weight2: Tensor | None, with_mean: bool = False
) -> list[Tensor | None] | None:
    if with_mean or not _is_served(x, weight, TOGETHER) or grads[0].numel() == 0:
        return None
    two, shape = weight2 is not None, x.shape
    g, x = as_rows(grads[0]), as_rows(x)
    g2 = as_rows(grads[1]) if two else g
    count = x.shape[0]
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    constants = _constants(count, weight, g, g2, x)
    programs = _programs(count, constants)
    parts = x.new_empty(programs, weight.numel() * (2 if two else 1), dtype=torch.float32)
    grouped_linear_bwd_kernel[(programs * constants["BLOCKS"],)](
        g,
        g2,
        x,
        weight.contiguous(),
        weight2.contiguous() if two else None,
        gx,
        parts,
        count,
        *(t.stride(0) for t in (g, g2, x)),
        **constants,
    )
    g_weights = sum_parts(parts).view(-1, *weight.shape)
    return [gx.view(shape), g_weights[0], g_weights[1] if two else None]
