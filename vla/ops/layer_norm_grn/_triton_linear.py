"""Triton kernels of both norms with the linear layer behind them, in bfloat16: the normalised map is never written.

The norms are a factor and a shift for each pixel and, in a picture, each channel. So a picture has its own weights,
which are multiplied with the map itself:

    y = inverse (weights x - mean row_sum) + shift

Maps and matrices have rows of `units` and `width` times the largest powers of two, up to 16, that divide their lengths:
U and V.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    at_most,
    cdiv,
    dot_add,
    kernel,
    last_first,
    lead_and_rest,
    rounded_product,
    tile_columns,
    zero_tiles,
)
from . import _triton_norms as norms
from ._triton_norms import _store_gradients, _totals

# Pixels of the linear kernel's tiles.
P_LINEAR = 64
# Programs that an H100 or H200 runs at once where a multiprocessor has two.
_PROGRAMS = 264


@triton.jit
def _load(pointer, row, inside, columns, LEAD: tl.constexpr, REST: tl.constexpr):
    """Rows of a matrix, (P, LEAD) and (P, REST); row and inside are (P,)."""
    tiles = ()
    for i in tl.static_range(2 if REST else 1):
        column = tile_columns(i, LEAD, REST)[None, :]
        tile = tl.load(pointer + row[:, None] * columns + column, inside[:, None] & (column < columns), 0.0)
        tiles = tiles + (tile,)
    return tiles


@kernel
def layer_norm_grn_linear_kernel(
    x_ptr, stats_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, projection_ptr, y_ptr,
    units, width, pixels, rows, parts, steps,
    U: tl.constexpr, V: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    LEAD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND features of a part of a picture's pixels."""
    channels, features = units * U, width * V
    blocks = tl.cdiv(features, FIRST + SECOND)
    program = last_first()
    block, part, picture = program % blocks, program // blocks % parts, (program // blocks // parts).to(tl.int64)

    # The picture's weights, with their sums over the channels and the shifts.
    weights, row_sums, shifts = (), (), ()
    for f in tl.static_range(2 if SECOND else 1):
        feature = block * (FIRST + SECOND) + tile_columns(f, FIRST, SECOND)
        row_sum = tl.zeros(feature.shape, tl.float32)
        shift = tl.zeros(feature.shape, tl.float32)
        for i in tl.static_range(2 if REST else 1):
            column = tile_columns(i, LEAD, REST)
            valid = column < channels
            norm_weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)
            bias = tl.load(bias_ptr + column, valid, 0.0).to(tl.float32)
            scale = tl.load(scale_ptr + picture * channels + column, valid, 0.0)
            at = projection_ptr + feature[:, None] * channels + column[None, :]
            projection = tl.load(at, (feature < features)[:, None] & valid[None, :], 0.0).to(tl.float32)
            # What the product is made of, and so what the mean's share is to be taken of.
            tile = (projection * (norm_weight * scale)[None, :]).to(x_ptr.dtype.element_ty)
            row_sum += tl.sum(tile.to(tl.float32), 1)
            shift += tl.sum(rounded_product(projection, (bias + norm_bias * scale)[None, :]), 1)
            weights = weights + (tile,)
        row_sums = row_sums + (row_sum,)
        shifts = shifts + (shift,)

    start = part * steps * P + tl.arange(0, P)
    x_next = _load(x_ptr, picture * pixels + start, start < pixels, channels, LEAD, REST)
    for step in range(steps):
        pixel = start + step * P
        inside = pixel < pixels
        row = picture * pixels + pixel
        x = x_next
        # The next pixels are read while these are multiplied.
        more = (pixel + P < pixels) & (step + 1 < steps)
        x_next = _load(x_ptr, row + P, more, channels, LEAD, REST)
        mean = tl.load(stats_ptr + row, inside, 0.0)[:, None]
        inverse = tl.load(stats_ptr + rows + row, inside, 0.0)[:, None]
        for f in tl.static_range(2 if SECOND else 1):
            feature = block * (FIRST + SECOND) + tile_columns(f, FIRST, SECOND)
            total = tl.zeros((P, feature.shape[0]), tl.float32)
            for i in tl.static_range(len(x)):
                total = dot_add(x[i], tl.trans(weights[f * len(x) + i]), total)
            y = inverse * (total - mean * row_sums[f][None, :]) + shifts[f][None, :]
            to = y_ptr + row[:, None] * features + feature[None, :]
            tl.store(to, y.to(y_ptr.dtype.element_ty), inside[:, None] & (feature < features)[None, :])


