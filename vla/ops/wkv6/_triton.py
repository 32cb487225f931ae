"""Bidirectional WKV6 in chunks on tensor cores.

Within a chunk the pairs of tokens are sorted by the smallest aligned span that holds both: at level s one token lies in
the left half of a span of `2^(s+1)` tokens and the other in its right half. The decay between them is the product of
those from the one to the middle and from the middle to the other, each a function of one token, at most 1, and the
exponential of a sum of logarithms of one sign: nothing overflows and nothing cancels, however strong the decay.
So a level is one matrix product, masked to its pairs. See README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, kernel, leading, next_power_of_2, product, product_precision


@triton.jit
def sums(mask, x, PRECISION: tl.constexpr):
    """mask @ x."""
    mask = tl.where(mask, 1.0, 0.0)
    if PRECISION == "tf32x3":
        lead = leading(x)
        rest = tl.dot(mask, x - lead, input_precision="tf32")
        return tl.dot(mask, lead, rest, input_precision="tf32")
    return product(mask, x, PRECISION)


@triton.jit
def decay_rate(w):
    """Minus the logarithm of the decay; the bound keeps sums of it finite where the decay is 0 either way."""
    return tl.exp2(tl.minimum(w.to(tl.float32), 80.0) * LOG2E)


@triton.jit
def between(mask, log_decay, PRECISION: tl.constexpr):
    """Products over the tokens j of a chunk with mask[t, j] of their decays, from the logarithms to base 2."""
    return tl.exp2(sums(mask, log_decay, PRECISION))


@triton.jit
def towards_middle(level, L: tl.constexpr):
    """mask[t, j] of the tokens j between t and the middle of t's span of `2^(level + 1)` tokens."""
    t, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    start = (t >> level) << level
    right = ((t >> level) & 1) == 1
    return (j >= tl.where(right, start, t + 1)) & (j < tl.where(right, t, start + (1 << level)))


@triton.jit
def pairs_at(level, L: tl.constexpr):
    """mask[t, i] of the pairs in different halves of a span of `2^(level + 1)` tokens."""
    t, i = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    return (i >> level) == ((t >> level) ^ 1)


