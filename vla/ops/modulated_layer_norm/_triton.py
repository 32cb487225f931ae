"""GPU kernels of the norm of a modulated map: whole rows of channels in registers, one pass over memory each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import as_rows, cdiv, kernel, last_first, next_power_of_2, sum_parts
from ..layer_norm._triton import _affine, _load, _multiply, _standardize, _store, _store_columns

# Programs of the backward, as many as an H100 has at once of 512 channels. Each leaves partial sums.
PROGRAMS = 264


@triton.jit
def _standardize_tile(rows, exists, eps, CHANNELS: tl.constexpr):
    """Rows of mean 0 and variance 1, zero where no channel exists, and one over their deviations, (BLOCK_R, 1)."""
    # A product with the reciprocal, or a division which is not exact, gives a row of equal numbers a variance.
    mean = tl.div_rn(tl.sum(rows, 1)[:, None], CHANNELS)
    centred = tl.where(exists, rows - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / CHANNELS + eps)
    return centred * inverse, inverse


@kernel(do_not_specialize=["count", "pixels"])
def modulated_layer_norm_fwd_kernel(
    a,
    n,
    gate,
    weight,
    bias,
    y,
    count,
    pixels,
    eps,
    a_row: tl.constexpr,
    n_row: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R of the `count` rows, in chunks of channels; `pixels` rows share a row of gate."""
    row = last_first().to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = row < count
    rows = _load(a + row * a_row, inside, CHANNELS, WIDTH)
    rows = _multiply(rows, _load(n + row * n_row, inside, CHANNELS, WIDTH))
    # Of 32 bits unless there are more rows than that: a division of 64 takes three times the instructions.
    picture = (row.to(count.dtype) // pixels).to(tl.int64)
    rows = _multiply(rows, _load(gate + picture * CHANNELS, inside, CHANNELS, WIDTH))
    normal, inverse = _standardize(rows, inside, eps, CHANNELS, WIDTH)
    y += row * (CHANNELS + COLUMNS)
    _store(y, _affine(normal, weight, bias, 0 * row, CHANNELS, WIDTH), inside, CHANNELS, WIDTH)
    if COLUMNS > 0:
        _store_columns(y + CHANNELS, inside, COLUMNS, TAIL)


@kernel(do_not_specialize=["pixels"])
def modulated_layer_norm_bwd_kernel(
    g,
    a,
    n,
    gate,
    weight,
    ga,
    gn,
    g_gate,
    parts,
    pixels,
    eps,
    g_row: tl.constexpr,
    a_row: tl.constexpr,
    n_row: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradients of a and n for some pixels of one picture, and their sums for gate, (C,), and the norm, (2, C)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)[None, :]
    exists = channel < CHANNELS
    factors = tl.load(gate + image * CHANNELS + channel, exists, 0.0).to(tl.float32)
    scale = tl.load(weight + channel, exists, 0.0).to(tl.float32)
    g_factors = tl.zeros((BLOCK_R, WIDTH), tl.float32)
    g_scale = tl.zeros((BLOCK_R, WIDTH), tl.float32)
    g_shift = tl.zeros((BLOCK_R, WIDTH), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(pixels, BLOCK_R), tl.num_programs(1)):
        pixel = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = image * pixels + pixel
        inside = (pixel < pixels) & exists
        a_rows = tl.load(a + row * a_row + channel, inside, 0.0).to(tl.float32)  # (BLOCK_R, WIDTH)
        n_rows = tl.load(n + row * n_row + channel, inside, 0.0).to(tl.float32)
        grad = tl.load(g + row * g_row + channel, inside, 0.0).to(tl.float32)
        normal, inverse = _standardize_tile(a_rows * n_rows * factors, exists, eps, CHANNELS)
        g_shift += grad
        g_scale += grad * normal
        grad *= scale
        slope = tl.sum(grad * normal, 1)[:, None] / CHANNELS
        grad = (grad - tl.sum(grad, 1)[:, None] / CHANNELS - normal * slope) * inverse
        # Rows outside have gradients of zeros, which a deviation of eps alone leaves.
        g_factors += grad * a_rows * n_rows
        grad *= factors
        tl.store(ga + row * CHANNELS + channel, (grad * n_rows).to(ga.dtype.element_ty), inside)
        tl.store(gn + row * CHANNELS + channel, (grad * a_rows).to(gn.dtype.element_ty), inside)
    program = image * tl.num_programs(1) + tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    exists = channel < CHANNELS
    tl.store(g_gate + program * CHANNELS + channel, tl.sum(g_factors, 0).to(g_gate.dtype.element_ty), exists)
    parts += program * (2 * CHANNELS)
    tl.store(parts + channel, tl.sum(g_scale, 0), exists)
    tl.store(parts + CHANNELS + channel, tl.sum(g_shift, 0), exists)


def _chunks(channels: int) -> dict[str, int]:
    """Chunks of the forward's rows, and how many of those a program takes: one a warp, if it has more than 64 channels.

    A thread has 4 channels of every chunk, and at most 6 chunks.
    """
    width = min(128, max(8, next_power_of_2(channels)))
    while channels > 6 * width:
        width *= 2
    return dict(WIDTH=width, BLOCK_R=max(1, 512 // width), num_warps=min(32, max(4, width // 128)))


def _tile(width: int) -> dict[str, int]:
    """How many rows of so many columns the backward takes at a time; a thread has 16 of their numbers."""
    width = next_power_of_2(width)
    return dict(WIDTH=width, BLOCK_R=max(1, min(4, 2048 // width)), num_warps=max(4, min(32, width // 512)))


def forward(
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    channels = a.shape[3]
    y = a.new_empty((*a.shape[:3], channels + columns), dtype=dtype)
    if a.numel() == 0:
        return y.fill_(0)
    count, pixels = a.numel() // channels, a.shape[1] * a.shape[2]
    a, n, tile = as_rows(a), as_rows(n), _chunks(channels)
    modulated_layer_norm_fwd_kernel[(cdiv(count, tile["BLOCK_R"]),)](
        a,
        n,
        gate.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        y,
        count,
        pixels,
        eps,
        a.stride(0),
        n.stride(0),
        CHANNELS=channels,
        COLUMNS=columns,
        TAIL=next_power_of_2(columns),
        **tile,
    )
    return y


def backward(
    grads: list[Tensor],
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int,
    eps: float,
    dtype: torch.dtype | None,
) -> list[Tensor | None]:
    if a.numel() == 0:
        return [None] * 5
    batch, channels, pixels, shape = a.shape[0], a.shape[3], a.shape[1] * a.shape[2], a.shape
    g, a, n = as_rows(grads[0]), as_rows(a), as_rows(n)
    ga, gn = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, n))
    tile = _tile(channels)
    programs = max(1, min(cdiv(pixels, tile["BLOCK_R"]), PROGRAMS * 512 // tile["WIDTH"] // batch))
    g_gate = gate.new_empty((batch, programs, channels), dtype=gate.dtype if programs == 1 else torch.float32)
    parts = a.new_empty((batch * programs, 2 * channels), dtype=torch.float32)
    modulated_layer_norm_bwd_kernel[(batch, programs)](
        g,
        a,
        n,
        gate.contiguous(),
        weight.contiguous(),
        ga,
        gn,
        g_gate,
        parts,
        pixels,
        eps,
        g.stride(0),
        a.stride(0),
        n.stride(0),
        CHANNELS=channels,
        **tile,
    )
    sums = sum_parts(parts)
    g_gate = g_gate[:, 0] if programs == 1 else g_gate.sum(1)
    return [ga.view(shape), gn.view(shape), g_gate, sums[:channels], sums[channels:]]
