"""Compiled CPU kernels: sequences are walked in place, channels side by side in vector registers."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .._numba import exp, jit, run_tasks, softplus
from . import _torch

# Channels a task walks with: their states and time steps stay in the first-level cache.
_BLOCK = 48
# Steps between the states that the backward keeps; those between are recomputed.
_SEGMENT = 64


@jit
def _time_step(low, weight, bias, d0, softplus_on, dt, slope):
    """Time step of one pixel and direction, and its derivative with respect to the biased one."""
    if weight.shape[0] == 0:
        for d in range(dt.size):
            dt[d] = low[d0 + d] + bias[d0 + d]
    else:
        for d in range(dt.size):
            dt[d] = bias[d0 + d]
        for r in range(weight.shape[0]):
            value = low[r]
            row = weight[r, d0 : d0 + dt.size]
            for d in range(dt.size):
                dt[d] += value * row[d]
    if softplus_on:
        for d in range(dt.size):
            slope[d] = 1 / (1 + exp(-dt[d]))
            dt[d] = softplus(dt[d])
    else:
        slope[:] = 1


@jit
def scan_fwd_kernel(task, block, x, low, weight, bias, A, B, C, skip, order, line, channel, softplus_on, y, last):
    """Adds the outputs of one block of channels of one sequence to `y`.

    x, y (S, L, X); low (S, L, K, R), or (S, L, K, D) where weight is empty; weight (K, R, D); bias, skip (K, D);
    A (K, N, D); B, C (S, L, K, N); order (K, L) pixel of each step; line (K,) steps after which the state starts again;
    channel (K,) first channel of x that a direction reads; last (S, K, N, D) state after the last step.
    """
    directions, states, width = A.shape
    blocks = (width + block - 1) // block
    s = task // blocks
    d0 = (task - s * blocks) * block
    size = min(block, width - d0)
    dt, slope = np.empty(size, x.dtype), np.empty(size, x.dtype)
    drive, out = np.empty(size, x.dtype), np.empty(size, x.dtype)
    h = np.empty((states, size), x.dtype)
    for k in range(directions):
        h[:] = 0
        c0 = channel[k] + d0
        for i in range(order.shape[1]):
            if i % line[k] == 0:
                h[:] = 0
            pixel = order[k, i]
            _time_step(low[s, pixel, k], weight[k], bias[k], d0, softplus_on, dt, slope)
            u = x[s, pixel, c0 : c0 + size]
            skip_k = skip[k, d0 : d0 + size]
            for d in range(size):
                drive[d] = dt[d] * u[d]
                out[d] = skip_k[d] * u[d]
            for n in range(states):
                b, c = B[s, pixel, k, n], C[s, pixel, k, n]
                a, hn = A[k, n, d0 : d0 + size], h[n]
                for d in range(size):
                    hn[d] = exp(dt[d] * a[d]) * hn[d] + drive[d] * b
                    out[d] += hn[d] * c
            y_pixel = y[s, pixel, c0 : c0 + size]
            for d in range(size):
                y_pixel[d] += out[d]
        last[s, k, :, d0 : d0 + size] = h


@jit
def scan_bwd_kernel(
    task, block, x, low, weight, bias, A, B, C, skip, order, line, channel, softplus_on,
    gy, g_last, gx, g_low, g_weight, g_bias, gA, gB, gC, g_skip,
):  # fmt: skip
    """Gradients that come from one block of channels of one sequence; shapes as in the forward.

    So that no two tasks write to one place, parameters' gradients have a leading axis of sequences, and those of low
    (where it is low-rank), B and C, which sum over channels, a leading axis of channel blocks.
    """
    directions, states, width = A.shape
    length, rank = order.shape[1], weight.shape[1]
    blocks = (width + block - 1) // block
    s = task // blocks
    part = task - s * blocks
    d0 = part * block
    size = min(block, width - d0)
    zero = x.dtype.type(0)
    segments = (length + _SEGMENT - 1) // _SEGMENT
    entering = np.empty((segments, states, size), x.dtype)
    h = np.empty((_SEGMENT + 1, states, size), x.dtype)
    dt, slope = np.empty((_SEGMENT, size), x.dtype), np.empty((_SEGMENT, size), x.dtype)
    g, g_dt, g_drive = np.empty((states, size), x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
    for k in range(directions):
        c0 = channel[k] + d0
        skip_k = skip[k, d0 : d0 + size]

        state = h[0]
        state[:] = 0
        for i in range(length):
            if i % line[k] == 0:
                state[:] = 0
            if i % _SEGMENT == 0:
                entering[i // _SEGMENT] = state
            pixel = order[k, i]
            _time_step(low[s, pixel, k], weight[k], bias[k], d0, softplus_on, dt[0], slope[0])
            u = x[s, pixel, c0 : c0 + size]
            for n in range(states):
                b = B[s, pixel, k, n]
                a, hn, step = A[k, n, d0 : d0 + size], state[n], dt[0]
                for d in range(size):
                    hn[d] = exp(step[d] * a[d]) * hn[d] + step[d] * u[d] * b

        g[:] = g_last[s, k, :, d0 : d0 + size]
        for segment in range(segments - 1, -1, -1):
            first = segment * _SEGMENT
            count = min(_SEGMENT, length - first)
            h[0] = entering[segment]
            for j in range(count):
                at_start = (first + j) % line[k] == 0
                pixel = order[k, first + j]
                _time_step(low[s, pixel, k], weight[k], bias[k], d0, softplus_on, dt[j], slope[j])
                u = x[s, pixel, c0 : c0 + size]
                for n in range(states):
                    b = B[s, pixel, k, n]
                    a, before, after, step = A[k, n, d0 : d0 + size], h[j, n], h[j + 1, n], dt[j]
                    for d in range(size):
                        previous = zero if at_start else before[d]
                        after[d] = exp(step[d] * a[d]) * previous + step[d] * u[d] * b

            for j in range(count - 1, -1, -1):
                pixel = order[k, first + j]
                at_start = (first + j) % line[k] == 0
                step = dt[j]
                u, gy_pixel = x[s, pixel, c0 : c0 + size], gy[s, pixel, c0 : c0 + size]
                g_dt[:] = 0
                g_drive[:] = 0
                for n in range(states):
                    b, c = B[s, pixel, k, n], C[s, pixel, k, n]
                    a, gn, gAn = A[k, n, d0 : d0 + size], g[n], gA[s, k, n, d0 : d0 + size]
                    before, after = h[j, n], h[j + 1, n]
                    g_b, g_c = zero, zero
                    for d in range(size):
                        gd = gn[d] + c * gy_pixel[d]
                        g_c += gy_pixel[d] * after[d]
                        g_b += gd * step[d] * u[d]
                        g_drive[d] += gd * b
                        decay = exp(step[d] * a[d])
                        previous = zero if at_start else before[d]
                        g_log = gd * decay * previous
                        g_dt[d] += g_log * a[d]
                        gAn[d] += g_log * step[d]
                        gn[d] = zero if at_start else gd * decay
                    gB[part, s, pixel, k, n] = g_b
                    gC[part, s, pixel, k, n] = g_c
                gx_pixel = gx[s, pixel, c0 : c0 + size]
                gs, gb = g_skip[s, k, d0 : d0 + size], g_bias[s, k, d0 : d0 + size]
                for d in range(size):
                    gx_pixel[d] += g_drive[d] * step[d] + skip_k[d] * gy_pixel[d]
                    gs[d] += gy_pixel[d] * u[d]
                    g_dt[d] = (g_dt[d] + g_drive[d] * u[d]) * slope[j, d]
                    gb[d] += g_dt[d]
                if rank == 0:
                    g_low[0, s, pixel, k, d0 : d0 + size] = g_dt
                for r in range(rank):
                    row, g_row = weight[k, r, d0 : d0 + size], g_weight[s, k, r, d0 : d0 + size]
                    value, total = low[s, pixel, k, r], zero
                    for d in range(size):
                        total += g_dt[d] * row[d]
                        g_row[d] += g_dt[d] * value
                    g_low[part, s, pixel, k, r] = total


@dataclass
class Walk:
    """A scan over sequences that are stored pixel by pixel, channels last; see `scan_fwd_kernel` for the shapes."""

    x: Tensor
    low: Tensor
    weight: Tensor | None
    bias: Tensor | None
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor | None
    order: np.ndarray
    line: np.ndarray
    grouped: bool
    softplus: bool

    def __post_init__(self):
        k, n, d = self.A.shape
        self.dtype = state_dtype(self.x)
        self.sequences = self.x.shape[0]
        blocks = max(1, -(-d // _BLOCK))
        self.block = -(-d // blocks)
        self.blocks = -(-d // self.block)
        channel = np.arange(k) * d if self.grouped else np.zeros(k, np.int64)

        def array(t: Tensor | None, absent: tuple[int, ...]) -> np.ndarray:
            t = self.x.new_zeros(absent, dtype=self.dtype) if t is None else t
            return t.detach().to(self.dtype).contiguous().numpy()

        self.arrays = (
            array(self.x, ()),
            array(self.low, ()),
            array(self.weight, (k, 0, d)),
            array(self.bias, (k, d)),
            array(self.A, ()),
            array(self.B, ()),
            array(self.C, ()),
            array(self.skip, (k, d)),
            self.order,
            self.line,
            channel,
            self.softplus,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return self.x.new_zeros(shape, dtype=self.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Outputs (S, L, X) and the last states (S, K, N, D)."""
        y, last = self._zeros(*self.x.shape), self._zeros(self.sequences, *self.A.shape)
        run_tasks(
            scan_fwd_kernel, self.sequences * self.blocks, self.block, *self.arrays, y.numpy(), last.numpy()
        )
        return y, last

    def backward(self, gy: Tensor, g_last: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of x, low, weight, bias, A, B, C, skip, in the shapes of the forward's arrays."""
        k, n, d = self.A.shape
        rank = 0 if self.weight is None else self.weight.shape[1]
        per_block = (self.blocks, *self.B.shape)
        g_last = self._zeros(self.sequences, k, n, d) if g_last is None else g_last.to(self.dtype).contiguous()
        results = (
            self._zeros(*self.x.shape),
            self._zeros(self.blocks if rank else 1, *self.low.shape),
            self._zeros(self.sequences, k, rank, d),
            self._zeros(self.sequences, k, d),
            self._zeros(self.sequences, k, n, d),
            self._zeros(*per_block),
            self._zeros(*per_block),
            self._zeros(self.sequences, k, d),
        )
        run_tasks(
            scan_bwd_kernel,
            self.sequences * self.blocks,
            self.block,
            *self.arrays,
            gy.to(self.dtype).contiguous().numpy(),
            g_last.numpy(),
            *(t.numpy() for t in results),
        )
        return results[0], *(t.sum(0) for t in results[1:])


def _walk(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Walk:
    batch, channels, length = u.shape
    groups = 1 if B.dim() == 3 else B.shape[1]

    def by_group(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unflatten(0, (groups, -1))

    def projection(t: Tensor) -> Tensor:
        return (t.unsqueeze(1) if t.dim() == 3 else t).permute(0, 3, 1, 2)

    return Walk(
        x=u.transpose(1, 2),
        low=delta.transpose(1, 2).unflatten(2, (groups, -1)),
        weight=None,
        bias=by_group(delta_bias),
        A=by_group(A).transpose(1, 2),
        B=projection(B),
        C=projection(C),
        skip=by_group(D),
        order=np.broadcast_to(np.arange(length), (groups, length)).copy(),
        line=np.full(groups, length),
        grouped=True,
        softplus=delta_softplus,
    )


def _suits(B: Tensor, C: Tensor, channels: int) -> bool:
    """Whether B and C vary along the sequence in the same groups, wide enough for vector registers."""
    groups = [0 if t.dim() == 2 else 1 if t.dim() == 3 else t.shape[1] for t in (B, C)]
    return groups[0] == groups[1] != 0 and channels // groups[0] >= 8


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    if not _suits(B, C, u.shape[1]):
        return _torch.forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y, last = _walk(u, delta, A, B, C, D, delta_bias, delta_softplus).forward()
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype).contiguous(), last.transpose(2, 3).flatten(1, 2)


def backward(
    grads: list[Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    if not _suits(B, C, u.shape[1]):
        return _torch.backward(grads, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    walk = _walk(u, delta, A, B, C, D, delta_bias, delta_softplus)
    gy, g_z = grads[0].to(walk.dtype), None
    if z is not None:
        z_ = z.to(walk.dtype)
        gate = torch.sigmoid(z_)
        y, _ = walk.forward()
        g_z = gy * y.transpose(1, 2) * gate * (1 + z_ * (1 - gate))
        gy = gy * z_ * gate
    g_last = grads[1].unflatten(1, walk.A.shape[::2]).transpose(2, 3)
    gx, g_low, _, g_bias, gA, gB, gC, g_skip = walk.backward(gy.transpose(1, 2), g_last)

    def projection(g: Tensor, like: Tensor) -> Tensor:
        g = g.permute(0, 2, 3, 1)
        return g[:, 0] if like.dim() == 3 else g

    return (
        gx.transpose(1, 2),
        g_low.flatten(2).transpose(1, 2),
        gA.transpose(1, 2).flatten(0, 1),
        projection(gB, B),
        projection(gC, C),
        None if D is None else g_skip.flatten(),
        g_z,
        None if delta_bias is None else g_bias.flatten(),
    )
