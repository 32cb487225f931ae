"""Triton kernels of LayerNorm with global response normalisation: sums over pixels, factors, one more pass.

Pixels have `units` times U channels, U the largest power of two up to 16 that divides their number: the compiler knows
how a pixel's address may be aligned, and loads and stores several channels at once.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import at_most, cdiv, kernel, last_first, next_power_of_2, sum_parts

# Of an H100; decides in how many parts a picture is summed.
MULTIPROCESSORS = 132
# Programs that keep a GPU busy.
_PROGRAMS = 4096


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
        inside = exists
        if j == N - 1:  # only the last group has channels outside
            inside = exists & (column < channels)
        values = values + (tl.load(map_ptr + row * channels + column, inside, 0.0),)
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
    x_ptr, norm_weight_ptr, norm_bias_ptr, sums_ptr, stats_ptr,
    units, pixels, parts, steps, rows, eps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SUMS: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Sums over a part of a picture's pixels, (B, parts, SUMS, C), and statistics of the pixels, (2, rows), if wanted.

    The first sum is that of the squared LayerNorm, three are also of the normalised pixel and its square.
    """
    channels = units * U
    picture = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    weight = _row(norm_weight_ptr, channels, G, N)
    bias = _row(norm_bias_ptr, channels, G, N)
    squares = _zeros(P, G, N)
    first, second = squares, squares
    start = part * steps * P + tl.arange(0, P)[:, None]
    x_next = _pixels(x_ptr, picture * pixels + start, start < pixels, channels, G, N)
    for step in range(steps):
        pixel = start + step * P
        x = x_next
        # The next pixels are read while these are summed.
        ahead = pixel + P
        more = (ahead < pixels) & (step + 1 < steps)
        x_next = _pixels(x_ptr, picture * pixels + ahead, more, channels, G, N)
        normed, mean, inverse = _normalise(x, channels, eps, G, N)
        if stats_ptr is not None:
            row = picture * pixels + pixel
            tl.store(stats_ptr + row, mean, pixel < pixels)
            tl.store(stats_ptr + rows + row, inverse, pixel < pixels)
        scaled = ()
        for j in tl.static_range(N):
            scaled = scaled + (tl.where(pixel < pixels, weight[j] * normed[j] + bias[j], 0.0),)
        squares = _add_products(squares, scaled, scaled, N)
        if SUMS == 3:
            first = _add(first, normed, N)
            second = _add_products(second, normed, normed, N)
    out = sums_ptr + tl.program_id(0).to(tl.int64) * SUMS * channels
    _store_sums(out, squares, channels, G, N)
    if SUMS == 3:
        _store_sums(out + channels, first, channels, G, N)
        _store_sums(out + 2 * channels, second, channels, G, N)


@triton.jit
def _columns(map_ptr, row, inside, column, channels):
    """Some channels of a map's pixels, in float32: row is (P, 1), column (1, C)."""
    return tl.load(map_ptr + row * channels + column, inside & (column < channels), 0.0).to(tl.float32)


