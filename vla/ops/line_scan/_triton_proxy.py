"""GPU kernels of the line scan whose coefficients are linear functions of a proxy."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, NARROWEST, PTX, at_most, cdiv, dot, dot_add, kernel, next_power_of_2, sum_maps
from ._triton_common import (
    _CLOSED,
    _MIN_TOTAL,
    _STEEPEST,
    _exp2,
    _halves,
    _inverse,
    _pick,
)
from ._triton_local import (
    PAIRS,
    fragment_place,
    line_scan_local_bwd_kernel,
    line_scan_local_fwd_kernel,
    line_scan_short_fwd_kernel,
)
from .frames import from_map_frame, to_map_frame

# Of gradients (sweeps, B, pixels, D) and (B, pixels, S), those of x, (B, pixels, D).
Join = Callable[[Tensor, Tensor], Tensor]

# Numbers of a sum from which it makes enough programs; PyTorch's kernel splits what is summed.
_LARGE = 1 << 19


@triton.jit
def _hold(x):
    """`x` in float32, computed in one place.

    What depends on loads alone, the compiler would rather compute once for every layout that it is used in, and then
    not load it ahead.
    """
    x = x.to(tl.float32)
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    else:
        return x


@triton.jit
def _first(v, T: tl.constexpr):
    """Channels or proxy channels (N,) along the first axis of tiles."""
    return v[:, None] if T == 1 else v[None, :, None]


@triton.jit
def _second(v, T: tl.constexpr):
    """Proxy channels (N,) along the second axis of tiles."""
    return v[None, :] if T == 1 else v[None, None, :]


@triton.jit
def _rows_first(v, T: tl.constexpr):
    """What belongs to rows, (16,) or (T, 16), along the first axis of tiles."""
    return v[:, None] if T == 1 else v[:, :, None]


@triton.jit
def _rows_second(v, T: tl.constexpr):
    """What belongs to rows, (16,) or (T, 16), along the second axis of tiles."""
    return v[None, :] if T == 1 else v[:, None, :]


@triton.jit
def _zeros(N: tl.constexpr, M: tl.constexpr, T: tl.constexpr):
    """A tile (N, M), or T of them."""
    return tl.zeros([N, M] if T == 1 else [T, N, M], tl.float32)


@triton.jit
def _shifts(Q: tl.constexpr, dtype: tl.constexpr):
    """Matrices (16, 16) that give every row its predecessor's, and its successor's value; Q rows a picture."""
    p = tl.arange(0, 16)
    before = (p[:, None] + 1 == p[None, :]) & (p[None, :] % Q != 0)
    after = (p[:, None] == p[None, :] + 1) & (p[:, None] % Q != 0)
    return before.to(tl.float32).to(dtype), after.to(tl.float32).to(dtype)


@triton.jit
def _around(down, up):
    """`down[i - 1]` and `up[i + 1]` of tiles (T, C, 16), 0 at the ends.

    A thread holds pairs of rows, of which one has its neighbour there. The other's comes from another thread, maybe of
    another warp, in one exchange.
    """
    T: tl.constexpr = down.shape[0]
    C: tl.constexpr = down.shape[1]
    down_even, down_odd = tl.split(tl.reshape(down, [T, C, 8, 2]))
    up_even, up_odd = tl.split(tl.reshape(up, [T, C, 8, 2]))
    # (2, C / 8, T, 8 pairs, 8 channels), an order in which the threads of a warp access neighbouring words.
    sent = tl.permute(tl.reshape(tl.join(down_odd, up_even), [T, C // 8, 8, 8, 2]), [4, 1, 0, 3, 2])
    n = tl.arange(0, 16 * T * C)
    is_down = n < 8 * T * C
    end = n // 8 % (8 * T) == tl.where(is_down, 0, 8 * T - 1)
    source = tl.where(end, n, tl.where(is_down, n - 8, n + 8))
    received = tl.where(end, 0.0, tl.gather(tl.reshape(sent, [16 * T * C]), source, 0))
    received = tl.reshape(received, [2, C // 8, T, 8, 8])
    above_even, below_odd = tl.split(tl.reshape(tl.permute(received, [2, 1, 4, 3, 0]), [T, C, 8, 2]))
    above, below = tl.join(above_even, down_even), tl.join(up_odd, below_odd)
    return tl.reshape(above, [T, C, 16]), tl.reshape(below, [T, C, 16])


@triton.jit
def _settle(x, EXACT: tl.constexpr):
    """A float32 tile (T, C, 16), laid out as the tensor cores leave it: by a product with zeros.

    What has passed loads or an exchange only, the compiler would keep in their layout, and move every result of it
    through shared memory where tensor cores want it.
    """
    T: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if EXACT:
        return x
    return dot_add(tl.zeros([T, C, 16], tl.bfloat16), tl.zeros([T, 16, 16], tl.bfloat16), x)


@triton.jit
def _neighbours(h, before, after, EXACT: tl.constexpr):
    """`h[i - 1]` and `h[i + 1]`: rows of one tile (C, 16) move by products with shift matrices."""
    if len(h.shape) == 3:
        h = h.to(tl.float32)
        return _around(h, h)
    elif EXACT or h.dtype == tl.bfloat16:
        return dot(h, before), dot(h, after)
    else:
        high, low = _halves(h)
        return dot_add(high, before, dot(low, before)), dot_add(high, after, dot(low, after))


@triton.jit
def _mix(w0, w1, w2, z, no_left, no_right, h, before, after, EXACT: tl.constexpr):
    """What a line gets from the states `h` of the line before.

    With `b = 1 + exp(-logit)`, the sigmoids' ratio `1/bl : 1/bm : 1/br` is `bm br : bl br : bl bm`, so that one
    division is enough.
    """
    l, m, r = dot_add(w0, z, no_left), dot(w1, z), dot_add(w2, z, no_right)
    bl = 1 + _exp2(tl.minimum(l, _STEEPEST))
    bm = 1 + _exp2(tl.minimum(m, _STEEPEST))
    br = 1 + _exp2(tl.minimum(r, _STEEPEST))
    nl, nm, nr = bm * br, bl * br, bl * bm
    share = _inverse(tl.maximum(nl + nm + nr, nl * bl * _MIN_TOTAL))
    above, below = _neighbours(h, before, after, EXACT)
    return (nl * above + nm * h + nr * below) * share


@triton.jit
def _weights(pointer, T: tl.constexpr):
    """Weights (C, R), once for each of T tiles."""
    w = tl.load(pointer)
    return w if T == 1 else tl.broadcast_to(w[None], [T, w.shape[0], w.shape[1]])


@triton.jit
def _positions(T: tl.constexpr):
    """Rows of a tile (16,), or of T tiles (T, 16)."""
    p = tl.arange(0, 16)
    return p if T == 1 else tl.arange(0, T)[:, None] * 16 + p[None, :]


@triton.jit
def _rows_of_tile(n, batch, rows, tiles, halo, P: tl.constexpr, Q: tl.constexpr):
    """The first picture of the n-th tile; of its P rows, pictures after that, rows, if they exist and are its own."""
    p = _positions(P // 16)
    first = (n // tiles * (P // Q)).to(tl.int64)
    i = n % tiles * (Q - 2 * halo) - halo + p % Q
    inside = (i >= 0) & (i < rows) & (first + p // Q < batch)
    own = inside & (p % Q >= halo) & (p % Q < Q - halo)
    return first, p // Q, i, inside, own


@triton.jit
def _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i):
    """Pixels (P,) that the first line of sweep `k` reads, and the way to the next line's."""
    return _pick(k, o0, o1, o2, o3) + i * _pick(k, i0, i1, i2, i3), _pick(k, t0, t1, t2, t3).to(tl.int64)


