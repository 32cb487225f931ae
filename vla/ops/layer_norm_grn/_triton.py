"""Triton kernels of LayerNorm with global response normalisation: sums over pixels, factors, one more pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, next_power_of_2

# Programs that keep a GPU busy.
_PROGRAMS = 1024


@triton.jit
def _normalise(x_ptr, row, inside, column, channels, eps):
    """Normalised pixels without scale and shift, (P, C) and 0 outside, and the inverse of their deviation, (P, 1)."""
    x = tl.load(x_ptr + row * channels + column, inside, 0.0).to(tl.float32)  # (P, C)
    centred = tl.where(inside, x - tl.sum(x, 1)[:, None] / channels, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1)[:, None] / channels + eps)
    return centred * scale, scale


@kernel
def layer_norm_grn_sums_kernel(
    x_ptr, g_ptr, norm_weight_ptr, norm_bias_ptr, sums_ptr,
    channels, pixels, parts, steps, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sums over a part of a picture's pixels, (B, parts, sums, C).

    Of the squared LayerNorm; backward also of the normalised pixel, its square, the gradient and their product.
    """
    picture = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_C)[None, :]
    valid = column < channels
    weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if BACKWARD:
        first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        second = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        gradient = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(steps):
        pixel = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        inside = (pixel < pixels) & valid
        row = picture * pixels + pixel
        normed, _ = _normalise(x_ptr, row, inside, column, channels, eps)
        n = tl.where(inside, weight * normed + bias, 0.0)
        squares += n * n
        if BACKWARD:
            g = tl.load(g_ptr + row * channels + column, inside, 0.0).to(tl.float32)  # (P, C)
            first += normed
            second += normed * normed
            gradient += g
            product += g * normed
    out = sums_ptr + tl.program_id(0).to(tl.int64) * (5 if BACKWARD else 1) * channels + column
    tl.store(out, tl.sum(squares, 0)[None, :], valid)
    if BACKWARD:
        tl.store(out + channels, tl.sum(first, 0)[None, :], valid)
        tl.store(out + 2 * channels, tl.sum(second, 0)[None, :], valid)
        tl.store(out + 3 * channels, tl.sum(gradient, 0)[None, :], valid)
        tl.store(out + 4 * channels, tl.sum(product, 0)[None, :], valid)


@triton.jit
def _total(sums_ptr, column, valid, channels, parts, which, SUMS: tl.constexpr):
    """One of the sums over all parts of a picture, (C,), in the order of the parts."""
    total = tl.zeros(column.shape, tl.float32)
    for part in range(parts):
        total += tl.load(sums_ptr + (part * SUMS + which) * channels + column, valid, 0.0)
    return total


