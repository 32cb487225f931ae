"""Triton kernels of the directional scan: every direction walks the map in place, see the README for the design."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LN2, LOG2E, compose, pick, settle, softplus2


@triton.jit
def _compose_exclusive(decay1, state1, before1, out1, decay2, state2, before2, out2):
    """Composition of two runs of steps that also keeps the run without its last step (`before`, `out`)."""
    return decay1 * decay2, decay2 * state1 + state2, decay1 * before2, before2 * state1 + out2


@triton.jit
def _scan(decay, step, carry, T: tl.constexpr, S: tl.constexpr):
    """`h = decay h + step` over a (T, S, D) tile of S segments of T steps, from the state `carry` (D,).

    Segments are walked side by side, each by threads that own it: only their ends meet across threads.

    Returns:
        h (T, S, D) and the state after the tile (D,).
    """
    decay, h = tl.associative_scan((decay, step), 0, compose)
    t = tl.arange(0, T)[:, None, None]
    decays, states = pick(decay, t, T - 1), pick(h, t, T - 1)  # (S, D)
    if S > 1:
        one, zero = tl.full(states.shape, 1.0, tl.float32), tl.zeros_like(states)
        decays, states, before_decay, before_state = tl.associative_scan(
            (decays, states, one, zero), 0, _compose_exclusive
        )
        entry = before_state + before_decay * carry[None, :]  # (S, D)
    else:
        entry = carry[None, :]
    s = tl.arange(0, S)[:, None]
    return h + decay * entry[None, :, :], pick(states, s, S - 1) + pick(decays, s, S - 1) * carry


@triton.jit
def _offsets(o, line, column, sign, inner, s_outer, s_inner, WIDE: tl.constexpr):
    """Offsets of the pixels `o` steps from (line, column), where steps may cross the ends of lines."""
    j = column + sign * o
    # A quotient in float32 is exact here: the numerator is below the length of a line plus a chunk.
    i = tl.floor((j.to(tl.float32) + 0.5) * (1.0 / inner.to(tl.float32))).to(tl.int32)
    j -= i * inner
    i += line
    if WIDE:
        return i.to(tl.int64) * s_outer + j.to(tl.int64) * s_inner
    return i * s_outer + j * s_inner


@triton.jit
def _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD: tl.constexpr):
    """The time step's weight (R, D) and bias (D,) of direction k, times log2(e)."""
    r = tl.arange(0, max(R_PAD, 1))
    bias = tl.zeros(d.shape, tl.float32)
    weight = tl.zeros((r.shape[0], d.shape[0]), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32) * LOG2E
    if R_PAD > 0:
        weight_mask = (r < R)[:, None] & d_mask[None, :]
        rows = (k * channels + d) * R
        weight = tl.load(weight_ptr + rows[None, :] + r[:, None], mask=weight_mask, other=0.0).to(tl.float32) * LOG2E
    return weight, bias


