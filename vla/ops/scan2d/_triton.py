"""Triton kernels of the directional scan: every direction walks the map in place, see the README for the design."""

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import mul
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    INTERPRETED,
    LN2,
    LOG2E,
    PTX,
    Kernel,
    at_most,
    cdiv,
    compose,
    kernel,
    next_power_of_2,
    pick,
    product_precision,
    rounded_product,
    settle,
    softplus2,
    sum_maps,
    sum_parts,
)

try:
    from triton.language import target_info
except ImportError:  # before 3.5, where kernels do not know what they are compiled for
    target_info = None
ADDS_IN_MEMORY = tl.constexpr(PTX.value and target_info is not None)

# Whether a launch sums up over directions before another one, or after it.
FIRST = tl.constexpr(1)
SECOND = tl.constexpr(2)


@triton.jit
def _softplus2(s, EXACT: tl.constexpr):
    """`softplus2`, for inputs of 16 bits with a logarithm that is exact to 6e-5."""
    if EXACT:
        return softplus2(s)
    # A negation would be a subtraction from zero, an instruction more.
    p = tl.exp2(-1.0 * tl.abs(s))
    series = -0.22711934459943417 + 0.05965146767059798 * p
    series = 0.4418988155745579 + series * p
    series = -0.7169874316943221 + series * p
    series = 1.442613211519124 + series * p
    return tl.maximum(s, 0.0) + p * series


@triton.jit
def _kept(decay1, state1, kept1, decay2, state2, kept2):
    """Composition of two runs of steps that also tells what its last step has `kept` of the state before it."""
    return decay1 * decay2, decay2 * state1 + state2, decay2 * state1 + kept2


@triton.jit
def _handed(decay1, state1, before1, out1, decay2, state2, before2, out2):
    """Composition of two runs of steps that also keeps the state before its last step, as `before` and `out`."""
    return decay1 * decay2, decay2 * state1 + state2, decay1 * before2, before2 * state1 + out2


@triton.jit
def _sums(first1, first2, second1, second2):
    return first1 + second1, first2 + second2


@triton.jit
def _pick_both(a, b, index, i):
    """`pick` of two tiles, together where they lie in several warps."""
    a = tl.where(index == i, a.to(tl.int32, bitcast=True), 0)
    b = tl.where(index == i, b.to(tl.int32, bitcast=True), 0)
    a, b = tl.reduce((a, b), 0, _sums)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def _composed(decay, state, S: tl.constexpr, TOGETHER: tl.constexpr):
    """What S segments do to a state, (S, D), composed.

    With TOGETHER what leaves the last segment passes between warps in one exchange. Where registers are full, two
    exchanges spill less.

    Returns:
        Of the state that enters each segment, (S, D), what it has of the state before all of them, as a factor, and of
        the segments; the state that leaves the last, (D,), as if from zero; and the product of the decays.
    """
    s = tl.arange(0, S)[:, None]
    before = tl.full(state.shape, 1.0, tl.float32)
    out = -0.0 * before
    if S > 1:
        decay, state, before, out = tl.associative_scan((decay, state, before, out), 0, _handed)
    if TOGETHER:
        decay, state = _pick_both(decay, state, s, S - 1)
    else:
        decay, state = pick(decay, s, S - 1), pick(state, s, S - 1)
    return before, out, state, decay


@triton.jit
def _segments(decay, state, carry, S: tl.constexpr, REVERSE: tl.constexpr, TOGETHER: tl.constexpr):
    """What S segments do to a state, (S, D), composed, from the state `carry` (D,) before all of them.

    Returns:
        The states that enter the segments, (S, D), the one that leaves the last, (D,), and the product of the decays.
    """
    # A scan's `reverse=True` would turn every warp's values around.
    if REVERSE:
        decay, state = tl.flip(decay, 0), tl.flip(state, 0)
    before, out, state, decay = _composed(decay, state, S, TOGETHER)
    entry = out + before * carry[None, :]
    if REVERSE:
        entry = tl.flip(entry, 0)
    return entry, state + decay * carry, decay


@triton.jit
def _ends(decay, step, T: tl.constexpr):
    """What each segment of T steps `h = decay h + step` in a tile (T, S, D) does to a state: decays, states, (S, D)."""
    decay, h = tl.associative_scan((decay, step), 0, compose)
    t = tl.arange(0, T)[:, None, None]
    return pick(decay, t, T - 1), pick(h, t, T - 1)


@triton.jit
def _turns(index, K, blocks, GROUPED: tl.constexpr):
    """Turns of a program that walks directions one after the other, from its number: those of all, or of a group's one.

    Returns:
        Its block of channels, its first turn and the one after its last, and what is left of the number.
    """
    block = index % blocks
    index = index // blocks
    begin = 0
    end = 2 * K
    if GROUPED:
        begin = index % K
        end = begin + 1
        index = index // K
    return block, begin, end, index


@triton.jit
def _turn(turn, K, chosen, columns, order, ALONE: tl.constexpr):
    """Which direction a program walks in its turn, of 2K: rows before columns, so that a direction's reverse follows it
    and finds in the cache what it has left. One that walks ALONE has but one.

    Returns:
        The direction, whether this launch walks it in this turn, and whether it is the first, and the last, that gives
        to a sum.
    """
    if ALONE:
        return turn, True, True, True
    k = turn % K
    late = turn // K
    rows = chosen & ~columns
    columns = chosen & columns
    own = tl.where(late == 1, columns, rows)
    first = (order != SECOND) & ((own & ((1 << k) - 1)) == 0) & ((late == 0) | (rows == 0))
    last = (order != FIRST) & ((own >> k) == 1) & ((late == 1) | (columns == 0))
    return k, (own >> k) & 1 == 1, first, last


@triton.jit
def _direction(k, flips, columns, line, height, width, AXES: tl.constexpr, PER_LINE: tl.constexpr):
    """How direction k visits the map: its number of steps, and (turned round, length of a line, first pixel, distance
    of neighbouring steps' pixels, what the end of a line adds to that)."""
    column = AXES == "columns" if AXES != "both" else (columns >> k) & 1 == 1
    flip = (flips >> k) & 1
    inner = tl.where(column, height, width)
    stride = tl.where(column, width, 1)
    wrap = tl.where(column, 1 - height * width, 0)
    length = height * width
    first = 0
    if PER_LINE:
        first = line * tl.where(column, 1, width)
        length = tl.where(line * inner < length, inner, 0)
    return length, (flip, inner, first, stride, wrap)


@triton.jit
def _side(side, K, flips, columns):
    """The direction that is a side of the maps that directions and their reverses share, 0 to K - 1: rows, or what
    there is, and then columns, both forwards and back."""
    every = (1 << K) - 1
    column = (columns != 0) & ((columns == every) | (side >= 2))
    chosen = tl.where(column, columns, every & ~columns) & tl.where(side % 2 == 1, flips, every & ~flips)
    return chosen // 2 - chosen // 8  # the bit's number


