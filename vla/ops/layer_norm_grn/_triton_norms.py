"""Triton kernels of LayerNorm with global response normalisation: sums over pixels, factors, one more pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, next_power_of_2

# Programs that keep a GPU busy.
_PROGRAMS = 1024


@triton.jit
def _row(pointer, channels, G: tl.constexpr, N: tl.constexpr):
    """What belongs to the channels, in N groups of G: each (1, G)."""
    values = ()
    for j in tl.static_range(N):
        column = j * G + tl.arange(0, G)[None, :]
        values = values + (tl.load(pointer + column, column < channels, 0.0).to(tl.float32),)
    return values


@triton.jit
def _pixels(map_ptr, row, exists, channels, G: tl.constexpr, N: tl.constexpr):
    """Pixels of a map in N groups of G channels: each (P, G)."""
    values = ()
    for j in tl.static_range(N):
        column = j * G + tl.arange(0, G)[None, :]
        values = values + (tl.load(map_ptr + row * channels + column, exists & (column < channels), 0.0),)
    return values


@triton.jit
def _normalise(x, channels, eps, G: tl.constexpr, N: tl.constexpr):
    """Normalised pixels without scale and shift, N times (P, G), their mean and inverse deviation, both (P, 1)."""
    total = x[0].to(tl.float32)
    for j in tl.static_range(1, N):
        total += x[j].to(tl.float32)
    mean = tl.sum(total, 1)[:, None] / channels
    squares = tl.zeros_like(total)
    centred = ()
    for j in tl.static_range(N):
        value = x[j].to(tl.float32) - mean
        if j == N - 1:
            value = tl.where(j * G + tl.arange(0, G)[None, :] < channels, value, 0.0)
        squares += value * value
        centred = centred + (value,)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / channels + eps)
    normed = ()
    for j in tl.static_range(N):
        normed = normed + (centred[j] * inverse,)
    return normed, mean, inverse


@triton.jit
def _zeros(P: tl.constexpr, G: tl.constexpr, N: tl.constexpr):
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.zeros((P, G), tl.float32),)
    return values


@triton.jit
def _add_products(sums, a, b, N: tl.constexpr):
    """`sums + a b`, each N tiles."""
    values = ()
    for j in tl.static_range(N):
        values = values + (sums[j] + a[j].to(tl.float32) * b[j],)
    return values


@triton.jit
def _add(sums, a, N: tl.constexpr):
    """`sums + a`, each N tiles."""
    values = ()
    for j in tl.static_range(N):
        values = values + (sums[j] + a[j].to(tl.float32),)
    return values


@triton.jit
def _store_sums(pointer, sums, channels, G: tl.constexpr, N: tl.constexpr):
    """Stores the sums over P of N tiles (P, G)."""
    for j in tl.static_range(N):
        column = j * G + tl.arange(0, G)
        tl.store(pointer + column, tl.sum(sums[j], 0), column < channels)


@kernel
def layer_norm_grn_sums_kernel(
    x_ptr, g_ptr, norm_weight_ptr, norm_bias_ptr, sums_ptr, stats_ptr,
    channels, pixels, parts, steps, rows, eps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of a picture's pixels, (B, parts, SUMS, C), and statistics of the pixels, (2, rows), if wanted.

    The first sum is that of the squared LayerNorm; three are also of the normalised pixel and its square, five also of
    the gradient and its product with the normalised pixel.
    """
    picture = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    weight = _row(norm_weight_ptr, channels, G, N)
    bias = _row(norm_bias_ptr, channels, G, N)
    squares = _zeros(P, G, N)
    first, second, gradient, product = squares, squares, squares, squares
    start = part * steps * P + tl.arange(0, P)[:, None]
    x_next = _pixels(x_ptr, picture * pixels + start, start < pixels, channels, G, N)
    g_next = x_next
    if SUMS == 5:
        g_next = _pixels(g_ptr, picture * pixels + start, start < pixels, channels, G, N)
    for step in range(steps):
        pixel = start + step * P
        x, g = x_next, g_next
        # The next pixels are read while these are summed.
        ahead = pixel + P
        more = (ahead < pixels) & (step + 1 < steps)
        x_next = _pixels(x_ptr, picture * pixels + ahead, more, channels, G, N)
        if SUMS == 5:
            g_next = _pixels(g_ptr, picture * pixels + ahead, more, channels, G, N)
        normed, mean, inverse = _normalise(x, channels, eps, G, N)
        if stats_ptr is not None:
            row = picture * pixels + pixel
            inside = (pixel < pixels) & (step < steps)
            tl.store(stats_ptr + row, mean, inside)
            tl.store(stats_ptr + rows + row, inverse, inside)
        scaled = ()
        for j in tl.static_range(N):
            scaled = scaled + (tl.where(pixel < pixels, weight[j] * normed[j] + bias[j], 0.0),)
        squares = _add_products(squares, scaled, scaled, N)
        if SUMS >= 3:
            first = _add(first, normed, N)
            second = _add_products(second, normed, normed, N)
        if SUMS == 5:
            gradient = _add(gradient, g, N)
            product = _add_products(product, g, normed, N)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS * channels
    _store_sums(out, squares, channels, G, N)
    if SUMS >= 3:
        _store_sums(out + channels, first, channels, G, N)
        _store_sums(out + 2 * channels, second, channels, G, N)
    if SUMS == 5:
        _store_sums(out + 3 * channels, gradient, channels, G, N)
        _store_sums(out + 4 * channels, product, channels, G, N)


