"""Compiled CPU kernels: sequences are walked in place, channels side by side in vector registers."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .._numba import exp, inline, jit, run_tasks, softplus
from . import _torch

# Channels a task walks with: their states and time steps stay in the first-level cache.
_BLOCK = 48
# Steps between the states that the backward keeps; those between are recomputed.
_SEGMENT = 32


@inline
def _biased_time_step(low, weight, bias, d0, dt):
    """Time step of one pixel and direction before softplus: expanded from its low rank where there is a weight."""
    if weight.shape[0] == 0:
        full = low[d0 : d0 + dt.size]
        for d in range(dt.size):
            dt[d] = full[d] + bias[d]
    else:
        dt[:] = bias
        for r in range(weight.shape[0]):
            value, row = low[r], weight[r]
            for d in range(dt.size):
                dt[d] += value * row[d]


@jit
def scan_fwd_kernel(task, block, x, low, weight, bias, A, B, C, skip, order, fresh, channel, softplus_on, y, last):
    """Adds the outputs of one block of channels of one sequence to `y`.

    x, y (S, L, X); low (S, L, K, R), or (S, L, K, D) where weight is empty; weight (K, R, D); bias, skip (K, D);
    A (K, N, D); B, C (S, L, K, N); order (K, L) pixel of each step; fresh (K, L) whether the state starts again at it;
    channel (K,) first channel of x that a direction reads; last (S, K, N, D) state after the last step.
    """
    directions, states, width = A.shape
    blocks = (width + block - 1) // block
    s = task // blocks
    d0 = (task - s * blocks) * block
    size = min(block, width - d0)
    dt, drive, out = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
    h = np.empty((states, size), x.dtype)
    for k in range(directions):
        weight_k, bias_k = weight[k, :, d0 : d0 + size].copy(), bias[k, d0 : d0 + size].copy()
        a, skip_k = A[k, :, d0 : d0 + size].copy(), skip[k, d0 : d0 + size].copy()
        c0 = channel[k] + d0
        for i in range(order.shape[1]):
            pixel = order[k, i]
            if fresh[k, i]:
                h[:] = 0
            _biased_time_step(low[s, pixel, k], weight_k, bias_k, d0, dt)
            if softplus_on:
                for d in range(size):
                    dt[d] = softplus(dt[d])
            u = x[s, pixel, c0 : c0 + size]
            for d in range(size):
                drive[d] = dt[d] * u[d]
                out[d] = skip_k[d] * u[d]
            for n in range(states):
                b, c = B[s, pixel, k, n], C[s, pixel, k, n]
                an, hn = a[n], h[n]
                for d in range(size):
                    hn[d] = exp(dt[d] * an[d]) * hn[d] + drive[d] * b
                    out[d] += hn[d] * c
            y_pixel = y[s, pixel, c0 : c0 + size]
            for d in range(size):
                y_pixel[d] += out[d]
        last[s, k, :, d0 : d0 + size] = h


@inline
def _run_segment(
    segment, s, k, d0, c0, x, low, weight, bias, a, B, order, fresh, softplus_on, dt, slope, drive, h
):  # fmt: skip
    """States after every step of a segment into h[1:], from the one that enters it in h[0]; h (steps + 1, N, D).

    Also the time steps, their derivative with respect to the biased ones, and dt * x.
    """
    first = segment * _SEGMENT
    one = x.dtype.type(1)
    size = dt.shape[1]
    for j in range(min(_SEGMENT, order.shape[1] - first)):
        pixel = order[k, first + j]
        step, slope_j, drive_j = dt[j], slope[j], drive[j]
        _biased_time_step(low[s, pixel, k], weight, bias, d0, step)
        if softplus_on:
            for d in range(size):
                slope_j[d] = one / (one + exp(-step[d]))
            for d in range(size):
                step[d] = softplus(step[d])
        else:
            slope_j[:] = one
        u = x[s, pixel, c0 : c0 + size]
        for d in range(size):
            drive_j[d] = step[d] * u[d]
        keep = x.dtype.type(0) if fresh[k, first + j] else one
        for n in range(a.shape[0]):
            b = B[s, pixel, k, n]
            an, before, after = a[n], h[j, n], h[j + 1, n]
            for d in range(size):
                after[d] = keep * exp(step[d] * an[d]) * before[d] + drive_j[d] * b


@jit
def scan_bwd_kernel(
    task, block, x, low, weight, bias, A, B, C, skip, order, fresh, channel, softplus_on,
    gy, g_last, gx, g_delta, g_bias, gA, gB, gC, g_skip,
):  # fmt: skip
    """Gradients that come from one block of channels of one sequence; shapes as in the forward.

    So that no two tasks write to one place, parameters' gradients have a leading axis of sequences, and those of B and
    C, which sum over channels, a leading axis of channel blocks. g_delta (S, L, K, D) is for the expanded time step.
    """
    directions, states, width = A.shape
    length = order.shape[1]
    blocks = (width + block - 1) // block
    s = task // blocks
    part = task - s * blocks
    d0 = part * block
    size = min(block, width - d0)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    segments = (length + _SEGMENT - 1) // _SEGMENT
    entering = np.empty((segments, states, size), x.dtype)
    h = np.empty((_SEGMENT + 1, states, size), x.dtype)
    dt, slope = np.empty((_SEGMENT, size), x.dtype), np.empty((_SEGMENT, size), x.dtype)
    drive = np.empty((_SEGMENT, size), x.dtype)
    g, gA_k = np.empty((states, size), x.dtype), np.empty((states, size), x.dtype)
    gh, g_log = np.empty(size, x.dtype), np.empty(size, x.dtype)
    g_dt, g_drive = np.empty(size, x.dtype), np.empty(size, x.dtype)
    for k in range(directions):
        weight_k, bias_k = weight[k, :, d0 : d0 + size].copy(), bias[k, d0 : d0 + size].copy()
        a, skip_k = A[k, :, d0 : d0 + size].copy(), skip[k, d0 : d0 + size].copy()
        c0 = channel[k] + d0
        g_bias_k, g_skip_k = np.zeros_like(bias_k), np.zeros_like(skip_k)
        gA_k[:] = 0

        # Forward over all segments, keeping the state that enters each.
        entering[0] = 0
        for segment in range(segments - 1):
            h[0] = entering[segment]
            _run_segment(
                segment, s, k, d0, c0, x, low, weight_k, bias_k, a, B, order, fresh, softplus_on, dt, slope, drive, h
            )
            entering[segment + 1] = h[_SEGMENT]

        g[:] = g_last[s, k, :, d0 : d0 + size]
        for segment in range(segments - 1, -1, -1):
            h[0] = entering[segment]
            _run_segment(
                segment, s, k, d0, c0, x, low, weight_k, bias_k, a, B, order, fresh, softplus_on, dt, slope, drive, h
            )
            first = segment * _SEGMENT
            for j in range(min(_SEGMENT, length - first) - 1, -1, -1):
                pixel = order[k, first + j]
                keep = zero if fresh[k, first + j] else one
                step, u, gy_pixel = dt[j], x[s, pixel, c0 : c0 + size], gy[s, pixel, c0 : c0 + size]
                g_dt[:] = 0
                g_drive[:] = 0
                # One array is written in each loop: with more, the checks that they don't overlap prevent vector code.
                for n in range(states):
                    b, c = B[s, pixel, k, n], C[s, pixel, k, n]
                    an, gn, gA_n = a[n], g[n], gA_k[n]
                    before, after, drive_j = h[j, n], h[j + 1, n], drive[j]
                    g_b, g_c = zero, zero
                    for d in range(size):
                        gh[d] = gn[d] + c * gy_pixel[d]
                    for d in range(size):
                        g_c += gy_pixel[d] * after[d]
                        g_b += gh[d] * drive_j[d]
                    for d in range(size):
                        g_drive[d] += gh[d] * b
                    for d in range(size):
                        gn[d] = keep * gh[d] * exp(step[d] * an[d])
                    for d in range(size):
                        g_log[d] = gn[d] * before[d]
                    for d in range(size):
                        g_dt[d] += g_log[d] * an[d]
                    for d in range(size):
                        gA_n[d] += g_log[d] * step[d]
                    gB[part, s, pixel, k, n] = g_b
                    gC[part, s, pixel, k, n] = g_c
                slope_j, gx_pixel = slope[j], gx[s, pixel, c0 : c0 + size]
                for d in range(size):
                    gx_pixel[d] += g_drive[d] * step[d] + skip_k[d] * gy_pixel[d]
                for d in range(size):
                    g_skip_k[d] += gy_pixel[d] * u[d]
                for d in range(size):
                    g_dt[d] = (g_dt[d] + g_drive[d] * u[d]) * slope_j[d]
                for d in range(size):
                    g_bias_k[d] += g_dt[d]
                g_delta[s, pixel, k, d0 : d0 + size] = g_dt
        gA[s, k, :, d0 : d0 + size] = gA_k
        g_bias[s, k, d0 : d0 + size] = g_bias_k
        g_skip[s, k, d0 : d0 + size] = g_skip_k


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
    fresh: np.ndarray
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
            self.fresh,
            channel,
            self.softplus,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return self.x.new_zeros(shape, dtype=self.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Outputs (S, L, X) and the last states (S, K, N, D)."""
        y, last = self._zeros(*self.x.shape), self._zeros(self.sequences, *self.A.shape)
        run_tasks(scan_fwd_kernel, self.sequences * self.blocks, self.block, *self.arrays, y.numpy(), last.numpy())
        return y, last

    def backward(self, gy: Tensor, g_last: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of x, low, weight, bias, A, B, C, skip, in the shapes of the forward's arrays."""
        k, n, d = self.A.shape
        per_block = (self.blocks, *self.B.shape)
        g_last = self._zeros(self.sequences, k, n, d) if g_last is None else g_last.to(self.dtype).contiguous()
        gx, g_delta = self._zeros(*self.x.shape), self._zeros(*self.low.shape[:3], d)
        g_bias, gA, g_skip = (self._zeros(self.sequences, *shape) for shape in ((k, d), (k, n, d), (k, d)))
        gB, gC = self._zeros(*per_block), self._zeros(*per_block)
        results = (gx, g_delta, g_bias, gA, gB, gC, g_skip)
        run_tasks(
            scan_bwd_kernel,
            self.sequences * self.blocks,
            self.block,
            *self.arrays,
            gy.to(self.dtype).contiguous().numpy(),
            g_last.numpy(),
            *(t.numpy() for t in results),
        )
        g_bias, gA, gB, gC, g_skip = (t.sum(0) for t in results[2:])
        if self.weight is None:
            return gx, g_delta, None, g_bias, gA, gB, gC, g_skip
        g_low = torch.einsum("slkd,krd->slkr", g_delta, self.weight.to(self.dtype))
        g_weight = torch.einsum("slkd,slkr->krd", g_delta, self.low.to(self.dtype))
        return gx, g_low, g_weight, g_bias, gA, gB, gC, g_skip


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
        fresh=np.broadcast_to(np.arange(length) == 0, (groups, length)).copy(),
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
    return y.to(u.dtype).contiguous(), last.transpose(2, 3).flatten(1, 2).contiguous()


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
