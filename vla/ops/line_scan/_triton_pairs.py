"""GPU kernels of the line scan with stored coefficients and chunks of two lines: no line waits for another."""

import triton
import triton.language as tl

from .._triton import LOG2E, kernel
from ._triton_common import _MIN_TOTAL, _exp2, _inverse


@triton.jit
def _pair(tile, T: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """First and second lines (T, W / 2) of the chunks in lines (T, W), float32. A thread holds both."""
    even, odd = tl.split(tl.reshape(tile, [T, W // 2, 2]))
    if REVERSE:
        return odd.to(tl.float32), even.to(tl.float32)
    else:
        return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def _unpair(first, second, T: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """The inverse of `_pair`."""
    if REVERSE:
        return tl.reshape(tl.join(second, first), [T, W])
    else:
        return tl.reshape(tl.join(first, second), [T, W])


@triton.jit
def _first(x, lam, mask, T: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """States of the first lines."""
    xf, _ = _pair(tl.load(x, mask, 0.0), T, W, REVERSE)
    af, _ = _pair(tl.load(lam, mask, 0.0), T, W, REVERSE)
    return af * xf


@triton.jit
def _open(
    gates, g_n, mask, has_left, has_right,
    T: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gates of the second lines, their sigmoids, and whether the sum of these was too small."""
    _, l = _pair(tl.load(gates, mask, 0.0), T, W, REVERSE)
    _, m = _pair(tl.load(gates + g_n, mask, 0.0), T, W, REVERSE)
    _, r = _pair(tl.load(gates + 2 * g_n, mask, 0.0), T, W, REVERSE)
    al, am, ar, clamped = l, m, r, False
    if NORMALIZE:
        al = tl.where(has_left, _inverse(1 + _exp2(l * -LOG2E)), 0.0)
        am = _inverse(1 + _exp2(m * -LOG2E))
        ar = tl.where(has_right, _inverse(1 + _exp2(r * -LOG2E)), 0.0)
        total = al + am + ar
        clamped = total < _MIN_TOTAL
        share = _inverse(tl.maximum(total, _MIN_TOTAL))
        l, m, r = al * share, am * share, ar * share
    return l, m, r, al, am, ar, clamped


@triton.jit
def _pixels(
    channels, rows, lines, blocks, sequences, T: tl.constexpr, W: tl.constexpr,
    ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Picture, channel and row (T, 1), lines (1 or T, W) of a program's pixels, and which exist."""
    # Programs share maps: only scalars need 64 bits.
    size = rows * blocks
    start = tl.program_id(0).to(tl.int64) * T
    n = (start % size).to(tl.int32) + tl.arange(0, T)
    q = start // size + n // size
    n = n % size
    if ROWS_INNER:
        i, j = n % rows, n // rows
    else:
        i, j = n // blocks, n % blocks
    w = (j * W)[:, None] + tl.arange(0, W)[None, :]
    mask = (q < sequences)[:, None]
    if not WHOLE:
        if REVERSE:
            # Chunks are counted from the last line: of an odd number of lines, the first is half a chunk.
            w -= lines % W
        mask = mask & (w >= 0) & (w < lines)
    return (q // channels)[:, None], (q % channels)[:, None], i[:, None], w, mask


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "lines", "blocks",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "y_b", "y_d", "y_i", "y_w",
])  # fmt: skip
def line_scan_pairs_fwd_kernel(
    x, gates, lam, u, skip, y, sequences, channels, rows, lines, blocks,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, y_b, y_d, y_i, y_w,
    T: tl.constexpr, W: tl.constexpr, V: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr,
    WHOLE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of T rows of W lines.

    Strides, but those across lines (`_w`), are in units of V, so that the compiler sees how many numbers can be read at
    once. First lines of the rows next to a thread's own are computed again.
    """
    b, d, i, w, mask = _pixels(channels, rows, lines, blocks, sequences, T, W, ROWS_INNER, REVERSE, WHOLE)
    x += _at(b, d, i, w, x_b, x_d, x_i, x_w, V)
    lam += _at(b, d, i, w, lam_b, lam_d, lam_i, lam_w, V)
    above, below = mask & (i > 0), mask & (i < rows - 1)
    xf, xs = _pair(tl.load(x, mask, 0.0), T, W, REVERSE)
    af, ls = _pair(tl.load(lam, mask, 0.0), T, W, REVERSE)
    hf = af * xf
    h_above = _first(x - x_i * V, lam - lam_i * V, above, T, W, REVERSE)
    h_below = _first(x + x_i * V, lam + lam_i * V, below, T, W, REVERSE)
    l, m, r, _, _, _, _ = _open(
        gates + _at(b, d, i, w, g_b, g_d, g_i, g_w, V), g_n * V, mask, (i > 0) | (rows == 1), i < rows - 1,
        T, W, REVERSE, NORMALIZE)  # fmt: skip
    hs = ls * xs + l * h_above + m * hf + r * h_below
    if HAS_U:
        uf, us = _pair(tl.load(u + _at(b, d, i, w, u_b, u_d, u_i, u_w, V), mask, 0.0), T, W, REVERSE)
        hf *= uf
        hs *= us
    if HAS_SKIP:
        sf, ss = _pair(tl.load(skip + _at(b, d, i, w, skip_b, skip_d, skip_i, skip_w, V), mask, 0.0), T, W, REVERSE)
        hf += sf * xf
        hs += ss * xs
    out = _unpair(hf, hs, T, W, REVERSE)
    y += _at(b, d, i, w, y_b, y_d, y_i, y_w, V)
    if ADD:
        out += tl.load(y, mask, 0.0).to(tl.float32)
    tl.store(y, out.to(y.dtype.element_ty), mask)


@triton.jit
def _at(b, d, i, w, s_b, s_d, s_i, s_w, V: tl.constexpr):
    """Offsets (T, W) of pixels; lines are next to each other if V is not 1."""
    if V == 1:
        return b * s_b + d * s_d + i * s_i.to(tl.int64) + w * s_w.to(tl.int64)
    else:
        return (b * s_b + d * s_d + i * s_i.to(tl.int64)) * V + w


@triton.jit
def _second_gradient(gy, u, mask, T: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr, HAS_U: tl.constexpr):
    """Gradients of the states of the second lines."""
    _, g = _pair(tl.load(gy, mask, 0.0), T, W, REVERSE)
    if HAS_U:
        _, us = _pair(tl.load(u, mask, 0.0), T, W, REVERSE)
        g *= us
    return g


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "lines", "blocks",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "gy_b", "gy_d", "gy_i", "gy_w",
    "gx_b", "gx_d", "gx_i", "gx_w", "gg_b", "gg_n", "gg_d", "gg_i", "gg_w", "gc_b", "gc_d", "gc_i", "gc_w",
])  # fmt: skip
def line_scan_pairs_bwd_kernel(
    x, gates, lam, u, skip, gy, gx, g_gates, g_lam, g_u, g_skip, sequences, channels, rows, lines, blocks,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, gy_b, gy_d, gy_i, gy_w, gx_b, gx_d, gx_i, gx_w,
    gg_b, gg_n, gg_d, gg_i, gg_w, gc_b, gc_d, gc_i, gc_w,
    T: tl.constexpr, W: tl.constexpr, V: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr,
    WHOLE: tl.constexpr, NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of T rows of W lines; arguments as in the forward.

    Gates of the rows next to a thread's own are computed again.
    """
    b, d, i, w, mask = _pixels(channels, rows, lines, blocks, sequences, T, W, ROWS_INNER, REVERSE, WHOLE)
    x += _at(b, d, i, w, x_b, x_d, x_i, x_w, V)
    lam += _at(b, d, i, w, lam_b, lam_d, lam_i, lam_w, V)
    gates += _at(b, d, i, w, g_b, g_d, g_i, g_w, V)
    gy += _at(b, d, i, w, gy_b, gy_d, gy_i, gy_w, V)
    u += _at(b, d, i, w, u_b, u_d, u_i, u_w, V)
    gx += _at(b, d, i, w, gx_b, gx_d, gx_i, gx_w, V)
    g_gates += _at(b, d, i, w, gg_b, gg_d, gg_i, gg_w, V)
    part = _at(b, d, i, w, gc_b, gc_d, gc_i, gc_w, V)
    g_n = g_n.to(tl.int64) * V
    gg_n = gg_n.to(tl.int64) * V
    dtype: tl.constexpr = g_gates.dtype.element_ty
    above, below = mask & (i > 0), mask & (i < rows - 1)
    # From the second lines of the rows below, which have a row above, and of those above.
    l, _, _, _, _, _, _ = _open(
        gates + g_i * V, g_n, below, i >= 0, i < rows - 2, T, W, REVERSE, NORMALIZE)  # fmt: skip
    g = l * _second_gradient(gy + gy_i * V, u + u_i * V, below, T, W, REVERSE, HAS_U)
    _, _, r, _, _, _, _ = _open(
        gates - g_i * V, g_n, above, i > 1, i >= 0, T, W, REVERSE, NORMALIZE)  # fmt: skip
    g += r * _second_gradient(gy - gy_i * V, u - u_i * V, above, T, W, REVERSE, HAS_U)

    l, m, r, al, am, ar, clamped = _open(
        gates, g_n, mask, (i > 0) | (rows == 1), i < rows - 1, T, W, REVERSE, NORMALIZE)  # fmt: skip
    xf, xs = _pair(tl.load(x, mask, 0.0), T, W, REVERSE)
    af, ls = _pair(tl.load(lam, mask, 0.0), T, W, REVERSE)
    yf, ys = _pair(tl.load(gy, mask, 0.0), T, W, REVERSE)
    gf, gs = yf, ys
    if HAS_U:
        uf, us = _pair(tl.load(u, mask, 0.0), T, W, REVERSE)
        gf *= uf
        gs *= us
    gf += m * gs + g
    gxf, gxs = gf * af, gs * ls
    if HAS_SKIP:
        sf, ss = _pair(tl.load(skip + _at(b, d, i, w, skip_b, skip_d, skip_i, skip_w, V), mask, 0.0), T, W, REVERSE)
        gxf += yf * sf
        gxs += ys * ss
        tl.store(g_skip + part, _unpair(yf * xf, ys * xs, T, W, REVERSE).to(g_skip.dtype.element_ty), mask)
    out = _unpair(gxf, gxs, T, W, REVERSE)
    if ADD:
        out += tl.load(gx, mask, 0.0).to(tl.float32)
    tl.store(gx, out.to(gx.dtype.element_ty), mask)
    tl.store(g_lam + part, _unpair(gf * xf, gs * xs, T, W, REVERSE).to(g_lam.dtype.element_ty), mask)
    hf = af * xf
    h_above = _first(x - x_i * V, lam - lam_i * V, above, T, W, REVERSE)
    h_below = _first(x + x_i * V, lam + lam_i * V, below, T, W, REVERSE)
    mixed = l * h_above + m * hf + r * h_below
    if HAS_U:
        tl.store(g_u + part, _unpair(yf * hf, ys * (ls * xs + mixed), T, W, REVERSE).to(g_u.dtype.element_ty), mask)
    if NORMALIZE:
        mixed = tl.where(clamped, 0.0, mixed)
        gl = gs * l * (1 - al) * (h_above - mixed)
        gm = gs * m * (1 - am) * (hf - mixed)
        gr = gs * r * (1 - ar) * (h_below - mixed)
    else:
        gl, gm, gr = gs * h_above, gs * hf, gs * h_below
    none = tl.zeros([T, W // 2], tl.float32)
    tl.store(g_gates, _unpair(none, gl, T, W, REVERSE).to(dtype), mask)
    tl.store(g_gates + gg_n, _unpair(none, gm, T, W, REVERSE).to(dtype), mask)
    tl.store(g_gates + 2 * gg_n, _unpair(none, gr, T, W, REVERSE).to(dtype), mask)