@triton.jit
def _time_step(
    dt_ptr, at, mask, d, d_mask, weight, bias, dt_s, R,
    T: tl.constexpr, S: tl.constexpr, R_PAD: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Time steps times log2(e), (T, S, D)."""
    if R_PAD > 0:
        r = tl.arange(0, R_PAD)
        low_mask = mask[:, None] & (r < R)[None, :]
        low = tl.load(dt_ptr + at[:, None] + r[None, :] * dt_s, mask=low_mask, other=0.0)  # (T * S, R)
        step = tl.dot(low.to(tl.float32), weight, input_precision=PRECISION)
    else:
        low_mask = mask[:, None] & d_mask[None, :]
        low = tl.load(dt_ptr + at[:, None] + d[None, :] * dt_s, mask=low_mask, other=0.0)  # (T * S, D)
        step = low.to(tl.float32) * LOG2E
    step = settle(tl.reshape(step, (T, S, bias.shape[0]))) + bias[None, None, :]
    return softplus2(step) if SOFTPLUS else step


@triton.jit
def _load_column(ptr, at, mask, T: tl.constexpr, S: tl.constexpr):
    """One number a pixel, (T, S, 1)."""
    return tl.reshape(tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32), (T, S))[:, :, None]


@triton.jit
def scan2d_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, weight_ptr, bias_ptr, partial_ptr, y_ptr,
    K, flips, columns, height, width, channels, N, R, blocks, sequences, chunks,
    xs_b, xs_d, xs_h, xs_w, ps_b, ps_k, ps_h, ps_w, dt_s, B_s, C_s, ys_b, ys_d, ys_h, ys_w,
    T: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, N_PAD: tl.constexpr, R_PAD: tl.constexpr,
    VECTOR: tl.constexpr, GROUPED: tl.constexpr, PER_LINE: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of a picture (or, with PER_LINE, of its i-th lines), through all K directions in turn."""
    block = tl.program_id(0) % blocks
    sequence = tl.program_id(0) // blocks
    b = (sequence // sequences).to(tl.int64)
    x_ptr += b * xs_b
    y_ptr += b * ys_b
    partial_ptr += b * ys_b
    dt_ptr += b * ps_b
    B_ptr += b * ps_b
    C_ptr += b * ps_b

    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < channels
    n_index = tl.arange(0, N_PAD)[:, None]
    # Rows of a tile are (t, s) for step t of segment s: neighbouring rows are in different lanes and warps, so that a
    # segment stays in one thread.
    row = tl.arange(0, T * S)
    o = row % S * T + row // S

    first = tl.program_id(1) if GROUPED else 0
    last = first if GROUPED else K - 1
    for k in range(first, last + 1):
        column_major = (columns >> k) & 1 == 1
        outer = tl.where(column_major, width, height)
        inner = tl.where(column_major, height, width)
        xs_o, xs_i = tl.where(column_major, xs_w, xs_h), tl.where(column_major, xs_h, xs_w)
        ps_o, ps_i = tl.where(column_major, ps_w, ps_h), tl.where(column_major, ps_h, ps_w)
        ys_o, ys_i = tl.where(column_major, ys_w, ys_h), tl.where(column_major, ys_h, ys_w)
        if PER_LINE:
            first_line = sequence % sequences
            length = tl.where(first_line < outer, inner, 0)
        else:
            first_line = 0
            length = outer * inner
        # A flipped direction starts at the last pixel and walks with a negative sign.
        flip = (flips >> k) & 1
        sign = 1 - 2 * flip

        weight, bias = _load_parameters(weight_ptr, bias_ptr, k, d, d_mask, channels, R, R_PAD)
        skip = tl.zeros((BLOCK_D,), tl.float32)
        if D_ptr is not None:
            skip += tl.load(D_ptr + k * channels + d, mask=d_mask, other=0.0).to(tl.float32)
        # The width of a thread's loads decides how many lanes the channels of a pixel take.
        vector = tl.max_contiguous(k * channels + d if GROUPED else d, VECTOR)
        carry = tl.zeros((N_PAD, BLOCK_D), tl.float32)
        for chunk in range(0, chunks):
            start = chunk * (T * S)
            at = flip * (length - 1) + sign * start
            line, column = first_line + at // inner, at % inner
            mask = start + o < length
            full_mask = mask[:, None] & d_mask[None, :]
            x_at = _offsets(o, line, column, sign, inner, xs_o, xs_i, WIDE)[:, None] + (vector * xs_d)[None, :]
            y_at = _offsets(o, line, column, sign, inner, ys_o, ys_i, WIDE)[:, None] + (vector * ys_d)[None, :]
            p_at = _offsets(o, line, column, sign, inner, ps_o, ps_i, WIDE)
            x = tl.load(x_ptr + x_at, mask=full_mask, other=0.0)  # (T * S, D)
            x = tl.reshape(x.to(tl.float32), (T, S, BLOCK_D))
            step = _time_step(
                dt_ptr + k * ps_k, p_at, mask, d, d_mask, weight, bias, dt_s, R, T, S, R_PAD, SOFTPLUS, PRECISION
            )
            y = skip[None, None, :] * x
            for n in range(0, N):
                A = tl.load(A_ptr + (k * channels + d) * N + n, mask=d_mask, other=0.0).to(tl.float32)
                b_n = _load_column(B_ptr + k * ps_k + n * B_s, p_at, mask, T, S)
                c_n = _load_column(C_ptr + k * ps_k + n * C_s, p_at, mask, T, S)
                entry = pick(carry, n_index, n)
                h, end = _scan(tl.exp2(A[None, None, :] * step), step * (b_n * x), entry, T, S)
                carry = tl.where(n_index == n, end[None, :], carry)
                y += (c_n * LN2) * h

            y = tl.reshape(y, (T * S, BLOCK_D))
            if k > first:
                y += tl.load(partial_ptr + y_at, mask=full_mask, other=0.0)  # (T * S, D)
            if k < last:
                tl.store(partial_ptr + y_at, y, mask=full_mask)
            else:
                tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=full_mask)
        # The next direction reads what other threads of this program have written.
        tl.debug_barrier()


class Config(NamedTuple):
    """How a kernel cuts its work: tiles of T * S pixels by BLOCK_D channels."""

    T: int
    S: int
    BLOCK_D: int
    VECTOR: int
    num_warps: int


def _fwd_config(length: int, channels: int) -> Config:
    return Config(16, 8, 32, 2, 4)


def _packed(*maps: Tensor) -> list[Tensor]:
    """Maps (B, K, E, H, W) that differ in their strides of E only, as views of one projection do."""
    if len({(m.stride(0), m.stride(1), m.stride(3), m.stride(4)) for m in maps}) == 1:
        return list(maps)
    sizes = [m.shape[2] for m in maps]
    joined = torch.cat([m.permute(0, 3, 4, 1, 2) for m in maps], dim=-1)
    return list(joined.permute(0, 3, 4, 1, 2).split(sizes, dim=2))


def _reach(*tensors: Tensor) -> int:
    """Elements between the first and the last of a picture's, in the widest of some maps (B, ..., H, W)."""
    return max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)