@kernel
def wkv6_states_kernel(
    a,
    b,
    w,
    states,
    ends,
    totals,
    length,
    sequences,
    heads,
    chunks,
    segments,
    a_batch,
    a_token,
    b_batch,
    b_token,
    w_batch,
    w_token,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of decayed a_i b_i^T over all chunks before (direction 0) or after (direction 1) each chunk.

    One program walks one segment of one sequence in one direction, with one tile of the (N, N) state. Without `states`
    it leaves the segment's own sum in `ends` and the logarithm of its decay in `totals`; else it starts from `ends`.
    """
    tiles_v = tl.cdiv(N, BLOCK_V)
    tiles = tl.cdiv(N, BLOCK_K) * tiles_v
    program = tl.program_id(0)
    tile = program % tiles
    segment = (program // tiles) % segments
    sequence = (program // (tiles * segments)) % sequences
    direction = program // (tiles * segments * sequences)

    batch, first = (sequence // heads).to(tl.int64), (sequence % heads) * N
    row = (tile // tiles_v) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (tile % tiles_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (row < N)[:, None] & (column < N)[None, :]
    a += batch * a_batch + first + row
    b += batch * b_batch + first + column
    w += batch * w_batch + first + row
    walk = direction.to(tl.int64) * sequences + sequence
    entry = row[:, None] * N + column[None, :]

    t, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    outer = tl.where(direction == 0, j > t, j < t)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_K,), tl.float32)
    if ends is not None:
        # (2, sequences, segments, N, N) and (2, sequences, segments, N)
        ends += (walk * segments + segment) * N * N + entry
        totals += (walk * segments + segment) * N + row
        if states is not None:
            state = tl.load(ends, inside, 0.0)  # (BLOCK_K, BLOCK_V)
    steps = tl.cdiv(chunks, segments)
    for step in range(segment * steps, tl.minimum((segment + 1) * steps, chunks)):
        chunk = tl.where(direction == 0, step, chunks - 1 - step)
        token = chunk.to(tl.int64) * L + tl.arange(0, L)
        inside_k = (token < length)[:, None] & (row < N)[None, :]
        inside_v = (token < length)[:, None] & (column < N)[None, :]
        a_chunk = tl.load(a + token[:, None] * a_token, inside_k, 0.0)  # (L, BLOCK_K)
        b_chunk = tl.load(b + token[:, None] * b_token, inside_v, 0.0)  # (L, BLOCK_V)
        w_chunk = tl.load(w + token[:, None] * w_token, inside_k, float("-inf"))  # (L, BLOCK_K)
        if states is not None:
            # (2, sequences, chunks, N, N)
            tl.store(states + (walk * chunks + chunk) * N * N + entry, state.to(states.dtype.element_ty), inside)
        log_decay = -LOG2E * decay_rate(w_chunk)
        a_chunk = a_chunk.to(tl.float32) * between(outer, log_decay, PRECISION)
        of_chunk = tl.sum(log_decay, 0)
        total += of_chunk
        state = state * tl.exp2(of_chunk)[:, None] + product(tl.trans(a_chunk), b_chunk, PRECISION)
    if states is None:
        tl.store(ends, state, inside)
        tl.store(totals, total, row < N)


@kernel
def wkv6_segments_kernel(ends, totals, segments, N: tl.constexpr, BLOCK: tl.constexpr):
    """Replaces each segment's own sum in `ends` by the sum of all segments before it, one (N, N) state a program."""
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ends += tl.program_id(0).to(tl.int64) * segments * N * N + entry
    totals += tl.program_id(0).to(tl.int64) * segments * N + entry // N
    state = tl.zeros((BLOCK,), tl.float32)
    for _ in range(segments):
        own = tl.load(ends, entry < N * N, 0.0)
        total = tl.load(totals, entry < N * N, 0.0)
        tl.store(ends, state, entry < N * N)
        state = state * tl.exp2(total) + own
        ends += N * N
        totals += N


@kernel
def wkv6_fwd_kernel(
    r,
    k,
    v,
    w,
    u,
    states,
    y,
    length,
    sequences,
    heads,
    chunks,
    levels,
    r_batch,
    r_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    w_batch,
    w_token,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of one chunk in one tile of the value channels. With r and k swapped and gy for v: the gradient of v."""
    tiles_v = tl.cdiv(N, BLOCK_V)
    program = tl.program_id(0)
    tile = program % tiles_v
    chunk = (program // tiles_v) % chunks
    sequence = program // (tiles_v * chunks)

    batch, first = (sequence // heads).to(tl.int64), (sequence % heads) * N
    token = chunk.to(tl.int64) * L + tl.arange(0, L)
    valid = (token < length)[:, None]
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    r += batch * r_batch + first + token[:, None] * r_token
    k += batch * k_batch + first + token[:, None] * k_token
    v += batch * v_batch + first + token[:, None] * v_token + column[None, :]
    w += batch * w_batch + first + token[:, None] * w_token
    y += (batch * length + token[:, None]) * heads * N + first + column[None, :]
    # (2, sequences, chunks, N, N)
    past = states + (sequence.to(tl.int64) * chunks + chunk) * N * N + column[None, :]
    future = states + ((sequence.to(tl.int64) + sequences) * chunks + chunk) * N * N + column[None, :]

    t, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    inside_v = valid & (column < N)[None, :]
    out = tl.zeros((L, BLOCK_V), tl.float32)
    score = tl.zeros((L, L), tl.float32)
    for start in range(0, N, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside_k = valid & (row < N)[None, :]
        r_chunk = tl.load(r + row[None, :], inside_k, 0.0).to(tl.float32)  # (L, BLOCK_K)
        k_chunk = tl.load(k + row[None, :], inside_k, 0.0).to(tl.float32)  # (L, BLOCK_K)
        w_chunk = tl.load(w + row[None, :], inside_k, float("-inf"))  # (L, BLOCK_K)
        bonus = tl.load(u + first + row, row < N, 0.0).to(tl.float32)  # (BLOCK_K,)
        log_decay = -LOG2E * decay_rate(w_chunk)

        if chunks > 1:
            inside = (row < N)[:, None] & (column < N)[None, :]
            state = tl.load(past + row[:, None] * N, inside, 0.0)  # (BLOCK_K, BLOCK_V)
            out += product(r_chunk * between(j < t, log_decay, PRECISION), state, PRECISION)
            state = tl.load(future + row[:, None] * N, inside, 0.0)  # (BLOCK_K, BLOCK_V)
            out += product(r_chunk * between(j > t, log_decay, PRECISION), state, PRECISION)

        of_all = product(r_chunk, tl.trans(k_chunk), PRECISION)
        of_self = tl.sum(r_chunk * k_chunk * bonus[None, :], 1)[:, None]
        score += tl.where(j == t, of_self, tl.where(pairs_at(0, L), of_all, 0.0))
        for level in range(1, levels):
            decay = between(towards_middle(level, L), log_decay, PRECISION)
            of_all = product(r_chunk * decay, tl.trans(k_chunk * decay), PRECISION)
            score += tl.where(pairs_at(level, L), of_all, 0.0)
    v_chunk = tl.load(v, inside_v, 0.0)  # (L, BLOCK_V)
    out += product(score, v_chunk, PRECISION)
    tl.store(y, out.to(y.dtype.element_ty), inside_v)


@kernel
def wkv6_bwd_kernel(
    r,
    k,
    v,
    w,
    u,
    gy,
    states,
    g_states,
    gr,
    gk,
    gw,
    gu,
    length,
    sequences,
    heads,
    chunks,
    levels,
    r_batch,
    r_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    w_batch,
    w_token,
    gy_batch,
    gy_token,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of r, k, w, and the chunk's part of u's, for one chunk in one tile of the key channels."""
    tiles_k = tl.cdiv(N, BLOCK_K)
    program = tl.program_id(0)
    tile = program % tiles_k
    chunk = (program // tiles_k) % chunks
    sequence = program // (tiles_k * chunks)

    batch, first = (sequence // heads).to(tl.int64), (sequence % heads) * N
    token = chunk.to(tl.int64) * L + tl.arange(0, L)
    valid = (token < length)[:, None]
    row = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_k = valid & (row < N)[None, :]
    v += batch * v_batch + first + token[:, None] * v_token
    gy += batch * gy_batch + first + token[:, None] * gy_token

    g_score = tl.zeros((L, L), tl.float32)
    for start in range(0, N, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside_v = valid & (column < N)[None, :]
        v_chunk = tl.load(v + column[None, :], inside_v, 0.0)  # (L, BLOCK_V)
        gy_chunk = tl.load(gy + column[None, :], inside_v, 0.0)  # (L, BLOCK_V)
        g_score += product(gy_chunk, tl.trans(v_chunk), PRECISION)
    if PRECISION == "bf16":
        g_pairs = g_score.to(tl.bfloat16)
    else:
        g_pairs = g_score

    channel = first + row[None, :]
    r_chunk = tl.load(r + batch * r_batch + token[:, None] * r_token + channel, inside_k, 0.0).to(tl.float32)
    k_chunk = tl.load(k + batch * k_batch + token[:, None] * k_token + channel, inside_k, 0.0).to(tl.float32)
    w_chunk = tl.load(w + batch * w_batch + token[:, None] * w_token + channel, inside_k, float("-inf"))
    bonus = tl.load(u + first + row, row < N, 0.0).to(tl.float32)  # (BLOCK_K,)
    log_decay = -LOG2E * decay_rate(w_chunk)

    # The token itself.
    t, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    diagonal = tl.sum(tl.where(j == t, g_score, 0.0), 1)[:, None]
    gu_chunk = tl.sum(diagonal * r_chunk * k_chunk, 0)
    gr_chunk = diagonal * bonus[None, :] * k_chunk
    gk_chunk = diagonal * bonus[None, :] * r_chunk
    g_log = tl.zeros((L, BLOCK_K), tl.float32)

    # Partners in other chunks, first those before, then those after; for the decays also the pairs around the chunk.
    if chunks > 1:
        across = tl.zeros((BLOCK_K,), tl.float32)
        for direction in range(2):
            same = ((sequence.to(tl.int64) + direction * sequences) * chunks + chunk) * N * N + row[:, None] * N
            other = ((sequence.to(tl.int64) + (1 - direction) * sequences) * chunks + chunk) * N * N + row[:, None] * N
            r_outer = tl.zeros((L, BLOCK_K), tl.float32)
            k_outer = tl.zeros((L, BLOCK_K), tl.float32)
            for start in range(0, N, BLOCK_V):
                column = start + tl.arange(0, BLOCK_V)
                inside_v = valid & (column < N)[None, :]
                inside = (row < N)[:, None] & (column < N)[None, :]
                gy_chunk = tl.load(gy + column[None, :], inside_v, 0.0)  # (L, BLOCK_V)
                state = tl.load(states + same + column[None, :], inside, 0.0)  # (BLOCK_K, BLOCK_V)
                r_outer += product(gy_chunk, tl.trans(state), PRECISION)
                g_state = tl.load(g_states + other + column[None, :], inside, 0.0)  # (BLOCK_K, BLOCK_V)
                across += tl.sum(state.to(tl.float32) * g_state.to(tl.float32), 1)
                v_chunk = tl.load(v + column[None, :], inside_v, 0.0)  # (L, BLOCK_V)
                g_state = tl.load(g_states + same + column[None, :], inside, 0.0)  # (BLOCK_K, BLOCK_V)
                k_outer += product(v_chunk, tl.trans(g_state), PRECISION)
            towards = tl.where(direction == 0, j < t, j > t)
            decay = between(towards, log_decay, PRECISION)
            r_outer *= decay
            k_outer *= decay
            gr_chunk += r_outer
            gk_chunk += k_outer
            q = r_chunk * r_outer + k_chunk * k_outer
            g_log += sums(tl.trans(towards), q, PRECISION)
        g_log += (tl.exp2(tl.sum(log_decay, 0)) * across)[None, :]

    # Pairs inside the chunk.
    for level in range(levels):
        towards = towards_middle(level, L)
        decay = between(towards, log_decay, PRECISION)
        pairs = tl.where(pairs_at(level, L), g_pairs, 0.0)
        g = decay * product(pairs, k_chunk * decay, PRECISION)
        gr_chunk += g
        q = g * r_chunk
        g = decay * product(tl.trans(pairs), r_chunk * decay, PRECISION)
        gk_chunk += g
        q += g * k_chunk
        g_log += sums(tl.trans(towards), q, PRECISION)

    out = (batch * length + token[:, None]) * heads * N + channel
    tl.store(gr + out, gr_chunk.to(gr.dtype.element_ty), inside_k)
    tl.store(gk + out, gk_chunk.to(gk.dtype.element_ty), inside_k)
    # Loaded again: its registers are worth more in between.
    w_chunk = tl.load(w + batch * w_batch + token[:, None] * w_token + channel, inside_k, float("-inf"))
    tl.store(gw + out, (-decay_rate(w_chunk) * g_log).to(gw.dtype.element_ty), inside_k)
    # (heads, N, B * chunks)
    parts = sequences // heads * chunks
    tl.store(gu + (first + row).to(tl.int64) * parts + batch * chunks + chunk, gu_chunk, row < N)


def _rows(x: Tensor) -> Tensor:
    """x (B, T, C) with contiguous channels, as the linear layers before the operator leave them."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _tiling(length: int, precision: str) -> tuple[int, tuple, tuple]:
    """Logarithm of the tokens in a chunk; tiles (BLOCK_K, BLOCK_V) and warps of states, forward, backward."""
    # Two warps, or 32 rows, keep to the matrix instructions of Ampere. Hopper's are no faster here, and where tiles
    # have two widths, ptxas 12.8 mixes up the addresses of their operands.
    if precision == "bf16":
        levels, blocks, warps = 5, ((64, 64), (64, 64), (64, 64)), (2, 2, 4)
    else:
        levels, blocks, warps = 5, ((32, 64), (32, 64), (32, 64)), (4, 4, 4)
    if length <= 16:
        # Of 16 x 16 tiles, four warps get products that are wrong and not twice the same (Triton 3.6, Hopper).
        levels, warps = 4, (2, 2, 2)
    return levels, blocks, warps


def _segments(chunks: int, walks: int) -> int:
    """Parts of every sequence that are walked at the same time, where the sequences alone don't fill a GPU.

    It costs a second walk, so the parts are kept few, and long beside the walk over their ends.
    """
    wanted = max(1, min(512 // walks, chunks // 8))
    return cdiv(chunks, cdiv(chunks, wanted))


class _Launcher:
    """Sizes and precision of one call."""

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, u: Tensor):
        self.batch, self.length, self.channels = r.shape
        self.heads, self.size = u.shape
        self.sequences = self.batch * self.heads
        self.precision = product_precision(r, k, v)
        self.levels, blocks, self.warps = _tiling(self.length, self.precision)
        self.chunk = 1 << self.levels
        self.chunks = cdiv(self.length, self.chunk)
        padded = max(16, next_power_of_2(self.size))
        self.blocks = [(min(k, padded), min(v, padded)) for k, v in blocks]

    def states(self, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        """Sums of decayed a_i b_i^T of all chunks before, and after, each chunk, (2, sequences, chunks, N, N)."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        states = torch.empty(2, self.sequences, self.chunks, self.size, self.size, dtype=dtype, device=a.device)
        if self.chunks == 1:
            return states
        block_k, block_v = self.blocks[0]
        walks = 2 * self.sequences * cdiv(self.size, block_k) * cdiv(self.size, block_v)
        segments = _segments(self.chunks, walks)
        ends = totals = None
        if segments > 1:
            ends = states.new_empty(2, self.sequences, segments, self.size, self.size, dtype=torch.float32)
            totals = states.new_empty(2, self.sequences, segments, self.size, dtype=torch.float32)

        def walk(into: Tensor | None) -> None:
            wkv6_states_kernel[(walks * segments,)](
                a,
                b,
                w,
                into,
                ends,
                totals,
                self.length,
                self.sequences,
                self.heads,
                self.chunks,
                segments,
                *a.stride()[:2],
                *b.stride()[:2],
                *w.stride()[:2],
                N=self.size,
                L=self.chunk,
                BLOCK_K=block_k,
                BLOCK_V=block_v,
                PRECISION=self.precision,
                num_warps=self.warps[0],
            )

        if segments > 1:
            walk(None)
            blocks = cdiv(self.size**2, 256)
            wkv6_segments_kernel[(2 * self.sequences, blocks)](
                ends, totals, segments, N=self.size, BLOCK=256, num_warps=2
            )
        walk(states)
        return states

    def outputs(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor) -> Tensor:
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        block_k, block_v = self.blocks[1]
        wkv6_fwd_kernel[(cdiv(self.size, block_v) * self.chunks * self.sequences,)](
            r,
            k,
            v,
            w,
            u,
            states,
            y,
            self.length,
            self.sequences,
            self.heads,
            self.chunks,
            self.levels,
            *r.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *w.stride()[:2],
            N=self.size,
            L=self.chunk,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            PRECISION=self.precision,
            num_warps=self.warps[1],
        )
        return y

    def gradients(self, r, k, v, w, u, gy, states, g_states) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of r, k, w and u."""
        gr, gk, gw = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, w))
        gu = torch.empty(self.heads, self.size, self.batch * self.chunks, dtype=torch.float32, device=r.device)
        block_k, block_v = self.blocks[2]
        wkv6_bwd_kernel[(cdiv(self.size, block_k) * self.chunks * self.sequences,)](
            r,
            k,
            v,
            w,
            u,
            gy,
            states,
            g_states,
            gr,
            gk,
            gw,
            gu,
            self.length,
            self.sequences,
            self.heads,
            self.chunks,
            self.levels,
            *r.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *w.stride()[:2],
            *gy.stride()[:2],
            N=self.size,
            L=self.chunk,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            PRECISION=self.precision,
            num_warps=self.warps[2],
        )
        return gr, gk, gw, gu.sum(2)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    if r.numel() == 0:
        return torch.empty_like(v, memory_format=torch.contiguous_format)
    launcher = _Launcher(r, k, v, u)
    r, k, v, w, u = _rows(r), _rows(k), _rows(v), _rows(w), u.contiguous()
    return launcher.outputs(r, k, v, w, u, launcher.states(k, v, w))


def backward(grads: list[Tensor], r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    if r.numel() == 0:
        return tuple(torch.zeros_like(x) for x in (r, k, v, w, u))
    launcher = _Launcher(r, k, v, u)
    r, k, v, w, gy, u = _rows(r), _rows(k), _rows(v), _rows(w), _rows(grads[0]), u.contiguous()
    states, g_states = launcher.states(k, v, w), launcher.states(r, gy, w)
    gr, gk, gw, gu = launcher.gradients(r, k, v, w, u, gy, states, g_states)
    # Pairs are symmetric in (r, gy) and (k, v).
    gv = launcher.outputs(k, r, gy, w, u, g_states)
    return gr, gk, gv, gw, gu
