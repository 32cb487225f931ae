"""GPU kernels of the line scan whose coefficients are linear functions of a proxy."""

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, kernel, next_power_of_2
from .frames import from_map_frame, to_map_frame

# The least sum of sigmoids that divides them.
_MIN_TOTAL = tl.constexpr(1e-7)
# Logits are multiplied by -log2(e) and clamped where a sigmoid is 2.4e-13, so that products of three stay finite.
_STEEPEST = tl.constexpr(41.9)
# Numbers of a sum from which it makes enough programs; PyTorch's kernel splits what is summed.
_LARGE = 1 << 19
# In place of a logit whose neighbour does not exist.
_CLOSED = tl.constexpr(1e3)

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
def _hold(x):
    """`x` in float32, computed in one place.

    What depends on loads alone, the compiler would rather compute once for every layout that it is used in, and then
    not load it ahead.
    """
    x = x.to(tl.float32)
    if _FTZ:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return x


@triton.jit
def _halves(h):
    """A float32 tile as the sum of two bfloat16 tiles, good to 16 bits."""
    high = (h.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (h - high).to(tl.bfloat16)


@triton.jit
def _shifts(p, Q: tl.constexpr, dtype: tl.constexpr):
    """Matrices (P, P) that give every row of a tile its predecessor's, and its successor's value; Q rows a picture."""
    before = (p[:, None] + 1 == p[None, :]) & (p[None, :] % Q != 0)
    after = (p[:, None] == p[None, :] + 1) & (p[:, None] % Q != 0)
    return before.to(tl.float32).to(dtype), after.to(tl.float32).to(dtype)


@triton.jit
def _neighbours(h, before, after, EXACT: tl.constexpr):
    """`h[i - 1]` and `h[i + 1]` of a tile (C, P): rows move by products with shift matrices."""
    if EXACT or h.dtype == tl.bfloat16:
        return _dot(h, before), _dot(h, after)
    else:
        high, low = _halves(h)
        return _dot_add(high, before, _dot(low, before)), _dot_add(high, after, _dot(low, after))


@triton.jit
def _pick(k, v0, v1, v2, v3):
    """The k-th of four numbers, with 64 bits."""
    return tl.where(k == 0, v0, tl.where(k == 1, v1, tl.where(k == 2, v2, v3))).to(tl.int64)


@triton.jit
def _mix(w0, w1, w2, z, no_left, no_right, h, before, after, EXACT: tl.constexpr):
    """What a line gets from the states `h` of the line before.

    With `b = 1 + exp(-logit)`, the sigmoids' ratio `1/bl : 1/bm : 1/br` is `bm br : bl br : bl bm`, so that one
    division is enough.
    """
    l, m, r = _dot_add(w0, z, no_left), _dot(w1, z), _dot_add(w2, z, no_right)
    bl = 1 + _exp2(tl.minimum(l, _STEEPEST))
    bm = 1 + _exp2(tl.minimum(m, _STEEPEST))
    br = 1 + _exp2(tl.minimum(r, _STEEPEST))
    nl, nm, nr = bm * br, bl * br, bl * bm
    share = _inverse(tl.maximum(nl + nm + nr, nl * bl * _MIN_TOTAL))
    above, below = _neighbours(h, before, after, EXACT)
    return (nl * above + nm * h + nr * below) * share


@triton.jit
def _rows_of_tile(n, batch, rows, tiles, halo, P: tl.constexpr, Q: tl.constexpr):
    """Of the P rows of the n-th tile: picture, row, whether it exists and whether it is the tile's own."""
    p = tl.arange(0, P)
    tile = n % tiles
    b = (n // tiles * (P // Q) + p // Q).to(tl.int64)
    i = tile * (Q - 2 * halo) - halo + p % Q
    inside = (i >= 0) & (i < rows) & (b < batch)
    own = inside & (p % Q >= halo) & (p % Q < Q - halo)
    return b, i, inside, own


@triton.jit
def _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first):
    """Pixels (P,) that the line `first` of sweep `k` reads, and the way to the next line's."""
    across = _pick(k, t0, t1, t2, t3)
    return _pick(k, o0, o1, o2, o3) + first * across + i * _pick(k, i0, i1, i2, i3), across


@kernel(do_not_specialize=[
    "batch", "rows", "lines", "chunk", "tiles", "segments", "halo", "sweeps",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_fwd_kernel(
    x, z, w, y, scratch, batch, channels, pixels, rows, lines, chunk, tiles, segments, halo, w_width, sweeps,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
    EXACT: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of up to four sweeps on one block of C channels, P rows of the line, and the lines of one chunk.

    Maps are channels-last: x, y (B, pixels, channels), z (B, pixels, S). Pixel (row i, line t) of a sweep is read at
    `o + i * i_k + t * t_k` and written at `to + i * ti + t * tt`. Tiles are (C, P). KEEP is for chunks of one or two
    lines; G is the number of sweeps that walk together in others.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    b, i, inside, own = _rows_of_tile(tl.program_id(0) // (blocks * segments), batch, rows, tiles, halo, P, Q)
    p = tl.arange(0, P)
    before, after = _shifts(p, Q, low)
    zero = tl.zeros([C, P], tl.float32)
    no_left = tl.where(((i > 0) | (rows == 1))[None, :], zero, _CLOSED)
    no_right = tl.where((i < rows - 1)[None, :], zero, _CLOSED)
    c = block * C + tl.arange(0, C)
    s = tl.arange(0, R)
    mask = inside[None, :] & (c < channels)[:, None]
    own_mask = own[None, :] & (c < channels)[:, None]
    z_mask = inside[None, :] & (s % HALF < S)[:, None]

    first = (segment * chunk).to(tl.int64)
    tt = tt.to(tl.int64)
    steps = tl.minimum(chunk, lines - segment * chunk)
    target = (b * pixels + to + i * ti + first * tt)[None, :]
    # (R, P): with half precision each number twice, for the two halves of a weight
    z_ptr = z + target * S + (s % HALF)[:, None]
    y_ptr = y + target * channels + c[:, None]
    # w (sweeps, 6, w_width, R)
    w_j = R * w_width
    w += c[:, None] * R + s[None, :]
    x += b[None, :] * pixels * channels + c[:, None]
    if KEEP:
        more = tl.arange(0, 1)[None, :] + 1 < steps
        z0, z1 = tl.load(z_ptr, z_mask, 0.0), tl.load(z_ptr + tt * S, z_mask & more, 0.0)
        y0 = zero
        y1 = zero
        at, across = _sweep_pixels(0, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first)
        x_ptr = x + at[None, :] * channels
        x0, x1 = tl.load(x_ptr, mask, 0.0), tl.load(x_ptr + across * channels, mask & more, 0.0)
        for k in range(sweeps):
            w_k = w + k * 6 * w_j
            w0, w1, w2 = tl.load(w_k), tl.load(w_k + w_j), tl.load(w_k + 2 * w_j)
            w3, w4, w5 = tl.load(w_k + 3 * w_j), tl.load(w_k + 4 * w_j), tl.load(w_k + 5 * w_j)
            xa, xb = x0.to(tl.float32), x1.to(tl.float32)
            # The next sweep's maps are read while this one computes.
            k_next = tl.minimum(k + 1, sweeps - 1)
            at, across = _sweep_pixels(k_next, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first)
            x_ptr = x + at[None, :] * channels
            x0, x1 = tl.load(x_ptr, mask, 0.0), tl.load(x_ptr + across * channels, mask & more, 0.0)
            h = _dot(w3, z0) * xa
            y0 += _dot(w4, z0) * h + _dot(w5, z0) * xa
            h = _dot(w3, z1) * xb + _mix(w0, w1, w2, z1, no_left, no_right, h, before, after, EXACT)
            y1 += _dot(w4, z1) * h + _dot(w5, z1) * xb
        if ADD:
            y0 += tl.load(y_ptr, own_mask, 0.0).to(tl.float32)
        tl.store(y_ptr, y0.to(y.dtype.element_ty), own_mask)
        y_ptr += tt * channels
        own_mask = own_mask & more
        if ADD:
            y1 += tl.load(y_ptr, own_mask, 0.0).to(tl.float32)
        tl.store(y_ptr, y1.to(y.dtype.element_ty), own_mask)
    else:
        # Contiguity is understated, so that threads access what they hold and exchange nothing.
        scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C) + tl.max_contiguous(
            tl.arange(0, C)[:, None] * P + p[None, :], [1, 2]
        )
        for k in range(0, sweeps, G):
            w_k = w + k * 6 * w_j
            w0, w1, w2 = tl.load(w_k), tl.load(w_k + w_j), tl.load(w_k + 2 * w_j)
            w3, w4, w5 = tl.load(w_k + 3 * w_j), tl.load(w_k + 4 * w_j), tl.load(w_k + 5 * w_j)
            at, across = _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first)
            x_ptr = x + at[None, :] * channels
            xn = tl.load(x_ptr, mask, 0.0)
            if G == 2:
                w_k += 6 * w_j
                v0, v1, v2 = tl.load(w_k), tl.load(w_k + w_j), tl.load(w_k + 2 * w_j)
                v3, v4, v5 = tl.load(w_k + 3 * w_j), tl.load(w_k + 4 * w_j), tl.load(w_k + 5 * w_j)
                at, x2_across = _sweep_pixels(k + 1, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, first)
                x2_ptr = x + at[None, :] * channels
                x2n = tl.load(x2_ptr, mask, 0.0)
            zn = tl.load(z_ptr, z_mask, 0.0)
            h = zero
            h2 = zero
            for t in range(steps):
                zt, xt = zn, xn.to(tl.float32)
                # The next line's maps are read while this one computes.
                t_next = tl.minimum(t + 1, steps - 1)
                zn = tl.load(z_ptr + t_next * tt * S, z_mask, 0.0)
                xn = tl.load(x_ptr + t_next * across * channels, mask, 0.0)
                out = zero
                if k > 0:
                    out = tl.load(scratch + t * (P * C))
                h = _dot(w3, zt) * xt + _mix(w0, w1, w2, zt, no_left, no_right, h, before, after, EXACT)
                out += _dot(w4, zt) * h + _dot(w5, zt) * xt
                if G == 2:
                    xt = x2n.to(tl.float32)
                    x2n = tl.load(x2_ptr + t_next * x2_across * channels, mask, 0.0)
                    h2 = _dot(v3, zt) * xt + _mix(v0, v1, v2, zt, no_left, no_right, h2, before, after, EXACT)
                    out += _dot(v4, zt) * h2 + _dot(v5, zt) * xt
                if k + G < sweeps:
                    tl.store(scratch + t * (P * C), out)
                else:
                    if ADD:
                        out += tl.load(y_ptr + t * tt * channels, own_mask, 0.0).to(tl.float32)
                    tl.store(y_ptr + t * tt * channels, out.to(y.dtype.element_ty), own_mask)


@triton.jit
def _proxy_line_gradients(
    z, x, gy, h, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right,
    FRESH: tl.constexpr, EXACT: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of one line: of `x`, of what goes to the states of the line before, and of the six coefficients.

    `h` are the states of the line before. ONCE hands neighbours' gradients on in one bfloat16: they go no further.
    """
    lam = _dot(w3, z)
    g = gy * _dot(w4, z) + carry
    g_x = g * lam + gy * _dot(w5, z)
    g_l, g_m, g_r = g, g, g
    state = lam * x
    if not FRESH:
        al = tl.where(has_left, _inverse(1 + _exp2(_dot(w0, z))), 0.0)
        am = _inverse(1 + _exp2(_dot(w1, z)))
        ar = tl.where(has_right, _inverse(1 + _exp2(_dot(w2, z))), 0.0)
        total = al + am + ar
        share = _inverse(tl.maximum(total, _MIN_TOTAL))
        above, below = _neighbours(h, before, after, EXACT)
        h = h.to(tl.float32)
        mixed = (al * above + am * h + ar * below) * share
        state += mixed
        mean = tl.where(total < _MIN_TOTAL, 0.0, mixed)
        share *= g
        sl, sm, sr = al * share, am * share, ar * share
        g_l = sl * (above - mean) * (1 - al)
        g_m = sm * (h - mean) * (1 - am)
        g_r = sr * (below - mean) * (1 - ar)
        carry = sm
        if EXACT:
            carry = _dot_add(sr, before, _dot_add(sl, after, carry))
        elif ONCE:
            carry = _dot_add(sr.to(tl.bfloat16), before, _dot_add(sl.to(tl.bfloat16), after, carry))
        else:
            sl_high, sl_low = _halves(sl)
            sr_high, sr_low = _halves(sr)
            carry = _dot_add(sl_high, after, _dot_add(sl_low, after, carry))
            carry = _dot_add(sr_high, before, _dot_add(sr_low, before, carry))
    return g_x, carry, g_l, g_m, g_r, g * x, gy * state, gy * x


@triton.jit
def _weights_gradient(g, z, gw, TWICE: tl.constexpr):
    """Adds what a coefficient's gradient (C, P) makes of the gradient (C, V) of its weights."""
    if TWICE:
        high, low = _halves(g)
        return _dot_add(high, z, _dot_add(low, z, gw))
    else:
        return _dot_add(g.to(z.dtype), z, gw)


@triton.jit
def _proxy_gradient(g, v, gz, TWICE: tl.constexpr):
    """Adds what coefficients' gradients (C, P) and weights (C, V) make of the proxy's gradient (P, V)."""
    if TWICE:
        high, low = _halves(g)
        return _dot_add(tl.trans(high), v, _dot_add(tl.trans(low), v, gz))
    else:
        return _dot_add(tl.trans(g.to(v.dtype)), v, gz)


@triton.jit
def _add(pointer, value, mask, more):
    """Stores `value`, added to what is there already if `more` (1, 1)."""
    value += tl.load(pointer, mask & more, 0.0).to(tl.float32)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask)


@kernel(do_not_specialize=[
    "batch", "rows", "lines", "chunk", "tiles", "segments", "halo", "groups", "per", "span", "workers",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_bwd_kernel(
    x, z, w, v, gy, gx, gz, gw, scratch, batch, channels, pixels, rows, lines, chunk, tiles, segments, halo, w_width,
    groups, per, span, workers,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, V: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    Q: tl.constexpr, EXACT: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr, ADD_GX: tl.constexpr,
    PARTIAL: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Gradients from one block of C channels of some groups: `span` chunks of P rows each, `per` groups a tile of rows.

    A program takes all sweeps, or if APART one. So that no two programs write to one place, gz has a leading axis of
    channel blocks, if APART of sweeps and blocks, gw one of workers and gx, if PARTIAL, one of sweeps. Otherwise a
    group holds all that its sweeps read, and they add to one gx. ADD and ADD_GX add to what earlier launches left in gz
    and gx.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    # A float16 gradient has more digits than one bfloat16.
    TWICE: tl.constexpr = z.dtype.element_ty == tl.float16
    # Digits that states keep for gradients.
    kept: tl.constexpr = tl.float32 if EXACT or TWICE else tl.bfloat16
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    worker = tl.program_id(0) // blocks
    first_sweep, sweeps = 0, K
    if APART:
        first_sweep, sweeps, worker = worker % K, 1, worker // K
    p = tl.arange(0, P)
    before, after = _shifts(p, Q, low)
    c = block * C + tl.arange(0, C)
    c_mask = (c < channels)[:, None]
    s = tl.arange(0, R)
    s_mask = (s % HALF < S)[:, None]
    sv = tl.arange(0, V)
    sg = tl.arange(0, HALF)
    tt = tt.to(tl.int64)
    zero = tl.zeros([C, P], tl.float32)
    no = tl.zeros([1, 1], tl.int1)
    # w (K, 6, w_width, R), v (K, 6, w_width, V), gw (workers, K, 6, w_width, V)
    w_j, v_j = R * w_width, V * w_width
    w += c[:, None] * R + s[None, :]
    # Contiguity is understated here and below, so that threads access what they hold and exchange nothing.
    gw += worker.to(tl.int64) * (K * 6) * v_j + tl.max_contiguous(c[:, None] * V + sv[None, :], [1, 2])
    v += c[:, None] * V + sv[None, :]
    scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C) + tl.arange(0, C)[:, None] + p[None, :] * C
    for group in range(worker, groups, workers):
        b, i, inside, own = _rows_of_tile(group // per, batch, rows, tiles, halo, P, Q)
        start = group % per * span
        has_left = ((i > 0) | (rows == 1))[None, :]
        has_right = (i < rows - 1)[None, :]
        mask = inside[None, :] & c_mask
        own_mask = own[None, :] & c_mask
        z_mask = inside[None, :] & s_mask
        own_z_mask = own[:, None] & (sv % HALF < S)[None, :]
        gz_mask = own[:, None] & (sg < S)[None, :]
        target = b * pixels + to + i * ti
        z_row = z + target[None, :] * S + (s % HALF)[:, None]
        own_z_row = z + target[:, None] * S + (sv % HALF)[None, :]
        gy_row = gy + target[None, :] * channels + c[:, None]
        gz_row = gz + tl.max_contiguous(
            (((first_sweep * blocks + block) * batch).to(tl.int64) * pixels + target[:, None]) * S + sg[None, :], [1, 2]
        )
        for k in range(first_sweep, first_sweep + sweeps):
            w_k, v_k = w + k * 6 * w_j, v + k * 6 * v_j
            w0, w1, w2 = tl.load(w_k), tl.load(w_k + w_j), tl.load(w_k + 2 * w_j)
            w3, w4, w5 = tl.load(w_k + 3 * w_j), tl.load(w_k + 4 * w_j), tl.load(w_k + 5 * w_j)
            v0, v1, v2 = tl.load(v_k), tl.load(v_k + v_j), tl.load(v_k + 2 * v_j)
            v3, v4, v5 = tl.load(v_k + 3 * v_j), tl.load(v_k + 4 * v_j), tl.load(v_k + 5 * v_j)
            gw0 = tl.zeros([C, V], tl.float32)
            gw1, gw2, gw3, gw4, gw5 = gw0, gw0, gw0, gw0, gw0
            again = no | ADD | (k > first_sweep)
            source, st = _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i, 0)
            source = (b * pixels + source)[None, :] * channels + c[:, None]
            x_row, gx_row = x + source, gx + source
            if PARTIAL:
                gx_row += k * (batch.to(tl.int64) * pixels * channels)
            gx_mask = own_mask if PARTIAL else own_mask & again
            # What was written in the last sweep may be read by other threads in this one.
            tl.debug_barrier()
            for segment in range(start, tl.minimum(start + span, segments)):
                first = (segment * chunk).to(tl.int64)
                steps = tl.minimum(chunk, lines - segment * chunk)
                z_ptr, own_z_ptr = z_row + first * tt * S, own_z_row + first * tt * S
                gy_ptr, gz_ptr = gy_row + first * tt * channels, gz_row + first * tt * S
                x_ptr, gx_ptr = x_row + first * st * channels, gx_row + first * st * channels
                carry = zero
                if not KEEP:
                    h = zero
                    no_left, no_right = tl.where(has_left, zero, _CLOSED), tl.where(has_right, zero, _CLOSED)
                    zn, xn = tl.load(z_ptr, z_mask, 0.0), tl.load(x_ptr, mask, 0.0)
                    for t in range(steps):
                        zt, xt = zn, xn.to(tl.float32)
                        t_next = tl.minimum(t + 1, steps - 1)
                        zn = tl.load(z_ptr + t_next * tt * S, z_mask, 0.0)
                        xn = tl.load(x_ptr + t_next * st * channels, mask, 0.0)
                        h = _dot(w3, zt) * xt + _mix(w0, w1, w2, zt, no_left, no_right, h, before, after, EXACT)
                        tl.store(scratch + t * (P * C), h.to(scratch.dtype.element_ty))
                    tl.debug_barrier()
                    h_next = tl.load(scratch + tl.maximum(steps - 2, 0) * (P * C))
                    last = (steps - 1).to(tl.int64)
                    if ADD_GX or not PARTIAL:
                        gx_next = tl.load(gx_ptr + last * st * channels, gx_mask, 0.0)
                    gz_next = tl.load(gz_ptr + last * tt * S, gz_mask & again, 0.0)
                for n in range(steps):
                    t = steps - 1 - n
                    zt = tl.load(z_ptr + t * tt * S, z_mask, 0.0)
                    own_z = tl.load(own_z_ptr + t * tt * S, own_z_mask, 0.0)
                    xt = tl.load(x_ptr + t * st * channels, mask, 0.0)
                    xt = xt.to(tl.float32) if KEEP else _hold(xt)
                    gyt = tl.load(gy_ptr + t * tt * channels, mask, 0.0).to(tl.float32)
                    gx_before = zero
                    if KEEP:
                        if ADD_GX or not PARTIAL:
                            gx_before = tl.load(gx_ptr + t * st * channels, gx_mask, 0.0).to(tl.float32)
                    else:
                        # The states, and what is added to, are read one line before they are needed.
                        state = tl.where(no | (t > 0), h_next, 0.0)
                        h_next = tl.load(scratch + tl.maximum(t - 2, 0) * (P * C))
                        t_next = tl.maximum(t - 1, 0)
                        gz_before = gz_next
                        gz_next = tl.load(gz_ptr + t_next * tt * S, gz_mask & again, 0.0)
                        if ADD_GX or not PARTIAL:
                            gx_before = gx_next.to(tl.float32)
                            gx_next = tl.load(gx_ptr + t_next * st * channels, gx_mask, 0.0)
                    g_z = tl.zeros([P, V], tl.float32)
                    if V > HALF:
                        z_high, z_low = _halves(own_z.to(tl.float32))
                        own_z = tl.where((sv < HALF)[None, :], z_high, z_low)
                    # In a long chunk the first line is one of many: states of 0 cost less than a branch.
                    if t > 0 or not KEEP:
                        if KEEP:
                            state = _dot(w3, tl.load(z_ptr, z_mask, 0.0)) * tl.load(x_ptr, mask, 0.0).to(tl.float32)
                            state = state.to(kept)
                        g_x, carry, g0, g1, g2, g3, g4, g5 = _proxy_line_gradients(
                            zt, xt, gyt, state, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right,
                            False, EXACT, KEEP and not TWICE)  # fmt: skip
                        gw0 = _weights_gradient(g0, own_z, gw0, TWICE)
                        gw1 = _weights_gradient(g1, own_z, gw1, TWICE)
                        gw2 = _weights_gradient(g2, own_z, gw2, TWICE)
                        g_z = _proxy_gradient(g1, v1, _proxy_gradient(g0, v0, g_z, TWICE), TWICE)
                        g_z = _proxy_gradient(g2, v2, g_z, TWICE)
                    else:
                        g_x, carry, g0, g1, g2, g3, g4, g5 = _proxy_line_gradients(
                            zt, xt, gyt, zero, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right,
                            True, EXACT, KEEP and not TWICE)  # fmt: skip
                    gw3 = _weights_gradient(g3, own_z, gw3, TWICE)
                    gw4 = _weights_gradient(g4, own_z, gw4, TWICE)
                    gw5 = _weights_gradient(g5, own_z, gw5, TWICE)
                    g_z = _proxy_gradient(g4, v4, _proxy_gradient(g3, v3, g_z, TWICE), TWICE)
                    g_z = _proxy_gradient(g5, v5, g_z, TWICE)
                    tl.store(gx_ptr + t * st * channels, (g_x + gx_before).to(gx.dtype.element_ty), own_mask)
                    if V > HALF:
                        g_z = tl.sum(tl.reshape(g_z, [P, 2, HALF]), 1)
                    if not KEEP:
                        tl.store(gz_ptr + t * tt * S, g_z + gz_before, gz_mask)
                    elif APART and not ADD:
                        tl.store(gz_ptr + t * tt * S, g_z.to(gz.dtype.element_ty), gz_mask)
                    else:
                        _add(gz_ptr + t * tt * S, g_z, gz_mask, again)
            gw_k = gw + k * 6 * v_j
            again = no | (group > worker)
            _add(gw_k, gw0, c_mask, again)
            _add(gw_k + v_j, gw1, c_mask, again)
            _add(gw_k + 2 * v_j, gw2, c_mask, again)
            _add(gw_k + 3 * v_j, gw3, c_mask, again)
            _add(gw_k + 4 * v_j, gw4, c_mask, again)
            _add(gw_k + 5 * v_j, gw5, c_mask, again)


@kernel
def line_scan_sum_kernel(maps, total, count, size, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum (size,) of maps (count, size)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    way = tl.cast(size, tl.int64)
    value = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            n = first + j
            value += tl.load(maps + n * way + at, (n < count) & (at < size), 0.0).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), at < size)


@kernel
def line_scan_pack_kernel(
    gates, lam, u, skip, w, v, channels, width, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    EXACT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Weights of one coefficient as `w` (K, 6, width, R), gates times -log2(e), and `v` (K, 6, width, V) if V > 0.

    Unless EXACT, `w` is in two halves, and so is `v` if it is as wide.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    k, j = tl.program_id(0) // 6, tl.program_id(0) % 6
    c = (tl.program_id(1) * C + tl.arange(0, C))[:, None]
    s = tl.arange(0, R)[None, :]
    # gates (3, K, channels, S); lam, u, skip (K, channels, S)
    at = (k * channels + c) * S + s % HALF
    mask = (c < channels) & (s % HALF < S)
    scale = 1.0
    if j < 3:
        value = tl.load(gates + j * K * channels * S + at, mask, 0.0).to(tl.float32)
        scale = -LOG2E
    elif j == 3:
        value = tl.load(lam + at, mask, 0.0).to(tl.float32)
    elif j == 4:
        value = tl.load(u + at, mask, 0.0).to(tl.float32)
    else:
        value = tl.load(skip + at, mask, 0.0).to(tl.float32)
    row = tl.program_id(0) * width + c
    _store_halves(w + row * R + s, value * scale, s < HALF, c < width)
    if V > 0:
        _store_halves(v + row * V + s, value, s < HALF, (c < width) & (s < V))


@triton.jit
def _store_halves(pointer, value, first, mask):
    """Stores `value` in the pointer's dtype where `first`, elsewhere what that leaves."""
    rounded = value.to(pointer.dtype.element_ty)
    rest = (value - rounded.to(tl.float32)).to(pointer.dtype.element_ty)
    tl.store(pointer, tl.where(first, rounded, rest), mask)


@kernel(do_not_specialize=["workers"])
def line_scan_unpack_kernel(
    gw, gates, lam, u, skip, channels, width, workers, gates_j, K: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of one coefficient's weights from `gw` (workers, K, 6, width, V), summed over workers and halves."""
    k, j = tl.program_id(0) // 6, tl.program_id(0) % 6
    c = tl.program_id(1) * C + tl.arange(0, C)
    s = tl.arange(0, V)
    n = tl.arange(0, N)[:, None, None]
    gw += (tl.program_id(0) * width + c[None, :, None]) * V + s[None, None, :]
    total = tl.zeros([N, C, V], tl.float32)
    for first in range(0, workers, N):
        worker = (first + n).to(tl.int64)
        total += tl.load(gw + worker * (K * 6 * V) * width, (worker < workers) & (c < width)[None, :, None], 0.0)
    value = tl.sum(total, 0)
    if V > HALF:
        value = tl.sum(tl.reshape(value, [C, 2, HALF]), 1)
    s = tl.arange(0, HALF)[None, :]
    at = (k * channels + c[:, None]) * S + s
    mask = (c < channels)[:, None] & (s < S)
    if j < 3:
        tl.store(gates + j * gates_j + at, value.to(gates.dtype.element_ty), mask)
    elif j == 3:
        tl.store(lam + at, value.to(lam.dtype.element_ty), mask)
    elif j == 4:
        tl.store(u + at, value.to(u.dtype.element_ty), mask)
    else:
        tl.store(skip + at, value.to(skip.dtype.element_ty), mask)


def frame(direction: str, height: int, width: int) -> tuple[int, int, int]:
    """First pixel of a sweep over a map, and the ways to the next row and to the next line."""
    return {
        "right": (0, width, 1),
        "left": (width - 1, width, -1),
        "down": (0, 1, width),
        "up": ((height - 1) * width, 1, -width),
    }[direction]


class _Launch:
    """Sizes, packed weights and launches of the kernels."""

    # Channels of a block.
    C = 16
    # Short chunks whose weights' gradients are summed in registers.
    SPAN = 28

    def __init__(self, args: tuple, with_gradients: bool):
        self.x, *self.weights, proxy, self.directions, self.chunk, _, self.aligned = args
        self.batch, self.channels, self.height, self.width = self.x.shape
        self.k, self.rank = len(self.directions), proxy.shape[1]
        self.exact = self.x.dtype != proxy.dtype or self.x.dtype == torch.float32
        self.x, self.proxy = _pixels(self.x), _pixels(proxy.float() if self.exact else proxy)
        half = max(8, next_power_of_2(self.rank))
        self.R = max(16, half) if self.exact else 2 * half
        # bfloat16 holds all of a bfloat16 proxy, and weights well enough for gradients.
        self.V = half if self.proxy.dtype == torch.bfloat16 else self.R
        self.blocks = cdiv(self.channels, self.C)
        self.w_width = self.blocks * self.C
        self.w = self.x.new_empty(self.k, 6, self.w_width, self.R, dtype=self.proxy.dtype)
        self.v = self.w
        if with_gradients:
            # The gradients' products are in bfloat16, whose range they need.
            dtype = torch.bfloat16 if self.w.dtype == torch.float16 else self.w.dtype
            self.v = self.x.new_empty(self.k, 6, self.w_width, self.V, dtype=dtype)
        line_scan_pack_kernel[(6 * self.k, cdiv(self.w_width, 64))](
            *(t.contiguous() for t in self.weights), self.w, self.v, self.channels, self.w_width,
            K=self.k, S=self.rank, R=self.R, V=self.V if with_gradients else 0, EXACT=self.exact, C=64,
        )  # fmt: skip

    def groups(self) -> Iterator[tuple[int, list[str], Tensor, tuple[int, int, int]]]:
        """Sweeps that share pixels they write to: the first one's number, names, maps to read and target frame."""
        size = (self.height, self.width)
        if self.aligned:
            for k, direction in enumerate(self.directions):
                yield k, [direction], self.x, frame(direction, *size)
        elif self.height == self.width:
            for k in range(0, self.k, 4):
                yield k, self.directions[k : k + 4], self.x, (0, self.width, 1)
        else:
            for k, direction in enumerate(self.directions):
                turned = to_map_frame(self.x.unflatten(1, size).permute(0, 3, 1, 2), direction)
                yield k, ["right"], _pixels(turned), (0, self.width, 1)

    def tiling(self, direction: str) -> tuple[int, int, int, int, int, int, int, int]:
        """Rows of a tile, of a picture in it, and of the line; lines, and of a chunk; tiles, chunks, rows shared."""
        turned = self.aligned and direction in ("down", "up")
        rows, lines = (self.width, self.height) if turned else (self.height, self.width)
        chunk = min(self.chunk or lines, lines)
        P, halo = _tile(rows, chunk)
        Q = min(P, next_power_of_2(rows)) if halo == 0 else P
        return P, Q, rows, lines, chunk, cdiv(rows, Q - 2 * halo), cdiv(lines, chunk), halo

    def _registers(self, few: bool) -> dict:
        """Limits of registers: with 168 a thread, three warps fit a scheduler, with more two."""
        return dict(maxnreg=168 if few and not self.exact else 255) if torch.version.cuda is not None else {}

    def _sources(self, directions: list[str]) -> list[int]:
        frames = [v for d in directions for v in frame(d, self.height, self.width)]
        return frames + [0] * (12 - len(frames))

    def forward(self) -> Tensor:
        groups = list(self.groups())
        y = torch.empty_like(self.x, dtype=torch.float32 if len(groups) > 1 else self.x.dtype)
        for k, directions, x, target in groups:
            P, Q, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
            programs = self.blocks * cdiv(self.batch * Q, P) * tiles * segments
            keep = chunk <= 2
            together = 2 if len(directions) % 2 == 0 and not keep else 1
            scratch = y
            if not keep and len(directions) > together:
                scratch = y.new_empty(programs, chunk, P, self.C, dtype=torch.float32)
            line_scan_proxy_fwd_kernel[(programs,)](
                x, self.proxy, self.w[k:], y, scratch, self.batch, self.channels, self.height * self.width, rows,
                lines, chunk, tiles, segments, halo, self.w_width, len(directions), *target,
                *self._sources(directions),
                S=self.rank, R=self.R, P=P, C=self.C, Q=Q, G=together, EXACT=self.exact, KEEP=keep, ADD=k > 0,
                num_warps=P // 16, num_stages=2, **self._registers(few=True),
            )  # fmt: skip
        return _map(y, self.height).to(self.x.dtype)

    def backward(self, gy: Tensor) -> list[Tensor]:
        """Gradients of x, of the weights, and of the proxy."""
        gy = _pixels(gy)
        pixels = self.height * self.width
        groups = list(self.groups())
        # So that nothing has to be added in memory by two programs: one gradient of the proxy a block of channels and
        # program's sweeps, and one of x a sweep where different programs run sweeps over one pixel. The sums are taken
        # in float32.
        gz = gx = turned_gx = None
        rounded = torch.bfloat16 if self.w.dtype == torch.bfloat16 else torch.float32
        g_gates, *others = (t.new_empty(t.shape) for t in self.weights)
        for k, directions, x, target in groups:
            P, Q, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
            keep = chunk <= 2
            # Groups of chunks in one row of tiles.
            per = cdiv(segments, self.SPAN) if keep else segments
            span = cdiv(segments, per)
            groups = cdiv(self.batch * Q, P) * tiles * per
            in_place = x is self.x
            # Short chunks need nothing of their sweep's other chunks.
            apart = len(directions) if keep else 1
            if gz is None:
                dtype = rounded if apart > 1 else torch.float32
                gz = x.new_empty(apart * self.blocks, self.batch, pixels, self.rank, dtype=dtype)
            # Several programs may add to a pixel of gx in one launch.
            partial = not in_place or (len(directions) > 1 and (keep or tiles * per > 1))
            if gx is None or not in_place:
                gx = x.new_empty(len(directions) if partial else 1, *x.shape)
            # As many programs as run at a time, and all with as much to do.
            warps = 12 if keep and not self.exact else 8
            slots = max(1, warps * 16 // P * processors(x) // (self.blocks * apart))
            workers = cdiv(groups, max(1, cdiv(groups, slots)))
            part = x.new_empty(workers, len(directions), 6, self.w_width, self.V, dtype=torch.float32)
            scratch = part
            if not keep:
                scratch = x.new_empty(self.blocks * workers, chunk, P, self.C, dtype=rounded)
            line_scan_proxy_bwd_kernel[(self.blocks * apart * workers,)](
                x, self.proxy, self.w[k:], self.v[k:], gy, gx, gz, part, scratch, self.batch, self.channels, pixels,
                rows, lines, chunk, tiles, segments, halo, self.w_width, groups, per, span, workers, *target,
                *self._sources(directions),
                K=len(directions), S=self.rank, R=self.R, V=self.V, P=P, C=self.C, Q=Q, EXACT=self.exact, KEEP=keep,
                ADD=k > 0, ADD_GX=k > 0 and in_place, PARTIAL=partial, APART=apart > 1, num_warps=P // 16,
                **self._registers(few=keep),
            )  # fmt: skip
            if not in_place:
                turned = from_map_frame(_map(gx[0], self.height).float(), self.directions[k])
                turned_gx = turned if turned_gx is None else turned_gx + turned
            line_scan_unpack_kernel[(6 * len(directions), self.blocks)](
                part, g_gates[:, k:], *(t[k:] for t in others), self.channels, self.w_width, workers,
                g_gates.stride(0), K=len(directions), S=self.rank, HALF=self.R if self.exact else self.R // 2,
                V=self.V, C=self.C, N=16,
            )  # fmt: skip
        if turned_gx is None:
            turned_gx = _map(_sum(gx, gx.dtype) if len(gx) > 1 else gx[0], self.height)
        return [turned_gx, g_gates, *others, _map(_sum(gz, self.proxy.dtype), self.height)]


def _sum(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first axis, taken in float32."""
    if maps[0].numel() < _LARGE:
        return maps.sum(0, dtype=torch.float32)
    total = maps.new_empty(maps.shape[1:], dtype=dtype)
    line_scan_sum_kernel[(cdiv(total.numel(), 1024),)](maps, total, len(maps), total.numel(), AT_ONCE=4, BLOCK=1024)
    return total


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
    return min(options, key=lambda o: cdiv(rows, o[0] - 2 * o[1]) * o[0] * (128 + o[0]), default=None)


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def suits(args: tuple) -> bool:
    """Whether the kernels of this file have the form asked for."""
    x, _, _, u, skip, proxy, _, chunk, normalize, aligned = args
    if proxy is None or u is None or skip is None or not normalize or not 1 <= proxy.shape[1] <= 32:
        return False
    sizes = {x.shape[2:], x.shape[:1:-1] if aligned else x.shape[2:]}
    return all(_tile(rows, min(chunk or lines, lines)) is not None for rows, lines in sizes)


def forward(*args) -> Tensor:
    return _Launch(args, with_gradients=False).forward()


def backward(grads: list[Tensor], *args) -> list[Tensor]:
    return _Launch(args, with_gradients=True).backward(grads[0])