class _Problem:
    """What forward and backward launches have in common."""

    def __init__(self, x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line):
        self.x = x
        self.dt, self.B, self.C = _packed(dt, B, C)
        self.A, self.D, self.weight, self.bias = (
            None if t is None else t.contiguous() for t in (A, D, dt_weight, dt_bias)
        )
        self.directions, self.grouped, self.per_line = directions, grouped, per_line
        self.batch, _, self.height, self.width = x.shape
        _, self.channels, self.states = A.shape
        self.rank = 0 if dt_weight is None else dt_weight.shape[2]
        self.softplus = delta_softplus
        self.precision = "tf32x3" if torch.float32 in (x.dtype, dt.dtype) else "tf32"

    def codes(self) -> tuple[int, int]:
        """Which directions run backwards, and which by columns, as bits."""
        flips = sum(1 << k for k, direction in enumerate(self.directions) if direction.endswith("rev"))
        return flips, sum(1 << k for k, direction in enumerate(self.directions) if direction.startswith("col"))

    def lines(self) -> tuple[int, int]:
        """Sequences per picture and the length of the longest."""
        if not self.per_line:
            return 1, self.height * self.width
        longest = max(self.height, self.width)
        return longest, longest

    def forward(self) -> Tensor:
        x = self.x
        y = torch.empty_like(x)
        if x.numel() == 0:
            return y
        several = len(self.directions) > 1 and not self.grouped
        partial = torch.empty_like(y, dtype=torch.float32) if several and y.dtype != torch.float32 else y
        sequences, length = self.lines()
        config = _fwd_config(length, self.channels)
        blocks = triton.cdiv(self.channels, config.BLOCK_D)
        programs = self.batch * sequences * blocks
        scan2d_fwd_kernel[(programs, len(self.directions) if self.grouped else 1)](
            x, self.dt, self.A, self.B, self.C, self.D, self.weight, self.bias, partial, y,
            len(self.directions), *self.codes(), self.height, self.width, self.channels, self.states, self.rank,
            blocks, sequences, triton.cdiv(length, config.T * config.S), *x.stride(), *self.strides(), *y.stride(),
            T=config.T, S=config.S, BLOCK_D=config.BLOCK_D, N_PAD=triton.next_power_of_2(self.states),
            R_PAD=max(16, triton.next_power_of_2(self.rank)) if self.rank else 0, VECTOR=config.VECTOR,
            GROUPED=self.grouped, PER_LINE=self.per_line, SOFTPLUS=self.softplus, PRECISION=self.precision,
            WIDE=_reach(x, y, self.dt, self.B, self.C) >= 2**31, num_warps=config.num_warps,
        )  # fmt: skip
        return y

    def strides(self) -> tuple[int, ...]:
        """Of batch, direction, row and column of dt, B and C, and of their last dimensions."""
        b, k, r, h, w = self.dt.stride()
        return b, k, h, w, r, self.B.stride(2), self.C.stride(2)


def forward(*args) -> Tensor:
    return _Problem(*args).forward()
