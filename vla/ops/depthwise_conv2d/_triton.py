"""Depthwise convolution and its gradients: strips of a few columns, walked down with a kernel's rows in registers.

What a thread needs per tap, column or row is a tensor of its own, (BLOCK_S, BLOCK_C) for strips and channels, gathered
in tuples: every index into them is known at compile time, so that they are registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, cdiv, repeat

# Channels of a program: 32 bytes in 16 bits. A warp has as many strips as leave every lane 1 or 2 of them.
BLOCK_C = 16
# Taps up to which all that a backward needs fits in registers.
SMALL = 9
# Of an H100; decides how many partial sums a gradient of the kernels is made of.
MULTIPROCESSORS = 132


@triton.jit
def normal_cdf(s):
    """The normal distribution up to s, and exp(-s^2 / 2).

    Abramowitz and Stegun 7.1.26, absolute error 1e-7: its exponential is one that the derivative needs anyway, and
    it takes fewer instructions than `tl.erf`.
    """
    exponential = tl.exp2(s * s * (-0.5 * LOG2E))
    t = 1.0 / (1.0 + 0.23164189 * tl.abs(s))
    series = -1.453152027 + 1.061405429 * t
    series = 1.421413741 + series * t
    series = -0.284496736 + series * t
    series = 0.254829592 + series * t
    tail = 0.5 * series * t * exponential
    return tl.where(s < 0.0, tail, 1.0 - tail), exponential


@triton.jit
def activation(s, ACT: tl.constexpr):
    if ACT == "silu":
        return s / (1.0 + tl.exp2(s * -LOG2E))
    elif ACT == "gelu":
        cdf, _ = normal_cdf(s)
        return s * cdf
    else:
        return s


@triton.jit
def derivative(s, ACT: tl.constexpr):
    if ACT == "silu":
        p = 1.0 / (1.0 + tl.exp2(s * -LOG2E))
        return p + p * s * (1.0 - p)
    else:
        cdf, exponential = normal_cdf(s)
        return cdf + 0.3989422804014327 * s * exponential


@triton.jit
def times_derivative(g, s, ACT: tl.constexpr):
    out = ()
    for i in tl.static_range(len(g)):
        out = out + (g[i] * derivative(s[i], ACT),)
    return out


@triton.jit
def float32(row):
    out = ()
    for i in tl.static_range(len(row)):
        out = out + (row[i].to(tl.float32),)
    return out


@triton.jit
def keep(row, condition):
    """The row, or zeros."""
    out = ()
    for i in tl.static_range(len(row)):
        out = out + (tl.where(condition, row[i], 0.0),)
    return out


@triton.jit
def on_map(column, inside, width, N: tl.constexpr):
    """Which entries of N columns from `column` on are on the map."""
    masks = ()
    for j in tl.static_range(N):
        masks = masks + (inside & (column + j >= 0) & (column + j < width),)
    return masks


@triton.jit
def load_row(pointers, stride, masks):
    """Neighbouring pixels of a row, zero outside of the masks."""
    row = ()
    for j in tl.static_range(len(masks)):
        row = row + (tl.load(pointers + j * stride, masks[j], 0.0),)  # (BLOCK_S, BLOCK_C)
    return row


@triton.jit
def store_row(pointers, stride, masks, inside, row):
    for j in tl.static_range(len(row)):
        tl.store(pointers + j * stride, row[j].to(pointers.dtype.element_ty), masks[j] & inside)


@triton.jit
def load_taps(weight, channel, inside, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """The kernels (C, TAPS) of some channels, FLIP from the last tap to the first."""
    taps = ()
    for t in tl.static_range(TAPS):
        tap = weight + channel * TAPS + (TAPS - 1 - t if FLIP else t)
        taps = taps + (tl.load(tap, inside, 0.0).to(tl.float32),)  # (BLOCK_S, BLOCK_C)
    return taps


@triton.jit
def correlate(sums, row, taps, KH: tl.constexpr, KW: tl.constexpr):
    """Adds a row of the input to the KH rows of the output that it is in the window of, from the first to the last."""
    COLUMNS: tl.constexpr = len(row) - KW + 1
    out = ()
    for i in tl.static_range(KH):
        for j in tl.static_range(COLUMNS):
            total = sums[i * COLUMNS + j]
            for k in tl.static_range(KW):
                total += taps[(KH - 1 - i) * KW + k] * row[j + k]
            out = out + (total,)
    return out


@triton.jit
def correlate_taps(sums, rows, row, KH: tl.constexpr, KW: tl.constexpr):
    """Adds to every tap the products of a row of the output's gradient, a window wider, and KH rows of the input."""
    COLUMNS: tl.constexpr = len(row) - KW + 1
    out = ()
    for i in tl.static_range(KH):
        for k in tl.static_range(KW):
            total = sums[i * KW + k]
            for j in tl.static_range(COLUMNS):
                total += rows[i * COLUMNS + j] * row[j + KW - 1 - k]
            out = out + (total,)
    return out