@triton.jit
def _first_states(group, sweeps, blocks, block):
    """Number of the first sweep's states of a chunk among all, which are (groups, sweeps, blocks)."""
    return (group * blocks).to(tl.int64) * sweeps + block


@triton.jit
def _held_places(C: tl.constexpr, P: tl.constexpr):
    """Places of a tile (C, 16), or P // 16 of them, in what a line leaves in memory, (C, P).

    Contiguity is understated, so that threads access what they hold and exchange nothing.
    """
    T: tl.constexpr = P // 16
    places = _first(tl.arange(0, C), T) * P + _rows_second(_positions(T), T)
    return tl.max_contiguous(places, [1, 2] if T == 1 else [1, 1, 2])


@kernel(do_not_specialize=[
    "batch", "units", "rows", "lines", "chunk", "tiles", "segments", "halo", "sweeps",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_fwd_kernel(
    x, z, w, y, scratch, states, batch, units, pixels, rows, lines, chunk, tiles, segments, halo, w_width, sweeps,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    S: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, G: tl.constexpr,
    U: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of up to four sweeps on one block of C channels, P rows of the line, and the lines of one chunk.

    Maps are channels-last: x, y (B, pixels, units U), z (B, pixels, S). Pixel (row i, line t) of a sweep is read at
    `o + i * i_k + t * t_k` and written at `to + i * ti + t * tt`. Tiles are (C, 16), or (T, C, 16) for T warps. G
    sweeps walk together.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    channels = units * U
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks % segments
    b, j, i, inside, own = _rows_of_tile(tl.program_id(0) // (blocks * segments), batch, rows, tiles, halo, P, Q)
    T: tl.constexpr = P // 16
    before, after = _shifts(Q, low)
    zero = _zeros(C, 16, T)
    no_left = tl.where(_rows_second((i > 0) | (rows == 1), T), zero, _CLOSED)
    no_right = tl.where(_rows_second(i < rows - 1, T), zero, _CLOSED)
    c = block * C + tl.arange(0, C)
    s = tl.arange(0, R)
    mask = _rows_second(inside, T) & _first(c < channels, T)
    own_mask = _rows_second(own, T) & _first(c < channels, T)
    z_mask = _rows_second(inside, T) & _first(s % HALF < S, T)

    first = (segment * chunk).to(tl.int64)
    tt = tt.to(tl.int64)
    steps = tl.minimum(chunk, lines - segment * chunk)
    # Numbers of one picture are counted with 32 bits.
    j *= pixels
    target = _rows_second(j + to + i * ti, T)
    # (R, 16) or (T, R, 16): with half precision each number twice, for the two halves of a weight
    z_ptr = z + (b * pixels + first * tt) * S + (target * S + _first(s % HALF, T))
    y_ptr = y + (b * pixels + first * tt) * channels + (target * channels + _first(c, T))
    # w (sweeps, 6, w_width, R)
    w_j = R * w_width
    w += c[:, None] * R + s[None, :]
    x += b * pixels * channels
    scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C) + _held_places(C, P)
    if states is not None:
        states += _first_states(tl.program_id(0) // blocks, sweeps, blocks, block) * chunk * (P * C)
        states += _held_places(C, P)
    for k in range(0, sweeps, G):
        states_k = states
        if states is not None:
            states_k += (k * blocks).to(tl.int64) * chunk * (P * C)
        w_k = w + k * 6 * w_j
        w0, w1, w2 = _weights(w_k, T), _weights(w_k + w_j, T), _weights(w_k + 2 * w_j, T)
        w3, w4, w5 = _weights(w_k + 3 * w_j, T), _weights(w_k + 4 * w_j, T), _weights(w_k + 5 * w_j, T)
        at, across = _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i)
        x_ptr = x + first * across * channels + (_rows_second(j + at, T) * channels + _first(c, T))
        xn = tl.load(x_ptr, mask, 0.0)
        if G == 2:
            w_k += 6 * w_j
            v0, v1, v2 = _weights(w_k, T), _weights(w_k + w_j, T), _weights(w_k + 2 * w_j, T)
            v3, v4, v5 = _weights(w_k + 3 * w_j, T), _weights(w_k + 4 * w_j, T), _weights(w_k + 5 * w_j, T)
            at, x2_across = _sweep_pixels(k + 1, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i)
            x2_ptr = x + first * x2_across * channels + (_rows_second(j + at, T) * channels + _first(c, T))
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
                out = tl.load(scratch + t * (P * C)).to(tl.float32)
            h = dot(w3, zt) * xt + _mix(w0, w1, w2, zt, no_left, no_right, h, before, after, EXACT)
            if states is not None:
                tl.store(states_k + t * (P * C), h.to(states.dtype.element_ty))
            out += dot(w4, zt) * h
            out += dot(w5, zt) * xt
            if G == 2:
                xt = x2n.to(tl.float32)
                x2n = tl.load(x2_ptr + t_next * x2_across * channels, mask, 0.0)
                h2 = dot(v3, zt) * xt + _mix(v0, v1, v2, zt, no_left, no_right, h2, before, after, EXACT)
                if states is not None:
                    tl.store(states_k + (blocks.to(tl.int64) * chunk + t) * (P * C), h2.to(states.dtype.element_ty))
                out += dot(v4, zt) * h2
                out += dot(v5, zt) * xt
            if k + G < sweeps:
                tl.store(scratch + t * (P * C), out)
            else:
                if ADD:
                    out += tl.load(y_ptr + t * tt * channels, own_mask, 0.0).to(tl.float32)
                tl.store(y_ptr + t * tt * channels, out.to(y.dtype.element_ty), own_mask)


@triton.jit
def _proxy_line_gradients(
    z, x, gy, h, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right, EXACT: tl.constexpr
):  # fmt: skip
    """Gradients of one line: of `x`, of what goes to the states of the line before, and of the six coefficients.

    `h` are the states of the line before.
    """
    lam = dot(w3, z)
    g = gy * dot(w4, z) + carry
    g_x = g * lam + gy * dot(w5, z)
    al = tl.where(has_left, _inverse(1 + _exp2(dot(w0, z))), 0.0)
    am = _inverse(1 + _exp2(dot(w1, z)))
    ar = tl.where(has_right, _inverse(1 + _exp2(dot(w2, z))), 0.0)
    total = al + am + ar
    share = _inverse(tl.maximum(total, _MIN_TOTAL))
    if len(h.shape) == 3:
        h = _settle(h.to(tl.float32), EXACT)
    above, below = _neighbours(h, before, after, EXACT)
    h = h.to(tl.float32)
    if len(h.shape) == 3:
        above, below = _settle(above, EXACT), _settle(below, EXACT)
    mixed = (al * above + am * h + ar * below) * share
    mean = tl.where(total < _MIN_TOTAL, 0.0, mixed)
    share *= g
    sl, sm, sr = al * share, am * share, ar * share
    g_l = (above - mean) * (sl - sl * al)
    g_m = (h - mean) * (sm - sm * am)
    g_r = (below - mean) * (sr - sr * ar)
    if len(sr.shape) == 3:
        from_above, from_below = _around(sr, sl)
        carry = sm + from_above + from_below
    elif EXACT:
        carry = dot_add(sr, before, dot_add(sl, after, sm))
    else:
        sl_high, sl_low = _halves(sl)
        sr_high, sr_low = _halves(sr)
        carry = dot_add(sl_high, after, dot_add(sl_low, after, sm))
        carry = dot_add(sr_high, before, dot_add(sr_low, before, carry))
    return g_x, carry, g_l, g_m, g_r, g * x, gy * (lam * x + mixed), gy * x


@triton.jit
def _weights_gradient(g, z, gw, TWICE: tl.constexpr):
    """Adds what a coefficient's gradient (C, 16) makes of the gradient (C, V) of its weights."""
    if TWICE:
        high, low = _halves(g)
        return dot_add(high, z, dot_add(low, z, gw))
    else:
        return dot_add(g.to(z.dtype), z, gw)


@triton.jit
def _turned(g):
    """Rows first, channels second."""
    return tl.trans(g) if len(g.shape) == 2 else tl.trans(g, 0, 2, 1)


@triton.jit
def _proxy_gradient(g, v, gz, TWICE: tl.constexpr):
    """Adds what coefficients' gradients (C, 16) and weights (C, V) make of the proxy's gradient (16, V)."""
    if TWICE:
        high, low = _halves(g)
        return dot_add(_turned(high), v, dot_add(_turned(low), v, gz))
    else:
        return dot_add(_turned(g.to(v.dtype)), v, gz)


@triton.jit
def _sum_of_tiles(gw):
    return gw if len(gw.shape) == 2 else tl.sum(gw, 0)


@kernel(do_not_specialize=[
    "batch", "units", "rows", "lines", "chunk", "tiles", "halo", "groups", "segments", "workers",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_proxy_bwd_kernel(
    x, z, w, v, gy, gx, gz, gw, scratch, batch, units, pixels, rows, lines, chunk, tiles, halo, w_width,
    groups, segments, workers,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, V: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    Q: tl.constexpr, U: tl.constexpr, EXACT: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """Gradients from one sweep over one block of C channels of some groups.

    A group is one chunk of P rows. So that no two programs write to one place, gz has a leading axis of sweeps and
    blocks of channels, gw one of workers and gx one of sweeps.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    low: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    # A float16 gradient has more digits than one bfloat16.
    TWICE: tl.constexpr = z.dtype.element_ty == tl.float16
    channels = units * U
    blocks = tl.cdiv(channels, C)
    block = tl.program_id(0) % blocks
    k = tl.program_id(0) // blocks % K
    worker = tl.program_id(0) // (blocks * K)
    T: tl.constexpr = P // 16
    before, after = _shifts(Q, low)
    c = block * C + tl.arange(0, C)
    c_mask = _first(c < channels, T)
    gw_mask = (c < channels)[:, None]
    s = tl.arange(0, R)
    s_mask = _first(s % HALF < S, T)
    sv = tl.arange(0, V)
    sg = tl.arange(0, HALF)
    tt = tt.to(tl.int64)
    zero = _zeros(C, 16, T)
    # w (K, 6, w_width, R), v (K, 6, w_width, V), gw (workers, K, 6, w_width, V)
    w_j, v_j = R * w_width, V * w_width
    w += c[:, None] * R + s[None, :]
    # Contiguity is understated here and below, so that threads access what they hold and exchange nothing.
    gw += worker.to(tl.int64) * (K * 6) * v_j + tl.max_contiguous(c[:, None] * V + sv[None, :], [1, 2])
    v += c[:, None] * V + sv[None, :]
    if SAVED:
        scratch += _held_places(C, P)
    else:
        scratch += tl.program_id(0).to(tl.int64) * chunk * (P * C)
        scratch += _first(tl.arange(0, C), T) + _rows_second(_positions(T), T) * C
    w_k, v_k = w + k * 6 * w_j, v + k * 6 * v_j
    w0, w1, w2 = _weights(w_k, T), _weights(w_k + w_j, T), _weights(w_k + 2 * w_j, T)
    w3, w4, w5 = _weights(w_k + 3 * w_j, T), _weights(w_k + 4 * w_j, T), _weights(w_k + 5 * w_j, T)
    v0, v1, v2 = _weights(v_k, T), _weights(v_k + v_j, T), _weights(v_k + 2 * v_j, T)
    v3, v4, v5 = _weights(v_k + 3 * v_j, T), _weights(v_k + 4 * v_j, T), _weights(v_k + 5 * v_j, T)
    gw0 = _zeros(C, V, T)
    gw1, gw2, gw3, gw4, gw5 = gw0, gw0, gw0, gw0, gw0
    gz += ((k * blocks + block) * batch).to(tl.int64) * pixels * S
    gx += k * batch.to(tl.int64) * pixels * channels
    for group in range(worker, groups, workers):
        b, j, i, inside, own = _rows_of_tile(group // segments, batch, rows, tiles, halo, P, Q)
        # Numbers of one picture are counted with 32 bits.
        j *= pixels
        first = (group % segments * chunk).to(tl.int64)
        steps = tl.minimum(chunk, lines - group % segments * chunk)
        has_left = _rows_second((i > 0) | (rows == 1), T)
        has_right = _rows_second(i < rows - 1, T)
        mask = _rows_second(inside, T) & c_mask
        own_mask = _rows_second(own, T) & c_mask
        z_mask = _rows_second(inside, T) & s_mask
        own_z_mask = _rows_first(own, T) & _second(sv % HALF < S, T)
        gz_mask = _rows_first(own, T) & _second(sg < S, T)
        target, start = j + to + i * ti, b * pixels + first * tt
        z_at = _rows_second(target, T) * S + _first(s % HALF, T)
        own_z_at = _rows_first(target, T) * S + _second(sv % HALF, T)
        gy_at = _rows_second(target, T) * channels + _first(c, T)
        gz_at = tl.max_contiguous(_rows_first(target, T) * S + _second(sg, T), [1, 2] if T == 1 else [1, 1, 2])
        source, st = _sweep_pixels(k, o0, o1, o2, o3, i0, i1, i2, i3, t0, t1, t2, t3, i)
        source_start = b * pixels + first * st
        x_at = _rows_second(j + source, T) * channels + _first(c, T)
        carry = zero
        states = scratch
        if SAVED:
            states += (_first_states(group, K, blocks, block) + k * blocks) * chunk * (P * C)
        else:
            # What other threads read of the last group's states is overwritten.
            tl.debug_barrier()
            h = zero
            no_left, no_right = tl.where(has_left, zero, _CLOSED), tl.where(has_right, zero, _CLOSED)
            zn = tl.load(z + start * S + z_at, z_mask, 0.0)
            xn = tl.load(x + source_start * channels + x_at, mask, 0.0)
            for t in range(steps):
                zt, xt = zn, xn.to(tl.float32)
                t_next = tl.minimum(t + 1, steps - 1)
                zn = tl.load(z + (start + t_next * tt) * S + z_at, z_mask, 0.0)
                xn = tl.load(x + (source_start + t_next * st) * channels + x_at, mask, 0.0)
                h = dot(w3, zt) * xt + _mix(w0, w1, w2, zt, no_left, no_right, h, before, after, EXACT)
                tl.store(states + t * (P * C), h.to(scratch.dtype.element_ty))
            tl.debug_barrier()
        h_next = tl.load(states + tl.maximum(steps - 2, 0) * (P * C))
        for n in range(steps):
            t = steps - 1 - n
            to_t, from_t = start + t * tt, source_start + t * st
            zt = tl.load(z + to_t * S + z_at, z_mask, 0.0)
            own_z = tl.load(z + to_t * S + own_z_at, own_z_mask, 0.0)
            xt = tl.load(x + from_t * channels + x_at, mask, 0.0)
            xt = xt.to(tl.float32) if T > 1 else _hold(xt)
            gyt = tl.load(gy + to_t * channels + gy_at, mask, 0.0).to(tl.float32)
            if T > 1:
                xt, gyt = _settle(xt, EXACT), _settle(gyt, EXACT)
            # Read one line before it is needed. The first line is one of many: states of 0 cost less than a branch.
            state = tl.where(t > 0, h_next, 0.0)
            h_next = tl.load(states + tl.maximum(t - 2, 0) * (P * C))
            g_z = _zeros(16, V, T)
            if V > HALF:
                z_high, z_low = _halves(own_z.to(tl.float32))
                own_z = tl.where(_second(sv < HALF, T), z_high, z_low)
            g_x, carry, g0, g1, g2, g3, g4, g5 = _proxy_line_gradients(
                zt, xt, gyt, state, carry, w0, w1, w2, w3, w4, w5, before, after, has_left, has_right, EXACT
            )
            gw0 = _weights_gradient(g0, own_z, gw0, TWICE)
            gw1 = _weights_gradient(g1, own_z, gw1, TWICE)
            gw2 = _weights_gradient(g2, own_z, gw2, TWICE)
            g_z = _proxy_gradient(g1, v1, _proxy_gradient(g0, v0, g_z, TWICE), TWICE)
            g_z = _proxy_gradient(g2, v2, g_z, TWICE)
            gw3 = _weights_gradient(g3, own_z, gw3, TWICE)
            gw4 = _weights_gradient(g4, own_z, gw4, TWICE)
            gw5 = _weights_gradient(g5, own_z, gw5, TWICE)
            g_z = _proxy_gradient(g4, v4, _proxy_gradient(g3, v3, g_z, TWICE), TWICE)
            g_z = _proxy_gradient(g5, v5, g_z, TWICE)
            tl.store(gx + from_t * channels + x_at, g_x.to(gx.dtype.element_ty), own_mask)
            if V > HALF:
                g_z = tl.sum(tl.reshape(g_z, [16, 2, HALF] if T == 1 else [T, 16, 2, HALF]), 1 if T == 1 else 2)
            tl.store(gz + to_t * S + gz_at, g_z.to(gz.dtype.element_ty), gz_mask)
    gw += k * 6 * v_j
    tl.store(gw, _sum_of_tiles(gw0), gw_mask)
    tl.store(gw + v_j, _sum_of_tiles(gw1), gw_mask)
    tl.store(gw + 2 * v_j, _sum_of_tiles(gw2), gw_mask)
    tl.store(gw + 3 * v_j, _sum_of_tiles(gw3), gw_mask)
    tl.store(gw + 4 * v_j, _sum_of_tiles(gw4), gw_mask)
    tl.store(gw + 5 * v_j, _sum_of_tiles(gw5), gw_mask)


@kernel
def line_scan_pack_kernel(
    gates, lam, u, skip, w, v, channels, width, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
    EXACT: tl.constexpr, FRAGMENTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Weights of one coefficient as `w` (K, 6, width, R), gates times -log2(e), and `v` (K, 6, width, V) if V > 0.

    Unless EXACT, `w` is in two halves, and so is `v` if it is as wide. FRAGMENTS has `w` in fragments,
    (K, blocks, 6, R * 16), and `v` (K, 6, V, width).
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
    if FRAGMENTS:
        w += ((k * (width // 16) + c // 16) * 6 + j) * (R * 16) + fragment_place(c, s, R, EXACT)
    else:
        w += row * R + s
    _store_halves(w, value * scale, s < HALF, c < width)
    if V > 0:
        v += (tl.program_id(0) * V + s) * width + c if FRAGMENTS else row * V + s
        _store_halves(v, value, s < HALF, (c < width) & (s < V))


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
        self.short = _is_short(self.height, self.width)
        self.exact, self.most = _is_exact(self.x, proxy), _most_rows(self.x, proxy)
        # Gradients of float32 products are more than the registers of a warp hold.
        self.local = 1 <= self.chunk <= 2 and not (self.exact and with_gradients)
        fragments = self.local or self.short and not with_gradients
        self.x, self.proxy = _pixels(self.x), _pixels(proxy.float() if self.exact else proxy)
        half = max(8, next_power_of_2(self.rank))
        # Channels are a multiple of it, which a compiler needs to know.
        self.unit = math.gcd(self.channels, self.C)
        self.R = max(16, half) if self.exact else 2 * half
        # bfloat16 holds all of a bfloat16 proxy, and weights well enough for gradients.
        enough = self.proxy.dtype == torch.bfloat16 and half >= NARROWEST.value
        self.V = half if enough else self.R
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
            K=self.k, S=self.rank, R=self.R, V=self.V if with_gradients else 0, EXACT=self.exact, FRAGMENTS=fragments,
            C=64,
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

    def lengths(self, direction: str) -> tuple[int, int]:
        """Rows and lines of a sweep."""
        turned = self.aligned and direction in ("down", "up")
        return (self.width, self.height) if turned else (self.height, self.width)

    def tiling(self, direction: str) -> tuple[int, int, int, int, int, int, int, int]:
        """Rows of a tile, of a picture in it, and of the line; lines, and of a chunk; tiles, chunks, rows shared."""
        rows, lines = self.lengths(direction)
        chunk = min(self.chunk or lines, lines)
        P, halo = _tile(rows, chunk, self.most)
        Q = min(P, next_power_of_2(rows)) if halo == 0 else P
        return P, Q, rows, lines, chunk, cdiv(rows, Q - 2 * halo), cdiv(lines, chunk), halo

    def _resources(self, P: int, light: bool) -> tuple[int, dict]:
        """Programs that run at a time, and options of their launch: with 168 registers, three warps fit a scheduler."""
        registers = 128 if P == 256 else 168 if light and not self.exact else 255
        warps = 4 * {128: 4, 168: 3, 255: 2}[registers]
        return warps * 16 // P * processors(self.x), _options(P // 16, registers)

    def _small_options(self, registers: int) -> dict:
        """Options of a launch for tiles of pairs of rows: float32's products take more registers than a warp has."""
        return _options(2 if self.exact else 1, registers if self.R == 16 and not self.exact else 255)

    def _sources(self, directions: list[str]) -> list[int]:
        frames = [v for d in directions for v in frame(d, self.height, self.width)]
        return frames + [0] * (12 - len(frames))

    def forward(self, states: Tensor | None = None) -> Tensor:
        """The output; fills `states`, see `to_save`."""
        groups = list(self.groups())
        y = torch.empty_like(self.x, dtype=torch.float32 if len(groups) > 1 else self.x.dtype)
        for k, directions, x, target in groups:
            arguments = (*target, *self._sources(directions))
            if self.local:
                rows, lines = self.lengths(directions[0])
                tiles = cdiv(cdiv(rows, 2) * cdiv(lines, self.chunk), PAIRS)
                line_scan_local_fwd_kernel[(self.blocks * tiles * self.batch,)](
                    x, self.proxy, self.w[k:], y, self.channels // self.unit, self.height * self.width, rows, lines,
                    self.chunk, tiles, len(directions), *arguments,
                    S=self.rank, R=self.R, U=self.unit, EXACT=self.exact, ADD=k > 0,
                    num_stages=1, **self._small_options(128),
                )  # fmt: skip
                continue
            together = 2 if len(directions) % 2 == 0 else 1
            if self.short:
                rows, lines = self.lengths(directions[0])
                chunk = min(self.chunk or lines, lines)
                Q, segments = next_power_of_2(cdiv(rows, 2)), cdiv(lines, chunk)
                programs = self.blocks * cdiv(self.batch * Q, PAIRS) * segments
                scratch = y
                if len(directions) > together:
                    scratch = y.new_empty(programs, chunk, 2 * PAIRS, self.C, dtype=torch.float32)
                line_scan_short_fwd_kernel[(programs,)](
                    x, self.proxy, self.w[k:], y, scratch, states, self.batch, self.channels // self.unit,
                    self.height * self.width, rows, lines, chunk, segments, len(directions), *arguments,
                    S=self.rank, R=self.R, Q=Q, G=together, U=self.unit, EXACT=self.exact, ADD=k > 0,
                    num_stages=1, **self._small_options(168),
                )  # fmt: skip
                continue
            P, Q, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
            programs = self.blocks * cdiv(self.batch * Q, P) * tiles * segments
            if P == 256:
                # Two sweeps need more registers than a thread of 16 warps can have.
                together = 1
            scratch = y
            if len(directions) > together:
                scratch = y.new_empty(programs, chunk, P, self.C, dtype=torch.float32)
            line_scan_proxy_fwd_kernel[(programs,)](
                x, self.proxy, self.w[k:], y, scratch, states, self.batch, self.channels // self.unit,
                self.height * self.width, rows, lines, chunk, tiles, segments, halo, self.w_width, len(directions),
                *arguments,
                S=self.rank, R=self.R, P=P, C=self.C, Q=Q, G=together, U=self.unit, EXACT=self.exact, ADD=k > 0,
                num_stages=2, **self._resources(P, light=True)[1],
            )  # fmt: skip
        return _map(y, self.height).to(self.x.dtype)

    def _local_backward(
        self, x: Tensor, gy: Tensor, gx: Tensor, gz: Tensor, k: int, directions: list[str], target: tuple, _: None
    ) -> tuple[Tensor, int]:  # fmt: skip
        """As `_backward`, for chunks of one or two lines."""
        rows, lines = self.lengths(directions[0])
        segments = cdiv(lines, self.chunk)
        halo = int(rows > 2 * PAIRS)
        Q = min(PAIRS, next_power_of_2(cdiv(rows, 2)))
        tiles = cdiv(rows, 2 * (PAIRS - 1)) if halo else 1
        per = cdiv(segments, self.SPAN)
        span = cdiv(segments, per)
        groups = self.batch * tiles * per
        options = self._small_options(255)
        # Two warps a scheduler: they are to hide each other's latency, and more would have too few registers.
        workers = _workers(groups, self.blocks * len(directions), 8 // options["num_warps"] * processors(self.x))
        part = x.new_empty(workers, len(directions), 6, self.w_width, self.V, dtype=torch.float32)
        line_scan_local_bwd_kernel[(self.blocks * len(directions) * workers,)](
            x, self.proxy, self.w[k:], self.v[k:], gy, gx, gz, part, self.batch, self.channels // self.unit,
            self.height * self.width, rows, lines, self.chunk, tiles, halo, groups, per, span, workers, *target,
            *self._sources(directions),
            K=len(directions), S=self.rank, R=self.R, V=self.V, Q=Q, U=self.unit, num_stages=1, **options,
        )  # fmt: skip
        return part, workers

    def _backward(
        self, x: Tensor, gy: Tensor, gx: Tensor, gz: Tensor, k: int, directions: list[str], target: tuple,
        states: Tensor | None,
    ) -> tuple[Tensor, int]:  # fmt: skip
        """Launches one group of sweeps; returns gradients of weights, one a worker, and the number of workers."""
        P, Q, rows, lines, chunk, tiles, segments, halo = self.tiling(directions[0])
        groups = cdiv(self.batch * Q, P) * tiles * segments
        slots, options = self._resources(P, light=P == 16 and self.V < self.R)
        workers = _workers(groups, self.blocks * len(directions), slots)
        part = x.new_empty(workers, len(directions), 6, self.w_width, self.V, dtype=torch.float32)
        scratch = states
        if states is None:
            scratch = x.new_empty(self.blocks * len(directions) * workers, chunk, P, self.C, dtype=gz.dtype)
        line_scan_proxy_bwd_kernel[(self.blocks * len(directions) * workers,)](
            x, self.proxy, self.w[k:], self.v[k:], gy, gx, gz, part, scratch, self.batch, self.channels // self.unit,
            self.height * self.width, rows, lines, chunk, tiles, halo, self.w_width, groups, segments, workers, *target,
            *self._sources(directions),
            K=len(directions), S=self.rank, R=self.R, V=self.V, P=P, C=self.C, Q=Q, U=self.unit, EXACT=self.exact,
            SAVED=states is not None, **options,
        )  # fmt: skip
        return part, workers

    def backward(self, gy: Tensor, join: Join | None, states: Tensor | None = None) -> list[Tensor]:
        """Gradients of x, of the weights, and of the proxy."""
        gy = _pixels(gy)
        pixels = self.height * self.width
        sweeps = list(self.groups())
        # So that nothing has to be added in memory: one gradient of the proxy a sweep and block of channels, and one of
        # x a sweep. The sums are taken in float32.
        rounded = torch.bfloat16 if self.w.dtype == torch.bfloat16 else torch.float32
        gz = gy.new_empty(self.k, self.blocks, self.batch, pixels, self.rank, dtype=rounded)
        gx = gy.new_empty(self.k, *self.x.shape, dtype=self.x.dtype)
        turned_gx = None
        g_gates, *others = (t.new_empty(t.shape) for t in self.weights)
        for k, directions, x, target in sweeps:
            launch = self._local_backward if self.local else self._backward
            part, workers = launch(x, gy, gx[k:], gz[k:], k, directions, target, states)
            if x is not self.x:
                turned = from_map_frame(_map(gx[k], self.height).float(), self.directions[k])
                turned_gx = turned if turned_gx is None else turned_gx + turned
            line_scan_unpack_kernel[(6 * len(directions), self.blocks)](
                part, g_gates[:, k:], *(t[k:] for t in others), self.channels, self.w_width, workers,
                g_gates.stride(0), K=len(directions), S=self.rank, HALF=self.R if self.exact else self.R // 2,
                V=self.V, C=self.C, N=16,
            )  # fmt: skip
        g_proxy = _sum(gz.flatten(0, 1), self.proxy.dtype)
        if turned_gx is not None:
            gx = _pixels(turned_gx)[None]
        if join is not None:
            total = join(gx, g_proxy)
        else:
            total = _sum(gx, gx.dtype) if len(gx) > 1 else gx[0]
        return [_map(total, self.height), g_gates, *others, _map(g_proxy, self.height)]


def _options(warps: int, registers: int) -> dict:
    """Options of a launch: warps of a program, and the most registers of a thread."""
    return dict(num_warps=warps) | at_most(registers)


def _sum(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first axis, taken in float32."""
    if maps[0].numel() < _LARGE:
        return maps.sum(0).to(dtype)
    total = maps.new_empty(maps.shape[1:], dtype=dtype)
    sum_maps(maps, total)
    return total


def _is_exact(x: Tensor, proxy: Tensor) -> bool:
    """Whether products are float32's."""
    return x.dtype != proxy.dtype or x.dtype == torch.float32


def _most_rows(x: Tensor, proxy: Tensor) -> int:
    """Rows of the largest tiles that all GPUs have the shared memory for."""
    half = max(8, next_power_of_2(int(proxy.shape[1])))
    if _is_exact(x, proxy):
        return 1024 // max(16, half)
    return (2048 if x.dtype == torch.bfloat16 else 1024) // half


def _is_short(height: int, width: int) -> bool:
    """Whether all lines fit one tile of pairs of rows."""
    return max(height, width) <= 2 * PAIRS


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H * W, C), a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _map(x: Tensor, height: int) -> Tensor:
    """The inverse of `_pixels`."""
    return x.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def _tile(rows: int, chunk: int, most: int) -> tuple[int, int] | None:
    """Rows of a tile, no more than `most`, and how many it shares with the next; None where lines are too long for it.

    Every line after the first of a chunk spoils one row more at a tile's ends.
    """
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= most]
    options = [(P, 0) for P in sizes if rows <= P]
    options += [(P, chunk - 1) for P in sizes if rows > P and P - 2 * (chunk - 1) >= P // 2]
    # In larger tiles more warps wait for each other.
    return min(options, key=lambda o: cdiv(rows, o[0] - 2 * o[1]) * o[0] * (128 + o[0]), default=None)


def _workers(groups: int, each: int, slots: int) -> int:
    """Programs that share `groups` equal pieces of work, where `each` such teams run in `slots` places at a time.

    The least that take about the shortest time, one wave of programs after the other.
    """
    best, shortest = 1, None
    for waves in range(1, 17):
        most = min(groups, max(1, waves * slots // each))
        share = cdiv(groups, max(1, most))
        workers = cdiv(groups, max(1, share))
        time = cdiv(each * workers, slots) * share
        if shortest is None or time < 0.97 * shortest:
            best, shortest = workers, time
    return best


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def suits(args: tuple) -> bool:
    """Whether the kernels of this file have the form asked for."""
    x, _, _, u, skip, proxy, _, chunk, normalize, aligned = args
    if proxy is None or u is None or skip is None or not normalize or not 1 <= proxy.shape[1] <= 32:
        return False
    # Numbers also where a compiler traces with symbols.
    height, width = map(int, x.shape[2:])
    sizes = {(height, width), (width, height) if aligned else (height, width)}
    most = _most_rows(x, proxy)
    for rows, lines in sizes:
        # Pictures that share a tile, within which places are counted with 32 bits.
        pictures = 16 // min(16, next_power_of_2(rows))
        if _tile(rows, min(chunk or lines, lines), most) is None or pictures * x.shape[1] * rows * lines >= 1 << 31:
            return False
    return True


def to_save(*args) -> list[Tensor]:
    """States of all sweeps over long chunks, (groups of rows, K, blocks of channels, chunk, C, P) in bfloat16.

    Only where all sweeps are one launch, and bfloat16 are the digits that gradients need.
    """
    x, directions, chunk, aligned = args[0], args[6], args[7], args[9]
    batch, channels = x.shape[:2]
    height, width = map(int, x.shape[2:])
    chunk = min(chunk or width, width)
    if x.dtype != torch.bfloat16 or aligned or height != width or len(directions) > 4 or chunk <= 2:
        return []
    P, halo = _tile(height, chunk, _most_rows(x, args[5]))
    Q = min(P, next_power_of_2(height)) if halo == 0 else P
    groups = cdiv(batch * Q, P) * cdiv(height, Q - 2 * halo) * cdiv(width, chunk)
    return [x.new_empty(groups, len(directions), cdiv(channels, _Launch.C), chunk, _Launch.C, P)]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    return _Launch(args, with_gradients=False).forward(*saved)


def backward(grads: list[Tensor], *args, join: Join | None = None, saved: Sequence[Tensor] = ()) -> list[Tensor]:
    """Gradients; that of x is what `join` makes of all sweeps' and of the proxy's, without it their sum."""
    if not saved and _is_short(*grads[0].shape[2:]):
        # As a forward would have, to the bit.
        saved = to_save(*args)
        if saved:
            forward(*args, saved=saved)
    return _Launch(args, with_gradients=True).backward(grads[0], join, *saved)
