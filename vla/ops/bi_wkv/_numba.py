"""Compiled CPU kernels for bi-WKV: tokens are walked in place, channels side by side in vector registers."""

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from .._checks import state_dtype
from .._numba import exp, jit, run_tasks
from . import released
from ._per_sequence import backward_per_sequence, forward_per_sequence

# Channels a task walks with, so that its states of all tokens stay in the second-level cache.
_BLOCK = 32
# Exponent of an empty sum: vanishes beside any other, finite so that differences are.
_NOTHING = -1e37


# Not reassociated: the difference of two exponents comes first, exact for close ones, then the small decay.
inline = register_jitable(fastmath={"contract", "nsz"}, error_model="numpy")

# Rows of a state: the exponent of the largest term when it was new, its age in tokens, and two sums over all terms,
# scaled by exp(-exponent). An exponent aged by subtracting w at every step would drift.
_KEY, _AGE, _FIRST, _SECOND = 0, 1, 2, 3


@inline
def _clear(state):
    state[_KEY] = _NOTHING
    state[_AGE:] = 0


@inline
def _absorb(state, w, key, first, second):
    """Ages a state by one token, and adds that token to it."""
    largest, age, first_sum, second_sum = state[_KEY], state[_AGE], state[_FIRST], state[_SECOND]
    one = key.dtype.type(1)
    for c in range(key.size):
        older = age[c] + one
        gap = (largest[c] - key[c]) - older * w[c]
        small = exp(-abs(gap))
        keep, add = (one, small) if gap > 0 else (small, one)
        largest[c] = largest[c] if gap > 0 else key[c]
        age[c] = older if gap > 0 else one - one
        first_sum[c] = keep * first_sum[c] + add * first[c]
        second_sum[c] = keep * second_sum[c] + add * second[c]


@inline
def _attend(past, future, w, u, k, v, y, denominator, top):
    """Output of one token, its denominator scaled by exp(-top), and top, from the states on both sides."""
    for c in range(k.size):
        left = (past[_KEY, c] - k[c]) - past[_AGE, c] * w[c]
        right = (future[_KEY, c] - k[c]) - future[_AGE, c] * w[c]
        above = max(max(left, right), u[c])
        top[c] = k[c] + above
        # Rounded together, so that the two still agree.
        above = top[c] - k[c]
        left, right, own = exp(left - above), exp(right - above), exp(u[c] - above)
        denominator[c] = left * past[_SECOND, c] + right * future[_SECOND, c] + own
        y[c] = (left * past[_FIRST, c] + right * future[_FIRST, c] + own * v[c]) / denominator[c]


@jit
def bi_wkv_fwd_kernel(task, block, w, u, k, v, y):
    """Outputs of one block of channels of one sequence. w, u (C,); k, v, y (B, T, C)."""
    _, length, channels = k.shape
    blocks = (channels + block - 1) // block
    s = task // blocks
    c0 = (task - s * blocks) * block
    c1 = min(c0 + block, channels)
    w, u, k, v, y = w[c0:c1], u[c0:c1], k[s, :, c0:c1], v[s, :, c0:c1], y[s, :, c0:c1]
    ones = np.ones(c1 - c0, k.dtype)
    denominator, top = np.empty(c1 - c0, k.dtype), np.empty(c1 - c0, k.dtype)
    past, state = np.empty((length, 4, c1 - c0), k.dtype), np.empty((4, c1 - c0), k.dtype)
    _clear(state)
    for t in range(length):
        past[t] = state
        _absorb(state, w, k[t], v[t], ones)
    _clear(state)
    for t in range(length - 1, -1, -1):
        _attend(past[t], state, w, u, k[t], v[t], y[t], denominator, top)
        _absorb(state, w, k[t], v[t], ones)


@inline
def _collect(grads, other, w, k, v, gw, gk, gv):
    """Adds what the tokens on one side, with the gradients `grads`, give to a token, with `other` on its other side."""
    for c in range(k.size):
        exponent = grads[_KEY, c] - grads[_AGE, c] * w[c]
        weight = exp(exponent + k[c])
        gv[c] += weight * grads[_FIRST, c]
        gk[c] += weight * (v[c] * grads[_FIRST, c] - grads[_SECOND, c])
        between = exp(exponent + other[_KEY, c] - (other[_AGE, c] + 1) * w[c])
        gw[c] -= between * (other[_FIRST, c] * grads[_FIRST, c] - other[_SECOND, c] * grads[_SECOND, c])


