"""Triton kernels for bi-WKV; see README.md for the derivation and for the choice of algorithm.

A sequence is cut into spans, one for each program, and a span into segments; a channel of a segment is one thread's.
So the tokens of a segment are a thread's own: tensors are (W, C), segments and channels, and a tuple of them is a
segment's tokens. Recurrences along tokens are ordinary sequential code, and segments exchange their sums once.

Sums over the tokens of one side are states `exp(m) (n, d)`, an exponent and scaled sums, seen from an edge: the term of
a token right at the edge is not decayed.

There are two ways. Near: the exponents that decay and bonus add within a span are small beside those that float32 has,
so that one exponent serves all of it and the recurrences are linear. That hangs on w and u only, never on k. Far: every
token's sums have their own exponent, and inside a segment all pairs of tokens are formed: right for any w and u.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import state_dtype
from .._triton import (
    LOG2E,
    at_most,
    cdiv,
    kernel,
    load_apart,
    next_power_of_2,
    reciprocal,
    sigmoid,
    store_apart,
    sum_parts,
)
from . import _torch

# Exponent of an empty sum: vanishes beside any other, finite so that differences are.
NOTHING = tl.constexpr(-1e37)
# |w| times the tokens of a span, and |u|, up to which a span is near; and how far a state from outside may stand above
# a span's own terms: beyond, these hardly count, see the README, and only must not overflow.
NEAR_LIMIT = tl.constexpr(16.0)
FAR_LIMIT = tl.constexpr(44.0)


@triton.jit
def _place(program, spans, length, channels, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Where a program works.

    A sequence's last segments begin early instead of ending late, so that loads need no mask, and so does the last
    block of channels. If EVEN, none does, and the compiler leaves out what deals with that.

    Returns:
        Sequence; span; segments (W, 1); the segments' first tokens (W, 1); how many of their tokens belong to the
        segment before (W, 1); channels (1, C); which of these are not another program's too.
    """
    blocks = tl.cdiv(channels, BLOCK)
    b = (program // blocks // spans).to(tl.int64)
    span = program // blocks % spans
    segment = tl.arange(0, W)[:, None]
    token = (span * W + segment) * L
    start = tl.minimum(token, length - L)
    first = program % blocks * BLOCK
    channel = tl.minimum(first, channels - BLOCK) + tl.arange(0, BLOCK)[None]
    if EVEN:
        channel = first + tl.arange(0, BLOCK)[None]
        return b, span, segment, token, token * 0, channel, tl.full(channel.shape, True, tl.int1)
    return b, span, segment, start, tl.minimum(token - start, L), channel, channel >= first


@triton.jit
def _sequence(pointer, place, stride_b, stride_t: tl.constexpr, stride_c):
    """Where a program's segments begin, (W, C)."""
    b, span, segment, start, extra, channel, mask = place
    return pointer + b * stride_b + start.to(tl.int64) * stride_t + channel.to(tl.int64) * stride_c


@triton.jit
def _begin(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr, stride_kc,
    stride_vb, stride_vt: tl.constexpr, stride_vc, SAMPLES: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Place of a program, decay and bonus of its channels, an offset of their values, and its keys and values."""
    place = _place(program, spans, length, channels, L, W, BLOCK, EVEN)
    b, span, segment, start, extra, channel, mask = place
    w, u = load_apart(w_ptr + channel).to(tl.float32) * scale, load_apart(u_ptr + channel).to(tl.float32) * scale
    centre = w * 0
    if SAMPLES > 0:
        # Gradients see only differences of values, formed as differences of sums: a common offset would cost digits.
        sample = tl.arange(0, SAMPLES)[:, None] * (length // SAMPLES)
        values = load_apart(v_ptr + b * stride_vb + sample.to(tl.int64) * stride_vt + channel * stride_vc)
        centre = tl.sum(values.to(tl.float32), 0)[None] / SAMPLES
    k_ptr = _sequence(k_ptr, place, stride_kb, stride_kt, stride_kc)
    v_ptr = _sequence(v_ptr, place, stride_vb, stride_vt, stride_vc)
    return place, w, u, centre, k_ptr, v_ptr


@triton.jit
def _load(pointer, stride: tl.constexpr, offset, L: tl.constexpr):
    """A segment's tokens less an offset."""
    tokens = ()
    for t in tl.static_range(L):
        tokens += (load_apart(pointer + t * stride).to(tl.float32) - offset,)
    return tokens


@triton.jit
def _load_gates(pointer, stride: tl.constexpr, GATED: tl.constexpr, L: tl.constexpr):
    """A segment's gates in their own dtype, none without `GATED`.

    Loaded before anything is stored: behind a store, which might alias, each would be waited for by itself.
    """
    gates = ()
    if GATED:
        for t in tl.static_range(L):
            gates += (load_apart(pointer + t * stride),)
    return gates


@triton.jit
def _load_state(pointer, stride):
    """Exponent and sums."""
    return load_apart(pointer), load_apart(pointer + stride), load_apart(pointer + 2 * stride)


@triton.jit
def _store_state(pointer, m, n, d, stride, mask):
    store_apart(pointer, m, mask)
    store_apart(pointer + stride, n, mask)
    store_apart(pointer + 2 * stride, d, mask)


@triton.jit
def _load_outside(pointer, place, spans, channels, ONE: tl.constexpr):
    """States of the past and of the future outside of a span, seen from its edges, (1, C)."""
    b, span, segment, start, extra, channel, mask = place
    zero = (channel * 0).to(tl.float32)
    past, future = (zero + NOTHING, zero, zero), (zero + NOTHING, zero, zero)
    if not ONE:
        pointer += (b * spans + span) * 6 * channels + channel
        past, future = _load_state(pointer, channels), _load_state(pointer + 3 * channels, channels)
    return past, future


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _store_part(parts_ptr, gw, gu, outer, scale, place, spans, channels):
    """Writes a program's parts of the gradients of w and u, sums over its segments (W, C), and what w's has besides."""
    b, span, segment, start, extra, channel, mask = place
    parts_ptr += (b * spans + span) * 2 * channels + channel + segment * 0
    gw, gu = tl.reduce((gw, gu), 0, _add)
    first = mask & (segment == 0)
    store_apart(parts_ptr, (gw[None] + outer) * scale, first)
    store_apart(parts_ptr + channels, gu[None] * scale, first)


@triton.jit
def _is_near(program, w_ptr, u_ptr, scale, length, channels, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    first = program % tl.cdiv(channels, BLOCK) * BLOCK
    channel = tl.minimum(first, channels - BLOCK) + tl.arange(0, BLOCK)
    w, u = load_apart(w_ptr + channel).to(tl.float32) * scale, load_apart(u_ptr + channel).to(tl.float32) * scale
    return tl.max(tl.maximum(tl.abs(w) * tl.minimum(length, SPAN), tl.abs(u))) <= NEAR_LIMIT


# Near.


@triton.jit
def _edges(w, place, L: tl.constexpr, W: tl.constexpr):
    """Factors between the frame of a span, which sees the past from its first token and the future too, and segments.

    The left one takes the frame's past to a segment's left edge, and a segment's own sum as the future of others to
    the frame; the right one the same for the right edge, the other way round.
    """
    b, span, segment, start, extra, channel, mask = place
    rate, token = w * LOG2E, (start - span * (W * L)).to(tl.float32)
    return tl.exp2(-rate * token), tl.exp2(rate * (token + L))


@triton.jit
def _weights(keys, extra, L: tl.constexpr):
    """Exponentials of a segment's keys over the largest of its span, and that one, (1, C)."""
    top = tl.where(extra == 0, keys[0], NOTHING)
    for t in tl.static_range(1, L):
        top = tl.maximum(top, tl.where(t >= extra, keys[t], NOTHING))
    top = tl.max(top, 0)[None]
    weights = ()
    for t in tl.static_range(L):
        weights += (tl.where(t >= extra, tl.exp2(keys[t] * LOG2E - top * LOG2E), 0.0),)
    return weights, top


@triton.jit
def _from_right(xs, ys, decay, L: tl.constexpr):
    """Sums of a segment seen from its right edge."""
    x, y = xs[0], ys[0]
    for t in tl.static_range(1, L):
        x, y = x * decay + xs[t], y * decay + ys[t]
    return x, y


@triton.jit
def _from_left(xs, ys, decay, L: tl.constexpr):
    """Sums of a segment seen from its left edge."""
    x, y = xs[L - 1], ys[L - 1]
    for t in tl.static_range(1, L):
        x, y = x * decay + xs[L - 1 - t], y * decay + ys[L - 1 - t]
    return x, y


@triton.jit
def _over(others, x):
    """Sums over other segments, (W, C), from what each has and from whether it counts, (W, W, 1)."""
    # A factor, because half of the instructions for selecting and adding do.
    return tl.sum(others * x[:, None, :], 0)


@triton.jit
def _surroundings(totals, past, future, left, right, segment, W: tl.constexpr):
    """What a segment sees of the past from its left edge and of the future from its right edge.

    Args:
        totals: What each segment has, seen from its right and from its left edge.
        past: Sums from outside of the span, in its frame.
        future: Likewise.
        left: See `_edges`.
        right: See `_edges`.
    """
    rx, ry, lx, ly = totals
    other = tl.arange(0, W)[:, None, None]
    before, after = (other < segment[None]).to(tl.float32), (other > segment[None]).to(tl.float32)
    px, py = (_over(before, rx * right) + past[0]) * left, (_over(before, ry * right) + past[1]) * left
    fx, fy = (_over(after, lx * left) + future[0]) * right, (_over(after, ly * left) + future[1]) * right
    return px, py, fx, fy


@triton.jit
def _from_outside(w, top, past, future, SPAN: tl.constexpr):
    """States from outside in the frame of a span, scaled like its own terms; by how much less than they are."""
    pm, pn, pd = past
    fm, fn, fd = future
    # As averages of values: denominators of long sequences would have no room above the limit.
    pd, fd = tl.maximum(pd, 1e-30), tl.maximum(fd, 1e-30)
    pm, fm = pm + tl.log(pd) - top, fm + tl.log(fd) - top
    over = tl.maximum(tl.maximum(pm, fm) - FAR_LIMIT, 0.0)
    pm, fm = tl.exp(pm - over), tl.exp(fm - over - w * SPAN)
    return (pm * (pn / pd), pm), (fm * (fn / fd), fm), over


@triton.jit
def _near_attend(w, place, keys, values, past, future, ONE: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """The exponentials of a segment's keys and what the segment sees around it.

    Returns:
        Exponentials; past and future sums from the segment's edges; the part of these from outside of the span, in its
        frame; the exponent of the exponentials; by how much that of the sums from outside is larger.
    """
    b, span, segment, start, extra, channel, mask = place
    weights, top = _weights(keys, extra, L)
    over = top * 0
    before, after = (over, over), (over, over)
    if not ONE:
        before, after, over = _from_outside(w, top, past, future, W * L)
    weighted = ()
    for t in tl.static_range(L):
        weighted += (weights[t] * values[t],)
    left, right = _edges(w, place, L, W)
    decay = tl.exp(-w)
    totals = _from_right(weighted, weights, decay, L) + _from_left(weighted, weights, decay, L)
    around = _surroundings(totals, before, after, left, right, segment, W)
    return weights, around, (before, after), top, over


@triton.jit
def _near_store(totals_ptr, totals, m, w, place, channels, L: tl.constexpr, W: tl.constexpr):
    """Writes the states of a span from the sums of its segments."""
    b, span, segment, start, extra, channel, mask = place
    rx, ry, lx, ly = totals
    left, right = _edges(w, place, L, W)
    rx, ry, lx, ly = rx * right, ry * right, lx * left, ly * left
    end = tl.exp(-w * (W * L))
    _store_state(totals_ptr, m, tl.sum(rx, 0)[None] * end, tl.sum(ry, 0)[None] * end, channels, mask)
    _store_state(totals_ptr + 3 * channels, m, tl.sum(lx, 0)[None], tl.sum(ly, 0)[None], channels, mask)


@triton.jit
def _near_sums(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, totals_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr,
    stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    totals_ptr += (b * spans + span) * 6 * channels + channel
    keys, values = _load(k_ptr, stride_kt, 0.0, L), _load(v_ptr, stride_vt, centre, L)
    weights, top = _weights(keys, extra, L)
    weighted = ()
    for t in tl.static_range(L):
        weighted += (weights[t] * values[t],)
    decay = tl.exp(-w)
    totals = _from_right(weighted, weights, decay, L) + _from_left(weighted, weights, decay, L)
    _near_store(totals_ptr, totals, top, w, place, channels, L, W)


@triton.jit
def _near_outputs(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gate_ptr, y_ptr, outside_ptr, spans, length, channels, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_yb, stride_yt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, 0 if ONE else W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, ONE)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    y_ptr = _sequence(y_ptr, place, stride_yb, stride_yt, 1)
    keys, values = _load(k_ptr, stride_kt, 0.0, L), _load(v_ptr, stride_vt, centre, L)
    gates = _load_gates(gate_ptr, stride_gt, GATED, L)
    weights, around, outside, top, over = _near_attend(w, place, keys, values, past, future, ONE, L, W)
    pn, pd, fn, fd = around
    decay, bonus = tl.exp(-w), tl.exp(u)
    ns, ds = (), ()
    for i in tl.static_range(L):
        weight = weights[L - 1 - i]
        ns, ds = (fn,) + ns, (fd,) + ds
        fn, fd = fn * decay + weight * values[L - 1 - i], fd * decay + weight
    for t in tl.static_range(L):
        weighted = weights[t] * values[t]
        y = (pn + (ns[t] + bonus * weighted)) * reciprocal(pd + (ds[t] + bonus * weights[t])) + centre
        if GATED:
            y *= sigmoid(gates[t].to(tl.float32))
        store_apart(y_ptr + t * stride_yt, y.to(y_ptr.dtype.element_ty), mask & (t >= extra))
        pn, pd = pn * decay + weighted, pd * decay + weights[t]


@triton.jit
def _near_gradients(
    w, u, place, k_ptr, v_ptr, gy_ptr, gate_ptr, ggate_ptr, past, future, centre, stride_kt: tl.constexpr,
    stride_vt: tl.constexpr, stride_gyt: tl.constexpr, stride_gt: tl.constexpr, stride_ggt: tl.constexpr,
    GATED: tl.constexpr, STORE: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment's sums, and what the decay's and the bonus's need.

    Returns:
        Exponentials of the keys; values; g, the outputs' gradients over the denominators; h, these times the outputs;
        both's sums from the edges; the last three of `_near_attend`; sums for the gradients of w and u; the future sums
        of all tokens summed as a future seen from the left edge, and the past ones from the right edge: times the
        gradients' past and future sums they give what the decay gets from pairs with tokens outside.
    """
    b, span, segment, start, extra, channel, mask = place
    decay, bonus = tl.exp(-w), tl.exp(u)
    zero = tl.zeros([W, channel.shape[1]], tl.float32)
    keys, values = _load(k_ptr, stride_kt, 0.0, L), _load(v_ptr, stride_vt, centre, L)
    gys = _load(gy_ptr, stride_gyt, 0.0, L)
    gates = _load_gates(gate_ptr, stride_gt, GATED, L)
    weights, around, outside, top, over = _near_attend(w, place, keys, values, past, future, ONE, L, W)
    pn, pd, fn, fd = around
    hn, hd = zero, zero
    ns, ds = (), ()
    for i in tl.static_range(L):
        weight = weights[L - 1 - i]
        hn, hd = hn * decay + fn, hd * decay + fd
        ns, ds = (fn,) + ns, (fd,) + ds
        fn, fd = fn * decay + weight * values[L - 1 - i], fd * decay + weight
    # Without the segment's first tokens if these belong to the segment before: there both sums only decay.
    hn, hd = hn - extra * ns[0], hd - extra * ds[0]
    qn, qd = -extra * tl.exp(w) * pn, -extra * tl.exp(w) * pd
    gs, hs = (), ()
    gw, gu, px, py = zero, zero, zero, zero
    for t in tl.static_range(L):
        weighted = weights[t] * values[t]
        inverse = reciprocal(pd + (ds[t] + bonus * weights[t]))
        y = (pn + (ns[t] + bonus * weighted)) * inverse
        gy = gys[t]
        if GATED:
            s = sigmoid(gates[t].to(tl.float32))
            if STORE:
                ggate = gy * (y + centre) * (s * (1.0 - s))
                ggate = ggate.to(ggate_ptr.dtype.element_ty)
                store_apart(ggate_ptr + t * stride_ggt, ggate, mask & (t >= extra))
            gy *= s
        g = tl.where(t >= extra, gy * inverse, 0.0)
        h = g * y
        gs, hs = gs + (g,), hs + (h,)
        gu += weights[t] * (g * values[t] - h)
        gw = gw + g * qn - h * qd + ns[t] * px - ds[t] * py
        qn, qd = qn * decay + pn, qd * decay + pd
        px, py = px * decay + g, py * decay + h
        pn, pd = pn * decay + weighted, pd * decay + weights[t]
    totals = (px, py) + _from_left(gs, hs, decay, L)
    return weights, values, gs, hs, totals, outside, top, over, gw, gu * bonus, (hn, hd, qn, qd)


@triton.jit
def _near_grads(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, outside_ptr, totals_ptr, spans, length, channels,
    stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gyb,
    stride_gyt: tl.constexpr, stride_gyc, stride_gb, stride_gt: tl.constexpr, stride_gc, GATED: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, False)
    gy_ptr = _sequence(gy_ptr, place, stride_gyb, stride_gyt, stride_gyc)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    totals_ptr += (b * spans + span) * 6 * channels + channel
    weights, values, gs, hs, totals, outside, top, over, gw, gu, around = _near_gradients(
        w, u, place, k_ptr, v_ptr, gy_ptr, gate_ptr, gate_ptr, past, future, centre, stride_kt, stride_vt, stride_gyt,
        stride_gt, stride_gt, GATED, False, False, L, W,
    )  # fmt: skip
    _near_store(totals_ptr, totals, -(top + over), w, place, channels, L, W)


@triton.jit
def _near_inputs(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, parts_ptr,
    outside_ptr, grad_outside_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb,
    stride_vt: tl.constexpr, stride_vc, stride_gyb, stride_gyt: tl.constexpr, stride_gyc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_gkb, stride_gkt: tl.constexpr, stride_gvb, stride_gvt: tl.constexpr,
    stride_ggb, stride_ggt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, 1 if ONE else W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, ONE)
    grad_past, grad_future = _load_outside(grad_outside_ptr, place, spans, channels, ONE)
    gy_ptr = _sequence(gy_ptr, place, stride_gyb, stride_gyt, stride_gyc)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    gk_ptr = _sequence(gk_ptr, place, stride_gkb, stride_gkt, 1)
    gv_ptr = _sequence(gv_ptr, place, stride_gvb, stride_gvt, 1)
    ggate_ptr = _sequence(ggate_ptr, place, stride_ggb, stride_ggt, 1)
    weights, values, gs, hs, totals, outside, top, over, gw, gu, around = _near_gradients(
        w, u, place, k_ptr, v_ptr, gy_ptr, gate_ptr, ggate_ptr, past, future, centre, stride_kt, stride_vt, stride_gyt,
        stride_gt, stride_ggt, GATED, True, ONE, L, W,
    )  # fmt: skip
    hn, hd, qn, qd = around
    zero = top * 0
    before, after = (zero, zero), (zero, zero)
    if not ONE:
        pm, fm = tl.exp(grad_past[0] + top), tl.exp(grad_future[0] + top - w * (W * L))
        before, after = (pm * grad_past[1], pm * grad_past[2]), (fm * grad_future[1], fm * grad_future[2])
    decay, bonus = tl.exp(-w), tl.exp(u)
    left, right = _edges(w, place, L, W)
    px, py, fx, fy = _surroundings(totals, before, after, left, right, segment, W)
    gw += (qn * fx - qd * fy) + (hn * px - hd * py)
    if not ONE:
        # Sums from outside and the gradients' do not have the same exponent: these pairs are taken out, ...
        p, f = outside
        both = (p[0] * after[0] - p[1] * after[1]) + (f[0] * before[0] - f[1] * before[1])
        gw -= (L - extra) * tl.exp(w) * both
    gw, outer = -decay * gw, zero
    if not ONE:
        # ... and enter with the sum of their exponents, once for every token that they have between them.
        tokens = tl.minimum(W * L, length - span * (W * L))
        p, f = tl.exp(past[0] + grad_future[0] - w * (W * L)), tl.exp(future[0] + grad_past[0] - w * (W * L))
        p *= past[1] * grad_future[1] - past[2] * grad_future[2]
        f *= future[1] * grad_past[1] - future[2] * grad_past[2]
        outer = -tokens * (p + f)
    _store_part(parts_ptr, gw, gu, outer, scale, place, spans, channels)
    xs, ys = (), ()
    for i in tl.static_range(L):
        g, h = gs[L - 1 - i], hs[L - 1 - i]
        xs, ys = (fx + bonus * g,) + xs, (fy + bonus * h,) + ys
        fx, fy = fx * decay + g, fy * decay + h
    for t in tl.static_range(L):
        gv = weights[t] * (px + xs[t])
        gk = gv * values[t] - weights[t] * (py + ys[t])
        valid = mask & (t >= extra)
        store_apart(gv_ptr + t * stride_gvt, gv.to(gv_ptr.dtype.element_ty), valid)
        store_apart(gk_ptr + t * stride_gkt, gk.to(gk_ptr.dtype.element_ty), valid)
        px, py = px * decay + gs[t], py * decay + hs[t]


# Far.


@triton.jit
def _aged(exponent, tokens, w):
    """The float32 exponent of a term, so many tokens on, in float64."""
    return exponent.to(tl.float64) - tokens * w.to(tl.float64)


@triton.jit
def _exp(x):
    """In float32 of a float64 exponent."""
    return tl.exp(x.to(tl.float32))


@triton.jit
def _side(key, x, y, between, w, m, age, n, d):
    """Sum of the terms `exp(key - between w) (x, y)` along the first axis that have `between >= 0`, and of a state.

    Exponents are formed from whole numbers of tokens, as w taken off token by token would be rounded the same way every
    time. That of the result is about the largest, and the terms' differences from it are formed in float64: nothing of
    them is rounded off.
    """
    terms = tl.where(between >= 0, key - between * w, NOTHING)
    top = tl.maximum(tl.max(terms, 0), m - age * w)
    weight = _exp(tl.where(between >= 0, _aged(key, between, w) - top, NOTHING))
    kept = _exp(_aged(m, age, w) - top)
    return top, tl.sum(weight * x, 0) + kept * n, tl.sum(weight * y, 0) + kept * d


@triton.jit
def _far_load(pointer, stride: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    """A segment's tokens, (P, W, C), L of them."""
    # Token by token: one load of all would put several channels into a thread.
    i = tl.arange(0, P)[:, None, None]
    tokens = tl.zeros([P, pointer.shape[0], pointer.shape[1]], tl.float32)
    for t in range(L):
        tokens = tl.where(i == t, load_apart(pointer + t * stride).to(tl.float32)[None], tokens)
    return tokens


@triton.jit
def _far_totals(keys, x, y, w, extra, L: tl.constexpr):
    """States of a segment seen from its right edge, and from its left edge."""
    t, zero = tl.arange(0, keys.shape[0])[:, None, None], w * 0
    rm, rx, ry = _side(keys, x, y, L - 1 - t, w, zero + NOTHING, 0, zero, zero)
    lm, lx, ly = _side(keys, x, y, t - extra[None], w, zero + NOTHING, 0, zero, zero)
    return rm, rx, ry, lm, lx, ly


@triton.jit
def _far_surroundings(totals, past, future, w, segment, L: tl.constexpr, W: tl.constexpr):
    """States of what a segment sees of the past from its left edge and of the future from its right edge."""
    rm, rx, ry, lm, lx, ly = totals
    pm, px, py = past
    fm, fx, fy = future
    between = (segment[None] - tl.arange(0, W)[:, None, None] - 1) * L
    pm, px, py = _side(rm[:, None], rx[:, None], ry[:, None], between, w, pm, segment * L, px, py)
    between = (tl.arange(0, W)[:, None, None] - segment[None] - 1) * L
    fm, fx, fy = _side(lm[:, None], lx[:, None], ly[:, None], between, w, fm, (W - 1 - segment) * L, fx, fy)
    return pm, px, py, fm, fx, fy


@triton.jit
def _far_store(totals_ptr, totals, w, segment, channels, mask, L: tl.constexpr, W: tl.constexpr):
    """Writes the states of a span from those of its segments."""
    rm, rx, ry, lm, lx, ly = totals
    zero = w * 0
    m, x, y = _side(rm, rx, ry, (W - 1 - segment) * L, w, zero + NOTHING, 0, zero, zero)
    _store_state(totals_ptr, m, x, y, channels, mask)
    m, x, y = _side(lm, lx, ly, segment * L, w, zero + NOTHING, 0, zero, zero)
    _store_state(totals_ptr + 3 * channels, m, x, y, channels, mask)


@triton.jit
def _far_around(keys, x, y, t, extra, w, around, L: tl.constexpr):
    """States of the tokens before and after token t of a segment, seen from it."""
    pm, px, py, fm, fx, fy = around
    i = tl.arange(0, keys.shape[0])[:, None, None]
    pm, px, py = _side(keys, x, y, t - 1 - i, w, pm, t - extra, px, py)
    fm, fx, fy = _side(keys, x, y, i - t - 1, w, fm, L - 1 - t, fx, fy)
    return pm, px, py, fm, fx, fy


@triton.jit
def _far_attend(states, k, v, u):
    """Output of a token, the inverse of its denominator, the exponent of that, and what the bonus's gradient needs.

    That is the token's own weight times the distance of its value from the output, from the others' distances: for a
    weight near 1 that of the output would be its rounding.
    """
    pm, pn, pd, fm, fn, fd = states
    top = tl.maximum(tl.maximum(pm, fm), k + u)
    past, future, own = tl.exp(pm - top), tl.exp(fm - top), tl.exp((k - top) + u)
    inverse = 1.0 / (past * pd + future * fd + own)
    apart = (past * (v * pd - pn) + future * (v * fd - fn)) * inverse
    return (past * pn + future * fn + own * v) * inverse, inverse, top, own * apart


@triton.jit
def _far_keys(k_ptr, extra, stride_kt: tl.constexpr, L: tl.constexpr, P: tl.constexpr):
    """A segment's keys, those of other segments' tokens `NOTHING`."""
    t = tl.arange(0, P)[:, None, None]
    return tl.where((t >= extra[None]) & (t < L), _far_load(k_ptr, stride_kt, L, P), NOTHING)


@triton.jit
def _far_sums(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, totals_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr,
    stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, L: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    totals_ptr += (b * spans + span) * 6 * channels + channel
    keys, values = _far_keys(k_ptr, extra, stride_kt, L, P), _far_load(v_ptr, stride_vt, L, P) - centre
    totals = _far_totals(keys, values, values * 0 + 1.0, w + 0.0 * segment, extra, L)
    _far_store(totals_ptr, totals, w, segment, channels, mask, L, W)


@triton.jit
def _far_outputs(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gate_ptr, y_ptr, outside_ptr, spans, length, channels, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_yb, stride_yt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, 0 if ONE else W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, ONE)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    y_ptr = _sequence(y_ptr, place, stride_yb, stride_yt, 1)
    w, u = w + 0.0 * segment, u + 0.0 * segment
    keys, values = _far_keys(k_ptr, extra, stride_kt, L, P), _far_load(v_ptr, stride_vt, L, P) - centre
    ones = values * 0 + 1.0
    around = _far_surroundings(_far_totals(keys, values, ones, w, extra, L), past, future, w, segment, L, W)
    for t in range(L):
        states = _far_around(keys, values, ones, t, extra, w, around, L)
        k = load_apart(k_ptr + t * stride_kt).to(tl.float32)
        v = load_apart(v_ptr + t * stride_vt).to(tl.float32) - centre
        y, inverse, top, apart = _far_attend(states, k, v, u)
        y += centre
        if GATED:
            y *= sigmoid(load_apart(gate_ptr + t * stride_gt).to(tl.float32))
        store_apart(y_ptr + t * stride_yt, y.to(y_ptr.dtype.element_ty), mask & (t >= extra))


@triton.jit
def _far_gradients(
    w, u, place, k_ptr, v_ptr, gy_ptr, gate_ptr, ggate_ptr, past, future, centre, stride_kt: tl.constexpr,
    stride_vt: tl.constexpr, stride_gyt: tl.constexpr, stride_gt: tl.constexpr, stride_ggt: tl.constexpr,
    GATED: tl.constexpr, STORE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment's sums.

    Returns:
        Keys and values; what the segment sees around it; g, the outputs' gradients over the denominators, h, these
        times the outputs, minus the denominators' exponents, and the tokens' parts of the gradient of u, (P, W, C).
    """
    b, span, segment, start, extra, channel, mask = place
    keys, values = _far_keys(k_ptr, extra, stride_kt, L, P), _far_load(v_ptr, stride_vt, L, P) - centre
    ones, i = values * 0 + 1.0, tl.arange(0, P)[:, None, None]
    around = _far_surroundings(_far_totals(keys, values, ones, w, extra, L), past, future, w, segment, L, W)
    gs, hs, minus, gus = values * 0, values * 0, values * 0 + NOTHING, values * 0
    for t in range(L):
        states = _far_around(keys, values, ones, t, extra, w, around, L)
        k = load_apart(k_ptr + t * stride_kt).to(tl.float32)
        v = load_apart(v_ptr + t * stride_vt).to(tl.float32) - centre
        y, inverse, top, apart = _far_attend(states, k, v, u)
        gy = load_apart(gy_ptr + t * stride_gyt).to(tl.float32)
        if GATED:
            s = sigmoid(load_apart(gate_ptr + t * stride_gt).to(tl.float32))
            if STORE:
                ggate = gy * (y + centre) * (s * (1.0 - s))
                ggate = ggate.to(ggate_ptr.dtype.element_ty)
                store_apart(ggate_ptr + t * stride_ggt, ggate, mask & (t >= extra))
            gy *= s
        here = (i == t) & (t >= extra)[None]
        g = gy * inverse
        gs, hs, minus = tl.where(here, g, gs), tl.where(here, g * y, hs), tl.where(here, -top, minus)
        gus = tl.where(here, g * apart, gus)
    return keys, values, around, gs, hs, minus, gus


@triton.jit
def _far_grads(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, outside_ptr, totals_ptr, spans, length, channels,
    stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gyb,
    stride_gyt: tl.constexpr, stride_gyc, stride_gb, stride_gt: tl.constexpr, stride_gc, GATED: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, False)
    gy_ptr = _sequence(gy_ptr, place, stride_gyb, stride_gyt, stride_gyc)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    totals_ptr += (b * spans + span) * 6 * channels + channel
    keys, values, around, gs, hs, minus, gus = _far_gradients(
        w + 0.0 * segment, u + 0.0 * segment, place, k_ptr, v_ptr, gy_ptr, gate_ptr, gate_ptr, past, future, centre,
        stride_kt, stride_vt, stride_gyt, stride_gt, stride_gt, GATED, False, L, P, W,
    )  # fmt: skip
    totals = _far_totals(minus, gs, hs, w + 0.0 * segment, extra, L)
    _far_store(totals_ptr, totals, w, segment, channels, mask, L, W)


@triton.jit
def _far_inputs(
    program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, parts_ptr,
    outside_ptr, grad_outside_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb,
    stride_vt: tl.constexpr, stride_vc, stride_gyb, stride_gyt: tl.constexpr, stride_gyc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_gkb, stride_gkt: tl.constexpr, stride_gvb, stride_gvt: tl.constexpr,
    stride_ggb, stride_ggt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    place, w, u, centre, k_ptr, v_ptr = _begin(
        program, w_ptr, u_ptr, scale, k_ptr, v_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
        stride_vt, stride_vc, 1 if ONE else W, L, W, BLOCK, EVEN,
    )  # fmt: skip
    b, span, segment, start, extra, channel, mask = place
    past, future = _load_outside(outside_ptr, place, spans, channels, ONE)
    grad_past, grad_future = _load_outside(grad_outside_ptr, place, spans, channels, ONE)
    gy_ptr = _sequence(gy_ptr, place, stride_gyb, stride_gyt, stride_gyc)
    gate_ptr = _sequence(gate_ptr, place, stride_gb, stride_gt, stride_gc)
    gk_ptr = _sequence(gk_ptr, place, stride_gkb, stride_gkt, 1)
    gv_ptr = _sequence(gv_ptr, place, stride_gvb, stride_gvt, 1)
    ggate_ptr = _sequence(ggate_ptr, place, stride_ggb, stride_ggt, 1)
    w, u = w + 0.0 * segment, u + 0.0 * segment
    keys, values, around, gs, hs, minus, gus = _far_gradients(
        w, u, place, k_ptr, v_ptr, gy_ptr, gate_ptr, ggate_ptr, past, future, centre, stride_kt, stride_vt, stride_gyt,
        stride_gt, stride_ggt, GATED, True, L, P, W,
    )  # fmt: skip
    grad_around = _far_surroundings(
        _far_totals(minus, gs, hs, w, extra, L), grad_past, grad_future, w, segment, L, W
    )  # fmt: skip
    gw = w * 0
    i = tl.arange(0, P)[:, None, None]
    for t in range(L):
        pm, pn, pd, fm, fn, fd = _far_around(keys, values, values * 0 + 1.0, t, extra, w, around, L)
        gpm, px, py, gfm, fx, fy = _far_around(minus, gs, hs, t, extra, w, grad_around, L)
        valid = t >= extra
        # A pair's two exponents and the decay that neither has add up to the logarithm of its weight.
        meet = tl.exp(pm + gfm - w) * (pn * fx - pd * fy) + tl.exp(fm + gpm - w) * (fn * px - fd * py)
        gw -= tl.where(valid, meet, 0.0)
        k = load_apart(k_ptr + t * stride_kt).to(tl.float32)
        v = load_apart(v_ptr + t * stride_vt).to(tl.float32) - centre
        g, gu = tl.sum(tl.where(i == t, gs, 0.0), 0), tl.sum(tl.where(i == t, gus, 0.0), 0)
        own = tl.where(valid, tl.exp((k + tl.max(tl.where(i == t, minus, NOTHING), 0)) + u), 0.0)
        before, after = tl.exp(gpm + k), tl.exp(gfm + k)
        gv = before * px + after * fx + own * g
        gk = before * (v * px - py) + after * (v * fx - fy) + gu
        store_apart(gv_ptr + t * stride_gvt, gv.to(gv_ptr.dtype.element_ty), mask & valid)
        store_apart(gk_ptr + t * stride_gkt, gk.to(gk_ptr.dtype.element_ty), mask & valid)
    _store_part(parts_ptr, gw, tl.sum(gus, 0), 0.0, scale, place, spans, channels)


# Kernels. Strides over tokens are compiled in: addresses inside a segment are constants then. The two ways begin each
# on its own, because the compiler's time grows with the square of what hangs together.


@kernel(do_not_specialize=["spans", "length"])
def bi_wkv_sums_kernel(
    w_ptr, u_ptr, scale, k_ptr, v_ptr, totals_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr,
    stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, L: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """States of every span, seen from its right edge and from its left edge.

    k, v (B, T, C); totals (B, spans, 2, 3, C); w, u (C,).
    """
    program = tl.program_id(0)
    if _is_near(program, w_ptr, u_ptr, scale, length, channels, W * L, BLOCK):
        _near_sums(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, totals_ptr, spans, length, channels, stride_kb, stride_kt,
            stride_kc, stride_vb, stride_vt, stride_vc, L, W, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _far_sums(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, totals_ptr, spans, length, channels, stride_kb, stride_kt,
            stride_kc, stride_vb, stride_vt, stride_vc, L, P, W, BLOCK, EVEN,
        )  # fmt: skip


@kernel(do_not_specialize=["spans"])
def bi_wkv_outside_kernel(
    w_ptr, scale, totals_ptr, outside_ptr, spans, channels, SPAN: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """States of all spans before each and of all after it, seen from its edges, from what each span has.

    A program walks one side of one block of channels of a sequence, and loads P spans at a time. The largest exponent
    of a state is kept as that of a span and as the number of spans since: aged span by span it would drift.

    totals, outside (B, spans, 2, 3, C); w (C,).
    """
    blocks = tl.cdiv(channels, BLOCK)
    side, block = tl.program_id(0) % 2, tl.program_id(0) // 2 % blocks
    channel = tl.minimum(block * BLOCK, channels - BLOCK) + tl.arange(0, BLOCK)
    # The side's first span, and how far it is to the next.
    first = (tl.program_id(0) // 2 // blocks).to(tl.int64) * spans + tl.where(side == 0, 0, spans - 1)
    step = tl.where(side == 0, 6, -6) * channels
    totals_ptr += (6 * first + 3 * side) * channels + channel
    outside_ptr += (6 * first + 3 * side) * channels + channel
    w = (tl.load(w_ptr + channel).to(tl.float32) * scale).to(tl.float64) * SPAN
    x, y, age = w * 0, w * 0, w * 0
    m = age + NOTHING
    for begin in range(0, spans, P):
        totals = ()
        for i in tl.static_range(P):
            pointer = totals_ptr + tl.minimum(begin + i, spans - 1) * step
            totals += (_load_state(pointer, channels),)
        for i in tl.static_range(P):
            tm, tx, ty = totals[i]
            # What float32 rounds off the exponent goes to the sums.
            exponent = m - age * w
            rounded = exponent.to(tl.float32)
            rest = _exp(exponent - rounded)
            pointer = outside_ptr + (begin + i) * step
            _store_state(
                pointer, rounded, (rest * x).to(tl.float32), (rest * y).to(tl.float32), channels, begin + i < spans
            )
            age += 1
            gap = (m - tm) - age * w
            small = _exp(-tl.abs(gap))
            keep, add = tl.where(gap > 0, 1.0, small), tl.where(gap > 0, small, 1.0)
            m, age = tl.where(gap > 0, m, tm), tl.where(gap > 0, age, 0.0)
            x, y = keep * x + add * tx, keep * y + add * ty


@kernel(do_not_specialize=["spans", "length"])
def bi_wkv_fwd_kernel(
    w_ptr, u_ptr, scale, k_ptr, v_ptr, gate_ptr, y_ptr, outside_ptr, spans, length, channels, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_yb, stride_yt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Outputs of a span.

    k, v, gate, y (B, T, C); outside (B, spans, 2, 3, C); w, u (C,).
    """
    # From the last on: what the pass before has read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if _is_near(program, w_ptr, u_ptr, scale, length, channels, W * L, BLOCK):
        _near_outputs(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gate_ptr, y_ptr, outside_ptr, spans, length, channels,
            stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gb, stride_gt, stride_gc,
            stride_yb, stride_yt, GATED, ONE, L, W, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _far_outputs(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gate_ptr, y_ptr, outside_ptr, spans, length, channels,
            stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gb, stride_gt, stride_gc,
            stride_yb, stride_yt, GATED, ONE, L, P, W, BLOCK, EVEN,
        )  # fmt: skip


@kernel(do_not_specialize=["spans", "length"])
def bi_wkv_grads_kernel(
    w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, outside_ptr, totals_ptr, spans, length, channels, stride_kb,
    stride_kt: tl.constexpr, stride_kc, stride_vb, stride_vt: tl.constexpr, stride_vc, stride_gyb,
    stride_gyt: tl.constexpr, stride_gyc, stride_gb, stride_gt: tl.constexpr, stride_gc, GATED: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """States of the gradients of every span, seen from its right edge and from its left edge.

    k, v, gy, gate (B, T, C); outside, totals (B, spans, 2, 3, C); w, u (C,).
    """
    program = tl.program_id(0)
    if _is_near(program, w_ptr, u_ptr, scale, length, channels, W * L, BLOCK):
        _near_grads(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, outside_ptr, totals_ptr, spans, length,
            channels, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt,
            stride_gyc, stride_gb, stride_gt, stride_gc, GATED, L, W, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _far_grads(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, outside_ptr, totals_ptr, spans, length,
            channels, stride_kb, stride_kt, stride_kc, stride_vb, stride_vt, stride_vc, stride_gyb, stride_gyt,
            stride_gyc, stride_gb, stride_gt, stride_gc, GATED, L, P, W, BLOCK, EVEN,
        )  # fmt: skip


@kernel(do_not_specialize=["spans", "length"])
def bi_wkv_bwd_kernel(
    w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, parts_ptr, outside_ptr,
    grad_outside_ptr, spans, length, channels, stride_kb, stride_kt: tl.constexpr, stride_kc, stride_vb,
    stride_vt: tl.constexpr, stride_vc, stride_gyb, stride_gyt: tl.constexpr, stride_gyc, stride_gb,
    stride_gt: tl.constexpr, stride_gc, stride_gkb, stride_gkt: tl.constexpr, stride_gvb, stride_gvt: tl.constexpr,
    stride_ggb, stride_ggt: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    W: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v and gate in a span, and its part of those of w and u.

    k, v, gy, gate, gk, gv, ggate (B, T, C); parts (B, spans, 2, C); outside, grad_outside (B, spans, 2, 3, C);
    w, u (C,).
    """
    # From the last on: what the pass before has read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if _is_near(program, w_ptr, u_ptr, scale, length, channels, W * L, BLOCK):
        _near_inputs(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, parts_ptr,
            outside_ptr, grad_outside_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
            stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb, stride_gt, stride_gc, stride_gkb,
            stride_gkt, stride_gvb, stride_gvt, stride_ggb, stride_ggt, GATED, ONE, L, W, BLOCK, EVEN,
        )  # fmt: skip
    else:
        _far_inputs(
            program, w_ptr, u_ptr, scale, k_ptr, v_ptr, gy_ptr, gate_ptr, gk_ptr, gv_ptr, ggate_ptr, parts_ptr,
            outside_ptr, grad_outside_ptr, spans, length, channels, stride_kb, stride_kt, stride_kc, stride_vb,
            stride_vt, stride_vc, stride_gyb, stride_gyt, stride_gyc, stride_gb, stride_gt, stride_gc, stride_gkb,
            stride_gkt, stride_gvb, stride_gvt, stride_ggb, stride_ggt, GATED, ONE, L, P, W, BLOCK, EVEN,
        )  # fmt: skip


# Most tokens of a segment; most segments of the only span of a sequence, and of one of several; channels of a program.
_TOKENS, _SEGMENTS, _SPLIT_SEGMENTS, _BLOCK = 16, 16, 8, 16
# Registers of a thread, so that a multiprocessor has three programs of 256 threads at a time and two of those with
# gradients. With several spans the last of their kernels is faster with fewer programs than with less in registers.
_REGISTERS, _GRAD_REGISTERS, _SPLIT_GRAD_REGISTERS = 80, 128, 168


def _plan(k: Tensor) -> tuple[tuple[int, int, int], int, dict]:
    """Spans and sizes, programs, and options of the kernels."""
    batch, length, channels = k.shape
    length, channels = int(length), int(channels)  # a compiler's symbols have no `bit_length`
    block = min(_BLOCK, 1 << (channels.bit_length() - 1))
    segments = min(_SEGMENTS, next_power_of_2(cdiv(length, _TOKENS)))
    if length > segments * _TOKENS:
        segments = min(segments, _SPLIT_SEGMENTS)
    spans = cdiv(length, segments * _TOKENS)
    tokens = cdiv(length, segments * spans)
    tokens = next((n for n in range(tokens, tokens // 2, -1) if length % (segments * n) == 0), tokens)
    spans = cdiv(length, segments * tokens)
    even = length == spans * segments * tokens and channels % block == 0
    options = dict(
        L=tokens, P=next_power_of_2(tokens), W=segments, BLOCK=block, EVEN=even,
        num_warps=max(1, segments * block // 32),
    )  # fmt: skip
    return (spans, length, channels), batch * spans * cdiv(channels, block), options


def _scale(k: Tensor, per_sequence: bool) -> float:
    """What decay and bonus are multiplied with in the kernels."""
    return 1.0 / k.shape[1] if per_sequence else 1.0


def _states(k: Tensor) -> Tensor:
    """Room for two states of every span, of its past and its future, (B, spans, 2, 3, C)."""
    (spans, _, channels), _, _ = _plan(k)
    return k.new_empty((k.shape[0], spans, 2, 3, channels), dtype=torch.float32)


def _exchange(w: Tensor, scale: float, totals: Tensor, outside: Tensor, options: dict) -> None:
    """Fills in the states outside of each span from those that the spans have."""
    batch, spans, _, _, channels = totals.shape
    block = min(32, 1 << (channels.bit_length() - 1))
    bi_wkv_outside_kernel[(2 * batch * cdiv(channels, block),)](
        w, scale, totals, outside, spans, channels, SPAN=options["W"] * options["L"], P=8, BLOCK=block, num_warps=1
    )  # fmt: skip


def _fill_outside(w: Tensor, u: Tensor, scale: float, k: Tensor, v: Tensor, outside: Tensor) -> None:
    """Fills in the states outside of each span from keys and values."""
    sizes, programs, options = _plan(k)
    totals = torch.empty_like(outside)
    bi_wkv_sums_kernel[(programs,)](
        w, u, scale, k, v, totals, *sizes, *k.stride(), *v.stride(), **at_most(_REGISTERS), **options
    )
    _exchange(w, scale, totals, outside, options)


def _is_unserved(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None) -> bool:
    """Whether there are no kernels for these arguments, but PyTorch's operators."""
    return official_split is not None or state_dtype(w, u, k, v, gate) == torch.float64


def to_save(w, u, k, v, gate, official_split, per_sequence) -> list[Tensor]:
    """The states outside of each span: 6 numbers per channel and up to 256 tokens."""
    if _is_unserved(w, u, k, v, gate, official_split):
        return []
    outside = _states(k)
    return [outside] if outside.shape[1] > 1 else []


def forward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    official_split: int | None,
    per_sequence: bool,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    if _is_unserved(w, u, k, v, gate, official_split):
        return _torch.forward(w, u, k, v, gate, official_split, per_sequence)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if y.numel() == 0:
        return y
    w, u, scale = w.contiguous(), u.contiguous(), _scale(k, per_sequence)
    sizes, programs, options = _plan(k)
    one = sizes[0] == 1
    outside = w
    if not one:
        (outside,) = saved or (_states(k),)
        _fill_outside(w, u, scale, k, v, outside)
    gated = y if gate is None else gate
    bi_wkv_fwd_kernel[(programs,)](
        w, u, scale, k, v, gated, y, outside, *sizes, *k.stride(), *v.stride(), *gated.stride(), *y.stride()[:2],
        GATED=gate is not None, ONE=one, **at_most(_REGISTERS), **options,
    )  # fmt: skip
    return y


def backward(
    grads: list[Tensor],
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    official_split: int | None,
    per_sequence: bool,
    saved: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    if _is_unserved(w, u, k, v, gate, official_split):
        return _torch.backward(grads, w, u, k, v, gate, official_split, per_sequence)
    gk, gv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    ggate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gk.numel() == 0:
        return [None, None, gk, gv, ggate]
    gy, w, u, scale = grads[0], w.contiguous(), u.contiguous(), _scale(k, per_sequence)
    sizes, programs, options = _plan(k)
    one = sizes[0] == 1
    outside = grad_outside = w
    gated, ggated = (gk, gk) if gate is None else (gate, ggate)
    inputs = (*k.stride(), *v.stride(), *gy.stride(), *gated.stride())
    if not one:
        if saved:
            (outside,) = saved
        else:
            outside = _states(k)
            _fill_outside(w, u, scale, k, v, outside)
        totals, grad_outside = torch.empty_like(outside), torch.empty_like(outside)
        bi_wkv_grads_kernel[(programs,)](
            w, u, scale, k, v, gy, gated, outside, totals, *sizes, *inputs, GATED=gate is not None,
            **at_most(_GRAD_REGISTERS), **options,
        )  # fmt: skip
        _exchange(w, scale, totals, grad_outside, options)
    parts = k.new_empty(len(k) * sizes[0], 2 * sizes[2], dtype=torch.float32)
    bi_wkv_bwd_kernel[(programs,)](
        w, u, scale, k, v, gy, gated, gk, gv, ggated, parts, outside, grad_outside, *sizes, *inputs, *gk.stride()[:2],
        *gv.stride()[:2], *ggated.stride()[:2], GATED=gate is not None, ONE=one,
        **at_most(_GRAD_REGISTERS if one else _SPLIT_GRAD_REGISTERS), **options,
    )  # fmt: skip
    return [*sum_parts(parts).view(2, -1), gk, gv, ggate]
