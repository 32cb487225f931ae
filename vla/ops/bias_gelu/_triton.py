"""GPU kernels of the GELU with a bias: one pass over memory each way."""

import torch
import triton.language as tl
from torch import Tensor

from .._triton import as_rows, cdiv, gelu, gelu_slope, kernel, next_power_of_2, sum_parts


@kernel
def bias_gelu_fwd_kernel(
    x, bias, y, rows, row_stride, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A tile of y (rows, CHANNELS)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (channel < CHANNELS)
    shift = tl.load(bias + channel, channel < CHANNELS, 0.0).to(tl.float32)
    s = tl.load(x + row * row_stride + channel, inside, 0.0).to(tl.float32) + shift
    tl.store(y + row * CHANNELS + channel, gelu(s).to(y.dtype.element_ty), inside)


@kernel
def bias_gelu_bwd_kernel(
    g, x, bias, gx, sums, rows, row_stride, CHANNELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradients of every so many tiles of rows, and this program's part of that of the bias: sums (parts, CHANNELS)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    known = channel < CHANNELS
    shift = tl.load(bias + channel, known, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < rows) & known
        s = tl.load(x + row * row_stride + channel, inside, 0.0).to(tl.float32) + shift
        of_s = tl.load(g + row * CHANNELS + channel, inside, 0.0).to(tl.float32) * gelu_slope(s)
        total += of_s
        tl.store(gx + row * CHANNELS + channel, of_s.to(gx.dtype.element_ty), inside)
    tl.store(sums + tl.program_id(0) * CHANNELS + channel, tl.sum(total, 0, keep_dims=True), known)


# Rows of a program's tile, and programs of the backward: enough to fill a GPU, few enough that their sums are quickly
# added.
_ROWS = 16
_PROGRAMS = 1056


def _config(channels: int) -> dict:
    return dict(CHANNELS=channels, BLOCK_R=_ROWS, BLOCK_C=max(16, min(128, next_power_of_2(channels))), num_warps=4)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() > 0:
        flat, config = as_rows(x), _config(x.shape[-1])
        grid = (cdiv(len(flat), _ROWS), cdiv(x.shape[-1], config["BLOCK_C"]))
        bias_gelu_fwd_kernel[grid](flat, bias.contiguous(), y, len(flat), flat.stride(0), **config)
    return y


def backward(grads: list[Tensor], x: Tensor, bias: Tensor) -> list[Tensor | None]:
    if x.numel() == 0:
        return [None, None]
    flat, channels = as_rows(x), x.shape[-1]
    config = _config(channels)
    columns = cdiv(channels, config["BLOCK_C"])
    parts = min(cdiv(len(flat), _ROWS), max(1, _PROGRAMS // columns))
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = torch.empty(parts, channels, dtype=torch.float32, device=x.device)
    bias_gelu_bwd_kernel[(parts, columns)](
        grads[0].contiguous(), flat, bias.contiguous(), gx, sums, len(flat), flat.stride(0), **config
    )
    return [gx, sum_parts(sums)]
