"""GPU kernels of the line scan with a proxy: for chunks of one or two lines, and forward for lines of up to 16 rows.

A tile is 8 pairs of rows and 16 channels of a line, in one warp; even and odd rows are tiles (8, 16) of their own. A
thread has four channels of an even row and of the odd one after it: as the tensor cores leave them in its registers, as
it reads and writes them in memory, and where a row finds one of its two neighbours. So nothing passes through shared
memory but what is transposed for the weights' gradients. The orders of rows and channels that this takes are written
below as reshapes and permutations, which are right however a compiler lays tiles out.

Names end in `e` for even rows and in `o` for odd ones, after the number of the line in its chunk.
"""

import triton
import triton.language as tl

from .._triton import PTX, dot, dot_add, kernel, load_apart, store_apart
from ._triton_common import (
    _CLOSED,
    _MIN_TOTAL,
    _STEEPEST,
    _exp2,
    _halves,
    _inverse,
    _pick,
)

# Pairs of rows of a tile, and its channels.
PAIRS = 8
CHANNELS = 16
_P = tl.constexpr(PAIRS)
_C = tl.constexpr(CHANNELS)
# log2 of `_MIN_TOTAL`.
_LOG_MIN = tl.constexpr(-23.253496664211536)


@triton.jit
def _unpaired(even, odd):
    """Even and odd rows (P, N) -> (2 P, N), as the first factor of a product: first all even rows, then the odd."""
    N: tl.constexpr = even.shape[1]
    return tl.reshape(tl.permute(tl.join(even, odd), [2, 0, 1]), [2 * _P, N])


@triton.jit
def _paired(rows):
    """The inverse of `_unpaired`."""
    N: tl.constexpr = rows.shape[1]
    return tl.split(tl.permute(tl.reshape(rows, [2, _P, N]), [1, 2, 0]))


@triton.jit
def _expanded(product):
    """A product with a `_fragment`, (2 P, C) -> even and odd rows (P, C), channels in the map's order."""
    x = tl.reshape(product, [2, _P, 2, 4, 2])
    return tl.split(tl.reshape(tl.permute(x, [1, 3, 2, 4, 0]), [_P, _C, 2]))


@triton.jit
def _collapsed(even, odd):
    """The inverse of `_expanded`."""
    x = tl.reshape(tl.join(even, odd), [_P, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [4, 0, 2, 1, 3]), [2 * _P, _C])