@triton.jit
def _totals(sums_ptr, column, valid, channels, parts, SUMS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sums over all parts of a picture, SUMS times (C,), in the order of the parts modulo AT_ONCE."""
    totals = _zeros(AT_ONCE, column.shape[0], SUMS)
    for start in range(0, parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        inside = (part < parts) & valid[None, :]
        more = ()
        for which in tl.static_range(SUMS):
            more = more + (tl.load(sums_ptr + (part * SUMS + which) * channels + column[None, :], inside, 0.0),)
        totals = _add(totals, more, SUMS)
    sums = ()
    for which in tl.static_range(SUMS):
        sums = sums + (tl.sum(totals[which], 0),)
    return sums


@triton.jit
def _store_gradients(
    squares, first, second, gradient, product, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, parameters_ptr,
    column, valid, channels, pixels, eps,
):  # fmt: skip
    """Of a picture's sums (C,): factors of the incoming gradient and of the LayerNorm in the LayerNorm's gradient,
    (2, C), and its part of the gradients of norm_weight, norm_bias, weight and bias, (4, C)."""
    norm_weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    norm_bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    weight = tl.load(weight_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    response = tl.sqrt_rn(squares)
    total = tl.sum(response, 0) / channels + eps
    share = response / total
    g_scale = norm_weight * product + norm_bias * gradient
    g_share = g_scale * weight
    g_response = (g_share - tl.sum(g_share * share, 0) / channels) / total
    of_gradient = 1.0 + weight * share
    of_norm = tl.where(response > 0.0, g_response, 0.0) / tl.where(response > 0.0, response, 1.0)
    tl.store(scale_ptr + column, of_gradient, valid)
    tl.store(scale_ptr + channels + column, of_norm, valid)
    out = parameters_ptr + column
    tl.store(out, of_gradient * product + of_norm * (norm_weight * second + norm_bias * first), valid)
    shift = of_gradient * gradient + of_norm * (norm_weight * first + norm_bias * pixels)
    tl.store(out + channels, shift, valid)
    tl.store(out + 2 * channels, g_scale * share, valid)
    tl.store(out + 3 * channels, gradient, valid)


@kernel
def layer_norm_grn_scale_kernel(
    sums_ptr, weight_ptr, scale_ptr, totals_ptr,
    channels, parts, eps,
    SUMS: tl.constexpr, BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A picture's factor of every channel, (B, C), and of several sums those over the picture, (B, SUMS, C)."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    sums_ptr += picture * parts * SUMS * channels
    sums = _totals(sums_ptr, column, valid, channels, parts, SUMS, AT_ONCE)
    if SUMS > 1:
        for i in tl.static_range(SUMS):
            tl.store(totals_ptr + (picture * SUMS + i) * channels + column, sums[i], valid)
    response = tl.sqrt_rn(sums[0])
    share = response / (tl.sum(response, 0) / channels + eps)
    weight = tl.load(weight_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    tl.store(scale_ptr + picture * channels + column, 1.0 + weight * share, valid)


@kernel
def layer_norm_grn_scale_bwd_kernel(
    sums_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, parameters_ptr,
    channels, pixels, parts, eps,
    BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Factors and gradients of a picture, (B, 2, C) and (B, 4, C), see `_store_gradients`."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    sums_ptr += picture * parts * 5 * channels
    squares, first, second, gradient, product = _totals(sums_ptr, column, valid, channels, parts, 5, AT_ONCE)
    _store_gradients(
        squares, first, second, gradient, product, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        scale_ptr + picture * 2 * channels, parameters_ptr + picture * 4 * channels,
        column, valid, channels, pixels, eps,
    )  # fmt: skip


@kernel
def layer_norm_grn_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, scale_ptr, y_ptr,
    channels, pixels, blocks, eps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A block of a picture's pixels, normalised and scaled."""
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * P + tl.arange(0, P)[:, None]
    exists = pixel < pixels
    row = picture * pixels + pixel
    norm_weight = _row(norm_weight_ptr, channels, G, N)
    norm_bias = _row(norm_bias_ptr, channels, G, N)
    bias = _row(bias_ptr, channels, G, N)
    scale = _row(scale_ptr + picture * channels, channels, G, N)
    normed, _, _ = _normalise(_pixels(x_ptr, row, exists, channels, G, N), channels, eps, G, N)
    for j in tl.static_range(N):
        column = j * G + tl.arange(0, G)[None, :]
        y = bias[j] + (norm_weight[j] * normed[j] + norm_bias[j]) * scale[j]
        tl.store(y_ptr + row * channels + column, y.to(y_ptr.dtype.element_ty), exists & (column < channels))


@kernel
def layer_norm_grn_bwd_kernel(
    x_ptr, g_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, gx_ptr,
    channels, pixels, blocks, eps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of a picture's pixels."""
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * P + tl.arange(0, P)[:, None]
    exists = pixel < pixels
    row = picture * pixels + pixel
    x = _pixels(x_ptr, row, exists, channels, G, N)
    g = _pixels(g_ptr, row, exists, channels, G, N)
    norm_weight = _row(norm_weight_ptr, channels, G, N)
    norm_bias = _row(norm_bias_ptr, channels, G, N)
    of_gradient = _row(scale_ptr + picture * 2 * channels, channels, G, N)
    of_norm = _row(scale_ptr + (picture * 2 + 1) * channels, channels, G, N)
    normed, _, inverse = _normalise(x, channels, eps, G, N)
    total = tl.zeros((P, G), tl.float32)
    product = tl.zeros((P, G), tl.float32)
    g_normed = ()
    for j in tl.static_range(N):
        n = norm_weight[j] * normed[j] + norm_bias[j]
        value = norm_weight[j] * (g[j].to(tl.float32) * of_gradient[j] + n * of_norm[j])
        total += value
        product += value * normed[j]
        g_normed = g_normed + (value,)
    mean = tl.sum(total, 1)[:, None] / channels
    slope = tl.sum(product, 1)[:, None] / channels
    for j in tl.static_range(N):
        column = j * G + tl.arange(0, G)[None, :]
        gx = inverse * (g_normed[j] - mean - normed[j] * slope)
        tl.store(gx_ptr + row * channels + column, gx.to(gx_ptr.dtype.element_ty), exists & (column < channels))


def _tile(channels: int) -> tuple[dict, int]:
    """Constants and launch options of the kernels over pixels, and pixels of a tile.

    Channels are in groups, of 9 to 16, so that no more than an eighth of what is computed lies outside the map. A
    group is 64 entries of some pixels, two of each thread.
    """
    group = next_power_of_2(cdiv(channels, 16))
    pixels = max(1, 64 // group)
    return dict(P=pixels, G=group, N=cdiv(channels, group), num_warps=max(1, group // 64)), pixels


def _picture(channels: int) -> dict:
    """Constants and launch options of the kernels that take a picture's sums."""
    block_c = next_power_of_2(channels)
    return dict(BLOCK_C=block_c, AT_ONCE=max(1, 4096 // block_c), num_warps=8)


def _parts(batch: int, pixels: int, block_p: int) -> tuple[int, int]:
    """Parts that a picture's pixels are summed in, and tiles of each."""
    tiles = cdiv(pixels, block_p)
    steps = max(1, min(16, batch * tiles // _PROGRAMS))
    return cdiv(tiles, steps), steps


def _dense(map: Tensor, *parameters: Tensor) -> list[Tensor]:
    return [map.contiguous(memory_format=torch.channels_last), *(parameter.contiguous() for parameter in parameters)]


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    out: Tensor | None = None,
) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, channels, dtype=dtype) if out is None else out.permute(0, 2, 3, 1)
    if y.numel() > 0:
        x, norm_weight, norm_bias, weight, bias = _dense(x, norm_weight, norm_bias, weight, bias)
        pixels = height * width
        constants, block_p = _tile(channels)
        parts, steps = _parts(batch, pixels, block_p)
        sums = x.new_empty(batch, parts, channels, dtype=torch.float32)
        scale = x.new_empty(batch, channels, dtype=torch.float32)
        layer_norm_grn_sums_kernel[(batch * parts,)](
            x,
            None,
            norm_weight,
            norm_bias,
            sums,
            None,
            channels,
            pixels,
            parts,
            steps,
            0,
            norm_eps,
            SUMS=1,
            **constants,
        )
        layer_norm_grn_scale_kernel[(batch,)](
            sums, weight, scale, None, channels, parts, eps, SUMS=1, **_picture(channels)
        )
        blocks = cdiv(pixels, block_p)
        layer_norm_grn_fwd_kernel[(batch * blocks,)](
            x, norm_weight, norm_bias, bias, scale, y, channels, pixels, blocks, norm_eps, **constants
        )
    return y.permute(0, 3, 1, 2)


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in (x, norm_weight, norm_bias, weight, bias)]
    x, norm_weight, norm_bias, weight = _dense(x, norm_weight, norm_bias, weight)
    (g,) = _dense(grads[0])
    gx = torch.empty_like(x)
    pixels = height * width
    constants, block_p = _tile(channels)
    parts, steps = _parts(batch, pixels, block_p)
    sums = x.new_empty(batch, parts, 5, channels, dtype=torch.float32)
    scale = x.new_empty(batch, 2, channels, dtype=torch.float32)
    parameters = x.new_empty(batch, 4, channels, dtype=torch.float32)
    layer_norm_grn_sums_kernel[(batch * parts,)](
        x, g, norm_weight, norm_bias, sums, None, channels, pixels, parts, steps, 0, norm_eps,
        SUMS=5, **constants,
    )  # fmt: skip
    layer_norm_grn_scale_bwd_kernel[(batch,)](
        sums, norm_weight, norm_bias, weight, scale, parameters, channels, pixels, parts, eps,
        **_picture(channels),
    )  # fmt: skip
    blocks = cdiv(pixels, block_p)
    layer_norm_grn_bwd_kernel[(batch * blocks,)](
        x, g, norm_weight, norm_bias, scale, gx, channels, pixels, blocks, norm_eps, **constants
    )
    return [gx, *parameters.sum(0)]
