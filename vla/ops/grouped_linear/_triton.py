"""The linear layer of each group: a program multiplies some pixels of one group with its matrices."""

import triton
import triton.language as tl
from torch import Tensor

from .._triton import as_rows, cdiv, kernel, next_power_of_2, product, product_precision
from . import _torch

# Numbers of pixels from which programs with more rows each still fill a GPU.
MANY = 2**12
# Programs that share the rows of a group, each of which loads its matrices once: with four groups two for each of an
# H100's multiprocessors.
PROGRAMS = 66


@triton.jit
def load_matrix(matrix, output, channel, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Transpose of a block of a group's matrix (OUT_WIDTH, WIDTH), (BLOCK_I, BLOCK_O)."""
    exists = (channel < WIDTH)[:, None] & (output < OUT_WIDTH)[None, :]
    return tl.load(matrix + output[None, :] * WIDTH + channel[:, None], exists, 0.0).to(DTYPE)


@kernel(do_not_specialize=["count"])
def grouped_linear_fwd_kernel(
    x,
    weight,
    weight2,
    out,
    count,
    x_row,
    out_row: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One group of some of the `count` rows, by each of the weights (GROUPS, OUT_WIDTH, WIDTH)."""
    group = tl.program_id(0) % GROUPS
    output = tl.arange(0, BLOCK_O)
    channel = tl.arange(0, BLOCK_I)
    dtype: tl.constexpr = x.dtype.element_ty
    x += group * WIDTH
    out += group * OUT_WIDTH
    matrix = group * OUT_WIDTH * WIDTH
    block = load_matrix(weight + matrix, output, channel, WIDTH, OUT_WIDTH, dtype)
    if weight2 is not None:
        block2 = load_matrix(weight2 + matrix, output, channel, WIDTH, OUT_WIDTH, dtype)
    step = tl.num_programs(0) // GROUPS
    for first in range(tl.program_id(0) // GROUPS, tl.cdiv(count, BLOCK_R), step):
        row = tl.cast(first, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        rows = tl.load(x + row * x_row + channel[None, :], (row < count) & (channel < WIDTH)[None, :], 0.0)
        pointers = out + row * out_row + output[None, :]
        inside = (row < count) & (output < OUT_WIDTH)[None, :]
        tl.store(pointers, product(rows, block, PRECISION).to(dtype), inside)
        if weight2 is not None:
            tl.store(pointers + GROUPS * OUT_WIDTH, product(rows, block2, PRECISION).to(dtype), inside)


def _is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether a group's matrix fits where the kernels have it: of 16 bits and up to 128 channels on both sides."""
    return x.dtype.itemsize == 2 and max(weight.shape[1:]) <= 128


def _constants(count: int, weight: Tensor, *maps: Tensor) -> dict[str, int | str]:
    """What all kernels are compiled for: sizes, rows and channels of a program, and its warps."""
    groups, out_width, width = weight.shape
    block_i, block_o = (max(16, next_power_of_2(n)) for n in (width, out_width))
    wide = max(block_i, block_o) == 128
    return dict(
        GROUPS=groups,
        WIDTH=width,
        OUT_WIDTH=out_width,
        BLOCK_R=64 if count >= MANY else 16,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
        PRECISION=product_precision(*maps),
        num_warps=8 if wide else 4,
        num_stages=1 if wide else 2,
    )


def forward(x: Tensor, weight: Tensor, weight2: Tensor | None) -> Tensor:
    if not _is_served(x, weight):
        return _torch.forward(x, weight, weight2)
    groups, out_width, _ = weight.shape
    out_row = groups * out_width * (1 if weight2 is None else 2)
    out = x.new_empty(*x.shape[:-1], out_row)
    if out.numel() == 0:
        return out
    rows = as_rows(x)
    count = rows.shape[0]
    constants = _constants(count, weight, rows)
    grouped_linear_fwd_kernel[(min(cdiv(count, constants["BLOCK_R"]), PROGRAMS) * groups,)](
        rows,
        weight.contiguous(),
        None if weight2 is None else weight2.contiguous(),
        out,
        count,
        rows.stride(0),
        out_row,
        **constants,
    )
    return out
