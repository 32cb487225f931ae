"""Triton kernels of the directional scan: every direction walks the map in place, see the README for the design."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LN2, LOG2E, compose, pick, settle, softplus2


@triton.jit
def _compose_exclusive(decay1, state1, before1, out1, decay2, state2, before2, out2):
    """Composition of two runs of steps that also keeps the run without its last step (`before`, `out`)."""
    return decay1 * decay2, decay2 * state1 + state2, decay1 * before2, before2 * state1 + out2


@triton.jit
def _enter_segments(decays, states, carry, S: tl.constexpr, REVERSE: tl.constexpr):
    """From what each of S segments does to a state, (S, D), and the state `carry` (D,) before all of them.

    Returns:
        The states that enter the segments, (S, D), and the one that leaves the last, (D,).
    """
    s = tl.arange(0, S)[:, None]
    if S > 1:
        one, zero = tl.full(states.shape, 1.0, tl.float32), tl.zeros_like(states)
        decays, states, before, out = tl.associative_scan(
            (decays, states, one, zero), 0, _compose_exclusive, reverse=REVERSE
        )
        entry = out + before * carry[None, :]
    else:
        entry = tl.broadcast_to(carry[None, :], states.shape)
    end: tl.constexpr = 0 if REVERSE else S - 1
    return entry, pick(states, s, end) + pick(decays, s, end) * carry


@triton.jit
def _scan(decay, step, carry, T: tl.constexpr, S: tl.constexpr):
    """`h = decay h + step` over a (T, S, D) tile of S segments of T steps, from the state `carry` (D,).

    Segments are walked side by side, each by threads that own it: only their ends meet across threads.

    Returns:
        h (T, S, D) and the state after the tile (D,).
    """
    decay, h = tl.associative_scan((decay, step), 0, compose)
    t = tl.arange(0, T)[:, None, None]
    entry, left = _enter_segments(pick(decay, t, T - 1), pick(h, t, T - 1), carry, S, False)
    return h + decay * entry[None, :, :], left


@triton.jit
def _scan_exclusive(decay, step, carry, T: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr):
    """Like `_scan`, but the state before each step; with REVERSE from the last step to the first.

    A reversed `tl.associative_scan` turns every warp's values around; turning a thread's own registers is free.
    """
    if REVERSE:
        decay, step = tl.flip(decay, 0), tl.flip(step, 0)
    one, zero = tl.full(decay.shape, 1.0, tl.float32), tl.zeros_like(decay)
    decay, state, before, out = tl.associative_scan((decay, step, one, zero), 0, _compose_exclusive)
    t = tl.arange(0, T)[:, None, None]
    entry, left = _enter_segments(pick(decay, t, T - 1), pick(state, t, T - 1), carry, S, REVERSE)
    out += before * entry[None, :, :]
    return tl.flip(out, 0) if REVERSE else out, left


@triton.jit
def _pixels(o, start, length, first_line, height, width, column_major, flip):
    """Row-major numbers of the pixels at the steps `start + o` of a direction."""
    inner = tl.where(column_major, height, width)
    sign = 1 - 2 * flip
    at = flip * (length - 1) + sign * start
    j = at % inner + sign * o
    # A quotient in float32 is exact here: the numerator is below the length of a line plus a chunk.
    i = tl.floor((j.to(tl.float32) + 0.5) * (1.0 / inner.to(tl.float32))).to(tl.int32)
    j -= i * inner
    i += at // inner + first_line
    return tl.where(column_major, j * width + i, i * width + j)


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD: tl.constexpr):
    """The time step's weight (R, D) and bias (D,) of direction k, times log2(e)."""
    r = tl.arange(0, R_PAD if R_PAD > 0 else 1)
    bias = tl.zeros(d.shape, tl.float32)
    weight = tl.zeros((r.shape[0], d.shape[0]), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32) * LOG2E
    if R_PAD > 0:
        weight_mask = (r < R)[:, None] & d_mask[None, :]
        rows = (k * channels + d) * R
        weight = tl.load(weight_ptr + rows[None, :] + r[:, None], mask=weight_mask, other=0.0).to(tl.float32) * LOG2E
    return weight, bias