@triton.jit(
    do_not_specialize=[
        *("channels", "height", "width", "strips", "segment"),
        *("x_batch", "x_row", "x_column", "y_batch", "y_row", "y_column"),
    ]
)
def depthwise_conv2d_fwd_kernel(
    x,
    weight,
    bias,
    y,
    channels,
    height,
    width,
    strips,
    segment,
    x_batch,
    x_row,
    x_column,
    y_batch,
    y_row,
    y_column,
    ACT: tl.constexpr,
    FLIP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A segment of the rows of BLOCK_S strips, BLOCK_C channels. Channels and strides come in multiples of VEC."""
    TOP: tl.constexpr = KH // 2
    LEFT: tl.constexpr = KW // 2
    channels *= VEC
    blocks_c = tl.cdiv(channels, BLOCK_C)
    strip = tl.program_id(0) // blocks_c * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :] + 0 * strip
    inside = channel < channels
    taps = load_taps(weight, channel, inside, KH * KW, FLIP)
    if bias is not None:
        start = tl.load(bias + channel, inside, 0.0).to(tl.float32)  # (BLOCK_S, BLOCK_C)
    else:
        start = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)

    strips_of_row = tl.cdiv(width, COLUMNS)
    image = (strip // strips_of_row).to(tl.int64)
    column = (strip % strips_of_row * COLUMNS).to(tl.int64)
    inside &= strip < strips
    x += image * x_batch * VEC + (column - LEFT) * x_column * VEC + channel
    y += image * y_batch * VEC + column * y_column * VEC + channel
    x_masks = on_map(column - LEFT, inside, width, COLUMNS + KW - 1)
    y_masks = on_map(column, inside, width, COLUMNS)

    first = tl.program_id(1) * segment
    last = tl.minimum(first + segment, height)
    begin = tl.maximum(first - TOP, 0)
    end = tl.minimum(last + TOP, height)
    # Rows of the output whose window is at the row of the input, from the one that this row completes.
    sums = repeat(start, KH * COLUMNS)
    following = load_row(x + begin.to(tl.int64) * x_row * VEC, x_column * VEC, x_masks)
    for row in range(begin, end):
        current = float32(following)
        ahead = tl.minimum(row + 1, height - 1).to(tl.int64)
        following = load_row(x + ahead * x_row * VEC, x_column * VEC, x_masks)
        sums = correlate(sums, current, taps, KH, KW)
        out = ()
        for j in tl.static_range(COLUMNS):
            out = out + (activation(sums[j], ACT),)
        done = tl.maximum(row - TOP, first).to(tl.int64)
        store_row(y + done * y_row * VEC, y_column * VEC, y_masks, row - TOP >= first, out)
        sums = sums[COLUMNS:] + repeat(start, COLUMNS)
    for i in tl.static_range(TOP):
        out = ()
        for j in tl.static_range(COLUMNS):
            out = out + (activation(sums[i * COLUMNS + j], ACT),)
        done = end - TOP + i
        store_row(y + done.to(tl.int64) * y_row * VEC, y_column * VEC, y_masks, (done >= first) & (done < last), out)


@triton.jit(
    do_not_specialize=[
        *("channels", "height", "width", "strips", "segment"),
        *("x_batch", "x_row", "x_column", "g_batch", "g_row", "g_column", "gx_batch", "gx_row", "gx_column"),
    ]
)
def depthwise_conv2d_bwd_kernel(
    g,
    x,
    weight,
    bias,
    gx,
    parts,
    channels,
    height,
    width,
    strips,
    segment,
    g_batch,
    g_row,
    g_column,
    x_batch,
    x_row,
    x_column,
    gx_batch,
    gx_row,
    gx_column,
    ACT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x (if gx is given), of the kernels and of the bias, for some strips of BLOCK_C channels.

    The sums for kernels, (C, KH * KW), and bias, (C,), are those of the program's pixels.
    """
    TOP: tl.constexpr = KH // 2
    LEFT: tl.constexpr = KW // 2
    TAPS: tl.constexpr = KH * KW
    # Before the activation, values are needed around the strip, for which x is needed around those.
    AROUND: tl.constexpr = 0 if ACT is None else 2 * LEFT
    AROUND_COLUMNS: tl.constexpr = COLUMNS + KW - 1
    channels *= VEC
    blocks_c = tl.cdiv(channels, BLOCK_C)
    block_c = tl.program_id(0) % blocks_c
    lane = tl.arange(0, BLOCK_S)[:, None]
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :] + 0 * lane
    exists = channel < channels
    if ACT is not None:
        taps = load_taps(weight, channel, exists, TAPS, False)
    if gx is not None:
        flipped = load_taps(weight, channel, exists, TAPS, True)
    zero = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = zero
    if ACT is not None and bias is not None:
        start = tl.load(bias + channel, exists, 0.0).to(tl.float32)  # (BLOCK_S, BLOCK_C)

    first = tl.program_id(1) * segment
    last = tl.minimum(first + segment, height)
    begin = tl.maximum(first - TOP, 0)
    end = tl.minimum(last + TOP, height)
    strips_of_row = tl.cdiv(width, COLUMNS)
    g_taps = repeat(zero, TAPS)
    g_bias = zero
    for group in range(tl.program_id(0) // blocks_c, tl.cdiv(strips, BLOCK_S), tl.num_programs(0) // blocks_c):
        strip = group * BLOCK_S + lane
        image = (strip // strips_of_row).to(tl.int64)
        column = (strip % strips_of_row * COLUMNS).to(tl.int64)
        inside = exists & (strip < strips)
        x_strip = x + image * x_batch * VEC + (column - AROUND) * x_column * VEC + channel
        g_strip = g + image * g_batch * VEC + (column - LEFT) * g_column * VEC + channel
        x_masks = on_map(column - AROUND, inside, width, COLUMNS + 2 * AROUND)
        g_masks = on_map(column - LEFT, inside, width, COLUMNS + KW - 1)
        if gx is not None:
            gx_strip = gx + image * gx_batch * VEC + column * gx_column * VEC + channel
            gx_masks = on_map(column, inside, width, COLUMNS)

        # Rows of x around the row of g, as far as they are the program's own, and sums as in the forward: of what goes
        # into the activation, and of gx.
        rows = repeat(zero, KH * COLUMNS)
        before = repeat(start, KH * AROUND_COLUMNS)
        gx_sums = repeat(zero, KH * COLUMNS)
        for row in range(tl.maximum(begin - TOP, 0), begin + TOP):
            ahead = tl.minimum(row, height - 1).to(tl.int64)
            current = float32(load_row(x_strip + ahead * x_row * VEC, x_column * VEC, x_masks))
            rows = rows[COLUMNS:] + keep(current[AROUND : AROUND + COLUMNS], (row >= first) & (row < last))
            if ACT is not None:
                before = correlate(before, keep(current, row < height), taps, KH, KW)
                before = before[AROUND_COLUMNS:] + repeat(start, AROUND_COLUMNS)
        x_following = load_row(
            x_strip + tl.minimum(begin + TOP, height - 1).to(tl.int64) * x_row * VEC, x_column * VEC, x_masks
        )
        g_following = load_row(g_strip + begin.to(tl.int64) * g_row * VEC, g_column * VEC, g_masks)
        for row in range(begin, end):
            current, g_current = float32(x_following), float32(g_following)
            ahead = tl.minimum(row + TOP + 1, height - 1).to(tl.int64)
            x_following = load_row(x_strip + ahead * x_row * VEC, x_column * VEC, x_masks)
            ahead = tl.minimum(row + 1, height - 1).to(tl.int64)
            g_following = load_row(g_strip + ahead * g_row * VEC, g_column * VEC, g_masks)
            own = (row + TOP >= first) & (row + TOP < last)
            rows = rows[COLUMNS:] + keep(current[AROUND : AROUND + COLUMNS], own)
            if ACT is not None:
                before = correlate(before, keep(current, row + TOP < height), taps, KH, KW)
                g_current = times_derivative(g_current, before, ACT)
                before = before[AROUND_COLUMNS:] + repeat(start, AROUND_COLUMNS)
            if bias is not None:
                own_g = keep(g_current[LEFT : LEFT + COLUMNS], (row >= first) & (row < last))
                for j in tl.static_range(COLUMNS):
                    g_bias += own_g[j]
            g_taps = correlate_taps(g_taps, rows, g_current, KH, KW)
            if gx is not None:
                gx_sums = correlate(gx_sums, g_current, flipped, KH, KW)
                done = tl.maximum(row - TOP, first).to(tl.int64)
                store_row(
                    gx_strip + done * gx_row * VEC, gx_column * VEC, gx_masks, row - TOP >= first, gx_sums[:COLUMNS]
                )
                gx_sums = gx_sums[COLUMNS:] + repeat(zero, COLUMNS)
        if gx is not None:
            for i in tl.static_range(TOP):
                done = end - TOP + i
                store_row(
                    gx_strip + done.to(tl.int64) * gx_row * VEC,
                    gx_column * VEC,
                    gx_masks,
                    (done >= first) & (done < last),
                    gx_sums[i * COLUMNS : (i + 1) * COLUMNS],
                )

    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    part = tl.program_id(0) // blocks_c * tl.num_programs(1) + tl.program_id(1)
    if bias is not None:
        parts += part * channels * (TAPS + 1)
        tl.store(parts + channels * TAPS + channel, tl.sum(g_bias, 0), exists)
    else:
        parts += part * channels * TAPS
    for t in tl.static_range(TAPS):
        tl.store(parts + channel * TAPS + t, tl.sum(g_taps[t], 0), exists)


def _last(x: Tensor) -> Tensor:
    """The map itself if the channels of a pixel are neighbours in memory, else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def _vec(*maps: Tensor) -> int:
    """Channels that a thread can load at once: 2 where every pixel starts at an even place."""
    return 2 if all(x.shape[1] % 2 == 0 and all(x.stride(i) % 2 == 0 for i in (0, 2, 3)) for x in maps) else 1


def _strides(x: Tensor, vec: int) -> tuple[int, int, int]:
    """Strides of images, rows and columns in multiples of `vec`."""
    return x.stride(0) // vec, x.stride(2) // vec, x.stride(3) // vec


def _segment(programs: int, height: int) -> int:
    """Rows that a program walks: all of them, unless there are too few programs for a GPU."""
    return cdiv(height, max(1, min(1024 // programs, height // 4)))


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None, flip: bool = False
) -> Tensor:
    """The convolution, with `flip` its adjoint, as a channels-last map."""
    batch, channels, height, width = x.shape
    y = x.new_empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    if y.numel() == 0:
        return y
    x, kh, kw = _last(x), *weight.shape[2:]
    columns, vec = 7 if kh * kw <= SMALL else 4, _vec(x)
    block_s = 2 * vec
    strips = batch * cdiv(width, columns)
    programs = cdiv(strips, block_s) * cdiv(channels, BLOCK_C)
    segment = _segment(programs, height)
    depthwise_conv2d_fwd_kernel[(programs, cdiv(height, segment))](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        channels // vec,
        height,
        width,
        strips,
        segment,
        *_strides(x, vec),
        *_strides(y, vec),
        ACT=act,
        FLIP=flip,
        KH=kh,
        KW=kw,
        COLUMNS=columns,
        VEC=vec,
        BLOCK_S=block_s,
        BLOCK_C=BLOCK_C,
        num_warps=1,
    )
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None) -> Tensor:
    return convolved(x, weight, bias, act, dtype)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str | None,
    dtype: torch.dtype | None,
) -> list[Tensor | None]:
    g = grads[0]
    if g.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (x, weight, bias)]
    batch, channels, height, width = x.shape
    g, x, weight, kh, kw = _last(g), _last(x), weight.contiguous(), *weight.shape[2:]
    taps = kh * kw
    # All gradients in one pass, unless the registers only suffice for the sums of the taps.
    whole = taps <= SMALL or act is not None
    gx = torch.empty_like(x) if whole else convolved(g, weight, None, None, x.dtype, flip=True)
    columns, vec, per_multiprocessor = (4 if taps <= SMALL else 2, 1, 12) if whole else (4, _vec(g, x), 8)
    block_s = 2 * vec
    strips = batch * cdiv(width, columns)
    blocks_c = cdiv(channels, BLOCK_C)
    groups = max(1, min(cdiv(strips, block_s), MULTIPROCESSORS * per_multiprocessor // blocks_c))
    segment = _segment(groups * blocks_c, height)
    segments = cdiv(height, segment)
    parts = x.new_empty(groups * segments, channels * (taps + (bias is not None)), dtype=torch.float32)
    depthwise_conv2d_bwd_kernel[(groups * blocks_c, segments)](
        g,
        x,
        weight,
        None if bias is None else bias.contiguous(),
        gx if whole else None,
        parts,
        channels // vec,
        height,
        width,
        strips,
        segment,
        *_strides(g, vec),
        *_strides(x, vec),
        *_strides(gx, vec),
        ACT=act,
        KH=kh,
        KW=kw,
        COLUMNS=columns,
        VEC=vec,
        BLOCK_S=block_s,
        BLOCK_C=BLOCK_C,
        num_warps=1,
    )
    sums = parts.sum(0)
    # Strides that a gradient has to have, which for the dimension of size 1 a view would choose itself.
    g_weight = sums[: channels * taps].as_strided(weight.shape, weight.stride())
    # Not another view of the same memory, which an operator's results must not be.
    return [gx, g_weight, None if bias is None else sums[channels * taps :].clone()]