@jit
def bi_wkv_bwd_kernel(task, block, w, u, k, v, gy, gw, gu, gk, gv):
    """Gradients of one block of channels of one sequence. w, u (C,); k, v, gy, gk, gv (B, T, C); gw, gu (B, C)."""
    _, length, channels = k.shape
    blocks = (channels + block - 1) // block
    s = task // blocks
    c0 = (task - s * blocks) * block
    c1 = min(c0 + block, channels)
    size = c1 - c0
    w, u, gw, gu = w[c0:c1], u[c0:c1], gw[s, c0:c1], gu[s, c0:c1]
    k, v, gy, gk, gv = k[s, :, c0:c1], v[s, :, c0:c1], gy[s, :, c0:c1], gk[s, :, c0:c1], gv[s, :, c0:c1]
    ones, y = np.ones(size, k.dtype), np.empty(size, k.dtype)
    denominator, top = np.empty(size, k.dtype), np.empty(size, k.dtype)
    # The weight of a token at token t is exp(its exponent + key_t): transposed, the same scan over other values.
    key, first = np.empty((length, size), k.dtype), np.empty((length, size), k.dtype)
    second = np.empty((length, size), k.dtype)
    past, future = np.empty((length, 4, size), k.dtype), np.empty((length, 4, size), k.dtype)
    state, grads = np.empty((4, size), k.dtype), np.empty((4, size), k.dtype)

    _clear(state)
    for t in range(length - 1, -1, -1):
        future[t] = state
        _absorb(state, w, k[t], v[t], ones)

    _clear(state)
    _clear(grads)
    for t in range(length):
        past[t] = state
        _attend(state, future[t], w, u, k[t], v[t], y, denominator, top)
        for c in range(size):
            key[t, c] = -top[c]
            first[t, c] = gy[t, c] / denominator[c]
            second[t, c] = first[t, c] * y[c]
            own = exp(k[t, c] + u[c] - top[c]) * first[t, c]
            gv[t, c] = own
            gk[t, c] = own * (v[t, c] - y[c])
            gu[c] += gk[t, c]
        _collect(grads, future[t], w, k[t], v[t], gw, gk[t], gv[t])
        _absorb(state, w, k[t], v[t], ones)
        _absorb(grads, w, key[t], first[t], second[t])

    _clear(grads)
    for t in range(length - 1, -1, -1):
        _collect(grads, past[t], w, k[t], v[t], gw, gk[t], gv[t])
        _absorb(grads, w, key[t], first[t], second[t])


def _array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    return x.detach().to(dtype).contiguous().numpy()


@forward_per_sequence
def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None) -> Tensor:
    if official_split is not None:
        return released.forward(w, u, k, v, gate, official_split)
    dtype = state_dtype(w, u, k, v)
    y = k.new_empty(k.shape, dtype=dtype)
    tasks = k.shape[0] * -(-k.shape[2] // _BLOCK)
    run_tasks(bi_wkv_fwd_kernel, tasks, _BLOCK, *(_array(x, dtype) for x in (w, u, k, v)), y.numpy())
    if gate is not None:
        y *= gate.to(dtype).sigmoid()
    return y.to(v.dtype)


@backward_per_sequence
def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None
) -> list[Tensor | None]:
    if official_split is not None:
        return released.backward(grads, w, u, k, v, gate, official_split)
    dtype = state_dtype(w, u, k, v)
    gw, gu = (k.new_zeros(k.shape[0], k.shape[2], dtype=dtype) for _ in range(2))
    gk, gv = (k.new_empty(k.shape, dtype=dtype) for _ in range(2))
    tasks = k.shape[0] * -(-k.shape[2] // _BLOCK)
    k, v, gy, ggate = k.to(dtype), v.to(dtype), grads[0].to(dtype), None
    if gate is not None:
        gate = gate.to(dtype).sigmoid()
        ggate = gy * forward(w, u, k, v, None, None) * gate * (1 - gate)
        gy = gy * gate
    # Gradients see only differences `v_i - y_t`, formed as differences of sums: a common offset would cost digits.
    v = v - (k.softmax(1) * v).sum(1, keepdim=True)
    arrays = (_array(x, dtype) for x in (w, u, k, v, gy))
    run_tasks(bi_wkv_bwd_kernel, tasks, _BLOCK, *arrays, *(x.numpy() for x in (gw, gu, gk, gv)))
    return [gw.sum(0), gu.sum(0), gk, gv, ggate]