@triton.jit
def _time_step(
    dt_ptr, at, mask, d, d_mask, weight, bias, dt_s, R,
    T: tl.constexpr, S: tl.constexpr, R_PAD: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Time steps before and after softplus, times log2(e), (T, S, D)."""
    if R_PAD > 0:
        r = tl.arange(0, R_PAD)
        low_mask = mask[:, None] & (r < R)[None, :]
        low = tl.load(dt_ptr + at[:, None] + r[None, :] * dt_s, mask=low_mask, other=0.0)  # (T * S, R)
        step = tl.dot(low.to(tl.float32), weight, input_precision=PRECISION)
    else:
        low_mask = mask[:, None] & d_mask[None, :]
        low = tl.load(dt_ptr + at[:, None] + d[None, :] * dt_s, mask=low_mask, other=0.0)  # (T * S, D)
        step = low.to(tl.float32) * LOG2E
    step = settle(tl.reshape(step, (T, S, bias.shape[0]))) + bias[None, None, :]
    return step, softplus2(step) if SOFTPLUS else step


@triton.jit
def _load_column(ptr, at, mask, T: tl.constexpr, S: tl.constexpr):
    """One number a pixel, (T, S, 1)."""
    return tl.reshape(tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32), (T, S))[:, :, None]


@triton.jit
def scan2d_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, partial_ptr, y_ptr,
    begin, end, K, flips, columns, height, width, channels, R, blocks, sequences, chunks,
    xs_b, xs_d, xs_p, ps_b, ps_k, ps_p, dt_s, B_s, C_s, ys_b, ys_d, ys_p,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of a picture (or, with PER_LINE, of its i-th lines), through directions in turn."""
    block = tl.program_id(0) % blocks
    sequence = tl.program_id(0) // blocks
    b = (sequence // sequences).to(tl.int64)
    x_ptr += b * xs_b
    y_ptr += b * ys_b
    partial_ptr += b * ys_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b
    C_ptr += b * ps_b

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    n_index = tl.arange(0, N_PAD)[:, None]
    # Rows of a tile are (t, s) for step t of segment s: neighbouring rows are in different lanes and warps, so that a
    # segment stays in one thread.
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    if GROUPED:
        begin = tl.program_id(1)
        end = begin + 1
    for k in range(begin, end):
        column_major = (columns >> k) & 1 == 1
        flip = (flips >> k) & 1
        first_line = 0
        length = height * width
        if PER_LINE:
            first_line = sequence % sequences
            inner = tl.where(column_major, height, width)
            length = tl.where(first_line * inner < length, inner, 0)

        weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
        skip = tl.zeros((BLOCK_D,), tl.float32)
        if D_ptr is not None:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        # The width of a thread's loads decides how many lanes the channels of a pixel take.
        vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
        carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        # Loads of the next chunk under way would take registers, which are what is short.
        for chunk in tl.range(0, chunks, num_stages=1):
            start = chunk * (T * S)
            mask = start + o < length
            full_mask = mask[:, None] & d_mask[None, :]
            pixel = _pixels(o, start, length, first_line, height, width, column_major, flip)
            if WIDE:
                pixel = pixel.to(tl.int64)
            p_at = pixel * ps_p
            y_at = (pixel * ys_p)[:, None] + (vector * ys_d)[None, :]
            x = tl.load(
                x_ptr + (pixel * xs_p)[:, None] + (vector * xs_d)[None, :], mask=full_mask, other=0.0
            )  # (T * S, D)
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            _, step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            y = skip[None, None, :] * x
            for n in range(N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                c_n = _load_column(C_ptr + k * ps_k + n * C_s, p_at, mask, T, S)
                entry = pick(carry, n_index, n)
                h, left = _scan(tl.exp2(A[None, None, :] * step), step * (b_n * x), entry, T, S)
                carry = tl.where(n_index == n, left[None, :], carry)
                y += (c_n * LN2) * h

            y = tl.reshape(y, (T * S, BLOCK_D))
            if not GROUPED and k > 0:
                y += tl.load(partial_ptr + y_at, mask=full_mask, other=0.0)  # (T * S, D)
            if GROUPED or k == K - 1:
                tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=full_mask)
            else:
                tl.store(partial_ptr + y_at, y, mask=full_mask)
        # The next direction reads what other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def scan2d_states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, weight_ptr, bias_ptr, state_ptr,
    begin, end, K, flips, columns, height, width, channels, R, blocks, sequences, chunks,
    xs_b, xs_d, xs_p, ps_b, ps_k, ps_p, dt_s, B_s,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The states with which one direction enters its chunks, for BLOCK_D channels of a picture."""
    block = tl.program_id(0) % blocks
    sequence = tl.program_id(0) // blocks
    k = begin + tl.program_id(1)
    b = (sequence // sequences).to(tl.int64)
    x_ptr += b * xs_b
    dt_ptr += b * ps_b + k * ps_k
    B_ptr += b * ps_b + k * ps_k

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
    n_index = tl.arange(0, N_PAD)[:, None]
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    column_major = (columns >> k) & 1 == 1
    flip = (flips >> k) & 1
    first_line = 0
    length = height * width
    if PER_LINE:
        first_line = sequence % sequences
        inner = tl.where(column_major, height, width)
        length = tl.where(first_line * inner < length, inner, 0)

    weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
    state_ptr += (tl.program_id(0) * K + k).to(tl.int64) * chunks * N * BLOCK_D
    state_at = n_index * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
    tl.store(state_ptr + state_at, carry, mask=n_index < N)
    for chunk in tl.range(0, chunks - 1, num_stages=1):
        start = chunk * (T * S)
        mask = start + o < length
        pixel = _pixels(o, start, length, first_line, height, width, column_major, flip)
        if WIDE:
            pixel = pixel.to(tl.int64)
        p_at = pixel * ps_p
        x_at = (pixel * xs_p)[:, None] + (vector * xs_d)[None, :]
        x = tl.load(x_ptr + x_at, mask=mask[:, None] & d_mask[None, :], other=0.0)  # (T * S, D)
        x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
        _, step = _time_step(
            dt_ptr, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
        )  # fmt: skip
        for n in range(N):
            A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
            b_n = _load_column(B_ptr + n * B_s, p_at, mask, T, S)
            entry = pick(carry, n_index, n)
            _, left = _scan(tl.exp2(A[None, None, :] * step), step * (b_n * x), entry, T, S)
            carry = tl.where(n_index == n, left[None, :], carry)
        tl.store(state_ptr + (chunk + 1) * N * BLOCK_D + state_at, carry, mask=n_index < N)


@triton.jit
def scan2d_bwd_kernel(
    gy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, partial_ptr, state_ptr,
    gx_ptr, g_dt_ptr, g_BC_ptr, g_A_ptr, g_D_ptr, g_weight_ptr, g_bias_ptr,
    begin, end, K, flips, columns, height, width, channels, R, blocks, sequences, chunks,
    gs_b, gs_d, gs_p, xs_b, xs_d, xs_p, ps_b, ps_k, ps_p, dt_s, B_s, C_s, os_b, os_d, os_p, ls_block, ls_k, qs_block,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_D channels of a picture through directions in turn: of x summed over directions, of the
    projections by block of channels, of the parameters by sequence."""
    block = tl.program_id(0) % blocks
    sequence = tl.program_id(0) // blocks
    b = (sequence // sequences).to(tl.int64)
    gy_ptr += b * gs_b
    x_ptr += b * xs_b
    gx_ptr += b * os_b
    partial_ptr += b * os_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b
    C_ptr += b * ps_b
    # Gradients of dt, and of B and C side by side, are (blocks, B, H, W, K, -1).
    g_dt_ptr += block.to(tl.int64) * ls_block + b * height * width * K * ls_k
    g_BC_ptr += block.to(tl.int64) * qs_block + b * height * width * K * (2 * N)

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    n_index = tl.arange(0, N_PAD)[:, None]
    r = tl.arange(0, R_PAD if R_PAD > 0 else 1)
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    state_ptr += tl.program_id(0).to(tl.int64) * K * chunks * N * BLOCK_D
    if GROUPED:
        begin = tl.program_id(1)
        end = begin + 1
    for k in range(begin, end):
        column_major = (columns >> k) & 1 == 1
        flip = (flips >> k) & 1
        first_line = 0
        length = height * width
        if PER_LINE:
            first_line = sequence % sequences
            inner = tl.where(column_major, height, width)
            length = tl.where(first_line * inner < length, inner, 0)

        weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
        skip = tl.zeros((BLOCK_D,), tl.float32)
        if D_ptr is not None:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)

        handed = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        # Sums over steps wait in each thread's own place, (S, D), until the walk is over.
        g_A = tl.zeros((N_PAD, S, BLOCK_D), tl.float32)
        g_skip = tl.zeros((S, BLOCK_D), tl.float32)
        g_bias = tl.zeros((S, BLOCK_D), tl.float32)
        g_weight = tl.zeros((BLOCK_D, r.shape[0]), tl.float32)
        for back in tl.range(0, chunks, num_stages=1):
            chunk = chunks - 1 - back
            start = chunk * (T * S)
            mask = start + o < length
            full_mask = mask[:, None] & d_mask[None, :]
            pixel = _pixels(o, start, length, first_line, height, width, column_major, flip)
            if WIDE:
                pixel = pixel.to(tl.int64)
            p_at = pixel * ps_p
            gy = tl.load(
                gy_ptr + (pixel * gs_p)[:, None] + (vector * gs_d)[None, :], mask=full_mask, other=0.0
            )  # (T * S, D)
            x = tl.load(
                x_ptr + (pixel * xs_p)[:, None] + (vector * xs_d)[None, :], mask=full_mask, other=0.0
            )  # (T * S, D)
            gy = tl.reshape(gy.to(tl.float32), (T, S, BLOCK_D))
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            before, step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            g_BC_at = g_BC_ptr + (pixel * K + k) * (2 * N)
            gx = skip[None, None, :] * gy
            g_skip += tl.sum(gy * x, axis=0)
            g_step = tl.zeros_like(step)
            for n in range(N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                c_n = _load_column(C_ptr + k * ps_k + n * C_s, p_at, mask, T, S) * LN2
                entry = tl.load(state_ptr + ((k * chunks + chunk) * N + n) * BLOCK_D + tl.arange(0, BLOCK_D))  # (D,)
                decay = tl.exp2(A[None, None, :] * step)
                added = step * (b_n * x)
                h, _ = _scan_exclusive(decay, added, entry, T, S, False)
                # Not the difference of h and what was added: that has no digits left of a strongly decayed state.
                kept = decay * h
                g_c = tl.reshape(tl.sum(gy * (kept + added), axis=2), (T * S,)) * LN2
                tl.store(g_BC_at + N + n, g_c, mask=mask)
                # What a step hands on is its decay times its gradient.
                g, left = _scan_exclusive(decay, decay * (c_n * gy), pick(handed, n_index, n), T, S, True)
                handed = tl.where(n_index == n, left[None, :], handed)
                g += c_n * gy
                kept *= g
                g_step += g * (b_n * x) + (A * LN2)[None, None, :] * kept
                g_a = tl.sum(kept * step, axis=0)[None, :, :]
                g_A += g_a if N == 1 else tl.where(n_index[:, :, None] == n, g_a, 0.0)
                g *= step
                gx += g * b_n
                g_b = tl.reshape(tl.sum(g * x, axis=2), (T * S,))
                tl.store(g_BC_at + n, g_b, mask=mask)

            if SOFTPLUS:
                g_step *= tl.exp2(before - step)
            g_step = tl.where(tl.reshape(full_mask, (T, S, BLOCK_D)), g_step * LOG2E, 0.0)
            g_bias += tl.sum(g_step, axis=0)
            g_step = tl.reshape(g_step, (T * S, BLOCK_D))
            g_dt_at = g_dt_ptr + (pixel * K + k)[:, None] * ls_k
            if R_PAD > 0:
                low_mask = mask[:, None] & (r < R)[None, :]
                low = tl.load(dt_ptr + k * ps_k + p_at[:, None] + r[None, :] * dt_s, mask=low_mask, other=0.0)
                g_low = tl.dot(g_step, tl.trans(weight), input_precision=PRECISION) * LN2  # (T * S, R)
                tl.store(g_dt_at + r[None, :], g_low, mask=low_mask)
                g_weight += tl.dot(tl.trans(g_step), low.to(tl.float32), input_precision=PRECISION)
            else:
                tl.store(g_dt_at + d[None, :], g_step, mask=full_mask)

            gx = tl.reshape(gx, (T * S, BLOCK_D))
            gx_at = (pixel * os_p)[:, None] + (vector * os_d)[None, :]
            if not GROUPED and k > 0:
                gx += tl.load(partial_ptr + gx_at, mask=full_mask, other=0.0)  # (T * S, D)
            if GROUPED or k == K - 1:
                tl.store(gx_ptr + gx_at, gx.to(gx_ptr.dtype.element_ty), mask=full_mask)
            else:
                tl.store(partial_ptr + gx_at, gx, mask=full_mask)

        parameters = (sequence * K + k).to(tl.int64) * channels + d  # (D,)
        g_A_at = g_A_ptr + parameters[None, :] * N + n_index
        tl.store(g_A_at, tl.sum(g_A, axis=1) * LN2, mask=(n_index < N) & d_mask[None, :])
        if D_ptr is not None:
            tl.store(g_D_ptr + parameters, tl.sum(g_skip, axis=0), mask=d_mask)
        if bias_ptr is not None:
            tl.store(g_bias_ptr + parameters, tl.sum(g_bias, axis=0), mask=d_mask)
        if R_PAD > 0:
            weight_mask = d_mask[:, None] & (r < R)[None, :]
            tl.store(g_weight_ptr + parameters[:, None] * R + r[None, :], g_weight, mask=weight_mask)
        # The next direction reads sums that other threads of this program have written.
        tl.debug_barrier()


class Config(NamedTuple):
    """How a kernel cuts its work.

    Args:
        T: Steps of a segment, which a thread walks alone.
        BLOCK_D: Channels of a tile.
        VECTOR: Neighbouring channels of a thread.
        num_warps: Warps of a program.
        maxnreg: Limit of a thread's registers, for more programs on a multiprocessor.
    """

    T: int
    BLOCK_D: int
    VECTOR: int
    num_warps: int
    maxnreg: int | None = None

    @property
    def S(self) -> int:
        """Segments of a tile: one for each place in which a thread can be, after the channels have been dealt out."""
        return max(1, 32 * self.num_warps * self.VECTOR // self.BLOCK_D)


def _programs(problem: "_Problem") -> int:
    """Programs of 32 channels each."""
    return problem.batch * problem.sequences * triton.cdiv(problem.channels, 32)


def _fwd_config(problem: "_Problem") -> Config:
    # As measured on an H200: with enough programs to fill it, one warp each needs no barriers.
    if _programs(problem) >= 1024:
        return Config(4, 32, 4, 1)
    return Config(8, 32, 2, 4, maxnreg=128)


def _bwd_config(problem: "_Problem") -> Config:
    if _programs(problem) < 256:
        return Config(8, 32, 2, 4)
    return Config(8, 32, 2, 2) if problem.channels <= 128 else Config(4, 64, 4, 2)


def _flat(map: Tensor) -> Tensor:
    """A map (..., H, W) whose pixels are equally far apart, copied if they were not."""
    height, width = map.shape[-2:]
    if height == 1 or map.stride(-2) == width * map.stride(-1):
        return map
    return map.contiguous(memory_format=torch.channels_last) if map.ndim == 4 else map.contiguous()


def _packed(*maps: Tensor) -> list[Tensor]:
    """Flat maps (B, K, E, H, W) that differ in their strides of E only, as views of one projection do."""
    if len({(m.stride(0), m.stride(1), m.stride(4)) for m in maps}) == 1 and all(_flat(m) is m for m in maps):
        return list(maps)
    sizes = [m.shape[2] for m in maps]
    joined = torch.cat([m.permute(0, 3, 4, 1, 2) for m in maps], dim=-1)
    return list(joined.permute(0, 3, 4, 1, 2).split(sizes, dim=2))


def _reach(*tensors: Tensor) -> int:
    """Elements between the first and the last of a picture's, in the widest of some maps (B, ..., H, W)."""
    return max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)


class _Problem:
    """What forward and backward launches have in common."""

    def __init__(self, x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line):
        self.x = _flat(x)
        self.dt, self.B, self.C = _packed(dt, B, C)
        self.A, self.D, self.weight, self.bias = (
            None if t is None else t.contiguous() for t in (A, D, dt_weight, dt_bias)
        )
        self.directions, self.grouped = directions, grouped
        self.batch, _, self.height, self.width = x.shape
        _, self.channels, self.states = A.shape
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        # Sequences of a picture, and the length of the longest.
        self.sequences, self.length = 1, self.height * self.width
        if per_line:
            self.sequences = self.length = max(self.height, self.width)
        # A program walks all directions of a picture's channels in turn, but lines of two axes cross each other.
        count = len(directions)
        crossing = per_line and not grouped and len({direction.startswith("col") for direction in directions}) == 2
        self.launches = [(k, k + 1) for k in range(count)] if crossing else [(0, count)]
        flips = sum(1 << k for k, direction in enumerate(directions) if direction.endswith("rev"))
        columns = sum(1 << k for k, direction in enumerate(directions) if direction.startswith("col"))
        self.codes = (flips, columns)
        self.constants = dict(
            N=self.states,
            N_PAD=triton.next_power_of_2(self.states),
            R_PAD=max(16, triton.next_power_of_2(self.rank)) if self.rank else 0,
            GROUPED=grouped,
            PER_LINE=per_line,
            SOFTPLUS=delta_softplus,
            PRECISION="tf32x3" if torch.float32 in (x.dtype, dt.dtype) else "tf32",
        )

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.dt, self.A, self.B, self.C, self.D, self.weight, self.bias

    def strides(self) -> tuple[int, ...]:
        """Of batch, direction and pixel of dt, B and C, and of their last dimensions."""
        b, k, r, _, p = self.dt.stride()
        return b, k, p, r, self.B.stride(2), self.C.stride(2)

    def sums(self, result: Tensor) -> Tensor:
        """Where sums over directions grow: float32 memory laid out like the result, or the result itself."""
        alone = len(self.directions) == 1 or self.grouped or result.dtype == torch.float32
        return result if alone else torch.empty_like(result, dtype=torch.float32)

    def launch(
        self,
        kernel: triton.JITFunction,
        config: Config,
        tensors: tuple[Tensor | None, ...],
        strides: tuple[int, ...],
        maps: tuple[Tensor, ...],
        independent: bool = False,
    ) -> None:
        """All launches of a kernel over (sequences x blocks of channels), and directions if they are independent."""
        blocks = triton.cdiv(self.channels, config.BLOCK_D)
        count = len(self.directions)
        independent = independent or self.grouped
        grid = (self.batch * self.sequences * blocks, count if independent else 1)
        chunks = triton.cdiv(self.length, config.T * config.S)
        wide = _reach(self.dt, self.B, self.C, *maps) >= 2**31
        options = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
        for begin, end in [(0, count)] if independent else self.launches:
            kernel[grid](
                *tensors, begin, end, count, *self.codes, self.height, self.width, self.channels, self.rank, blocks,
                self.sequences, chunks, *strides,
                T=config.T, S=config.S, BLOCK_D=config.BLOCK_D, VECTOR=config.VECTOR,
                WIDE=wide, num_warps=config.num_warps, **self.constants, **options,
            )  # fmt: skip


def _map_strides(map: Tensor) -> tuple[int, int, int]:
    """Of batch, channel and pixel."""
    b, d, _, p = map.stride()
    return b, d, p


def forward(*args) -> Tensor:
    y = torch.empty_like(args[0])
    if y.numel() == 0:
        return y
    problem = _Problem(*args)
    x, out = problem.x, _flat(y)
    config = _fwd_config(problem)
    tensors = (x, *problem.parameters(), problem.sums(out), out)
    strides = (*_map_strides(x), *problem.strides(), *_map_strides(out))
    problem.launch(scan2d_fwd_kernel, config, tensors, strides, (x, out))
    return y if out is y else y.copy_(out)


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    x, dt, A, B, C, directions, D, dt_weight, dt_bias = args[:9]
    if x.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, dt, A, B, C, D, dt_weight, dt_bias)]
    problem = _Problem(*args)
    x, gy = problem.x, _flat(grads[0])
    gx = _flat(torch.empty_like(x))
    config = _bwd_config(problem)
    blocks = triton.cdiv(problem.channels, config.BLOCK_D)
    chunks = triton.cdiv(problem.length, config.T * config.S)
    count, states, channels, rank = len(directions), problem.states, problem.channels, dt.shape[2]
    picture = (problem.batch, problem.height, problem.width, count)
    sequences = problem.batch * problem.sequences

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    # Every block of channels adds to the gradients that the channels share, every sequence to those of the parameters.
    g_dt = new(1 if dt_weight is None else blocks, *picture, rank)
    g_BC = new(blocks, *picture, 2 * states)
    g_A = new(sequences, count, channels, states)
    g_D, g_bias = (None if t is None else new(sequences, count, channels) for t in (D, dt_bias))
    g_weight = None if dt_weight is None else new(sequences, count, channels, rank)
    entries = new(sequences * blocks, count, chunks, states, config.BLOCK_D)
    problem.launch(
        scan2d_states_kernel,
        config._replace(maxnreg=None),
        (x, problem.dt, problem.A, problem.B, problem.weight, problem.bias, entries),
        (*_map_strides(x), *problem.strides()[:5]),
        (x,),
        independent=True,
    )
    tensors = (gy, x, *problem.parameters(), problem.sums(gx), entries, gx, g_dt, g_BC, g_A, g_D, g_weight, g_bias)
    strides = (*_map_strides(gy), *_map_strides(x), *problem.strides(), *_map_strides(gx))
    strides += (0 if dt_weight is None else g_dt.stride(0), rank, g_BC.stride(0))
    problem.launch(scan2d_bwd_kernel, config, tensors, strides, (x, gy, gx))

    g_dt, g_BC = (t.squeeze(0) if t.shape[0] == 1 else t.sum(0) for t in (g_dt, g_BC))
    g_dt, g_B, g_C = (t.permute(0, 3, 4, 1, 2) for t in (g_dt, g_BC[..., :states], g_BC[..., states:]))
    g_A, g_D, g_weight, g_bias = (None if t is None else t.sum(0) for t in (g_A, g_D, g_weight, g_bias))
    return [gx, g_dt, g_A, g_B, g_C, g_D, g_weight, g_bias]
