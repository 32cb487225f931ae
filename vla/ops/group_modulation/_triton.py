"""The end of GroupMamba's mixer: a program takes some pixels from the scan's output to the mixer's.

Rows of channels are tiles (BLOCK_R, WIDTH), whose entries beyond the channels are zero. Where the rows of all channels
don't fit in registers, one kernel takes each group to its modulated projection, and another the whole from there; where
there are many rows besides, every step has a kernel of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import as_rows, cdiv, kernel, next_power_of_2, product, product_precision, sigmoid, sum_parts
from ..grouped_linear import _triton as grouped_linear
from ..layer_norm import _triton as layer_norm
from ..modulated_layer_norm import _triton as modulated_layer_norm
from . import WHOLE, _torch, empty_results

# Numbers of pixels from which programs with more rows each still fill a GPU.
MANY = 2**12
# Numbers of 16 bits in rows that a library's products like.
ALIGNED = 8
# An H100's multiprocessors. As many programs, or a few times as many, share rows, and load their matrices once.
PROGRAMS = 132


@triton.jit
def normalize(rows, eps, inside, SIZE: tl.constexpr):
    """The SIZE channels inside normalised, the others as they are."""
    mean = tl.sum(tl.where(inside, rows, 0.0), 1)[:, None] / SIZE
    centred = tl.where(inside, rows - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / SIZE
    return tl.where(inside, centred * tl.rsqrt(variance + eps), rows)


@triton.jit
def group_means(rows, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Means over each of GROUPS groups of columns, of which SIZE in a group count and the others are zero."""
    BLOCK_R: tl.constexpr = rows.shape[0]
    return tl.sum(tl.reshape(rows, (BLOCK_R, GROUPS, rows.shape[1] // GROUPS)), 2) / SIZE  # (BLOCK_R, GROUPS)


@triton.jit
def to_columns(values, WIDTH: tl.constexpr):
    """A value for each group in the place of each of its columns, (BLOCK_R, WIDTH)."""
    BLOCK_R: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    values = tl.broadcast_to(values[:, :, None], (BLOCK_R, GROUPS, WIDTH // GROUPS))
    return tl.reshape(values, (BLOCK_R, WIDTH))


@triton.jit
def normalize_groups(rows, exists, eps, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Groups of columns normalised, and one over their deviations, (BLOCK_R, GROUPS)."""
    rows = tl.where(exists, rows - to_columns(group_means(rows, GROUPS, SIZE), rows.shape[1]), 0.0)
    deviation = tl.rsqrt(group_means(rows * rows, GROUPS, SIZE) + eps)
    return rows * to_columns(deviation, rows.shape[1]), deviation


@triton.jit
def load_groups(weight, channel, lane, within, SIZE: tl.constexpr, dtype: tl.constexpr):
    """Blocks on the diagonal of a matrix (WIDTH, WIDTH), transposed."""
    return tl.load(weight + channel * SIZE + lane[:, None], within, 0.0).to(dtype)


@triton.jit
def load_whole(weight, channel, exists, CHANNELS: tl.constexpr, dtype: tl.constexpr):
    """A matrix (WIDTH, WIDTH), transposed."""
    return tl.load(weight + channel * CHANNELS + channel[:, None], exists & exists[:, None], 0.0).to(dtype)


@kernel(do_not_specialize=["count", "pixels"])
def group_modulation_fwd_kernel(
    y,
    z,
    n,
    gate,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    norm_weight,
    norm_bias,
    proj,
    proj_bias,
    out,
    stream,
    stream_norm_weight,
    stream_norm_bias,
    norm,
    count,
    pixels,
    y_row,
    z_row,
    n_row,
    out_eps,
    eps,
    stream_eps,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every so many tiles of BLOCK_R of the `count` rows of y, z, n and out; `pixels` rows share a row of gate.

    With a stream, `norm` receives the norm of its sum with out.

    A tile's columns are GROUPS groups, of which SIZE channels each exist. Both matrices are KEPT, or loaded for each
    tile.
    """
    column = tl.arange(0, WIDTH)
    group, lane = column // (WIDTH // GROUPS), column % (WIDTH // GROUPS)
    channel = group * SIZE + lane
    exists = (lane < SIZE) & (channel < CHANNELS)
    within = exists & exists[:, None] & (group == group[:, None])
    dtype: tl.constexpr = y.dtype.element_ty
    if KEPT:
        block = load_groups(out_proj, channel, lane, within, SIZE, dtype)
        matrix = load_whole(proj, channel, exists, CHANNELS, dtype)
    tiles = tl.cdiv(count, BLOCK_R)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # The last rows first, which are in the cache still, see `last_first`.
        row = tl.cast(tiles - 1 - tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < count) & exists
        rows = tl.load(y + row * y_row + channel, inside, 0.0)  # (BLOCK_R, WIDTH)
        gates = tl.load(z + row * z_row + channel, inside, 0.0)
        factors = tl.load(n + row * n_row + channel, inside, 0.0)
        rows, gates, factors = rows.to(tl.float32), gates.to(tl.float32), factors.to(tl.float32)
        rows, _ = normalize_groups(rows, exists, out_eps, GROUPS, SIZE)
        rows *= tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
        rows += tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
        rows *= gates * sigmoid(gates)
        if not KEPT:
            block = load_groups(out_proj, channel, lane, within, SIZE, dtype)
        rows = product(rows.to(dtype), block, PRECISION)

        rows *= factors
        rows *= tl.load(gate + row // pixels * CHANNELS + channel, inside, 0.0).to(tl.float32)
        rows = normalize(rows, eps, exists, CHANNELS)
        rows *= tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)
        rows += tl.load(norm_bias + channel, exists, 0.0).to(tl.float32)
        if not KEPT:
            matrix = load_whole(proj, channel, exists, CHANNELS, dtype)
        rows = product(rows.to(dtype), matrix, PRECISION)
        rows += tl.load(proj_bias + channel, exists, 0.0).to(tl.float32)
        rows = rows.to(out.dtype.element_ty)
        at = row * CHANNELS + channel
        tl.store(out + at, rows, inside)
        if stream is not None:
            rows = rows.to(tl.float32) + tl.load(stream + at, inside, 0.0).to(tl.float32)
            rows = normalize(rows, stream_eps, exists, CHANNELS)
            rows *= tl.load(stream_norm_weight + channel, exists, 0.0).to(tl.float32)
            rows += tl.load(stream_norm_bias + channel, exists, 0.0).to(tl.float32)
            tl.store(norm + at, rows.to(norm.dtype.element_ty), inside)


@kernel(do_not_specialize=["pixels"])
def group_modulation_bwd_kernel(
    g,
    y,
    z,
    n,
    gate,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    norm_weight,
    proj,
    g_a,
    gn,
    g_gate,
    parts,
    pixels,
    g_row,
    y_row,
    z_row,
    n_row,
    out_eps,
    eps,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of out_proj's result and of n for some pixels of one picture, and their sums for gate and parameters.

    A tile's columns are GROUPS groups, of which SIZE channels each exist. Where the second norm leaves x and the
    result's gradient is g, `parts` of a program are sums over its pixels: of g x^T, (C, C), and of g, (C,).
    """
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    group, lane = column // (WIDTH // GROUPS), column % (WIDTH // GROUPS)
    channel = group * SIZE + lane
    exists = (lane < SIZE) & (channel < CHANNELS)
    within = exists & exists[:, None] & (group == group[:, None])
    dtype: tl.constexpr = y.dtype.element_ty
    # Blocks on the diagonal of a matrix (WIDTH, WIDTH), transposed.
    block = tl.load(out_proj + channel * SIZE + lane[:, None], within, 0.0).to(dtype)
    # With the norm's scale, by which the product would be multiplied.
    matrix = tl.load(proj + channel[:, None] * CHANNELS + channel, exists & exists[:, None], 0.0).to(tl.float32)
    matrix = (matrix * tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)).to(dtype)
    gate += image * CHANNELS

    g_proj = tl.zeros((WIDTH, WIDTH), tl.float32)
    g_factors = tl.zeros((WIDTH,), tl.float32)
    g_sum = tl.zeros((WIDTH,), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(pixels, BLOCK_R), tl.num_programs(1)):
        pixel = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = image * pixels + pixel
        inside = (pixel < pixels) & exists
        y_rows = tl.load(y + row * y_row + channel, inside, 0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
        z_rows = tl.load(z + row * z_row + channel, inside, 0.0).to(tl.float32)
        n_rows = tl.load(n + row * n_row + channel, inside, 0.0)
        grad = tl.load(g + row * g_row + channel, inside, 0.0).to(dtype)
        normal, _ = normalize_groups(y_rows, exists, out_eps, GROUPS, SIZE)
        # What is the same for all tiles is loaded for each, as there are no registers to keep it in.
        gated = normal * tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
        gated += tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
        gated *= z_rows * sigmoid(z_rows)
        a = product(gated.to(dtype), block, PRECISION)
        n_rows = n_rows.to(tl.float32)
        factors = tl.load(gate + channel, exists, 0.0).to(tl.float32)
        rows = a * n_rows * factors
        rows = tl.where(exists, rows - tl.sum(rows, 1)[:, None] / CHANNELS, 0.0)
        deviation = tl.rsqrt(tl.sum(rows * rows, 1)[:, None] / CHANNELS + eps)
        rows *= deviation

        g_sum += tl.sum(grad.to(tl.float32), 0)
        g_proj += product(tl.trans(grad), rows.to(dtype), PRECISION)
        g_rows = product(grad, matrix, PRECISION)
        g_rows -= tl.sum(g_rows, 1)[:, None] / CHANNELS + rows * (tl.sum(g_rows * rows, 1)[:, None] / CHANNELS)
        g_rows *= deviation
        g_factors += tl.sum(g_rows * a * n_rows, 0)
        g_rows *= factors
        tl.store(gn + row * CHANNELS + channel, (g_rows * a).to(dtype), inside)
        tl.store(g_a + row * CHANNELS + channel, (g_rows * n_rows).to(dtype), inside)

    program = image * tl.num_programs(1) + tl.program_id(1)
    tl.store(g_gate + program * CHANNELS + channel, g_factors, exists)
    parts += program * (CHANNELS * (CHANNELS + 1))
    tl.store(parts + channel[:, None] * CHANNELS + channel, g_proj, exists & exists[:, None])
    tl.store(parts + CHANNELS * CHANNELS + channel, g_sum, exists)


@kernel(do_not_specialize=["count"])
def group_modulation_groups_bwd_kernel(
    g_a,
    y,
    z,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    gz,
    parts,
    count,
    y_row,
    z_row,
    eps,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of y, in the place of that of out_proj's result, and of z, for GROUPS groups of some of the rows.

    `parts` of a program are sums over its rows: of the gradients of the norm, (C,) each, and of out_proj, (K, I, I).
    """
    blocks: tl.constexpr = tl.cdiv(CHANNELS, GROUPS * SIZE)
    column = tl.arange(0, WIDTH)
    group, lane = column // (WIDTH // GROUPS), column % (WIDTH // GROUPS)
    channel = (tl.program_id(0) % blocks * GROUPS + group) * SIZE + lane
    exists = (lane < SIZE) & (channel < CHANNELS)
    within = exists & exists[:, None] & (group == group[:, None])
    dtype: tl.constexpr = y.dtype.element_ty
    one = tl.where(column == column[:, None], 1.0, 0.0).to(dtype)
    # Blocks on the diagonal of a matrix (WIDTH, WIDTH).
    block = tl.load(out_proj + channel[:, None] * SIZE + lane, within, 0.0).to(dtype)
    g_block = tl.zeros((WIDTH, WIDTH), tl.float32)
    g_scale = tl.zeros((WIDTH,), tl.float32)
    g_shift = tl.zeros((WIDTH,), tl.float32)
    program, programs = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    for tile in range(program, tl.cdiv(count, BLOCK_R), programs):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < count) & exists
        # By the identity matrix, or the compiler computes all that is needed before and after a product in two layouts.
        y_rows = product(tl.load(y + row * y_row + channel, inside, 0.0), one, PRECISION)  # (BLOCK_R, WIDTH)
        z_rows = product(tl.load(z + row * z_row + channel, inside, 0.0), one, PRECISION)
        pointers = g_a + row * CHANNELS + channel
        grad = tl.load(pointers, inside, 0.0)
        g_gated = product(grad, block, PRECISION)
        normal, deviation = normalize_groups(y_rows, exists, eps, GROUPS, SIZE)
        # What is the same for all tiles is loaded for each, as there are no registers to keep it in.
        scale = tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
        shifted = normal * scale + tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
        share = sigmoid(z_rows)
        g_z = g_gated * shifted * share * (1.0 + z_rows * (1.0 - share))
        tl.store(gz + row * CHANNELS + channel, g_z.to(dtype), inside)
        factors = z_rows * share
        g_block += product(tl.trans(grad), (shifted * factors).to(dtype), PRECISION)
        g_rows = g_gated * factors
        g_shift += tl.sum(g_rows, 0)
        g_scale += tl.sum(g_rows * normal, 0)
        g_rows *= scale
        mean = group_means(g_rows, GROUPS, SIZE)
        slope = group_means(g_rows * normal, GROUPS, SIZE)
        g_rows -= to_columns(mean, WIDTH) + normal * to_columns(slope, WIDTH)
        tl.store(pointers, (g_rows * to_columns(deviation, WIDTH)).to(dtype), inside)

    parts += program * (CHANNELS * (SIZE + 2))
    tl.store(parts + channel, g_scale, exists)
    tl.store(parts + CHANNELS + channel, g_shift, exists)
    tl.store(parts + 2 * CHANNELS + channel[:, None] * SIZE + lane, g_block, within)


@kernel(do_not_specialize=["count"])
def group_modulation_parameters_kernel(
    g_gates,
    g_gate,
    sums,
    norm_weight,
    norm_bias,
    proj,
    g_proj,
    g_norm_weight,
    g_norm_bias,
    count,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sum of the `count` partial gradients of one picture's gate; of all pixels, those of proj and the second norm.

    With x what the norm leaves, s and t its scale and shift, proj's gradient g (s x + t)^T and the norm's follow from
    the sums of g x^T and of g.
    """
    channel = tl.arange(0, WIDTH)
    exists = channel < CHANNELS
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float32)
    for part in range(count):
        total += tl.load(g_gates + (image * count + part) * CHANNELS + channel, exists, 0.0)
    tl.store(g_gate + image * CHANNELS + channel, total.to(g_gate.dtype.element_ty), exists)
    if tl.program_id(0) == 0:
        scale = tl.load(norm_weight + channel, exists, 0.0).to(tl.float32)
        shift = tl.load(norm_bias + channel, exists, 0.0).to(tl.float32)
        g_scale = tl.zeros((BLOCK_O, WIDTH), tl.float32)
        g_shift = tl.zeros((BLOCK_O, WIDTH), tl.float32)
        for first in range(0, CHANNELS, BLOCK_O):
            output = first + tl.arange(0, BLOCK_O)[:, None]
            place = output * CHANNELS + channel
            inside = (output < CHANNELS) & exists
            product = tl.load(sums + place, inside, 0.0)  # (BLOCK_O, WIDTH)
            g_sum = tl.load(sums + CHANNELS * CHANNELS + output, output < CHANNELS, 0.0)
            matrix = tl.load(proj + place, inside, 0.0).to(tl.float32)
            tl.store(g_proj + place, (product * scale + g_sum * shift).to(g_proj.dtype.element_ty), inside)
            g_scale += matrix * product
            g_shift += matrix * g_sum
        tl.store(g_norm_weight + channel, tl.sum(g_scale, 0).to(g_norm_weight.dtype.element_ty), exists)
        tl.store(g_norm_bias + channel, tl.sum(g_shift, 0).to(g_norm_bias.dtype.element_ty), exists)


@kernel(do_not_specialize=["count", "pixels"])
def group_modulation_groups_kernel(
    y,
    z,
    n,
    gate,
    out_norm_weight,
    out_norm_bias,
    out_proj,
    modulated,
    count,
    pixels,
    y_row,
    z_row,
    n_row,
    out_eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One group of some of the `count` rows up to the product with n and gate."""
    group = tl.program_id(0) % GROUPS
    lane = tl.arange(0, WIDTH)[None, :]
    factor = tl.arange(0, WIDTH)[:, None]
    channel = group * SIZE + lane
    exists = lane < SIZE
    dtype: tl.constexpr = y.dtype.element_ty
    block = tl.load(out_proj + channel * SIZE + factor, exists & (factor < SIZE), 0.0).to(dtype)  # (WIDTH, WIDTH)
    scale = tl.load(out_norm_weight + channel, exists, 0.0).to(tl.float32)
    shift = tl.load(out_norm_bias + channel, exists, 0.0).to(tl.float32)
    step = tl.num_programs(0) // GROUPS
    for first in range(tl.program_id(0) // GROUPS, tl.cdiv(count, BLOCK_R), step):
        row = tl.cast(first, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < count) & exists
        rows = tl.load(y + row * y_row + channel, inside, 0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
        rows = normalize(rows, out_eps, exists, SIZE) * scale + shift
        gates = tl.load(z + row * z_row + channel, inside, 0.0).to(tl.float32)
        rows *= gates * sigmoid(gates)
        rows = product(rows.to(dtype), block, PRECISION)
        rows *= tl.load(n + row * n_row + channel, inside, 0.0).to(tl.float32)
        rows *= tl.load(gate + row // pixels * (GROUPS * SIZE) + channel, inside, 0.0).to(tl.float32)
        tl.store(modulated + row * (GROUPS * SIZE) + channel, rows.to(dtype), inside)


@kernel(do_not_specialize=["count"])
def group_modulation_proj_kernel(
    modulated,
    norm_weight,
    norm_bias,
    proj,
    proj_bias,
    out,
    count,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Norm and projection of BLOCK_R rows, BLOCK_O channels of the result."""
    blocks_o = tl.cdiv(CHANNELS, BLOCK_O)
    row = (tl.program_id(0) // blocks_o).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    output = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    lane = tl.arange(0, BLOCK_C)
    modulated += row * CHANNELS
    exists = row < count

    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        total += tl.load(modulated + channel, exists & (channel < CHANNELS), 0.0).to(tl.float32)
    mean = tl.sum(total, 1)[:, None] / CHANNELS
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        rows = tl.load(modulated + channel, exists & (channel < CHANNELS), 0.0).to(tl.float32)
        centred = tl.where(channel < CHANNELS, rows - mean, 0.0)
        total += centred * centred
    scale = tl.rsqrt(tl.sum(total, 1)[:, None] / CHANNELS + eps)

    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + lane[None, :]
        inside = channel < CHANNELS
        rows = tl.load(modulated + channel, exists & inside, 0.0)
        dtype = rows.dtype
        rows = (rows.to(tl.float32) - mean) * scale
        rows = rows * tl.load(norm_weight + channel, inside, 0.0).to(tl.float32)
        rows += tl.load(norm_bias + channel, inside, 0.0).to(tl.float32)
        factor = first + lane[:, None]
        block = tl.load(proj + output * CHANNELS + factor, (output < CHANNELS) & (factor < CHANNELS), 0.0)
        sums += product(rows.to(dtype), block.to(dtype), PRECISION)  # (BLOCK_R, BLOCK_O)
    sums += tl.load(proj_bias + output, output < CHANNELS, 0.0).to(tl.float32)
    tl.store(out + row * CHANNELS + output, sums.to(out.dtype.element_ty), exists & (output < CHANNELS))


@kernel(do_not_specialize=["count"])
def group_modulation_product_kernel(
    normed,
    proj,
    proj_bias,
    out,
    count,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Projection of BLOCK_R rows, BLOCK_O channels of the result."""
    blocks_o = tl.cdiv(CHANNELS, BLOCK_O)
    row = (tl.program_id(0) // blocks_o).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    output = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    lane = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel, factor = first + lane[None, :], first + lane[:, None]
        rows = tl.load(normed + row * CHANNELS + channel, (row < count) & (channel < CHANNELS), 0.0)
        block = tl.load(proj + output * CHANNELS + factor, (output < CHANNELS) & (factor < CHANNELS), 0.0)
        sums += product(rows, block, PRECISION)  # (BLOCK_R, BLOCK_O)
    sums += tl.load(proj_bias + output, output < CHANNELS, 0.0).to(tl.float32)
    inside = (row < count) & (output < CHANNELS)
    tl.store(out + row * CHANNELS + output, sums.to(out.dtype.element_ty), inside)


def _columns(channels: int, size: int, groups: int) -> dict[str, int]:
    """How a program has its groups of `size` channels as columns, of whose numbers all are powers of two."""
    groups = next_power_of_2(groups)
    return dict(CHANNELS=channels, SIZE=size, GROUPS=groups, WIDTH=max(16, groups * next_power_of_2(size)))


def forward(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    stream: Tensor | None,
    stream_norm_weight: Tensor | None,
    stream_norm_bias: Tensor | None,
    out_eps: float,
    eps: float,
    stream_eps: float,
    dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    channels, (groups, size, _) = y.shape[3], out_proj.shape
    vectors = (out_norm_weight, out_norm_bias, out_proj, norm_weight, norm_bias, proj, proj_bias)
    if size > WHOLE or y.dtype.itemsize > 2:
        streams = (stream, stream_norm_weight, stream_norm_bias)
        return _torch.forward(y, z, n, gate, *vectors, *streams, out_eps, eps, stream_eps, dtype, norm_dtype)
    # Sums are float32 in the kernel.
    is_exact = stream is not None and torch.float64 in (stream.dtype, norm_dtype)
    if stream is not None and (channels > WHOLE or is_exact):
        nothing = (None, None, None)
        out, _ = forward(y, z, n, gate, *vectors, *nothing, out_eps, eps, 0.0, dtype, None)
        vectors = (stream_norm_weight, stream_norm_bias)
        norm, _ = layer_norm.forward(stream, out, *vectors, None, 1, stream_eps, norm_dtype, with_sum=False)
        return out, norm
    out, norm = empty_results(y, stream, dtype, norm_dtype)
    if out.numel() == 0:
        return out, norm
    count, pixels = y.numel() // channels, y.shape[1] * y.shape[2]
    gate, out_norm_weight, out_norm_bias = gate.contiguous(), out_norm_weight.contiguous(), out_norm_bias.contiguous()
    norm_weight, norm_bias, proj_bias = norm_weight.contiguous(), norm_bias.contiguous(), proj_bias.contiguous()
    if channels > WHOLE and count >= MANY:
        gated, _ = layer_norm.forward(y, None, out_norm_weight, out_norm_bias, z, groups, out_eps, y.dtype)
        a, *_ = grouped_linear.forward(gated, out_proj, None)
        _normalize_and_project(a, n, gate, norm_weight, norm_bias, proj, proj_bias, out, eps)
        return out, norm
    maps = [as_rows(x) for x in (y, z, n)]
    strides = [x.stride(0) for x in maps]
    precision = product_precision(y)
    first = (*maps, gate, out_norm_weight, out_norm_bias, out_proj.contiguous())
    # Many programs read the matrix, few its cast.
    proj = proj.contiguous() if count < MANY else proj.to(y.dtype)
    last = (norm_weight, norm_bias, proj, proj_bias, out)
    if channels <= WHOLE:
        block_r, columns = 64 if count >= MANY else 16, _columns(channels, size, groups)
        programs = (2 if columns["WIDTH"] > 64 else 3) * PROGRAMS
        streams = [None if t is None else t.contiguous() for t in (stream, stream_norm_weight, stream_norm_bias)]
        if stream is not None and columns["WIDTH"] > 64:
            # What 64 rows take besides would be spilled.
            block_r, programs = min(block_r, 32), 3 * PROGRAMS
        group_modulation_fwd_kernel[(min(cdiv(count, block_r), programs),)](
            *first,
            *last,
            *streams,
            norm,
            count,
            pixels,
            *strides,
            out_eps,
            eps,
            stream_eps,
            **columns,
            BLOCK_R=block_r,
            # Wide ones of TF32 are more than other GPUs' multiprocessors have memory for.
            KEPT=columns["WIDTH"] <= 64 or precision == "bf16",
            PRECISION=precision,
            num_warps=4,
            # Loads ahead would take the memory of a second program on a multiprocessor.
            num_stages=1,
        )
        return out, norm
    modulated = torch.empty_like(maps[0], memory_format=torch.contiguous_format)
    group_modulation_groups_kernel[(min(cdiv(count, 32), PROGRAMS) * groups,)](
        *first,
        modulated,
        count,
        pixels,
        *strides,
        out_eps,
        GROUPS=groups,
        SIZE=size,
        WIDTH=max(16, next_power_of_2(size)),
        BLOCK_R=32,
        PRECISION=precision,
        num_warps=8,
        num_stages=1,
    )
    group_modulation_proj_kernel[(cdiv(count, 32) * cdiv(channels, 32),)](
        modulated,
        *last,
        count,
        eps,
        CHANNELS=channels,
        BLOCK_R=32,
        BLOCK_C=64,
        BLOCK_O=32,
        PRECISION=precision,
        num_warps=4,
    )
    return out, norm


def _normalize_and_project(
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    """Writes `proj norm(a * n * gate) + proj_bias`."""
    channels = a.shape[3]
    count = a.numel() // channels
    normed = modulated_layer_norm.forward(a, n, gate, norm_weight, norm_bias, 0, eps, a.dtype)
    proj = proj.to(a.dtype)
    if channels % ALIGNED == 0 and out.dtype == a.dtype:
        torch.addmm(proj_bias.to(a.dtype), as_rows(normed), proj.T, out=as_rows(out))
        return
    group_modulation_product_kernel[(cdiv(count, 128) * cdiv(channels, 128),)](
        normed,
        proj.contiguous(),
        proj_bias,
        out,
        count,
        CHANNELS=channels,
        BLOCK_R=128,
        BLOCK_C=64,
        BLOCK_O=128,
        PRECISION=product_precision(a),
        num_warps=8,
    )


def backward(
    grads: list[Tensor],
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    stream: Tensor | None,
    stream_norm_weight: Tensor | None,
    stream_norm_bias: Tensor | None,
    out_eps: float,
    eps: float,
    stream_eps: float,
    dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
) -> list[Tensor | None] | None:
    batch, channels, pixels = y.shape[0], y.shape[3], y.shape[1] * y.shape[2]
    groups, size, _ = out_proj.shape
    columns = _columns(channels, size, groups)
    maps = (grads[0], y, z, n)
    # Factors of float16 are multiplied as TF32, which takes twice the memory, and those of 32 bits as several of it.
    most = WHOLE if all(x.dtype == torch.bfloat16 for x in maps) else WHOLE // 2
    if stream is not None or columns["WIDTH"] > most or any(x.dtype.itemsize > 2 for x in maps) or y.numel() == 0:
        return None
    g, y, z, n = map(as_rows, maps)
    # Where gy will be, the gradient of out_proj's result is before.
    gy, gz, gn = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, z, n))
    out_norm_weight, out_norm_bias, out_proj = (t.contiguous() for t in (out_norm_weight, out_norm_bias, out_proj))
    gate, proj = gate.contiguous(), proj.contiguous()
    precision = product_precision(g, y, z, n)
    block_r = 64 if pixels >= 64 else 16
    programs = max(1, min(cdiv(pixels, block_r), cdiv(2 * PROGRAMS, batch)))
    g_gates = g.new_empty(batch, programs, channels, dtype=torch.float32)
    parts = g.new_empty(batch * programs, channels * (channels + 1), dtype=torch.float32)
    group_modulation_bwd_kernel[(batch, programs)](
        g,
        y,
        z,
        n,
        gate,
        out_norm_weight,
        out_norm_bias,
        out_proj,
        norm_weight.contiguous(),
        proj,
        gy,
        gn,
        g_gates,
        parts,
        pixels,
        *(x.stride(0) for x in (g, y, z, n)),
        out_eps,
        eps,
        **columns,
        BLOCK_R=min(block_r, 64 if channels <= 64 else 32),
        PRECISION=precision,
        num_warps=4 if channels <= 64 else 8,
        num_stages=2 if channels <= 64 else 1,
    )
    count = y.shape[0]
    together = max(1, min(next_power_of_2(groups), 64 // next_power_of_2(size)))
    blocks = cdiv(groups, together)
    group_programs = min(cdiv(count, block_r), cdiv(2 * PROGRAMS, blocks))
    group_parts = g.new_empty(group_programs, channels * (size + 2), dtype=torch.float32)
    group_modulation_groups_bwd_kernel[(group_programs * blocks,)](
        gy,
        y,
        z,
        out_norm_weight,
        out_norm_bias,
        out_proj,
        gz,
        group_parts,
        count,
        y.stride(0),
        z.stride(0),
        out_eps,
        **_columns(channels, size, together),
        BLOCK_R=block_r,
        PRECISION=precision,
        num_warps=4,
        num_stages=2,
    )
    sums, group_sums = sum_parts(parts), sum_parts(group_parts)
    g_gate, g_norm_weight, g_norm_bias, g_proj = (torch.empty_like(t) for t in (gate, norm_weight, norm_bias, proj))
    group_modulation_parameters_kernel[(batch,)](
        g_gates,
        g_gate,
        sums,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        proj,
        g_proj,
        g_norm_weight,
        g_norm_bias,
        programs,
        CHANNELS=channels,
        WIDTH=max(16, next_power_of_2(channels)),
        BLOCK_O=16,
    )
    g_out_norm_weight, g_out_norm_bias = group_sums[: 2 * channels].view(2, channels)
    return [
        *(x.view(*grads[0].shape) for x in (gy, gz, gn)),
        g_gate,
        g_out_norm_weight,
        g_out_norm_bias,
        group_sums[2 * channels :].view(out_proj.shape),
        g_norm_weight,
        g_norm_bias,
        g_proj,
        sums[channels * channels :],
        None,
        None,
        None,
    ]