@kernel
def layer_norm_grn_sums_bwd_kernel(
    x_ptr, g_ptr, stats_ptr, sums_ptr,
    units, pixels, rows, parts, steps,
    P: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Sums over a part of a picture's pixels, (B, parts, 4, C), of C channels of the normalised pixel, its square, the
    gradient and the product of both."""
    channels = units * U
    blocks = tl.cdiv(channels, C)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    picture = part // parts
    start = part % parts * steps * P
    end = tl.minimum(start + steps * P, pixels)
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    first = tl.zeros((P, C), tl.float32)
    second, gradient, product = first, first, first
    for step in tl.range(steps, num_stages=STAGES):
        pixel = start + step * P + tl.arange(0, P)[:, None]
        inside = pixel < end
        row = picture * pixels + pixel
        x = _columns(x_ptr, row, inside, column[None, :], channels)
        g = _columns(g_ptr, row, inside, column[None, :], channels)
        normed = (x - tl.load(stats_ptr + row, inside, 0.0)) * tl.load(stats_ptr + rows + row, inside, 0.0)
        first += normed
        second += normed * normed
        gradient += g
        product += g * normed
    out = sums_ptr + part * 4 * channels + column
    tl.store(out, tl.sum(first, 0), column < channels)
    tl.store(out + channels, tl.sum(second, 0), column < channels)
    tl.store(out + 2 * channels, tl.sum(gradient, 0), column < channels)
    tl.store(out + 3 * channels, tl.sum(product, 0), column < channels)


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
    """A picture's factor of every channel, (B, C), and if wanted its sums, (B, SUMS, C)."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    sums_ptr += picture * parts * SUMS * channels
    sums = _totals(sums_ptr, column, valid, channels, parts, SUMS, AT_ONCE)
    if totals_ptr is not None:
        for i in tl.static_range(SUMS):
            tl.store(totals_ptr + (picture * SUMS + i) * channels + column, sums[i], valid)
    response = tl.sqrt_rn(sums[0])
    share = response / (tl.sum(response, 0) / channels + eps)
    weight = tl.load(weight_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    tl.store(scale_ptr + picture * channels + column, 1.0 + weight * share, valid)


@kernel
def layer_norm_grn_scale_bwd_kernel(
    squares_ptr, sums_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, parameters_ptr,
    channels, pixels, parts, eps,
    BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Factors and gradients of a picture, (B, 2, C) and (B, 4, C), see `_store_gradients`."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    squares = tl.load(squares_ptr + picture * channels + column, valid, 0.0)
    sums_ptr += picture * parts * 4 * channels
    first, second, gradient, product = _totals(sums_ptr, column, valid, channels, parts, 4, AT_ONCE)
    _store_gradients(
        squares, first, second, gradient, product, norm_weight_ptr, norm_bias_ptr, weight_ptr,
        scale_ptr + picture * 2 * channels, parameters_ptr + picture * 4 * channels,
        column, valid, channels, pixels, eps,
    )  # fmt: skip


@kernel
def layer_norm_grn_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, scale_ptr, y_ptr,
    units, pixels, parts, steps, eps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """A part of a picture's pixels, normalised and scaled."""
    channels = units * U
    program = last_first()
    picture, part = (program // parts).to(tl.int64), program % parts
    start = part * steps * P + tl.arange(0, P)[:, None]
    x_next = _pixels(x_ptr, picture * pixels + start, start < pixels, channels, G, N)
    norm_weight = _row(norm_weight_ptr, channels, G, N)
    norm_bias = _row(norm_bias_ptr, channels, G, N)
    bias = _row(bias_ptr, channels, G, N)
    scale = _row(scale_ptr + picture * channels, channels, G, N)
    slope, shift = (), ()
    for j in tl.static_range(N):
        slope = slope + (norm_weight[j] * scale[j],)
        shift = shift + (bias[j] + norm_bias[j] * scale[j],)
    for step in range(steps):
        pixel = start + step * P
        x = x_next
        if steps > 1:
            ahead = pixel + P
            more = (ahead < pixels) & (step + 1 < steps)
            x_next = _pixels(x_ptr, picture * pixels + ahead, more, channels, G, N)
        normed, _, _ = _normalise(x, channels, eps, G, N)
        to = y_ptr + (picture * pixels + pixel) * channels
        for j in tl.static_range(N):
            column = j * G + tl.arange(0, G)[None, :]
            y = shift[j] + slope[j] * normed[j]
            tl.store(to + column, y.to(y_ptr.dtype.element_ty), (pixel < pixels) & (column < channels))


@kernel
def layer_norm_grn_bwd_kernel(
    x_ptr, g_ptr, stats_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, gx_ptr,
    units, pixels, rows, parts, steps,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Gradient of a part of a picture's pixels."""
    channels = units * U
    program = last_first()
    picture, part = (program // parts).to(tl.int64), program % parts
    start = part * steps * P + tl.arange(0, P)[:, None]
    x_next = _pixels(x_ptr, picture * pixels + start, start < pixels, channels, G, N)
    g_next = _pixels(g_ptr, picture * pixels + start, start < pixels, channels, G, N)
    norm_weight = _row(norm_weight_ptr, channels, G, N)
    norm_bias = _row(norm_bias_ptr, channels, G, N)
    of_gradient = _row(scale_ptr + picture * 2 * channels, channels, G, N)
    of_norm = _row(scale_ptr + (picture * 2 + 1) * channels, channels, G, N)
    of_g, of_normed, shift = (), (), ()
    for j in tl.static_range(N):
        of_g = of_g + (norm_weight[j] * of_gradient[j],)
        of_normed = of_normed + (norm_weight[j] * norm_weight[j] * of_norm[j],)
        shift = shift + (norm_weight[j] * norm_bias[j] * of_norm[j],)
    for step in range(steps):
        pixel = start + step * P
        row = picture * pixels + pixel
        x, g = x_next, g_next
        if steps > 1:
            ahead = pixel + P
            more = (ahead < pixels) & (step + 1 < steps)
            x_next = _pixels(x_ptr, picture * pixels + ahead, more, channels, G, N)
            g_next = _pixels(g_ptr, picture * pixels + ahead, more, channels, G, N)
        x_mean = tl.load(stats_ptr + row, pixel < pixels, 0.0)
        inverse = tl.load(stats_ptr + rows + row, pixel < pixels, 0.0)
        total = tl.zeros((P, G), tl.float32)
        product = tl.zeros((P, G), tl.float32)
        normed, g_normed = (), ()
        for j in tl.static_range(N):
            n = (x[j].to(tl.float32) - x_mean) * inverse
            # Outside, where all factors are 0, so is the sum; n is not.
            value = g[j].to(tl.float32) * of_g[j] + (n * of_normed[j] + shift[j])
            total += value
            product += value * n
            normed = normed + (n,)
            g_normed = g_normed + (value,)
        mean = tl.sum(total, 1)[:, None] / channels
        slope = tl.sum(product, 1)[:, None] / channels
        for j in tl.static_range(N):
            column = j * G + tl.arange(0, G)[None, :]
            gx = inverse * (g_normed[j] - mean - normed[j] * slope)
            inside = (pixel < pixels) & (column < channels)
            tl.store(gx_ptr + row * channels + column, gx.to(gx_ptr.dtype.element_ty), inside)


def units_of(channels: int) -> tuple[int, int]:
    """Channels in units, and channels of a unit."""
    u = math.gcd(channels, 16)
    return channels // u, u


def _tile(channels: int) -> tuple[dict, int]:
    """Constants and launch options of the kernels over whole pixels, and pixels of a tile.

    Channels are in groups, of 9 to 16, so that no more than an eighth of what is computed lies outside the map. A
    group is 64 entries of some pixels, two of each thread.
    """
    group = next_power_of_2(cdiv(channels, 16))
    pixels = max(1, 64 // group)
    u = units_of(channels)[1]
    return dict(P=pixels, G=group, N=cdiv(channels, group), U=u, num_warps=max(1, group // 64)), pixels


def _picture(channels: int) -> dict:
    """Constants and launch options of the kernels that take a picture's sums."""
    block_c = next_power_of_2(channels)
    return dict(BLOCK_C=block_c, AT_ONCE=max(1, 4096 // block_c), num_warps=8)


def _picture_bwd(channels: int) -> dict:
    """As `_picture`, for few parts of many sums: no thread adds what another one has of its channels."""
    block_c = next_power_of_2(channels)
    return dict(BLOCK_C=block_c, AT_ONCE=4, num_warps=max(1, min(8, block_c // 128)))


def _sums_warps(groups: int, count: int, itemsize: int) -> tuple[int, dict]:
    """Warps of the kernel that sums which a multiprocessor holds, and a limit of registers, where a GPU has one.

    Each quarter of a multiprocessor has 512 registers for a lane, and a warp needs some for each group of channels.
    """
    warps = max(1, min(4, 512 // ((5 + 2 * count + itemsize // 2) * groups + 15)))
    return 4 * warps, at_most(min(255, 512 // warps // 8 * 8))


def _sums_parts(batch: int, tiles: int, resident: int) -> tuple[int, int]:
    """Parts that a picture's pixels are summed in, as many as a GPU holds at once, and tiles of each.

    A tile takes a program as long as its way from memory, whatever others do: some more than fit would take twice as
    long.
    """
    steps = cdiv(tiles, max(1, resident // batch))
    return cdiv(tiles, steps), steps


def _map_parts(batch: int, pixels: int, block_p: int, most: int) -> tuple[int, int]:
    """Parts that a picture's pixels are written in, of up to `most` tiles, and tiles of each."""
    tiles = cdiv(pixels, block_p)
    steps = max(1, min(most, batch * tiles // _PROGRAMS))
    return cdiv(tiles, steps), steps


def few_parts(sums: Tensor, at_once: int) -> Tensor:
    """The same sums, (B, parts, n, C), over few parts, which a program for each picture has soon added."""
    batch, parts, count, channels = sums.shape
    if parts * count <= 8 * at_once:
        return sums
    return sum_parts(sums.flatten(2)).view(batch, 1, count, channels)


def _dense(map: Tensor, *parameters: Tensor) -> list[Tensor]:
    return [map.contiguous(memory_format=torch.channels_last), *(parameter.contiguous() for parameter in parameters)]


def to_save(x: Tensor, count: int = 1) -> list[Tensor]:
    """Mean and inverse deviation of all pixels, (2, B H W), and sums over a picture's, (B, count, C), 1 or 3.

    The first is that of the squared LayerNorm.
    """
    batch, channels, height, width = x.shape
    stats = x.new_empty(2, batch * height * width, dtype=torch.float32)
    return [stats, x.new_empty(batch, count, channels, dtype=torch.float32)]


def factors(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    norm_eps: float,
    eps: float,
    stats: Tensor | None,
    totals: Tensor | None,
) -> Tensor:
    """A picture's factor of every channel, (B, C), and what `to_save` names, totals of 1 or 3 sums."""
    batch, channels, height, width = x.shape
    pixels = height * width
    count = 1 if totals is None else totals.shape[1]
    constants, block_p = _tile(channels)
    warps, options = _sums_warps(constants["N"], count, x.itemsize)
    resident = MULTIPROCESSORS * warps // constants["num_warps"]
    parts, steps = _sums_parts(batch, cdiv(pixels, block_p), resident)
    sums = x.new_empty(batch, parts, count, channels, dtype=torch.float32)
    layer_norm_grn_sums_kernel[(batch * parts,)](
        x, norm_weight, norm_bias, sums, stats, units_of(channels)[0], pixels, parts, steps, batch * pixels, norm_eps,
        SUMS=count, **constants, **options,
    )  # fmt: skip
    options = _picture(channels)
    sums = few_parts(sums, options["AT_ONCE"])
    scale = x.new_empty(batch, channels, dtype=torch.float32)
    layer_norm_grn_scale_kernel[(batch,)](
        sums, weight, scale, totals, channels, sums.shape[1], eps, SUMS=count, **options
    )
    return scale


def gradient_of_map(
    g: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, scale: Tensor, stats: Tensor
) -> Tensor:
    """From that of the result, (B, C, H, W) or its rows (B H W, C)."""
    batch, channels, height, width = x.shape
    pixels = height * width
    gx = torch.empty_like(x)
    constants, block_p = _tile(channels)
    parts, steps = _map_parts(batch, pixels, block_p, 4)
    layer_norm_grn_bwd_kernel[(batch * parts,)](
        x, g, stats, norm_weight, norm_bias, scale, gx, units_of(channels)[0], pixels, batch * pixels, parts, steps,
        **constants,
    )  # fmt: skip
    return gx


def of_parameters(parameters: Tensor) -> list[Tensor]:
    """Gradients of norm_weight, norm_bias, weight and bias, of those of the pictures, (B, 4, C)."""
    return [*sum_parts(parameters.flatten(1)).view(parameters.shape[1:])]


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    saved: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, channels, dtype=dtype) if out is None else out.permute(0, 2, 3, 1)
    if y.numel() > 0:
        x, norm_weight, norm_bias, weight, bias = _dense(x, norm_weight, norm_bias, weight, bias)
        stats, totals = saved or (None, None)
        scale = factors(x, norm_weight, norm_bias, weight, norm_eps, eps, stats, totals)
        pixels = height * width
        constants, block_p = _tile(channels)
        parts, steps = _map_parts(batch, pixels, block_p, 2)
        layer_norm_grn_fwd_kernel[(batch * parts,)](
            x, norm_weight, norm_bias, bias, scale, y, units_of(channels)[0], pixels, parts, steps, norm_eps,
            **constants,
        )  # fmt: skip
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
    saved: Sequence[Tensor],
) -> list[Tensor]:
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in (x, norm_weight, norm_bias, weight, bias)]
    x, norm_weight, norm_bias, weight = _dense(x, norm_weight, norm_bias, weight)
    (g,) = _dense(grads[0])
    if not saved:
        saved = to_save(x)
        factors(x, norm_weight, norm_bias, weight, norm_eps, eps, *saved)
    stats, squares = saved
    pixels = height * width
    units, u = units_of(channels)
    block_p, block_c = 16, 64
    tiles, blocks = cdiv(pixels, block_p), cdiv(channels, block_c)
    # Below four tiles what is done once takes longer than they.
    resident = min(10 * MULTIPROCESSORS, cdiv(tiles, 4) * batch * blocks)
    parts, steps = _sums_parts(batch * blocks, tiles, resident)
    sums = x.new_empty(batch, parts, 4, channels, dtype=torch.float32)
    layer_norm_grn_sums_bwd_kernel[(batch * parts * blocks,)](
        x, g, stats, sums, units, pixels, batch * pixels, parts, steps,
        P=block_p, C=block_c, STAGES=3, U=u, num_warps=2,
    )  # fmt: skip
    options = _picture_bwd(channels)
    sums = few_parts(sums, options["AT_ONCE"])
    scale = x.new_empty(batch, 2, channels, dtype=torch.float32)
    parameters = x.new_empty(batch, 4, channels, dtype=torch.float32)
    layer_norm_grn_scale_bwd_kernel[(batch,)](
        squares, sums, norm_weight, norm_bias, weight, scale, parameters, channels, pixels, sums.shape[1], eps,
        **options,
    )  # fmt: skip
    gx = gradient_of_map(g, x, norm_weight, norm_bias, scale, stats)
    return [gx, *of_parameters(parameters)]