@kernel
def layer_norm_grn_scale_kernel(
    sums_ptr, weight_ptr, scale_ptr,
    channels, parts, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A picture's factor of every channel, (B, C)."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    response = tl.sqrt_rn(_total(sums_ptr + picture * parts * channels, column, valid, channels, parts, 0, 1))
    share = response / (tl.sum(response, 0) / channels + eps)
    weight = tl.load(weight_ptr + column, valid, 0.0).to(tl.float32)  # (C,)
    tl.store(scale_ptr + picture * channels + column, 1.0 + weight * share, valid)


@kernel
def layer_norm_grn_scale_bwd_kernel(
    sums_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, scale_ptr, parameters_ptr,
    channels, pixels, parts, eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A picture's factors of the incoming gradient and of the LayerNorm in the LayerNorm's gradient, (B, 2, C), and
    its part of the gradients of norm_weight, norm_bias, weight and bias, (B, 4, C)."""
    picture = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    valid = column < channels
    sums_ptr += picture * parts * 5 * channels
    squares = _total(sums_ptr, column, valid, channels, parts, 0, 5)
    first = _total(sums_ptr, column, valid, channels, parts, 1, 5)
    second = _total(sums_ptr, column, valid, channels, parts, 2, 5)
    gradient = _total(sums_ptr, column, valid, channels, parts, 3, 5)
    product = _total(sums_ptr, column, valid, channels, parts, 4, 5)
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
    tl.store(scale_ptr + picture * 2 * channels + column, of_gradient, valid)
    tl.store(scale_ptr + (picture * 2 + 1) * channels + column, of_norm, valid)
    out = parameters_ptr + picture * 4 * channels + column
    tl.store(out, of_gradient * product + of_norm * (norm_weight * second + norm_bias * first), valid)
    shift = of_gradient * gradient + of_norm * (norm_weight * first + norm_bias * pixels)
    tl.store(out + channels, shift, valid)
    tl.store(out + 2 * channels, g_scale * share, valid)
    tl.store(out + 3 * channels, gradient, valid)


@kernel
def layer_norm_grn_fwd_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, scale_ptr, y_ptr,
    channels, pixels, blocks, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of a picture's pixels, normalised and scaled."""
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    valid = column < channels
    inside = (pixel < pixels) & valid
    row = picture * pixels + pixel
    normed, _ = _normalise(x_ptr, row, inside, column, channels, eps)
    norm_weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    norm_bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    bias = tl.load(bias_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    scale = tl.load(scale_ptr + picture * channels + column, valid, 0.0)  # (1, C)
    y = bias + (norm_weight * normed + norm_bias) * scale
    tl.store(y_ptr + row * channels + column, y.to(y_ptr.dtype.element_ty), inside)


@kernel
def layer_norm_grn_bwd_kernel(
    x_ptr, g_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, gx_ptr,
    channels, pixels, blocks, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of a picture's pixels."""
    picture = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    valid = column < channels
    inside = (pixel < pixels) & valid
    row = picture * pixels + pixel
    normed, inverse = _normalise(x_ptr, row, inside, column, channels, eps)
    g = tl.load(g_ptr + row * channels + column, inside, 0.0).to(tl.float32)  # (P, C)
    norm_weight = tl.load(norm_weight_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    norm_bias = tl.load(norm_bias_ptr + column, valid, 0.0).to(tl.float32)  # (1, C)
    of_gradient = tl.load(scale_ptr + picture * 2 * channels + column, valid, 0.0)  # (1, C)
    of_norm = tl.load(scale_ptr + (picture * 2 + 1) * channels + column, valid, 0.0)  # (1, C)
    g_normed = norm_weight * (g * of_gradient + (norm_weight * normed + norm_bias) * of_norm)
    mean = tl.sum(g_normed, 1)[:, None] / channels
    slope = tl.sum(g_normed * normed, 1)[:, None] / channels
    gx = inverse * (g_normed - mean - normed * slope)
    tl.store(gx_ptr + row * channels + column, gx.to(gx_ptr.dtype.element_ty), inside)


def _tile(channels: int) -> tuple[dict, int]:
    """Constants and launch options of the kernels over pixels, and pixels of a tile: 32 entries a thread, or more."""
    block_c = next_power_of_2(channels)
    size = max(1024, block_c)
    return dict(BLOCK_P=size // block_c, BLOCK_C=block_c, num_warps=min(32, size // 1024)), size // block_c


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
) -> Tensor:
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, channels, dtype=dtype)
    if y.numel() > 0:
        x, norm_weight, norm_bias, weight, bias = _dense(x, norm_weight, norm_bias, weight, bias)
        pixels = height * width
        constants, block_p = _tile(channels)
        parts, steps = _parts(batch, pixels, block_p)
        sums = x.new_empty(batch, parts, channels, dtype=torch.float32)
        scale = x.new_empty(batch, channels, dtype=torch.float32)
        layer_norm_grn_sums_kernel[(batch * parts,)](
            x, None, norm_weight, norm_bias, sums, channels, pixels, parts, steps, norm_eps, BACKWARD=False, **constants
        )
        layer_norm_grn_scale_kernel[(batch,)](sums, weight, scale, channels, parts, eps, BLOCK_C=constants["BLOCK_C"])
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
        x, g, norm_weight, norm_bias, sums, channels, pixels, parts, steps, norm_eps, BACKWARD=True, **constants
    )
    layer_norm_grn_scale_bwd_kernel[(batch,)](
        sums, norm_weight, norm_bias, weight, scale, parameters, channels, pixels, parts, eps,
        BLOCK_C=constants["BLOCK_C"],
    )  # fmt: skip
    blocks = cdiv(pixels, block_p)
    layer_norm_grn_bwd_kernel[(batch * blocks,)](
        x, g, norm_weight, norm_bias, scale, gx, channels, pixels, blocks, norm_eps, **constants
    )
    return [gx, *parameters.sum(0)]
