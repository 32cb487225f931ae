"""Triton kernels of the selective scan with rows along the lanes: a lane walks the steps of its row.

A chunk's steps are a lane's registers, so that no scan exchanges anything between lanes. What is then left to them are
the sums over the rows, which tensor cores form. Where rows are few, segments of their steps are walked in parallel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    LN2,
    LOG2E,
    NARROWEST,
    at_most,
    cdiv,
    kernel,
    load_apart,
    next_power_of_2,
    pick,
    repeat,
    store_apart,
)
from ._triton_scan import MIN_PROGRAMS, Parts, Scan, Sizes, aligned, exponent, place, prefetch, strides_of

# Steps that a lane holds in its registers, and rows of a program, one a lane.
_CHUNK = 16
_ROWS = 32
# Where rows are few, segments of them are walked in parallel. What each adds has to be found out first, which costs the
# less the longer they are: they are as long as leaves so many programs, once or three times what an H100 runs at once,
# but have at least so many chunks.
FORWARD_PROGRAMS = 1536
BACKWARD_PROGRAMS = 3072
_SHORTEST = 32
# Programs that share the states of a segment, to find out what it adds.
_SHARES = 2
# A decay that leaves nothing of a state next to what is added later.
_VANISHED = tl.constexpr(2.0**-64)


@triton.jit
def _unstack(tile):
    """The rows of a float32 tile, as a tuple."""
    index = tl.arange(0, tile.shape[0])[:, None]
    rows = ()
    for i in tl.static_range(tile.shape[0]):
        rows = rows + (pick(tile, index, i),)
    return rows


@triton.jit
def _stack(rows, COUNT: tl.constexpr):
    """A tile of the COUNT rows of a tuple."""
    index = tl.arange(0, COUNT)[:, None]
    tile = tl.broadcast_to(rows[0][None, :], [COUNT, rows[0].shape[0]])
    for i in tl.static_range(1, COUNT):
        tile = tl.where(index == i, rows[i][None, :], tile)
    return tile


@triton.jit
def _to_lanes(tile):
    """A tile (T, R) in float32, with the T entries of a column in one lane.

    Triton keeps the layout of a load, with several lanes a column, for all that follows. What it splits has to be in
    one lane, so that it hands all entries over.
    """
    half: tl.constexpr = tile.shape[0] // 2
    first, second = tl.split(tl.permute(tl.reshape(tile, [2, half, tile.shape[1]]), (1, 2, 0)))
    return _stack(_unstack(first.to(tl.float32)) + _unstack(second.to(tl.float32)), tile.shape[0])


@triton.jit
def _float32(x, PTX: tl.constexpr):
    """`x` in float32. Where registers hold two neighbours in bfloat16, the compiler would take three instructions."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def _every_lane(steps, ROWS: tl.constexpr, PTX: tl.constexpr):
    """Values (T,) in a tuple, each for all rows (R,)."""
    tile = tl.broadcast_to(steps[:, None], [steps.shape[0], ROWS])
    if steps.dtype == tl.int32:
        index = tl.arange(0, tile.shape[0])[:, None]
        rows = ()
        for i in tl.static_range(0, tile.shape[0], 2):
            pair = tl.sum(tl.where(index == i, tile, 0), 0)
            rows = rows + ((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
        return rows
    else:
        return _unstack(_float32(tile, PTX))


@triton.jit
def _partial_sums(rows, COUNT: tl.constexpr, BF16: tl.constexpr):
    """Sums over the 32 lanes of each of COUNT rows (32,), as (COUNT, 8) of which the last axis is left to add.

    Tensor cores add four lanes each, in a product with zeros and ones whose right operand they take from the very lanes
    and registers that hold the rows. Terms are rounded to bfloat16 or to TF32.
    """
    LANES: tl.constexpr = 32 // NARROWEST
    row = tl.arange(0, COUNT)[:, None]
    k = tl.arange(0, COUNT * LANES)[None, :]
    if BF16:
        # A register has two of them, neighbours in k.
        tile = tl.permute(tl.reshape(_stack(rows, COUNT), [COUNT // 2, 2, NARROWEST, LANES]), (0, 3, 1, 2))
        select = tl.where(row == k // (2 * LANES) * 2 + k % 2, 1.0, 0.0).to(tl.bfloat16)
        return tl.dot(select, tl.reshape(tile, [COUNT * LANES, NARROWEST]).to(tl.bfloat16))
    else:
        tile = tl.permute(tl.reshape(_stack(rows, COUNT), [COUNT, NARROWEST, LANES]), (0, 2, 1))
        select = tl.where(row == k // LANES, 1.0, 0.0)
        return tl.dot(select, tl.reshape(tile, [COUNT * LANES, NARROWEST]), input_precision="tf32")


@triton.jit
def _add_terms(at, terms, valid, later, COUNT: tl.constexpr):
    """Adds COUNT terms (R,) to what is there (R,), if it is not the first time."""
    total = tl.load(at, valid & later, 0.0)
    for i in tl.static_range(COUNT):
        total += terms[i]
    tl.store(at, total, valid)


@triton.jit
def _share(segments, span, channels, ROWS: tl.constexpr):
    """Share of a program: its number among those of a segment, the segment, the sequence, the first channel of the
    span, channels (ROWS,) and their mask."""
    programs = tl.num_programs(0) // segments
    segment = tl.program_id(0) // programs
    program = tl.program_id(0) % programs
    batch, first_channel, first_row = place(program, span, channels, ROWS)
    row = first_row + tl.arange(0, ROWS)
    return program, segment, batch, first_channel, (first_channel + row).to(tl.int64), row < span


@triton.jit
def _rows(ptr, batch, channel, b, d, ALIGN: tl.constexpr):
    """Where rows (1, R) of a tensor (B, D, L) begin."""
    return ptr + batch * aligned(b, ALIGN) + (channel * aligned(d, ALIGN))[None, :]


@triton.jit
def _projection(ptr, batch, channel, first_channel, per_group, b, g, CONSTANT: tl.constexpr, ALIGN: tl.constexpr):
    """Where B or C (B, G, N, L) begin for a group, or, constant along the steps, (D, N) for each channel (R,)."""
    if CONSTANT:
        return ptr + channel * g
    else:
        return ptr + batch * aligned(b, ALIGN) + (first_channel // per_group).to(tl.int64) * aligned(g, ALIGN)


@triton.jit
def _start(begin, length, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """First of the CHUNK steps that are loaded for the chunk which begins at `begin`.

    For the last chunk they are the sequence's last: where it is shorter, earlier steps come before its own, at which
    nothing is done. All loads are then in one piece, without a mask.
    """
    if ALIGN % CHUNK == 0:
        return begin
    else:
        return aligned(tl.minimum(begin, length - CHUNK), ALIGN)


@triton.jit
def _inside(time, begin, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """Which of the loaded steps are the chunk's: all, as the compiler then knows, if chunks divide the length."""
    if ALIGN % CHUNK == 0:
        return tl.full(time.shape, True, tl.int1)
    else:
        return time >= begin


@triton.jit
def _load_state(
    row,
    n,
    start,
    n_stride,
    l_stride,
    valid,
    CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """B or C of state n, from where `_projection` says they begin: at each step of a chunk (T,), or of each channel
    (R,).
    """
    if CONSTANT:
        return tl.load(row + n * n_stride, valid, 0.0)
    else:
        row += n * aligned(n_stride, ALIGN) + start.to(tl.int64) * l_stride
        # Not apart: laid out as the rows' steps, neighbours in one thread, it needs no exchange through shared memory.
        loaded = tl.load(row + tl.arange(0, CHUNK) * l_stride)
        if PTX and loaded.dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", [loaded], tl.int32, is_pure=True, pack=2
            )
        else:
            return loaded


@triton.jit
def _at_steps(loaded, CONSTANT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """What `_load_state` loaded, for each step of a chunk (R,) in float32."""
    if CONSTANT:
        return repeat(loaded.to(tl.float32), CHUNK)
    else:
        return _every_lane(loaded, ROWS, PTX)


@triton.jit
def _load(rows, start, l_stride, begin, valid, other, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's steps of rows (T, R), in float32. Lanes load neighbouring steps and hand them over to their row's."""
    step = tl.arange(0, CHUNK)
    mask = valid[None, :] & _inside(start + step, begin, ALIGN, CHUNK)[:, None]
    return _to_lanes(load_apart(rows + start.to(tl.int64) * l_stride + step[:, None] * l_stride, mask, other))


@triton.jit
def _load_alone(rows, start, l_stride, begin, valid, other, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's steps of rows, in a tuple of what a lane loads at once, (t, R) each.

    Each lane loads what it will hold: more requests to memory than those of `_load`, fewer instructions and registers.
    """
    WIDTH: tl.constexpr = 8 if ALIGN > 8 else ALIGN
    tiles = ()
    for first in tl.static_range(0, CHUNK, WIDTH):
        step = first + tl.arange(0, WIDTH)
        mask = valid[None, :] & _inside(start + step, begin, ALIGN, CHUNK)[:, None]
        tiles = tiles + (load_apart(rows + start.to(tl.int64) * l_stride + step[:, None] * l_stride, mask, other),)
    return tiles


@triton.jit
def _join(tiles, ALIGN: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """What `_load_alone` loaded as one tile (T, R), in float32."""
    steps = ()
    for i in tl.static_range(CHUNK // (8 if ALIGN > 8 else ALIGN)):
        steps = steps + _unstack(_float32(tiles[i], PTX))
    return _stack(steps, CHUNK)


@triton.jit
def _kept(tiles, ALIGN: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr):
    """The same tiles, unknown to the compiler, which else converts them once and keeps them in float32 until then."""
    kept = ()
    for i in tl.static_range(CHUNK // (8 if ALIGN > 8 else ALIGN)):
        tile = tiles[i]
        if PTX and tile.dtype.primitive_bitwidth == 16:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=False, pack=2)
        kept = kept + (tile,)
    return kept


@triton.jit
def _logits(delta, bias_ptr, channel, valid):
    """`delta` (T, R) with its bias, times log2(e), as `exponent` wants it."""
    s = delta * LOG2E
    if bias_ptr is not None:
        s += load_apart(bias_ptr + channel, valid, 0.0).to(tl.float32)[None, :] * LOG2E
    return s


@triton.jit
def _places_of_states(P_row, Q_row, first_n, states, P_n, Q_n):
    """Where B and C of 16 states begin, (32,)."""
    lane = tl.arange(0, 32)
    n = tl.minimum(first_n + lane // 2, states - 1).to(tl.int64)
    return tl.where(lane % 2 == 0, (P_row + n * P_n).to(tl.int64), (Q_row + n * Q_n).to(tl.int64))


@triton.jit
def _prefetch_states(places, P_row, Q_row, start, states, P_n, P_l, Q_n, Q_l):
    """Prefetches a chunk's steps of B and C, of all states, of which the first are at `places`."""
    P_BYTES: tl.constexpr = P_row.dtype.element_ty.primitive_bitwidth // 8
    Q_BYTES: tl.constexpr = Q_row.dtype.element_ty.primitive_bitwidth // 8
    ahead = start.to(tl.int64) * tl.where(tl.arange(0, 32) % 2 == 0, P_l * P_BYTES, Q_l * Q_BYTES)
    prefetch(places + ahead)
    for first_n in range(16, states, 16):
        prefetch(_places_of_states(P_row, Q_row, first_n, states, P_n, Q_n) + ahead)


@kernel
def selective_scan_segments_kernel(
    v_ptr,
    delta_ptr,
    A_ptr,
    P_ptr,
    z_ptr,
    bias_ptr,
    added_ptr,
    total_ptr,
    segments,
    segment_chunks,
    span,
    channels,
    length,
    states,
    share,
    P_channels,
    v_b,
    v_d,
    v_l,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    P_b,
    P_g,
    P_n,
    P_l,
    z_b,
    z_d,
    z_l,
    SOFTPLUS: tl.constexpr,
    CONSTANT: tl.constexpr,
    ADJOINT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PTX: tl.constexpr,
):
    """What a segment of ROWS rows alone adds, `added` (B, segments, N, D), of this program's `share` of the states: to
    the states behind it, from `P` = B and `v` = u; if ADJOINT to the adjoints before it, from `P` = C and `v` the
    gradient of the output.

    Chunks come with growing distance from where that is added. What has vanished until there is skipped.
    `total` (B, segments, shares, D) is the segment's time, or as much of it as lets all decay.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, CHUNK)
    _, segment, batch, first_channel, channel, valid = _share(segments, span, channels, ROWS)
    v_row = _rows(v_ptr, batch, channel, v_b, v_d, ALIGN)
    delta_row = _rows(delta_ptr, batch, channel, delta_b, delta_d, ALIGN)
    if z_ptr is not None:
        z_row = _rows(z_ptr, batch, channel, z_b, z_d, ALIGN)
    P_row = _projection(P_ptr, batch, channel, first_channel, P_channels, P_b, P_g, CONSTANT, ALIGN)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    zero = tl.zeros([ROWS], tl.float32)
    elapsed = zero
    first_n = tl.program_id(1) * share
    last_n = tl.minimum(first_n + share, states)
    added_row = added_ptr + (batch * segments + segment) * states * channels + channel
    if PTX and not CONSTANT:
        ahead = _places_of_states(P_row, P_row, 0, states, P_n, P_n)

    first_chunk = segment * segment_chunks
    count = tl.minimum(segment_chunks, chunks - first_chunk)
    number = 0
    alive = 1
    while (number < count) & (alive > 0):
        if ADJOINT:
            chunk = first_chunk + number
        else:
            chunk = first_chunk + count - 1 - number
        begin = chunk * CHUNK
        start = _start(begin, length, ALIGN, CHUNK)
        time = start + tl.arange(0, CHUNK)
        inside = _inside(time, begin, ALIGN, CHUNK)
        v = _load(v_row, start, v_l, begin, valid, 0.0, ALIGN, CHUNK)  # (T, R)
        delta = _load(delta_row, start, delta_l, begin, valid, padding, ALIGN, CHUNK)  # (T, R)
        s = _logits(delta, bias_ptr, channel, valid)
        dt2_tile = exponent(s, inside[:, None], SOFTPLUS)
        if ADJOINT:
            if z_ptr is not None:
                z = _load(z_row, start, z_l, begin, valid, 0.0, ALIGN, CHUNK)  # (T, R)
                v *= z * tl.sigmoid(z)
        else:
            v *= dt2_tile * LN2
        dt2 = _unstack(dt2_tile)
        v = _unstack(v)
        if PTX:
            if ADJOINT:
                next_start = tl.minimum(chunk + 1, first_chunk + count - 1) * CHUNK
            else:
                next_start = tl.maximum(chunk - 1, first_chunk) * CHUNK
            prefetch(v_row + next_start.to(tl.int64) * v_l)
            prefetch(delta_row + next_start.to(tl.int64) * delta_l)
            if not CONSTANT:
                _prefetch_states(ahead, P_row, P_row, next_start, states, P_n, P_l, P_n, P_l)
        alive = 0
        for n in range(first_n, last_n):
            A = load_apart(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
            decay_since = tl.exp2(A * elapsed)
            # Without softplus a time step may be negative, and what has vanished grow again.
            if SOFTPLUS:
                counts = tl.max(((decay_since > _VANISHED) & valid).to(tl.int32), 0)
            else:
                counts = 1
            if counts > 0:
                at = added_row + n * channels
                P = _load_state(P_row, n, start, P_n, P_l, valid, CONSTANT, ALIGN, CHUNK, PTX)
                P = _at_steps(P, CONSTANT, CHUNK, ROWS, PTX)
                h = zero
                for i in tl.static_range(CHUNK):
                    if ADJOINT:
                        h = tl.exp2(A * dt2[CHUNK - 1 - i]) * (h + P[CHUNK - 1 - i] * v[CHUNK - 1 - i])
                    else:
                        h = tl.exp2(A * dt2[i]) * h + P[i] * v[i]
                added = load_apart(at, valid & (number > 0), 0.0)  # (R,)
                store_apart(at, added + decay_since * h, valid)  # (R,)
            alive += counts
        for t in tl.static_range(CHUNK):
            elapsed += dt2[t]
        number += 1
    at = (batch * segments + segment) * tl.num_programs(1) + tl.program_id(1)
    store_apart(total_ptr + at * channels + channel, elapsed, valid)  # (R,)


@kernel
def selective_scan_borders_kernel(
    total_ptr,
    A_ptr,
    state_ptr,
    behind_ptr,
    segments,
    channels,
    states,
    share,
    shares,
    A_d,
    A_n,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Turns what each segment alone adds, `state` (B, segments, N, D), into what enters it, in place.

    Without `behind` these are states, from the first segment on; else adjoints, from the last segment on, behind which
    they are `behind` (B, D, N).
    """
    channel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid = channel < channels
    A = load_apart(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
    if behind_ptr is not None:
        h = load_apart(behind_ptr + (batch * channels + channel) * states + n, valid, 0.0)  # (R,)
    else:
        h = tl.zeros([ROWS], tl.float32)
    for first in range(0, segments, STEPS):
        # Loads do not wait for one another: STEPS of them, then as many steps.
        places, inside, totals, added = (), (), (), ()
        for i in tl.static_range(STEPS):
            segment = first + i
            inside = inside + (valid & (segment < segments),)
            if behind_ptr is not None:
                segment = segments - 1 - segment
            at = batch * segments + segment
            places = places + (state_ptr + (at * states + n) * channels + channel,)
            total = load_apart(total_ptr + (at * shares + n // share) * channels + channel, inside[i], 0.0)  # (R,)
            totals = totals + (total,)
            added = added + (load_apart(places[i], inside[i], 0.0),)  # (R,)
        for i in tl.static_range(STEPS):
            store_apart(places[i], h, inside[i])
            h = tl.exp2(A * totals[i]) * h + added[i]


@kernel
def selective_scan_fwd_rows_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    out_ptr,
    border_ptr,
    state_ptr,
    segments,
    segment_chunks,
    span,
    channels,
    length,
    states,
    B_channels,
    C_channels,
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    B_b,
    B_g,
    B_n,
    B_l,
    C_b,
    C_g,
    C_n,
    C_l,
    z_b,
    z_d,
    z_l,
    out_b,
    out_d,
    out_l,
    SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    ENTERED: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    PTX: tl.constexpr,
):
    """Walks ROWS rows over a segment, for the outputs `out` and for the states `border` (B, chunks, N, D) that enter
    each chunk; one of both may be None.

    `state` (B, segments, N, D) has the states that enter each segment if ENTERED, else these are 0. It is where states
    go from chunk to chunk, always through the same thread, which needs no barrier, and has those behind the segment in
    the end.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, CHUNK)
    _, segment, batch, first_channel, channel, valid = _share(segments, span, channels, ROWS)
    u_row = _rows(u_ptr, batch, channel, u_b, u_d, ALIGN)
    delta_row = _rows(delta_ptr, batch, channel, delta_b, delta_d, ALIGN)
    B_row = _projection(B_ptr, batch, channel, first_channel, B_channels, B_b, B_g, B_CONSTANT, ALIGN)
    if out_ptr is not None:
        C_row = _projection(C_ptr, batch, channel, first_channel, C_channels, C_b, C_g, C_CONSTANT, ALIGN)
        out_row = _rows(out_ptr, batch, channel, out_b, out_d, ALIGN)
        if z_ptr is not None:
            z_row = _rows(z_ptr, batch, channel, z_b, z_d, ALIGN)
        if D_ptr is not None:
            skip = load_apart(D_ptr + channel, valid, 0.0).to(tl.float32)[None, :]  # (1, R)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    zero = tl.zeros([ROWS], tl.float32)

    state_row = state_ptr + (batch * segments + segment) * states * channels + channel
    if PTX:
        if out_ptr is not None:
            ahead = _places_of_states(B_row, C_row, 0, states, B_n, C_n)
        else:
            ahead = _places_of_states(B_row, B_row, 0, states, B_n, B_n)

    first_chunk = segment * segment_chunks
    for chunk in range(first_chunk, tl.minimum(first_chunk + segment_chunks, chunks)):
        begin = chunk * CHUNK
        start = _start(begin, length, ALIGN, CHUNK)
        time = start + tl.arange(0, CHUNK)
        inside = _inside(time, begin, ALIGN, CHUNK)
        u = _load(u_row, start, u_l, begin, valid, 0.0, ALIGN, CHUNK)  # (T, R)
        delta = _load(delta_row, start, delta_l, begin, valid, padding, ALIGN, CHUNK)  # (T, R)
        s = _logits(delta, bias_ptr, channel, valid)
        dt2_tile = exponent(s, inside[:, None], SOFTPLUS)
        dt2 = _unstack(dt2_tile)
        x = _unstack(dt2_tile * LN2 * u)
        y = repeat(zero, CHUNK)
        if out_ptr is not None and D_ptr is not None:
            y = _unstack(skip * u)
        if PTX:
            next_start = tl.minimum(chunk + 1, chunks - 1) * CHUNK
            prefetch(u_row + next_start.to(tl.int64) * u_l)
            prefetch(delta_row + next_start.to(tl.int64) * delta_l)
            if out_ptr is not None:
                _prefetch_states(ahead, B_row, C_row, next_start, states, B_n, B_l, C_n, C_l)
            else:
                _prefetch_states(ahead, B_row, B_row, next_start, states, B_n, B_l, B_n, B_l)
        if border_ptr is not None:
            border_row = border_ptr + (batch * chunks + chunk) * states * channels + channel
        known = valid
        if not ENTERED:
            known = valid & (chunk > first_chunk)
        # Of several states at once, loads are waited for together, and steps don't wait for one another.
        for first_n in range(0, states, TOGETHER):
            A, h, B, C = (), (), (), ()
            for i in tl.static_range(TOGETHER):
                n = first_n + i
                A = A + (load_apart(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32),)  # (R,)
                h = h + (load_apart(state_row + n * channels, known, 0.0),)  # (R,)
                B_n_steps = _load_state(B_row, n, start, B_n, B_l, valid, B_CONSTANT, ALIGN, CHUNK, PTX)
                B = B + _at_steps(B_n_steps, B_CONSTANT, CHUNK, ROWS, PTX)
                if out_ptr is not None:
                    C_n_steps = _load_state(C_row, n, start, C_n, C_l, valid, C_CONSTANT, ALIGN, CHUNK, PTX)
                    C = C + _at_steps(C_n_steps, C_CONSTANT, CHUNK, ROWS, PTX)
            if border_ptr is not None:
                for i in tl.static_range(TOGETHER):
                    store_apart(border_row + (first_n + i) * channels, h[i], valid)  # (R,)
            y_with_these = ()
            for t in tl.static_range(CHUNK):
                h_after = ()
                y_t = y[t]
                for i in tl.static_range(TOGETHER):
                    h_after = h_after + (tl.fma(tl.exp2(A[i] * dt2[t]), h[i], B[i * CHUNK + t] * x[t]),)
                    if out_ptr is not None:
                        y_t += C[i * CHUNK + t] * h_after[i]
                h = h_after
                y_with_these = y_with_these + (y_t,)
            y = y_with_these
            for i in tl.static_range(TOGETHER):
                store_apart(state_row + (first_n + i) * channels, h[i], valid)  # (R,)
        if out_ptr is not None:
            out = _stack(y, CHUNK)
            if z_ptr is not None:
                z = _load(z_row, start, z_l, begin, valid, 0.0, ALIGN, CHUNK)  # (T, R)
                out *= z * tl.sigmoid(z)
            store_apart(out_row + time.to(tl.int64)[:, None] * out_l, out, valid[None, :] & inside[:, None])  # (T, R)


@kernel
def selective_scan_bwd_rows_kernel(
    g_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    border_ptr,
    carry_ptr,
    gu_ptr,
    gdelta_ptr,
    gz_ptr,
    by_channel_ptr,
    by_step_ptr,
    segments,
    segment_chunks,
    span,
    channels,
    length,
    states,
    B_channels,
    C_channels,
    g_b,
    g_d,
    g_l,
    u_b,
    u_d,
    u_l,
    delta_b,
    delta_d,
    delta_l,
    A_d,
    A_n,
    B_b,
    B_g,
    B_n,
    B_l,
    C_b,
    C_g,
    C_n,
    C_l,
    z_b,
    z_d,
    z_l,
    gu_b,
    gu_d,
    gu_l,
    gdelta_b,
    gdelta_d,
    gdelta_l,
    gz_b,
    gz_d,
    gz_l,
    SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BF16: tl.constexpr,
    PTX: tl.constexpr,
):
    """Gradients of ROWS rows over a segment, chunk by chunk from the last to the first.

    `border` (B, chunks, N, D) has the states that enter each chunk. `carry` (B, segments, N, D) has the adjoints that
    enter each segment from behind, and is where they go from chunk to chunk. Sums over rows, steps or sequences are
    left in parts, see `Parts`: `by_channel` (B, segments, rows, D), `by_step` (B, programs, 1 or 2, N, L).
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, CHUNK)
    program, segment, batch, first_channel, channel, valid = _share(segments, span, channels, ROWS)
    g_row = _rows(g_ptr, batch, channel, g_b, g_d, ALIGN)
    u_row = _rows(u_ptr, batch, channel, u_b, u_d, ALIGN)
    delta_row = _rows(delta_ptr, batch, channel, delta_b, delta_d, ALIGN)
    gu_row = _rows(gu_ptr, batch, channel, gu_b, gu_d, ALIGN)
    gdelta_row = _rows(gdelta_ptr, batch, channel, gdelta_b, gdelta_d, ALIGN)
    if z_ptr is not None:
        z_row = _rows(z_ptr, batch, channel, z_b, z_d, ALIGN)
        gz_row = _rows(gz_ptr, batch, channel, gz_b, gz_d, ALIGN)
    B_row = _projection(B_ptr, batch, channel, first_channel, B_channels, B_b, B_g, B_CONSTANT, ALIGN)
    C_row = _projection(C_ptr, batch, channel, first_channel, C_channels, C_b, C_g, C_CONSTANT, ALIGN)
    if D_ptr is not None:
        skip = tl.load(D_ptr + channel, valid, 0.0).to(tl.float32)[None, :]  # (1, R)
    # The program's parts of the gradients of B, if it is not constant, and of C behind it.
    VARYING: tl.constexpr = (0 if B_CONSTANT else 1) + (0 if C_CONSTANT else 1)
    if VARYING > 0:
        gB_part = by_step_ptr + program.to(tl.int64) * VARYING * states * length
        gC_part = gB_part + (VARYING - 1) * states * length
    carry_row = carry_ptr + (batch * segments + segment) * states * channels + channel
    # Its parts of the gradients of parameters: rows of A, of B and C if they are constant, D and bias.
    gA_row = by_channel_ptr + (batch * segments + segment) * ((3 - VARYING) * states + 2) * channels + channel
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    zero = tl.zeros([ROWS], tl.float32)
    gD = zero
    gbias = zero

    first_chunk = segment * segment_chunks
    last_chunk = tl.minimum(first_chunk + segment_chunks, chunks) - 1
    begin = last_chunk * CHUNK
    start = _start(begin, length, ALIGN, CHUNK)
    u_next = _load_alone(u_row, start, u_l, begin, valid, 0.0, ALIGN, CHUNK)
    delta_next = _load_alone(delta_row, start, delta_l, begin, valid, padding, ALIGN, CHUNK)
    g_next = _load_alone(g_row, start, g_l, begin, valid, 0.0, ALIGN, CHUNK)
    A_row = A_ptr + channel * A_d
    border_row = border_ptr + batch * chunks * states * channels + channel
    h_next = tl.load(border_row + last_chunk.to(tl.int64) * states * channels, valid, 0.0)  # (R,)
    for number in range(first_chunk, last_chunk + 1):
        chunk = last_chunk - (number - first_chunk)
        begin = chunk * CHUNK
        start = _start(begin, length, ALIGN, CHUNK)
        time = start + tl.arange(0, CHUNK)
        inside = _inside(time, begin, ALIGN, CHUNK)
        u_steps, delta_steps = u_next, delta_next
        u = _join(u_steps, ALIGN, CHUNK, PTX)  # (T, R)
        s = _logits(_join(delta_steps, ALIGN, CHUNK, PTX), bias_ptr, channel, valid)  # (T, R)
        gy_tile = _join(g_next, ALIGN, CHUNK, PTX)  # (T, R)
        dt2_tile = exponent(s, inside[:, None], SOFTPLUS)
        if z_ptr is not None:
            z = _join(_load_alone(z_row, start, z_l, begin, valid, 0.0, ALIGN, CHUNK), ALIGN, CHUNK, PTX)  # (T, R)
            gy_tile *= z * tl.sigmoid(z)
        dt2 = _unstack(dt2_tile)
        x = _unstack(dt2_tile * LN2 * u)
        gy = _unstack(gy_tile)
        gx = repeat(zero, CHUNK)
        gdt = repeat(zero, CHUNK)
        y = repeat(zero, CHUNK)
        later = chunk < last_chunk
        next_chunk = tl.maximum(chunk - 1, first_chunk)
        A_next = tl.load(A_row, valid, 0.0).to(tl.float32)  # (R,)
        B_next = _load_state(B_row, 0, start, B_n, B_l, valid, B_CONSTANT, ALIGN, CHUNK, PTX)
        gB_sums = tl.zeros([CHUNK, NARROWEST], tl.float32)
        gC_sums = gB_sums
        for n in range(states):
            A, h = A_next, h_next
            B = _at_steps(B_next, B_CONSTANT, CHUNK, ROWS, PTX)
            # What the walk back needs comes during the walk forward, what the next state needs during the walk back.
            # Loads that are apart from these would be asked for later.
            carry = tl.load(carry_row + n * channels, valid, 0.0)  # (R,)
            gA = tl.load(gA_row + n * channels, valid & later, 0.0)  # (R,)
            C = _load_state(C_row, n, start, C_n, C_l, valid, C_CONSTANT, ALIGN, CHUNK, PTX)
            C = _at_steps(C, C_CONSTANT, CHUNK, ROWS, PTX)
            decay, decayed, gC_terms, y_with_n = (), (), (), ()
            for t in tl.static_range(CHUNK):
                decay = decay + (tl.exp2(A * dt2[t]),)
                decayed = decayed + (decay[t] * h,)
                h = tl.fma(B[t], x[t], decayed[t])
                gC_terms = gC_terms + (gy[t] * h,)
                if z_ptr is not None:
                    y_with_n = y_with_n + (y[t] + C[t] * h,)
            if z_ptr is not None:
                y = y_with_n
            if C_CONSTANT:
                _add_terms(gA_row + ((2 - VARYING) * states + n) * channels, gC_terms, valid, later, CHUNK)
            else:
                gC_before, gC_sums = gC_sums, _partial_sums(gC_terms, CHUNK, BF16)

            next_n = tl.minimum(n + 1, states - 1)
            A_next = tl.load(A_row + next_n * A_n, valid, 0.0).to(tl.float32)  # (R,)
            border = tl.where(n + 1 < states, chunk * states + n + 1, next_chunk * states)
            h_next = tl.load(border_row + border.to(tl.int64) * channels, valid, 0.0)  # (R,)
            B_next = _load_state(B_row, next_n, start, B_n, B_l, valid, B_CONSTANT, ALIGN, CHUNK, PTX)

            gB_terms, gx_with_n, gdt_with_n = (), (), ()
            g_time = zero
            for t in tl.static_range(CHUNK - 1, -1, -1):
                if t == CHUNK - 1:
                    g = C[t] * gy[t] + carry
                else:
                    g = tl.fma(decay[t + 1], g, C[t] * gy[t])
                gB_terms = (g * x[t],) + gB_terms
                gx_with_n = (gx[t] + B[t] * g,) + gx_with_n
                g_log = g * decayed[t]  # gradient of the decay's logarithm dt A
                gdt_with_n = (gdt[t] + A * g_log,) + gdt_with_n
                g_time += g_log * dt2[t]
            gx, gdt = gx_with_n, gdt_with_n
            tl.store(carry_row + n * channels, decay[0] * g, valid)  # (R,)
            tl.store(gA_row + n * channels, gA + g_time * LN2, valid)  # (R,)
            # Sums are finished and stored a state later, so that nothing waits for tensor cores and shuffles.
            before = tl.maximum(n - 1, 0)
            if not C_CONSTANT:
                tl.store(gC_part + before * length + time, tl.sum(gC_before, 1), inside & (n > 0))  # (T,)
            if B_CONSTANT:
                _add_terms(gA_row + (states + n) * channels, gB_terms, valid, later, CHUNK)
            else:
                tl.store(gB_part + before * length + time, tl.sum(gB_sums, 1), inside & (n > 0))  # (T,)
                gB_sums = _partial_sums(gB_terms, CHUNK, BF16)
        if not B_CONSTANT:
            tl.store(gB_part + (states - 1) * length + time, tl.sum(gB_sums, 1), inside)  # (T,)
        if not C_CONSTANT:
            tl.store(gC_part + (states - 1) * length + time, tl.sum(gC_sums, 1), inside)  # (T,)

        next_begin = next_chunk * CHUNK
        next_start = _start(next_begin, length, ALIGN, CHUNK)
        u_next = _load_alone(u_row, next_start, u_l, next_begin, valid, 0.0, ALIGN, CHUNK)
        delta_next = _load_alone(delta_row, next_start, delta_l, next_begin, valid, padding, ALIGN, CHUNK)
        g_next = _load_alone(g_row, next_start, g_l, next_begin, valid, 0.0, ALIGN, CHUNK)
        # Through the loop over the states in 16 bits, or, where two don't share a register, not at all.
        if ALIGN < 4:
            u_steps = _load_alone(u_row, start, u_l, begin, valid, 0.0, ALIGN, CHUNK)
            delta_steps = _load_alone(delta_row, start, delta_l, begin, valid, padding, ALIGN, CHUNK)
        else:
            u_steps = _kept(u_steps, ALIGN, CHUNK, PTX)
            delta_steps = _kept(delta_steps, ALIGN, CHUNK, PTX)
        u = _join(u_steps, ALIGN, CHUNK, PTX)  # (T, R)
        s = _logits(_join(delta_steps, ALIGN, CHUNK, PTX), bias_ptr, channel, valid)  # (T, R)
        gx_tile = _stack(gx, CHUNK)
        gu = gx_tile * (dt2_tile * LN2)
        if D_ptr is not None:
            gu += skip * gy_tile
            gD += tl.sum(gy_tile * u, 0)
        gdelta = _stack(gdt, CHUNK) + gx_tile * u
        if SOFTPLUS:
            # sigmoid(s) = 2^s / (1 + 2^s) = 2^(s - log2(1 + 2^s)), s with the factor log2(e)
            gdelta *= tl.exp2(s - dt2_tile)
        else:
            gdelta = tl.where(inside[:, None], gdelta, 0.0)
        if bias_ptr is not None:
            gbias += tl.sum(gdelta, 0)
        here = time.to(tl.int64)[:, None]
        mask = valid[None, :] & inside[:, None]
        if z_ptr is not None:
            z = _join(_load_alone(z_row, start, z_l, begin, valid, 0.0, ALIGN, CHUNK), ALIGN, CHUNK, PTX)  # (T, R)
            g = _join(_load_alone(g_row, start, g_l, begin, valid, 0.0, ALIGN, CHUNK), ALIGN, CHUNK, PTX)  # (T, R)
            gate = tl.sigmoid(z)
            y_tile = _stack(y, CHUNK)
            if D_ptr is not None:
                y_tile += skip * u
            gz = g * gate * (1 + z * (1 - gate)) * y_tile
            store_apart(gz_row + here * gz_l, gz, mask)  # (T, R)
        store_apart(gu_row + here * gu_l, gu, mask)  # (T, R)
        store_apart(gdelta_row + here * gdelta_l, gdelta, mask)  # (T, R)
    gD_row = gA_row + (3 - VARYING) * states * channels
    if D_ptr is not None:
        store_apart(gD_row, gD, valid)  # (R,)
    if bias_ptr is not None:
        store_apart(gD_row + channels, gbias, valid)  # (R,)


def _segment_chunks(sizes: Sizes, programs: int) -> int:
    """Chunks of a segment: all, unless the rows are too few to keep a GPU busy."""
    chunks, rows = max(1, cdiv(sizes.length, _CHUNK)), sizes.programs(_ROWS)
    if rows >= MIN_PROGRAMS:
        return chunks
    segment = next_power_of_2(chunks)
    while segment > _SHORTEST and rows * cdiv(chunks, segment) < programs:
        segment //= 2
    return segment


def _suits(sizes: Sizes, programs: int) -> bool:
    segments = cdiv(cdiv(sizes.length, _CHUNK), _segment_chunks(sizes, programs))
    full = sizes.span % _ROWS == 0 and sizes.length >= _CHUNK
    return sizes.states > 1 and full and sizes.programs(_ROWS) * segments >= MIN_PROGRAMS


def forward_suits(sizes: Sizes) -> bool:
    """Whether `forward` is the faster one: several states, and full lanes in enough segments to keep a GPU busy."""
    return (sizes.itemsize == 2 or sizes.states <= 8) and _suits(sizes, FORWARD_PROGRAMS)


def backward_suits(sizes: Sizes) -> bool:
    """Whether `backward` is the faster one; its sums over the rows are too coarse for float32."""
    return sizes.itemsize == 2 and _suits(sizes, BACKWARD_PROGRAMS)


class _Segments:
    """How the rows of a scan are cut, and the launches of what works on segments."""

    def __init__(self, scan: Scan, programs: int):
        self.scan = scan
        # Channels are next to each other, as they are in the lanes.
        self.A = scan.A.t().contiguous()
        self.programs = scan.programs(_ROWS)
        self.chunks = cdiv(scan.length, _CHUNK)
        self.length = _segment_chunks(scan, programs)
        self.count = cdiv(self.chunks, self.length)
        self.sizes = (self.count, self.length, scan.span, scan.channels, scan.length, scan.states)
        self.grid = (self.programs * self.count,)
        self.by_state = (scan.batch, self.count, scan.states, scan.channels)

    def options(self, *tensors: Tensor | None) -> dict:
        """Constants and options of a launch that also takes these tensors."""
        return {
            "SOFTPLUS": self.scan.softplus,
            "ALIGN": self.scan.alignment(*tensors),
            "ROWS": _ROWS,
            "CHUNK": _CHUNK,
            "PTX": self.scan.takes_ptx,
            # One warp needs no barriers; loads a chunk ahead would need registers that there are not.
            "num_warps": 1,
            "num_stages": 1,
        }

    def together(self, out: Tensor | None) -> dict:
        """States that are walked at once: two, if there is no odd one and registers hold several steps of B and C each.
        For outputs, three warps have to share a scheduler's registers.
        """
        scan = self.scan
        if scan.states % 2 or scan.alignment(out) < 4:
            return {"TOGETHER": 1}
        return {"TOGETHER": 2} | (at_most(168) if out is not None else {})

    def entering(self, g: Tensor | None = None, g_state: Tensor | None = None) -> Tensor:
        """States (B, segments, N, D) that enter each segment; given the gradient `g` of the output and that of the last
        state, the adjoints that enter from behind.
        """
        scan = self.scan
        adjoint = g is not None
        v, P, P_strides, P_channels, z = (
            (g, scan.C, scan.C_strides, scan.C_channels, scan.z)
            if adjoint
            else (scan.u, scan.B, scan.B_strides, scan.B_channels, None)
        )
        share = cdiv(scan.states, _SHARES)
        shares = cdiv(scan.states, share)
        state, total = scan.new(*self.by_state), scan.new(scan.batch, self.count, shares, scan.channels)
        selective_scan_segments_kernel[(*self.grid, shares)](
            v,
            scan.delta,
            self.A,
            P,
            z,
            scan.bias,
            state,
            total,
            *self.sizes,
            share,
            P_channels,
            *v.stride(),
            *scan.delta.stride(),
            *self.A.stride()[::-1],
            *P_strides,
            *strides_of(z),
            CONSTANT=P_channels == 0,
            ADJOINT=adjoint,
            **self.options(v),
        )
        selective_scan_borders_kernel[(cdiv(scan.channels, 32), scan.states, scan.batch)](
            total,
            self.A,
            state,
            g_state,
            self.count,
            scan.channels,
            scan.states,
            share,
            shares,
            *self.A.stride()[::-1],
            ROWS=32,
            STEPS=16,
            num_warps=1,
        )
        return state

    def walk(self, out: Tensor | None = None, border: Tensor | None = None) -> Tensor:
        """Fills what is given, see `selective_scan_fwd_rows_kernel`; returns the states behind each segment."""
        scan = self.scan
        entered = self.count > 1
        state = self.entering() if entered else scan.new(*self.by_state)
        selective_scan_fwd_rows_kernel[self.grid](
            scan.u,
            scan.delta,
            self.A,
            scan.B,
            scan.C,
            scan.D,
            scan.z,
            scan.bias,
            out,
            border,
            state,
            *self.sizes,
            scan.B_channels,
            scan.C_channels,
            *scan.u.stride(),
            *scan.delta.stride(),
            *self.A.stride()[::-1],
            *scan.B_strides,
            *scan.C_strides,
            *strides_of(scan.z),
            *strides_of(out),
            B_CONSTANT=scan.B_channels == 0,
            C_CONSTANT=scan.C_channels == 0,
            ENTERED=entered,
            **self.together(out),
            **self.options(out),
        )
        return state


def _borders(sizes: Sizes) -> Tensor:
    """For the states (B, chunks, N, D) that enter each chunk."""
    return sizes.new(sizes.batch, cdiv(sizes.length, _CHUNK), sizes.states, sizes.channels)


def to_save(sizes: Sizes) -> list[Tensor]:
    """The states that enter each chunk, unless they take more memory than `u` and `delta`."""
    return [_borders(sizes)] if 4 * sizes.states <= 2 * sizes.itemsize * _CHUNK else []


def forward(scan: Scan, border: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, D, L) and last state (B, D, N); fills what is to be saved."""
    out = torch.empty(scan.u.shape, dtype=scan.u.dtype, device=scan.device)
    state = _Segments(scan, FORWARD_PROGRAMS).walk(out=out, border=border)
    return out, state[:, -1].transpose(1, 2).contiguous()


def backward(scan: Scan, g: Tensor, g_state: Tensor, border: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and the bias of delta, from those of the output and of the last state."""
    segments = _Segments(scan, BACKWARD_PROGRAMS)
    if border is None:
        border = _borders(scan)
        segments.walk(border=border)
    if segments.count > 1:
        carry = segments.entering(g, g_state)
    else:
        carry = g_state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    gu, gdelta = torch.empty_like(scan.u), torch.empty_like(scan.delta)
    gz = None if scan.z is None else torch.empty_like(scan.z)
    parts = Parts(scan, segments.count, segments.programs)
    selective_scan_bwd_rows_kernel[segments.grid](
        g,
        scan.u,
        scan.delta,
        segments.A,
        scan.B,
        scan.C,
        scan.D,
        scan.z,
        scan.bias,
        border,
        carry,
        gu,
        gdelta,
        gz,
        parts.by_channel,
        parts.by_step,
        *segments.sizes,
        scan.B_channels,
        scan.C_channels,
        *g.stride(),
        *scan.u.stride(),
        *scan.delta.stride(),
        *segments.A.stride()[::-1],
        *scan.B_strides,
        *scan.C_strides,
        *strides_of(scan.z),
        *gu.stride(),
        *gdelta.stride(),
        *strides_of(gz),
        B_CONSTANT=scan.B_channels == 0,
        C_CONSTANT=scan.C_channels == 0,
        # Triton's interpreter cannot multiply bfloat16.
        BF16=scan.u.dtype == torch.bfloat16 and scan.u.device.type != "cpu",
        **segments.options(g, gu, gdelta, gz),
    )
    gA, gB, gC, gD, gbias = parts.totals()
    return gu, gdelta, gA, gB, gC, gD, gz, gbias