@kernel
def layer_norm_grn_products_kernel(
    g_ptr, x_ptr, stats_ptr, projection_ptr, products_ptr, g_sums_ptr, sums_ptr,
    units, width, pixels, rows, parts, steps,
    U: tl.constexpr, V: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LEAD: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Sums over a part of a picture's pixels, of N features of the gradient: its product with the normalised pixels,
    (B, parts, F, C), and itself, (B, parts, F).

    And both times the projection, (B, parts, blocks, 2, C): the gradient of the normalised map, and times that map.
    """
    channels, features = units * U, width * V
    blocks = tl.cdiv(features, N)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    picture = part // parts
    feature = tl.program_id(0) % blocks * N + tl.arange(0, N)
    exists = feature < features
    products = zero_tiles(N, LEAD, REST)
    gradient = tl.zeros((P, N), tl.float32)
    mean_share = tl.zeros((P, N), tl.float32)
    for step in range(steps):
        pixel = (part % parts * steps + step) * P + tl.arange(0, P)
        inside = pixel < pixels
        row = picture * pixels + pixel
        mean = tl.load(stats_ptr + row, inside, 0.0)[:, None]
        inverse = tl.load(stats_ptr + rows + row, inside, 0.0)[:, None]
        at = g_ptr + row[:, None] * features + feature[None, :]
        g = tl.load(at, inside[:, None] & exists[None, :], 0.0)  # (P, N)
        x = _load(x_ptr, row, inside, channels, LEAD, REST)
        gradient += g.to(tl.float32)
        scaled = (g.to(tl.float32) * inverse).to(g.dtype)
        mean_share += scaled.to(tl.float32) * mean
        sums = ()
        for i in tl.static_range(len(x)):
            sums = sums + (dot_add(tl.trans(scaled), x[i], products[i]),)
        products = sums
    gradients = tl.sum(gradient, 0)  # (N,)
    mean_shares = tl.sum(mean_share, 0)[:, None]
    tl.store(g_sums_ptr + part * features + feature, gradients, exists)
    for i in tl.static_range(len(products)):
        column = tile_columns(i, LEAD, REST)
        valid = column < channels
        mask = exists[:, None] & valid[None, :]
        product = products[i] - mean_shares
        tl.store(products_ptr + (part * features + feature[:, None]) * channels + column[None, :], product, mask)
        at = projection_ptr + feature[:, None] * channels + column[None, :]
        projection = tl.load(at, mask, 0.0).to(tl.float32)
        out = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + column
        tl.store(out, tl.sum(rounded_product(projection, gradients[:, None]), 0), valid)
        tl.store(out + channels, tl.sum(rounded_product(projection, product), 0), valid)


@kernel
def layer_norm_grn_linear_scale_bwd_kernel(
    totals_ptr, sums_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, parameters_ptr,
    channels, pixels, parts, eps,
    BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Factors and gradients of a picture, (B, 2, C) and (B, 4, C), see `_store_gradients`."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    totals_ptr += picture * 3 * channels + column
    squares = tl.load(totals_ptr, valid, 0.0)
    first = tl.load(totals_ptr + channels, valid, 0.0)
    second = tl.load(totals_ptr + 2 * channels, valid, 0.0)
    sums_ptr += picture * parts * 2 * channels
    gradient, product = _totals(sums_ptr, column, valid, channels, parts, 2, AT_ONCE)
    _store_gradients(
        squares, first, second, gradient, product, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        scale_ptr + picture * 2 * channels, parameters_ptr + picture * 4 * channels,
        column, valid, channels, pixels, eps,
    )  # fmt: skip


@kernel
def layer_norm_grn_projection_bwd_kernel(
    products_ptr, g_sums_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, g_projection_ptr,
    channels, features, parts, all_parts,
    AT_ONCE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of C of a feature's weights, in the order of the pictures' parts modulo AT_ONCE."""
    blocks = tl.cdiv(channels, C)
    feature = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    valid = column < channels
    norm_weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)[None, :]
    norm_bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + column, valid, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((AT_ONCE, C), tl.float32)
    for start in range(0, all_parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        row = part.to(tl.int64) * features + feature
        mask = (part < all_parts)[:, None] & valid[None, :]
        product = tl.load(products_ptr + row[:, None] * channels + column[None, :], mask, 0.0)
        gradient = tl.load(g_sums_ptr + row, part < all_parts, 0.0)[:, None]
        scale = tl.load(scale_ptr + (part // parts * 2 * channels)[:, None] + column[None, :], mask, 0.0)
        total += norm_weight * scale * product + gradient * (bias + norm_bias * scale)
    to = g_projection_ptr + feature.to(tl.int64) * channels + column
    tl.store(to, tl.sum(total, 0).to(g_projection_ptr.dtype.element_ty), valid)


def _tiles(channels: int) -> dict:
    """Constants of the tiles of a row."""
    lead, rest = lead_and_rest(channels)
    return dict(LEAD=lead, REST=rest)


def _units(channels: int, features: int) -> tuple[tuple[int, int], dict]:
    """Lengths of rows in units, and these."""
    (units, u), (width, v) = norms.units_of(channels), norms.units_of(features)
    return (units, width), dict(U=u, V=v)


def _features(channels: int, features: int) -> tuple[int, int]:
    """FIRST and SECOND, so that few programs read a pixel and few features lie outside.

    Weights and pixels fit the shared memory of every GPU.
    """
    room = (46 << 10) // sum(_tiles(channels).values()) - P_LINEAR
    sizes = [size for size in ((64, 64), (64, 32), (64, 0), (32, 0), (16, 0)) if sum(size) <= room]
    return min(sizes, key=lambda size: cdiv(features, sum(size)) * (sum(size) + 32))


def _products_options() -> dict:
    """Launch options with a limit of registers, where a GPU has one: three programs of a multiprocessor."""
    return dict(num_warps=4, num_stages=3) | at_most(168)


def _parts(tiles: int, most: int) -> tuple[int, int]:
    """Parts of a picture's pixels, and tiles of each."""
    steps = cdiv(tiles, max(1, most))
    return cdiv(tiles, steps), steps


def suits(x: Tensor, projection: Tensor, training: bool) -> bool:
    """Whether the kernels have the dtype, and are faster than norms and products apart.

    Every picture has weights, which programs make before they walk over its pixels, and training products: those are to
    be many beside these. And the backward divides the gradient by deviations, for which float16 has no range.
    """
    few = 2 * len(projection) <= x.shape[2] * x.shape[3]
    return few and x.dtype == torch.bfloat16 and x.shape[1] <= (192 if training else 288)


def to_save(x: Tensor) -> list[Tensor]:
    """Statistics of the pixels, and three sums over a picture's."""
    return norms.to_save(x, 3)


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    projection: Tensor,
    saved: Sequence[Tensor],
) -> Tensor:
    (batch, channels, height, width), features = x.shape, len(projection)
    y = x.new_empty(batch, height, width, features, dtype=dtype)
    if x.numel() > 0 and features > 0:
        x, norm_weight, norm_bias, weight, bias, projection = norms._dense(
            x, norm_weight, norm_bias, weight, bias, projection
        )
        pixels = height * width
        rows = batch * pixels
        stats, totals = saved or (x.new_empty(2, rows, dtype=torch.float32), None)
        scale = norms.factors(x, norm_weight, norm_bias, weight, norm_eps, eps, stats, totals)
        first, second = _features(channels, features)
        blocks = cdiv(features, first + second)
        parts, steps = _parts(cdiv(pixels, P_LINEAR), _PROGRAMS // (batch * blocks))
        lengths, units = _units(channels, features)
        layer_norm_grn_linear_kernel[(batch * parts * blocks,)](
            x, stats, scale, norm_weight, norm_bias, bias, projection, y, *lengths, pixels, rows, parts, steps,
            **units, **_tiles(channels), P=P_LINEAR, FIRST=first, SECOND=second, num_warps=4, num_stages=1,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def backward(
    g: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    projection: Tensor,
    saved: Sequence[Tensor],
) -> list[Tensor]:
    (batch, channels, height, width), features = x.shape, len(projection)
    if g.numel() == 0:
        return [torch.zeros_like(t) for t in (x, norm_weight, norm_bias, weight, bias, projection)]
    x, norm_weight, norm_bias, weight, bias, projection = norms._dense(
        x, norm_weight, norm_bias, weight, bias, projection
    )
    (g,) = norms._dense(g.to(x.dtype))
    if not saved:
        saved = to_save(x)
        norms.factors(x, norm_weight, norm_bias, weight, norm_eps, eps, *saved)
    stats, totals = saved
    pixels = height * width
    rows = batch * pixels
    lengths, units = _units(channels, features)
    tiles, picture = _tiles(channels), norms._picture(channels)

    block_n, block_p = 64, 32
    blocks = cdiv(features, block_n)
    parts, steps = _parts(cdiv(pixels, block_p), cdiv(2 * _PROGRAMS, batch * blocks))
    products = x.new_empty(batch, parts, features, channels, dtype=torch.float32)
    g_sums = x.new_empty(batch, parts, features, dtype=torch.float32)
    sums = x.new_empty(batch, parts * blocks, 2, channels, dtype=torch.float32)
    layer_norm_grn_products_kernel[(batch * parts * blocks,)](
        g, x, stats, projection, products, g_sums, sums, *lengths, pixels, rows, parts, steps,
        **units, **tiles, P=block_p, N=block_n, **_products_options(),
    )  # fmt: skip
    scale = x.new_empty(batch, 2, channels, dtype=torch.float32)
    parameters = x.new_empty(batch, 4, channels, dtype=torch.float32)
    summed = norms.few_parts(sums, picture["AT_ONCE"])
    layer_norm_grn_linear_scale_bwd_kernel[(batch,)](
        totals, summed, norm_weight, norm_bias, weight, scale, parameters, channels, pixels, summed.shape[1], eps,
        **picture,
    )  # fmt: skip
    g_projection = torch.empty_like(projection)
    block_c = 32
    layer_norm_grn_projection_bwd_kernel[(features * cdiv(channels, block_c),)](
        products, g_sums, scale, norm_weight, norm_bias, bias, g_projection,
        channels, features, parts, batch * parts, AT_ONCE=64, C=block_c, num_warps=4,
    )  # fmt: skip
    g_normed = g.permute(0, 2, 3, 1).flatten(0, 2) @ projection.to(x.dtype)
    gx = norms.gradient_of_map(g_normed, x, norm_weight, norm_bias, scale, stats)
    return [gx, *norms.of_parameters(parameters), g_projection]
