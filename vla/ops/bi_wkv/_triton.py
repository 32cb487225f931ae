"""Triton kernels for bi-WKV; see README.md for the derivation and for the choice of algorithm.

A program walks one block of channels of one segment of a sequence, tile after tile of tokens. A channel belongs to one
thread and a tile's tokens to the registers of that thread, so that a recurrence over tokens is ordinary sequential code
without a shuffle: `_row` and `_put` reach one token of a tile, and cost nothing when a tile lies that way.

Sums over the tokens of one side are states `exp(m - a w) (n, d)`: `m` is an exponent, `a` the tokens passed since (see
README.md for why the two are kept apart), and `n`, `d` the scaled sums. With `SLOPE`, `n1` and `d1` are the same sums
with every term times the number of tokens between: minus their derivatives by w.

Inside a tile there are two ways. `NEAR`: the exponents of one tile are small beside those that float32 has, so one
exponent serves all of it and the recurrences are linear. That hangs on w and u only, never on k. Otherwise a state's
exponent follows the largest term, token by token, which is right for any w and u.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import state_dtype
from . import released

# Exponent of an empty sum: vanishes beside any other, finite so that differences are.
NOTHING = tl.constexpr(-1e37)
# |w| times the tokens of a tile, and |u|, up to which a tile is near; and how far a state from outside may stand above
# a tile's own terms: beyond, these are exp(-24) or less of every result, and only must not overflow.
NEAR_LIMIT = tl.constexpr(8.0)
FAR_LIMIT = tl.constexpr(40.0)


@triton.jit
def _row(x, rows, i):
    """Row `i` of a tile (W, L, C)."""
    # As a sum of integers: the compiler removes an added zero, where the loop over rows is unrolled.
    bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    return tl.sum(tl.where(rows == i, bits, 0), 1).to(x.dtype, bitcast=True)


@triton.jit
def _put(x, rows, i, value):
    """Tile (W, L, C) with another row `i`."""
    return tl.where(rows == i, value[:, None], x)


@triton.jit
def _flip(x):
    """Rows of a tile (W, L, C) in reverse: only other names for registers."""
    # One bit of the row's number after the other. The neighbour's value is the sum of both less one's own: of integers,
    # whose sums the compiler removes.
    W: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    y = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    for bit in tl.static_range(0, 6):
        if (1 << bit) < L:
            y = tl.reshape(y, [W << bit, 2, (L >> (bit + 1)) * C])
            y = tl.sum(y, 1, keep_dims=True) - y
    return tl.reshape(y, x.shape).to(x.dtype, bitcast=True)


@triton.jit
def _extend(a, x, y, b, p, q, a2, x2, y2, b2, p2, q2):
    """Two runs of tokens as one: decay a and sums x, y over the run, and b, p, q over it without its last token."""
    return a * a2, a2 * x + x2, a2 * y + y2, a * b2, b2 * x + p2, b2 * y + q2


@triton.jit
def _before(x, y, decay, x0, y0, rows):
    """Sums over all tokens before each of a tile, `s_t = decay s_{t-1} + x_{t-1}` from `s_0 = x0`; the same for y."""
    first = rows == 0
    decays = tl.where(first & ~first, x, decay[:, None])
    # Minus zero, which can be added for nothing.
    zeros = tl.zeros_like(x) * -1.0
    x, y = tl.where(first, x + (decay * x0)[:, None], x), tl.where(first, y + (decay * y0)[:, None], y)
    _, _, _, _, p, q = tl.associative_scan((decays, x, y, tl.zeros_like(x) + 1.0, zeros, zeros), 1, _extend)
    return tl.where(first, x0[:, None], p), tl.where(first, y0[:, None], q)


@triton.jit
def _start(j, length, L: tl.constexpr):
    """First tokens of the tiles `j` (W, 1), and how many of their tokens belong to the tile before.

    A sequence's last tile begins early instead of ending late, so that loads need no mask: with one they would wait for
    each other.
    """
    start = tl.minimum(j * L, length - L)
    return start, tl.minimum(j * L - start, L)


@triton.jit
def _load(pointer, start, stride: tl.constexpr, rows, DTYPE: tl.constexpr):
    """Tiles (W, L, C) of a sequence."""
    pointer += start.to(tl.int64) * stride
    return tl.load(pointer[:, None] + rows * stride).to(DTYPE)


@triton.jit
def _store(pointer, value, start, stride: tl.constexpr, rows, mask):
    pointer += start.to(tl.int64) * stride
    tl.store(pointer[:, None] + rows * stride, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _join(m, a, n, d, n1, d1, m2, a2, n2, d2, n3, d3, w):
    """The sum of two states seen from the same token; the second has the slopes n3, d3."""
    gap = (m - m2) - (a - a2) * w
    small = tl.exp(-tl.abs(gap))
    keep, add = tl.where(gap > 0, 1.0, small), tl.where(gap > 0, small, 1.0)
    m, a = tl.where(gap > 0, m, m2), tl.where(gap > 0, a, a2)
    return m, a, keep * n + add * n2, keep * d + add * d2, keep * n1 + add * n3, keep * d1 + add * d3


@triton.jit
def _load_state(pointer, stride, SLOPE: tl.constexpr):
    """Exponent and sums."""
    m, n, d = tl.load(pointer), tl.load(pointer + stride), tl.load(pointer + 2 * stride)
    n1, d1 = n, d
    if SLOPE:
        n1, d1 = tl.load(pointer + 3 * stride), tl.load(pointer + 4 * stride)
    return m, n, d, n1, d1


@triton.jit
def _store_state(pointer, m, n, d, n1, d1, stride, mask, SLOPE: tl.constexpr):
    tl.store(pointer, m, mask=mask)
    tl.store(pointer + stride, n, mask=mask)
    tl.store(pointer + 2 * stride, d, mask=mask)
    if SLOPE:
        tl.store(pointer + 3 * stride, n1, mask=mask)
        tl.store(pointer + 4 * stride, d1, mask=mask)


@triton.jit
def _minus(top, over):
    """Exponent of a tile's gradients; of a tile without tokens none."""
    return tl.where(top > 0.5 * NOTHING, -(top + over), NOTHING)