@triton.jit
def _fragment(pointer, R: tl.constexpr):
    """Weights (R, C), which lie in memory as the threads of a warp need them, see `fragment_place`."""
    x = tl.load(pointer + tl.arange(0, R * _C))
    # step of the product, channel, pair of proxy channels, half of the channels, half of a weight, proxy channel
    x = tl.reshape(x, [R // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(x, [0, 2, 4, 5, 3, 1]), [R, _C])


@triton.jit
def fragment_place(c, r, R: tl.constexpr, EXACT: tl.constexpr):
    """Where the r-th of a channel's R weights lies in the fragment of its block."""
    if EXACT:
        k = r
    else:
        half: tl.constexpr = R // 2
        k = r % half // 2 * 4 + r // half * 2 + r % 2
    c %= 16
    # The tensor cores give a thread columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: they are to be channels 4 t to 4 t + 3.
    column = c // 4 * 2 + c % 2
    return k // 16 * 256 + ((column * 4 + k % 16 // 4) * 2 + c // 2 % 2) * 4 + k % 4


@triton.jit
def _distinct(x, zero):
    """`x` as something else for a compiler, who would make copies of a tile that is in a product twice."""
    if PTX and x.dtype != tl.float32:
        zeros = tl.zeros(x.shape, tl.int16) + zero.to(tl.int16)
        return tl.inline_asm_elementwise("add.s32 $0, $1, $2;", "=r,r,r", [x, zeros], x.dtype, True, 2)
    else:
        return x


@triton.jit
def _proxy(even, odd, zero, EXACT: tl.constexpr):
    """A proxy's rows (P, S) as a product's first factor, in half precision twice, for both halves of a weight."""
    x = _unpaired(even, odd)
    if EXACT:
        return x
    else:
        N: tl.constexpr = 2 * x.shape[1]
        twice = tl.reshape(tl.join(x, _distinct(x, zero)), [2 * _P, N // 4, 2, 2])
        return tl.reshape(tl.permute(twice, [0, 1, 3, 2]), [2 * _P, N])


@triton.jit
def _wide(x):
    """In float32; bfloat16 with one instruction a number."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, True, 2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _load(pointer, step, even, odd):
    """Even rows, and the odd ones, which are a step on."""
    return load_apart(pointer, even, 0.0), load_apart(pointer + step, odd, 0.0)


@triton.jit
def _store(pointer, step, even_rows, odd_rows, even, odd):
    store_apart(pointer, even_rows.to(pointer.dtype.element_ty), even)
    store_apart(pointer + step, odd_rows.to(pointer.dtype.element_ty), odd)


@triton.jit
def _mixed(l, m, r, above, h, below):
    """What a pixel gets from its neighbours' states, from logits times -log2(e), plus log2 of the least total.

    As `_mix` in `_triton_proxy`, with `b` and the sum both in units of the least total.
    """
    steepest: tl.constexpr = _STEEPEST.value + _LOG_MIN.value
    bl = _MIN_TOTAL + _exp2(tl.minimum(l, steepest))
    bm = _MIN_TOTAL + _exp2(tl.minimum(m, steepest))
    br = _MIN_TOTAL + _exp2(tl.minimum(r, steepest))
    nm = bl * br
    total = (bl + br) * bm + nm
    mixed = (br * above + bl * below) * bm + nm * h
    return mixed * _inverse(tl.maximum(total, nm * bm))


@kernel(do_not_specialize=[
    "units", "pixels", "rows", "lines", "chunk", "tiles", "sweeps",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_local_fwd_kernel(
    x, z, w, y, units, pixels, rows, lines, chunk, tiles, sweeps,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    S: tl.constexpr, R: tl.constexpr, U: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of up to four sweeps on one block of channels and 8 pairs of rows, in all lines of their chunks.

    Maps are channels-last: x, y (B, pixels, units U), z (B, pixels, S). Pixel (row i, line t) of a sweep is read at
    `o + i * i_k + t * t_k` and written at `to + i * ti + t * tt`. w (sweeps, blocks, 6, R C) are fragments. A
    picture's pairs are counted along the rows of one chunk after the other, and no tile needs rows of another: the
    neighbours' states are those of a chunk's first line, which are a product of what lies in memory.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    W: tl.constexpr = R * _C
    channels = units * U
    blocks = tl.cdiv(channels, _C)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    x += b * pixels * channels
    y += b * pixels * channels
    z += b * pixels * S
    w += block * (6 * W)
    c = block * _C + tl.arange(0, _C)[None, :]
    s = tl.arange(0, HALF)[None, :]
    # Numbers of one picture are counted with 32 bits.
    pair = (tl.program_id(0) // blocks % tiles * _P + tl.arange(0, _P))[:, None]
    pairs = tl.cdiv(rows, 2)
    i = pair % pairs * 2
    t = pair // pairs * chunk
    even = t < lines
    odd = even & (i + 1 < rows)
    above = even & (i > 0)
    below = even & (i + 2 < rows)
    second = (chunk > 1) & (t + 1 < lines)
    logits = tl.full([_P, _C], _LOG_MIN, tl.float32)
    no_left = _collapsed(tl.where((i > 0) | (rows == 1), logits, _CLOSED), logits)
    no_right = _collapsed(tl.where(i + 1 < rows, logits, _CLOSED), tl.where(i + 2 < rows, logits, _CLOSED))
    logits = _collapsed(logits, logits)
    target = to + i * ti + t * tt
    zero = rows >> 31
    z += target * S + s
    z_mask = s < S
    z0e, z0o = _load(z, ti * S, even & z_mask, odd & z_mask)
    z1e, z1o = _load(z + tt * S, ti * S, even & second & z_mask, odd & second & z_mask)
    zre, zro = _load(z - ti * S, 3 * ti * S, above & z_mask, below & z_mask)
    z0, z1 = _proxy(z0e, z0o, zero, EXACT), _proxy(z1e, z1o, zero, EXACT)
    z_around = _proxy(zre, zro, zero, EXACT)
    mask = c < channels
    even, odd, above, below = even & mask, odd & mask, above & mask, below & mask
    even1, odd1 = even & second, odd & second
    y0e = tl.zeros([_P, _C], tl.float32)
    y0o, y1e, y1o = y0e, y0e, y0e
    for k in range(sweeps):
        o = _pick(k, o0, o1, o2, o3) * channels
        down, across = _pick(k, i0, i1, i2, i3) * channels, _pick(k, t0, t1, t2, t3) * channels
        x_k = x + (o + i * down + t * across + c)
        x0e, x0o = _load(x_k, down, even, odd)
        x1e, x1o = _load(x_k + across, down, even1, odd1)
        xre, xro = _load(x_k - down, 3 * down, above, below)
        x0e, x0o, x1e, x1o, xre, xro = _wide(x0e), _wide(x0o), _wide(x1e), _wide(x1o), _wide(xre), _wide(xro)
        w_k = w + k * blocks * (6 * W)
        lam, u, skip = _fragment(w_k + 3 * W, R), _fragment(w_k + 4 * W, R), _fragment(w_k + 5 * W, R)
        ce, co = _expanded(dot(z0, lam))
        he, ho = ce * x0e, co * x0o
        ce, co = _expanded(dot(z0, u))
        y0e += ce * he
        y0o += co * ho
        ce, co = _expanded(dot(z0, skip))
        y0e += ce * x0e
        y0o += co * x0o
        ce, co = _expanded(dot(z_around, lam))
        hre, hro = ce * xre, co * xro
        le, lo = _expanded(dot_add(z1, _fragment(w_k, R), no_left))
        me, mo = _expanded(dot_add(z1, _fragment(w_k + W, R), logits))
        re, ro = _expanded(dot_add(z1, _fragment(w_k + 2 * W, R), no_right))
        ce, co = _expanded(dot(z1, lam))
        h1e = ce * x1e + _mixed(le, me, re, hre, he, ho)
        h1o = co * x1o + _mixed(lo, mo, ro, he, ho, hro)
        ce, co = _expanded(dot(z1, u))
        y1e += ce * h1e
        y1o += co * h1o
        ce, co = _expanded(dot(z1, skip))
        y1e += ce * x1e
        y1o += co * x1o
    y += target * channels + c
    down, across = ti * channels, tt * channels
    if ADD:
        beforee, beforeo = _load(y, down, even, odd)
        y0e += beforee.to(tl.float32)
        y0o += beforeo.to(tl.float32)
        beforee, beforeo = _load(y + across, down, even1, odd1)
        y1e += beforee.to(tl.float32)
        y1o += beforeo.to(tl.float32)
    _store(y, down, y0e, y0o, even, odd)
    _store(y + across, down, y1e, y1o, even1, odd1)


@triton.jit
def _moved(x, STEP: tl.constexpr):
    """The rows (P, C) of the pairs that are STEP on, those at the ends from the other end.

    As tiles of one number a thread, so that each is one shuffle.
    """
    source = (tl.arange(0, 4 * _P) + 4 * STEP) & (4 * _P - 1)
    first, second = tl.split(tl.reshape(x, [4 * _P, 2, 2]))
    a, b = tl.split(first)
    c, d = tl.split(second)
    first = tl.join(tl.gather(a, source, 0), tl.gather(b, source, 0))
    second = tl.join(tl.gather(c, source, 0), tl.gather(d, source, 0))
    return tl.reshape(tl.join(first, second), [_P, _C])


@triton.jit
def _line(z, xe, xo, he, ho, no_left, no_right, logits, i, rows, w):
    """States of a line, from those of the line before, and its outputs; `w` are six fragments."""
    le, lo = _expanded(dot_add(z, w[0], no_left))
    me, mo = _expanded(dot_add(z, w[1], logits))
    re, ro = _expanded(dot_add(z, w[2], no_right))
    above = tl.where(i > 0, _moved(ho, -1), 0.0)
    below = tl.where(i + 2 < rows, _moved(he, 1), 0.0)
    ce, co = _expanded(dot(z, w[3]))
    ne, no = ce * xe + _mixed(le, me, re, above, he, ho), co * xo + _mixed(lo, mo, ro, he, ho, below)
    ce, co = _expanded(dot(z, w[4]))
    skip_e, skip_o = _expanded(dot(z, w[5]))
    return ne, no, ce * ne + skip_e * xe, co * no + skip_o * xo


@triton.jit
def _fragments(w, R: tl.constexpr):
    """Of all six coefficients of a sweep, w (6, R C)."""
    W: tl.constexpr = R * _C
    first = (_fragment(w, R), _fragment(w + W, R), _fragment(w + 2 * W, R))
    return first + (_fragment(w + 3 * W, R), _fragment(w + 4 * W, R), _fragment(w + 5 * W, R))


@kernel(do_not_specialize=[
    "batch", "units", "pixels", "rows", "lines", "chunk", "segments", "sweeps",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_short_fwd_kernel(
    x, z, w, y, scratch, states, batch, units, pixels, rows, lines, chunk, segments, sweeps,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    S: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, U: tl.constexpr, EXACT: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Outputs of up to four sweeps on one block of channels, and the lines of one chunk of 8 / Q pictures.

    As `line_scan_local_fwd_kernel`, but for lines of no more than 2 Q rows, whose states a tile holds; G sweeps walk
    together. What they leave is as in `line_scan_proxy_fwd_kernel`.
    """
    HALF: tl.constexpr = R if EXACT else R // 2
    W: tl.constexpr = R * _C
    SIZE: tl.constexpr = 2 * _P.value * _C.value
    channels = units * U
    blocks = tl.cdiv(channels, _C)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    segment = group % segments
    b = (group // segments * (_P // Q)).to(tl.int64)
    pair = tl.arange(0, _P)[:, None]
    i = pair % Q * 2
    here = b + pair // Q < batch
    even, odd = here & (i < rows), here & (i + 1 < rows)
    c = block * _C + tl.arange(0, _C)[None, :]
    s = tl.arange(0, HALF)[None, :]
    z_even, z_odd = even & (s < S), odd & (s < S)
    even, odd = even & (c < channels), odd & (c < channels)
    logits = tl.full([_P, _C], _LOG_MIN, tl.float32)
    no_left = _collapsed(tl.where((i > 0) | (rows == 1), logits, _CLOSED), logits)
    no_right = _collapsed(tl.where(i + 1 < rows, logits, _CLOSED), tl.where(i + 2 < rows, logits, _CLOSED))
    logits = _collapsed(logits, logits)
    zero = rows >> 31
    first = (segment * chunk).to(tl.int64)
    steps = tl.minimum(chunk, lines - segment * chunk)
    tt = tt.to(tl.int64)
    # Numbers of one picture are counted with 32 bits.
    picture = pair // Q * pixels
    target = picture + to + i * ti
    z += (b * pixels + first * tt) * S + (target * S + s)
    y += (b * pixels + first * tt) * channels + (target * channels + c)
    x += b * pixels * channels
    w += block * (6 * W)
    # scratch (programs, chunk, 2, P, C), states (groups, sweeps, blocks, chunk, C, 2 P)
    scratch += tl.program_id(0).to(tl.int64) * chunk * SIZE + (pair * _C + tl.arange(0, _C)[None, :])
    if states is not None:
        states += (group.to(tl.int64) * sweeps * blocks + block) * chunk * SIZE
        held = tl.arange(0, _C)[None, :, None] * (2 * _P) + pair[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        # Contiguity is understated, so that threads access what they hold and exchange nothing.
        states += tl.max_contiguous(held, [1, 1, 2])
    for k in range(0, sweeps, G):
        w_k = _fragments(w + k * blocks * (6 * W), R)
        down, across = _pick(k, i0, i1, i2, i3) * channels, _pick(k, t0, t1, t2, t3).to(tl.int64) * channels
        x_k = x + first * across + ((picture + _pick(k, o0, o1, o2, o3)) * channels + i * down + c)
        xe, xo = _load(x_k, down, even, odd)
        he = tl.zeros([_P, _C], tl.float32)
        ho, h2e, h2o = he, he, he
        if G == 2:
            v_k = _fragments(w + (k + 1) * blocks * (6 * W), R)
            down2 = _pick(k + 1, i0, i1, i2, i3) * channels
            across2 = _pick(k + 1, t0, t1, t2, t3).to(tl.int64) * channels
            x2_k = x + first * across2 + ((picture + _pick(k + 1, o0, o1, o2, o3)) * channels + i * down2 + c)
            x2e, x2o = _load(x2_k, down2, even, odd)
        ze, zo = _load(z, ti * S, z_even, z_odd)
        for t in range(steps):
            z_t, xte, xto = _proxy(ze, zo, zero, EXACT), _wide(xe), _wide(xo)
            # The next line's maps are read while this one computes.
            t_next = tl.minimum(t + 1, steps - 1)
            ze, zo = _load(z + t_next * tt * S, ti * S, z_even, z_odd)
            xe, xo = _load(x_k + t_next * across, down, even, odd)
            he, ho, ye, yo = _line(z_t, xte, xto, he, ho, no_left, no_right, logits, i, rows, w_k)
            if states is not None:
                at = states + ((k * blocks).to(tl.int64) * chunk + t) * SIZE
                tl.store(at, tl.join(he, ho).to(states.dtype.element_ty))
            if G == 2:
                xte, xto = _wide(x2e), _wide(x2o)
                x2e, x2o = _load(x2_k + t_next * across2, down2, even, odd)
                h2e, h2o, y2e, y2o = _line(z_t, xte, xto, h2e, h2o, no_left, no_right, logits, i, rows, v_k)
                if states is not None:
                    at = states + (((k + 1) * blocks).to(tl.int64) * chunk + t) * SIZE
                    tl.store(at, tl.join(h2e, h2o).to(states.dtype.element_ty))
                ye += y2e
                yo += y2o
            sum_t = scratch + t * SIZE
            if k > 0:
                ye += tl.load(sum_t)
                yo += tl.load(sum_t + _P * _C)
            if k + G < sweeps:
                tl.store(sum_t, ye)
                tl.store(sum_t + _P * _C, yo)
            else:
                y_t = y + t * tt * channels
                if ADD:
                    before_e, before_o = _load(y_t, ti * channels, even, odd)
                    ye += before_e.to(tl.float32)
                    yo += before_o.to(tl.float32)
                _store(y_t, ti * channels, ye, yo, even, odd)


@triton.jit
def _product(a, b):
    """Of tiles as they were loaded; of bfloat16 ones rounded once, two numbers at a time."""
    if PTX and a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        zeros = tl.full(a.shape, -0.0, tl.bfloat16)
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, zeros], tl.bfloat16, True, 2
        )
    else:
        return a.to(tl.float32) * b.to(tl.float32)


@triton.jit
def _beside(a, b):
    """(N, M) and (N, M) -> (N, 2 M)."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _through_gates(l, m, r, g, own, above, h, below):
    """A pixel's state, of which `own` is not its neighbours', and gradients: of their states, and of its logits."""
    al, am, ar = _inverse(1 + _exp2(l)), _inverse(1 + _exp2(m)), _inverse(1 + _exp2(r))
    total = al + am + ar
    share = _inverse(tl.maximum(total, _MIN_TOTAL))
    mixed = (al * above + am * h + ar * below) * share
    mean = tl.where(total < _MIN_TOTAL, 0.0, mixed)
    share *= g
    sl, sm, sr = al * share, am * share, ar * share
    g_l = (above - mean) * (sl - sl * al)
    g_m = (h - mean) * (sm - sm * am)
    g_r = (below - mean) * (sr - sr * ar)
    return own + mixed, sl, sm, sr, g_l, g_m, g_r


@triton.jit
def _contract(g, z, v, gw, gz, TWICE: tl.constexpr):
    """Adds what coefficients' gradients g (2 P, N) make of those of weights (N, V), and of the proxy (2 P, V)."""
    if TWICE:
        high, low = _halves(g)
        gw = dot_add(tl.trans(high), z, dot_add(tl.trans(low), z, gw))
        gz = dot_add(high, v, dot_add(low, v, gz))
    else:
        gw = dot_add(tl.trans(g), z, gw)
        gz = dot_add(g, v, gz)
    return gw, gz


@triton.jit
def _own_proxy(even, odd, own_even, own_odd, TWICE: tl.constexpr):
    """A proxy's rows (2 P, V), 0 but for those that count, TWICE as the two halves of a number."""
    x = _unpaired(tl.where(own_even, even, 0.0), tl.where(own_odd, odd, 0.0))
    if TWICE:
        high, low = _halves(x.to(tl.float32))
        return _beside(high, low)
    else:
        return x


@triton.jit
def _store_proxy(pointer, step, gz, even, odd, HALF: tl.constexpr):
    """Gradients (2 P, V), the sum of both halves if there are two."""
    if gz.shape[1] > HALF:
        gz = tl.sum(tl.reshape(gz, [2 * _P, 2, HALF]), 1)
    even_rows, odd_rows = _paired(gz)
    _store(pointer, step, even_rows, odd_rows, even, odd)


@triton.jit
def _line_of_chunk(n, first, count, lane, chunk, lines, Q: tl.constexpr):
    """The first line of the n-th chunks of a group, of which a tile has 8 / Q; `lines` where there is none."""
    if Q == _P:
        return (first + n) * chunk
    else:
        turn = n * (_P // Q) + lane // Q
        return tl.where(turn < count, (first + turn) * chunk, lines)


@triton.jit
def _load_two(pointer, across, down, even, odd, in0, in1):
    """Even and odd rows of a chunk's first and second line."""
    e0, o0 = _load(pointer, down, even & in0, odd & in0)
    e1, o1 = _load(pointer + across, down, even & in1, odd & in1)
    return e0, o0, e1, o1


@kernel(do_not_specialize=[
    "batch", "units", "pixels", "rows", "lines", "chunk", "tiles", "halo", "groups", "per", "span", "workers",
    "to", "ti", "tt", "o0", "i0", "t0", "o1", "i1", "t1", "o2", "i2", "t2", "o3", "i3", "t3",
])  # fmt: skip
def line_scan_local_bwd_kernel(
    x, z, w, v, gy, gx, gz, gw, batch, units, pixels, rows, lines, chunk, tiles, halo, groups, per, span, workers,
    to, ti, tt, o0, i0, t0, o1, i1, t1, o2, i2, t2, o3, i3, t3,
    K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, V: tl.constexpr, Q: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Gradients from one sweep over one block of channels of some groups.

    A group is `span` chunks of one tile of rows, which has `per` groups; Q of its pairs are of one chunk. With a
    `halo`, the first and the last row count only for what they hand on to the others. So that no two programs write to
    one place, gz has a leading axis of sweeps and blocks of channels, gw one of workers and gx one of sweeps.
    """
    HALF: tl.constexpr = R // 2
    W: tl.constexpr = R * _C
    # A float16 gradient has more digits than one bfloat16.
    TWICE: tl.constexpr = z.dtype.element_ty == tl.float16
    kept: tl.constexpr = tl.float32 if TWICE else tl.bfloat16
    AT_ONCE: tl.constexpr = _P.value // Q
    channels = units * U
    blocks = tl.cdiv(channels, _C)
    block = tl.program_id(0) % blocks
    k = tl.program_id(0) // blocks % K
    worker = tl.program_id(0) // (blocks * K)
    width = blocks * _C
    zero = rows >> 31
    c = block * _C + tl.arange(0, _C)
    c_mask = (c < channels)[None, :]
    s = tl.arange(0, HALF)[None, :]
    s_mask = s < S
    sv = tl.arange(0, V)
    w += (k * blocks + block) * (6 * W)
    w0, w1, w2 = _fragment(w, R), _fragment(w + W, R), _fragment(w + 2 * W, R)
    w3, w4, w5 = _fragment(w + 3 * W, R), _fragment(w + 4 * W, R), _fragment(w + 5 * W, R)
    # v (K, 6, V, width)
    v_j = V * width
    v += k * 6 * v_j + sv[:, None] * width + c[None, :]
    v_lam, v_u, v_skip = tl.load(v + 3 * v_j), tl.load(v + 4 * v_j), tl.load(v + 5 * v_j)
    v_last = tl.trans(_beside(_beside(tl.load(v), tl.load(v + v_j)), _beside(tl.load(v + 2 * v_j), v_u)))
    v_out, v_in, v_lam = tl.trans(_beside(v_u, v_skip)), tl.trans(_beside(v_lam, v_skip)), tl.trans(v_lam)
    # Of first lines: u and skip, lambda. Of second lines: lambda and skip, gates and u.
    gw_out = tl.zeros([2 * _C, V], tl.float32)
    gw_lam = tl.zeros([_C, V], tl.float32)
    gw_in = gw_out
    gw_last = tl.zeros([4 * _C, V], tl.float32)
    gz += ((k * blocks + block) * batch).to(tl.int64) * pixels * S
    gx += k * batch.to(tl.int64) * pixels * channels
    start = _pick(k, o0, o1, o2, o3) * channels
    down, across = _pick(k, i0, i1, i2, i3) * channels, _pick(k, t0, t1, t2, t3) * channels
    y_down, y_across, z_down, z_across = ti * channels, tt * channels, ti * S, tt * S
    lane = tl.arange(0, _P)[:, None]
    pair = lane % Q
    logits = tl.zeros([_P, _C], tl.float32)
    for group in range(worker, groups, workers):
        b = (group // (per * tiles)).to(tl.int64)
        first = group % per * span
        count = tl.minimum(span, tl.cdiv(lines, chunk) - first)
        # Numbers of one picture are counted with 32 bits.
        i = group // per % tiles * (2 * Q - 2 * halo) - halo + 2 * pair
        even, odd = (i >= 0) & (i < rows), (i >= -1) & (i + 1 < rows)
        own_even, own_odd = even & (pair >= halo), odd & (pair < Q - halo)
        no_left = _collapsed(tl.where((i > 0) | (rows == 1), logits, _CLOSED), tl.where(i >= 0, logits, _CLOSED))
        no_right = _collapsed(tl.where(i + 1 < rows, logits, _CLOSED), tl.where(i + 2 < rows, logits, _CLOSED))
        x_at = start + i * down + c[None, :]
        y_at = (to + i * ti) * channels + c[None, :]
        z_at = (to + i * ti) * S + s
        z_b, gz_b = z + b * pixels * S + z_at, gz + b * pixels * S + z_at
        x_b, gx_b = x + b * pixels * channels + x_at, gx + b * pixels * channels + x_at
        gy_b = gy + b * pixels * channels + y_at
        x_even, x_odd, z_even, z_odd = even & c_mask, odd & c_mask, even & s_mask, odd & s_mask
        steps = tl.cdiv(count, AT_ONCE)
        t = _line_of_chunk(0, first, count, lane, chunk, lines, Q)
        in0, in1 = t < lines, (chunk > 1) & (t + 1 < lines)
        nz0e, nz0o, nz1e, nz1o = _load_two(z_b + t * z_across, z_across, z_down, z_even, z_odd, in0, in1)
        nx0e, nx0o, nx1e, nx1o = _load_two(x_b + t * across, across, down, x_even, x_odd, in0, in1)
        ny0e, ny0o, ny1e, ny1o = _load_two(gy_b + t * y_across, y_across, y_down, x_even, x_odd, in0, in1)
        for n in range(steps):
            z0e, z0o, z1e, z1o = nz0e, nz0o, nz1e, nz1o
            x0e, x0o, x1e, x1o = nx0e, nx0o, nx1e, nx1o
            gy0e, gy0o, gy1e, gy1o = ny0e, ny0o, ny1e, ny1o
            # The next chunk's maps are read while this one computes.
            t = _line_of_chunk(tl.minimum(n + 1, steps - 1), first, count, lane, chunk, lines, Q)
            in0, in1 = t < lines, (chunk > 1) & (t + 1 < lines)
            nz0e, nz0o, nz1e, nz1o = _load_two(z_b + t * z_across, z_across, z_down, z_even, z_odd, in0, in1)
            nx0e, nx0o, nx1e, nx1o = _load_two(x_b + t * across, across, down, x_even, x_odd, in0, in1)
            ny0e, ny0o, ny1e, ny1o = _load_two(gy_b + t * y_across, y_across, y_down, x_even, x_odd, in0, in1)
            t = _line_of_chunk(n, first, count, lane, chunk, lines, Q)
            in0, in1 = t < lines, (chunk > 1) & (t + 1 < lines)
            z0, z1 = _proxy(z0e, z0o, zero, False), _proxy(z1e, z1o, zero, False)
            own_z0 = _own_proxy(z0e, z0o, own_even, own_odd, V > HALF)
            own_z1 = _own_proxy(z1e, z1o, own_even, own_odd, V > HALF)
            gx_t = gx_b + t * across
            gz_t = gz_b + t * z_across

            # The first line's states, and gradients of its weights of u and skip.
            lam_e, lam_o = _expanded(dot(z0, w3))
            he, ho = lam_e * _wide(x0e), lam_o * _wide(x0o)
            g_out = _beside(
                _unpaired(_wide(gy0e) * he, _wide(gy0o) * ho).to(kept),
                _unpaired(_product(x0e, gy0e), _product(x0o, gy0o)).to(kept),
            )
            # The second line, which no other gets anything from.
            g_skip = _unpaired(_product(x1e, gy1e), _product(x1o, gy1o)).to(kept)
            x1e, x1o, gy1e, gy1o = _wide(x1e), _wide(x1o), _wide(gy1e), _wide(gy1o)
            ce, co = _expanded(dot(z1, w4))
            ge, go = gy1e * ce, gy1o * co
            lam_e, lam_o = _expanded(dot(z1, w3))
            ce, co = _expanded(dot(z1, w5))
            even1, odd1 = own_even & in1, own_odd & in1
            g_xe, g_xo = ge * lam_e + gy1e * ce, go * lam_o + gy1o * co
            _store(gx_t + across, down, g_xe, g_xo, even1 & c_mask, odd1 & c_mask)
            g_in = _beside(_unpaired(ge * x1e, go * x1o).to(kept), g_skip)
            g_z0 = tl.zeros([2 * _P, V], tl.float32)
            g_z1 = g_z0
            # Always. Unless they are in a block of their own, the compiler puts these products off to the loop's end,
            # and runs out of registers for their factors.
            if first + n < lines:
                gw_out, g_z0 = _contract(g_out, own_z0, v_out, gw_out, g_z0, TWICE)
                gw_in, g_z1 = _contract(g_in, own_z1, v_in, gw_in, g_z1, TWICE)
            le, lo = _expanded(dot_add(z1, w0, no_left))
            me, mo = _expanded(dot(z1, w1))
            re, ro = _expanded(dot_add(z1, w2, no_right))
            h1e, sle, sme, sre, g0e, g1e, g2e = _through_gates(le, me, re, ge, lam_e * x1e, _moved(ho, -1), he, ho)
            h1o, slo, smo, sro, g0o, g1o, g2o = _through_gates(lo, mo, ro, go, lam_o * x1o, he, ho, _moved(he, 1))
            g_last = _beside(
                _beside(_unpaired(g0e, g0o).to(kept), _unpaired(g1e, g1o).to(kept)),
                _beside(_unpaired(g2e, g2o).to(kept), _unpaired(gy1e * h1e, gy1o * h1o).to(kept)),
            )
            gw_last, g_z1 = _contract(g_last, own_z1, v_last, gw_last, g_z1, TWICE)
            _store_proxy(gz_t + z_across, z_down, g_z1, even1 & s_mask, odd1 & s_mask, HALF)

            # The first line, which gets what the second hands back: within a pair, or from one pair up or down.
            even0, odd0 = own_even & in0, own_odd & in0
            gy0e, gy0o = _wide(gy0e), _wide(gy0o)
            ce, co = _expanded(dot(z0, w4))
            ge = gy0e * ce + (sme + slo + _moved(sro, -1))
            go = gy0o * co + (smo + sre + _moved(sle, 1))
            lam_e, lam_o = _expanded(dot(z0, w3))
            ce, co = _expanded(dot(z0, w5))
            g_xe, g_xo = ge * lam_e + gy0e * ce, go * lam_o + gy0o * co
            _store(gx_t, down, g_xe, g_xo, even0 & c_mask, odd0 & c_mask)
            g_lam = _unpaired(ge * _wide(x0e), go * _wide(x0o)).to(kept)
            gw_lam, g_z0 = _contract(g_lam, own_z0, v_lam, gw_lam, g_z0, TWICE)
            _store_proxy(gz_t, z_down, g_z0, even0 & s_mask, odd0 & s_mask, HALF)
    # gw (workers, K, 6, width, V)
    gw += (worker.to(tl.int64) * K + k) * 6 * v_j + c[:, None] * V + sv[None, :]
    gates, gates_and_u = tl.split(tl.permute(tl.reshape(gw_last, [2, 2 * _C, V]), [1, 2, 0]))
    g0, g1 = tl.split(tl.permute(tl.reshape(gates, [2, _C, V]), [1, 2, 0]))
    g2, g4 = tl.split(tl.permute(tl.reshape(gates_and_u, [2, _C, V]), [1, 2, 0]))
    g3, g5 = tl.split(tl.permute(tl.reshape(gw_in, [2, _C, V]), [1, 2, 0]))
    first_g4, first_g5 = tl.split(tl.permute(tl.reshape(gw_out, [2, _C, V]), [1, 2, 0]))
    tl.store(gw, g0)
    tl.store(gw + v_j, g1)
    tl.store(gw + 2 * v_j, g2)
    tl.store(gw + 3 * v_j, g3 + gw_lam)
    tl.store(gw + 4 * v_j, g4 + first_g4)
    tl.store(gw + 5 * v_j, g5 + first_g5)