@triton.jit
def _pair(index, words_ptr, K, flips, columns, blocks, runs):
    """What a walk apart is, from its number: neighbours are a direction and its reverse.

    Returns:
        Flags of its runs and of the reverse's, each in the order in which they are walked; whether it is the second of
        the pair; the number of the pair's map; its direction; its block of channels and its sequence.
    """
    flags_ptr = words_ptr + 1 + index.to(tl.int64) * runs
    reverse_flags_ptr = words_ptr + 1 + (index ^ 1).to(tl.int64) * runs
    side = index % 2
    block = index // 2 % blocks
    index = index // 2 // blocks
    axis = index % (K // 2)
    k = _side(2 * axis + side, K, flips, columns)
    return flags_ptr, reverse_flags_ptr, side, axis, k, block, index // (K // 2)


@triton.jit
def _wait(flag_ptr):
    """Until the program that sets a flag has, and what it has written before is seen."""
    # An acquisition empties the multiprocessor's cache: only one. The compiler drops what does not look at its value.
    while tl.atomic_add(flag_ptr, 0, sem="relaxed") == 0:
        pass
    while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
        pass


@triton.jit
def _tell(flag_ptr):
    """Sets the flag that `_wait` waits for."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release")


@triton.jit
def _add_to(ptr, value, mask, follows):
    """Stores a value, or where the program `follows` another one adds it to what that has stored."""
    IN_MEMORY: tl.constexpr = target_info.cuda_capability_geq(9) if ADDS_IN_MEMORY else False
    if not IN_MEMORY:
        value += tl.load(ptr, mask=mask & follows, other=0.0)
        tl.store(ptr, value, mask=mask)
    elif follows:
        # Without a wait for what is there. Only one program adds there, so that no order decides about the result.
        tl.atomic_add(ptr, value.to(ptr.dtype.element_ty), mask=mask, sem="relaxed")
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pixels(o, slot, slots, direction, AXES: tl.constexpr, LONG: tl.constexpr):
    """Row-major numbers of the pixels at places `slot + o` of a direction, and their places in the order of the map.

    A direction has `slots` places, the map's pixels and then places without one, so that a direction and its
    reverse cut the map into the same tiles. LONG lines are not shorter than a tile.
    """
    flip, inner, first, stride, wrap = direction
    sign = 1 - 2 * flip
    at = flip * (slots - 1) + sign * slot
    if AXES == "rows":
        return first + at + sign * o, at + sign * o
    along = at % inner + sign * o
    if LONG:
        i = (along >= inner).to(tl.int32) - (along < 0).to(tl.int32)
    else:
        # A quotient in float32 is exact here: the numerator is below the length of a line plus a chunk.
        reciprocal = 1.0 / inner.to(tl.float32)
        i = tl.floor(along.to(tl.float32) * reciprocal + 0.5 * reciprocal).to(tl.int32)
    line = at // inner
    return first + at * stride + line * wrap + (sign * stride) * o + i * wrap, at + sign * o


@triton.jit
def _visit(o, slot, slots, direction, length, AXES: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr):
    """Row-major numbers of the pixels at places `slot + o` of a direction, and which of them are pixels."""
    pixel, place = _pixels(o, slot, slots, direction, AXES, LONG)
    return pixel.to(tl.int64) if WIDE else pixel, place < length


@triton.jit
def _load_parameters(
    weight_ptr, bias_ptr, k, d, d_mask, channels, R: tl.constexpr, R_PAD: tl.constexpr, FOLDED: tl.constexpr
):
    """The time step's weight (R, D) and bias (D,) of direction k, times log2(e); FOLDED, the weight's last row, for
    which `_load_low` has ones, is the bias."""
    r = tl.arange(0, R_PAD if R_PAD > 0 else 1)
    bias = tl.zeros(d.shape, tl.float32)
    weight = tl.zeros((r.shape[0], d.shape[0]), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32) * LOG2E
    if R_PAD > 0:
        weight_mask = (r < R)[:, None] & d_mask[None, :]
        rows = (k * channels + d) * R
        weight = tl.load(weight_ptr + rows[None, :] + r[:, None], mask=weight_mask, other=0.0).to(tl.float32) * LOG2E
    if FOLDED:
        weight = tl.where((r == R_PAD - 1)[:, None], bias[None, :], weight)
    return weight, bias


@triton.jit
def _load_skip(D_ptr, k, K, d, d_mask, channels, GROUPED: tl.constexpr):
    """The skip weight (D,) of direction k, or of all directions together where they are summed."""
    skip = tl.zeros(d.shape, tl.float32)
    if D_ptr is not None:
        if GROUPED:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        else:
            for i in range(K):
                skip += tl.load(D_ptr + i * channels + d, mask=d_mask, other=0.0).to(tl.float32)
    return skip


@triton.jit
def _load_rows(ptr, pixel, mask, d, s_p):
    """Channels d of some pixels, (T * S, D)."""
    return tl.load(ptr + ((pixel * s_p)[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def _tile(rows, T: tl.constexpr, S: tl.constexpr):
    """Rows (T * S, D) in float32, as (T, S, D)."""
    return tl.reshape(rows.to(tl.float32), (T, S, rows.shape[1]))


@triton.jit
def _load_column(ptr, at, mask, T: tl.constexpr, S: tl.constexpr):
    """One number a pixel, (T, S, 1)."""
    return tl.reshape(tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32), (T, S))[:, :, None]


@triton.jit
def _load_decay(A_ptr, n, d, d_mask, N: tl.constexpr):
    """A of state n, (D,)."""
    return tl.load(A_ptr + d * N + n, mask=d_mask, other=0.0).to(tl.float32)


@triton.jit
def _load_columns(B_ptr, C_ptr, n, at, mask, B_s, C_s, T: tl.constexpr, S: tl.constexpr):
    """B and C of state n times log(2) of some pixels, (T, S, 1)."""
    return _load_column(B_ptr + n * B_s, at, mask, T, S), _load_column(C_ptr + n * C_s, at, mask, T, S) * LN2


@triton.jit
def _load_state(
    B_ptr, C_ptr, border_ptr, origin_ptr, n, at, mask, d, d_mask, channels, B_s, C_s,
    N: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, DECAYED: tl.constexpr,
):  # fmt: skip
    """What `_load_columns` loads of state n, and what enters the tile (D,)."""
    b, c = _load_columns(B_ptr, C_ptr, n, at, mask, B_s, C_s, T, S)
    entry = tl.load(border_ptr + n * channels + d, mask=d_mask, other=0.0)
    if DECAYED:
        decay = tl.load(border_ptr + (N + n) * channels + d, mask=d_mask, other=0.0)
        entry += decay * tl.load(origin_ptr + n * BLOCK_D + tl.arange(0, BLOCK_D))
    return b, c, entry


@triton.jit
def _load_low(
    dt_ptr, at, mask, d, d_mask, dt_s, R: tl.constexpr, R_READ: tl.constexpr, R_PAD: tl.constexpr,
    ALIGNED: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Time steps of some pixels, (T * S, R) with what follows in memory up to R_READ; without a rank (T * S, D)."""
    if R > 0:
        d = tl.arange(0, R_PAD)
        d_mask = d < R_READ
    at = at >> ALIGNED << ALIGNED  # what `tl.multiple_of` says does not survive here
    other = 0.0
    if FOLDED:
        other = tl.where(d == R_PAD - 1, 1.0, 0.0).to(dt_ptr.dtype.element_ty)[None, :]
    return tl.load(dt_ptr + (at[:, None] + (d * dt_s)[None, :]), mask=mask[:, None] & d_mask[None, :], other=other)


@triton.jit
def _load_factors(dt_ptr, at, mask, dt_s, R: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """Time steps of some pixels, R of (T, S, 1)."""
    factors = ()
    for r in tl.static_range(R):
        factors = factors + (_load_column(dt_ptr + r * dt_s, at, mask, T, S),)
    return factors


@triton.jit
def _load_weights(weight_ptr, k, d, d_mask, channels, R: tl.constexpr):
    """Columns of the time step's weight of direction k times log2(e), R of (D,)."""
    weights = ()
    for r in tl.static_range(R):
        weight = tl.load(weight_ptr + (k * channels + d) * R + r, mask=d_mask, other=0.0)
        weights = weights + (weight.to(tl.float32) * LOG2E,)
    return weights


@triton.jit
def _short_time_step(factors, weights, bias, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """`_time_step` from `_load_factors` and `_load_weights`."""
    step = bias[None, None, :]
    for r in tl.static_range(len(factors)):
        step = step + factors[r] * weights[r][None, None, :]
    return _softplus2(step, EXACT) if SOFTPLUS else step


@triton.jit
def _are_neighbours(B_ptr, C_ptr):
    """Whether B and C in 16 bits are the two halves of a word in memory."""
    first = B_ptr.to(tl.int64)
    return (C_ptr.to(tl.int64) == first + 2) & (first % 4 == 0)


@triton.jit
def _load_halves(B_ptr, C_ptr, at, mask, T: tl.constexpr, S: tl.constexpr):
    """B and C in bfloat16 of the only state of some pixels, as the halves of a word, (T, S, 1): where they are
    neighbours in memory, in one load."""
    if _are_neighbours(B_ptr, C_ptr):
        word = tl.load(B_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (at >> 1), mask=mask, other=0)
    else:
        b = tl.load(B_ptr + at, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        c = tl.load(C_ptr + at, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        word = (b & 0xFFFF) | (c << 16)
    return tl.reshape(word, (T, S))[:, :, None]


@triton.jit
def _load_step(
    x_ptr, dt_ptr, B_ptr, C_ptr, pixel, mask, d, d_mask, x_mask, vector, k, xs_p, ps_k, ps_p, dt_s, B_s, C_s,
    R: tl.constexpr, R_READ: tl.constexpr, R_PAD: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, SHORT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the forward asks for of a tile before it works on it: x (T * S, D), time steps, and with COLUMNS B and C."""
    at = k * ps_k + pixel * ps_p
    x_rows = _load_rows(x_ptr, pixel, mask[:, None] & x_mask[None, :], vector, xs_p)
    if SHORT:
        low = _load_factors(dt_ptr, at, mask, dt_s, R, T, S)
    else:
        low = _load_low(dt_ptr, at, mask, d, d_mask, dt_s, R, R_READ, R_PAD, ALIGNED, FOLDED)
    columns = ()
    if COLUMNS == "halves":
        columns = (_load_halves(B_ptr, C_ptr, at, mask, T, S),)
    elif COLUMNS == "apart":
        columns = _load_columns(B_ptr, C_ptr, 0, at, mask, B_s, C_s, T, S)
    return x_rows, low, columns


@triton.jit
def _product(a, b, out, PRECISION: tl.constexpr):
    """out + a @ b, see `product_precision`."""
    if PRECISION == "bf16":
        out = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), out)
    else:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), out, input_precision=PRECISION)
    return out


@triton.jit
def _add_channels(tile, column, sums, PRECISION: tl.constexpr):
    """Adds the channels of a tile (T, S, D) to a column of `sums`, (T * S, columns).

    As a product with ones: the tensor cores need a few instructions, where lanes would exchange every row's values.
    """
    rows: tl.constexpr = tile.shape[0] * tile.shape[1]
    ones = tl.where(tl.arange(0, sums.shape[1]) == column, 1.0, 0.0)
    ones = tl.broadcast_to(ones[None, :], (tile.shape[2], sums.shape[1]))
    return _product(tl.reshape(tile, (rows, tile.shape[2])), ones, sums, PRECISION)


@triton.jit
def _time_step(
    low, weight, bias, T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Time steps before and after softplus, times log2(e), (T, S, D), from what `_load_low` has loaded."""
    if R > 0:
        step = tl.zeros((T * S, bias.shape[0]), tl.float32)
        if PRECISION == "bf16":
            # The weight is float32: its rest after rounding takes part.
            step = _product(low, weight - weight.to(tl.bfloat16).to(tl.float32), step, PRECISION)
        step = _product(low, weight, step, PRECISION)
    else:
        step = low.to(tl.float32) * LOG2E
    step = settle(tl.reshape(step, (T, S, bias.shape[0])))
    if not FOLDED:
        step += bias[None, None, :]
    return step, _softplus2(step, PRECISION == "tf32x3") if SOFTPLUS else step


@kernel
def scan2d_states_kernel(
    x_ptr, gy_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, weight_ptr, bias_ptr, total_ptr, border_ptr,
    K, flips, columns, height, width, channels, blocks, sequences, runs, tiles,
    xs_b, xs_p, gs_b, gs_p, ps_b, ps_k, ps_p, dt_s, B_s, C_s,
    N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, R_READ: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr, VECTOR: tl.constexpr,
    GROUPED: tl.constexpr, PER_LINE: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr, SPLIT: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """What a run of tiles of one direction does to the states of BLOCK_D channels, with `x`, and to their gradients,
    with `gy`.

    `total_ptr` receives, for every run, (3N, BLOCK_D): the states that leave it, its decays, and the gradients of the
    states handed to the run before, as if from zero. `border_ptr` receives, for every tile, the states that enter it,
    (N, D), or with several runs also the decays of the run before it, (2N, D).
    """
    block = tl.program_id(0) % blocks
    k = tl.program_id(0) // blocks % K
    run = tl.program_id(0) // (blocks * K) % runs
    sequence = tl.program_id(0) // (blocks * K * runs)
    b = (sequence // sequences).to(tl.int64)
    if x_ptr is not None:
        x_ptr += b * xs_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b + k * ps_k

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
    n_index = tl.arange(0, N_PAD)[:, None]
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    length, direction = _direction(k, flips, columns, sequence % sequences, height, width, AXES, PER_LINE)
    slots = runs * tiles * (T * S)
    run = tl.where(direction[0] == 1, runs - 1 - run, run)

    weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD, FOLDED)
    walk = ((sequence * K + k) * blocks + block).to(tl.int64) * runs + run
    tile_at = ((sequence * K + k).to(tl.int64) * runs + run) * tiles
    at = n_index * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    n_mask = n_index < N
    border_mask = n_mask & d_mask[None, :]
    passed = tl.full((N_PAD, BLOCK_D), 1.0, tl.float32)
    carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
    handed = tl.zeros((N_PAD, BLOCK_D), tl.float32)
    A_k = A_ptr + k * channels * N
    if N == 1:
        A = _load_decay(A_k, 0, d, d_mask, N)
    # Gradients of the first run are handed to none.
    needed = tl.where(run > 0, tiles, 0) if x_ptr is None else tiles
    for tile in tl.range(0, needed, num_stages=1):
        if border_ptr is not None:
            border = border_ptr + (tile_at + tile) * ((2 if SPLIT else 1) * N * channels)
            border += n_index * channels + d[None, :]
            tl.store(border, carry, mask=border_mask)
            if SPLIT:
                tl.store(border + N * channels, passed, mask=border_mask)
        pixel, mask = _visit(o, (run * tiles + tile) * (T * S), slots, direction, length, AXES, LONG, WIDE)
        p_at = pixel * ps_p
        full_mask = mask[:, None] & d_mask[None, :]
        if x_ptr is not None:
            x = _tile(_load_rows(x_ptr, pixel, full_mask, vector, xs_p), T, S)
        if gy_ptr is not None:
            gy = _tile(_load_rows(gy_ptr + b * gs_b, pixel, full_mask, vector, gs_p), T, S)
        low = _load_low(dt_ptr, k * ps_k + p_at, mask, d, d_mask, dt_s, R, R_READ, R_PAD, ALIGNED, FOLDED)
        logit, step = _time_step(low, weight, bias, T, S, R, SOFTPLUS, PRECISION, FOLDED)
        for n in range(N):
            if N > 1:
                A = _load_decay(A_k, n, d, d_mask, N)
            decay = tl.exp2(A[None, None, :] * step)
            if x_ptr is not None:
                b_n = _load_column(B_ptr + n * B_s, p_at, mask, T, S)
                through, ended = _ends(decay, step * (b_n * x), T)
                entry, left, product = _segments(through, ended, pick(carry, n_index, n), S, False, True)
                carry = tl.where(n_index == n, left[None, :], carry)
            if SPLIT:
                before = pick(passed, n_index, n)
                if gy_ptr is not None:
                    c_n = _load_column(C_ptr + b * ps_b + k * ps_k + n * C_s, p_at, mask, T, S) * LN2
                    decay = tl.flip(decay, 0)
                    through, g = _ends(decay, decay * tl.flip(c_n * gy, 0), T)
                    entry, g_left, product = _segments(through, g, tl.zeros_like(before), S, True, True)
                    handed += tl.where(n_index == n, (before * g_left)[None, :], 0.0)
                passed = tl.where(n_index == n, (before * product)[None, :], passed)
    if SPLIT:
        total = total_ptr + walk * (3 * N * BLOCK_D) + at
        if x_ptr is not None:
            tl.store(total, carry, mask=n_mask)
        tl.store(total + N * BLOCK_D, passed, mask=n_mask)
        if gy_ptr is not None:
            tl.store(total + 2 * N * BLOCK_D, handed, mask=n_mask)


@kernel
def scan2d_carry_kernel(
    total_ptr, entry_ptr, runs,
    N: tl.constexpr, BLOCK_D: tl.constexpr, RUNS: tl.constexpr, STATES: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Composes the totals of runs to the states, and gradients of states, with which each is entered: (2N, BLOCK_D)."""
    n = tl.program_id(1)
    total_ptr += tl.program_id(0).to(tl.int64) * runs * (3 * N * BLOCK_D)
    entry_ptr += tl.program_id(0).to(tl.int64) * runs * (2 * N * BLOCK_D)
    lane = tl.arange(0, BLOCK_D)[None, :]
    i = tl.arange(0, RUNS)[:, None]
    for adjoint in tl.static_range(0 if STATES else 1, 2 if ADJOINT else 1):
        carry = tl.zeros((1, BLOCK_D), tl.float32)
        first = runs - 1 if adjoint else 0
        tl.store(entry_ptr + (first * 2 * N + adjoint * N + n) * BLOCK_D + lane, carry)
        for begin in tl.range(0, runs - 1, RUNS):
            mask = begin + i < runs - 1
            run = runs - 1 - begin - i if adjoint else begin + i
            at = total_ptr + (run * 3 * N + n) * BLOCK_D + lane
            decay = tl.load(at + N * BLOCK_D, mask=mask, other=0.0)
            state = tl.load(at + adjoint * (2 * N * BLOCK_D), mask=mask, other=0.0)
            decay, state = tl.associative_scan((decay, state), 0, compose)
            state += decay * carry
            carry = pick(state, i, RUNS - 1)[None, :]
            to = run - 1 if adjoint else run + 1
            tl.store(entry_ptr + (to * 2 * N + adjoint * N + n) * BLOCK_D + lane, state, mask=mask)


@triton.jit
def _word(decay, state):
    """A decay, which has no sign, and a state as one number below zero: 64 bits are written and read at once."""
    high = decay.to(tl.int32, bitcast=True).to(tl.int64) | -(2**31)
    return (high << 32) | (state.to(tl.int32, bitcast=True).to(tl.int64) & (2**32 - 1))


@triton.jit
def _hand_on(words_ptr, decay, state, run, runs, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """Tells the runs after this one what it does to a state, (D,), and finds out with which it is entered.

    Runs are in groups of GROUP. Each leaves its decay and its state as if from zero, and waits for those of the runs
    before it in its group and for the state that has left the group before, which the last of that has left there. What
    is composed in which order does not depend on who comes first.

    Args:
        words_ptr: Numbers that are 0 at first, those of `_word` later: of the runs (runs, D), then of groups.
    """
    lane = tl.arange(0, BLOCK_D)
    groups_ptr = words_ptr + runs * BLOCK_D
    if run < runs - 1:
        tl.atomic_xchg(words_ptr + run * BLOCK_D + lane, _word(decay, state), sem="relaxed")
    i = tl.arange(0, GROUP)[:, None]
    group = run // GROUP
    earlier = group * GROUP - 1 + i
    at = tl.where(i == 0, groups_ptr + (group - 1) * BLOCK_D + 0 * i, words_ptr + earlier * BLOCK_D) + lane[None, :]
    mask = (earlier >= 0) & (earlier < run)
    words = tl.load(at, mask=mask, other=-1, volatile=True)
    while tl.max(tl.max(words, 0), 0) >= 0:
        words = tl.load(at, mask=mask, other=-1, volatile=True)
    decays = ((words >> 32) & (2**31 - 1)).to(tl.int32).to(tl.float32, bitcast=True)
    states = words.to(tl.int32).to(tl.float32, bitcast=True)
    decays, states = tl.where(mask, decays, 1.0), tl.where(mask, states, 0.0)
    unused, states = tl.associative_scan((decays, states), 0, compose)
    entry = pick(states, i, GROUP - 1)
    if (run % GROUP == GROUP - 1) & (run < runs - 1):
        left = _word(tl.zeros_like(decay), state + decay * entry)
        tl.atomic_xchg(groups_ptr + group * BLOCK_D + lane, left, sem="relaxed")
    return entry


@kernel
def scan2d_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, entry_ptr, words_ptr, border_ptr, partial_ptr,
    y_ptr, borders, walks, at_once, chosen, order, K, flips, columns, height, width, channels, blocks, sequences, runs,
    tiles, xs_b, xs_p, ps_b, ps_k, ps_p, dt_s, B_s, C_s, ys_b, ys_p, ys_k,
    N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, R_READ: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr, VECTOR: tl.constexpr,
    GROUPED: tl.constexpr, PER_LINE: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr, SPLIT: tl.constexpr, AXES: tl.constexpr, APART: tl.constexpr,
    AHEAD: tl.constexpr, BORDER: tl.constexpr, SHORT: tl.constexpr, COLUMNS: tl.constexpr,
    SHIFTED: tl.constexpr, CHAINED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of a run of pixels of a picture (or, with PER_LINE, of its i-th lines), through the chosen
    directions in turn. With APART a program walks one direction, and `y_ptr` receives a map for each and its reverse:
    in the half of the map that a direction visits first it stores its results, in the other it adds them to what the
    reverse has stored. Where it does so in runs, each leaves its states in `entry_ptr` for the next.

    With CHAINED, runs of a tile and one state hand on what they do to it, see `_hand_on`.

    Programs that wait have `words_ptr`, numbers that are 0 at first. The first of them counts the programs that have
    started, which it gives runs in their order: what a run waits for has started, and a direction with its reverse. A
    run of each of `at_once` walks comes before their next ones, and all of theirs before those of others; the last
    walks come first, see `last_first`. With APART a flag for every walk and run is next, see `_pair`.

    `border_ptr` receives the states that enter the backward's tiles, (borders, N, D) for every sequence and direction:
    those after every BORDER steps.
    """
    ALONE: tl.constexpr = GROUPED or APART
    IN_ORDER: tl.constexpr = words_ptr is not None
    index = tl.program_id(0)
    if IN_ORDER:
        program = tl.atomic_add(words_ptr, 1, sem="relaxed").to(tl.int32)
        first_walk = program // (at_once * runs) * at_once
        program -= first_walk * runs
        at_once = tl.minimum(at_once, walks - first_walk)
        pixel_run = program // at_once
        index = walks - 1 - (first_walk + program % at_once)
    if APART:
        flags_ptr, reverse_flags_ptr, side, axis, begin, block, index = _pair(
            index, words_ptr, K, flips, columns, blocks, runs
        )  # fmt: skip
        end = begin + 1
    else:
        block, begin, end, index = _turns(index, K, blocks, GROUPED)
    sequence = index
    if not IN_ORDER:
        pixel_run = index % runs
        sequence = index // runs
    b = (sequence // sequences).to(tl.int64)
    if SHIFTED:
        x_ptr += b * (xs_b // VECTOR * VECTOR)
        y_ptr += b * (ys_b // VECTOR * VECTOR)
    else:
        x_ptr += b * xs_b
        y_ptr += b * ys_b
    partial_ptr += b * ys_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b
    C_ptr += b * ps_b

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    if SHIFTED:
        # Blocks begin where vectors of channels do, before the group. Those that reach out of it are read, too.
        shift = begin * channels % VECTOR
        of_vector = d // VECTOR * VECTOR - shift
        d -= shift
        d_mask = (d >= 0) & (d < channels)
        x_mask = (of_vector > -VECTOR) & (of_vector < channels)
        whole = (of_vector >= 0) & (of_vector + VECTOR <= channels)
        xs_p = xs_p // VECTOR * VECTOR
        ys_p = ys_p // VECTOR * VECTOR
    else:
        d_mask = d < channels
        x_mask = d_mask
    n_index = tl.arange(0, N_PAD)[:, None]
    # Rows of a tile are (t, s) for step t of segment s: neighbouring rows are in different lanes and warps, so that a
    # segment stays in one thread.
    row = tl.arange(0, T * S)
    o = row % S * T + row // S
    t = tl.arange(0, T)[:, None, None]
    at = n_index * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    slots = runs * tiles * (T * S)

    for turn in range(begin, end):
        k, walked, first, last = _turn(turn, K, chosen, columns, order, ALONE)
        if walked:
            length, direction = _direction(k, flips, columns, sequence % sequences, height, width, AXES, PER_LINE)
            run = pixel_run
            if not IN_ORDER:
                run = tl.where(direction[0] == 1, runs - 1 - pixel_run, pixel_run)
            # The width of a thread's loads decides how many lanes the channels of a pixel take.
            if SHIFTED:
                vector = k * channels // VECTOR * VECTOR + block * BLOCK_D + tl.arange(0, BLOCK_D)
            else:
                vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
            if AHEAD or CHAINED:
                # Before the parameters, which a program with a single tile would wait for first.
                pixel, mask = _visit(o, run * tiles * (T * S), slots, direction, length, AXES, LONG, WIDE)
                x_rows, low, of_state = _load_step(
                    x_ptr, dt_ptr, B_ptr, C_ptr, pixel, mask, d, d_mask, x_mask, vector, k, xs_p, ps_k, ps_p, dt_s,
                    B_s, C_s, R, R_READ, R_PAD, ALIGNED, FOLDED, T, S, SHORT, COLUMNS,
                )  # fmt: skip
            if SHORT:
                no_weight, bias = _load_parameters(None, bias_ptr, k, d, d_mask, channels, R, 0, False)
                weight = _load_weights(weight_ptr, k, d, d_mask, channels, R)
            else:
                weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD, FOLDED)
            # The first program, or the first turn, of a map also passes the skip.
            skips = k == 0 if APART else first
            skip = _load_skip(D_ptr, k, K, d, d_mask & skips, channels, GROUPED)
            out_ptr = y_ptr
            if APART:
                out_ptr += axis * tl.cast(ys_k, tl.int64)
                # The tile from which on the walk follows its reverse.
                middle = tl.where(run < runs // 2, tiles, 0) if SPLIT else (tiles + 1 - side) // 2
                if SPLIT and not CHAINED and run > 0:
                    _wait(flags_ptr + run - 1)
            carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
            if SPLIT:
                walk = ((sequence * K + k) * blocks + block).to(tl.int64)
                if not CHAINED:
                    entry_at = (walk * runs + run) * (2 * N * BLOCK_D) + at
                    entry_mask = (n_index < N) & (run > 0)
                    carry += tl.load(entry_ptr + entry_at, mask=entry_mask, other=0.0, volatile=APART)
            if border_ptr is not None:
                border_at = border_ptr + (sequence * K + k).to(tl.int64) * borders * (N * channels)
                # Before a reversed direction, the backward may have fewer places without a pixel.
                before_map = direction[0] * (slots - borders * BORDER)
            A_k = A_ptr + k * channels * N
            if N == 1:
                A = _load_decay(A_k, 0, d, d_mask, N)
            for tile in tl.range(0, tiles, num_stages=1):
                slot = (run * tiles + tile) * (T * S)
                if AHEAD:
                    # Found again: to carry it from tile to tile takes more instructions.
                    same, mask = _visit(o, slot, slots, direction, length, AXES, LONG, WIDE)
                elif not CHAINED:
                    pixel, mask = _visit(o, slot, slots, direction, length, AXES, LONG, WIDE)
                    x_rows, low, of_state = _load_step(
                        x_ptr, dt_ptr, B_ptr, C_ptr, pixel, mask, d, d_mask, x_mask, vector, k, xs_p, ps_k, ps_p, dt_s,
                        B_s, C_s, R, R_READ, R_PAD, ALIGNED, FOLDED, T, S, SHORT, COLUMNS,
                    )  # fmt: skip
                p_at, p_mask, p_low, p_of_state = k * ps_k + pixel * ps_p, mask, low, of_state
                full_mask = mask[:, None] & d_mask[None, :]
                x = _tile(x_rows, T, S)
                y_at = (pixel * ys_p)[:, None] + vector[None, :]
                y = skip[None, None, :] * x
                if not ALONE:
                    earlier = tl.load(partial_ptr + y_at, mask=full_mask & ~first, other=0.0)  # (T * S, D)
                if AHEAD:
                    pixel, mask = _visit(o, slot + T * S, slots, direction, length, AXES, LONG, WIDE)
                    mask &= tile + 1 < tiles
                    x_rows, low, of_state = _load_step(
                        x_ptr, dt_ptr, B_ptr, C_ptr, pixel, mask, d, d_mask, x_mask, vector, k, xs_p, ps_k, ps_p, dt_s,
                        B_s, C_s, R, R_READ, R_PAD, ALIGNED, FOLDED, T, S, SHORT, COLUMNS,
                    )  # fmt: skip

                if SHORT:
                    step = _short_time_step(p_low, weight, bias, SOFTPLUS, PRECISION == "tf32x3")
                else:
                    logit, step = _time_step(p_low, weight, bias, T, S, R, SOFTPLUS, PRECISION, FOLDED)
                if not ALONE:
                    y += _tile(earlier, T, S)
                for n in range(N):
                    if N > 1:
                        A = _load_decay(A_k, n, d, d_mask, N)
                    if COLUMNS == "halves":
                        b_n = (p_of_state[0] << 16).to(tl.float32, bitcast=True)
                        c_n = (p_of_state[0] & -65536).to(tl.float32, bitcast=True) * LN2
                    elif COLUMNS == "apart":
                        b_n, c_n = p_of_state
                    else:
                        b_n, c_n = _load_columns(B_ptr, C_ptr, n, p_at, p_mask, B_s, C_s, T, S)
                    decay = tl.exp2(A[None, None, :] * step)
                    h = step * (b_n * x)
                    through, ended = _ends(decay, h, T)
                    if CHAINED:
                        before, out, state, product = _composed(through, ended, S, True)
                        handed = words_ptr + 1 + walk * (runs + runs // GROUP) * BLOCK_D
                        if APART:
                            handed += walks * runs
                        entry = out + before * _hand_on(handed, product, state, run, runs, BLOCK_D, GROUP)[None, :]
                    else:
                        entry, left, unused = _segments(through, ended, pick(carry, n_index, n), S, False, True)
                        carry = tl.where(n_index == n, left[None, :], carry)
                    if border_ptr is not None:
                        place = slot + o - before_map
                        border = place // BORDER
                        kept = (row < S) & (place % BORDER == 0) & (place >= 0) & (border < borders)
                        rows = border_at + (border.to(tl.int64) * N + n)[:, None] * channels
                        # In the shape of the tile, whose layout a store by segments would not keep to.
                        entries = tl.reshape(tl.broadcast_to(entry[None, :, :], (T, S, BLOCK_D)), (T * S, BLOCK_D))
                        tl.store(rows + d[None, :], entries, mask=kept[:, None] & d_mask[None, :])
                    _, h = tl.associative_scan((decay, tl.where(t == 0, h + decay * entry[None, :, :], h)), 0, compose)
                    y += c_n * h

                y = tl.reshape(y, (T * S, BLOCK_D))
                if SHIFTED:
                    y = y.to(y_ptr.dtype.element_ty)
                    tl.store(out_ptr + y_at, y, mask=p_mask[:, None] & whole[None, :])
                    if SHIFTED > 1:
                        tl.store(out_ptr + y_at, y, mask=p_mask[:, None] & (d_mask & ~whole)[None, :])
                elif APART:
                    if tile == middle:
                        _wait(reverse_flags_ptr + (runs - 1 - run))
                    _add_to(out_ptr + y_at, y, full_mask, tile >= middle)
                    if not SPLIT and tile + 1 == middle:
                        _tell(flags_ptr)
                elif last:
                    tl.store(out_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=full_mask)
                else:
                    tl.store(partial_ptr + y_at, y, mask=full_mask)
            if APART and SPLIT:
                if not CHAINED:
                    leaves = (n_index < N) & (run < runs - 1)
                    tl.store(entry_ptr + entry_at + 2 * N * BLOCK_D, carry, mask=leaves)
                if not CHAINED or run < runs // 2:
                    _tell(flags_ptr + run)
            # The next direction reads what other threads of this program have written.
            tl.debug_barrier()


@kernel
def scan2d_bwd_kernel(
    gy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, entry_ptr, words_ptr, border_ptr,
    partial_ptr, gx_ptr, g_dt_ptr, g_low_ptr, g_A_ptr, g_D_ptr, g_weight_ptr, g_bias_ptr,
    chosen, order, K, flips, columns, height, width, channels, blocks, sequences, runs, tiles,
    gs_b, gs_p, xs_b, xs_p, ps_b, ps_k, ps_p, dt_s, B_s, C_s, os_b, os_p, os_k, ls_block, rs_run,
    N: tl.constexpr, R: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr,
    R_PAD: tl.constexpr, R_READ: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr, VECTOR: tl.constexpr,
    GROUPED: tl.constexpr, PER_LINE: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, LONG: tl.constexpr, SPLIT: tl.constexpr, AXES: tl.constexpr, APART: tl.constexpr,
    AHEAD: tl.constexpr, KEPT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_D channels of a run of pixels through the chosen directions in turn: of x summed over
    directions, of the projections by block of channels, of the parameters by run.

    With KEPT the states at the tiles' borders are those that the forward has met, else with several runs those of a run
    from zero.

    With APART a program walks one direction, and `gx_ptr` receives a map for each and its reverse, and in the half that
    a direction visits last the sum of both, see the forward. `words_ptr` is as there, but gives the last runs first.
    With CHAINED a run waits for the run after it to leave in `entry_ptr` what it hands on.
    """
    ALONE: tl.constexpr = GROUPED or APART
    # Gradients of B and C go through the product that gives those of the time steps, where it has columns for them.
    TOGETHER: tl.constexpr = R > 0 and R + 2 * N <= 16 and PRECISION != "tf32x3"
    DECAYED: tl.constexpr = SPLIT and not KEPT
    # How the product with the weight's gradient lies over several warps decides about all of a tile: side by side along
    # the channels they need nothing of each other for a scan.
    SIDE_BY_SIDE: tl.constexpr = BLOCK_D > 32
    index = tl.program_id(0)
    if APART:
        index = tl.atomic_add(words_ptr, 1, sem="relaxed")
        every = tl.num_programs(0) // runs
        pixel_run = runs - 1 - index // every
        flags_ptr, reverse_flags_ptr, side, axis, begin, block, sequence = _pair(
            index % every, words_ptr, K, flips, columns, blocks, runs
        )  # fmt: skip
        end = begin + 1
    else:
        block, begin, end, index = _turns(index, K, blocks, GROUPED)
        pixel_run = index % runs
        sequence = index // runs
    b = (sequence // sequences).to(tl.int64)
    gy_ptr += b * gs_b
    x_ptr += b * xs_b
    gx_ptr += b * os_b
    partial_ptr += b * os_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b
    C_ptr += b * ps_b
    # Gradients of dt, B and C side by side, one map for each block of channels: (blocks, B, H, W, K, R + 2N). Without a
    # rank that of dt is a map of its own, (B, H, W, K, D).
    g_low_ptr += block.to(tl.int64) * ls_block + b * height * width * K * (R + 2 * N)
    if R == 0:
        g_dt_ptr += b * height * width * K * channels

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    n_index = tl.arange(0, N_PAD)[:, None]
    r = tl.arange(0, R_PAD if R_PAD > 0 else 1)
    row = tl.arange(0, T * S)
    o = row % S * T + row // S
    t = tl.arange(0, T)[:, None, None]
    at = n_index * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    slots = runs * tiles * (T * S)

    for turn in range(begin, end):
        k, walks, first, last = _turn(turn, K, chosen, columns, order, ALONE)
        if walks:
            length, direction = _direction(k, flips, columns, sequence % sequences, height, width, AXES, PER_LINE)
            run = pixel_run
            if not APART:
                run = tl.where(direction[0] == 1, runs - 1 - pixel_run, pixel_run)
            weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD, FOLDED)
            # The first program, or the first turn, of a map also passes the skip.
            skips = k == 0 if APART else first
            skip = _load_skip(D_ptr, k, K, d, d_mask & skips, channels, GROUPED)
            vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
            out_ptr = gx_ptr
            if APART:
                out_ptr += axis * tl.cast(os_k, tl.int64)
                middle = tl.where(run < runs // 2, 0, tiles) if SPLIT else (tiles + 1 - side) // 2
                if CHAINED and run < runs - 1:
                    _wait(flags_ptr + run + 1)
            tile_at = ((sequence * K + k).to(tl.int64) * runs + run) * tiles

            A_k = A_ptr + k * channels * N
            if N == 1:
                A = _load_decay(A_k, 0, d, d_mask, N)
            origin = border_ptr
            handed = tl.zeros((N_PAD, BLOCK_D), tl.float32)
            if SPLIT:
                walk = ((sequence * K + k) * blocks + block).to(tl.int64) * runs + run
                origin = entry_ptr + walk * (2 * N * BLOCK_D)
                handed_mask = (n_index < N) & (run < runs - 1)
                handed += tl.load(origin + N * BLOCK_D + at, mask=handed_mask, other=0.0, volatile=CHAINED)
            # Sums over steps wait in each thread's own place, (S, D), until the walk is over.
            g_A = tl.zeros((N_PAD, S, BLOCK_D), tl.float32)
            g_skip = tl.zeros((S, BLOCK_D), tl.float32)
            g_bias = tl.zeros((S, BLOCK_D), tl.float32)
            if SIDE_BY_SIDE:
                g_weight = tl.zeros((r.shape[0], BLOCK_D), tl.float32)
            else:
                g_weight = tl.zeros((BLOCK_D, r.shape[0]), tl.float32)
            if AHEAD:
                pixel, mask = _visit(o, (run * tiles + tiles - 1) * (T * S), slots, direction, length, AXES, LONG, WIDE)
                low_at = k * ps_k + pixel * ps_p
                next_low = _load_low(dt_ptr, low_at, mask, d, d_mask, dt_s, R, R_READ, R_PAD, ALIGNED, FOLDED)
            for back in tl.range(0, tiles, num_stages=1):
                tile = tiles - 1 - back
                slot = (run * tiles + tile) * (T * S)
                pixel, mask = _visit(o, slot, slots, direction, length, AXES, LONG, WIDE)
                p_at = pixel * ps_p
                full_mask = mask[:, None] & d_mask[None, :]
                border_mask = d_mask
                if SPLIT:
                    # The last runs may have tiles without a pixel, for which the forward has left no states.
                    border_mask &= tl.where(direction[0] == 1, slots - T * S - slot, slot) < length
                gy = _tile(_load_rows(gy_ptr, pixel, full_mask, vector, gs_p), T, S)
                x = _tile(_load_rows(x_ptr, pixel, full_mask, vector, xs_p), T, S)
                border = border_ptr + (tile_at + tile) * ((2 if DECAYED else 1) * N * channels)
                b_n, c_n, entering = _load_state(
                    B_ptr + k * ps_k, C_ptr + k * ps_k, border, origin, 0, p_at, mask, d, border_mask, channels,
                    B_s, C_s, N, T, S, BLOCK_D, DECAYED,
                )  # fmt: skip
                # Last: it goes to shared memory at once, with a barrier that no other load passes.
                if AHEAD:
                    low = next_low
                    next_pixel, next_mask = _visit(o, slot - T * S, slots, direction, length, AXES, LONG, WIDE)
                    next_mask &= tile > 0
                    low_at = k * ps_k + next_pixel * ps_p
                    next_low = _load_low(dt_ptr, low_at, next_mask, d, d_mask, dt_s, R, R_READ, R_PAD, ALIGNED, FOLDED)
                else:
                    low = _load_low(dt_ptr, k * ps_k + p_at, mask, d, d_mask, dt_s, R, R_READ, R_PAD, ALIGNED, FOLDED)
                logit, step = _time_step(low, weight, bias, T, S, R, SOFTPLUS, PRECISION, FOLDED)
                g_low_at = (pixel * K + k) * (R + 2 * N)
                gx_at = (pixel * os_p)[:, None] + vector[None, :]
                gx = tl.full(gy.shape, -0.0, tl.float32)
                g_low = tl.zeros((T * S, r.shape[0]), tl.float32)
                g_step = tl.full(gy.shape, -0.0, tl.float32)
                for n in range(N):
                    if N > 1:
                        A = _load_decay(A_k, n, d, d_mask, N)
                    decay = tl.exp2(A[None, None, :] * step)
                    # Not with `b_n * x`, which would be kept for its second use.
                    added = b_n * (step * x)
                    through, ended = _ends(decay, added, T)
                    entry, left, unused = _segments(through, ended, entering, S, False, False)
                    # Not the difference of h and what was added: that has no digits left of a strongly decayed state.
                    kept = tl.where(t == 0, decay * entry[None, :, :], -0.0)
                    h = tl.where(t == 0, added + decay * entry[None, :, :], added)
                    _, h, kept = tl.associative_scan((decay, h, kept), 0, _kept)
                    if TOGETHER:
                        g_low = _add_channels(gy * h, R + N + n, g_low, PRECISION)
                    else:
                        g_c = tl.reshape(tl.sum(rounded_product(gy, h), axis=2), (T * S,)) * LN2
                        tl.store(g_low_ptr + (g_low_at + (R + N + n)), g_c, mask=mask)
                    # What a step hands on is its decay times its gradient.
                    decay = tl.flip(decay, 0)
                    g = tl.flip(c_n * gy, 0)
                    given = decay * g
                    unused, ended = _ends(decay, given, T)
                    entry, left, unused = _segments(through, ended, pick(handed, n_index, n), S, True, False)
                    handed = tl.where(n_index == n, left[None, :], handed)
                    given = tl.where(t == 0, given + decay * entry[None, :, :], given)
                    g = tl.where(t == 0, g + entry[None, :, :], g)
                    _, _, _, g = tl.associative_scan((decay, given, tl.full(g.shape, 1.0, tl.float32), g), 0, _handed)
                    g = tl.flip(g, 0)
                    kept *= g
                    g_a = tl.sum(kept * step, axis=0)[None, :, :]
                    g_A += g_a if N == 1 else tl.where(n_index[:, :, None] == n, g_a, 0.0)
                    g_step += b_n * (g * x) + (A * LN2)[None, None, :] * kept
                    g *= step
                    gx += g * b_n
                    if TOGETHER:
                        g_low = _add_channels(g * x, R + n, g_low, PRECISION)
                    else:
                        g_b = tl.reshape(tl.sum(rounded_product(g, x), axis=2), (T * S,))
                        tl.store(g_low_ptr + (g_low_at + (R + n)), g_b, mask=mask)
                    if N > 1:
                        b_n, c_n, entering = _load_state(
                            B_ptr + k * ps_k, C_ptr + k * ps_k, border, origin, tl.minimum(n + 1, N - 1), p_at, mask, d,
                            border_mask, channels, B_s, C_s, N, T, S, BLOCK_D, DECAYED,
                        )  # fmt: skip

                if not ALONE:
                    earlier = tl.load(partial_ptr + gx_at, mask=full_mask & ~first, other=0.0)  # (T * S, D)
                if SOFTPLUS:
                    # Of places without a pixel it is zero: they come before all states, or after all gradients.
                    g_step *= tl.exp2(logit - step)
                else:
                    # Their decay may be infinite.
                    g_step = tl.where(tl.reshape(full_mask, (T, S, BLOCK_D)), g_step, 0.0)
                if not FOLDED:
                    g_bias += tl.sum(g_step, axis=0)
                g_step = tl.reshape(g_step, (T * S, BLOCK_D))
                if R_PAD > 0:
                    g_low = _product(g_step, tl.trans(weight), g_low, PRECISION)
                    if TOGETHER:
                        # States, and so what C gets, are times log2(e).
                        g_low *= tl.where(r < R + N, 1.0, LN2)[None, :]
                    low_mask = mask[:, None] & (r < (R + 2 * N if TOGETHER else R))[None, :]
                    tl.store(g_low_ptr + (g_low_at[:, None] + r[None, :]), g_low, mask=low_mask)
                    if SIDE_BY_SIDE:
                        g_weight = _product(tl.trans(low), g_step, g_weight, PRECISION)
                    else:
                        g_weight = _product(tl.trans(g_step), low, g_weight, PRECISION)
                else:
                    g_dt_at = (pixel * K + k)[:, None] * channels + d[None, :]
                    tl.store(g_dt_ptr + g_dt_at, (g_step * LOG2E).to(g_dt_ptr.dtype.element_ty), mask=full_mask)

                if skips:
                    g_skip += tl.sum(gy * x, axis=0)
                gx += skip[None, None, :] * gy
                gx = tl.reshape(gx, (T * S, BLOCK_D))
                if not ALONE:
                    gx += earlier
                if APART:
                    if back == middle:
                        _wait(reverse_flags_ptr + (runs - 1 - run))
                    _add_to(out_ptr + gx_at, gx, full_mask, back >= middle)
                    if not SPLIT and back + 1 == middle:
                        _tell(flags_ptr)
                elif last:
                    tl.store(out_ptr + gx_at, gx.to(gx_ptr.dtype.element_ty), mask=full_mask)
                else:
                    tl.store(partial_ptr + gx_at, gx, mask=full_mask)

            # Gradients of the parameters are rows of one matrix, a row for each run, or for all that hand on.
            parts = (sequence if CHAINED else sequence * runs + run).to(tl.int64) * rs_run
            follows = CHAINED and run < runs - 1
            parameters = parts + k * channels + d  # (D,)
            n_mask = (n_index < N) & d_mask[None, :]
            g_A_at = parts + (k * channels + d)[None, :] * N + n_index
            _add_to(g_A_ptr + g_A_at, tl.sum(g_A, axis=1) * LN2, n_mask, follows)
            if D_ptr is not None:
                if GROUPED:
                    _add_to(g_D_ptr + parameters, tl.sum(g_skip, axis=0), d_mask, follows)
                elif skips:
                    _add_to(g_D_ptr + parts + d, tl.sum(g_skip, axis=0), d_mask, follows)
            if bias_ptr is not None and not FOLDED:
                _add_to(g_bias_ptr + parameters, tl.sum(g_bias, axis=0) * LOG2E, d_mask, follows)
            if R_PAD > 0:
                if SIDE_BY_SIDE:
                    rank, channel = r[:, None], d[None, :]
                else:
                    rank, channel = r[None, :], d[:, None]
                g_weight *= LOG2E
                parameter = k * channels + channel
                inside = channel < channels
                _add_to(g_weight_ptr + parts + parameter * R + rank, g_weight, inside & (rank < R), follows)
                if bias_ptr is not None and FOLDED:
                    at_bias = parts + parameter + 0 * rank
                    _add_to(g_bias_ptr + at_bias, g_weight, inside & (rank == R_PAD - 1), follows)
            if APART and SPLIT:
                if CHAINED:
                    tl.store(origin - N * BLOCK_D + at, handed, mask=(n_index < N) & (run > 0))
                if CHAINED or run >= runs // 2:
                    _tell(flags_ptr + run)
            # The next direction reads sums that other threads of this program have written.
            tl.debug_barrier()


@kernel
def scan2d_merge_kernel(
    parts_ptr, g_dt_ptr, g_B_ptr, g_C_ptr, rows, blocks, ls_block,
    N: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds what the blocks of channels give to dt, B and C, (blocks, rows, R + 2N), and takes the three apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < R + 2 * N)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(blocks):
        at = parts_ptr + block * ls_block.to(tl.int64) + row * (R + 2 * N) + column
        total += tl.load(at, mask=mask, other=0.0)
    if R > 0:
        tl.store(g_dt_ptr + row * R + column, total.to(g_dt_ptr.dtype.element_ty), mask=mask & (column < R))
    column -= R
    tl.store(g_B_ptr + row * N + column, total.to(g_B_ptr.dtype.element_ty), mask=mask & (column >= 0) & (column < N))
    column -= N
    tl.store(g_C_ptr + row * N + column, total.to(g_C_ptr.dtype.element_ty), mask=mask & (column >= 0))


class Config(NamedTuple):
    """How a kernel cuts its work.

    Args:
        T: Steps of a segment, which a thread walks alone.
        BLOCK_D: Channels of a tile.
        VECTOR: Neighbouring channels of a thread.
        num_warps: Warps of a program.
        tiles: Tiles of a run, which a program walks one after the other; 0 for the whole sequence.
        maxnreg: Limit of a thread's registers, for more programs on a multiprocessor.
        ahead: Whether a tile's time steps, and the forward's x, are asked for before the work on the tile before.
        columns: Whether the forward asks for B and C of one state together with x.
        apart: Whether directions are programs of their own, which share a map of results (backward: of sums) with their
            reverses, if they all have one. A sequence is then one run, or an even number of runs.
        chained: Whether runs hand on: of the backward to the one before it, where the forward has kept states; of the
            forward, which then are of one tile, to all after it.
        group: Runs of the forward that look at each other: the first of the next ones sees only what has left the last.
    """

    T: int
    BLOCK_D: int
    VECTOR: int
    num_warps: int
    tiles: int = 0
    maxnreg: int | None = None
    ahead: bool = False
    columns: bool = False
    apart: bool = False
    chained: bool = False
    group: int = 8

    @property
    def S(self) -> int:
        """Segments of a tile: one for each place in which a thread can be, after the channels have been dealt out."""
        return max(1, 32 * self.num_warps * self.VECTOR // self.BLOCK_D)


# Up to 3, 4 and 6 programs a multiprocessor of 132, all run at once; "many" are 12 warps there, too, as are "narrow
# apart", "wide apart" and those that are chained; "many apart" and "wide groups" are 16, "long" and "short" ones are 8.
FORWARD = {
    "runs": Config(8, 32, 4, 1, tiles=4),
    "3": Config(4, 32, 4, 4, maxnreg=168, ahead=True),
    "4": Config(4, 32, 4, 4, maxnreg=128),
    "6": Config(4, 32, 4, 2, maxnreg=168, ahead=True),
    "many": Config(4, 32, 4, 1, maxnreg=168, ahead=True),
    "many states": Config(4, 32, 4, 1),
    "wide": Config(4, 64, 4, 2),
    "chained": Config(8, 32, 4, 2, tiles=1, maxnreg=168, columns=True, apart=True, chained=True),
    "few chained": Config(8, 32, 4, 4, tiles=1, maxnreg=168, columns=True, apart=True, chained=True, group=16),
    "few apart": Config(4, 32, 4, 4, maxnreg=128, apart=True),
    "long apart": Config(8, 32, 4, 4, ahead=True, columns=True, apart=True),
    "short apart": Config(8, 32, 4, 2, ahead=True, columns=True, apart=True),
    "narrow apart": Config(4, 32, 4, 1, maxnreg=168, ahead=True, apart=True),
    "few wide apart": Config(4, 64, 4, 4, maxnreg=168, ahead=True, columns=True, apart=True),
    "wide apart": Config(4, 64, 4, 2, maxnreg=168, ahead=True, apart=True),
    "many apart": Config(4, 64, 4, 2, maxnreg=128, apart=True),
    "chained groups": Config(8, 16, 4, 2, tiles=1, maxnreg=168, columns=True, chained=True),
    "few chained groups": Config(8, 16, 4, 4, tiles=1, maxnreg=168, columns=True, chained=True, group=16),
    "long groups": Config(8, 16, 4, 4, ahead=True, columns=True),
    "long wider groups": Config(8, 32, 4, 8, ahead=True, columns=True),
    "short groups": Config(8, 16, 4, 1, ahead=True, columns=True),
    "many groups": Config(4, 16, 4, 1, maxnreg=168, ahead=True, columns=True),
    "wide groups": Config(4, 128, 4, 4, maxnreg=128),
}
BACKWARD = {
    "runs": Config(4, 32, 4, 1, tiles=9),
    "long runs": Config(4, 32, 4, 1, tiles=18),
    "long runs apart": Config(4, 32, 4, 1, tiles=18, apart=True),
    "many apart": Config(4, 32, 4, 1, ahead=True, apart=True, chained=True),
    "narrow": Config(4, 16, 4, 2),
    "many": Config(4, 32, 4, 1),
    "wide": Config(4, 64, 4, 2, apart=True),
    "high rank": Config(4, 64, 2, 4, apart=True),
    "many high rank": Config(4, 64, 2, 4),
}


# Ranks of time steps that a few multiply-adds expand.
SHORT_RANKS = range(1, 4)
# Programs of one warp with all registers that an H100's 132 multiprocessors run at once.
AT_ONCE = 8 * 132
# Bytes of maps that an H100's second-level cache, of 50 MB, keeps while they are walked; and pictures that are walked
# at once even if they are larger, for while one waits another goes on.
CACHE = 34 * 2**20
FEWEST = 2


def _fwd_config(problem: "_Sizes") -> Config:
    if problem.separable:
        return FORWARD[_apart(problem)]
    if problem.grouped and problem.states == 1 and not problem.per_line:
        if problem.rank in SHORT_RANKS and problem.channels <= 48:
            return FORWARD[_narrow_groups(problem)]
        if problem.channels in range(97, 129) and problem.programs > 6 * 132:
            return FORWARD["wide groups"]
        if problem.rank > 0 and problem.programs <= 132 and problem.length >= 128:
            return FORWARD[_chained(problem)]
    if problem.programs < 132 and problem.length >= 512:
        return FORWARD["runs"]
    if problem.states > 1 and problem.programs < 1024:
        return FORWARD["4"]
    for most in (3, 4, 6):
        if problem.programs <= most * 132:
            return FORWARD[str(most)]
    if problem.channels >= 128 and problem.rank > 32:
        return FORWARD["wide"]
    return FORWARD["many" if problem.states == 1 else "many states"]


def _apart(problem: "_Sizes") -> str:
    """Name of the forward's configuration where directions may be apart."""
    if problem.programs < 132:
        if problem.length < 512:
            return "few apart"
        if problem.programs < 40:
            return _chained(problem)
        # Two programs a multiprocessor, of four directions, or four.
        return "long apart" if problem.programs <= 66 else "short apart"
    if problem.channels < 128:
        return "narrow apart"
    if problem.programs < 198 and problem.length >= 128:
        return "few wide apart"
    return "wide apart" if problem.programs < 1024 else "many apart"


def _chained(problem: "_Sizes") -> str:
    """Name of the forward's configuration for runs that hand on."""
    # Where few sequences are long, how often they wait for each other is what takes time.
    sequences = problem.programs * (1 if problem.grouped else problem.count)
    return "few chained" if sequences <= 16 and problem.length >= 1024 else "chained"


def _pictures_at_once(problem: "_Sizes", x: Tensor) -> int:
    """Pictures that runs which hand on are of at the same time.

    Groups read and write parts of the same lines of memory, each in its own order: as many pictures as a cache holds
    with their results. Directions that write maps of their own don't.
    """
    fitting = CACHE // (2 * x[0].numel() * x.element_size())
    return min(problem.batch, max(FEWEST, fitting)) if problem.grouped else problem.batch


def _narrow_groups(problem: "_Sizes") -> str:
    """Name of the forward's configuration for groups of few channels whose time steps need no tensor cores."""
    programs = problem.batch * problem.count * cdiv(problem.channels, 16)
    if programs < 100:
        return "few chained groups" if programs <= 32 else "chained groups"
    if problem.length > 1024 and problem.channels > 16:
        return "long wider groups"
    if programs <= 4 * 132:
        return "long groups"
    return "short groups" if programs <= AT_ONCE else "many groups"


def _bwd_config(problem: "_Sizes") -> Config:
    narrow = problem.channels <= 16 and problem.states == 1
    if problem.separable and problem.channels in range(17, 128) and problem.length >= 512:
        programs = problem.programs * problem.count
        if programs >= 5 * 132:
            config = BACKWARD["many apart"]
            # Of a second round of programs that is half empty, halves make one and a half.
            many = (1, 2, 4) if programs > AT_ONCE else (1,)
            runs = min(many, key=lambda runs: cdiv(programs * runs, AT_ONCE) / runs)
            return config._replace(tiles=cdiv(problem.length, runs * config.T * config.S))
    # The totals of runs cost more with several states.
    fewest = 132 if problem.states > 1 else 512 if narrow else 640
    if problem.programs < fewest and problem.length >= 512:
        # Of long ones there may be too few.
        long = BACKWARD["long runs apart" if problem.separable else "long runs"]
        enough = problem.programs * cdiv(problem.length, long.tiles * long.T * long.S) >= AT_ONCE
        return long if enough else BACKWARD["runs"]
    if narrow:
        return BACKWARD["narrow"]
    if problem.channels < 128:
        return BACKWARD["many"]
    if problem.rank <= 32:
        return BACKWARD["wide"]
    return BACKWARD["high rank" if problem.programs < 1024 else "many high rank"]


def _is_flat(map: Tensor) -> bool:
    """Whether the pixels of a map (..., H, W) are equally far apart."""
    height, width = map.shape[-2:]
    return height == 1 or width == 1 or map.stride(-2) == width * map.stride(-1)


def _is_walked(map: Tensor) -> bool:
    """Whether kernels walk a map (B, D, H, W) in place: pixels equally far apart, channels neighbours in memory.

    With neighbouring pixels in its place, the steps of a segment would be different lanes'.
    """
    return _is_flat(map) and (map.shape[1] == 1 or map.stride(1) == 1)


def _walked(map: Tensor) -> Tensor:
    """The map itself, or a copy of it that kernels can walk."""
    return map if _is_walked(map) else map.contiguous(memory_format=torch.channels_last)


def _pixel_stride(map: Tensor) -> int:
    """Distance of neighbouring pixels in a flat map (..., H, W)."""
    return map.stride(-2 if map.shape[-1] == 1 else -1)


def _packed(*maps: Tensor) -> list[Tensor]:
    """Flat maps (B, K, E, H, W) that differ in their strides of E only, as views of one projection do."""
    if len({(m.stride(0), m.stride(1), _pixel_stride(m)) for m in maps}) == 1 and all(map(_is_flat, maps)):
        return list(maps)
    sizes = [m.shape[2] for m in maps]
    joined = torch.cat([m.permute(0, 3, 4, 1, 2) for m in maps], dim=-1)
    return list(joined.permute(0, 3, 4, 1, 2).split(sizes, dim=2))


def _reach(*tensors: Tensor) -> int:
    """Elements between the first and the last of a picture's, in the widest of some maps (B, ..., H, W)."""
    reach = 0
    for t in tensors:
        strides = t.stride()[1:]
        reach = max(reach, sum(map(mul, t.shape[1:], strides)) - sum(strides))
    return reach


def _map_strides(map: Tensor) -> tuple[int, int]:
    """Of batch and pixel of a map that kernels can walk."""
    return map.stride(0), _pixel_stride(map)


def _cut(channels: int, length: int, config: Config, apart: bool) -> tuple[int, int, int]:
    tiles = cdiv(length, config.T * config.S)
    runs = cdiv(tiles, config.tiles) if config.tiles else 1
    if apart and (runs > 1 or INTERPRETED.value):
        # The interpreter, whose programs come one after the other, has halves of sequences.
        runs += runs % 2
    return cdiv(channels, config.BLOCK_D), runs, cdiv(tiles, runs)


# Not of a compiler's symbolic sizes, which have no hash.
_known_cut = lru_cache(_cut)


class _Sizes:
    """What the choice of configurations depends on: sizes and a dtype, which a compiler knows, too."""

    def __init__(
        self,
        x: Tensor,
        A: Tensor,
        dt_weight: Tensor | None,
        directions: Sequence[str],
        grouped: bool,
        per_line: bool,
    ):
        self.grouped, self.per_line = grouped, per_line
        # Whether all directions have their reverse, and no line is a sequence of its own.
        axes = {direction.removesuffix("_rev") for direction in directions}
        pairs = sorted(axes | {f"{axis}_rev" for axis in axes})
        self.paired = sorted(directions) == pairs and not (grouped or per_line)
        self.batch, _, self.height, self.width = x.shape
        self.count, self.channels, self.states = A.shape
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        # Sequences of a picture, and the length of the longest.
        self.sequences, self.length = 1, self.height * self.width
        if per_line:
            self.sequences = self.length = max(self.height, self.width)
        # Whether directions apart move no more bytes than a float32 map that all of them add to.
        self.separable = x.dtype == torch.bfloat16 and self.states == 1 and self.paired
        # Programs of 32 channels that walk whole sequences.
        self.programs = self.batch * self.sequences * cdiv(self.channels, 32) * (self.count if grouped else 1)

    def walks_apart(self, config: Config) -> bool:
        return config.apart and self.paired

    def cut(self, config: Config) -> tuple[int, int, int]:
        """Blocks of channels, runs of tiles of a sequence, and tiles of a run."""
        return _cut(self.channels, self.length, config, self.walks_apart(config))

    def borders(self, config: Config, decays: bool = False) -> tuple[int, ...]:
        """Shape of the states with which tiles are entered, if wanted with the decays of the run before."""
        _, runs, tiles = self.cut(config)
        return self.batch * self.sequences, self.count, runs, tiles, self.states * (1 + decays), self.channels


class _Problem(_Sizes):
    """What the launches of a forward or a backward have in common."""

    def __init__(self, x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line):
        super().__init__(x, A, dt_weight, directions, grouped, per_line)
        self.x = _walked(x)
        self.dt, self.B, self.C = _packed(dt, B, C)
        self.A, self.D, self.weight, self.bias = (
            None if t is None else t.contiguous() for t in (A, D, dt_weight, dt_bias)
        )
        self.flips = sum(1 << k for k, direction in enumerate(directions) if direction.endswith("rev"))
        self.columns = sum(1 << k for k, direction in enumerate(directions) if direction.startswith("col"))

        # Neighbouring time steps are loaded 2, 4 or 8 at once where all pixels' start at multiples of that, although
        # what is too many belongs to B and C; the weight has zeros there.
        b, k, r, *_ = self.dt.stride()
        p = _pixel_stride(self.dt)
        width = math.gcd(b, k, p, 8) if r == 1 else 1
        readable = cdiv(self.rank, width) * width
        if readable > min(k, p):
            width, readable = 1, self.rank
        padded = max(16, next_power_of_2(self.rank)) if self.rank else 0
        self.constants = dict(
            N=self.states,
            R=self.rank,
            N_PAD=next_power_of_2(self.states),
            R_PAD=padded,
            R_READ=readable,
            ALIGNED=width.bit_length() - 1,
            # A weight of high rank, whose gradient fills the registers, is the slower for it.
            FOLDED=readable < min(padded, 48) and x.dtype == dt.dtype == torch.bfloat16,
            GROUPED=grouped,
            PER_LINE=per_line,
            SOFTPLUS=delta_softplus,
            PRECISION=product_precision(x, dt),
        )

    def cut(self, config: Config) -> tuple[int, int, int]:
        return _known_cut(self.channels, self.length, config, self.walks_apart(config))

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.dt, self.A, self.B, self.C, self.D, self.weight, self.bias

    def strides(self) -> tuple[int, ...]:
        """Of batch, direction and pixel of dt, B and C, and of their last dimensions."""
        b, k, r, *_ = self.dt.stride()
        return b, k, _pixel_stride(self.dt), r, self.B.stride(2), self.C.stride(2)

    def sums(self, result: Tensor) -> Tensor:
        """Where sums over directions grow: float32 memory laid out like the result, or the result itself."""
        alone = self.count == 1 or self.grouped or result.dtype == torch.float32
        return result if alone else torch.empty_like(result, dtype=torch.float32)

    def columns_ahead(self, config: Config) -> str | None:
        """How B and C are asked for with a tile's x: as the halves of words if they may be that."""
        if self.states > 1 or not config.columns:
            return None
        even = math.gcd(*self.strides()[:3]) % 2 == 0
        return "halves" if even and self.B.dtype == self.C.dtype == torch.bfloat16 else "apart"

    def shifted(self, config: Config, *maps: Tensor) -> int:
        """Whether groups of channels, which do not begin at multiples of a thread's channels, are read from one on."""
        vector, (blocks, runs, _) = config.VECTOR, self.cut(config)
        strides = math.gcd(self.count * self.channels, *(n for m in maps for n in _map_strides(m)))
        over = vector - math.gcd(self.channels, vector)
        room = cdiv(self.channels + over, config.BLOCK_D) == blocks
        walked = runs == 1 or config.chained  # which `states` does not prepare
        if not (self.grouped and self.channels % 16 > 0 and strides % vector == 0 and walked and room):
            return 0
        return 2 if over else 1

    def maps(self, result: Tensor) -> Tensor:
        """A map laid out like the result for each direction and its reverse, (K / 2, numbers of a map)."""
        # bfloat16 has float32's range, which a direction's part of a gradient may need.
        dtype = result.dtype if result.dtype == torch.bfloat16 else torch.float32
        return result.new_empty((self.count // 2, result.numel()), dtype=dtype)

    def sizes(self, config: Config) -> tuple[int, ...]:
        """Arguments of all kernels but one, between their own and the strides."""
        blocks, runs, tiles = self.cut(config)
        picture = (self.height, self.width, self.channels)
        return self.count, self.flips, self.columns, *picture, blocks, self.sequences, runs, tiles

    def options(self, config: Config, *maps: Tensor) -> dict:
        """Keyword arguments of all kernels but one."""
        gradients = self.height * self.width * self.count * (self.rank + 2 * self.states or self.channels)
        wide = max(_reach(self.dt, self.B, self.C, *maps), gradients) >= 2**31
        constants = dict(self.constants)
        if constants["R_PAD"] == config.BLOCK_D:
            # Triton loads matrices of one shape alike.
            constants["ALIGNED"] = min(constants["ALIGNED"], config.VECTOR.bit_length() - 1)
        return dict(
            T=config.T, S=config.S, BLOCK_D=config.BLOCK_D, VECTOR=config.VECTOR, SPLIT=self.cut(config)[1] > 1,
            WIDE=wide, LONG=min(self.height, self.width) >= config.T * config.S, num_warps=config.num_warps,
            **constants, **at_most(config.maxnreg),
        )  # fmt: skip

    def enter(
        self, config: Config, gy: Tensor | None = None, borders: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the walks start from.

        Args:
            gy: Gradient of the result, in the backward.
            borders: States with which the backward's tiles are entered, where the forward has kept them.

        Returns:
            The states, and with `gy` the gradients of states, with which runs are entered, (sequences, K, blocks, runs,
            2N, BLOCK_D), None for a single run; with `gy` the states with which tiles are entered, see `borders`.
        """
        blocks, runs, _ = self.cut(config)
        walks = (self.batch * self.sequences, self.count, blocks, runs)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=self.x.device)

        kept = borders is not None
        if runs == 1 and (gy is None or kept):
            return None, borders
        totals = entries = None
        if runs > 1:
            totals, entries = (new(*walks, rows * self.states, config.BLOCK_D) for rows in (3, 2))
        if gy is not None and not kept:
            borders = new(*self.borders(config, decays=runs > 1))
        maps = (self.x,) if gy is None else (self.x, gy)
        scan2d_states_kernel[(math.prod(walks),)](
            None if kept else self.x, gy if runs > 1 else None, self.dt, self.A, self.B, self.C, self.weight, self.bias,
            totals, None if kept else borders,
            *self.sizes(config), *_map_strides(self.x), *_map_strides(maps[-1]), *self.strides(),
            AXES="both", **self.options(config._replace(maxnreg=None), *maps),
        )  # fmt: skip
        if runs > 1:
            scan2d_carry_kernel[(math.prod(walks[:3]), self.states)](
                totals, entries, runs, N=self.states, BLOCK_D=config.BLOCK_D,
                RUNS=min(16, next_power_of_2(runs)), STATES=not kept, ADJOINT=gy is not None, num_warps=1,
            )  # fmt: skip
        return entries, borders

    def launch(
        self, kernel: Kernel, config: Config, tensors: tuple, strides: tuple[int, ...], *maps: Tensor,
        alone: bool, **constants: bool | int,
    ) -> None:  # fmt: skip
        """Launches a kernel over (sequences, runs, blocks of channels), and directions if each is `alone`.

        Else a program walks all directions that cut the map alike, one after the other. Runs of rows and runs of
        columns cross each other: they are two launches.
        """
        blocks, runs, _ = self.cut(config)
        programs = self.batch * self.sequences * runs * blocks * (self.count if alone else 1)
        every = (1 << self.count) - 1
        rows, columns = every & ~self.columns, self.columns
        if rows and columns and not alone and (runs > 1 or self.per_line):
            launches = ((rows, "rows", FIRST.value), (columns, "columns", SECOND.value))
        else:
            launches = ((every, "both" if rows and columns else "rows" if rows else "columns", 0),)
        for chosen, axes, order in launches:
            kernel[(programs,)](
                *tensors, chosen, order, *self.sizes(config), *strides, AXES=axes, **constants,
                **self.options(config, *maps),
            )  # fmt: skip


def to_save(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line) -> list[Tensor]:
    """The states with which the backward's tiles are entered, which the forward meets anyway.

    Not where they would take more memory than x.
    """
    sizes = _Sizes(x, A, dt_weight, directions, grouped, per_line)
    forward, backward = _fwd_config(sizes), _bwd_config(sizes)
    # The backward's tiles have to begin where segments of the forward do.
    border = backward.T * backward.S
    fits = forward.T * forward.S % border == 0 and border % forward.T == 0
    walks = 1 if grouped else sizes.count  # of a pixel and channel
    small = 4 * walks * sizes.states <= x.dtype.itemsize * border
    return [x.new_empty(sizes.borders(backward), dtype=torch.float32)] if fits and small else []


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    y = torch.empty_like(args[0])
    if y.numel() == 0:
        return y
    out = y if _is_walked(y) else torch.empty_like(y, memory_format=torch.channels_last)
    maps = walk(out, *args, saved=saved)
    if maps is not out:
        sum_maps(maps, out)
    return y if out is y else y.copy_(out)


def walk(out: Tensor, *args, saved: Sequence[Tensor] = ()) -> Tensor:
    """Scans into `out`, a flat map like x, or into a map for rows and one for columns, which are still to be summed.

    Returns:
        `out`, or maps laid out like it, (K / 2, numbers of a map).
    """
    problem = _Problem(*args)
    x = problem.x
    config = _fwd_config(problem)
    apart = problem.walks_apart(config)
    blocks, runs, tiles = problem.cut(config)
    walks = problem.batch * problem.sequences * problem.count * blocks
    entries = words = None
    chained = config.chained and runs > 1 and tiles == problem.states == 1 and (apart or problem.grouped)
    if chained or apart:
        flags = walks * runs if apart else 0
        handed = walks * (runs + runs // config.group) * config.BLOCK_D if chained else 0
        words = x.new_zeros(1 + flags + handed, dtype=torch.int64)
    if apart and runs > 1 and not chained:
        entries = x.new_empty((walks, runs, 2 * problem.states, config.BLOCK_D), dtype=torch.float32)
    elif not chained:
        entries, _ = problem.enter(config)
    borders, count, border = None, 0, 0
    if saved:
        (borders,), backward_config = saved, _bwd_config(problem)
        count, border = borders.shape[2] * borders.shape[3], backward_config.T * backward_config.S
    maps = problem.maps(out) if apart else out
    partial = maps if apart else problem.sums(out)
    at_once = walks // problem.batch * _pictures_at_once(problem, x)
    tensors = (x, *problem.parameters(), entries, words, borders, partial, maps, count, walks, at_once)
    strides = (*_map_strides(x), *problem.strides(), *_map_strides(out), maps.stride(0))
    problem.launch(
        scan2d_fwd_kernel, config, tensors, strides, x, out,
        alone=problem.grouped or apart, APART=apart, AHEAD=config.ahead, BORDER=border,
        SHORT=problem.rank in SHORT_RANKS and config.BLOCK_D <= 16, SHIFTED=problem.shifted(config, x, out),
        COLUMNS=problem.columns_ahead(config), CHAINED=chained, GROUP=config.group,
    )  # fmt: skip
    return maps


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """The gradients of the tensors."""
    x, dt, A, B, C, _, D, dt_weight, dt_bias, *_ = args
    if x.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, dt, A, B, C, D, dt_weight, dt_bias)]
    gx = torch.empty_like(x, memory_format=torch.channels_last)
    maps, parts, g_dt, parameters = walk_back(gx, grads[0], *args, saved=saved)
    if maps is not gx:
        sum_maps(maps, gx)
    blocks, *picture, columns = parts.shape
    rank, states = 0 if dt_weight is None else dt_weight.shape[2], A.shape[2]
    widths = ((rank, dt), (states, B), (states, C))
    low, g_B, g_C = (x.new_empty((*picture, width), dtype=t.dtype) for width, t in widths)
    rows, block = parts[0, ..., 0].numel(), max(1, 2048 // next_power_of_2(columns))
    scan2d_merge_kernel[(cdiv(rows, block),)](
        parts, low, g_B, g_C, rows, blocks, parts.stride(0),
        N=states, R=rank, ROWS=block, COLUMNS=next_power_of_2(columns),
    )  # fmt: skip
    g_A, *g_parameters = parameters
    g_dt, g_B, g_C = (g.permute(0, 3, 4, 1, 2) for g in (g_dt if rank == 0 else low, g_B, g_C))
    return [gx, g_dt, g_A, g_B, g_C, *g_parameters]


def walk_back(
    gx: Tensor, gy: Tensor, *args, saved: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
    """Gradients, those of the maps in the parts that the programs give.

    Returns:
        `gx`, a flat map like x, or maps laid out like it whose sum it is, (K / 2, numbers of a map); what every block
        of channels gives to (dt, B, C) side by side, (blocks, B, H, W, K, R + 2N); the gradient of dt if that has no
        rank, (B, H, W, K, D); and the gradients of A, D, dt_weight and dt_bias.
    """
    _, dt, A, _, _, _, D, dt_weight, dt_bias, *_ = args
    problem = _Problem(*args)
    x, gy = problem.x, _walked(gy)
    config = _bwd_config(problem)
    blocks, runs, _ = problem.cut(config)
    count, states, channels, rank = problem.count, problem.states, problem.channels, problem.rank

    # Every block of channels gives to the gradients that the channels share, every run to those of the parameters.
    picture = (problem.batch, problem.height, problem.width, count)
    parts = x.new_empty((blocks, *picture, rank + 2 * states), dtype=torch.float32)
    g_dt = x.new_empty((*picture, channels), dtype=dt.dtype) if rank == 0 else None
    # Where directions are summed, D has one gradient for all.
    sizes = [A.numel(), 0 if D is None else (count if problem.grouped else 1) * channels]
    sizes += [0 if t is None else t.numel() for t in (dt_weight, dt_bias)]
    apart = problem.walks_apart(config)
    chained = bool(saved) and apart and runs > 1 and (config.chained or not config.tiles)
    rows = problem.batch * problem.sequences * (1 if chained else runs)
    sums = x.new_empty((rows, sum(sizes)), dtype=torch.float32)
    walks = (problem.batch, count, blocks, runs)
    words = x.new_zeros(1 + math.prod(walks), dtype=torch.int32) if apart else None
    if chained:
        entries, (borders,) = x.new_empty((*walks, 2 * states, config.BLOCK_D), dtype=torch.float32), saved
    else:
        entries, borders = problem.enter(config, gy, *saved)
    maps = problem.maps(gx) if apart else gx
    partial = maps if apart else problem.sums(gx)
    tensors = (gy, x, *problem.parameters(), entries, words, borders, partial, maps, g_dt, parts)
    tensors += tuple(sums.split(sizes, dim=1))
    strides = (*_map_strides(gy), *_map_strides(x), *problem.strides(), *_map_strides(gx))
    strides += (maps.stride(0), parts.stride(0), sums.stride(0))
    problem.launch(
        scan2d_bwd_kernel, config, tensors, strides, x, gy, gx,
        alone=problem.grouped or apart, APART=apart, AHEAD=config.ahead, KEPT=bool(saved),
        CHAINED=chained,
    )  # fmt: skip
    g_A, g_D, g_weight, g_bias = sum_parts(sums).split(sizes)
    return (
        maps,
        parts,
        g_dt,
        [
            g_A.view_as(A),
            None if D is None else g_D.view(-1, channels).expand(count, channels),
            None if dt_weight is None else g_weight.view_as(dt_weight),
            None if dt_bias is None else g_bias.view_as(dt_bias),
        ],
    )