@triton.jit
def _fade(w, between):
    """What is left of a weight after some tokens between, inside a near tile."""
    # The limit holds there; elsewhere it is not used, and must not overflow.
    return tl.exp(tl.minimum(-between * w, NEAR_LIMIT))


@triton.jit
def _weigh(weight, v, between, SLOPE: tl.constexpr):
    """Sums of a tile's tokens, and with `SLOPE` of these times the tokens between."""
    n, d = tl.sum(weight * v, 1), tl.sum(weight, 1)
    n1, d1 = n, d
    if SLOPE:
        weight *= between
        n1, d1 = tl.sum(weight * v, 1), tl.sum(weight, 1)
    return n, d, n1, d1


@triton.jit
def _place(segments, channels, W: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence, segments (W, 1) and channels (1, C) of a program, and which channels are not another program's too."""
    blocks, groups = tl.cdiv(channels, BLOCK), segments // W
    pid = tl.program_id(0)
    b = (pid // blocks // groups).to(tl.int64)
    segment = pid // blocks % groups * W + tl.arange(0, W)[:, None]
    channel = tl.minimum(pid % blocks * BLOCK, channels - BLOCK) + tl.arange(0, BLOCK)[None]
    return b, segment, channel, channel >= pid % blocks * BLOCK


@triton.jit
def _load_parameter(pointer, channel, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    return tl.broadcast_to(tl.load(pointer + channel).to(DTYPE), [W, BLOCK])


@triton.jit
def _is_near(w_ptr, u_ptr, channels, L: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0) % tl.cdiv(channels, BLOCK)
    channel = tl.minimum(block * BLOCK, channels - BLOCK) + tl.arange(0, BLOCK)
    w, u = tl.load(w_ptr + channel).to(tl.float32), tl.load(u_ptr + channel).to(tl.float32)
    return tl.max(tl.maximum(tl.abs(w) * L, tl.abs(u)), 0) <= NEAR_LIMIT


@triton.jit
def _attend(
    k, v, e, top, w, u, decay, fade, m, a, n, d, n1, d1, fm, fn, fd, fn1, fd1, rows, valid,
    NEAR: tl.constexpr, SLOPE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One tile, from the states of its past (seen from its first token) and of its future (from its last).

    Returns:
        Outputs y, the inverses of their denominators D with the exponents c, the slopes N1 - y D1, and c, all (L, C);
        how far the states stand above what is allowed; the past of the next tile.
    """
    zero = w * 0
    zeros = tl.zeros_like(k)
    over, c, slope = zero, zeros + top[:, None], zeros
    if NEAR:
        # Once for the states that come in, once for those that go out: the rounding of `decay` must not add up from
        # tile to tile.
        ev = e * v
        lift, future_lift = (m - top) - a * w, fm - top
        over = tl.maximum(tl.maximum(lift, future_lift) - (FAR_LIMIT + tl.minimum(w, 0.0) * L), 0.0)
        lift, future_lift = tl.exp(lift - over), tl.exp(future_lift - over)
        past_n, past_d = _before(ev, e, decay, lift * n, lift * d, rows)
        ev, e_ = _flip(ev), _flip(e)
        future_n, future_d = _before(ev, e_, decay, future_lift * fn, future_lift * fd, rows)
        own = e * tl.exp(u)[:, None]
        inverse = tl.where(valid, 1.0 / (past_d + _flip(future_d) + own), 0.0)
        y = (past_n + _flip(future_n) + own * v) * inverse
        if SLOPE:
            # One more token between for every token passed.
            past_n, past_d = decay[:, None] * past_n, decay[:, None] * past_d
            past_n, past_d = _before(past_n, past_d, decay, lift * n1, lift * d1, rows)
            future_n, future_d = decay[:, None] * future_n, decay[:, None] * future_d
            future_n, future_d = _before(future_n, future_d, decay, future_lift * fn1, future_lift * fd1, rows)
            slope = past_n + _flip(future_n) - y * (past_d + _flip(future_d))
        xn, xd, xn1, xd1 = _weigh(e * fade, v, L - 1 - rows, SLOPE)
        m, a, n, d, n1, d1 = _join(
            m, a + L, n, d, n1 + L * n, d1 + L * d, top, zero, xn, xd, xn1, xd1, w,
        )  # fmt: skip
    else:
        past_n, past_d, past_n1, past_d1, past_m, y, inverse = zeros, zeros, zeros, zeros, zeros, zeros, zeros
        for r in range(L):
            past_m = _put(past_m, rows, r, (m - _row(k, rows, r)) - a * w)
            past_n, past_d = _put(past_n, rows, r, n), _put(past_d, rows, r, d)
            if SLOPE:
                past_n1, past_d1 = _put(past_n1, rows, r, n1), _put(past_d1, rows, r, d1)
            m, a, n, d, n1, d1 = _join(
                m, a + 1, n, d, n1 + n, d1 + d, _row(k, rows, r), zero, _row(v, rows, r), zero + 1, zero, zero, w,
            )  # fmt: skip
        fa = zero
        for r in range(L - 1, -1, -1):
            kr, vr = _row(k, rows, r), _row(v, rows, r)
            left, right = _row(past_m, rows, r), (fm - kr) - fa * w
            cr = kr + tl.maximum(tl.maximum(left, right), u)
            # Rounded together, so that exponents relative to k and c still agree.
            above = cr - kr
            left, right = tl.exp(left - above), tl.exp(right - above)
            # At most 1, but for the rounding where no token is.
            own = tl.exp(tl.minimum(u - above, 0.0))
            exists = kr > 0.5 * NOTHING
            dr = tl.where(exists, left * _row(past_d, rows, r) + right * fd + own, 1.0)
            yr = (left * _row(past_n, rows, r) + right * fn + own * vr) / dr
            inverse, y = _put(inverse, rows, r, tl.where(exists, 1.0 / dr, 0.0)), _put(y, rows, r, yr)
            c = _put(c, rows, r, tl.where(exists, cr, -NOTHING))
            if SLOPE:
                sn, sd = left * _row(past_n1, rows, r) + right * fn1, left * _row(past_d1, rows, r) + right * fd1
                slope = _put(slope, rows, r, sn - yr * sd)
            fm, fa, fn, fd, fn1, fd1 = _join(
                fm, fa + 1, fn, fd, fn1 + fn, fd1 + fd, kr, zero, vr, zero + 1, zero, zero, w,
            )  # fmt: skip
    return y, inverse, slope, c, over, m, a, n, d, n1, d1


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# The walks are functions of their own, not inlined, because the compiler's time grows faster than their size.


@triton.jit(noinline=True)
def _outside(
    w_ptr, totals_ptr, outside_ptr, channels, tiles, segments, count,
    SLOPE: tl.constexpr, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the states of all segments before this one, and of all after it, from what each has."""
    b, segment, channel, mask = _place(segments, channels, W, BLOCK)
    w = _load_parameter(w_ptr, channel, W, BLOCK, DTYPE)
    zero = w * 0
    fields: tl.constexpr = 5 if SLOPE else 3
    stride = channels.to(tl.int64) * fields
    totals_ptr += b * segments * 2 * stride + channel
    outside_ptr += (b * segments + segment) * 2 * stride + channel
    for side in tl.static_range(2):
        m, a, n, d, n1, d1 = zero + NOTHING, zero, zero, zero, zero, zero
        for first in range(0, segments, L):
            s = first + tl.arange(0, L)[None, :, None]
            between = (segment[:, None] - s if side == 0 else s - segment[:, None]) - 1
            valid = (between >= 0) & (s < segments)
            p = totals_ptr[:, None] + (2 * tl.minimum(s, segments - 1) + side).to(tl.int64) * stride
            sm, sn, sd, sn1, sd1 = _load_state(p, channels, SLOPE)
            between = (between * (count * L)).to(DTYPE)
            sm = tl.where(valid, sm - between * w[:, None], NOTHING)
            top = tl.max(sm, 1)
            weight = tl.exp(sm - top[:, None])
            xn1, xd1 = zero, zero
            if SLOPE:
                xn1 = tl.sum(weight * (sn1 + between * sn), 1)
                xd1 = tl.sum(weight * (sd1 + between * sd), 1)
            xn, xd = tl.sum(weight * sn, 1), tl.sum(weight * sd, 1)
            m, a, n, d, n1, d1 = _join(m, a, n, d, n1, d1, top, zero, xn, xd, xn1, xd1, w)
        _store_state(outside_ptr + side * stride, m, n, d, n1, d1, channels, mask, SLOPE)


@triton.jit(noinline=True)
def _walk_back(
    w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, NEAR: tl.constexpr,
    SLOPE: tl.constexpr, TOTALS: tl.constexpr, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the future of every tile, inside its segment, and with TOTALS the segment's sums to both sides."""
    b, segment, channel, mask = _place(segments, channels, W, BLOCK)
    rows = tl.arange(0, L)[None, :, None]
    w = _load_parameter(w_ptr, channel, W, BLOCK, DTYPE)
    fields: tl.constexpr = 5 if SLOPE else 3
    k_ptr += b * stride_kb + channel * stride_kc
    v_ptr += b * stride_vb + channel * stride_vc
    centre = w * 0
    if SLOPE:
        centre = tl.load(v_ptr).to(DTYPE)
    stride_s = channels.to(tl.int64) * fields
    states_ptr += b * tiles * stride_s + channel
    totals_ptr += (b * segments + segment) * 2 * stride_s + channel
    first = segment * count
    zero = w * 0
    fade, past_fade = _fade(w[:, None], rows), _fade(w[:, None], L - 1 - rows)
    m, a, n, d, n1, d1 = zero + NOTHING, zero, zero, zero, zero, zero
    pm, pa, pn, pd, pn1, pd1 = m, zero, zero, zero, zero, zero
    for i in range(count):
        j = first + count - 1 - i
        start, extra = _start(j, length, L)
        valid, back = rows >= extra[:, None], zero + extra
        k = tl.where(valid, _load(k_ptr, start, stride_kt, rows, DTYPE), NOTHING)
        v = _load(v_ptr, start, stride_vt, rows, DTYPE) - centre[:, None]
        _store_state(states_ptr + j.to(tl.int64) * stride_s, m - a * w, n, d, n1, d1, channels, mask, SLOPE)
        if NEAR:
            top = tl.max(k, 1)
            e = tl.exp(k - top[:, None])
            x, y, x1, y1 = _weigh(e * fade, v, rows, SLOPE)
            m, a, n, d, n1, d1 = _join(
                m, a + L, n, d, n1 + L * n, d1 + L * d, top, -back, x, y, x1 - back * x, y1 - back * y, w,
            )  # fmt: skip
            if TOTALS:
                x, y, x1, y1 = _weigh(e * past_fade, v, L - 1 - rows, SLOPE)
                after = zero + i * L
                pm, pa, pn, pd, pn1, pd1 = _join(
                    pm, pa, pn, pd, pn1, pd1, top, after, x, y, x1 + after * x, y1 + after * y, w,
                )  # fmt: skip
        else:
            for r in range(L - 1, -1, -1):
                key, x = _row(k, rows, r), _row(v, rows, r)
                m, a, n, d, n1, d1 = _join(m, a + 1, n, d, n1 + n, d1 + d, key, zero, x, zero + 1, zero, zero, w)
                if TOTALS:
                    after = zero + (i * L + L - 1 - r)
                    pm, pa, pn, pd, pn1, pd1 = _join(
                        pm, pa, pn, pd, pn1, pd1, key, after, x, zero + 1, after * x, after, w,
                    )  # fmt: skip
            a, n1, d1 = a - back, n1 - back * n, d1 - back * d
    if TOTALS:
        _store_state(totals_ptr, pm - pa * w, pn, pd, pn1, pd1, channels, mask, SLOPE)
        _store_state(totals_ptr + fields * channels, m - a * w, n, d, n1, d1, channels, mask, SLOPE)


@triton.jit(noinline=True)
def _walk_outputs(
    w_ptr, u_ptr, k_ptr, v_ptr, gate_ptr, y_ptr, states_ptr, outside_ptr, length, channels, tiles, segments, count,
    stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_yb, stride_yt: tl.constexpr, NEAR: tl.constexpr, GATED: tl.constexpr,
    ONE: tl.constexpr, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of a segment."""
    b, segment, channel, mask = _place(segments, channels, W, BLOCK)
    rows = tl.arange(0, L)[None, :, None]
    w = _load_parameter(w_ptr, channel, W, BLOCK, DTYPE)
    u = _load_parameter(u_ptr, channel, W, BLOCK, DTYPE)
    k_ptr += b * stride_kb + channel * stride_kc
    v_ptr += b * stride_vb + channel * stride_vc
    y_ptr += b * stride_yb + channel
    if GATED:
        gate_ptr += b * stride_gb + channel * stride_gc
    stride_s = channels.to(tl.int64) * 3
    states_ptr += b * tiles * stride_s + channel
    outside_ptr += (b * segments + segment) * 2 * stride_s + channel
    first = segment * count
    zero = w * 0
    m, a, n, d = zero + NOTHING, zero, zero, zero
    fm, fn, fd = m, n, d
    if not ONE:
        m, n, d, _, _ = _load_state(outside_ptr, channels, False)
        fm, fn, fd, _, _ = _load_state(outside_ptr + stride_s, channels, False)
    decay, fade = _fade(w, 1), _fade(w[:, None], L - 1 - rows)
    for i in range(count):
        j = first + i
        start, extra = _start(j, length, L)
        valid, back = rows >= extra[:, None], zero + extra
        k = tl.where(valid, _load(k_ptr, start, stride_kt, rows, DTYPE), NOTHING)
        v = _load(v_ptr, start, stride_vt, rows, DTYPE)
        jm, jn, jd, jn1, jd1 = _load_state(states_ptr + j.to(tl.int64) * stride_s, channels, False)
        if not ONE:
            jm, ja, jn, jd, jn1, jd1 = _join(
                jm, zero, jn, jd, jn, jd, fm, zero + (count - 1 - i) * L, fn, fd, fn, fd, w
            )
            jm -= ja * w
        top = tl.max(k, 1)
        e = tl.exp(k - top[:, None])
        y, inverse, slope, c, over, m, a, n, d, n1, d1 = _attend(
            k, v, e, top, w, u, decay, fade, m, a - back, n, d, n, d, jm, jn, jd, jn, jd, rows, valid, NEAR, False, L,
        )  # fmt: skip
        if GATED:
            gate = _load(gate_ptr, start, stride_gt, rows, DTYPE)
            y *= _sigmoid(gate)
        _store(y_ptr, y, start, stride_yt, rows, valid & mask[:, None])


@triton.jit(noinline=True)
def _walk_gradients(
    w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gw_ptr, gu_ptr, states_ptr, past_ptr, grads_ptr, outside_ptr,
    grad_totals_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb,
    stride_vt: tl.constexpr, stride_vc, stride_gyb, stride_gyt: tl.constexpr, stride_gyc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, NEAR: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the past of every tile and the gradients' states there, and what a segment gives to gw and gu."""
    b, segment, channel, mask = _place(segments, channels, W, BLOCK)
    rows = tl.arange(0, L)[None, :, None]
    w = _load_parameter(w_ptr, channel, W, BLOCK, DTYPE)
    u = _load_parameter(u_ptr, channel, W, BLOCK, DTYPE)
    k_ptr += b * stride_kb + channel * stride_kc
    v_ptr += b * stride_vb + channel * stride_vc
    gy_ptr += b * stride_gyb + channel * stride_gyc
    # Gradients see only differences of values, formed as differences of sums: a common offset would cost their digits.
    centre = tl.load(v_ptr).to(DTYPE)
    if GATED:
        gate_ptr += b * stride_gb + channel * stride_gc
    gw_ptr += (b * segments + segment) * channels + channel
    gu_ptr += (b * segments + segment) * channels + channel
    stride_s, stride_p = channels.to(tl.int64) * 5, channels.to(tl.int64) * 3
    states_ptr += b * tiles * stride_s + channel
    past_ptr += b * tiles * stride_p + channel
    grads_ptr += b * tiles * stride_p + channel
    outside_ptr += (b * segments + segment) * 2 * stride_s + channel
    grad_totals_ptr += b * segments * 2 * stride_p + channel
    first = segment * count
    zero = w * 0
    m, a, n, d, n1, d1 = zero + NOTHING, zero, zero, zero, zero, zero
    fm, fn, fd, fn1, fd1 = m, n, d, n1, d1
    if not ONE:
        m, n, d, n1, d1 = _load_state(outside_ptr, channels, True)
        fm, fn, fd, fn1, fd1 = _load_state(outside_ptr + stride_s, channels, True)
    decay, fade = _fade(w, 1), _fade(w[:, None], L - 1 - rows)
    before_fade = _fade(w[:, None], rows)
    gw, gu = zero, zero
    gm, ga, gn, gd = zero + NOTHING, zero, zero, zero
    tm, ta, tn, td = gm, zero, zero, zero
    for i in range(count):
        j = first + i
        start, extra = _start(j, length, L)
        valid, back = rows >= extra[:, None], zero + extra
        k = tl.where(valid, _load(k_ptr, start, stride_kt, rows, DTYPE), NOTHING)
        v = _load(v_ptr, start, stride_vt, rows, DTYPE) - centre[:, None]
        gy = _load(gy_ptr, start, stride_gyt, rows, DTYPE)
        if GATED:
            gy *= _sigmoid(_load(gate_ptr, start, stride_gt, rows, DTYPE))
        p = past_ptr + j.to(tl.int64) * stride_p
        _store_state(p, m - a * w, n, d, n, d, channels, mask, False)
        p = grads_ptr + j.to(tl.int64) * stride_p
        _store_state(p, gm - ga * w, gn, gd, gn, gd, channels, mask, False)
        jm, jn, jd, jn1, jd1 = _load_state(states_ptr + j.to(tl.int64) * stride_s, channels, True)
        if not ONE:
            after = zero + (count - 1 - i) * L
            jm, ja, jn, jd, jn1, jd1 = _join(
                jm, zero, jn, jd, jn1, jd1, fm, after, fn, fd, fn1 + after * fn, fd1 + after * fd, w,
            )  # fmt: skip
            jm -= ja * w
        top = tl.max(k, 1)
        e = tl.exp(k - top[:, None])
        y, inverse, slope, c, over, m, a, n, d, n1, d1 = _attend(
            k, v, e, top, w, u, decay, fade, m, a - back, n, d, n1 - back * n, d1 - back * d, jm, jn, jd, jn1, jd1,
            rows, valid, NEAR, True, L,
        )  # fmt: skip
        g = gy * inverse
        h = g * y
        gw -= tl.sum(g * slope, 1)
        if NEAR:
            own = e * tl.exp(u)[:, None]
        else:
            own = tl.exp((k - c) + u[:, None])
        gu += tl.sum(own * g * (v - y), 1)
        if NEAR:
            key = _minus(top, over)
            x, z = tl.sum(fade * g, 1), tl.sum(fade * h, 1)
            gm, ga, gn, gd, _, _ = _join(gm, ga + L, gn, gd, gn, gd, key, zero, x, z, x, z, w)
            if not ONE:
                x, z = tl.sum(before_fade * g, 1), tl.sum(before_fade * h, 1)
                tm, ta, tn, td, _, _ = _join(tm, ta, tn, td, tn, td, key, i * L - back, x, z, x, z, w)
        else:
            for r in range(L):
                key, x, z = -_row(c, rows, r), _row(g, rows, r), _row(h, rows, r)
                gm, ga, gn, gd, _, _ = _join(gm, ga + 1, gn, gd, gn, gd, key, zero, x, z, x, z, w)
                if not ONE:
                    before = i * L + r - back
                    tm, ta, tn, td, _, _ = _join(tm, ta, tn, td, tn, td, key, before, x, z, x, z, w)
    tl.store(gw_ptr, gw, mask=mask)
    tl.store(gu_ptr, gu, mask=mask)
    if not ONE:
        totals_ptr = grad_totals_ptr + segment * 2 * stride_p
        _store_state(totals_ptr, gm - ga * w, gn, gd, gn, gd, channels, mask, False)
        _store_state(totals_ptr + 3 * channels, tm - ta * w, tn, td, tn, td, channels, mask, False)


@triton.jit(noinline=True)
def _walk_inputs(
    w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, states_ptr, past_ptr, grads_ptr,
    outside_ptr, grad_outside_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt: tl.constexpr,
    stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gyb, stride_gyt: tl.constexpr, stride_gyc,
    stride_gb, stride_gt: tl.constexpr, stride_gc, stride_gkb, stride_gkt: tl.constexpr, stride_gvb,
    stride_gvt: tl.constexpr, stride_ggb, stride_ggt: tl.constexpr, NEAR: tl.constexpr, GATED: tl.constexpr,
    ONE: tl.constexpr, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of k, v and gate."""
    b, segment, channel, mask = _place(segments, channels, W, BLOCK)
    rows = tl.arange(0, L)[None, :, None]
    w = _load_parameter(w_ptr, channel, W, BLOCK, DTYPE)
    u = _load_parameter(u_ptr, channel, W, BLOCK, DTYPE)
    k_ptr += b * stride_kb + channel * stride_kc
    v_ptr += b * stride_vb + channel * stride_vc
    gy_ptr += b * stride_gyb + channel * stride_gyc
    # Gradients see only differences of values, formed as differences of sums: a common offset would cost their digits.
    centre = tl.load(v_ptr).to(DTYPE)
    if GATED:
        gate_ptr += b * stride_gb + channel * stride_gc
        ggate_ptr += b * stride_ggb + channel
    gk_ptr += b * stride_gkb + channel
    gv_ptr += b * stride_gvb + channel
    stride_s, stride_p = channels.to(tl.int64) * 5, channels.to(tl.int64) * 3
    states_ptr += b * tiles * stride_s + channel
    past_ptr += b * tiles * stride_p + channel
    grads_ptr += b * tiles * stride_p + channel
    outside_ptr += (b * segments + segment) * 2 * stride_s + channel
    grad_outside_ptr += (b * segments + segment) * 2 * stride_p + channel
    first = segment * count
    zero = w * 0
    # The future outside of the segment, and the gradients' states there: p before it, m after it.
    m, a, n, d = zero + NOTHING, zero, zero, zero
    fm, fn, fd = m, n, d
    pm, pn, pd = m, n, d
    if not ONE:
        fm, fn, fd, _, _ = _load_state(outside_ptr + stride_s, channels, False)
        pm, pn, pd, _, _ = _load_state(grad_outside_ptr, channels, False)
        m, n, d, _, _ = _load_state(grad_outside_ptr + stride_p, channels, False)
    decay, fade = _fade(w, 1), _fade(w[:, None], rows)
    for i in range(count):
        j = first + count - 1 - i
        start, extra = _start(j, length, L)
        valid, back = rows >= extra[:, None], zero + extra
        k = tl.where(valid, _load(k_ptr, start, stride_kt, rows, DTYPE), NOTHING)
        v = _load(v_ptr, start, stride_vt, rows, DTYPE) - centre[:, None]
        gy = _load(gy_ptr, start, stride_gyt, rows, DTYPE)
        pointer = past_ptr + j.to(tl.int64) * stride_p
        bm, bn, bd, _, _ = _load_state(pointer, channels, False)
        pointer = grads_ptr + j.to(tl.int64) * stride_p
        gm, gn, gd, _, _ = _load_state(pointer, channels, False)
        pointer = states_ptr + j.to(tl.int64) * stride_s
        jm, jn, jd, _, _ = _load_state(pointer, channels, False)
        if not ONE:
            jm, ja, jn, jd, _, _ = _join(jm, zero, jn, jd, jn, jd, fm, zero + i * L, fn, fd, fn, fd, w)
            jm -= ja * w
            before = (count - 1 - i) * L
            gm, ga, gn, gd, _, _ = _join(gm, zero, gn, gd, gn, gd, pm, zero + before, pn, pd, pn, pd, w)
            gm -= ga * w
        top = tl.max(k, 1)
        e = tl.exp(k - top[:, None])
        y, inverse, slope, c, over, bm, ba, bn, bd, _, _ = _attend(
            k, v, e, top, w, u, decay, fade, bm, -back, bn, bd, bn, bd, jm, jn, jd, jn, jd, rows, valid, NEAR, False, L,
        )  # fmt: skip
        if GATED:
            s = _sigmoid(_load(gate_ptr, start, stride_gt, rows, DTYPE))
            ggate = gy * (y + centre[:, None]) * (s * (1.0 - s))
            _store(ggate_ptr, ggate, start, stride_ggt, rows, valid & mask[:, None])
            gy *= s
        g = gy * inverse
        h = g * y
        if NEAR:
            own = e * tl.exp(u)[:, None]
        else:
            own = tl.exp((k - c) + u[:, None])
        gv = own * g
        gk = gv * (v - y)
        if NEAR:
            lift, future_lift = tl.exp((gm + top) + back * w), tl.exp((m + top) - a * w)
            x, z = _before(g, h, decay, lift * gn, lift * gd, rows)
            fx, fz = _before(_flip(g), _flip(h), decay, future_lift * n, future_lift * d, rows)
            x, z = x + _flip(fx), z + _flip(fz)
            gv += e * x
            gk += e * (v * x - z)
            x, z = tl.sum(fade * g, 1), tl.sum(fade * h, 1)
            m, a, n, d, _, _ = _join(m, a + L, n, d, n, d, _minus(top, over), -back, x, z, x, z, w)
        else:
            for r in range(L - 1, -1, -1):
                kr, vr = _row(k, rows, r), _row(v, rows, r)
                key, x, z = -_row(c, rows, r), _row(g, rows, r), _row(h, rows, r)
                weight = tl.exp((m + kr) - a * w)
                gv = _put(gv, rows, r, _row(gv, rows, r) + weight * n)
                gk = _put(gk, rows, r, _row(gk, rows, r) + weight * (vr * n - d))
                m, a, n, d, _, _ = _join(m, a + 1, n, d, n, d, key, zero, x, z, x, z, w)
            a -= back
            ga = -back
            for r in range(L):
                kr, vr = _row(k, rows, r), _row(v, rows, r)
                key, x, z = -_row(c, rows, r), _row(g, rows, r), _row(h, rows, r)
                weight = tl.exp((gm + kr) - ga * w)
                gv = _put(gv, rows, r, _row(gv, rows, r) + weight * gn)
                gk = _put(gk, rows, r, _row(gk, rows, r) + weight * (vr * gn - gd))
                gm, ga, gn, gd, _, _ = _join(gm, ga + 1, gn, gd, gn, gd, key, zero, x, z, x, z, w)
        _store(gk_ptr, gk, start, stride_gkt, rows, valid & mask[:, None])
        _store(gv_ptr, gv, start, stride_gvt, rows, valid & mask[:, None])


# Strides over tokens are compiled in: addresses inside a tile are constants then. Were those over batch entries known
# to be multiples of 16, a thread would load several channels at once, and tokens would lie across threads.
_GENERAL = [f"stride_{name}b" for name in ("k", "v", "g", "y", "gy", "gk", "gv", "gg")]
_GENERAL += ["length", "channels", "tiles", "segments", "count"]


@triton.jit(do_not_specialize=_GENERAL)
def bi_wkv_states_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, SLOPE: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A segment's sums to both sides, and those to the right of every tile.

    k, v (B, T, C); states (B, T / L, fields, C); totals (B, segments, 2, fields, C); w, u (C,).
    """
    near = _is_near(w_ptr, u_ptr, channels, L, BLOCK)
    if near:
        _walk_back(
            w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt,
            stride_kc, stride_vb, stride_vt, stride_vc, True, SLOPE, True, L, W, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        _walk_back(
            w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt,
            stride_kc, stride_vb, stride_vt, stride_vc, False, SLOPE, True, L, W, BLOCK, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=_GENERAL)
def bi_wkv_fwd_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, gate_ptr, y_ptr, states_ptr, totals_ptr, outside_ptr, length, channels, tiles, segments,
    count, stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_yb, stride_yt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr,
    SOLO: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment.

    k, v, gate, y (B, T, C); states (B, T / L, 3, C); totals, outside (B, segments, 2, 3, C);
    w, u (C,).
    """
    near = _is_near(w_ptr, u_ptr, channels, L, BLOCK)
    if SOLO:
        if near:
            _walk_back(
                w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, True, False, not ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        else:
            _walk_back(
                w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, False, False, not ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        tl.debug_barrier()
    if not ONE:
        _outside(w_ptr, totals_ptr, outside_ptr, channels, tiles, segments, count, False, L, W, BLOCK, DTYPE)
        tl.debug_barrier()
    if near:
        _walk_outputs(
            w_ptr, u_ptr, k_ptr, v_ptr, gate_ptr, y_ptr, states_ptr, outside_ptr, length, channels, tiles, segments,
            count, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gb, stride_gt, stride_gc,
            stride_yb, stride_yt, True, GATED, ONE, L, W, BLOCK, DTYPE,
        )  # fmt: skip
    else:
        _walk_outputs(
            w_ptr, u_ptr, k_ptr, v_ptr, gate_ptr, y_ptr, states_ptr, outside_ptr, length, channels, tiles, segments,
            count, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gb, stride_gt, stride_gc,
            stride_yb, stride_yt, False, GATED, ONE, L, W, BLOCK, DTYPE,
        )  # fmt: skip


@triton.jit(do_not_specialize=_GENERAL)
def bi_wkv_bwd_kernel(
    w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, gw_ptr, gu_ptr, states_ptr, past_ptr,
    grads_ptr, totals_ptr, grad_totals_ptr, outside_ptr, grad_outside_ptr, length, channels, tiles, segments, count,
    stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gyb,
    stride_gyt: tl.constexpr, stride_gyc, stride_gb, stride_gt: tl.constexpr, stride_gc, stride_gkb,
    stride_gkt: tl.constexpr, stride_gvb, stride_gvt: tl.constexpr, stride_ggb, stride_ggt: tl.constexpr,
    GATED: tl.constexpr, ONE: tl.constexpr, SOLO: tl.constexpr, LAST: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment: of w and u first, and what other segments must know; with LAST of k, v and gate.

    k, v, gy, gate, gk, gv, ggate (B, T, C); gw, gu (B, segments, C); states (B, T / L, 5, C); past, grads
    (B, T / L, 3, C); totals, outside (B, segments, 2, 5, C); grad_totals, grad_outside (B, segments, 2, 3, C);
    w, u (C,).
    """
    near = _is_near(w_ptr, u_ptr, channels, L, BLOCK)
    if SOLO:
        if near:
            _walk_back(
                w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, True, True, not ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        else:
            _walk_back(
                w_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, False, True, not ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        tl.debug_barrier()
    if SOLO or not LAST:
        if not ONE:
            _outside(w_ptr, totals_ptr, outside_ptr, channels, tiles, segments, count, True, L, W, BLOCK, DTYPE)
            tl.debug_barrier()
        if near:
            _walk_gradients(
                w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gw_ptr, gu_ptr, states_ptr, past_ptr, grads_ptr,
                outside_ptr, grad_totals_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt, stride_kc,
                stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb, stride_gt, stride_gc,
                True, GATED, ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        else:
            _walk_gradients(
                w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gw_ptr, gu_ptr, states_ptr, past_ptr, grads_ptr,
                outside_ptr, grad_totals_ptr, length, channels, tiles, segments, count, stride_kb, stride_kt, stride_kc,
                stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb, stride_gt, stride_gc,
                False, GATED, ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
    if SOLO:
        tl.debug_barrier()
    if SOLO or LAST:
        if not ONE:
            _outside(
                w_ptr, grad_totals_ptr, grad_outside_ptr, channels, tiles, segments, count, False, L, W, BLOCK, DTYPE,
            )  # fmt: skip
            tl.debug_barrier()
        if near:
            _walk_inputs(
                w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, states_ptr, past_ptr,
                grads_ptr, outside_ptr, grad_outside_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb,
                stride_gt, stride_gc, stride_gkb, stride_gkt, stride_gvb, stride_gvt, stride_ggb, stride_ggt,
                True, GATED, ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip
        else:
            _walk_inputs(
                w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, states_ptr, past_ptr,
                grads_ptr, outside_ptr, grad_outside_ptr, length, channels, tiles, segments, count, stride_kb,
                stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb,
                stride_gt, stride_gc, stride_gkb, stride_gkt, stride_gvb, stride_gvt, stride_ggb, stride_ggt,
                False, GATED, ONE, L, W, BLOCK, DTYPE,
            )  # fmt: skip


# Tokens of a tile; channels of a program, one for each thread of a warp; warps of a program, each with its segment.
# More warps were no faster where there are many programs, and newer versions of Triton put tokens across them.
_TILE, _BLOCK, _WARPS = 8, 32, 1
# Sequences of more than `_SOLO` tiles, or of fewer than `_FEW` blocks of channels in all, are spread over programs:
# over so many that there are about `_ENOUGH`, none with fewer than `_SEGMENT` tiles.
_SOLO, _FEW, _ENOUGH, _SEGMENT = 64, 256, 2048, 4

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _power_of_two(n: int) -> int:
    """The largest one up to `n`."""
    return 1 << (n.bit_length() - 1)


def _plan(k: Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int], dict]:
    """Sizes, grid and options of the kernels."""
    batch, length, channels = k.shape
    tile, block = min(_TILE, _power_of_two(length)), min(_BLOCK, _power_of_two(channels))
    tiles = triton.cdiv(length, tile)
    rows = batch * triton.cdiv(channels, block)
    # Segments of a sequence: a power of two up to the warps of a program, or a multiple of these.
    segments = warps = _power_of_two(max(1, min(_WARPS, tiles // _SEGMENT)))
    if tiles > _SOLO or rows < _FEW:
        wanted = max(1, min(_ENOUGH // rows, tiles // _SEGMENT))
        segments = triton.cdiv(triton.cdiv(tiles, triton.cdiv(tiles, wanted)), warps) * warps
    count = triton.cdiv(tiles, segments)
    grid = (rows * (segments // warps),)
    options = dict(L=tile, W=warps, BLOCK=block, DTYPE=_TYPES[dtype], num_warps=max(1, warps * block // 32))
    return (length, channels, segments * count, segments, count), grid, options


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None) -> Tensor:
    if official_split is not None:
        return released.forward(w, u, k, v, gate, official_split)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel() == 0:
        return y
    dtype = state_dtype(w, u, k, v)
    w, u = w.contiguous(), u.contiguous()
    sizes, grid, options = _plan(k, dtype)
    batch, channels, tiles, segments = len(k), *sizes[1:4]
    one, solo = segments == 1, segments <= options["W"]
    states = k.new_empty(batch, tiles, 3, channels, dtype=dtype)
    totals, outside = states, states
    if not one:
        totals, outside = (k.new_empty(batch, segments, 2, 3, channels, dtype=dtype) for _ in range(2))
    if not solo:
        bi_wkv_states_kernel[grid](w, u, k, v, states, totals, *sizes, *k.stride(), *v.stride(), SLOPE=False, **options)
    gated = y if gate is None else gate
    bi_wkv_fwd_kernel[grid](
        w, u, k, v, gated, y, states, totals, outside, *sizes, *k.stride(), *v.stride(), *gated.stride(),
        *y.stride()[:2], GATED=gate is not None, ONE=one, SOLO=solo, **options,
    )  # fmt: skip
    return y


def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None
) -> list[Tensor | None]:
    if official_split is not None:
        return released.backward(grads, w, u, k, v, gate, official_split)
    gk, gv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    ggate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gk.numel() == 0:
        return [None, None, gk, gv, ggate]
    dtype = state_dtype(w, u, k, v)
    gy, w, u = grads[0], w.contiguous(), u.contiguous()
    sizes, grid, options = _plan(k, dtype)
    batch, channels, tiles, segments = len(k), *sizes[1:4]
    one, solo = segments == 1, segments <= options["W"]
    states, past, gradients = (k.new_empty(batch, tiles, n, channels, dtype=dtype) for n in (5, 3, 3))
    totals = grad_totals = outside = grad_outside = states
    gw, gu = (k.new_empty(batch * segments, channels, dtype=dtype) for _ in range(2))
    if not one:
        totals, outside = (k.new_empty(batch, segments, 2, 5, channels, dtype=dtype) for _ in range(2))
        grad_totals, grad_outside = (k.new_empty(batch, segments, 2, 3, channels, dtype=dtype) for _ in range(2))
    if not solo:
        bi_wkv_states_kernel[grid](w, u, k, v, states, totals, *sizes, *k.stride(), *v.stride(), SLOPE=True, **options)
    gated, ggated = (gk, gk) if gate is None else (gate, ggate)
    for last in (True,) if solo else (False, True):
        bi_wkv_bwd_kernel[grid](
            w, u, k, v, gy, gated, gk, gv, ggated, gw, gu, states, past, gradients, totals, grad_totals, outside,
            grad_outside, *sizes, *k.stride(), *v.stride(), *gy.stride(), *gated.stride(), *gk.stride()[:2],
            *gv.stride()[:2], *ggated.stride()[:2], GATED=gate is not None, ONE=one, SOLO=solo, LAST=last, **options,
        )  # fmt: skip
    return [gw.sum(0), gu.sum(0), gk, gv, ggate]
