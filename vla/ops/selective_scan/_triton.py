"""Triton kernels of the selective scan: time along the lanes of a warp, chunk by chunk, states recomputed backwards."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LN2, LOG2E, at_most, cdiv, compose, kernel, next_power_of_2
from . import _triton_rows
from ._triton_scan import MIN_PROGRAMS, Parts, Scan, Sizes, aligned, exponent, place, prefetch, steps_last, strides_of


@triton.jit
def _compose_left(decay_later, first_later, value_later, decay, first, value):
    """Two neighbouring spans of steps of the adjoint recurrence as one, for a scan against time.

    A span is (product of all decays but its first step's, decay of its first step, adjoint state at its first step).
    """
    following = decay * first_later
    return following * decay_later, first, value + following * value_later


@triton.jit
def _compose_right(decay_first, decayed_first, inject_first, decay, decayed, inject):
    """Two neighbouring spans of steps of the state recurrence as one.

    A span is (product of its decays, state at its last step but for what that step injects, that).
    """
    return decay_first * decay, decayed + decay * (decayed_first + inject_first), inject


@triton.jit
def _add_left(first_later, rest_later, first, rest):
    """Two neighbouring spans (first value, sum of the others) as one, for a scan against time."""
    return first, rest + (first_later + rest_later)


@triton.jit
def _take(x, index):
    """`x[index[i, j], j]`; within a warp a shuffle."""
    return tl.gather(x, index, 0)


@triton.jit
def _decayed_in_time(decay, inject, entering, position, steps):
    """Previous states times decay (S, R, E) of `h -> decay * h + inject`, given those (R,) that enter.

    Time is (S, E) flattened. As `h - inject` they would have lost their digits where decay is strong.
    """
    product, local, _ = tl.associative_scan((decay, tl.zeros_like(inject), inject), 2, _compose_right)
    last = steps == product.shape[2] - 1
    lane_product = tl.sum(tl.where(last, product, 0.0), 2)
    lane_local = tl.sum(tl.where(last, local + inject, 0.0), 2)
    lane_product, lane_local = tl.associative_scan((lane_product, lane_local), 0, compose)
    before = _take(lane_local + lane_product * entering[None, :], tl.maximum(position - 1, 0))
    before = tl.where(position == 0, entering[None, :], before)
    return local + product * before[:, :, None]


@triton.jit
def _adjoints_against_time(decay, inject, total_decay, entering, position, steps):
    """Adjoints (S, R, E) of `g_t = inject_t + decay_{t+1} g_{t+1}`, and `decay * g` (R,) of the very first step.

    `entering` (R,) is `decay * g` of the step after the last, `total_decay` (R,) the product of all decays: rounded
    once, where the product of rounded decays close to 1 would drift over long sequences.
    """
    lanes: tl.constexpr = decay.shape[0]
    one = tl.full(decay.shape, 1.0, tl.float32)
    product, _, local = tl.associative_scan((one, tl.flip(decay, 2), tl.flip(inject, 2)), 2, _compose_left)
    product, local = tl.flip(product, 2), tl.flip(local, 2)
    first = steps == 0
    lane_product = _take(tl.sum(tl.where(first, product * decay, 0.0), 2), -position + (lanes - 1))
    lane_local = _take(tl.sum(tl.where(first, local * decay, 0.0), 2), -position + (lanes - 1))
    lane_product, lane_local = tl.associative_scan((lane_product, lane_local), 0, compose)
    leaving = tl.sum(tl.where(position == lanes - 1, lane_local, 0.0), 0) + total_decay * entering
    following = _take(lane_local + lane_product * entering[None, :], tl.maximum(-position + (lanes - 2), 0))
    following = tl.where(position == lanes - 1, entering[None, :], following)
    return local + product * following[:, :, None], leaving


@triton.jit
def _sum_after(x, position):
    """Sum over the later steps of (S, R, E): added up, as a difference of sums would lose the digits of small terms."""
    lanes: tl.constexpr = x.shape[0]
    first, rest = tl.associative_scan((tl.flip(x, 2), tl.full(x.shape, 0.0, x.dtype)), 2, _add_left)
    lane = _take(tl.sum(x, 2), -position + (lanes - 1))
    after = _take(tl.cumsum(lane, 0), tl.maximum(-position + (lanes - 2), 0))
    after = tl.where(position == lanes - 1, 0.0, after)
    return tl.flip(rest, 2) + after[:, :, None]


@triton.jit
def _sum_until(x, position, steps):
    """Sum over the earlier steps of (S, R, E) and the step itself."""
    local = tl.cumsum(x, 2)
    lane = tl.cumsum(tl.sum(tl.where(steps == x.shape[2] - 1, local, 0.0), 2), 0)
    before = tl.where(position == 0, 0.0, _take(lane, tl.maximum(position - 1, 0)))
    return local + before[:, :, None]


@triton.jit
def _share(chunks, PARALLEL: tl.constexpr):
    """Rows' program and range of chunks of this program: one chunk if PARALLEL, else all."""
    program = tl.program_id(0)
    first = 0
    last = chunks
    if PARALLEL:
        programs = tl.num_programs(0) // chunks
        first = program // programs
        last = first + 1
        program = program % programs
    return program, first, last


@triton.jit
def _rows(program, span, channels, ROWS: tl.constexpr):
    """Sequence, channels (ROWS,) and their mask of a program."""
    batch, first_channel, first_row = place(program, span, channels, ROWS)
    row = first_row + tl.arange(0, ROWS)
    return batch, (first_channel + row).to(tl.int64), row < span


@kernel
def selective_scan_fwd_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    carry_ptr,
    entering_ptr,
    span,
    channels,
    length,
    states,
    B_channels,
    C_channels,
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    B_b,
    B_g,
    B_n,
    B_l,
    C_b,
    C_g,
    C_n,
    C_l,
    z_b,
    z_d,
    z_l,
    out_b,
    out_d,
    out_l,
    SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    PARALLEL: tl.constexpr,
    ONE_STATE: tl.constexpr,
    ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BORDER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of ROWS rows: of one chunk if PARALLEL, else of all chunks one after the other.

    `carry` (B, D, N, chunks + 1) has the states that enter each chunk if PARALLEL; else `carry` (B, D, N) is where the
    states go from chunk to chunk, and has the last ones in the end.

    `entering` (B, D, borders + 1), given for one state alone, gets the states before every BORDER steps and the last.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, STEPS)
    program, first_chunk, last_chunk = _share(chunks, PARALLEL)
    batch, channel, valid = _rows(program, span, channels, ROWS)
    step = tl.arange(0, STEPS)
    last = (step == STEPS - 1)[None, :]
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    u_row = u_ptr + batch * aligned(u_b, ALIGN) + (channel * aligned(u_d, ALIGN))[:, None]
    delta_row = delta_ptr + batch * aligned(delta_b, ALIGN) + (channel * aligned(delta_d, ALIGN))[:, None]
    out_row = out_ptr + batch * aligned(out_b, ALIGN) + (channel * aligned(out_d, ALIGN))[:, None]
    if z_ptr is not None:
        z_row = z_ptr + batch * aligned(z_b, ALIGN) + (channel * aligned(z_d, ALIGN))[:, None]
    A_row = A_ptr + channel * A_d
    if B_CONSTANT:
        B_row = B_ptr + channel[:, None] * B_g
    else:
        B_row = B_ptr + batch * aligned(B_b, ALIGN) + tl.min(channel, 0) // B_channels * aligned(B_g, ALIGN)
    if C_CONSTANT:
        C_row = C_ptr + channel[:, None] * C_g
    else:
        C_row = C_ptr + batch * aligned(C_b, ALIGN) + tl.min(channel, 0) // C_channels * aligned(C_g, ALIGN)
    sequence = batch * channels + channel
    if entering_ptr is not None:
        entering_row = entering_ptr + sequence * (tl.cdiv(length, BORDER) + 1)
    carry = tl.zeros([ROWS], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32)[:, None] * LOG2E  # (R, 1)
    if D_ptr is not None:
        skip = tl.load(D_ptr + channel, valid, 0.0).to(tl.float32)[:, None]  # (R, 1)

    for chunk in tl.range(first_chunk, last_chunk, num_stages=STAGES):
        time = chunk * STEPS + step
        inside = (time < length)[None, :]
        mask = valid[:, None] & inside
        time = time.to(tl.int64)[None, :]
        u = tl.load(u_row + time * u_l, mask, 0.0).to(tl.float32)  # (R, L)
        s = tl.load(delta_row + time * delta_l, mask, padding).to(tl.float32) * LOG2E  # (R, L)
        if z_ptr is not None:
            z = tl.load(z_row + time * z_l, mask, 0.0).to(tl.float32)  # (R, L)
        if bias_ptr is not None:
            s += bias
        dt2 = exponent(s, inside, SOFTPLUS)
        if EXACT:
            total = tl.sum(dt2, 1)
        x = dt2 * u
        if D_ptr is not None:
            y = skip * u
        else:
            y = tl.zeros([ROWS, STEPS], tl.float32)
        if not ONE_STATE:
            # The states that other threads stored at the end of the previous chunk.
            tl.debug_barrier()
        for n in tl.range(0, states, num_stages=STAGES):
            A = tl.load(A_row + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
            if B_CONSTANT:
                B = tl.load(B_row + n * B_n, valid[:, None], 0.0).to(tl.float32)  # (R, 1)
            else:
                B = tl.load(B_row + n * aligned(B_n, ALIGN) + time * B_l, inside, 0.0).to(tl.float32)  # (1, L)
            if C_CONSTANT:
                C = tl.load(C_row + n * C_n, valid[:, None], 0.0).to(tl.float32)  # (R, 1)
            else:
                C = tl.load(C_row + n * aligned(C_n, ALIGN) + time * C_l, inside, 0.0).to(tl.float32)  # (1, L)
            if PARALLEL:
                carry = tl.load(carry_ptr + (sequence * states + n) * (chunks + 1) + chunk, valid, 0.0)  # (R,)
            elif not ONE_STATE:
                carry = tl.load(carry_ptr + sequence * states + n, valid & (chunk > 0), 0.0)  # (R,)
            decay = tl.exp2(A[:, None] * dt2)
            inject = B * LN2 * x
            inject += tl.where((step == 0)[None, :], decay * carry[:, None], 0.0)
            product, h = tl.associative_scan((decay, inject), 1, compose)
            y += C * h
            if entering_ptr is not None:
                at = entering_row + chunk * (STEPS // BORDER)
                tl.store(at, carry, valid)  # (R,)
                for border in tl.static_range(1, STEPS // BORDER):
                    h_before = tl.sum(tl.where((step == border * BORDER - 1)[None, :], h, 0.0), 1)
                    tl.store(at + border, h_before, valid & (chunk * STEPS + border * BORDER < length))  # (R,)
            if not PARALLEL:
                entering = carry
                carry = tl.sum(tl.where(last, h, 0.0), 1)
                if EXACT:
                    # The chunk's decay rounded once: products of rounded decays close to 1 drift over many chunks.
                    product = tl.sum(tl.where(last, product, 0.0), 1)
                    carry += (tl.exp2(A * total) - product) * entering
                if not ONE_STATE:
                    tl.store(carry_ptr + sequence * states + n, carry, valid)  # (R,)
        if z_ptr is not None:
            y *= z * tl.sigmoid(z)
        tl.store(out_row + time * out_l, y, mask)  # (R, L)
    if ONE_STATE and not PARALLEL:
        tl.store(carry_ptr + sequence, carry, valid)  # (R,)
    if entering_ptr is not None:
        tl.store(entering_row + tl.cdiv(length, BORDER), carry, valid)  # (R,)


@kernel
def selective_scan_chunk_kernel(
    delta_ptr,
    A_ptr,
    P_ptr,
    v_ptr,
    z_ptr,
    bias_ptr,
    states_ptr,
    total_ptr,
    span,
    channels,
    length,
    states,
    P_channels,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    P_b,
    P_g,
    P_n,
    P_l,
    v_b,
    v_d,
    v_l,
    z_b,
    z_d,
    z_l,
    SOFTPLUS: tl.constexpr,
    CONSTANT: tl.constexpr,
    ADJOINT: tl.constexpr,
    PARALLEL: tl.constexpr,
    ONE_STATE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """If PARALLEL, what each chunk alone adds to the states behind it, `states` (B, D, N, chunks), from `P` = B and
    `v` = u, or, if ADJOINT, to the adjoints before it, from `P` = C and `v` the gradient of the output; and the chunks'
    total time (B, D, chunks). Else, chunk after chunk, the states (B, D, N, chunks + 1) that enter each.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, LANES * PER_LANE)
    program, first_chunk, last_chunk = _share(chunks, PARALLEL)
    batch, channel, valid = _rows(program, span, channels, ROWS)
    position = tl.arange(0, LANES)[:, None] + tl.zeros([LANES, ROWS], tl.int32)
    steps = tl.arange(0, PER_LANE)[None, None, :]
    step = tl.arange(0, LANES)[:, None, None] * PER_LANE + steps  # (S, 1, E)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    row = channel[None, :, None]
    mask = valid[None, :, None]
    delta_row = delta_ptr + batch * aligned(delta_b, ALIGN) + row * aligned(delta_d, ALIGN)
    v_row = v_ptr + batch * aligned(v_b, ALIGN) + row * aligned(v_d, ALIGN)
    if z_ptr is not None:
        z_row = z_ptr + batch * aligned(z_b, ALIGN) + row * aligned(z_d, ALIGN)
    if bias_ptr is not None:
        bias = (tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32) * LOG2E)[None, :, None]  # (R,)
    if CONSTANT:
        P_row = P_ptr + channel * P_g
    else:
        P_row = P_ptr + batch * aligned(P_b, ALIGN) + tl.min(channel, 0) // P_channels * aligned(P_g, ALIGN)
    sequence = batch * channels + channel
    carry = tl.zeros([ROWS], tl.float32)
    for chunk in tl.range(first_chunk, last_chunk, num_stages=STAGES):
        time = chunk * (LANES * PER_LANE) + step
        inside = time < length
        time = time.to(tl.int64)
        s = tl.load(delta_row + time * delta_l, inside & mask, padding).to(tl.float32) * LOG2E  # (S, R, E)
        v = tl.load(v_row + time * v_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
        if bias_ptr is not None:
            s += bias
        dt2 = exponent(s, inside, SOFTPLUS)
        if ADJOINT:
            if z_ptr is not None:
                z = tl.load(z_row + time * z_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
                v *= z * tl.sigmoid(z)
            between = _sum_until(dt2, position, steps)
        else:
            v *= dt2 * LN2
            between = _sum_after(dt2, position)
        total = tl.sum(tl.sum(dt2, 2), 0)
        if PARALLEL:
            tl.store(total_ptr + sequence * chunks + chunk, total, valid)  # (R,)
        elif not ONE_STATE:
            # The states that other threads stored.
            tl.debug_barrier()
        for n in tl.range(0, states, num_stages=STAGES):
            A = tl.load(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
            if CONSTANT:
                P = tl.load(P_row + n * P_n, valid, 0.0).to(tl.float32)[None, :, None]  # (R,)
            else:
                P = tl.load(P_row + n * aligned(P_n, ALIGN) + time * P_l, inside, 0.0).to(tl.float32)  # (S, 1, E)
            local = tl.sum(tl.sum(tl.exp2(A[None, :, None] * between) * (P * v), 2), 0)
            if PARALLEL:
                tl.store(states_ptr + (sequence * states + n) * chunks + chunk, local, valid)  # (R,)
            else:
                at = states_ptr + (sequence * states + n) * (chunks + 1) + chunk
                if not ONE_STATE:
                    carry = tl.load(at, valid & (chunk > 0), 0.0)  # (R,)
                if chunk == 0:
                    tl.store(at, carry, valid)
                carry = local + tl.exp2(A * total) * carry
                tl.store(at + 1, carry, valid)  # (R,)


@kernel
def selective_scan_carry_kernel(
    local_ptr,
    total_ptr,
    A_ptr,
    initial_ptr,
    entering_ptr,
    rows,
    channels,
    states,
    chunks,
    A_d,
    A_n,
    ADJOINT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """States (B, D, N, chunks + 1) that enter each chunk and the last ones; if ADJOINT, `decay * adjoint` (B, D, N,
    chunks) of the step after each chunk, given those behind the last."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    sequence = row // states
    A_at = A_ptr + sequence % channels * A_d + row % states * A_n
    A = tl.load(A_at, valid, 0.0).to(tl.float32)[:, None]  # (R, 1)
    if ADJOINT:
        entering = entering_ptr + row * chunks
        carry = tl.load(initial_ptr + row, valid, 0.0)  # (R,)
        tl.store(entering + (chunks - 1), carry, valid)
    else:
        entering = entering_ptr + row * (chunks + 1)
        carry = tl.zeros([ROWS], tl.float32)
        tl.store(entering, carry, valid)
    column = tl.arange(0, CHUNKS)[None, :]
    for start in range(0, chunks, CHUNKS):
        order = start + column
        mask = valid[:, None] & (order < chunks)
        chunk = order
        if ADJOINT:
            chunk = chunks - 1 - order
        total = tl.load(total_ptr + (sequence * chunks)[:, None] + chunk, mask, 0.0)  # (R, c)
        local = tl.load(local_ptr + (row * chunks)[:, None] + chunk, mask, 0.0)  # (R, c)
        decay = tl.exp2(A * total)
        local += tl.where(column == 0, decay * carry[:, None], 0.0)
        _, h = tl.associative_scan((decay, local), 1, compose)
        carry = tl.sum(tl.where(column == CHUNKS - 1, h, 0.0), 1)
        if ADJOINT:
            tl.store(entering[:, None] + (chunk - 1), h, mask & (chunk > 0))  # (R, c)
        else:
            tl.store(entering[:, None] + (chunk + 1), h, mask)  # (R, c)


@triton.jit
def _prefetch_block(u_ptr, delta_ptr, g_ptr, channel, time, u_d, u_l, delta_d, delta_l, g_d, g_l):
    """Prefetches what is at these channels and times (32,)."""
    time = time.to(tl.int64)
    prefetch(u_ptr + channel * u_d + time * u_l)
    prefetch(delta_ptr + channel * delta_d + time * delta_l)
    prefetch(g_ptr + channel * g_d + time * g_l)


@kernel
def selective_scan_bwd_kernel(
    g_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    entering_ptr,
    carry_ptr,
    gu_ptr,
    gdelta_ptr,
    gz_ptr,
    by_channel_ptr,
    by_step_ptr,
    span,
    channels,
    length,
    states,
    B_channels,
    C_channels,
    g_b,
    g_d,
    g_l,
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    B_b,
    B_g,
    B_n,
    B_l,
    C_b,
    C_g,
    C_n,
    C_l,
    z_b,
    z_d,
    z_l,
    gu_b,
    gu_d,
    gu_l,
    gdelta_b,
    gdelta_d,
    gdelta_l,
    gz_b,
    gz_d,
    gz_l,
    SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    PARALLEL: tl.constexpr,
    ONE_STATE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    TAIL: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Gradients of BLOCKS x ROWS rows: of one chunk if PARALLEL, else of all chunks from the last to the first.

    `entering` (B, D, N, chunks + 1) has the states that enter each chunk, or is None if there is one chunk; `carry`
    (B, D, N, chunks) the adjoints that enter from behind if PARALLEL; else `carry` (B, D, N) is where they go from one
    chunk to the next. Sums over rows, steps or sequences are left in parts, see `Parts`: `by_channel`
    (B, chunks, rows, D), `by_step` (B, programs, 1 or 2, N, L).
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, LANES * PER_LANE)
    program, first_chunk, last_chunk = _share(chunks, PARALLEL)
    batch, first_channel, first_row = place(program, span, channels, ROWS * BLOCKS)
    position = tl.arange(0, LANES)[:, None] + tl.zeros([LANES, ROWS], tl.int32)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    blocks = tl.minimum(BLOCKS, tl.cdiv(span - first_row, ROWS))
    # The program's parts of the gradients of B, if it is not constant, and of C behind it.
    VARYING: tl.constexpr = (0 if B_CONSTANT else 1) + (0 if C_CONSTANT else 1)
    if VARYING > 0:
        gB_part = by_step_ptr + program.to(tl.int64) * VARYING * states * length
        gC_part = gB_part + (VARYING - 1) * states * length
    if not B_CONSTANT:
        B_row = B_ptr + batch * aligned(B_b, ALIGN) + (first_channel // B_channels).to(tl.int64) * aligned(B_g, ALIGN)
    if not C_CONSTANT:
        C_row = C_ptr + batch * aligned(C_b, ALIGN) + (first_channel // C_channels).to(tl.int64) * aligned(C_g, ALIGN)

    for whole in tl.static_range(0 if TAIL else 1, 2):
        # First the last chunk, if it has fewer steps a lane, then those that are full.
        steps = tl.arange(0, PER_LANE if whole else TAIL)[None, None, :]
        step = tl.arange(0, LANES)[:, None, None] * steps.shape[2] + steps  # (S, 1, E)
        for number in range(first_chunk + (whole if TAIL else 0), last_chunk if whole else 1):
            chunk = chunks - 1 - number
            time = chunk * (LANES * PER_LANE) + step
            inside = time < length
            time = time.to(tl.int64)
            if ONE_STATE:
                gB_sum = tl.zeros(step.shape, tl.float32)
                gC_sum = tl.zeros(step.shape, tl.float32)
            if ONE_STATE:
                # The adjoints that other threads stored.
                tl.debug_barrier()
            for block in tl.range(0, blocks, num_stages=STAGES):
                if not ONE_STATE:
                    # The adjoints and partial sums that other threads stored.
                    tl.debug_barrier()
                if PREFETCH:
                    wraps = block + 1 == blocks
                    next_row = first_row + tl.where(wraps, 0, block + 1) * ROWS + tl.arange(0, 32) % ROWS
                    next_start = tl.where(wraps, tl.maximum(chunk - 1, 0), chunk) * (LANES * PER_LANE)
                    _prefetch_block(
                        u_ptr + batch * u_b,
                        delta_ptr + batch * delta_b,
                        g_ptr + batch * g_b,
                        first_channel + tl.minimum(next_row, span - 1).to(tl.int64),
                        tl.minimum(next_start + tl.arange(0, 32) // ROWS * (LANES * PER_LANE * ROWS // 32), length - 1),
                        u_d,
                        u_l,
                        delta_d,
                        delta_l,
                        g_d,
                        g_l,
                    )
                row = first_row + block * ROWS + tl.arange(0, ROWS)
                valid = row < span
                mask = valid[None, :, None]
                channel = (first_channel + row).to(tl.int64)
                sequence = batch * channels + channel
                row = channel[None, :, None]
                u_row = u_ptr + batch * aligned(u_b, ALIGN) + row * aligned(u_d, ALIGN)
                u = tl.load(u_row + time * u_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
                delta_row = delta_ptr + batch * aligned(delta_b, ALIGN) + row * aligned(delta_d, ALIGN)
                s = tl.load(delta_row + time * delta_l, inside & mask, padding).to(tl.float32) * LOG2E  # (S, R, E)
                g_row = g_ptr + batch * aligned(g_b, ALIGN) + row * aligned(g_d, ALIGN)
                gy = tl.load(g_row + time * g_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
                if bias_ptr is not None:
                    s += (tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32) * LOG2E)[None, :, None]  # (R,)
                if D_ptr is not None:
                    skip = tl.load(D_ptr + channel, valid, 0.0).to(tl.float32)[None, :, None]  # (R,)
                dt2 = exponent(s, inside, SOFTPLUS)
                total = tl.sum(tl.sum(dt2, 2), 0)
                x = dt2 * LN2 * u
                if z_ptr is not None:
                    z_row = z_ptr + batch * aligned(z_b, ALIGN) + row * aligned(z_d, ALIGN)
                    z = tl.load(z_row + time * z_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
                    gate = tl.sigmoid(z)
                    g_gate = gy * gate * (1 + z * (1 - gate))
                    gy *= z * gate
                    if D_ptr is not None:
                        y = skip * u
                    else:
                        y = tl.zeros_like(u)
                gx = tl.zeros_like(u)
                gdt = tl.zeros_like(u)
                # The chunk's parts of the parameters' gradients: rows of A, of B and C if constant, D and bias.
                gA_part = by_channel_ptr + (batch * chunks + chunk) * ((3 - VARYING) * states + 2) * channels + channel
                gD_part = gA_part + (3 - VARYING) * states * channels
                for n in tl.range(0, states, num_stages=STAGES):
                    A = tl.load(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
                    if B_CONSTANT:
                        B = tl.load(B_ptr + channel * B_g + n * B_n, valid, 0.0).to(tl.float32)[None, :, None]  # (R,)
                    else:
                        at = B_row + n * aligned(B_n, ALIGN)
                        B = tl.load(at + time * B_l, inside, 0.0).to(tl.float32)  # (S, 1, E)
                    if C_CONSTANT:
                        C = tl.load(C_ptr + channel * C_g + n * C_n, valid, 0.0).to(tl.float32)[None, :, None]  # (R,)
                    else:
                        at = C_row + n * aligned(C_n, ALIGN)
                        C = tl.load(at + time * C_l, inside, 0.0).to(tl.float32)  # (S, 1, E)
                    if entering_ptr is not None:
                        at = entering_ptr + (sequence * states + n) * (chunks + 1) + chunk
                        entering = tl.load(at, valid, 0.0)  # (R,)
                    else:
                        entering = tl.zeros([ROWS], tl.float32)
                    if PARALLEL:
                        carry = tl.load(carry_ptr + (sequence * states + n) * chunks + chunk, valid, 0.0)  # (R,)
                    else:
                        carry = tl.load(carry_ptr + sequence * states + n, valid, 0.0)  # (R,)
                    if not ONE_STATE:
                        before = inside & (block > 0)
                        if not B_CONSTANT:
                            gB = tl.load(gB_part + n * length + time, before, 0.0)  # (S, 1, E)
                        if not C_CONSTANT:
                            gC = tl.load(gC_part + n * length + time, before, 0.0)  # (S, 1, E)
                    decay = tl.exp2(A[None, :, None] * dt2)
                    inject = B * x
                    g, carry = _adjoints_against_time(decay, C * gy, tl.exp2(A * total), carry, position, steps)
                    decayed = _decayed_in_time(decay, inject, entering, position, steps)
                    h = decayed + inject
                    if not PARALLEL:
                        tl.store(carry_ptr + sequence * states + n, carry, valid)  # (R,)
                    if z_ptr is not None:
                        y += C * h
                    gx += B * g
                    g_log = g * decayed  # gradient of the decay's logarithm dt A
                    gdt += A[None, :, None] * g_log
                    tl.store(gA_part + n * channels, tl.sum(tl.sum(g_log * dt2, 2), 0) * LN2, valid)  # (R,)
                    if B_CONSTANT:
                        tl.store(gA_part + (states + n) * channels, tl.sum(tl.sum(g * x, 2), 0), valid)  # (R,)
                    elif ONE_STATE:
                        gB_sum += tl.sum(g * x, 1)[:, None, :]
                    else:
                        at = gB_part + n * length + time
                        tl.store(at, gB + tl.sum(g * x, 1)[:, None, :], inside)  # (S, 1, E)
                    if C_CONSTANT:
                        at = gA_part + ((2 - VARYING) * states + n) * channels
                        tl.store(at, tl.sum(tl.sum(gy * h, 2), 0), valid)  # (R,)
                    elif ONE_STATE:
                        gC_sum += tl.sum(gy * h, 1)[:, None, :]
                    else:
                        at = gC_part + n * length + time
                        tl.store(at, gC + tl.sum(gy * h, 1)[:, None, :], inside)  # (S, 1, E)
                if not ONE_STATE:
                    # Again rather than in registers through the loop over the states.
                    u = tl.load(u_row + time * u_l, inside & mask, 0.0).to(tl.float32)  # (S, R, E)
                    s = tl.load(delta_row + time * delta_l, inside & mask, padding).to(tl.float32) * LOG2E  # (S, R, E)
                    if bias_ptr is not None:
                        s += (tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32) * LOG2E)[None, :, None]  # (R,)
                gu = gx * (dt2 * LN2)
                if D_ptr is not None:
                    gu += skip * gy
                    g_sum = tl.sum(tl.sum(gy * u, 2), 0)
                    tl.store(gD_part, g_sum, valid)  # (R,)
                gdelta = gdt + gx * u
                if SOFTPLUS:
                    # sigmoid(s) = 2^s / (1 + 2^s) = 2^(s - log2(1 + 2^s)), s with the factor log2(e)
                    gdelta *= tl.exp2(s - dt2)
                else:
                    gdelta = tl.where(inside, gdelta, 0.0)
                if bias_ptr is not None:
                    g_sum = tl.sum(tl.sum(gdelta, 2), 0)
                    tl.store(gD_part + channels, g_sum, valid)  # (R,)
                if z_ptr is not None:
                    gz_row = gz_ptr + batch * aligned(gz_b, ALIGN) + row * aligned(gz_d, ALIGN)
                    tl.store(gz_row + time * gz_l, g_gate * y, inside & mask)  # (S, R, E)
                gu_row = gu_ptr + batch * aligned(gu_b, ALIGN) + row * aligned(gu_d, ALIGN)
                tl.store(gu_row + time * gu_l, gu, inside & mask)  # (S, R, E)
                gdelta_row = gdelta_ptr + batch * aligned(gdelta_b, ALIGN) + row * aligned(gdelta_d, ALIGN)
                tl.store(gdelta_row + time * gdelta_l, gdelta, inside & mask)  # (S, R, E)
            if ONE_STATE and not B_CONSTANT:
                tl.store(gB_part + time, gB_sum, inside)  # (S, 1, E)
            if ONE_STATE and not C_CONSTANT:
                tl.store(gC_part + time, gC_sum, inside)  # (S, 1, E)


def _entering(
    scan: Scan, chunk: tuple[int, int], parallel: bool, g: Tensor | None = None, g_state: Tensor | None = None
) -> Tensor:
    """States (B, D, N, chunks + 1) that enter each chunk; if the gradient `g` of the output is given, the adjoints
    (B, D, N, chunks) that enter from behind.
    """
    lanes, per_lane = chunk
    rows, stages, options = _chunk_blocks(scan)
    chunks = cdiv(scan.length, lanes * per_lane)
    adjoint = g is not None
    shape = (scan.batch, scan.channels, scan.states)
    entering = scan.new(*shape, chunks if adjoint else chunks + 1)
    local = scan.new(*shape, chunks) if parallel else entering
    total = scan.new(scan.batch, scan.channels, chunks) if parallel else None
    P, strides, per_group = (
        (scan.C, scan.C_strides, scan.C_channels) if adjoint else (scan.B, scan.B_strides, scan.B_channels)
    )
    v = g if adjoint else scan.u
    z = scan.z if adjoint else None
    selective_scan_chunk_kernel[(scan.programs(rows) * (chunks if parallel else 1),)](
        scan.delta,
        scan.A,
        P,
        v,
        z,
        scan.bias,
        local,
        total,
        scan.span,
        scan.channels,
        scan.length,
        scan.states,
        per_group,
        *scan.delta.stride(),
        *scan.A.stride(),
        *strides,
        *v.stride(),
        *strides_of(z),
        SOFTPLUS=scan.softplus,
        CONSTANT=per_group == 0,
        ADJOINT=adjoint,
        PARALLEL=parallel,
        ONE_STATE=scan.states == 1,
        ALIGN=scan.alignment(v),
        ROWS=rows,
        LANES=lanes,
        PER_LANE=per_lane,
        STAGES=stages,
        **options,
    )
    if not parallel:
        return entering
    count = math.prod(shape)
    block = min(1024, max(16, next_power_of_2(chunks)))
    block_rows = max(1, 512 // block)
    selective_scan_carry_kernel[(cdiv(count, block_rows),)](
        local,
        total,
        scan.A,
        g_state,
        entering,
        count,
        scan.channels,
        scan.states,
        chunks,
        *scan.A.stride(),
        ADJOINT=adjoint,
        ROWS=block_rows,
        CHUNKS=block,
        num_warps=1,
    )
    return entering


def _steps(scan: Sizes, align: int) -> tuple[int, int]:
    """Lanes and steps of each: what a thread loads at once, 16 bytes if the alignment allows."""
    return 32, max(1, min(align, 16 // scan.itemsize))


def _tail(scan: Sizes, chunk: int) -> int:
    """Steps a lane of the last chunk if it is given fewer than the others, else 0.

    As measured on an H100: of a few chunks the last is worth it, in 16 bits and with one step a lane.
    """
    short = 0 < scan.length % chunk <= 32 < chunk < scan.length < 16 * chunk
    return 1 if short and scan.states == 1 and scan.itemsize == 2 else 0


def _border(scan: Sizes) -> int:
    """Steps of the backward's chunks, if strides are aligned like the length."""
    return math.prod(_steps(scan, math.gcd(scan.length, 16)))


def _launch(registers: int | None = None) -> dict:
    """Options of every launch: one warp, which needs no barriers, and at most so many registers a thread."""
    return {"num_warps": 1} | at_most(registers)


def _forward_blocks(scan: Sizes) -> tuple[int, int, int, dict]:
    """Rows of a program, steps of a chunk, stages and launch options, as measured on an H200."""
    within = max(32, next_power_of_2(scan.length))
    if scan.states > 1:
        if scan.batch * scan.channels < 32 * MIN_PROGRAMS:
            return 2, min(512, within), 2, _launch(168)
        return 2, min(256, within), 2, _launch(96)
    if scan.itemsize > 2:
        return 1, min(256, within), 2, _launch()
    return 2, min(256, within), 1, _launch(80)


def _backward_blocks(scan: Sizes) -> tuple[int, int, int, dict]:
    """Rows of a pass, passes of a program, stages and launch options, as measured on an H100 and an H200."""
    passes = 16 if scan.states > 1 or scan.programs(32) >= 3 * MIN_PROGRAMS else 8
    # With 168 registers three warps share a scheduler; twice as many steps, of 16 bits each, need more.
    return 2, passes, 1, _launch(168 if scan.states == 1 and scan.itemsize > 2 else None)


def _chunk_blocks(scan: Sizes) -> tuple[int, int, dict]:
    return 2, 1, _launch()


def _parallel(programs: int, chunks: int) -> bool:
    """Whether chunks run in parallel, at the cost of reading the inputs twice: only where programs are few."""
    return chunks > 1 and programs < MIN_PROGRAMS


def to_save(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The states that enter the backward's chunks, where the forward meets them on its way."""
    sizes = Sizes(u, A, B, C)
    if _triton_rows.backward_suits(sizes):
        return _triton_rows.to_save(sizes)
    rows, chunk, _, _ = _forward_blocks(sizes)
    borders = cdiv(sizes.length, _border(sizes))
    if sizes.states > 1 or borders == 1 or _parallel(sizes.programs(rows), cdiv(sizes.length, chunk)):
        return []
    return [sizes.new(sizes.batch, sizes.channels, 1, borders + 1)]


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
    saved: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if _triton_rows.forward_suits(scan) or (saved and scan.states > 1):
        return _triton_rows.forward(scan, *saved)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    state = scan.new(scan.batch, scan.channels, scan.states)
    if out.numel() == 0:
        return out, state
    rows, chunk, stages, options = _forward_blocks(scan)
    programs = scan.programs(rows)
    chunks = cdiv(scan.length, chunk)
    parallel = _parallel(programs, chunks)
    carry = state
    if parallel:
        carry = _entering(scan, (32, chunk // 32), True)
        programs *= chunks
    selective_scan_fwd_kernel[(programs,)](
        scan.u,
        scan.delta,
        A,
        scan.B,
        scan.C,
        scan.D,
        scan.z,
        scan.bias,
        out,
        carry,
        saved[0] if saved else None,
        scan.span,
        scan.channels,
        scan.length,
        scan.states,
        scan.B_channels,
        scan.C_channels,
        *scan.u.stride(),
        *scan.delta.stride(),
        *A.stride(),
        *scan.B_strides,
        *scan.C_strides,
        *strides_of(scan.z),
        *out.stride(),
        SOFTPLUS=delta_softplus,
        B_CONSTANT=scan.B_channels == 0,
        C_CONSTANT=scan.C_channels == 0,
        PARALLEL=parallel,
        ONE_STATE=scan.states == 1,
        ALIGN=scan.alignment(),
        EXACT=not parallel and chunks > 16,
        ROWS=rows,
        STEPS=chunk,
        BORDER=_border(scan),
        STAGES=stages,
        **options,
    )
    if parallel:
        state.copy_(carry[..., -1])
    return out, state


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
    saved: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if u.numel() == 0:
        return tuple(None if x is None else torch.zeros_like(x) for x in (u, delta, A, B, C, D, z, delta_bias))
    g, g_state = steps_last(grads[0]), grads[1].contiguous()
    if _triton_rows.backward_suits(scan):
        return _triton_rows.backward(scan, g, g_state, *saved)
    gu, gdelta = torch.empty_like(scan.u), torch.empty_like(scan.delta)
    gz = None if z is None else torch.empty_like(scan.z)
    align = scan.alignment(g, gu, gdelta, gz)
    lanes, per_lane = steps = _steps(scan, align)
    rows, blocks, stages, options = _backward_blocks(scan)
    chunks = cdiv(scan.length, lanes * per_lane)
    programs = scan.programs(rows * blocks)
    parallel = _parallel(programs, chunks)
    parts = Parts(scan, chunks, programs)
    entering = None
    if saved and lanes * per_lane == _border(scan):
        (entering,) = saved
    elif chunks > 1:
        # One state goes through the chunks in a register; several do so faster in a kernel of their own.
        entering = _entering(scan, steps, parallel or scan.states > 1)
    carry = _entering(scan, steps, True, g, g_state) if parallel else g_state.clone()
    selective_scan_bwd_kernel[(programs * (chunks if parallel else 1),)](
        g,
        scan.u,
        scan.delta,
        A,
        scan.B,
        scan.C,
        scan.D,
        scan.z,
        scan.bias,
        entering,
        carry,
        gu,
        gdelta,
        gz,
        parts.by_channel,
        parts.by_step,
        scan.span,
        scan.channels,
        scan.length,
        scan.states,
        scan.B_channels,
        scan.C_channels,
        *g.stride(),
        *scan.u.stride(),
        *scan.delta.stride(),
        *A.stride(),
        *scan.B_strides,
        *scan.C_strides,
        *strides_of(scan.z),
        *gu.stride(),
        *gdelta.stride(),
        *strides_of(gz),
        SOFTPLUS=delta_softplus,
        B_CONSTANT=scan.B_channels == 0,
        C_CONSTANT=scan.C_channels == 0,
        PARALLEL=parallel,
        ONE_STATE=scan.states == 1,
        ALIGN=align,
        ROWS=rows,
        BLOCKS=blocks,
        LANES=lanes,
        PER_LANE=per_lane,
        TAIL=0 if parallel else _tail(scan, lanes * per_lane),
        STAGES=stages,
        PREFETCH=scan.takes_ptx and scan.states == 1,
        **options,
    )
    gA, gB, gC, gD, gbias = parts.totals()
    return gu, gdelta, gA, gB, gC, gD, gz, gbias
