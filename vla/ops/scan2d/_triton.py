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
def _scan(decay, step, carry, T: tl.constexpr, S: tl.constexpr):
    """`h = decay h + step` over a (T, S, D) tile of S segments of T steps, from the state `carry` (D,).

    Segments are walked side by side, each by threads that own it: only their ends meet across threads.

    Returns:
        h (T, S, D) and the state after the tile (D,).
    """
    decay, h = tl.associative_scan((decay, step), 0, compose)
    t = tl.arange(0, T)[:, None, None]
    decays, states = pick(decay, t, T - 1), pick(h, t, T - 1)  # (S, D)
    if S > 1:
        one, zero = tl.full(states.shape, 1.0, tl.float32), tl.zeros_like(states)
        decays, states, before_decay, before_state = tl.associative_scan(
            (decays, states, one, zero), 0, _compose_exclusive
        )
        entry = before_state + before_decay * carry[None, :]  # (S, D)
    else:
        entry = carry[None, :]
    s = tl.arange(0, S)[:, None]
    return h + decay * entry[None, :, :], pick(states, s, S - 1) + pick(decays, s, S - 1) * carry


@triton.jit
def _offsets(o, line, column, sign, inner, s_outer, s_inner, WIDE: tl.constexpr):
    """Offsets of the pixels `o` steps from (line, column), where steps may cross the ends of lines."""
    j = column + sign * o
    # A quotient in float32 is exact here: the numerator is below the length of a line plus a chunk.
    i = tl.floor((j.to(tl.float32) + 0.5) * (1.0 / inner.to(tl.float32))).to(tl.int32)
    j -= i * inner
    i += line
    if WIDE:
        return i.to(tl.int64) * s_outer + j.to(tl.int64) * s_inner
    return i * s_outer + j * s_inner


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD: tl.constexpr):
    """The time step's weight (R, D) and bias (D,) of direction k, times log2(e)."""
    r = tl.arange(0, max(R_PAD, 1))
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
    begin, end, K, flips, columns, height, width, channels, N, R, blocks, sequences, chunks,
    xs_b, xs_d, xs_h, xs_w, ps_b, ps_k, ps_h, ps_w, dt_s, B_s, C_s, ys_b, ys_d, ys_h, ys_w,
    T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr, R_PAD: tl.constexpr,
    VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of a picture (or, with PER_LINE, of its i-th lines), through all K directions in turn."""
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
        outer = tl.where(column_major, width, height)
        inner = tl.where(column_major, height, width)
        xs_o, xs_i = tl.where(column_major, xs_w, xs_h), tl.where(column_major, xs_h, xs_w)
        ps_o, ps_i = tl.where(column_major, ps_w, ps_h), tl.where(column_major, ps_h, ps_w)
        ys_o, ys_i = tl.where(column_major, ys_w, ys_h), tl.where(column_major, ys_h, ys_w)
        if PER_LINE:
            first_line = sequence % sequences
            length = tl.where(first_line < outer, inner, 0)
        else:
            first_line = 0
            length = outer * inner
        # A flipped direction starts at the last pixel and walks with a negative sign.
        flip = (flips >> k) & 1
        sign = 1 - 2 * flip

        weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
        skip = tl.zeros((BLOCK_D,), tl.float32)
        if D_ptr is not None:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        # The width of a thread's loads decides how many lanes the channels of a pixel take.
        vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
        carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        for chunk in range(0, chunks):
            start = chunk * (T * S)
            at = flip * (length - 1) + sign * start
            line, column = first_line + at // inner, at % inner
            mask = start + o < length
            full_mask = mask[:, None] & d_mask[None, :]
            x_at = _offsets(o, line, column, sign, inner, xs_o, xs_i, WIDE)[:, None] + (vector * xs_d)[None, :]
            y_at = _offsets(o, line, column, sign, inner, ys_o, ys_i, WIDE)[:, None] + (vector * ys_d)[None, :]
            p_at = _offsets(o, line, column, sign, inner, ps_o, ps_i, WIDE)
            x = tl.load(x_ptr + x_at, mask=full_mask, other=0.0)  # (T * S, D)
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            _, step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            y = skip[None, None, :] * x
            for n in range(0, N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                c_n = _load_column(C_ptr + k * ps_k + n * C_s, p_at, mask, T, S)
                entry = pick(carry, n_index, n)
                h, end = _scan(tl.exp2(A[None, None, :] * step), step * (b_n * x), entry, T, S)
                carry = tl.where(n_index == n, end[None, :], carry)
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
def _adjoint_scan(decay, source, carry, T: tl.constexpr, S: tl.constexpr):
    """`g_l = source_l + decay_{l+1} g_{l+1}` over a (T, S, D) tile, from the last step to the first.

    What a step hands on is `decay g`. The walk against the order of the steps is one along it over turned registers.

    Args:
        carry: What the step after the tile hands on, (D,).

    Returns:
        g (T, S, D) and what the tile hands on (D,).
    """
    decay, source = tl.flip(decay, 0), tl.flip(source, 0)
    decays, handed, before_decay, g = tl.associative_scan(
        (decay, decay * source, tl.full(decay.shape, 1.0, tl.float32), source), 0, _compose_exclusive
    )
    t = tl.arange(0, T)[:, None, None]
    decays, states = pick(decays, t, T - 1), pick(handed, t, T - 1)  # (S, D)
    if S > 1:
        one, zero = tl.full(states.shape, 1.0, tl.float32), tl.zeros_like(states)
        decays, states, segment_decay, segment_state = tl.associative_scan(
            (decays, states, one, zero), 0, _compose_exclusive, reverse=True
        )
        entry = segment_state + segment_decay * carry[None, :]  # (S, D)
    else:
        entry = carry[None, :]
    s = tl.arange(0, S)[:, None]
    return tl.flip(g + before_decay * entry[None, :, :], 0), pick(states, s, 0) + pick(decays, s, 0) * carry


@triton.jit
def scan2d_bwd_kernel(
    gy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, partial_ptr, state_ptr,
    gx_ptr, g_dt_ptr, g_B_ptr, g_C_ptr, g_A_ptr, g_D_ptr, g_weight_ptr, g_bias_ptr,
    begin, end, K, flips, columns, height, width, channels, N, R, blocks, sequences, chunks,
    gs_b, gs_d, gs_h, gs_w, xs_b, xs_d, xs_h, xs_w, ps_b, ps_k, ps_h, ps_w, dt_s, B_s, C_s,
    os_b, os_d, os_h, os_w, ls_block, ls_b, ls_k, ls_h, ls_w, qs_block, qs_b, qs_k, qs_h, qs_w,
    T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr, R_PAD: tl.constexpr,
    VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_D channels of a picture through all K directions in turn: of x over directions, of the
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
    g_dt_ptr += block.to(tl.int64) * ls_block + b * ls_b
    g_B_ptr += block.to(tl.int64) * qs_block + b * qs_b
    g_C_ptr += block.to(tl.int64) * qs_block + b * qs_b

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    n_index = tl.arange(0, N_PAD)[:, None]
    r = tl.arange(0, max(R_PAD, 1))
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    if GROUPED:
        begin = tl.program_id(1)
        end = begin + 1
        state_ptr += (tl.program_id(0) * K + begin).to(tl.int64) * chunks * N * BLOCK_D
    else:
        state_ptr += tl.program_id(0).to(tl.int64) * chunks * N * BLOCK_D
    state_at = n_index * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    for k in range(begin, end):
        column_major = (columns >> k) & 1 == 1
        outer = tl.where(column_major, width, height)
        inner = tl.where(column_major, height, width)
        gs_o, gs_i = tl.where(column_major, gs_w, gs_h), tl.where(column_major, gs_h, gs_w)
        xs_o, xs_i = tl.where(column_major, xs_w, xs_h), tl.where(column_major, xs_h, xs_w)
        ps_o, ps_i = tl.where(column_major, ps_w, ps_h), tl.where(column_major, ps_h, ps_w)
        os_o, os_i = tl.where(column_major, os_w, os_h), tl.where(column_major, os_h, os_w)
        ls_o, ls_i = tl.where(column_major, ls_w, ls_h), tl.where(column_major, ls_h, ls_w)
        qs_o, qs_i = tl.where(column_major, qs_w, qs_h), tl.where(column_major, qs_h, qs_w)
        if PER_LINE:
            first_line = sequence % sequences
            length = tl.where(first_line < outer, inner, 0)
        else:
            first_line = 0
            length = outer * inner
        flip = (flips >> k) & 1
        sign = 1 - 2 * flip

        weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
        skip = tl.zeros((BLOCK_D,), tl.float32)
        if D_ptr is not None:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)

        # First along the direction: the state with which each chunk is entered.
        carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        tl.store(state_ptr + state_at, carry, mask=n_index < N)
        for chunk in range(0, chunks - 1):
            start = chunk * (T * S)
            at = flip * (length - 1) + sign * start
            line, column = first_line + at // inner, at % inner
            mask = start + o < length
            x_at = _offsets(o, line, column, sign, inner, xs_o, xs_i, WIDE)[:, None] + (vector * xs_d)[None, :]
            p_at = _offsets(o, line, column, sign, inner, ps_o, ps_i, WIDE)
            x = tl.load(x_ptr + x_at, mask=mask[:, None] & d_mask[None, :], other=0.0)  # (T * S, D)
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            _, step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            for n in range(0, N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                entry = pick(carry, n_index, n)
                _, left = _scan(tl.exp2(A[None, None, :] * step), step * (b_n * x), entry, T, S)
                carry = tl.where(n_index == n, left[None, :], carry)
            tl.store(state_ptr + (chunk + 1) * N * BLOCK_D + state_at, carry, mask=n_index < N)
        # States, and sums of the previous direction, were written by other threads.
        tl.debug_barrier()

        handed = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        g_A = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        g_skip = tl.zeros((BLOCK_D,), tl.float32)
        g_bias = tl.zeros((BLOCK_D,), tl.float32)
        g_weight = tl.zeros((BLOCK_D, r.shape[0]), tl.float32)
        for back in range(0, chunks):
            chunk = chunks - 1 - back
            start = chunk * (T * S)
            at = flip * (length - 1) + sign * start
            line, column = first_line + at // inner, at % inner
            mask = start + o < length
            full_mask = mask[:, None] & d_mask[None, :]
            gy_at = _offsets(o, line, column, sign, inner, gs_o, gs_i, WIDE)[:, None] + (vector * gs_d)[None, :]
            x_at = _offsets(o, line, column, sign, inner, xs_o, xs_i, WIDE)[:, None] + (vector * xs_d)[None, :]
            p_at = _offsets(o, line, column, sign, inner, ps_o, ps_i, WIDE)
            gx_at = _offsets(o, line, column, sign, inner, os_o, os_i, WIDE)[:, None] + (vector * os_d)[None, :]
            low_at = k * ls_k + _offsets(o, line, column, sign, inner, ls_o, ls_i, WIDE)
            q_at = k * qs_k + _offsets(o, line, column, sign, inner, qs_o, qs_i, WIDE)
            gy = tl.load(gy_ptr + gy_at, mask=full_mask, other=0.0)  # (T * S, D)
            gy = tl.reshape(gy.to(tl.float32), (T, S, BLOCK_D))
            x = tl.load(x_ptr + x_at, mask=full_mask, other=0.0)  # (T * S, D)
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            before, step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            gx = skip[None, None, :] * gy
            g_skip += tl.sum(tl.sum(gy * x, axis=0), axis=0)
            g_step = tl.zeros_like(step)
            for n in range(0, N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                c_n = _load_column(C_ptr + k * ps_k + n * C_s, p_at, mask, T, S) * LN2
                entry = tl.load(state_ptr + (chunk * N + n) * BLOCK_D + tl.arange(0, BLOCK_D))  # (D,)
                decay = tl.exp2(A[None, None, :] * step)
                added = step * (b_n * x)
                h, _ = _scan(decay, added, entry, T, S)
                g_c = tl.reshape(tl.sum(gy * h, axis=2), (T * S,)) * LN2
                tl.store(g_C_ptr + q_at + n, g_c.to(g_C_ptr.dtype.element_ty), mask=mask)
                g, left = _adjoint_scan(decay, c_n * gy, pick(handed, n_index, n), T, S)
                handed = tl.where(n_index == n, left[None, :], handed)
                kept = g * (h - added)
                g_step += g * (b_n * x) + (A * LN2)[None, None, :] * kept
                g_a = tl.sum(tl.sum(kept * step, axis=0), axis=0) * LN2
                g_A += tl.where(n_index == n, g_a[None, :], 0.0)
                g *= step
                gx += g * b_n
                g_b = tl.reshape(tl.sum(g * x, axis=2), (T * S,))
                tl.store(g_B_ptr + q_at + n, g_b.to(g_B_ptr.dtype.element_ty), mask=mask)

            if SOFTPLUS:
                g_step *= tl.exp2(before - step)
            g_step = tl.reshape(g_step * LOG2E, (T * S, BLOCK_D))
            g_step = tl.where(full_mask, g_step, 0.0)
            g_bias += tl.sum(g_step, axis=0)
            if R_PAD > 0:
                low_mask = mask[:, None] & (r < R)[None, :]
                low = tl.load(dt_ptr + k * ps_k + p_at[:, None] + r[None, :] * dt_s, mask=low_mask, other=0.0)
                g_low = tl.dot(g_step, tl.trans(weight), input_precision=PRECISION) * LN2  # (T * S, R)
                tl.store(g_dt_ptr + low_at[:, None] + r[None, :], g_low.to(g_dt_ptr.dtype.element_ty), mask=low_mask)
                g_weight += tl.dot(tl.trans(g_step), low.to(tl.float32), input_precision=PRECISION)
            else:
                tl.store(g_dt_ptr + low_at[:, None] + d[None, :], g_step.to(g_dt_ptr.dtype.element_ty), mask=full_mask)

            gx = tl.reshape(gx, (T * S, BLOCK_D))
            if not GROUPED and k > 0:
                gx += tl.load(partial_ptr + gx_at, mask=full_mask, other=0.0)  # (T * S, D)
            if GROUPED or k == K - 1:
                tl.store(gx_ptr + gx_at, gx.to(gx_ptr.dtype.element_ty), mask=full_mask)
            else:
                tl.store(partial_ptr + gx_at, gx, mask=full_mask)

        parameters = (sequence * K + k).to(tl.int64) * channels + d  # (D,)
        tl.store(g_A_ptr + parameters[None, :] * N + n_index, g_A, mask=(n_index < N) & d_mask[None, :])
        if D_ptr is not None:
            tl.store(g_D_ptr + parameters, g_skip, mask=d_mask)
        if bias_ptr is not None:
            tl.store(g_bias_ptr + parameters, g_bias, mask=d_mask)
        if R_PAD > 0:
            weight_mask = d_mask[:, None] & (r < R)[None, :]
            tl.store(g_weight_ptr + parameters[:, None] * R + r[None, :], g_weight, mask=weight_mask)


class Config(NamedTuple):
    """How a kernel cuts its work: tiles of T * S pixels by BLOCK_D channels."""

    T: int
    S: int
    BLOCK_D: int
    VECTOR: int
    num_warps: int


def _fwd_config(length: int, channels: int) -> Config:
    return Config(16, 8, 32, 2, 4)


def _bwd_config(length: int, channels: int) -> Config:
    return Config(8, 8, 32, 4, 4)


def _packed(*maps: Tensor) -> list[Tensor]:
    """Maps (B, K, E, H, W) that differ in their strides of E only, as views of one projection do."""
    if len({(m.stride(0), m.stride(1), m.stride(3), m.stride(4)) for m in maps}) == 1:
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
        self.x = x
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
        # Each program walks all directions of a picture's channels, but lines of different axes cross each other.
        count = len(directions)
        crossing = per_line and not grouped and len({direction.startswith("col") for direction in directions}) == 2
        self.launches = [(k, k + 1) for k in range(count)] if crossing else [(0, count)]
        flips = sum(1 << k for k, direction in enumerate(directions) if direction.endswith("rev"))
        columns = sum(1 << k for k, direction in enumerate(directions) if direction.startswith("col"))
        self.codes = (flips, columns)
        self.constants = dict(
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
        """Of batch, direction, row and column of dt, B and C, and of their last dimensions."""
        b, k, r, h, w = self.dt.stride()
        return b, k, h, w, r, self.B.stride(2), self.C.stride(2)

    def sums(self, result: Tensor) -> Tensor:
        """Where sums over directions grow: float32 memory laid out like the result, or the result itself."""
        alone = len(self.directions) == 1 or self.grouped or result.dtype == torch.float32
        return result if alone else torch.empty_like(result, dtype=torch.float32)

    def launch(self, kernel, config: Config, tensors: tuple, strides: tuple[int, ...], maps: tuple[Tensor, ...]):
        """All launches of a kernel over (sequences x blocks of channels)."""
        blocks = triton.cdiv(self.channels, config.BLOCK_D)
        count = len(self.directions)
        grid = (self.batch * self.sequences * blocks, count if self.grouped else 1)
        chunks = triton.cdiv(self.length, config.T * config.S)
        wide = _reach(self.dt, self.B, self.C, *maps) >= 2**31
        for begin, end in self.launches:
            kernel[grid](
                *tensors, begin, end, count, *self.codes, self.height, self.width, self.channels, self.states,
                self.rank, blocks, self.sequences, chunks, *strides,
                T=config.T, S=config.S, BLOCK_D=config.BLOCK_D, VECTOR=config.VECTOR, WIDE=wide,
                num_warps=config.num_warps, **self.constants,
            )  # fmt: skip


def forward(*args) -> Tensor:
    problem = _Problem(*args)
    x = args[0]
    y = torch.empty_like(x)
    if x.numel() > 0:
        tensors = (x, *problem.parameters(), problem.sums(y), y)
        strides = (*x.stride(), *problem.strides(), *y.stride())
        config = _fwd_config(problem.length, problem.channels)
        problem.launch(scan2d_fwd_kernel, config, tensors, strides, (x, y))
    return y


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    problem = _Problem(*args)
    (gy,) = grads
    x, dt, A, B, C, directions, D, dt_weight, dt_bias = args[:9]
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return [gx] + [None if t is None else torch.zeros_like(t) for t in (dt, A, B, C, D, dt_weight, dt_bias)]
    config = _bwd_config(problem.length, problem.channels)
    blocks = triton.cdiv(problem.channels, config.BLOCK_D)
    chunks = triton.cdiv(problem.length, config.T * config.S)
    count, states, channels = len(directions), problem.states, problem.channels
    picture = (problem.batch, problem.height, problem.width, count)
    sequences = problem.batch * problem.sequences

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    # Every block of channels adds to the gradients that the channels share, every sequence to those of the parameters.
    g_dt = new(1 if dt_weight is None else blocks, *picture, dt.shape[2])
    g_BC = new(blocks, *picture, 2 * states)
    g_A = new(sequences, count, channels, states)
    g_D, g_bias = (None if t is None else new(sequences, count, channels) for t in (D, dt_bias))
    g_weight = None if dt_weight is None else new(sequences, count, channels, problem.rank)
    entries = new(sequences * blocks * (count if problem.grouped else 1), chunks, states, config.BLOCK_D)

    def shared_strides(t: Tensor) -> tuple[int, ...]:
        block, b, h, w, k, _ = t.stride()
        return block if t.shape[0] > 1 else 0, b, k, h, w

    tensors = (gy, x, *problem.parameters(), problem.sums(gx), entries)
    tensors += (gx, g_dt, g_BC, g_BC[..., states:], g_A, g_D, g_weight, g_bias)
    strides = (*gy.stride(), *x.stride(), *problem.strides(), *gx.stride(), *shared_strides(g_dt), *shared_strides(g_BC))
    problem.launch(scan2d_bwd_kernel, config, tensors, strides, (x, gy, gx))

    g_dt, g_BC = (t.sum(0).permute(0, 3, 4, 1, 2) for t in (g_dt, g_BC))
    parameters = (None if t is None else t.sum(0) for t in (g_A, g_D, g_weight, g_bias))
    g_A, g_D, g_weight, g_bias = parameters
    return [gx, g_dt, g_A, g_BC[:, :, :states], g_BC[:, :, states:], g_D, g_weight, g_bias]
