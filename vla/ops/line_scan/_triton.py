"""GPU kernels of the line scan with stored coefficients, and which kernels run."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, next_power_of_2
from . import _triton_pairs, _triton_proxy
from ._triton_proxy import _MIN_TOTAL, _STEEPEST, _exp2, _inverse
from .frames import from_map_frame, to_map_frame

# A sum of sigmoids that only clamped logits have.
_NO_TOTAL = tl.constexpr(8e-13)


@triton.jit
def _open_gates(l, m, r, has_left, has_right):
    """Gates over their common factor, that factor, whether their sum was too small, and what their derivatives need.

    With `e = exp(-logit)` and `b = 1 + e`, the sigmoids' ratio `1/bl : 1/bm : 1/br` is `bm br : bl br : bl bm`, so that
    one division is enough.
    """
    el, em, er = _exp2(tl.minimum(l, _STEEPEST)), _exp2(tl.minimum(m, _STEEPEST)), _exp2(tl.minimum(r, _STEEPEST))
    bl, bm, br = 1 + el, 1 + em, 1 + er
    nl, nm, nr = bm * br, bl * br, bl * bm
    product = nl * bl
    nl = tl.where(has_left, nl, 0.0)
    nr = tl.where(has_right, nr, 0.0)
    total = nl + nm + nr
    clamped = total < product * _MIN_TOTAL
    share = _inverse(tl.maximum(total, product * _MIN_TOTAL))
    share = tl.where(total > product * _NO_TOTAL, share, 0.0)
    return nl, nm, nr, share, clamped, product, el, em, er


@triton.jit
def _half(tile, R: tl.constexpr, W: tl.constexpr, right: tl.constexpr):
    first, second = tl.split(tl.permute(tl.reshape(tile, [R, 2, W // 2]), [0, 2, 1]))
    if right:
        return second
    else:
        return first


@triton.jit
def _line(tile, n: tl.constexpr, R: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """The sweep's `n`-th line of lines (R, W), float32 (R,). A thread holds all lines of its rows: nothing moves."""
    j: tl.constexpr = W - 1 - n if REVERSE else n
    if W == 8:
        tile = _half(tile, R, 8, j // 4 == 1)
    if W >= 4:
        tile = _half(tile, R, 4, j // 2 % 2 == 1)
    if W >= 2:
        tile = _half(tile, R, 2, j % 2 == 1)
    return tl.reshape(tile, [R]).to(tl.float32)


@triton.jit
def _put(tile, line, n: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """Lines (R, W) with the sweep's `n`-th replaced."""
    j: tl.constexpr = W - 1 - n if REVERSE else n
    return tl.where(tl.arange(0, W)[None, :] == j, line[:, None], tile)


@triton.jit
def _block(pointer, stride, n, W: tl.constexpr):
    """Pointers to the n-th block of W lines, which are next to each other unless W is 1."""
    if W == 1:
        return pointer + stride.to(tl.int64) * n
    else:
        return pointer + (n * W + tl.arange(0, W)[None, :])


# Triton's first versions don't have it, and look up every name.
_GATHER = hasattr(tl, "gather")
if _GATHER:

    @triton.jit
    def _gather(line, index):
        return tl.gather(line, index, 0)

else:

    @triton.jit
    def _gather(line, index):
        return line


@triton.jit
def _exchange(
    forth, back, place, turn, index, has_left, has_right,
    R: tl.constexpr, ROW: tl.constexpr, GATHER: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """`forth[i - 1]` and `back[i + 1]` of a line, 0 outside the map; SAME when the two are one."""
    if GATHER:
        above = tl.where(has_left, _gather(forth, tl.maximum(index - ROW, 0)), 0.0)
        below = tl.where(has_right, _gather(back, tl.minimum(index + ROW, R - 1)), 0.0)
    else:
        # Through memory that no other program uses, in turns so that one barrier a line is enough.
        place += turn % 2 * (2 * (R + 2 * ROW))
        other = place if SAME else place + (R + 2 * ROW)
        tl.store(place, forth)
        if not SAME:
            tl.store(other, back)
        tl.debug_barrier()
        above = tl.load(place - ROW, has_left, 0.0)
        below = tl.load(other + ROW, has_right, 0.0)
    return above, below


@triton.jit
def _next(tile, before, R: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """Lines (R, W) as float32 moved on by one, the first one from `before` (R, 1)."""
    out = tl.zeros([R, W], tl.float32) + before.to(tl.float32)
    for n in tl.static_range(W - 1):
        out = _put(out, _line(tile, n, R, W, REVERSE), n + 1, W, REVERSE)
    return out


@triton.jit
def _stored_lines(
    x, lam, l, m, r, u, skip, h, w, rows, lines, chunk, place, index, has_left, has_right,
    R: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """States of the last of W lines, and outputs (R, W) of all, from lines (R, W) of everything."""
    out = tl.zeros([R, W], tl.float32)
    for n in tl.static_range(W):
        h, y, _, _ = _stored_line(
            x, lam, l, m, r, u, skip, h, w, rows, lines, chunk, place, index, has_left, has_right,
            n, R, W, ROW, REVERSE, NORMALIZE, HAS_U, HAS_SKIP, GATHER)  # fmt: skip
        out = _put(out, y, n, W, REVERSE)
    return h, out


@triton.jit
def _stored_line(
    x, lam, l, m, r, u, skip, h, w, rows, lines, chunk, place, index, has_left, has_right,
    n: tl.constexpr, R: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """States and outputs (R,) of the sweep's `n`-th of lines (R, W), and states before it, one row up and down."""
    wn = w + (W - 1 - n if REVERSE else n)
    xj, l, m, r = (
        _line(x, n, R, W, REVERSE),
        _line(l, n, R, W, REVERSE),
        _line(m, n, R, W, REVERSE),
        _line(r, n, R, W, REVERSE),
    )
    above, below = _exchange(h, h, place, wn, index, has_left, has_right, R, ROW, GATHER, True)
    if NORMALIZE:
        l, m, r, share, _, _, _, _, _ = _open_gates(
            l * -LOG2E, m * -LOG2E, r * -LOG2E, has_left | (rows == 1), has_right
        )
        mixed = (l * above + m * h + r * below) * share
    else:
        mixed = l * above + m * h + r * below
    t = lines - 1 - wn if REVERSE else wn
    h = _line(lam, n, R, W, REVERSE) * xj + tl.where(t % chunk == 0, 0.0, mixed)
    y = h
    if HAS_U:
        y *= _line(u, n, R, W, REVERSE)
    if HAS_SKIP:
        y += _line(skip, n, R, W, REVERSE) * xj
    return h, y, above, below


@triton.jit
def _stored_line_gradients(
    x, lam, l, m, r, u, skip, gy, h, above, below, carry, w, rows, lines, chunk, place, index, has_left, has_right,
    n: tl.constexpr, R: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr, REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Gradients (R,) of the states before the sweep's `n`-th of lines (R, W), and of its x, lambda, gates, u and skip.

    `h`, `above` and `below` (R,) are the states of the line before, one row up and one row down.
    """
    wn = w + (W - 1 - n if REVERSE else n)
    xj, lamj, gy = _line(x, n, R, W, REVERSE), _line(lam, n, R, W, REVERSE), _line(gy, n, R, W, REVERSE)
    l, m, r = _line(l, n, R, W, REVERSE), _line(m, n, R, W, REVERSE), _line(r, n, R, W, REVERSE)
    g = carry
    if HAS_U:
        g += gy * _line(u, n, R, W, REVERSE)
    else:
        g += gy
    g_x = g * lamj
    if HAS_SKIP:
        g_x += gy * _line(skip, n, R, W, REVERSE)
    t = lines - 1 - wn if REVERSE else wn
    fresh = t % chunk == 0
    handed = tl.where(fresh, 0.0, g)
    if NORMALIZE:
        nl, nm, nr, share, clamped, product, el, em, er = _open_gates(
            l * -LOG2E, m * -LOG2E, r * -LOG2E, has_left | (rows == 1), has_right
        )
        mixed = (nl * above + nm * h + nr * below) * share
        mean = tl.where(clamped, 0.0, mixed)
        share *= handed
        shrink = _inverse(product)
        l, m, r = nl * share, nm * share, nr * share
        g_l = l * (above - mean) * (nl * shrink * el)
        g_m = m * (h - mean) * (nm * shrink * em)
        g_r = r * (below - mean) * (nr * shrink * er)
    else:
        mixed = l * above + m * h + r * below
        g_l, g_m, g_r = handed * above, handed * h, handed * below
        l, m, r = l * handed, m * handed, r * handed
    value = lamj * xj + tl.where(fresh, 0.0, mixed)
    from_above, from_below = _exchange(r, l, place, wn, index, has_left, has_right, R, ROW, GATHER, False)
    return m + from_above + from_below, g_x, g * xj, g_l, g_m, g_r, gy * value, gy * xj


@triton.jit
def _stored_rows(sequences, channels, rows, segments, N: tl.constexpr, P: tl.constexpr, ROWS_INNER: tl.constexpr):
    """Of a program's N * P rows: index (R,), picture, channel and row (R, 1), which exist and which have neighbours."""
    first = tl.program_id(0) // segments * N
    index = tl.arange(0, N * P)
    if ROWS_INNER:
        i, q = index % P, first + index // P
    else:
        i, q = index // N, first + index % N
    mask = ((i < rows) & (q < sequences))[:, None]
    b, d = (q // channels).to(tl.int64)[:, None], (q % channels).to(tl.int64)[:, None]
    return index, b, d, i.to(tl.int64)[:, None], mask, i > 0, i < rows - 1


@triton.jit(do_not_specialize=[
    "sequences", "channels", "rows", "blocks", "chunk", "segments", "span", "one",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "y_b", "y_d", "y_i", "y_w",
])  # fmt: skip
def line_scan_fwd_kernel(
    x, gates, lam, u, skip, y, exchange, sequences, channels, rows, blocks, chunk, segments, span, one,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, y_b, y_d, y_i, y_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Outputs of one sweep over the lines of one segment of N maps (a picture's channel each).

    Strides are in units of W, so that the compiler sees that W numbers can be read at once; those across lines (`_w`)
    are in numbers and only used if W is 1. `one` is 1, and hides from the compiler that `exchange` could be read in
    wider pieces, for which it would spread rows differently over the threads than everywhere else.
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    segment = tl.program_id(0) % segments
    index, b, d, i, mask, has_left, has_right = _stored_rows(sequences, channels, rows, segments, N, P, ROWS_INNER)
    place = exchange + tl.program_id(0).to(tl.int64) * (4 * (R + 2 * ROW)) + (ROW + index * one)
    x += (b * x_b + d * x_d + i * x_i) * W
    gates += (b * g_b + d * g_d + i * g_i) * W
    g_n = g_n.to(tl.int64)
    lam += (b * lam_b + d * lam_d + i * lam_i) * W
    u += (b * u_b + d * u_d + i * u_i) * W
    skip += (b * skip_b + d * skip_d + i * skip_i) * W
    y += (b * y_b + d * y_d + i * y_i) * W
    h = tl.zeros([R], tl.float32)
    start, stop = segment * span, tl.minimum((segment + 1) * span, blocks)
    w1 = blocks - 1 - start if REVERSE else start
    gp = _block(gates, g_w, w1, W)
    # (R, W); the next block is read with this one: they share sectors of memory.
    xn, an = tl.load(_block(x, x_w, w1, W), mask, 0.0), tl.load(_block(lam, lam_w, w1, W), mask, 0.0)
    ln, mn, rn = tl.load(gp, mask, 0.0), tl.load(gp + g_n * W, mask, 0.0), tl.load(gp + 2 * g_n * W, mask, 0.0)
    for n in range(start, stop):
        w0 = blocks - 1 - n if REVERSE else n
        xt, at, l, m, r = xn, an, ln, mn, rn
        n_next = tl.minimum(n + 1, stop - 1)
        w1 = blocks - 1 - n_next if REVERSE else n_next
        gp = _block(gates, g_w, w1, W)
        xn, an = tl.load(_block(x, x_w, w1, W), mask, 0.0), tl.load(_block(lam, lam_w, w1, W), mask, 0.0)
        ln, mn, rn = tl.load(gp, mask, 0.0), tl.load(gp + g_n * W, mask, 0.0), tl.load(gp + 2 * g_n * W, mask, 0.0)
        yp = _block(y, y_w, w0, W)
        ut, st = xt, xt
        if HAS_U:
            ut = tl.load(_block(u, u_w, w0, W), mask, 0.0)
        if HAS_SKIP:
            st = tl.load(_block(skip, skip_w, w0, W), mask, 0.0)
        h, out = _stored_lines(
            xt, at, l, m, r, ut, st, h, w0 * W, rows, blocks * W, chunk, place, index, has_left, has_right,
            R, W, ROW, REVERSE, NORMALIZE, HAS_U, HAS_SKIP, GATHER)  # fmt: skip
        if ADD:
            out += tl.load(yp, mask, 0.0).to(tl.float32)
        tl.store(yp, out.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=[
    "sequences", "channels", "rows", "blocks", "chunk", "segments", "span", "one",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "gy_b", "gy_d", "gy_i", "gy_w",
    "h_b", "h_d", "h_i", "h_w", "gx_b", "gx_d", "gx_i", "gx_w", "gg_b", "gg_n", "gg_d", "gg_i", "gg_w",
    "gc_b", "gc_d", "gc_i", "gc_w",
])  # fmt: skip
def line_scan_bwd_kernel(
    x, gates, lam, u, skip, gy, hs, gx, g_gates, g_lam, g_u, g_skip,
    exchange, sequences, channels, rows, blocks, chunk, segments, span, one,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, gy_b, gy_d, gy_i, gy_w, h_b, h_d, h_i, h_w, gx_b, gx_d, gx_i, gx_w,
    gg_b, gg_n, gg_d, gg_i, gg_w, gc_b, gc_d, gc_i, gc_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr, GATHER: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Gradients of one sweep over the lines of one segment of N maps; arguments as in the forward.

    States are recomputed and written to `hs`, from where every thread reads also those of the rows next to its own;
    KEEP, where blocks of W lines are whole chunks, has no need of that.
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    segment = tl.program_id(0) % segments
    index, b, d, i, mask, has_left, has_right = _stored_rows(sequences, channels, rows, segments, N, P, ROWS_INNER)
    place = exchange + tl.program_id(0).to(tl.int64) * (4 * (R + 2 * ROW)) + (ROW + index * one)
    above_mask, below_mask = mask & has_left[:, None], mask & has_right[:, None]
    x += (b * x_b + d * x_d + i * x_i) * W
    gates += (b * g_b + d * g_d + i * g_i) * W
    g_n = g_n.to(tl.int64)
    lam += (b * lam_b + d * lam_d + i * lam_i) * W
    u += (b * u_b + d * u_d + i * u_i) * W
    skip += (b * skip_b + d * skip_d + i * skip_i) * W
    gy += (b * gy_b + d * gy_d + i * gy_i) * W
    hs += (b * h_b + d * h_d + i * h_i) * W
    gx += (b * gx_b + d * gx_d + i * gx_i) * W
    g_gates += (b * gg_b + d * gg_d + i * gg_i) * W
    gg_n = gg_n.to(tl.int64)
    part = (b * gc_b + d * gc_d + i * gc_i) * W
    start, stop = segment * span, tl.minimum((segment + 1) * span, blocks)
    h = tl.zeros([R], tl.float32)
    if not KEEP:
        for n in range(start, stop):
            w0 = blocks - 1 - n if REVERSE else n
            gp = _block(gates, g_w, w0, W)
            xt, at = tl.load(_block(x, x_w, w0, W), mask, 0.0), tl.load(_block(lam, lam_w, w0, W), mask, 0.0)
            l, m, r = tl.load(gp, mask, 0.0), tl.load(gp + g_n * W, mask, 0.0), tl.load(gp + 2 * g_n * W, mask, 0.0)
            h, states = _stored_lines(
                xt, at, l, m, r, xt, xt, h, w0 * W, rows, blocks * W, chunk, place, index, has_left, has_right,
                R, W, ROW, REVERSE, NORMALIZE, False, False, GATHER)  # fmt: skip
            tl.store(_block(hs, h_w, w0, W), states.to(hs.dtype.element_ty), mask)
        tl.debug_barrier()
    carry = tl.zeros([R], tl.float32)
    for back in range(stop - start):
        n = stop - 1 - back
        w0 = blocks - 1 - n if REVERSE else n
        gp, gxp = _block(gates, g_w, w0, W), _block(gx, gx_w, w0, W)
        ggp, gcp = _block(g_gates, gg_w, w0, W), _block(part, gc_w, w0, W)
        # (R, W)
        xt, at = tl.load(_block(x, x_w, w0, W), mask, 0.0), tl.load(_block(lam, lam_w, w0, W), mask, 0.0)
        l, m, r = tl.load(gp, mask, 0.0), tl.load(gp + g_n * W, mask, 0.0), tl.load(gp + 2 * g_n * W, mask, 0.0)
        yt = tl.load(_block(gy, gy_w, w0, W), mask, 0.0)
        if KEEP:
            # Every block starts from zero.
            tl.debug_barrier()
            # (R, W), at each line the states of the line before
            h = tl.zeros([R], tl.float32)
            ht = tl.zeros([R, W], tl.float32)
            above, below = ht, ht
            for early in tl.static_range(W):
                ht = _put(ht, h, early, W, REVERSE)
                h, _, aj, bj = _stored_line(
                    xt, at, l, m, r, xt, xt, h, w0 * W, rows, blocks * W, chunk, place, index, has_left, has_right,
                    early, R, W, ROW, REVERSE, NORMALIZE, False, False, GATHER)  # fmt: skip
                above, below = _put(above, aj, early, W, REVERSE), _put(below, bj, early, W, REVERSE)
            tl.debug_barrier()
        else:
            hp = _block(hs, h_w, w0, W)
            # (R, W), and (R, 1) of the line before these, which a segment's first line does not have
            ht = tl.load(hp, mask, 0.0)
            above, below = tl.load(hp - h_i * W, above_mask, 0.0), tl.load(hp + h_i * W, below_mask, 0.0)
            hp = hs + h_w.to(tl.int64) * (w0 * W + (W if REVERSE else -1))
            exists = n + tl.arange(0, 1)[None, :] > start
            h0 = tl.load(hp, mask & exists, 0.0)
            above0 = tl.load(hp - h_i * W, above_mask & exists, 0.0)
            below0 = tl.load(hp + h_i * W, below_mask & exists, 0.0)
            ht = _next(ht, h0, R, W, REVERSE)
            above, below = _next(above, above0, R, W, REVERSE), _next(below, below0, R, W, REVERSE)
        ut, st = xt, xt
        if HAS_U:
            ut = tl.load(_block(u, u_w, w0, W), mask, 0.0)
        if HAS_SKIP:
            st = tl.load(_block(skip, skip_w, w0, W), mask, 0.0)
        gxt = tl.zeros([R, W], tl.float32)
        ga, gl, gm, gr, gu, gs = gxt, gxt, gxt, gxt, gxt, gxt
        for late in tl.static_range(W):
            hj = _line(ht, W - 1 - late, R, W, REVERSE)
            aj = _line(above, W - 1 - late, R, W, REVERSE)
            bj = _line(below, W - 1 - late, R, W, REVERSE)
            carry, g_x, g_a, g_l, g_m, g_r, g_v, g_s = _stored_line_gradients(
                xt, at, l, m, r, ut, st, yt, hj, aj, bj, carry, w0 * W, rows, blocks * W, chunk, place, index,
                has_left, has_right, W - 1 - late,
                R, W, ROW, REVERSE, NORMALIZE, HAS_U, HAS_SKIP, GATHER)  # fmt: skip
            gxt, ga = _put(gxt, g_x, W - 1 - late, W, REVERSE), _put(ga, g_a, W - 1 - late, W, REVERSE)
            gl, gm = _put(gl, g_l, W - 1 - late, W, REVERSE), _put(gm, g_m, W - 1 - late, W, REVERSE)
            gr, gu = _put(gr, g_r, W - 1 - late, W, REVERSE), _put(gu, g_v, W - 1 - late, W, REVERSE)
            gs = _put(gs, g_s, W - 1 - late, W, REVERSE)
        if ADD:
            gxt += tl.load(gxp, mask, 0.0).to(tl.float32)
        tl.store(gxp, gxt.to(gx.dtype.element_ty), mask)
        tl.store(g_lam + gcp, ga.to(g_lam.dtype.element_ty), mask)
        dtype: tl.constexpr = g_gates.dtype.element_ty
        tl.store(ggp, gl.to(dtype), mask)
        tl.store(ggp + gg_n * W, gm.to(dtype), mask)
        tl.store(ggp + 2 * gg_n * W, gr.to(dtype), mask)
        if HAS_U:
            tl.store(g_u + gcp, gu.to(g_u.dtype.element_ty), mask)
        if HAS_SKIP:
            tl.store(g_skip + gcp, gs.to(g_skip.dtype.element_ty), mask)


class _Sweep:
    """One sweep with stored coefficients: its maps, and launches of the kernels for them.

    Coefficients that the proxy's kernels can't expand are expanded here, for one sweep at a time.
    """

    def __init__(self, args: tuple, k: int):
        x, gates, lam, u, skip, proxy, directions, chunk, self.normalize, aligned = args
        self.direction, self.frame = directions[k], directions[k] if aligned else "right"
        self.in_place = self.direction == self.frame
        if proxy is None:
            self.gates, self.lam = gates[:, :, k], lam[:, k]
            self.u, self.skip = (None if t is None else t[:, k] for t in (u, skip))
        else:
            z = proxy.float().flatten(2)
            weights = [gates[:, k].flatten(0, 1), *(t[k] for t in (lam, u, skip) if t is not None)]
            maps = (torch.cat(weights).float() @ z).unflatten(-1, x.shape[2:]).unflatten(1, (-1, x.shape[1]))
            self.gates, self.lam = maps[:, :3], maps[:, 3]
            self.u = None if u is None else maps[:, 4]
            self.skip = None if skip is None else maps[:, -1]
            x = x.contiguous()
        self.x = x if self.in_place else to_map_frame(x, self.direction)
        self.batch, self.channels, *size = self.x.shape
        self.rows, self.lines = reversed(size) if self.frame in ("down", "up") else size
        self.chunk = chunk

    def strides(self, t: Tensor | None) -> list[int]:
        """Of a (B, ..., D, H, W): batch, channel, along the line, across."""
        if t is None:
            return [0, 0, 0, 0]
        *_, d, h, w = t.stride()
        return [t.stride(0), d, *((w, h) if self.frame in ("down", "up") else (h, w))]

    def configure(self, maps: list[Tensor | None]) -> None:
        """Chooses blocks for kernels on these maps, (B, 3, D, H, W) where the five dimensions are."""
        self.chunk = min(self.chunk or self.lines, self.lines)
        self.sequences = self.batch * self.channels
        self.P = next_power_of_2(self.rows)
        self.W, strides = self._vectors(maps, max(1, min(8, 8192 // self.P)))
        self.N = max(1, min(128 // self.P, next_power_of_2(self.sequences)))
        self.warps = max(1, min(32 if self.P > 1024 else 16, self.N * self.P // 32))
        self.rows_inner = self.x.stride(1) != 1 or self.channels == 1
        self.blocks = self.lines // self.W
        # Segments of whole chunks, no more than there are processors for.
        whole = self.chunk // math.gcd(self.chunk, self.W)
        segments = cdiv(32 * _triton_proxy.processors(self.x), max(1, self.sequences // self.N))
        self.span = min(self.blocks, cdiv(cdiv(self.blocks, segments), whole) * whole)
        self.segments = cdiv(self.blocks, self.span)
        self.programs = cdiv(self.sequences, self.N) * self.segments
        size = 4 * (self.N * self.P + 2 * (1 if self.rows_inner else self.N))
        self.exchange = self.x.new_empty(0 if _GATHER else self.programs * size, dtype=torch.float32)
        sizes = [self.sequences, self.channels, self.rows, self.blocks, self.chunk, self.segments, self.span, 1]
        self.arguments = [self.exchange, *sizes, *strides]
        self.constants = dict(
            N=self.N, P=self.P, W=self.W, ROWS_INNER=self.rows_inner, REVERSE=self.frame in ("left", "up"),
            NORMALIZE=self.normalize, HAS_U=self.u is not None, HAS_SKIP=self.skip is not None, GATHER=_GATHER,
            num_warps=self.warps,
        )  # fmt: skip

    def _pairs(self, maps: list[Tensor | None]) -> tuple[tuple[int], list[int], dict] | None:
        """Grid, numbers and constants for the kernels of chunks of two lines, or None if they don't fit."""
        if self.chunk != 2 or (self.x.stride(1) == 1 and self.channels > 1):
            return None
        V, strides = self._vectors(maps, 8)
        W = max(V, 2)
        blocks = cdiv(self.lines, W)
        T = 128
        constants = dict(
            T=T, W=W, V=V, ROWS_INNER=V == 1, REVERSE=self.frame in ("left", "up"), WHOLE=self.lines % W == 0,
            NORMALIZE=self.normalize, HAS_U=self.u is not None, HAS_SKIP=self.skip is not None, num_warps=T // 32,
        )  # fmt: skip
        sequences = self.batch * self.channels
        grid = (cdiv(sequences * self.rows * blocks, T),)
        return grid, [sequences, self.channels, self.rows, self.lines, blocks, *strides], constants

    def _vectors(self, maps: list[Tensor | None], most: int) -> tuple[int, list[int]]:
        """How many numbers of a row can be read at once, and all strides in units of that but those across lines.

        Args:
            maps: (B, D, H, W), or (B, 3, D, H, W).
            most: Limit of these numbers, a power of two.
        """
        each = [self.strides(t) for t in maps]
        across = {s[3] for t, s in zip(maps, each, strict=True) if t is not None}
        threes = [t.stride(1) for t in maps if t is not None and t.dim() == 5]
        V = math.gcd(self.lines, most, *threes, *(v for s in each for v in s[:3])) if across == {1} else 1
        flat = []
        for t, s in zip(maps, each, strict=True):
            s = [v // V for v in s[:3]] + s[3:]
            flat += s if t is None or t.dim() == 4 else [s[0], t.stride(1) // V, *s[1:]]
        return V, flat

    def forward(self, y: Tensor, add: bool) -> None:
        """Writes or adds the outputs to `y` (B, D, H, W)."""
        maps = [self.x, self.gates, self.lam, self.u, self.skip, y]
        arguments = [self.x if t is None else t for t in maps]
        if pairs := self._pairs(maps):
            grid, numbers, constants = pairs
            _triton_pairs.line_scan_pairs_fwd_kernel[grid](*arguments, *numbers, ADD=add, **constants)
            return
        self.configure(maps)
        line_scan_fwd_kernel[(self.programs,)](*arguments, *self.arguments, ADD=add, **self.constants)

    def backward(self, gy: Tensor, gx: Tensor, add: bool, outputs: list[Tensor | None]) -> None:
        """Writes or adds the gradient of `x` to `gx`, and writes those of the coefficients."""
        gx_k = gx if self.in_place else torch.empty_like(self.x, dtype=torch.float32)
        inputs = [self.x, self.gates, self.lam, self.u, self.skip, gy]
        if pairs := self._pairs([*inputs, gx_k, *outputs[:2]]):
            grid, numbers, constants = pairs
            arguments = (self.x if t is None else t for t in (*inputs, gx_k, *outputs))
            _triton_pairs.line_scan_pairs_bwd_kernel[grid](*arguments, *numbers, ADD=add and self.in_place, **constants)
        else:
            hs = torch.empty_like(gx_k, dtype=self.x.dtype)
            self.configure([*inputs, hs, gx_k, *outputs[:2]])
            arguments = (self.x if t is None else t for t in (*inputs, hs, gx_k, *outputs))
            line_scan_bwd_kernel[(self.programs,)](
                *arguments, *self.arguments, ADD=add and self.in_place, KEEP=self.W % self.chunk == 0,
                **self.constants,
            )  # fmt: skip
        if not self.in_place:
            turned = from_map_frame(gx_k, self.direction)
            gx.copy_(turned + gx if add else turned)


def forward(*args) -> Tensor:
    x, proxy, directions = args[0], args[5], args[6]
    if _triton_proxy.suits(args):
        y = _triton_proxy.forward(*args)
        # Those kernels write channels last, the operator's result lies in memory as x does.
        return y if x.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(x).copy_(y)
    y = torch.empty_like(
        x, dtype=x.dtype if len(directions) == 1 else torch.float32, memory_format=_layout_of_coefficients(proxy)
    )
    for k in range(len(directions)):
        _Sweep(args, k).forward(y, add=k > 0)
    return y.to(x.dtype) if proxy is None else torch.empty_like(x).copy_(y)


def _layout_of_coefficients(proxy: Tensor | None) -> torch.memory_format:
    """Memory format for maps beside coefficients: those expanded from a proxy are contiguous."""
    return torch.preserve_format if proxy is None else torch.contiguous_format


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    x, gates, lam, u, skip, proxy, directions = args[:7]
    if _triton_proxy.suits(args):
        return _triton_proxy.backward(grads, *args)
    g_x = torch.empty_like(
        x, dtype=x.dtype if len(directions) == 1 else torch.float32, memory_format=_layout_of_coefficients(proxy)
    )
    gy = grads[0] if proxy is None else grads[0].contiguous()
    if proxy is None:
        # The kernels have one set of strides for the gradients of lambda, u and skip.
        others = (None if t is None else torch.empty_like(lam, dtype=t.dtype) for t in (lam, u, skip))
        results = [torch.empty_like(gates), *others]
    else:
        results = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in (gates, lam, u, skip)]
        g_proxy = 0
    for k in range(len(directions)):
        sweep = _Sweep(args, k)
        if proxy is None:
            g_gates, *others = results
            sweep.backward(gy, g_x, k > 0, [g_gates[:, :, k], *(t if t is None else t[:, k] for t in others)])
            continue
        # (B, coefficients, D, H, W)
        maps = torch.empty_like(sweep.lam.unsqueeze(1).expand(-1, 4 + (u is not None) + (skip is not None), -1, -1, -1))
        g_u, g_skip = None if u is None else maps[:, 4], None if skip is None else maps[:, -1]
        sweep.backward(gy, g_x, k > 0, [maps[:, :3], maps[:, 3], g_u, g_skip])
        weights = torch.cat([gates[:, k], *(t[k, None] for t in (lam, u, skip) if t is not None)]).float()
        g_proxy = g_proxy + torch.einsum("bcdhw,cds->bshw", maps, weights)
        g_weights = torch.einsum("bcdhw,bshw->cds", maps, proxy.float())
        results[0][:, k] = g_weights[:3]
        for result, gradient in zip((r for r in results[1:] if r is not None), g_weights[3:], strict=True):
            result[k] = gradient
    return [g_x, *results, None if proxy is None else g_proxy]
