"""Q-Shift in one pass: a tile of pixels and channels, read from wherever each group of channels comes from."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import cdiv, kernel, next_power_of_2


@triton.jit
def place(program, channels, height, width, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tile of a program: image (64 bits), number of the tile among all tiles of pixels, first pixel, first channel."""
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tiles_p = tl.cdiv(height * width, BLOCK_P)
    tile = program // tiles_c
    return (tile // tiles_p).to(tl.int64), tile.to(tl.int64), (tile % tiles_p) * BLOCK_P, (program % tiles_c) * BLOCK_C


@triton.jit
def load_from(x, row, column, inside, height, width, stride_h, stride_w):
    """The pixels (row, column) in float32, zero outside of the map."""
    inside = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(x + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w, inside, 0.0).to(tl.float32)


@triton.jit
def load_shifted(
    x,
    row,
    column,
    channel,
    inside,
    height,
    width,
    stride_h,
    stride_w,
    step,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Q-Shift of x by `step` pixels, negative for the adjoint, in float32.

    Args:
        x: Pointers to the channels of the image's first pixel, (1, BLOCK_C).
        row: Rows, (BLOCK_P, 1).
        column: Columns, (BLOCK_P, 1).
        channel: Channels, (1, BLOCK_C).
        inside: Which of them exist, (BLOCK_P, BLOCK_C).
        END1: End of the head's first group of channels, and so on.
    """
    c = channel % HEAD_DIM
    # One load per direction, masked to its channels: that way the addresses of each stay contiguous in the channels.
    value = load_from(x, row, column, inside & (c >= END4), height, width, stride_h, stride_w)
    group = inside & (c < END1)
    value += load_from(x, row, column - step, group, height, width, stride_h, stride_w)
    group = inside & (c >= END1) & (c < END2)
    value += load_from(x, row, column + step, group, height, width, stride_h, stride_w)
    group = inside & (c >= END2) & (c < END3)
    value += load_from(x, row - step, column, group, height, width, stride_h, stride_w)
    group = inside & (c >= END3) & (c < END4)
    value += load_from(x, row + step, column, group, height, width, stride_h, stride_w)
    return value


@kernel(do_not_specialize=["step"])
def q_shift_kernel(
    x,
    rest,
    y,
    channels,
    height,
    width,
    step,
    x_batch,
    x_channel,
    x_row,
    x_column,
    y_batch,
    y_channel,
    y_row,
    y_column,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = Q-Shift of x by `step` pixels, by `-step` its adjoint, plus `rest`, (B, H, W, C) contiguous, or None."""
    image, _, first, start = place(tl.program_id(0), channels, height, width, BLOCK_P, BLOCK_C)
    pixel = first + tl.arange(0, BLOCK_P)[:, None]
    channel = start + tl.arange(0, BLOCK_C)[None, :]
    row, column = pixel // width, pixel % width
    inside = (row < height) & (channel < channels)
    x += image * x_batch + channel.to(tl.int64) * x_channel
    value = load_shifted(
        x, row, column, channel, inside, height, width, x_row, x_column, step, END1, END2, END3, END4, HEAD_DIM
    )  # (BLOCK_P, BLOCK_C)
    if rest is not None:
        value += tl.load(rest + (image * height * width + pixel) * channels + channel, inside, 0.0)
    y += image * y_batch + channel.to(tl.int64) * y_channel
    y += row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
    tl.store(y, value.to(y.dtype.element_ty), inside)


def groups(channels: int, gamma: float, head_dim: int | None) -> dict[str, int]:
    """Constants of the kernels: ends of the four groups of channels in a head, and the head's channels."""
    head_dim = max(channels if head_dim is None else head_dim, 1)
    return {f"END{i}": int(head_dim * gamma * i) for i in range(1, 5)} | {"HEAD_DIM": head_dim}


def shifted(
    x: Tensor, shift: int, gamma: float, head_dim: int | None, rest: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Q-Shift plus `rest`; a negative `shift` moves every group the other way, which is the adjoint."""
    out = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return out
    batch, channels, height, width = x.shape
    block_c = min(64, next_power_of_2(channels))
    block_p = 2048 // block_c
    q_shift_kernel[(batch * cdiv(height * width, block_p) * cdiv(channels, block_c),)](
        x,
        rest,
        out,
        channels,
        height,
        width,
        shift,
        *x.stride(),
        *out.stride(),
        **groups(channels, gamma, head_dim),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


def forward(x: Tensor, shift: int, gamma: float, head_dim: int | None) -> Tensor:
    return shifted(x, shift, gamma, head_dim)


def backward(grads: list[Tensor], x: Tensor, shift: int, gamma: float, head_dim: int | None) -> list[Tensor]:
    return [shifted(grads[0], -shift, gamma, head_dim, out=torch.empty_like(x))]
