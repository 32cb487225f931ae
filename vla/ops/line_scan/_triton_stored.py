"""GPU kernels of the line scan with stored coefficients: long chunks, one row of the line a thread."""

import triton
import triton.language as tl

from .._triton import LOG2E, kernel
from ._triton_proxy import _MIN_TOTAL, _STEEPEST, _exp2, _inverse

# A sum of sigmoids that only clamped logits have.
_NO_TOTAL = tl.constexpr(8e-13)


@triton.jit
def _open_gates(l, m, r, has_left, has_right):
    """Gates over their common factor, that factor, whether their sum was too small, and what their derivatives need.

    With `e = exp(-logit)` and `b = 1 + e`, the sigmoids' ratio `1/bl : 1/bm : 1/br` is `bm br : bl br : bl bm`, so that
    one division is enough.
    """
    el, em, er = (
        _exp2(tl.minimum(l * -LOG2E, _STEEPEST)),
        _exp2(tl.minimum(m * -LOG2E, _STEEPEST)),
        _exp2(tl.minimum(r * -LOG2E, _STEEPEST)),
    )
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
def _halve(tiles, R: tl.constexpr, W: tl.constexpr, n: tl.constexpr):
    """The halves (R, W / 2) of `n` tiles (R, W)."""
    halves = ()
    for k in tl.static_range(n):
        first, second = tl.split(tl.permute(tl.reshape(tiles[k], [R, 2, W // 2]), [0, 2, 1]))
        halves = halves + (first, second)
    return halves


@triton.jit
def _unstack(tile, R: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """Lines (R,) of a tile (R, W), in the sweep's order. A thread holds all lines of its rows: nothing moves."""
    lines = (tile,)
    if W >= 2:
        lines = _halve(lines, R, W, 1)
    if W >= 4:
        lines = _halve(lines, R, W // 2, 2)
    if W >= 8:
        lines = _halve(lines, R, W // 4, 4)
    if W >= 16:
        lines = _halve(lines, R, W // 8, 8)
    ordered = ()
    for j in tl.static_range(W):
        ordered = ordered + (tl.reshape(lines[W - 1 - j if REVERSE else j], [R]),)
    return ordered


@triton.jit
def _pair(tiles, R: tl.constexpr, W: tl.constexpr, n: tl.constexpr):
    """The inverse of `_halve`: `n` tiles (R, 2 W)."""
    wholes = ()
    for k in tl.static_range(n):
        both = tl.permute(tl.join(tiles[2 * k], tiles[2 * k + 1]), [0, 2, 1])
        wholes = wholes + (tl.reshape(both, [R, 2 * W]),)
    return wholes


@triton.jit
def _stack(lines, R: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """The inverse of `_unstack`."""
    tiles = ()
    for j in tl.static_range(W):
        tiles = tiles + (tl.reshape(lines[W - 1 - j if REVERSE else j], [R, 1]),)
    if W >= 2:
        tiles = _pair(tiles, R, 1, W // 2)
    if W >= 4:
        tiles = _pair(tiles, R, 2, W // 4)
    if W >= 8:
        tiles = _pair(tiles, R, 4, W // 8)
    if W >= 16:
        tiles = _pair(tiles, R, 8, W // 16)
    return tiles[0]


@triton.jit
def _around(down, up, index, has_left, has_right, R: tl.constexpr, ROW: tl.constexpr):
    """`down[i - 1]` and `up[i + 1]` of lines (R,), 0 outside the map, in one exchange between threads."""
    source = tl.join(2 * tl.maximum(index - ROW, 0), 2 * tl.minimum(index + ROW, R - 1) + 1)
    both = tl.gather(tl.reshape(tl.join(down, up), [2 * R]), tl.reshape(source, [2 * R]), 0)
    above, below = tl.split(tl.reshape(both, [R, 2]))
    return tl.where(has_left, above, 0.0), tl.where(has_right, below, 0.0)


@triton.jit
def _fresh(j: tl.constexpr, phase, chunk, W: tl.constexpr, SHORT: tl.constexpr):
    """Whether line `j` of a block, whose first is line `phase` of its chunk, is the first of a chunk."""
    if SHORT:
        return (phase + j) % chunk == 0
    elif j == 0:
        return phase == 0
    else:
        return phase + j == chunk


@triton.jit
def _rows(
    sequences, channels, rows, segments, halo,
    N: tl.constexpr, P: tl.constexpr, ROWS_INNER: tl.constexpr,
):  # fmt: skip
    """Of a program's N * P rows: index and sequence (R,), picture, channel and row (R, 1), which exist and are own."""
    bands = tl.cdiv(rows, P - 2 * halo)
    n = tl.program_id(0) // segments
    index = tl.arange(0, N * P)
    if ROWS_INNER:
        p, q = index % P, n // bands * N + index // P
    else:
        p, q = index // N, n // bands * N + index % N
    i = n % bands * (P - 2 * halo) - halo + p
    mask = (i >= 0) & (i < rows) & (q < sequences)
    own = mask & (p >= halo) & (p < P - halo)
    b, d = (q // channels).to(tl.int64)[:, None], (q % channels).to(tl.int64)[:, None]
    return index, q, b, d, i.to(tl.int64)[:, None], mask[:, None], own[:, None], i > 0, i < rows - 1


@triton.jit
def _lines(n, units, V: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """Lines (1, W) of block `n` of a sweep over `units` times V lines."""
    first = units * V - (n + 1) * W if REVERSE else n * W
    return first + tl.arange(0, W)[None, :]


@triton.jit
def _at(w, stride, V: tl.constexpr):
    """Offsets of lines, which are next to each other if V is not 1."""
    if V == 1:
        return w * stride.to(tl.int64)
    else:
        return w


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "units", "chunk", "first", "last", "segments", "span", "halo",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "y_b", "y_d", "y_i", "y_w",
])  # fmt: skip
def line_scan_fwd_kernel(
    x, gates, lam, u, skip, y, before, after,
    sequences, channels, rows, units, chunk, first, last, segments, span, halo,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, y_b, y_d, y_i, y_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr,
    ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr, SHORT: tl.constexpr, BANDS: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Outputs of one sweep, or if STATES the states before every line, for blocks `first` to `last` of W lines.

    A program has one segment of the blocks and P rows of N maps (a picture's channel each). Strides (but those across
    lines, `_w`) and the number of lines are in units of V, so that the compiler sees how many numbers can be read at
    once. Blocks are WHOLE if they are inside the map. If BANDS, P rows are a band of the map's and overlap `halo` rows
    of the next at each end, which every line spoils one row more of; states then come from `before` and go to `after`,
    (sequences, rows).
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    segment = tl.program_id(0) % segments
    index, q, b, d, i, row_mask, own, has_left, has_right = _rows(
        sequences, channels, rows, segments, halo, N, P, ROWS_INNER
    )
    x += (b * x_b + d * x_d + i * x_i) * V
    gates += (b * g_b + d * g_d + i * g_i) * V
    g_n = g_n.to(tl.int64) * V
    lam += (b * lam_b + d * lam_d + i * lam_i) * V
    u += (b * u_b + d * u_d + i * u_i) * V
    skip += (b * skip_b + d * skip_d + i * skip_i) * V
    y += (b * y_b + d * y_d + i * y_i) * V
    h = tl.zeros([R], tl.float32)
    start = first + segment * span
    if BANDS:
        line = q.to(tl.int64) * rows + tl.reshape(i, [R])
        h = tl.load(before + line, tl.reshape(row_mask, [R]) & (start > 0), 0.0)
    for n in range(start, tl.minimum(start + span, last)):
        # (R, W)
        w = _lines(n, units, V, W, REVERSE)
        mask = row_mask if WHOLE else row_mask & (w >= 0) & (w < units * V)
        gp = gates + _at(w, g_w, V)
        xs = _unstack(tl.load(x + _at(w, x_w, V), mask, 0.0), R, W, REVERSE)
        lams = _unstack(tl.load(lam + _at(w, lam_w, V), mask, 0.0), R, W, REVERSE)
        ls = _unstack(tl.load(gp, mask, 0.0), R, W, REVERSE)
        ms = _unstack(tl.load(gp + g_n, mask, 0.0), R, W, REVERSE)
        rs = _unstack(tl.load(gp + 2 * g_n, mask, 0.0), R, W, REVERSE)
        us, skips = xs, xs
        if HAS_U:
            us = _unstack(tl.load(u + _at(w, u_w, V), mask, 0.0), R, W, REVERSE)
        if HAS_SKIP:
            skips = _unstack(tl.load(skip + _at(w, skip_w, V), mask, 0.0), R, W, REVERSE)
        phase = n * W % chunk
        outs = ()
        for j in tl.static_range(W):
            if STATES:
                outs = outs + (h.to(y.dtype.element_ty),)
            l, m, r = ls[j].to(tl.float32), ms[j].to(tl.float32), rs[j].to(tl.float32)
            above, below = _around(h, h, index, has_left, has_right, R, ROW)
            if NORMALIZE:
                l, m, r, share, _, _, _, _, _ = _open_gates(l, m, r, has_left | (rows == 1), has_right)
                mixed = (l * above + m * h + r * below) * share
            else:
                mixed = l * above + m * h + r * below
            xj = xs[j].to(tl.float32)
            h = lams[j].to(tl.float32) * xj + tl.where(_fresh(j, phase, chunk, W, SHORT), 0.0, mixed)
            if not STATES:
                out = h
                if HAS_U:
                    out *= us[j].to(tl.float32)
                if HAS_SKIP:
                    out += skips[j].to(tl.float32) * xj
                outs = outs + (out.to(tl.float32 if ADD else y.dtype.element_ty),)
        out = _stack(outs, R, W, REVERSE)
        yp = y + _at(w, y_w, V)
        own_mask = mask & own
        if ADD:
            out += tl.load(yp, own_mask, 0.0).to(tl.float32)
        tl.store(yp, out.to(y.dtype.element_ty), own_mask)
    if BANDS:
        tl.store(after + line, h, tl.reshape(own, [R]))


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "units", "chunk", "first", "last", "segments", "span", "halo",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "gy_b", "gy_d", "gy_i", "gy_w",
    "h_b", "h_d", "h_i", "h_w", "gx_b", "gx_d", "gx_i", "gx_w", "gg_b", "gg_n", "gg_d", "gg_i", "gg_w",
    "gc_b", "gc_d", "gc_i", "gc_w",
])  # fmt: skip
def line_scan_bwd_kernel(
    x, gates, lam, u, skip, gy, hs, gx, g_gates, g_lam, g_u, g_skip, before, after,
    sequences, channels, rows, units, chunk, first, last, segments, span, halo,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, gy_b, gy_d, gy_i, gy_w, h_b, h_d, h_i, h_w, gx_b, gx_d, gx_i, gx_w,
    gg_b, gg_n, gg_d, gg_i, gg_w, gc_b, gc_d, gc_i, gc_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr,
    ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr, SHORT: tl.constexpr, BANDS: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of one sweep, from block `last` back to `first`; arguments as in the forward.

    `hs` are the states before every line. What passes between launches is the gradient of the last block's states.
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    segment = tl.program_id(0) % segments
    index, q, b, d, i, row_mask, own, has_left, has_right = _rows(
        sequences, channels, rows, segments, halo, N, P, ROWS_INNER
    )
    x += (b * x_b + d * x_d + i * x_i) * V
    gates += (b * g_b + d * g_d + i * g_i) * V
    g_n = g_n.to(tl.int64) * V
    lam += (b * lam_b + d * lam_d + i * lam_i) * V
    u += (b * u_b + d * u_d + i * u_i) * V
    skip += (b * skip_b + d * skip_d + i * skip_i) * V
    gy += (b * gy_b + d * gy_d + i * gy_i) * V
    hs += (b * h_b + d * h_d + i * h_i) * V
    gx += (b * gx_b + d * gx_d + i * gx_i) * V
    g_gates += (b * gg_b + d * gg_d + i * gg_i) * V
    gg_n = gg_n.to(tl.int64) * V
    part = (b * gc_b + d * gc_d + i * gc_i) * V
    h_i = h_i.to(tl.int64) * V
    dtype: tl.constexpr = g_gates.dtype.element_ty
    start = first + segment * span
    stop = tl.minimum(start + span, last)
    carry = tl.zeros([R], tl.float32)
    if BANDS:
        line = q.to(tl.int64) * rows + tl.reshape(i, [R])
        carry = tl.load(before + line, tl.reshape(row_mask, [R]) & (stop * W < units * V), 0.0)
    for back in range(stop - start):
        n = stop - 1 - back
        # (R, W)
        w = _lines(n, units, V, W, REVERSE)
        mask = row_mask if WHOLE else row_mask & (w >= 0) & (w < units * V)
        gp = gates + _at(w, g_w, V)
        hp = hs + _at(w, h_w, V)
        xs = _unstack(tl.load(x + _at(w, x_w, V), mask, 0.0), R, W, REVERSE)
        lams = _unstack(tl.load(lam + _at(w, lam_w, V), mask, 0.0), R, W, REVERSE)
        ls = _unstack(tl.load(gp, mask, 0.0), R, W, REVERSE)
        ms = _unstack(tl.load(gp + g_n, mask, 0.0), R, W, REVERSE)
        rs = _unstack(tl.load(gp + 2 * g_n, mask, 0.0), R, W, REVERSE)
        gys = _unstack(tl.load(gy + _at(w, gy_w, V), mask, 0.0), R, W, REVERSE)
        states = _unstack(tl.load(hp, mask, 0.0), R, W, REVERSE)
        aboves = _unstack(tl.load(hp - h_i, mask & has_left[:, None], 0.0), R, W, REVERSE)
        belows = _unstack(tl.load(hp + h_i, mask & has_right[:, None], 0.0), R, W, REVERSE)
        us, skips = xs, xs
        if HAS_U:
            us = _unstack(tl.load(u + _at(w, u_w, V), mask, 0.0), R, W, REVERSE)
        if HAS_SKIP:
            skips = _unstack(tl.load(skip + _at(w, skip_w, V), mask, 0.0), R, W, REVERSE)
        phase = n * W % chunk
        # Lines from the last to the first
        g_xs, g_lams, g_ls, g_ms, g_rs, g_us, g_skips = (), (), (), (), (), (), ()
        for j in tl.static_range(W - 1, -1, -1):
            xj, lamj, gyj = xs[j].to(tl.float32), lams[j].to(tl.float32), gys[j].to(tl.float32)
            h, above, below = states[j].to(tl.float32), aboves[j].to(tl.float32), belows[j].to(tl.float32)
            l, m, r = ls[j].to(tl.float32), ms[j].to(tl.float32), rs[j].to(tl.float32)
            g = gyj + carry
            if HAS_U:
                g = gyj * us[j].to(tl.float32) + carry
            g_x = g * lamj
            if HAS_SKIP:
                g_x += gyj * skips[j].to(tl.float32)
            fresh = _fresh(j, phase, chunk, W, SHORT)
            handed = tl.where(fresh, 0.0, g)
            if NORMALIZE:
                nl, nm, nr, share, clamped, product, el, em, er = _open_gates(
                    l, m, r, has_left | (rows == 1), has_right
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
            from_above, from_below = _around(r, l, index, has_left, has_right, R, ROW)
            carry = m + from_above + from_below
            g_xs = g_xs + (g_x.to(tl.float32 if ADD else gx.dtype.element_ty),)
            g_lams = g_lams + ((g * xj).to(g_lam.dtype.element_ty),)
            g_ls, g_ms, g_rs = g_ls + (g_l.to(dtype),), g_ms + (g_m.to(dtype),), g_rs + (g_r.to(dtype),)
            if HAS_U:
                value = lamj * xj + tl.where(fresh, 0.0, mixed)
                g_us = g_us + ((gyj * value).to(g_u.dtype.element_ty),)
            if HAS_SKIP:
                g_skips = g_skips + ((gyj * xj).to(g_skip.dtype.element_ty),)
        own_mask = mask & own
        gxp = gx + _at(w, gx_w, V)
        gcp = part + _at(w, gc_w, V)
        ggp = g_gates + _at(w, gg_w, V)
        out = _stack(g_xs, R, W, not REVERSE)
        if ADD:
            out += tl.load(gxp, own_mask, 0.0).to(tl.float32)
        tl.store(gxp, out.to(gx.dtype.element_ty), own_mask)
        tl.store(g_lam + gcp, _stack(g_lams, R, W, not REVERSE), own_mask)
        tl.store(ggp, _stack(g_ls, R, W, not REVERSE), own_mask)
        tl.store(ggp + gg_n, _stack(g_ms, R, W, not REVERSE), own_mask)
        tl.store(ggp + 2 * gg_n, _stack(g_rs, R, W, not REVERSE), own_mask)
        if HAS_U:
            tl.store(g_u + gcp, _stack(g_us, R, W, not REVERSE), own_mask)
        if HAS_SKIP:
            tl.store(g_skip + gcp, _stack(g_skips, R, W, not REVERSE), own_mask)
    if BANDS:
        tl.store(after + line, carry, tl.reshape(own, [R]))
