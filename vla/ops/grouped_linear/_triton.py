"""The linear layer of each group: a program multiplies some pixels of one group with its matrices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import as_rows, cdiv, next_power_of_2, product, product_precision

# Numbers of pixels from which programs with more rows each still fill a GPU.
MANY = 2**12
# Parts of the rows, each of which programs add up for the gradients of the weights; two for a multiprocessor of an
# H100 with four groups of channels and one weight.
PARTS = 66


@triton.jit(do_not_specialize=["count"])
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
    """BLOCK_R of the `count` rows and BLOCK_O outputs of a group, by each of the weights (GROUPS, OUT_WIDTH, WIDTH)."""
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    x += row * x_row + group * WIDTH
    matrix = group * OUT_WIDTH * WIDTH + output[None, :] * WIDTH
    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    if weight2 is not None:
        sums2 = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK_I):
        channel = first + tl.arange(0, BLOCK_I)
        rows = tl.load(x + channel[None, :], (row < count) & (channel < WIDTH)[None, :], 0.0)  # (BLOCK_R, BLOCK_I)
        exists = (channel < WIDTH)[:, None] & (output < OUT_WIDTH)[None, :]
        block = tl.load(weight + matrix + channel[:, None], exists, 0.0)  # (BLOCK_I, BLOCK_O)
        sums += product(rows, block.to(rows.dtype), PRECISION)
        if weight2 is not None:
            block = tl.load(weight2 + matrix + channel[:, None], exists, 0.0)
            sums2 += product(rows, block.to(rows.dtype), PRECISION)
    out += row * out_row + group * OUT_WIDTH + output[None, :]
    inside = (row < count) & (output < OUT_WIDTH)[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), inside)
    if weight2 is not None:
        tl.store(out + GROUPS * OUT_WIDTH, sums2.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["count"])
def grouped_linear_bwd_kernel(
    g,
    weight,
    weight2,
    gx,
    count,
    g_row,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of x for BLOCK_R of the `count` rows and BLOCK_I channels of a group."""
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    g += row * g_row + group * OUT_WIDTH
    matrix = group * OUT_WIDTH * WIDTH + channel
    sums = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for first in tl.static_range(0, OUT_WIDTH, BLOCK_O):
        output = first + tl.arange(0, BLOCK_O)
        inside = (row < count) & (output < OUT_WIDTH)[None, :]
        exists = (output < OUT_WIDTH)[:, None] & (channel < WIDTH)
        rows = tl.load(g + output[None, :], inside, 0.0)  # (BLOCK_R, BLOCK_O)
        block = tl.load(weight + matrix + output[:, None] * WIDTH, exists, 0.0)  # (BLOCK_O, BLOCK_I)
        sums += product(rows, block.to(rows.dtype), PRECISION)
        if weight2 is not None:
            rows = tl.load(g + GROUPS * OUT_WIDTH + output[None, :], inside, 0.0)
            block = tl.load(weight2 + matrix + output[:, None] * WIDTH, exists, 0.0)
            sums += product(rows, block.to(rows.dtype), PRECISION)
    gx += row * (GROUPS * WIDTH) + group * WIDTH + channel
    tl.store(gx, sums.to(gx.dtype.element_ty), (row < count) & (channel < WIDTH))


@triton.jit(do_not_specialize=["count", "rows_of_part"])
def grouped_linear_weight_kernel(
    g,
    x,
    parts,
    count,
    rows_of_part,
    g_row,
    x_row,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over a part of the rows for the gradient of one weight's block (BLOCK_O, BLOCK_I) of a group."""
    group = tl.program_id(0) % GROUPS
    part = tl.program_id(0) // GROUPS
    matrix = tl.program_id(1) % WEIGHTS * GROUPS + group
    block_o = tl.program_id(1) // WEIGHTS
    output = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    g += matrix * OUT_WIDTH + output
    x += group * WIDTH + channel
    begin = part.to(tl.int64) * rows_of_part
    end = tl.minimum(begin + rows_of_part, count)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)[:, None]
        g_rows = tl.load(g[None, :] + row * g_row, (row < end) & (output < OUT_WIDTH)[None, :], 0.0)
        x_rows = tl.load(x[None, :] + row * x_row, (row < end) & (channel < WIDTH)[None, :], 0.0)
        sums += product(tl.trans(g_rows), x_rows, PRECISION)
    parts += (part * WEIGHTS * GROUPS + matrix).to(tl.int64) * OUT_WIDTH * WIDTH
    exists = (output < OUT_WIDTH)[:, None] & (channel < WIDTH)[None, :]
    tl.store(parts + output[:, None] * WIDTH + channel[None, :], sums, exists)


def _constants(count: int, groups: int, out_width: int, width: int, precision: str) -> dict[str, int | str]:
    """What all kernels are compiled for: sizes, rows and channels of a program, and its warps."""
    limit = 128 if precision == "bf16" else 64
    block_i, block_o = (max(16, min(limit, next_power_of_2(n))) for n in (width, out_width))
    return dict(
        GROUPS=groups,
        WIDTH=width,
        OUT_WIDTH=out_width,
        PRECISION=precision,
        BLOCK_R=64 if count >= MANY else 16,
        BLOCK_I=block_i,
        BLOCK_O=block_o,
        num_warps=8 if max(block_i, block_o) == 128 else 4,
    )


def forward(x: Tensor, weight: Tensor, weight2: Tensor | None) -> Tensor:
    groups, out_width, width = weight.shape
    out_row = groups * out_width * (1 if weight2 is None else 2)
    out = x.new_empty(*x.shape[:-1], out_row)
    if out.numel() == 0:
        return out
    rows = as_rows(x)
    count = rows.shape[0]
    constants = _constants(count, *weight.shape, product_precision(rows))
    grouped_linear_fwd_kernel[(cdiv(count, constants["BLOCK_R"]) * groups, cdiv(out_width, constants["BLOCK_O"]))](
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


def backward(grads: list[Tensor], x: Tensor, weight: Tensor, weight2: Tensor | None) -> list[Tensor | None]:
    if grads[0].numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, weight, weight2)]
    groups, out_width, width = weight.shape
    g, rows = as_rows(grads[0]), as_rows(x)
    count = rows.shape[0]
    gx = x.new_empty(x.shape)
    constants = _constants(count, *weight.shape, product_precision(g, rows))
    block_r, block_i, block_o = (constants[f"BLOCK_{axis}"] for axis in "RIO")
    grouped_linear_bwd_kernel[(cdiv(count, block_r) * groups, cdiv(width, block_i))](
        g,
        weight.contiguous(),
        None if weight2 is None else weight2.contiguous(),
        gx,
        count,
        g.stride(0),
        **constants,
    )
    weights = 1 if weight2 is None else 2
    rows_of_part = max(cdiv(count, PARTS), 4 * block_r)
    parts = x.new_empty(cdiv(count, rows_of_part), weights, *weight.shape, dtype=torch.float32)
    grid = (len(parts) * groups, weights * cdiv(out_width, block_o), cdiv(width, block_i))
    grouped_linear_weight_kernel[grid](
        g, rows, parts, count, rows_of_part, g.stride(0), rows.stride(0), WEIGHTS=weights, **constants
    )
    sums = parts.sum(0)
    return [gx, *(sums[i].to(weight.dtype) if i < weights else None for i in range(2))]
