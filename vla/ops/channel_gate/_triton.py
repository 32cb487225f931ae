"""The gate: a program takes one picture through both linear layers."""

import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, kernel, next_power_of_2

BLOCK_C = 128
# Numbers of the first layer's weight that a program has in registers.
LOADED = 2**14


@kernel
def channel_gate_fwd_kernel(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    scale,
    out,
    x_row,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Some channels of one picture's gate, from hidden channels (WIDTH,) that every program of it computes.

    For those it reads BLOCK_I channels at a time.
    """
    picture = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, WIDTH)
    exists = h < HIDDEN
    # All weights are asked for before anything is waited for.
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    block2 = tl.load(weight2 + d[:, None] * HIDDEN + h[None, :], (d < CHANNELS)[:, None] & exists[None, :], 0.0)
    shift = tl.load(bias2 + d, d < CHANNELS, 0.0).to(tl.float32)
    factor = tl.load(scale).to(tl.float32)
    hidden = tl.load(bias1 + h, exists, 0.0).to(tl.float32)
    for first in range(0, CHANNELS, BLOCK_I):
        c = first + tl.arange(0, BLOCK_I)
        block = tl.load(weight1 + h[:, None] * CHANNELS + c[None, :], exists[:, None] & (c < CHANNELS)[None, :], 0.0)
        row = tl.load(x + picture * x_row + c, c < CHANNELS, 0.0).to(tl.float32)
        hidden += tl.sum(block.to(tl.float32) * row[None, :], 1)
    hidden = tl.maximum(hidden, 0.0)

    s = tl.sum(block2.to(tl.float32) * hidden[None, :], 1) + shift
    gate = factor / (1.0 + tl.exp2(s * -LOG2E))
    tl.store(out + picture * CHANNELS + d, gate.to(out.dtype.element_ty), d < CHANNELS)


def forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, scale: Tensor) -> Tensor:
    batch, channels = x.shape
    out = x.new_empty(batch, channels)
    if batch == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    hidden = weight1.shape[0]
    width = next_power_of_2(hidden)
    channel_gate_fwd_kernel[(batch, cdiv(channels, BLOCK_C))](
        x,
        weight1.contiguous(),
        bias1.contiguous(),
        weight2.contiguous(),
        bias2.contiguous(),
        scale,
        out,
        x.stride(0),
        CHANNELS=channels,
        HIDDEN=hidden,
        WIDTH=width,
        BLOCK_I=max(16, min(next_power_of_2(channels), LOADED // width)),
        BLOCK_C=BLOCK_C,
        num_warps=8,
    )
    return out
