"""GPU kernels of the MLP in 16 bits: tiles of the hidden channels go from tensor core to tensor core."""

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, gelu, kernel, lead_and_rest, normal_tail, tile_columns, zero_tiles


@triton.jit
def _relu(s):
    return tl.where(s <= 0.0, 0.0, s)  # keeps a NaN


@triton.jit
def _activate(s, ACT: tl.constexpr):
    if ACT == "gelu":
        return gelu(s)
    elif ACT == "gelu_tanh":
        return s * tl.sigmoid(s * (1.5957691216057308 + 0.07135481282553487 * s * s))
    elif ACT == "silu":
        return s * tl.sigmoid(s)
    elif ACT == "squared_relu":
        s = _relu(s)
        return s * s
    else:
        return _relu(s)


@triton.jit
def _activate_both(s, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "gelu":
        a = tl.abs(s)
        tail = normal_tail(a)
        density = tl.exp2(s * s * (-0.5 * LOG2E) - 1.3257480647361593)
        return tl.maximum(s, 0.0) - a * tail, tl.where(s < 0.0, tail, 1.0 - tail) + s * density
    elif ACT == "gelu_tanh":
        share = tl.sigmoid(s * (1.5957691216057308 + 0.07135481282553487 * s * s))
        slope = 1.5957691216057308 + 0.21406443847660462 * s * s
        return s * share, share + s * share * (1.0 - share) * slope
    elif ACT == "silu":
        share = tl.sigmoid(s)
        return s * share, share + s * share * (1.0 - share)
    elif ACT == "squared_relu":
        s = _relu(s)
        return s * s, 2.0 * s
    else:
        return _relu(s), tl.where(s > 0.0, 1.0, 0.0)


@triton.jit
def _fetch(pointer, rows, columns, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """A tile, with zeros where its rows or columns are outside, unless all of them are inside."""
    if ALL_ROWS and ALL_COLUMNS:
        return tl.load(pointer)
    elif ALL_ROWS:
        return tl.load(pointer, columns[None, :], 0.0)
    elif ALL_COLUMNS:
        return tl.load(pointer, rows[:, None], 0.0)
    else:
        return tl.load(pointer, rows[:, None] & columns[None, :], 0.0)


@triton.jit
def _load(
    pointer,
    inside,
    ALL: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
):
    """The rows that `pointer` (BLOCK,) points to, of SIZE numbers with STRIDE between them; are ALL of them inside?"""
    parts = ()
    for i in tl.static_range(0, 2 if REST else 1):
        column = tile_columns(i, LEAD, REST)
        tile = pointer[:, None] + column[None, :] * STRIDE
        parts = parts + (_fetch(tile, inside, column < SIZE, ALL, LEAD + REST == SIZE),)
    return parts


@triton.jit
def _store(pointer, parts, inside, SIZE: tl.constexpr, LEAD: tl.constexpr, REST: tl.constexpr):
    for i in tl.static_range(0, len(parts)):
        column = tile_columns(i, LEAD, REST)
        mask = inside[:, None] & (column < SIZE)[None, :]
        tl.store(pointer[:, None] + column[None, :], parts[i].to(pointer.dtype.element_ty), mask)


@triton.jit
def _dot(a, b, total, DTYPE: tl.constexpr):
    return tl.dot(a.to(DTYPE), b.to(DTYPE), total)


@triton.jit
def _products(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Products of every row of a with every row of b, (ROWS, COLUMNS)."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(0, len(a)):
        total = _dot(a[i], b[i].T, total, DTYPE)
    return total


@triton.jit
def _accumulate(sums, tile, rows, DTYPE: tl.constexpr):
    """Adds to the sums the combinations of `rows` whose coefficients are the rows of `tile`."""
    out = ()
    for i in tl.static_range(0, len(rows)):
        out = out + (_dot(tile, rows[i], sums[i], DTYPE),)
    return out


@triton.jit
def _weights(
    weight1,
    weight2,
    hidden,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    OUT_LEAD: tl.constexpr,
    OUT_REST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Those of a block of hidden channels (BLOCK_H,): rows of weight1 and columns of weight2, both as rows."""
    inside = hidden < HIDDEN
    ALL: tl.constexpr = HIDDEN % BLOCK_H == 0
    w1 = _load(weight1 + hidden * CHANNELS, inside, ALL, 1, CHANNELS, LEAD, REST)
    w2 = _load(weight2 + hidden, inside, ALL, HIDDEN, OUT, OUT_LEAD, OUT_REST)
    return w1, w2


@triton.jit
def _with_bias(s, bias1, hidden, HIDDEN: tl.constexpr):
    """Adds the bias to a tile (rows, hidden channels)."""
    if bias1 is not None:
        s += tl.load(bias1 + hidden, hidden < HIDDEN, 0.0).to(tl.float32)[None, :]
    return s


@kernel
def mlp_fwd_kernel(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    y,
    rows,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    OUT_LEAD: tl.constexpr,
    OUT_REST: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M rows of x (rows, CHANNELS) to those of y (rows, OUT), through all hidden channels."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = _load(x + row * CHANNELS, row < rows, False, 1, CHANNELS, LEAD, REST)
    sums = zero_tiles(BLOCK_M, OUT_LEAD, OUT_REST)
    for first in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
        hidden = first + tl.arange(0, BLOCK_H)
        w1, w2 = _weights(weight1, weight2, hidden, CHANNELS, HIDDEN, OUT, LEAD, REST, OUT_LEAD, OUT_REST, BLOCK_H)
        s = _with_bias(_products(x_rows, w1, BLOCK_M, BLOCK_H, DTYPE), bias1, hidden, HIDDEN)
        sums = _accumulate(sums, _activate(s, ACT).to(x.dtype.element_ty), w2, DTYPE)
    if bias2 is not None:
        shifted = ()
        for i in tl.static_range(0, len(sums)):
            column = tile_columns(i, OUT_LEAD, OUT_REST)
            shifted = shifted + (sums[i] + tl.load(bias2 + column, column < OUT, 0.0).to(tl.float32)[None, :],)
        sums = shifted
    _store(y + row * OUT, sums, row < rows, OUT, OUT_LEAD, OUT_REST)


@kernel
def mlp_bwd_kernel(
    g,
    x,
    weight1,
    bias1,
    weight2,
    gx,
    g_sums,
    rows,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    OUT_LEAD: tl.constexpr,
    OUT_REST: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of BLOCK_M rows of x (rows, CHANNELS), and the sum of those rows of g (rows, OUT)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = _load(x + row * CHANNELS, row < rows, False, 1, CHANNELS, LEAD, REST)
    g_rows = _load(g + row * OUT, row < rows, False, 1, OUT, OUT_LEAD, OUT_REST)
    for i in tl.static_range(0, len(g_rows)):
        column = tile_columns(i, OUT_LEAD, OUT_REST)
        tl.store(g_sums + tl.program_id(0) * OUT + column, tl.sum(g_rows[i].to(tl.float32), 0), column < OUT)
    sums = zero_tiles(BLOCK_M, LEAD, REST)
    for first in tl.range(0, HIDDEN, BLOCK_H, num_stages=STAGES):
        hidden = first + tl.arange(0, BLOCK_H)
        w1, w2 = _weights(weight1, weight2, hidden, CHANNELS, HIDDEN, OUT, LEAD, REST, OUT_LEAD, OUT_REST, BLOCK_H)
        s = _with_bias(_products(x_rows, w1, BLOCK_M, BLOCK_H, DTYPE), bias1, hidden, HIDDEN)
        value, slope = _activate_both(s, ACT)
        gs = _products(g_rows, w2, BLOCK_M, BLOCK_H, DTYPE) * slope
        sums = _accumulate(sums, gs.to(x.dtype.element_ty), w1, DTYPE)
    _store(gx + row * CHANNELS, sums, row < rows, CHANNELS, LEAD, REST)


@kernel
def mlp_bwd_weights_kernel(
    g,
    x,
    weight1,
    bias1,
    weight2,
    g_weight1,
    g_weight2,
    g_bias1,
    rows,
    size,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    OUT_LEAD: tl.constexpr,
    OUT_REST: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of the weights of BLOCK_H hidden channels, as sums over every so many tiles of rows.

    Products have the hidden channels as their rows, so that they can stay in registers as the next products' operands.
    A program has its own `size` numbers in `g_weight1` (HIDDEN, CHANNELS), `g_weight2` (HIDDEN, OUT) and `g_bias1`.
    """
    hidden = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = hidden < HIDDEN
    w1, w2 = _weights(weight1, weight2, hidden, CHANNELS, HIDDEN, OUT, LEAD, REST, OUT_LEAD, OUT_REST, BLOCK_H)
    if bias1 is not None:
        bias = tl.load(bias1 + hidden, inside, 0.0).to(tl.float32)[:, None]
    sums1 = zero_tiles(BLOCK_H, LEAD, REST)
    sums2 = zero_tiles(BLOCK_H, OUT_LEAD, OUT_REST)
    bias_sums = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, BLOCK_M), tl.num_programs(1), num_stages=STAGES):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_row = row < rows
        # Rows outside are zero in g, and the last one again in x: of zeros there, the bias alone would go through the
        # activation, and where that is infinite, times zero is NaN.
        row = tl.minimum(row, rows - 1).to(tl.int64)
        x_rows = _load(x + row * CHANNELS, inside_row, True, 1, CHANNELS, LEAD, REST)
        g_rows = _load(g + row * OUT, inside_row, False, 1, OUT, OUT_LEAD, OUT_REST)
        s = _products(w1, x_rows, BLOCK_H, BLOCK_M, DTYPE)
        if bias1 is not None:
            s += bias
        value, slope = _activate_both(s, ACT)
        gs = _products(w2, g_rows, BLOCK_H, BLOCK_M, DTYPE) * slope
        bias_sums += tl.sum(gs, 1)
        sums2 = _accumulate(sums2, value.to(x.dtype.element_ty), g_rows, DTYPE)
        sums1 = _accumulate(sums1, gs.to(x.dtype.element_ty), x_rows, DTYPE)
    own = tl.program_id(1).to(tl.int64) * size
    _store(g_weight1 + own + hidden * CHANNELS, sums1, inside, CHANNELS, LEAD, REST)
    _store(g_weight2 + own + hidden * OUT, sums2, inside, OUT, OUT_LEAD, OUT_REST)
    tl.store(g_bias1 + own + hidden, bias_sums, inside)


@triton.jit
def _tile(rows, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BAND: tl.constexpr):
    """First row and hidden channel of a program's tile: programs of a band of BAND rows of tiles share their rows."""
    tiles: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    band = tl.program_id(0) // (BAND * tiles)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * tiles)
    return (band * BAND + place % height) * BLOCK_M, place // height * BLOCK_H


@triton.jit
def _matrix_product(
    a,
    b,
    inside,
    ALL: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of rows of SIZE numbers, which `a` (BLOCK_M,) and `b` (BLOCK_H,) point to, these with STRIDE between."""
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for first in tl.range(0, SIZE, BLOCK_C, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_C)
        valid = column < SIZE
        a_tile = _fetch(a[:, None] + column[None, :], inside, valid, True, SIZE % BLOCK_C == 0)
        b_tile = _fetch(b[:, None] + column[None, :] * STRIDE, inside, valid, ALL, SIZE % BLOCK_C == 0)
        total = _dot(a_tile, b_tile.T, total, DTYPE)
    return total


@kernel
def mlp_hidden_kernel(
    x,
    weight1,
    bias1,
    h,
    rows,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of the hidden channels h (rows, HIDDEN)."""
    first_row, first = _tile(rows, HIDDEN, BLOCK_M, BLOCK_H, BAND)
    row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    hidden = first + tl.arange(0, BLOCK_H)
    inside = hidden < HIDDEN
    # Rows outside are read as the last one, without a mask.
    x_row = x + tl.minimum(row, rows - 1) * CHANNELS
    w1_row = weight1 + hidden * CHANNELS
    s = _matrix_product(
        x_row, w1_row, inside, HIDDEN % BLOCK_H == 0, 1, CHANNELS, DTYPE, BLOCK_M, BLOCK_H, BLOCK_C, STAGES
    )
    s = _with_bias(s, bias1, hidden, HIDDEN)
    tile = _activate(s, ACT).to(h.dtype.element_ty)
    tl.store((h + row * HIDDEN)[:, None] + hidden[None, :], tile, (row < rows)[:, None] & inside[None, :])


@kernel
def mlp_bwd_hidden_kernel(
    g,
    x,
    weight1,
    bias1,
    weight2,
    h,
    gs,
    g_bias1,
    rows,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of the hidden channels h (rows, HIDDEN), of the gradients gs in front of the activation, and their sum."""
    first_row, first = _tile(rows, HIDDEN, BLOCK_M, BLOCK_H, BAND)
    row = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
    hidden = first + tl.arange(0, BLOCK_H)
    inside = hidden < HIDDEN
    last = tl.minimum(row, rows - 1)
    ALL: tl.constexpr = HIDDEN % BLOCK_H == 0
    w1_row = weight1 + hidden * CHANNELS
    s = _matrix_product(x + last * CHANNELS, w1_row, inside, ALL, 1, CHANNELS, DTYPE, BLOCK_M, BLOCK_H, BLOCK_C, STAGES)
    s = _with_bias(s, bias1, hidden, HIDDEN)
    gh = _matrix_product(
        g + last * OUT, weight2 + hidden, inside, ALL, HIDDEN, OUT, DTYPE, BLOCK_M, BLOCK_H, BLOCK_C, STAGES
    )
    value, slope = _activate_both(s, ACT)
    mask = (row < rows)[:, None] & inside[None, :]
    tl.store((h + row * HIDDEN)[:, None] + hidden[None, :], value.to(h.dtype.element_ty), mask)
    tile = tl.where((row < rows)[:, None], gh * slope, 0.0)
    tl.store((gs + row * HIDDEN)[:, None] + hidden[None, :], tile.to(gs.dtype.element_ty), mask)
    own = (first_row // BLOCK_M).to(tl.int64) * HIDDEN
    tl.store(g_bias1 + own + hidden, tl.sum(tile, 0), inside)


# Channels up to which a program has all of a row's, and their sums, in registers: in the forward, and in the backward,
# which has them for both weights.
NARROW, NARROW_BACKWARD = 192, 96
# Of an H100; decides how many partial sums the weights' gradients are made of.
MULTIPROCESSORS = 132


@cache
def _constants(channels: int, hidden: int, act: str, dtype: torch.dtype, interpreted: bool) -> dict:
    """Constants of all kernels."""
    # Triton's interpreter cannot multiply bfloat16.
    operand = tl.float32 if interpreted else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    return dict(CHANNELS=channels, HIDDEN=hidden, ACT=act, DTYPE=operand)


@cache
def _parts(channels: int, out: int) -> dict:
    """Constants of the kernels for narrow rows."""
    (lead, rest), (out_lead, out_rest) = lead_and_rest(channels), lead_and_rest(out)
    return dict(OUT=out, LEAD=lead, REST=rest, OUT_LEAD=out_lead, OUT_REST=out_rest)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str
) -> Tensor:
    channels, hidden, out = x.shape[-1], weight1.shape[0], weight2.shape[0]
    y = x.new_empty(*x.shape[:-1], out)
    if y.numel() == 0:
        return y
    rows = y.numel() // out
    x, weight1, bias1 = x.contiguous(), weight1.contiguous(), _contiguous(bias1)
    constants = _constants(channels, hidden, act, x.dtype, x.is_cpu)
    width = max(channels, out)
    if width <= NARROW:
        mlp_fwd_kernel[(cdiv(rows, 64),)](
            x,
            weight1,
            bias1,
            weight2.contiguous(),
            _contiguous(bias2),
            y,
            rows,
            BLOCK_M=64,
            BLOCK_H=32,
            STAGES=3 if width <= 128 else 2,
            num_warps=4,
            **constants,
            **_parts(channels, out),
        )
        return y
    h = x.new_empty(*x.shape[:-1], hidden)
    mlp_hidden_kernel[(cdiv(rows, 128) * cdiv(hidden, 128),)](
        x, weight1, bias1, h, rows, BLOCK_M=128, BLOCK_H=128, BLOCK_C=32, BAND=8, STAGES=4, num_warps=4, **constants
    )
    return F.linear(h, weight2, bias2)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
) -> list[Tensor | None]:
    if grads[0].numel() == 0:
        return [None] * 5
    channels, hidden, out = x.shape[-1], weight1.shape[0], weight2.shape[0]
    constants = _constants(channels, hidden, act, x.dtype, x.is_cpu)
    launch = _backward_narrow if max(channels, out) <= NARROW_BACKWARD else _backward_wide
    gx, g_weight1, g_bias1, g_weight2, g_bias2 = launch(
        grads[0].contiguous().view(-1, out),
        x.contiguous().view(-1, channels),
        weight1.contiguous(),
        _contiguous(bias1),
        weight2.contiguous(),
        constants,
    )
    no_bias1, no_bias2 = bias1 is None, bias2 is None
    return [gx.view(x.shape), g_weight1, None if no_bias1 else g_bias1, g_weight2, None if no_bias2 else g_bias2]


def _backward_narrow(
    g: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, constants: dict
) -> tuple[Tensor, ...]:
    """Gradients of all arguments, without a map of hidden channels."""
    (rows, channels), (out, hidden) = x.shape, weight2.shape
    constants = constants | _parts(channels, out)
    gx = torch.empty_like(x)
    tiles = cdiv(rows, 64)
    g_sums = torch.empty(tiles, out, dtype=torch.float32, device=x.device)
    mlp_bwd_kernel[(tiles,)](
        g, x, weight1, bias1, weight2, gx, g_sums, rows, BLOCK_M=64, BLOCK_H=32, STAGES=2, num_warps=4, **constants
    )
    blocks = cdiv(hidden, 64)
    splits = min(tiles, max(1, 2 * MULTIPROCESSORS // blocks))
    # All sums of a program side by side, to be added to those of the others in one launch.
    first, second, size = hidden * channels, hidden * (channels + out), hidden * (channels + out + 1)
    sums = torch.empty(splits, size, dtype=torch.float32, device=x.device)
    mlp_bwd_weights_kernel[(blocks, splits)](
        g,
        x,
        weight1,
        bias1,
        weight2,
        sums,
        sums[:, first:],
        sums[:, second:],
        rows,
        size,
        BLOCK_M=64,
        BLOCK_H=64,
        STAGES=3,
        num_warps=4,
        **constants,
    )
    sums = sums.sum(0)
    g_weight1, g_weight2 = sums[:first].view(hidden, channels), sums[first:second].view(hidden, out).T
    return gx, g_weight1, sums[second:], g_weight2, g_sums.sum(0)


def _backward_wide(
    g: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, constants: dict
) -> tuple[Tensor, ...]:
    """Gradients of all arguments, by way of the hidden channels and their gradients."""
    rows, hidden = x.shape[0], weight1.shape[0]
    tiles = cdiv(rows, 64)
    h, gs = x.new_empty(rows, hidden), x.new_empty(rows, hidden)
    g_bias1 = torch.empty(tiles, hidden, dtype=torch.float32, device=x.device)
    mlp_bwd_hidden_kernel[(tiles * cdiv(hidden, 128),)](
        g,
        x,
        weight1,
        bias1,
        weight2,
        h,
        gs,
        g_bias1,
        rows,
        OUT=g.shape[1],
        BLOCK_M=64,
        BLOCK_H=128,
        BLOCK_C=64,
        BAND=8,
        STAGES=3,
        num_warps=4,
        **constants,
    )
    # A product with ones takes a tenth of the time of PyTorch's sum over rows.
    g_bias2 = torch.mv(g.T, g.new_ones(rows))
    return gs @ weight1, gs.T @ x, g_bias1.sum(0), g.T @ h, g_bias2
