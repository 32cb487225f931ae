"""GPU kernels of the line scan with stored coefficients: long chunks, one row of the line a thread."""

import triton
import triton.language as tl

from .._triton import LOG2E, kernel, load_apart, pack, store_apart
from ._triton_common import _MIN_TOTAL, _STEEPEST, _exp2, _inverse

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
    """Columns (R,) of a tile (R, W), in the sweep's order. A thread holds all columns of its rows.

    By halves, not by even and odd columns: where columns have to move between threads, they do so all at once.
    """
    columns = (tile,)
    if W >= 2:
        columns = _halve(columns, R, W, 1)
    if W >= 4:
        columns = _halve(columns, R, W // 2, 2)
    if W >= 8:
        columns = _halve(columns, R, W // 4, 4)
    if W >= 16:
        columns = _halve(columns, R, W // 8, 8)
    ordered = ()
    for j in tl.static_range(W):
        ordered = ordered + (tl.reshape(columns[W - 1 - j if REVERSE else j], [R]),)
    return ordered


@triton.jit
def _interleave(tiles, R: tl.constexpr, W: tl.constexpr, n: tl.constexpr):
    """`n` tiles (R, 2 W): the even columns are those of one of the first `n` tiles (R, W), the odd ones of the others'.

    Nothing is permuted: what has to move between threads, moves in the whole tile.
    """
    wholes = ()
    for k in tl.static_range(n):
        wholes = wholes + (tl.reshape(tl.join(tiles[k], tiles[k + n]), [R, 2 * W]),)
    return wholes


@triton.jit
def _stack(columns, R: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr):
    """The inverse of `_unstack`."""
    tiles = ()
    for j in tl.static_range(W):
        tiles = tiles + (tl.reshape(columns[W - 1 - j if REVERSE else j], [R, 1]),)
    if W >= 16:
        tiles = _interleave(tiles, R, W // 16, 8)
    if W >= 8:
        tiles = _interleave(tiles, R, W // 8, 4)
    if W >= 4:
        tiles = _interleave(tiles, R, W // 4, 2)
    if W >= 2:
        tiles = _interleave(tiles, R, W // 2, 1)
    return tiles[0]


@triton.jit
def _put(words, line, SECOND: tl.constexpr, LOW_FIRST: tl.constexpr, dtype: tl.constexpr, V: tl.constexpr):
    """Words with a float32 line more, rounded to `dtype`: where two lines make a word, that waits for the SECOND."""
    if dtype.primitive_bitwidth == 32 or V == 1:
        return words + (line.to(dtype),)
    elif not SECOND:
        return words + (line,)
    elif LOW_FIRST:
        return words[:-1] + (pack(words[-1], line, dtype),)
    else:
        return words[:-1] + (pack(line, words[-1], dtype),)


@triton.jit
def _get(words, j: tl.constexpr, REVERSE: tl.constexpr, dtype: tl.constexpr, V: tl.constexpr):
    """Line j in float32."""
    if dtype.primitive_bitwidth == 32 or V == 1:
        return words[j].to(tl.float32)
    else:
        word = words[j // 2]
        high: tl.constexpr = (j % 2 == 1) != REVERSE
        if dtype == tl.float16:
            half = (word >> 16 if high else word).to(tl.int16)
            return half.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return (word & -65536 if high else word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _veil(words, zero):
    """The same words. The compiler can't know, and computes what it got from them again instead of keeping it."""
    veiled = ()
    for j in tl.static_range(len(words)):
        bits = words[j].to(tl.int16 if words[j].dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)
        veiled = veiled + ((bits ^ zero.to(bits.dtype)).to(words[j].dtype, bitcast=True),)
    return veiled


@triton.jit
def _around(down, up, index, has_left, has_right, R: tl.constexpr, ROW: tl.constexpr):
    """`down[i - 1]` and `up[i + 1]` of lines (R,), 0 outside the map, in one exchange between threads."""
    before, after = tl.maximum(index - ROW, 0), tl.minimum(index + ROW, R - 1)
    if R <= 32:
        above, below = tl.split(tl.gather(tl.join(down, up), tl.join(before, after), 0))
    else:
        # One behind the other, as they lie in the threads' registers: in pairs they would be brought into order first.
        both = tl.reshape(tl.permute(tl.join(down, up), [1, 0]), [2 * R])
        source = tl.reshape(tl.permute(tl.join(before, R + after), [1, 0]), [2 * R])
        above, below = tl.split(tl.permute(tl.reshape(tl.gather(both, source, 0), [2, R]), [1, 0]))
    return tl.where(has_left, above, 0.0), tl.where(has_right, below, 0.0)


@triton.jit
def _fresh(j: tl.constexpr, phase, chunk, SHORT: tl.constexpr):
    """Whether line `j` of a block, whose first is line `phase` of its chunk, is the first of a chunk."""
    if SHORT:
        return (phase + j) % chunk == 0
    elif j == 0:
        return phase == 0
    else:
        return phase + j == chunk


@triton.jit
def _rows(
    sequences, channels, rows, segments, halo, N: tl.constexpr, P: tl.constexpr,
    ROWS_INNER: tl.constexpr, BANDS: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Of a program's N * P rows: index, sequence and row (R,), place, which exist and are own (R, 1), neighbours (R,).

    A place is picture, channel and row (R, 1). If maps have LINES they are contiguous, and a place is the picture and
    channel of the first map, and how many rows from its start: one number for all tensors.
    """
    n = tl.program_id(0) // segments
    first = n * N
    index = tl.arange(0, N * P)
    if ROWS_INNER:
        p, q = index % P, index // P
    else:
        p, q = index // N, index % N
    i, own = p, p < rows
    if BANDS:
        bands = tl.cdiv(rows, P - 2 * halo)
        first = n // bands * N
        i += n % bands * (P - 2 * halo) - halo
        own = (p >= halo) & (p < P - halo)
    mask = (i >= 0) & (i < rows) & (first + q < sequences)
    own = mask & own
    if LINES > 0:
        b, d = (first // channels).to(tl.int64), (first % channels).to(tl.int64)
        place = (b, d, (i if N == 1 else q * ROWS + i).to(tl.int64)[:, None])
        q += first
    else:
        q += first
        place = ((q // channels).to(tl.int64)[:, None], (q % channels).to(tl.int64)[:, None], i.to(tl.int64)[:, None])
    return index, q, i, place, mask[:, None], own[:, None], i > 0, i < rows - 1


@triton.jit
def _start(tensor, place, b, d, i, V: tl.constexpr, LINES: tl.constexpr):
    """Where the rows of a place begin in a tensor with strides b, d and i, or if maps have LINES the first map."""
    start = place[0] * b + place[1] * d
    if LINES == 0:
        start += place[2] * i
    return tensor + start * V


@triton.jit
def _tile(
    n, k: tl.constexpr, place, units, stride, mask, SIZE: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, LINES: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Offsets (1 or R, T / SIZE) of tile k, in the sweep's order, of block n, in words of SIZE lines; which exist."""
    first = units * (V // SIZE) - (n + 1) * (W // SIZE) if REVERSE else n * (W // SIZE)
    w = first + (W // T - 1 - k if REVERSE else k) * (T // SIZE) + tl.arange(0, T // SIZE)[None, :]
    if not WHOLE:
        mask = mask & (w >= 0) & (w < units * (V // SIZE))
    if LINES > 0:
        return place[2] * (LINES // SIZE) + w, mask
    elif V == 1:
        return w * stride.to(tl.int64), mask
    else:
        return w, mask


@triton.jit
def _read(
    start, n, place, units, stride, mask, R: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, LINES: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Words (R,) of the W lines of block n, in the sweep's order: two lines each, if they are 32 bits together.

    Read in tiles of T lines, of a sweep over `units` times V lines.
    """
    SIZE: tl.constexpr = 2 if start.dtype.element_ty.primitive_bitwidth == 16 and V > 1 else 1
    if SIZE == 2:
        start = start.to(tl.pointer_type(tl.int32), bitcast=True)
    words = ()
    for k in tl.static_range(W // T):
        at, exists = _tile(n, k, place, units, stride, mask, SIZE, W, V, T, LINES, REVERSE, WHOLE)
        words = words + _unstack(load_apart(start + at, exists, 0), R, T // SIZE, REVERSE)
    return words


@triton.jit
def _write(
    start, words, n, place, units, stride, mask, R: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, LINES: tl.constexpr, REVERSE: tl.constexpr, WHOLE: tl.constexpr,
    BACK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The inverse of `_read`, of the words of a block's first lines. If BACK, the last of these words comes first."""
    SIZE: tl.constexpr = 2 if start.dtype.element_ty.primitive_bitwidth == 16 and V > 1 else 1
    COUNT: tl.constexpr = len(words)
    if SIZE == 2:
        start = start.to(tl.pointer_type(tl.int32), bitcast=True)
    for k in tl.static_range(W // T):
        at, exists = _tile(n, k, place, units, stride, mask, SIZE, W, V, T, LINES, REVERSE, WHOLE)
        part = ()
        for j in tl.static_range(k * (T // SIZE), (k + 1) * (T // SIZE)):
            # Lines that no map has any more may be anything.
            part = part + (words[(COUNT - 1 - j if BACK else j) if j < COUNT else 0],)
        tile = _stack(part, R, T // SIZE, REVERSE)
        if ADD:
            tile += load_apart(start + at, exists, 0)
        store_apart(start + at, tile, exists)


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "units", "chunk", "first", "last", "segments", "span", "halo", "count",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "y_b", "y_d", "y_i", "y_w",
])  # fmt: skip
def line_scan_fwd_kernel(
    x, gates, lam, u, skip, y, borders, before, after,
    sequences, channels, rows, units, chunk, first, last, segments, span, halo, count,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, y_b, y_d, y_i, y_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr, SHORT: tl.constexpr,
    BANDS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr,
    OUTPUTS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """OUTPUTS of one sweep, and the states before EVERY so many blocks (0: none), for blocks `first` to `last`.

    A program has one segment of the blocks of W lines, and P rows of N maps (a picture's channel each). Strides (but
    those across lines, `_w`) and the number of lines are in units of V, so that the compiler sees how many numbers can
    be read at once; T of them are. Blocks are WHOLE if they are inside the map. LINES and ROWS are those of contiguous
    maps (ROWS if a program has several), else 0. If BANDS, P rows are a band of the map's and overlap `halo` rows of
    the next at each end, which every line spoils one row more of; states then come from `before` and go to `after`,
    (sequences, rows). `borders` are (sequences, count, rows).
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    X: tl.constexpr = x.dtype.element_ty
    G: tl.constexpr = gates.dtype.element_ty
    segment = tl.program_id(0) % segments
    index, q, i, place, mask, own, has_left, has_right = _rows(
        sequences, channels, rows, segments, halo, N, P, ROWS_INNER, BANDS, ROWS, LINES
    )
    has_first = has_left | (rows == 1)
    x = _start(x, place, x_b, x_d, x_i, V, LINES)
    gates = _start(gates, place, g_b, g_d, g_i, V, LINES)
    g_n = g_n.to(tl.int64) * V
    lam = _start(lam, place, lam_b, lam_d, lam_i, V, LINES)
    u = _start(u, place, u_b, u_d, u_i, V, LINES)
    skip = _start(skip, place, skip_b, skip_d, skip_i, V, LINES)
    y = _start(y, place, y_b, y_d, y_i, V, LINES)
    h = tl.zeros([R], tl.float32)
    start = first + segment * span
    line = q.to(tl.int64) * rows + i
    if BANDS:
        h = tl.load(before + line, tl.reshape(mask, [R]) & (start > 0), 0.0)
    for n in range(start, tl.minimum(start + span, last)):
        if EVERY > 0:
            border = borders + (q.to(tl.int64) * count + n // EVERY) * rows + i
            tl.store(border, h, tl.reshape(own, [R]) & (n % EVERY == 0))
        xs = _read(x, n, place, units, x_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        lams = _read(lam, n, place, units, lam_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        ls = _read(gates, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        ms = _read(gates + g_n, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        rs = _read(gates + 2 * g_n, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        us, skips = xs, xs
        if OUTPUTS and HAS_U:
            us = _read(u, n, place, units, u_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        if OUTPUTS and HAS_SKIP:
            skips = _read(skip, n, place, units, skip_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        phase = n * W % chunk
        outs = ()
        for j in tl.static_range(W):
            l, m, r = _get(ls, j, REVERSE, G, V), _get(ms, j, REVERSE, G, V), _get(rs, j, REVERSE, G, V)
            above, below = _around(h, h, index, has_left, has_right, R, ROW)
            if NORMALIZE:
                l, m, r, share, _, _, _, _, _ = _open_gates(l, m, r, has_first, has_right)
                mixed = (l * above + m * h + r * below) * share
            else:
                mixed = l * above + m * h + r * below
            xj = _get(xs, j, REVERSE, X, V)
            lamj = _get(lams, j, REVERSE, lam.dtype.element_ty, V)
            h = lamj * xj + tl.where(_fresh(j, phase, chunk, SHORT), 0.0, mixed)
            if OUTPUTS:
                out = h
                if HAS_U:
                    out *= _get(us, j, REVERSE, u.dtype.element_ty, V)
                if HAS_SKIP:
                    out += _get(skips, j, REVERSE, skip.dtype.element_ty, V) * xj
                outs = _put(outs, out, j % 2 == 1, not REVERSE, y.dtype.element_ty, V)
        if OUTPUTS:
            _write(y, outs, n, place, units, y_w, own, R, W, V, T, LINES, REVERSE, WHOLE, False, ADD)
    if BANDS:
        tl.store(after + line, h, tl.reshape(own, [R]))


@kernel(do_not_specialize=[
    "sequences", "channels", "rows", "units", "chunk", "first", "last", "segments", "span", "halo", "count",
    "x_b", "x_d", "x_i", "x_w", "g_b", "g_n", "g_d", "g_i", "g_w", "lam_b", "lam_d", "lam_i", "lam_w",
    "u_b", "u_d", "u_i", "u_w", "skip_b", "skip_d", "skip_i", "skip_w", "gy_b", "gy_d", "gy_i", "gy_w",
    "gx_b", "gx_d", "gx_i", "gx_w", "gg_b", "gg_n", "gg_d", "gg_i", "gg_w", "gc_b", "gc_d", "gc_i", "gc_w",
])  # fmt: skip
def line_scan_bwd_kernel(
    x, gates, lam, u, skip, gy, gx, g_gates, g_lam, g_u, g_skip, borders, before, after,
    sequences, channels, rows, units, chunk, first, last, segments, span, halo, count,
    x_b, x_d, x_i, x_w, g_b, g_n, g_d, g_i, g_w, lam_b, lam_d, lam_i, lam_w, u_b, u_d, u_i, u_w,
    skip_b, skip_d, skip_i, skip_w, gy_b, gy_d, gy_i, gy_w, gx_b, gx_d, gx_i, gx_w,
    gg_b, gg_n, gg_d, gg_i, gg_w, gc_b, gc_d, gc_i, gc_w,
    N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, V: tl.constexpr, T: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, ROWS_INNER: tl.constexpr, REVERSE: tl.constexpr, SHORT: tl.constexpr,
    BANDS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_U: tl.constexpr, HAS_SKIP: tl.constexpr, ADD: tl.constexpr,
    BLOCKS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of one sweep, from block `last` back to `first`; arguments as in the forward.

    A block's states are computed again, from `borders` or, if the sweep is a single block (no BLOCKS), from zero; LAST
    is how many lines of a block there are at most. What passes between launches is the gradient of the last block's
    states.
    """
    R: tl.constexpr = N * P
    ROW: tl.constexpr = 1 if ROWS_INNER else N
    X: tl.constexpr = x.dtype.element_ty
    G: tl.constexpr = gates.dtype.element_ty
    segment = tl.program_id(0) % segments
    index, q, i, place, mask, own, has_left, has_right = _rows(
        sequences, channels, rows, segments, halo, N, P, ROWS_INNER, BANDS, ROWS, LINES
    )
    has_first = has_left | (rows == 1)
    x = _start(x, place, x_b, x_d, x_i, V, LINES)
    gates = _start(gates, place, g_b, g_d, g_i, V, LINES)
    g_n = g_n.to(tl.int64) * V
    lam = _start(lam, place, lam_b, lam_d, lam_i, V, LINES)
    u = _start(u, place, u_b, u_d, u_i, V, LINES)
    skip = _start(skip, place, skip_b, skip_d, skip_i, V, LINES)
    gy = _start(gy, place, gy_b, gy_d, gy_i, V, LINES)
    gx = _start(gx, place, gx_b, gx_d, gx_i, V, LINES)
    g_gates = _start(g_gates, place, gg_b, gg_d, gg_i, V, LINES)
    gg_n = gg_n.to(tl.int64) * V
    g_lam = _start(g_lam, place, gc_b, gc_d, gc_i, V, LINES)
    g_u = _start(g_u, place, gc_b, gc_d, gc_i, V, LINES)
    g_skip = _start(g_skip, place, gc_b, gc_d, gc_i, V, LINES)
    start = first + segment * span
    stop = tl.minimum(start + span, last)
    carry = tl.zeros([R], tl.float32)
    line = q.to(tl.int64) * rows + i
    if BANDS:
        carry = tl.load(before + line, tl.reshape(mask, [R]) & (stop * W < units * V), 0.0)
    for back in range(stop - start if BLOCKS else 1):
        n = stop - 1 - back if BLOCKS else 0
        xs = _read(x, n, place, units, x_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        lams = _read(lam, n, place, units, lam_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        ls = _read(gates, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        ms = _read(gates + g_n, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        rs = _read(gates + 2 * g_n, n, place, units, g_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        gys = _read(gy, n, place, units, gy_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        us, skips = xs, xs
        if HAS_U:
            us = _read(u, n, place, units, u_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        if HAS_SKIP:
            skips = _read(skip, n, place, units, skip_w, mask, R, W, V, T, LINES, REVERSE, WHOLE)
        phase = n * W % chunk
        h = tl.zeros([R], tl.float32)
        if BLOCKS:
            h = tl.load(borders + (q.to(tl.int64) * count + n) * rows + i, tl.reshape(mask, [R]), 0.0)
        # States before every line, their neighbours among them.
        states, aboves, belows = (), (), ()
        for j in tl.static_range(LAST):
            above, below = _around(h, h, index, has_left, has_right, R, ROW)
            states = _put(states, h, j % 2 == 1, True, X, W)
            aboves = _put(aboves, above, j % 2 == 1, True, X, W)
            belows = _put(belows, below, j % 2 == 1, True, X, W)
            l, m, r = _get(ls, j, REVERSE, G, V), _get(ms, j, REVERSE, G, V), _get(rs, j, REVERSE, G, V)
            if NORMALIZE:
                l, m, r, share, _, _, _, _, _ = _open_gates(l, m, r, has_first, has_right)
                mixed = (l * above + m * h + r * below) * share
            else:
                mixed = l * above + m * h + r * below
            h = _get(lams, j, REVERSE, lam.dtype.element_ty, V) * _get(xs, j, REVERSE, X, V)
            h += tl.where(_fresh(j, phase, chunk, SHORT), 0.0, mixed)
        # A block's open gates would fill the registers.
        zero = sequences >> 31
        ls, ms, rs = _veil(ls, zero), _veil(ms, zero), _veil(rs, zero)
        # Lines from the last to the first
        g_xs, g_lams, g_ls, g_ms, g_rs, g_us, g_skips = (), (), (), (), (), (), ()
        for j in tl.static_range(LAST - 1, -1, -1):
            xj, gyj = _get(xs, j, REVERSE, X, V), _get(gys, j, REVERSE, gy.dtype.element_ty, V)
            lamj = _get(lams, j, REVERSE, lam.dtype.element_ty, V)
            l, m, r = _get(ls, j, REVERSE, G, V), _get(ms, j, REVERSE, G, V), _get(rs, j, REVERSE, G, V)
            h = _get(states, j, False, X, W)
            above, below = _get(aboves, j, False, X, W), _get(belows, j, False, X, W)
            g = gyj + carry
            if HAS_U:
                g = gyj * _get(us, j, REVERSE, u.dtype.element_ty, V) + carry
            g_x = g * lamj
            if HAS_SKIP:
                g_x += gyj * _get(skips, j, REVERSE, skip.dtype.element_ty, V)
            fresh = _fresh(j, phase, chunk, SHORT)
            handed = tl.where(fresh, 0.0, g)
            if NORMALIZE:
                nl, nm, nr, share, clamped, product, el, em, er = _open_gates(l, m, r, has_first, has_right)
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
            g_xs = _put(g_xs, g_x, j % 2 == 0, REVERSE, gx.dtype.element_ty, V)
            g_lams = _put(g_lams, g * xj, j % 2 == 0, REVERSE, g_lam.dtype.element_ty, V)
            g_ls = _put(g_ls, g_l, j % 2 == 0, REVERSE, g_gates.dtype.element_ty, V)
            g_ms = _put(g_ms, g_m, j % 2 == 0, REVERSE, g_gates.dtype.element_ty, V)
            g_rs = _put(g_rs, g_r, j % 2 == 0, REVERSE, g_gates.dtype.element_ty, V)
            if HAS_U:
                value = lamj * xj + tl.where(fresh, 0.0, mixed)
                g_us = _put(g_us, gyj * value, j % 2 == 0, REVERSE, g_u.dtype.element_ty, V)
            if HAS_SKIP:
                g_skips = _put(g_skips, gyj * xj, j % 2 == 0, REVERSE, g_skip.dtype.element_ty, V)
        _write(gx, g_xs, n, place, units, gx_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, ADD)
        _write(g_lam, g_lams, n, place, units, gc_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
        _write(g_gates, g_ls, n, place, units, gg_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
        _write(g_gates + gg_n, g_ms, n, place, units, gg_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
        _write(g_gates + 2 * gg_n, g_rs, n, place, units, gg_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
        if HAS_U:
            _write(g_u, g_us, n, place, units, gc_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
        if HAS_SKIP:
            _write(g_skip, g_skips, n, place, units, gc_w, own, R, W, V, T, LINES, REVERSE, WHOLE, True, False)
    if BANDS:
        tl.store(after + line, carry, tl.reshape(own, [R]))
