"""GPU kernels of the line scan: one for coefficients of a proxy, one for stored coefficients."""

import math
import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LN2, LOG2E
from .frames import from_map_frame, to_map_frame

# Logits are multiplied by -log2(e) and clamped where a sigmoid is 2.4e-13, so that products of three stay finite.
_STEEPEST = tl.constexpr(41.9)
# The least sum of sigmoids that divides them, and a sum that only clamped logits have.
_MIN_TOTAL = tl.constexpr(1e-7)
_NO_TOTAL = tl.constexpr(8e-13)


_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Without Triton's care for denormal numbers, which do not occur here: a third of the gates' instructions.
_FTZ = tl.constexpr(torch.version.cuda is not None and not _INTERPRETED.value)


@triton.jit
def _dot(a, b):
    if _INTERPRETED:
        # Triton's interpreter multiplies the bits of bfloat16.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, acc):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def _exp2(x):
    if _FTZ:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def _inverse(x):
    if _FTZ:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1 / x


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
    clamped = total < _MIN_TOTAL * product
    share = _inverse(tl.maximum(total, _MIN_TOTAL * product))
    share = tl.where(total > _NO_TOTAL * product, share, 0.0)
    return nl, nm, nr, share, clamped, product, el, em, er


@triton.jit
def _halves(h):
    """A float32 tile as the sum of two bfloat16 tiles, good to 16 bits."""
    high = (h.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (h - high).to(tl.bfloat16)


@triton.jit
def _shifts(p, dtype: tl.constexpr):
    """Matrices (P, P) that hand every row of a tile to the next, and to the one before."""
    before = (p[:, None] == p[None, :] + 1).to(tl.float32).to(dtype)
    after = (p[:, None] + 1 == p[None, :]).to(tl.float32).to(dtype)
    return before, after


@triton.jit
def _neighbours(h, before, after, EXACT: tl.constexpr):
    """`h[i - 1]` and `h[i + 1]` of a tile (P, C): rows move by products with shift matrices."""
    if EXACT:
        return _dot(before, h), _dot(after, h)
    else:
        high, low = _halves(h)
        return _dot_add(before, low, _dot(before, high)), _dot_add(after, low, _dot(after, high))


@triton.jit
def _pick(k, v0, v1, v2, v3):
    """The k-th of four numbers, with 64 bits."""
    return tl.where(k == 0, v0, tl.where(k == 1, v1, tl.where(k == 2, v2, v3))).to(tl.int64)


@triton.jit
def _first_pixels(x, k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first, channels):
    """Pointers to the line `first` of sweep `k`."""
    row, across = _pick(k, i0, i1, i2, i3), _pick(k, t0, t1, t2, t3)
    return x + (_pick(k, o0, o1, o2, o3) + first * across + i[:, None] * row) * channels


@triton.jit
def _coefficient(z, w, j, w_j):
    """Tile (P, C) of coefficient `j`: proxy (P, R) times weights (R, C)."""
    return _dot(z, tl.load(w + j * w_j))


@triton.jit
def _proxy_line(z, x, h, y, w, w_j, before, after, has_left, has_right, FRESH: tl.constexpr, EXACT: tl.constexpr):
    """States of one line of one sweep from those of the line before, and its outputs added to `y`."""
    value = _coefficient(z, w, 3, w_j) * x
    if not FRESH:
        l, m, r = _coefficient(z, w, 0, w_j), _coefficient(z, w, 1, w_j), _coefficient(z, w, 2, w_j)
        nl, nm, nr, share, _, _, _, _, _ = _open_gates(l, m, r, has_left, has_right)
        above, below = _neighbours(h, before, after, EXACT)
        value += (nl * above + nm * h + nr * below) * share
    y += _coefficient(z, w, 4, w_j) * value
    y += _coefficient(z, w, 5, w_j) * x
    return value, y


@triton.jit(do_not_specialize=[
    "rows", "lines", "chunk", "tiles", "segments", "halo", "sweeps",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_fwd_kernel(
    x, z, w, y, scratch, channels, pixels, rows, lines, chunk, tiles, segments, halo, w_width, sweeps,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of up to four sweeps on one block of C channels, P rows of the line, and the lines of one chunk.

    Maps are channels-last: x, y (B, pixels, channels), z (B, pixels, S). Pixel (row i, line t) of a sweep is read at
    `o + i * i_k + t * t_k` and written at `to + i * ti + t * tt`.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    unit = tl.program_id(0) // blocks
    tile = unit % tiles
    segment = unit // tiles % segments
    b = (unit // (tiles * segments)).to(tl.int64)

    p = tl.arange(0, P)
    before, after = _shifts(p, low)
    i = tile * (P - 2 * halo) - halo + p
    inside = (i >= 0) & (i < rows)
    own = inside & (p >= halo) & (p < P - halo)
    has_left = ((i > 0) | (rows == 1))[:, None]
    has_right = (i < rows - 1)[:, None]
    c = block * C + tl.arange(0, C)
    s = tl.arange(0, R)
    mask = inside[:, None] & (c < channels)[None, :]
    own_mask = own[:, None] & (c < channels)[None, :]
    z_mask = inside[:, None] & (s % HALF < S)[None, :]

    first = (segment * chunk).to(tl.int64)
    tt = tt.to(tl.int64)
    steps = tl.minimum(chunk, lines - segment * chunk)
    target = (b * pixels + to + i * ti + first * tt)[:, None]
    # (P, R): with half precision each number twice, for the two halves of a weight
    z_ptr = z + target * S + (s % HALF)[None, :]
    y_ptr = y + target * channels + c[None, :]
    # w (sweeps, 6, R, w_width)
    w_j = R * w_width
    w += s[:, None] * w_width + c[None, :]
    x += b * pixels * channels + c[None, :]
    scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C) + p[:, None] * C + tl.arange(0, C)[None, :]
    more = tl.arange(0, 1)[None, :] + 1 < steps
    z0 = tl.load(z_ptr, z_mask, 0.0)
    y0 = tl.zeros([P, C], tl.float32)
    y1 = y0
    z1 = z0
    if KEEP:
        z1 = tl.load(z_ptr + tt * S, z_mask & more, 0.0)
    # Maps are read one sweep ahead, and in long chunks one line.
    x_ptr = _first_pixels(x, 0, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first, channels)
    x0 = tl.load(x_ptr, mask, 0.0)
    x1 = x0
    if KEEP:
        x1 = tl.load(x_ptr + t0.to(tl.int64) * channels, mask & more, 0.0)
    for k in range(sweeps):
        w_k = w + k * 6 * w_j
        if KEEP:
            xa, xb = x0.to(tl.float32), x1.to(tl.float32)
            k_next = tl.minimum(k + 1, sweeps - 1)
            x_ptr = _first_pixels(x, k_next, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first, channels)
            x0 = tl.load(x_ptr, mask, 0.0)
            x1 = tl.load(x_ptr + _pick(k_next, t0, t1, t2, t3) * channels, mask & more, 0.0)
            h, y0 = _proxy_line(z0, xa, y0, y0, w_k, w_j, before, after, has_left, has_right, True, EXACT)
            h, y1 = _proxy_line(z1, xb, h, y1, w_k, w_j, before, after, has_left, has_right, False, EXACT)
        else:
            across = _pick(k, t0, t1, t2, t3) * channels
            x_ptr = _first_pixels(x, k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first, channels)
            xt = tl.load(x_ptr, mask, 0.0).to(tl.float32)
            t_next = tl.minimum(1, steps - 1)
            zn, xn = tl.load(z_ptr + t_next * tt * S, z_mask, 0.0), tl.load(x_ptr + t_next * across, mask, 0.0)
            out = y0
            if k > 0:
                out = tl.load(scratch)
            h, out = _proxy_line(z0, xt, y0, out, w_k, w_j, before, after, has_left, has_right, True, EXACT)
            tl.store(scratch, out)
            for t in range(1, steps):
                zt, xt = zn, xn.to(tl.float32)
                t_next = tl.minimum(t + 1, steps - 1)
                zn, xn = tl.load(z_ptr + t_next * tt * S, z_mask, 0.0), tl.load(x_ptr + t_next * across, mask, 0.0)
                out = y0
                if k > 0:
                    out = tl.load(scratch + t * (P * C))
                h, out = _proxy_line(zt, xt, h, out, w_k, w_j, before, after, has_left, has_right, False, EXACT)
                if k < sweeps - 1:
                    tl.store(scratch + t * (P * C), out)
                else:
                    if ADD:
                        out += tl.load(y_ptr + t * tt * channels, own_mask, 0.0).to(tl.float32)
                    tl.store(y_ptr + t * tt * channels, out.to(y.dtype.element_ty), own_mask)
    if not KEEP:
        y0 = tl.load(scratch)
    if ADD:
        y0 += tl.load(y_ptr, own_mask, 0.0).to(tl.float32)
    tl.store(y_ptr, y0.to(y.dtype.element_ty), own_mask)
    if KEEP:
        y_ptr += tt * channels
        own_mask = own_mask & more
        if ADD:
            y1 += tl.load(y_ptr, own_mask, 0.0).to(tl.float32)
        tl.store(y_ptr, y1.to(y.dtype.element_ty), own_mask)


@triton.jit
def _proxy_line_gradients(
    z, x, gy, h, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right,
    FRESH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of one line: of its coefficients, of `x`, and what goes to the states of the line before.

    `h` are the states of the line before. Gradients of logits are those of the logits times -log2(e).
    """
    lam = _dot(z, w3)
    g = gy * _dot(z, w4) + carry
    g_x = g * lam + gy * _dot(z, w5)
    value = lam * x
    g_l, g_m, g_r = g, g, g
    if not FRESH:
        nl, nm, nr, share, clamped, product, el, em, er = _open_gates(
            _dot(z, w0), _dot(z, w1), _dot(z, w2), has_left, has_right
        )
        above, below = _neighbours(h, before, after, EXACT)
        mixed = (nl * above + nm * h + nr * below) * share
        value += mixed
        mean = tl.where(clamped, 0.0, mixed)
        # The gates are n * share, and 1 - sigmoid is e / (1 + e), which is e * (n of the gate) / product.
        share *= g
        sl, sm, sr = nl * share, nm * share, nr * share
        shrink = -LN2 * _inverse(product)
        g_l = sl * (above - mean) * (nl * shrink * el)
        g_m = sm * (h - mean) * (nm * shrink * em)
        g_r = sr * (below - mean) * (nr * shrink * er)
        carry = sm
        if EXACT:
            carry = _dot_add(before, sr, _dot_add(after, sl, carry))
        else:
            sl_high, sl_low = _halves(sl)
            sr_high, sr_low = _halves(sr)
            carry = _dot_add(after, sl_low, _dot_add(after, sl_high, carry))
            carry = _dot_add(before, sr_low, _dot_add(before, sr_high, carry))
    return g_x, carry, g_l, g_m, g_r, g * x, gy * value, gy * x


@triton.jit
def _contract(z, g0, g1, g2, v0, v1, v2, gw0, gw1, gw2, g_z, TWICE: tl.constexpr):
    """Adds the gradients of three coefficients to those of their weights and of the proxy."""
    if TWICE:
        g0, l0 = _halves(g0)
        g1, l1 = _halves(g1)
        g2, l2 = _halves(g2)
        g_z = _dot_add(l2, v2, _dot_add(l1, v1, _dot_add(l0, v0, g_z)))
        gw0, gw1, gw2 = _dot_add(z, l0, gw0), _dot_add(z, l1, gw1), _dot_add(z, l2, gw2)
    else:
        g0, g1, g2 = g0.to(z.dtype), g1.to(z.dtype), g2.to(z.dtype)
    g_z = _dot_add(g2, v2, _dot_add(g1, v1, _dot_add(g0, v0, g_z)))
    return _dot_add(z, g0, gw0), _dot_add(z, g1, gw1), _dot_add(z, g2, gw2), g_z


@triton.jit(do_not_specialize=[
    "rows", "lines", "chunk", "tiles", "segments", "halo", "units", "workers",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_bwd_kernel(
    x, z, w, wt, gy, gx, gz, gw, scratch, channels, pixels, rows, lines, chunk, tiles, segments, halo, w_width,
    units, workers,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3, gx_k,
    K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Gradients from one block of C channels of some units (P rows of the lines of one chunk), sweep after sweep.

    So that no two programs write to one place, gx has a leading axis of sweeps, gz one of channel blocks and gw one of
    workers.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    # A float16 gradient has more digits than one bfloat16.
    TWICE: tl.constexpr = z.dtype.element_ty == tl.float16
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    worker = tl.program_id(0) // blocks
    p = tl.arange(0, P)
    before, after = _shifts(p, low)
    c = block * C + tl.arange(0, C)
    c_mask = (c < channels)[None, :]
    s = tl.arange(0, R)
    s_mask = (s % HALF < S)[None, :]
    sg = tl.arange(0, HALF)
    tt = tt.to(tl.int64)
    scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C)
    at = p[:, None] * C + tl.arange(0, C)[None, :]
    for k in range(K):
        o, si, st = _pick(k, o0, o1, o2, o3), _pick(k, i0, i1, i2, i3), _pick(k, t0, t1, t2, t3)
        # w, wt (K, 6, R, w_width)
        w_ptr = w + k * 6 * R * w_width + s[:, None] * w_width + c[None, :]
        v_ptr = wt + k * 6 * R * w_width + s[None, :] * w_width + c[:, None]
        w_j = R * w_width
        w0, w1, w2 = tl.load(w_ptr), tl.load(w_ptr + w_j), tl.load(w_ptr + 2 * w_j)
        w3, w4, w5 = tl.load(w_ptr + 3 * w_j), tl.load(w_ptr + 4 * w_j), tl.load(w_ptr + 5 * w_j)
        v0, v1, v2 = tl.load(v_ptr), tl.load(v_ptr + w_j), tl.load(v_ptr + 2 * w_j)
        v3, v4, v5 = tl.load(v_ptr + 3 * w_j), tl.load(v_ptr + 4 * w_j), tl.load(v_ptr + 5 * w_j)
        gw0 = tl.zeros([R, C], tl.float32)
        gw1, gw2, gw3, gw4, gw5 = gw0, gw0, gw0, gw0, gw0
        for unit in range(worker * units // workers, (worker + 1) * units // workers):
            tile = unit % tiles
            segment = unit // tiles % segments
            b = (unit // (tiles * segments)).to(tl.int64)
            i = tile * (P - 2 * halo) - halo + p
            inside = (i >= 0) & (i < rows)
            own = inside & (p >= halo) & (p < P - halo)
            has_left = ((i > 0) | (rows == 1))[:, None]
            has_right = (i < rows - 1)[:, None]
            mask = inside[:, None] & c_mask
            own_mask = own[:, None] & c_mask
            z_mask = inside[:, None] & s_mask
            steps = tl.minimum(chunk, lines - segment * chunk)
            source = b * pixels + o + i * si + (segment * chunk) * st
            target = b * pixels + to + i * ti + (segment * chunk) * tt
            x_ptr = x + source[:, None] * channels + c[None, :]
            z_ptr = z + target[:, None] * S + (s % HALF)[None, :]
            tl.debug_barrier()
            zt = tl.load(z_ptr, z_mask, 0.0)
            xt = tl.load(x_ptr, mask, 0.0).to(tl.float32)
            h = _dot(zt, w3) * xt
            if not KEEP:
                tl.store(scratch + at, h)
                for t in range(1, steps - 1):
                    zt = tl.load(z_ptr + t * tt * S, z_mask, 0.0)
                    xt = tl.load(x_ptr + t * st * channels, mask, 0.0).to(tl.float32)
                    nl, nm, nr, share, _, _, _, _, _ = _open_gates(
                        _dot(zt, w0), _dot(zt, w1), _dot(zt, w2), has_left, has_right
                    )
                    above, below = _neighbours(h, before, after, EXACT)
                    h = _dot(zt, w3) * xt + (nl * above + nm * h + nr * below) * share
                    tl.store(scratch + t * (P * C) + at, h)
                tl.debug_barrier()
            carry = tl.zeros([P, C], tl.float32)
            for n in range(steps):
                t = steps - 1 - n
                pixel = (target + t * tt)[:, None]
                zt = tl.load(z_ptr + t * tt * S, z_mask, 0.0)
                xt = tl.load(x_ptr + t * st * channels, mask, 0.0).to(tl.float32)
                gyt = tl.load(gy + pixel * channels + c[None, :], mask, 0.0).to(tl.float32)
                gz_ptr = gz + ((block * (units // (tiles * segments))).to(tl.int64) * pixels + pixel) * S + sg[None, :]
                gz_mask = own[:, None] & (sg < S)[None, :]
                g_z_before = tl.load(gz_ptr, gz_mask & (tl.arange(0, 1)[None, :] + k > 0), 0.0)
                g_z = tl.zeros([P, R], tl.float32)
                if EXACT:
                    z_own = tl.trans(tl.where(own[:, None], zt, 0.0))
                else:
                    z_high, z_low = _halves(tl.where(own[:, None], zt.to(tl.float32), 0.0))
                    z_own = tl.trans(tl.where((s < HALF)[None, :], z_high, z_low))
                if t > 0:
                    if not KEEP:
                        h = tl.load(scratch + (t - 1) * (P * C) + at)
                    g_x, carry, g0, g1, g2, g3, g4, g5 = _proxy_line_gradients(
                        zt, xt, gyt, h, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right, False, EXACT
                    )
                    gw0, gw1, gw2, g_z = _contract(z_own, g0, g1, g2, v0, v1, v2, gw0, gw1, gw2, g_z, TWICE)
                else:
                    g_x, carry, g0, g1, g2, g3, g4, g5 = _proxy_line_gradients(
                        zt, xt, gyt, h, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right, True, EXACT
                    )
                gw3, gw4, gw5, g_z = _contract(z_own, g3, g4, g5, v3, v4, v5, gw3, gw4, gw5, g_z, TWICE)
                gx_ptr = (
                    gx + ((source + t * st) * channels + (tl.zeros([P], tl.int64) + k) * gx_k)[:, None] + c[None, :]
                )
                tl.store(gx_ptr, g_x.to(gx.dtype.element_ty), own_mask)
                if not EXACT:
                    g_z = tl.sum(tl.reshape(g_z, [P, 2, HALF]), 1)
                tl.store(gz_ptr, g_z_before + g_z, gz_mask)
        gw_ptr = gw + (worker * K + k).to(tl.int64) * 6 * w_j + s[:, None] * w_width + c[None, :]
        tl.store(gw_ptr, gw0)
        tl.store(gw_ptr + w_j, gw1)
        tl.store(gw_ptr + 2 * w_j, gw2)
        tl.store(gw_ptr + 3 * w_j, gw3)
        tl.store(gw_ptr + 4 * w_j, gw4)
        tl.store(gw_ptr + 5 * w_j, gw5)


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


@triton.jit
def line_scan_pack_kernel(
    gates, lam, u, skip, w, wt, channels, width, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    EXACT: tl.constexpr, TWICE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Weights of one coefficient as `w` (K, 6, R, width): gates times -log2(e), in two halves unless EXACT."""
    HALF: tl.constexpr = R if EXACT else R // 2
    k, j = tl.program_id(0) // 6, tl.program_id(0) % 6
    c = tl.program_id(1) * C + tl.arange(0, C)
    s = tl.arange(0, R)[:, None]
    # gates (3, K, channels, S); lam, u, skip (K, channels, S)
    at = (k * channels + c)[None, :] * S + s % HALF
    mask = (c < channels)[None, :] & (s % HALF < S)
    if j < 3:
        value = tl.load(gates + j * K * channels * S + at, mask, 0.0).to(tl.float32) * -LOG2E
    elif j == 3:
        value = tl.load(lam + at, mask, 0.0).to(tl.float32)
    elif j == 4:
        value = tl.load(u + at, mask, 0.0).to(tl.float32)
    else:
        value = tl.load(skip + at, mask, 0.0).to(tl.float32)
    out = (tl.program_id(0) * R + s) * width + c[None, :]
    _store_halves(w + out, value, s < HALF, (c < width)[None, :])
    if TWICE:
        _store_halves(wt + out, value, s < HALF, (c < width)[None, :])


@triton.jit
def _store_halves(pointer, value, first, mask):
    """Stores `value` in the pointer's dtype where `first`, elsewhere what that leaves."""
    rounded = value.to(pointer.dtype.element_ty)
    rest = (value - rounded.to(tl.float32)).to(pointer.dtype.element_ty)
    tl.store(pointer, tl.where(first, rounded, rest), mask)


def _frame(direction: str, height: int, width: int, stride_h: int, stride_w: int) -> tuple[int, int, int]:
    """Offset of the first pixel, and strides along and across the line, of a sweep over a map with these strides."""
    return {
        "right": (0, stride_h, stride_w),
        "left": ((width - 1) * stride_w, stride_h, -stride_w),
        "down": (0, stride_w, stride_h),
        "up": ((height - 1) * stride_h, stride_w, -stride_h),
    }[direction]


class _ProxyLaunch:
    """Sizes, packed weights and launches of the kernels for coefficients of a proxy."""

    # Channels of a block.
    C = 16

    def __init__(self, args: tuple, with_gradients: bool):
        self.x, gates, lam, u, skip, proxy, self.directions, chunk, _, self.aligned = args
        self.batch, self.channels, self.height, self.width = self.x.shape
        self.k, self.rank = len(self.directions), proxy.shape[1]
        self.chunk = chunk
        self.exact = self.x.dtype != proxy.dtype or self.x.dtype == torch.float32
        self.x, self.proxy = _pixels(self.x), _pixels(proxy.float() if self.exact else proxy)
        half = max(8, triton.next_power_of_2(self.rank))
        self.R = max(16, half) if self.exact else 2 * half
        self.blocks = triton.cdiv(self.channels, self.C)
        self.w_width = self.blocks * self.C
        self.w = self.x.new_empty(self.k, 6, self.R, self.w_width, dtype=self.proxy.dtype)
        # The gradients' products are in bfloat16, whose range they need.
        twice = with_gradients and self.w.dtype == torch.float16
        self.wt = torch.empty_like(self.w, dtype=torch.bfloat16) if twice else self.w
        line_scan_pack_kernel[(6 * self.k, triton.cdiv(self.w_width, 128))](
            gates.contiguous(), lam.contiguous(), u.contiguous(), skip.contiguous(), self.w, self.wt, self.channels,
            self.w_width, K=self.k, S=self.rank, R=self.R, EXACT=self.exact, TWICE=twice, C=128,
        )  # fmt: skip

    def groups(self) -> Iterator[tuple[int, list[str], Tensor, tuple[int, int, int]]]:
        """Sweeps that share pixels they write to: the first one's number, names, maps to read and target frame."""
        size = (self.height, self.width)
        if self.aligned:
            for k, direction in enumerate(self.directions):
                yield k, [direction], self.x, _frame(direction, *size, self.width, 1)
        elif self.height == self.width:
            for k in range(0, self.k, 4):
                yield k, self.directions[k : k + 4], self.x, (0, self.width, 1)
        else:
            for k, direction in enumerate(self.directions):
                turned = to_map_frame(self.x.unflatten(1, size).permute(0, 3, 1, 2), direction)
                yield k, ["right"], _pixels(turned), (0, self.width, 1)

    def tiling(self, direction: str) -> tuple[int, int, int, int, int, int, int]:
        """Rows of a tile, and of the line, lines, lines of a chunk, tiles, chunks, rows that tiles share at an end."""
        turned = self.aligned and direction in ("down", "up")
        rows, lines = (self.width, self.height) if turned else (self.height, self.width)
        chunk = min(self.chunk or lines, lines)
        P, halo = _tile(rows, chunk)
        return P, rows, lines, chunk, triton.cdiv(rows, P - 2 * halo), triton.cdiv(lines, chunk), halo

    def _sources(self, directions: list[str]) -> list[int]:
        frames = [v for d in directions for v in _frame(d, self.height, self.width, self.width, 1)]
        return frames + [0] * (12 - len(frames))

    def forward(self) -> Tensor:
        groups = list(self.groups())
        y = torch.empty_like(self.x, dtype=torch.float32 if len(groups) > 1 else self.x.dtype)
        for k, directions, x, target in groups:
            P, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
            programs = self.blocks * self.batch * tiles * segments
            keep = chunk <= 2
            scratch = y if keep else y.new_empty(programs, chunk, P, self.C, dtype=torch.float32)
            line_scan_proxy_fwd_kernel[(programs,)](
                x, self.proxy, self.w[k:], y, scratch, self.channels, self.height * self.width, rows, lines, chunk,
                tiles, segments, halo, self.w_width, len(directions), *target, *self._sources(directions),
                S=self.rank, R=self.R, P=P, C=self.C, EXACT=self.exact, KEEP=keep, ADD=k > 0,
                num_warps=P // 16, num_stages=2,
            )  # fmt: skip
        return _map(y, self.height).to(self.x.dtype)

    def backward(self, gy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, of the proxy, and of the weights (6, K, D, S)."""
        gy = _pixels(gy)
        pixels = self.height * self.width
        groups = list(self.groups())
        # So that nothing has to be added in memory by two programs: one gradient of x a sweep, and one of the proxy a
        # block of channels. The sums are taken in float32.
        gx = self.x.new_empty(self.k, *self.x.shape)
        gz = self.x.new_empty(len(groups), self.blocks, self.batch, pixels, self.rank, dtype=torch.float32)
        gw = []
        for n, (k, directions, x, target) in enumerate(groups):
            P, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
            units = self.batch * tiles * segments
            # As many programs as run at a time: each keeps a sum of the weights' gradients.
            workers = max(1, min(units, 8 * _processors(x) // self.blocks))
            part = x.new_empty(workers, len(directions), 6, self.R, self.w_width, dtype=torch.float32)
            keep = chunk <= 2
            scratch = part if keep else part.new_empty(self.blocks * workers, chunk, P, self.C)
            in_place = x is self.x
            gx_k = gx[k:] if in_place else torch.empty_like(gx[:1])
            line_scan_proxy_bwd_kernel[(self.blocks * workers,)](
                x, self.proxy, self.w[k:], self.wt[k:], gy, gx_k, gz[n], part, scratch, self.channels, pixels, rows,
                lines, chunk, tiles, segments, halo, self.w_width, units, workers, *target,
                *self._sources(directions), x.numel(),
                K=len(directions), S=self.rank, R=self.R, P=P, C=self.C, EXACT=self.exact, KEEP=keep,
                num_warps=P // 16,
            )  # fmt: skip
            if not in_place:
                gx[k] = _pixels(from_map_frame(_map(gx_k[0], self.height).float(), self.directions[k]))
            gw.append(part.sum(0))
        gw = torch.cat(gw) if len(gw) > 1 else gw[0]
        gw = gw if self.exact else gw.unflatten(2, (2, -1)).sum(2)
        gw = gw[:, :, : self.rank, : self.channels].permute(1, 0, 3, 2)
        return _map(gx.sum(0), self.height), _map(gz.sum((0, 1)), self.height), gw


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H * W, C), a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _map(x: Tensor, height: int) -> Tensor:
    """The inverse of `_pixels`."""
    return x.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def _tile(rows: int, chunk: int) -> tuple[int, int] | None:
    """Rows of a tile and how many of them it shares with the next, or None where lines are too long for tiles.

    Every line after the first of a chunk spoils one row more at a tile's ends.
    """
    options = [(P, 0) for P in (16, 32, 64) if rows <= P]
    options += [(P, chunk - 1) for P in (16, 32, 64) if rows > P and P - 2 * (chunk - 1) >= P // 2]
    # Shifting rows is a product with a P x P matrix.
    return min(options, key=lambda o: triton.cdiv(rows, o[0] - 2 * o[1]) * o[0] * (128 + o[0]), default=None)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _suits_proxy_kernel(args: tuple) -> bool:
    x, _, _, u, skip, proxy, _, chunk, normalize, aligned = args
    if proxy is None or u is None or skip is None or not normalize or not 1 <= proxy.shape[1] <= 32:
        return False
    sizes = {x.shape[2:], x.shape[:1:-1] if aligned else x.shape[2:]}
    return all(_tile(rows, min(chunk or lines, lines)) is not None for rows, lines in sizes)


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
        self.chunk = chunk

    def strides(self, t: Tensor | None) -> list[int]:
        """Of a (B, ..., D, H, W): batch, channel, along the line, across."""
        if t is None:
            return [0, 0, 0, 0]
        *_, d, h, w = t.stride()
        return [t.stride(0), d, *((w, h) if self.frame in ("down", "up") else (h, w))]

    def configure(self, maps: list[Tensor | None]) -> None:
        """Chooses blocks for kernels on these maps, (B, 3, D, H, W) where the five dimensions are."""
        batch, self.channels, height, width = self.x.shape
        self.rows, self.lines = (width, height) if self.frame in ("down", "up") else (height, width)
        self.chunk = min(self.chunk or self.lines, self.lines)
        self.sequences = batch * self.channels
        strides = [self.strides(t) for t in maps]
        threes = [t.stride(1) for t in maps if t is not None and t.dim() == 5]
        # Lines that a thread can read at once.
        across = {s[3] for t, s in zip(maps, strides, strict=True) if t is not None}
        common = math.gcd(self.lines, *threes, *(v for s in strides for v in s[:3]))
        self.W = math.gcd(common, 8) if across == {1} else 1
        self.P = triton.next_power_of_2(self.rows)
        while self.W > 1 and self.W * self.P > 8192:
            self.W //= 2
        self.N = max(1, min(128 // self.P, triton.next_power_of_2(self.sequences)))
        self.warps = max(1, min(32 if self.P > 1024 else 16, self.N * self.P // 32))
        self.rows_inner = self.x.stride(1) != 1 or self.channels == 1
        self.blocks = self.lines // self.W
        # Segments of whole chunks, no more than there are processors for.
        whole = self.chunk // math.gcd(self.chunk, self.W)
        segments = triton.cdiv(32 * _processors(self.x), max(1, self.sequences // self.N))
        self.span = min(self.blocks, triton.cdiv(triton.cdiv(self.blocks, segments), whole) * whole)
        self.segments = triton.cdiv(self.blocks, self.span)
        self.programs = triton.cdiv(self.sequences, self.N) * self.segments
        size = 4 * (self.N * self.P + 2 * (1 if self.rows_inner else self.N))
        self.exchange = self.x.new_empty(0 if _GATHER else self.programs * size, dtype=torch.float32)
        sizes = [self.sequences, self.channels, self.rows, self.blocks, self.chunk, self.segments, self.span, 1]
        flat = []
        for t, s in zip(maps, strides, strict=True):
            s = [v // self.W for v in s[:3]] + s[3:]
            flat += s if t is None or t.dim() == 4 else [s[0], t.stride(1) // self.W, *s[1:]]
        self.arguments = [self.exchange, *sizes, *flat]
        self.constants = dict(
            N=self.N, P=self.P, W=self.W, ROWS_INNER=self.rows_inner, REVERSE=self.frame in ("left", "up"),
            NORMALIZE=self.normalize, HAS_U=self.u is not None, HAS_SKIP=self.skip is not None, GATHER=_GATHER,
            num_warps=self.warps,
        )  # fmt: skip

    def forward(self, y: Tensor, add: bool) -> None:
        """Writes or adds the outputs to `y` (B, D, H, W)."""
        self.configure([self.x, self.gates, self.lam, self.u, self.skip, y])
        u, skip = (self.x if t is None else t for t in (self.u, self.skip))
        line_scan_fwd_kernel[(self.programs,)](
            self.x, self.gates, self.lam, u, skip, y, *self.arguments, ADD=add, **self.constants
        )

    def backward(self, gy: Tensor, gx: Tensor, add: bool, outputs: list[Tensor | None]) -> None:
        """Writes or adds the gradient of `x` to `gx`, and writes those of the coefficients."""
        g_gates, g_lam, g_u, g_skip = outputs
        gx_k = gx if self.in_place else torch.empty_like(self.x, dtype=torch.float32)
        hs = torch.empty_like(gx_k, dtype=self.x.dtype)
        self.configure([self.x, self.gates, self.lam, self.u, self.skip, gy, hs, gx_k, g_gates, g_lam])
        nothing = self.x
        u, skip, g_u, g_skip = (nothing if t is None else t for t in (self.u, self.skip, g_u, g_skip))
        line_scan_bwd_kernel[(self.programs,)](
            self.x, self.gates, self.lam, u, skip, gy, hs, gx_k, g_gates, g_lam, g_u, g_skip, *self.arguments,
            ADD=add and self.in_place, KEEP=self.W % self.chunk == 0, **self.constants,
        )  # fmt: skip
        if not self.in_place:
            turned = from_map_frame(gx_k, self.direction)
            gx.copy_(turned + gx if add else turned)


def forward(*args) -> Tensor:
    if _suits_proxy_kernel(args):
        return _ProxyLaunch(args, with_gradients=False).forward()
    x, proxy, directions = args[0], args[5], args[6]
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
    if _suits_proxy_kernel(args):
        g_x, g_proxy, g_w = _ProxyLaunch(args, with_gradients=True).backward(grads[0])
        return [g_x, g_w[:3] * -LOG2E.value, g_w[3], g_w[4], g_w[5], g_proxy]
    g_x = torch.empty_like(
        x, dtype=x.dtype if len(directions) == 1 else torch.float32, memory_format=_layout_of_coefficients(proxy)
    )
    gy = grads[0] if proxy is None else grads[0].contiguous()
    if proxy is None:
        results = [None if t is None else torch.empty_like(t) for t in (gates, lam, u, skip)]
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
