"""Triton kernels of the selective scan's backward with rows along the lanes: a lane walks the steps of its row.

A chunk's steps are a lane's registers, so that neither scan exchanges anything between lanes. What is then left to them
are the sums over the rows, which tensor cores form. Where rows are few, segments of their steps are walked in parallel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LN2, LOG2E, cdiv, pick, repeat
from ._triton_scan import MIN_PROGRAMS, Scan, aligned, exponent, place, strides_of

# Steps that a lane holds in its registers, and rows of a program, one a lane.
_CHUNK = 16
_ROWS = 32
# Chunks of a segment, where segments are walked in parallel.
_SEGMENT = 32


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
def _every_lane(steps, ROWS: tl.constexpr):
    """Values (T,) in a tuple, each for all rows (R,)."""
    return _unstack(tl.broadcast_to(steps.to(tl.float32)[:, None], [steps.shape[0], ROWS]))


@triton.jit
def _add_sums(sums, line, rows, COUNT: tl.constexpr):
    """`sums` (16, T) with the sums over the lanes of COUNT = T rows (R,) in one line.

    A product with ones: tensor cores add what would be five shuffles for each row. They round to TF32, which is no
    coarser than inputs of 16 bits.
    """
    tile = tl.trans(_stack(rows, COUNT))
    new = tl.dot(tl.full([16, tile.shape[0]], 1.0, tl.float32), tile, input_precision="tf32")
    return tl.where(tl.arange(0, 16)[:, None] == line, new, sums)


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
def selective_scan_states_rows_kernel(
    g_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    bias_ptr,
    border_ptr,
    end_ptr,
    adjoint_ptr,
    time_ptr,
    total_ptr,
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
    SOFTPLUS: tl.constexpr,
    B_CONSTANT: tl.constexpr,
    C_CONSTANT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """States `border` (B, chunks, N, D) that enter each chunk of ROWS rows, if 0 enters their segment.

    `end` (B, segments, N, D) is where states go from chunk to chunk, always through the same thread, which needs no
    barrier; in the end it has what a segment alone adds to the states behind it. Several segments also want `adjoint`
    (B, segments, N, D), what each alone adds to the adjoints before it, and the time from its start to each chunk,
    `time` (B, chunks, D), and to its end, `total` (B, segments, D). These are None if there is one segment.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, CHUNK)
    _, segment, batch, first_channel, channel, valid = _share(segments, span, channels, ROWS)
    step = tl.arange(0, CHUNK)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    PARALLEL: tl.constexpr = adjoint_ptr is not None
    u_row = u_ptr + batch * aligned(u_b, ALIGN) + (channel * aligned(u_d, ALIGN))[None, :]
    delta_row = delta_ptr + batch * aligned(delta_b, ALIGN) + (channel * aligned(delta_d, ALIGN))[None, :]
    if not B_CONSTANT:
        B_row = B_ptr + batch * aligned(B_b, ALIGN) + (first_channel // B_channels).to(tl.int64) * aligned(B_g, ALIGN)
    if PARALLEL:
        g_row = g_ptr + batch * aligned(g_b, ALIGN) + (channel * aligned(g_d, ALIGN))[None, :]
        if z_ptr is not None:
            z_row = z_ptr + batch * aligned(z_b, ALIGN) + (channel * aligned(z_d, ALIGN))[None, :]
        if not C_CONSTANT:
            group = (first_channel // C_channels).to(tl.int64)
            C_row = C_ptr + batch * aligned(C_b, ALIGN) + group * aligned(C_g, ALIGN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32)[None, :] * LOG2E  # (1, R)
    total = tl.zeros([ROWS], tl.float32)

    first_chunk = segment * segment_chunks
    for chunk in range(first_chunk, tl.minimum(first_chunk + segment_chunks, chunks)):
        time = chunk * CHUNK + step
        inside = time < length
        mask = valid[None, :] & inside[:, None]
        time = time.to(tl.int64)
        u = _to_lanes(tl.load(u_row + time[:, None] * u_l, mask, 0.0))  # (T, R)
        s = _to_lanes(tl.load(delta_row + time[:, None] * delta_l, mask, padding)) * LOG2E  # (T, R)
        if bias_ptr is not None:
            s += bias
        dt2_tile = exponent(s, inside[:, None], SOFTPLUS)
        dt2 = _unstack(dt2_tile)
        x = _unstack(dt2_tile * LN2 * u)
        if PARALLEL:
            gy_tile = _to_lanes(tl.load(g_row + time[:, None] * g_l, mask, 0.0))  # (T, R)
            if z_ptr is not None:
                z = _to_lanes(tl.load(z_row + time[:, None] * z_l, mask, 0.0))  # (T, R)
                gy_tile *= z * tl.sigmoid(z)
            gy = _unstack(gy_tile)
        later = valid & (chunk > first_chunk)
        for n in range(states):
            at = ((batch * segments + segment) * states + n) * channels + channel
            A = tl.load(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
            h = tl.load(end_ptr + at, later, 0.0)  # (R,)
            tl.store(border_ptr + ((batch * chunks + chunk) * states + n) * channels + channel, h, valid)  # (R,)
            if B_CONSTANT:
                B = repeat(tl.load(B_ptr + channel * B_g + n * B_n, valid, 0.0).to(tl.float32), CHUNK)  # (R,)
            else:
                B = _every_lane(tl.load(B_row + n * aligned(B_n, ALIGN) + time * B_l, inside, 0.0), ROWS)  # (T,)
            if PARALLEL:
                if C_CONSTANT:
                    C = repeat(tl.load(C_ptr + channel * C_g + n * C_n, valid, 0.0).to(tl.float32), CHUNK)  # (R,)
                else:
                    C = _every_lane(tl.load(C_row + n * aligned(C_n, ALIGN) + time * C_l, inside, 0.0), ROWS)  # (T,)
                adjoint = tl.load(adjoint_ptr + at, later, 0.0)  # (R,)
                product = tl.exp2(A * total)
            for t in tl.static_range(CHUNK):
                decay = tl.exp2(A * dt2[t])
                h = decay * h + B[t] * x[t]
                if PARALLEL:
                    product *= decay
                    adjoint += product * (C[t] * gy[t])
            tl.store(end_ptr + at, h, valid)  # (R,)
            if PARALLEL:
                tl.store(adjoint_ptr + at, adjoint, valid)  # (R,)
        if PARALLEL:
            tl.store(time_ptr + (batch * chunks + chunk) * channels + channel, total, valid)  # (R,)
            for t in tl.static_range(CHUNK):
                total += dt2[t]
    if PARALLEL:
        tl.store(total_ptr + (batch * segments + segment) * channels + channel, total, valid)  # (R,)


@triton.jit
def selective_scan_borders_kernel(
    total_ptr,
    A_ptr,
    state_ptr,
    behind_ptr,
    segments,
    channels,
    states,
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
    A = tl.load(A_ptr + channel * A_d + n * A_n, valid, 0.0).to(tl.float32)  # (R,)
    if behind_ptr is not None:
        h = tl.load(behind_ptr + (batch * channels + channel) * states + n, valid, 0.0)  # (R,)
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
            totals = totals + (tl.load(total_ptr + at * channels + channel, inside[i], 0.0),)  # (R,)
            added = added + (tl.load(places[i], inside[i], 0.0),)  # (R,)
        for i in tl.static_range(STEPS):
            tl.store(places[i], h, inside[i])
            h = tl.exp2(A * totals[i]) * h + added[i]


@triton.jit
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
    time_ptr,
    entering_ptr,
    carry_ptr,
    gu_ptr,
    gdelta_ptr,
    gA_ptr,
    gB_ptr,
    gC_ptr,
    sums_ptr,
    gD_ptr,
    gz_ptr,
    gbias_ptr,
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
):
    """Gradients of ROWS rows over a segment, chunk by chunk from the last to the first.

    `border` (B, chunks, N, D) has the states that enter each chunk if 0 enters the segment; `entering`
    (B, segments, N, D) those that do, unless it is None, and `time` (B, chunks, D) how long ago that was. `carry`
    (B, segments, N, D) has the adjoints that enter from behind, and is where they go from chunk to chunk. Sums over
    rows, segments or sequences are left in parts: gA, and gB or gC if constant, (B, segments, N, D), gD and gbias
    (B, segments, D), and `sums` (B, programs, 1 or 2, N, L), those of B and C that are not.
    """
    length = aligned(length, ALIGN)
    chunks = tl.cdiv(length, CHUNK)
    program, segment, batch, first_channel, channel, valid = _share(segments, span, channels, ROWS)
    step = tl.arange(0, CHUNK)
    padding: tl.constexpr = float("-inf") if SOFTPLUS else 0.0
    g_row = g_ptr + batch * aligned(g_b, ALIGN) + (channel * aligned(g_d, ALIGN))[None, :]
    u_row = u_ptr + batch * aligned(u_b, ALIGN) + (channel * aligned(u_d, ALIGN))[None, :]
    delta_row = delta_ptr + batch * aligned(delta_b, ALIGN) + (channel * aligned(delta_d, ALIGN))[None, :]
    gu_row = gu_ptr + batch * aligned(gu_b, ALIGN) + (channel * aligned(gu_d, ALIGN))[None, :]
    gdelta_row = gdelta_ptr + batch * aligned(gdelta_b, ALIGN) + (channel * aligned(gdelta_d, ALIGN))[None, :]
    if z_ptr is not None:
        z_row = z_ptr + batch * aligned(z_b, ALIGN) + (channel * aligned(z_d, ALIGN))[None, :]
        gz_row = gz_ptr + batch * aligned(gz_b, ALIGN) + (channel * aligned(gz_d, ALIGN))[None, :]
    if not B_CONSTANT:
        B_row = B_ptr + batch * aligned(B_b, ALIGN) + (first_channel // B_channels).to(tl.int64) * aligned(B_g, ALIGN)
    if not C_CONSTANT:
        C_row = C_ptr + batch * aligned(C_b, ALIGN) + (first_channel // C_channels).to(tl.int64) * aligned(C_g, ALIGN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, valid, 0.0).to(tl.float32)[None, :] * LOG2E  # (1, R)
    if D_ptr is not None:
        skip = tl.load(D_ptr + channel, valid, 0.0).to(tl.float32)[None, :]  # (1, R)
    SUMS: tl.constexpr = (0 if B_CONSTANT else 1) + (0 if C_CONSTANT else 1)
    part = program.to(tl.int64) * SUMS * states * length
    line = tl.arange(0, 16)[:, None]
    column = tl.arange(0, SUMS * CHUNK)[None, :]
    zero = tl.zeros([ROWS], tl.float32)
    gD = zero
    gbias = zero

    first_chunk = segment * segment_chunks
    last_chunk = tl.minimum(first_chunk + segment_chunks, chunks) - 1
    for number in range(first_chunk, last_chunk + 1):
        chunk = last_chunk - (number - first_chunk)
        start = chunk * CHUNK
        time = start + step
        inside = time < length
        mask = valid[None, :] & inside[:, None]
        time = time.to(tl.int64)
        u = _to_lanes(tl.load(u_row + time[:, None] * u_l, mask, 0.0))  # (T, R)
        s = _to_lanes(tl.load(delta_row + time[:, None] * delta_l, mask, padding)) * LOG2E  # (T, R)
        gy_tile = _to_lanes(tl.load(g_row + time[:, None] * g_l, mask, 0.0))  # (T, R)
        if bias_ptr is not None:
            s += bias
        dt2_tile = exponent(s, inside[:, None], SOFTPLUS)
        if z_ptr is not None:
            z = _to_lanes(tl.load(z_row + time[:, None] * z_l, mask, 0.0))  # (T, R)
            gy_tile *= z * tl.sigmoid(z)
        dt2 = _unstack(dt2_tile)
        x = _unstack(dt2_tile * LN2 * u)
        gy = _unstack(gy_tile)
        gx = repeat(zero, CHUNK)
        gdt = repeat(zero, CHUNK)
        y = repeat(zero, CHUNK)
        if entering_ptr is not None:
            since = tl.load(time_ptr + (batch * chunks + chunk) * channels + channel, valid, 0.0)  # (R,)
        border = border_ptr + (batch * chunks + chunk) * states * channels + channel
        state = (batch * segments + segment) * states * channels + channel
        later = chunk < last_chunk
        A_next = tl.load(A_ptr + channel * A_d, valid, 0.0).to(tl.float32)  # (R,)
        h_next = tl.load(border, valid, 0.0)  # (R,)
        carry_next = tl.load(carry_ptr + state, valid, 0.0)  # (R,)
        gA_next = tl.load(gA_ptr + state, valid & later, 0.0)  # (R,)
        for first_n in range(0, states, 16):
            if SUMS > 0:
                sums = tl.zeros([16, SUMS * CHUNK], tl.float32)
            for n in range(first_n, tl.minimum(first_n + 16, states)):
                A, h, carry, gA = A_next, h_next, carry_next, gA_next
                at = ((batch * segments + segment) * states + n) * channels + channel
                if entering_ptr is not None:
                    h += tl.exp2(A * since) * tl.load(entering_ptr + at, valid, 0.0)  # (R,)
                # What the next state needs is on its way while this one is walked.
                more = valid & (n + 1 < states)
                A_next = tl.load(A_ptr + channel * A_d + (n + 1) * A_n, more, 0.0).to(tl.float32)  # (R,)
                h_next = tl.load(border + (n + 1) * channels, more, 0.0)  # (R,)
                carry_next = tl.load(carry_ptr + at + channels, more, 0.0)  # (R,)
                gA_next = tl.load(gA_ptr + at + channels, more & later, 0.0)  # (R,)
                if B_CONSTANT:
                    B = repeat(tl.load(B_ptr + channel * B_g + n * B_n, valid, 0.0).to(tl.float32), CHUNK)  # (R,)
                    gB = tl.load(gB_ptr + at, valid & later, 0.0)  # (R,)
                else:
                    B = _every_lane(tl.load(B_row + n * aligned(B_n, ALIGN) + time * B_l, inside, 0.0), ROWS)  # (T,)
                if C_CONSTANT:
                    C = repeat(tl.load(C_ptr + channel * C_g + n * C_n, valid, 0.0).to(tl.float32), CHUNK)  # (R,)
                    gC = tl.load(gC_ptr + at, valid & later, 0.0)  # (R,)
                else:
                    C = _every_lane(tl.load(C_row + n * aligned(C_n, ALIGN) + time * C_l, inside, 0.0), ROWS)  # (T,)

                decay, before, gC_terms, y_with_n = (), (), (), ()
                for t in tl.static_range(CHUNK):
                    decay = decay + (tl.exp2(A * dt2[t]),)
                    before = before + (h,)
                    h = decay[t] * h + B[t] * x[t]
                    gC_terms = gC_terms + (gy[t] * h,)
                    if z_ptr is not None:
                        y_with_n = y_with_n + (y[t] + C[t] * h,)
                if z_ptr is not None:
                    y = y_with_n
                gB_terms, gx_with_n, gdt_with_n = (), (), ()
                for t in tl.static_range(CHUNK - 1, -1, -1):
                    g = C[t] * gy[t] + carry
                    gB_terms = (g * x[t],) + gB_terms
                    gx_with_n = (gx[t] + B[t] * g,) + gx_with_n
                    carry = decay[t] * g
                    g_log = carry * before[t]  # gradient of the decay's logarithm dt A
                    gdt_with_n = (gdt[t] + A * g_log,) + gdt_with_n
                    gA += g_log * (dt2[t] * LN2)
                gx, gdt = gx_with_n, gdt_with_n
                tl.store(carry_ptr + at, carry, valid)  # (R,)
                tl.store(gA_ptr + at, gA, valid)  # (R,)
                terms = ()
                if B_CONSTANT:
                    for t in tl.static_range(CHUNK):
                        gB += gB_terms[t]
                    tl.store(gB_ptr + at, gB, valid)  # (R,)
                else:
                    terms = gB_terms
                if C_CONSTANT:
                    for t in tl.static_range(CHUNK):
                        gC += gC_terms[t]
                    tl.store(gC_ptr + at, gC, valid)  # (R,)
                else:
                    terms = terms + gC_terms
                if SUMS > 0:
                    sums = _add_sums(sums, n - first_n, terms, SUMS * CHUNK)
            if SUMS > 0:
                line_of_sums = column // CHUNK * states + first_n + line
                time_of_sums = (start + column % CHUNK).to(tl.int64)
                at = part + line_of_sums * length + time_of_sums
                tl.store(sums_ptr + at, sums, (first_n + line < states) & (time_of_sums < length))  # (16, SUMS * T)

        # Again rather than in registers through the loop over the states.
        u = _to_lanes(tl.load(u_row + time[:, None] * u_l, mask, 0.0))  # (T, R)
        s = _to_lanes(tl.load(delta_row + time[:, None] * delta_l, mask, padding)) * LOG2E  # (T, R)
        if bias_ptr is not None:
            s += bias
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
        if z_ptr is not None:
            z = _to_lanes(tl.load(z_row + time[:, None] * z_l, mask, 0.0))  # (T, R)
            g = _to_lanes(tl.load(g_row + time[:, None] * g_l, mask, 0.0))  # (T, R)
            gate = tl.sigmoid(z)
            y_tile = _stack(y, CHUNK)
            if D_ptr is not None:
                y_tile += skip * u
            gz = g * gate * (1 + z * (1 - gate)) * y_tile
            tl.store(gz_row + time[:, None] * gz_l, gz, mask)  # (T, R)
        tl.store(gu_row + time[:, None] * gu_l, gu, mask)  # (T, R)
        tl.store(gdelta_row + time[:, None] * gdelta_l, gdelta, mask)  # (T, R)
    at = (batch * segments + segment) * channels + channel
    if D_ptr is not None:
        tl.store(gD_ptr + at, gD, valid)  # (R,)
    if bias_ptr is not None:
        tl.store(gbias_ptr + at, gbias, valid)  # (R,)


def _segment_chunks(scan: Scan) -> int:
    """Chunks of a segment: all, unless the rows are too few to keep a GPU busy."""
    return _SEGMENT if scan.programs(_ROWS) < MIN_PROGRAMS else cdiv(scan.length, _CHUNK)


def suits(scan: Scan, align: int) -> bool:
    """Whether these kernels are the faster ones: several states, 16 bits, and enough segments to keep a GPU busy."""
    segments = cdiv(cdiv(scan.length, _CHUNK), _segment_chunks(scan))
    full_lanes = scan.span % _ROWS == 0 and scan.programs(_ROWS) * segments >= MIN_PROGRAMS
    return scan.states > 1 and scan.u.element_size() == 2 and align >= 4 and full_lanes


def backward(scan: Scan, g: Tensor, g_state: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and the bias of delta, from those of the output and of the last state."""
    # Converted once, as every lane would convert the values of all steps.
    B, C = scan.B.float(), scan.C.float()
    scan = Scan(scan.u, scan.delta, scan.A, B, C, scan.D, scan.z, scan.bias, scan.softplus)
    batch, channels, states, length = scan.batch, scan.channels, scan.states, scan.length
    gu, gdelta = torch.empty_like(scan.u), torch.empty_like(scan.delta)
    gz = None if scan.z is None else torch.empty_like(scan.z)
    programs = scan.programs(_ROWS)
    chunks = cdiv(length, _CHUNK)
    segment_chunks = _segment_chunks(scan)
    segments = cdiv(chunks, segment_chunks)
    parallel = segments > 1
    sizes = (segments, segment_chunks, scan.span, channels, length, states, scan.B_channels, scan.C_channels)
    strides = (
        *g.stride(),
        *scan.u.stride(),
        *scan.delta.stride(),
        *scan.A.stride(),
        *scan.B_strides,
        *scan.C_strides,
        *strides_of(scan.z),
    )
    options = {
        "SOFTPLUS": scan.softplus,
        "B_CONSTANT": scan.B_channels == 0,
        "C_CONSTANT": scan.C_channels == 0,
        "ALIGN": scan.alignment(g, gu, gdelta, gz),
        "ROWS": _ROWS,
        "CHUNK": _CHUNK,
        # One warp needs no barriers; loads a chunk ahead would need registers that there are not.
        "num_warps": 1,
        "num_stages": 1,
    }

    by_state, by_channel = (batch, segments, states, channels), (batch, segments, channels)
    border = scan.new(batch, chunks, states, channels)
    entering = scan.new(*by_state)
    time = scan.new(batch, chunks, channels) if parallel else None
    total = scan.new(*by_channel) if parallel else None
    adjoint = scan.new(*by_state) if parallel else None
    selective_scan_states_rows_kernel[(programs * segments,)](
        g,
        scan.u,
        scan.delta,
        scan.A,
        scan.B,
        scan.C,
        scan.z,
        scan.bias,
        border,
        entering,
        adjoint,
        time,
        total,
        *sizes,
        *strides,
        **options,
    )
    if parallel:
        for state, behind in ((entering, None), (adjoint, g_state)):
            selective_scan_borders_kernel[(cdiv(channels, 32), states, batch)](
                total,
                scan.A,
                state,
                behind,
                segments,
                channels,
                states,
                *scan.A.stride(),
                ROWS=32,
                STEPS=8,
                num_warps=1,
            )

    gA = scan.new(*by_state)
    gB = None if scan.B_channels else scan.new(*by_state)
    gC = None if scan.C_channels else scan.new(*by_state)
    summed = (scan.B_channels > 0) + (scan.C_channels > 0)
    sums = scan.new(batch, programs // batch, summed, states, length) if summed else None
    gD = None if scan.D is None else scan.new(*by_channel)
    gbias = None if scan.bias is None else scan.new(*by_channel)
    selective_scan_bwd_rows_kernel[(programs * segments,)](
        g,
        scan.u,
        scan.delta,
        scan.A,
        scan.B,
        scan.C,
        scan.D,
        scan.z,
        scan.bias,
        border,
        time,
        entering if parallel else None,
        adjoint if parallel else g_state.transpose(1, 2).clone(memory_format=torch.contiguous_format),
        gu,
        gdelta,
        gA,
        gB,
        gC,
        sums,
        gD,
        gz,
        gbias,
        *sizes,
        *strides,
        *gu.stride(),
        *gdelta.stride(),
        *strides_of(gz),
        **options,
    )
    # (B, spans, 1 or 2, N, L), of B and C that are not constant
    by_span = None if sums is None else sums.unflatten(1, (channels // scan.span, -1)).sum(2)

    def projection(like: Tensor, constant: Tensor | None, index: int) -> Tensor:
        if constant is not None:
            return constant.sum((0, 1)).t()
        groups = 1 if like.dim() == 3 else like.shape[1]
        return by_span[:, :, index].unflatten(1, (groups, -1)).sum(2).reshape(like.shape)

    return (
        gu,
        gdelta,
        gA.sum((0, 1)).t(),
        projection(scan.B, gB, 0),
        projection(scan.C, gC, summed - 1),
        None if gD is None else gD.sum((0, 1)),
        gz,
        None if gbias is None else gbias.sum((0, 1)),
    )
