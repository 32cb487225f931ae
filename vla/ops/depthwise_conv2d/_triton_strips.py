"""Depthwise convolution and its gradients: strips of a few columns, walked down with a kernel's rows in registers.

What a thread needs per tap, column or row is a tensor of its own, (BLOCK_S, BLOCK_C) for strips and channels, gathered
in tuples: every index into them is known at compile time, so that they are registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    DTYPES,
    cdiv,
    gelu,
    gelu_slope,
    kernel,
    last_first,
    load_apart,
    repeat,
    sigmoid,
    starts_at_pair,
    store_apart,
    sum_parts,
    unpack,
)

# Taps up to which all that a backward needs fits in registers.
SMALL = 9
# Columns of a map up to which strips of 7 are the faster also with GELU, which leaves fewer registers.
WIDE = 28
# Of an H100; decides how many partial sums a gradient of the kernels is made of.
MULTIPROCESSORS = 132


@triton.jit
def activation(s, ACT: tl.constexpr):
    if ACT == "silu":
        return s * sigmoid(s)
    elif ACT == "gelu":
        return gelu(s)
    else:
        return s


@triton.jit
def derivative(s, ACT: tl.constexpr):
    if ACT == "silu":
        p = sigmoid(s)
        return p + p * s * (1.0 - p)
    else:
        return gelu_slope(s)


@triton.jit
def times_derivative(g, s, ACT: tl.constexpr):
    out = ()
    for i in tl.static_range(len(g)):
        out = out + (g[i] * derivative(s[i], ACT),)
    return out


@triton.jit
def float32(row, DTYPE: tl.constexpr):
    """Pixels in float32; integers are pairs of what was DTYPE."""
    out = ()
    for i in tl.static_range(len(row)):
        if row[i].dtype == tl.int32:
            out = out + (unpack(row[i], DTYPE),)
        else:
            out = out + (row[i].to(tl.float32),)
    return out


@triton.jit
def lanes(pointer, block, strip, channels, BLOCK_C: tl.constexpr):
    """Numbers of a block's channels in a map, of integers those of pairs, and which of them exist."""
    EACH: tl.constexpr = 2 if pointer.dtype.element_ty == tl.int32 else 1
    channel = block * (BLOCK_C // EACH) + tl.arange(0, BLOCK_C // EACH)[None, :] + 0 * strip
    return channel, channel * EACH < channels


@triton.jit
def own_rows(row, number, first, last, SEGMENTED: tl.constexpr):
    """The row of this number if it is from `first` on and before `last`, else zeros; without segments every row is."""
    if not SEGMENTED:
        return row
    out = ()
    for i in tl.static_range(len(row)):
        out = out + (tl.where((number >= first) & (number < last), row[i], 0.0),)
    return out


@triton.jit
def place(strip, width, COLUMNS: tl.constexpr):
    """Numbers of a strip's picture and of its first column."""
    strips_of_row = tl.cdiv(width, COLUMNS)
    return (strip // strips_of_row).to(tl.int64), (strip % strips_of_row * COLUMNS).to(tl.int64)


@triton.jit
def walk(height, segment, TOP: tl.constexpr):
    """First row of a program and the one behind its last, of its own rows and of those with TOP more on both sides."""
    first = tl.program_id(1) * segment
    last = tl.minimum(first + segment, height)
    return first, last, tl.maximum(first - TOP, 0), tl.minimum(last + TOP, height)


@triton.jit
def on_map(column, inside, width, COLUMNS: tl.constexpr, AROUND: tl.constexpr, EVEN: tl.constexpr):
    """Which columns of a strip from `column` on, and of AROUND on both its sides, are on the map.

    EVEN: The width divides into strips, so that a strip is on the map as a whole, and so is what is on a side of it.
    """
    masks = ()
    for j in tl.static_range(-AROUND, COLUMNS + AROUND):
        if EVEN and AROUND <= COLUMNS:
            if j < 0:
                mask = inside & (column > 0)
            elif j < COLUMNS:
                mask = inside
            else:
                mask = inside & (column + COLUMNS < width)
        else:
            mask = inside & (column + j >= 0) & (column + j < width)
        masks = masks + (mask,)
    return masks


@triton.jit
def load_row(pointers, number, height, row_stride, stride: tl.constexpr, masks):
    """Neighbouring pixels of the row of this number, zero outside of the masks and below the map."""
    pointers += tl.minimum(number, height - 1).to(tl.int64) * row_stride
    row = ()
    for j in tl.static_range(len(masks)):
        row = row + (load_apart(pointers + j * stride, masks[j] & (number < height), 0.0),)  # (BLOCK_S, BLOCK_C)
    return row


@triton.jit
def store_row(pointers, stride: tl.constexpr, masks, inside, row):
    for j in tl.static_range(len(row)):
        store_apart(pointers + j * stride, row[j].to(pointers.dtype.element_ty), masks[j] & inside)


@triton.jit
def load_taps(weight, channel, inside, TAPS: tl.constexpr):
    """The kernels (C, TAPS) of some channels."""
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (load_apart(weight + channel * TAPS + t, inside, 0.0).to(tl.float32),)  # (BLOCK_S, BLOCK_C)
    return taps


@triton.jit
def flip(taps):
    """From the last tap to the first."""
    out = ()
    for t in tl.static_range(len(taps)):
        out = out + (taps[len(taps) - 1 - t],)
    return out


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


@kernel(
    do_not_specialize=[
        *("channels", "written", "height", "width", "strips", "segment"),
        *("x_batch", "x_row", "y_batch", "y_row"),
    ]
)
def depthwise_conv2d_fwd_kernel(
    x,
    weight,
    bias,
    y,
    channels,
    written,
    height,
    width,
    strips,
    segment,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    y_batch,
    y_row,
    y_column: tl.constexpr,
    ACT: tl.constexpr,
    FLIP: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A segment of the rows of BLOCK_S strips, BLOCK_C channels. Channels and strides come in multiples of VEC.

    What is written from `channels` on is zeros, as without taps and bias every activation gives.
    """
    TOP: tl.constexpr = KH // 2
    LEFT: tl.constexpr = KW // 2
    channels *= VEC
    written *= VEC
    blocks_c = tl.cdiv(written, BLOCK_C)
    program = last_first()
    block_c = program % blocks_c
    strip = program // blocks_c * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    channel, inside = lanes(weight, block_c, strip, channels, BLOCK_C)
    x_channel, x_inside = lanes(x, block_c, strip, channels, BLOCK_C)
    X_VEC: tl.constexpr = VEC * x_channel.shape[1] // BLOCK_C
    taps = load_taps(weight, channel, inside, KH * KW)
    if FLIP:
        taps = flip(taps)
    start = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if bias is not None:
        start = load_apart(bias + channel, inside, 0.0).to(tl.float32)

    image, column = place(strip, width, COLUMNS)
    _, inside = lanes(weight, block_c, strip, written, BLOCK_C)
    inside &= strip < strips
    x += image * x_batch * X_VEC + (column - LEFT) * x_column * X_VEC + x_channel
    y += image * y_batch * VEC + column * y_column * VEC + channel
    x_masks = on_map(column, x_inside & (strip < strips), width, COLUMNS, LEFT, EVEN)
    y_masks = on_map(column, inside, width, COLUMNS, 0, EVEN)

    first, last, begin, end = walk(height, segment, TOP)
    # Rows of the output whose window is at the row of the input, from the one that this row completes.
    sums = repeat(start, KH * COLUMNS)
    following = load_row(x, begin, height, x_row * X_VEC, x_column * X_VEC, x_masks)
    for row in range(begin, end):
        current = float32(following, DTYPE)
        following = load_row(x, row + 1, height, x_row * X_VEC, x_column * X_VEC, x_masks)
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


@kernel(
    do_not_specialize=[
        *("channels", "height", "width", "strips", "segment"),
        *("x_batch", "x_row", "g_batch", "g_row", "gx_batch", "gx_row"),
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
    g_column: tl.constexpr,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    gx_batch,
    gx_row,
    gx_column: tl.constexpr,
    ACT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DTYPE: tl.constexpr,
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
    channel, exists = lanes(weight, block_c, lane, channels, BLOCK_C)
    # What is loaded row by row; x and g are both of pairs or not.
    own_channel, own_exists = lanes(x, block_c, lane, channels, BLOCK_C)
    OWN_VEC: tl.constexpr = VEC * own_channel.shape[1] // BLOCK_C
    if ACT is not None or gx is not None:
        taps = load_taps(weight, channel, exists, TAPS)
    zero = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    start = zero
    if ACT is not None and bias is not None:
        start = load_apart(bias + channel, exists, 0.0).to(tl.float32)  # (BLOCK_S, BLOCK_C)

    first, last, begin, end = walk(height, segment, TOP)
    g_taps = repeat(zero, TAPS)
    g_bias = zero
    for group in range(tl.program_id(0) // blocks_c, tl.cdiv(strips, BLOCK_S), tl.num_programs(0) // blocks_c):
        strip = group * BLOCK_S + lane
        image, column = place(strip, width, COLUMNS)
        inside = exists & (strip < strips)
        own_inside = own_exists & (strip < strips)
        x_strip = x + image * x_batch * OWN_VEC + (column - AROUND) * x_column * OWN_VEC + own_channel
        g_strip = g + image * g_batch * OWN_VEC + (column - LEFT) * g_column * OWN_VEC + own_channel
        x_masks = on_map(column, own_inside, width, COLUMNS, AROUND, EVEN)
        g_masks = on_map(column, own_inside, width, COLUMNS, LEFT, EVEN)
        if gx is not None:
            gx_strip = gx + image * gx_batch * VEC + column * gx_column * VEC + channel
            gx_masks = on_map(column, inside, width, COLUMNS, 0, EVEN)

        # Rows of x around the row of g, as far as they are the program's own, and sums as in the forward: of what goes
        # into the activation, and of gx.
        rows = repeat(zero, KH * COLUMNS)
        before = repeat(start, KH * AROUND_COLUMNS)
        gx_sums = repeat(zero, KH * COLUMNS)
        for row in range(tl.maximum(begin - TOP, 0), begin + TOP):
            current = float32(load_row(x_strip, row, height, x_row * OWN_VEC, x_column * OWN_VEC, x_masks), DTYPE)
            rows = rows[COLUMNS:] + own_rows(current[AROUND : AROUND + COLUMNS], row, first, last, SEGMENTED)
            if ACT is not None:
                before = correlate(before, current, taps, KH, KW)
                before = before[AROUND_COLUMNS:] + repeat(start, AROUND_COLUMNS)
        x_following = load_row(x_strip, begin + TOP, height, x_row * OWN_VEC, x_column * OWN_VEC, x_masks)
        g_following = load_row(g_strip, begin, height, g_row * OWN_VEC, g_column * OWN_VEC, g_masks)
        for row in range(begin, end):
            current, g_current = float32(x_following, DTYPE), float32(g_following, DTYPE)
            x_following = load_row(x_strip, row + TOP + 1, height, x_row * OWN_VEC, x_column * OWN_VEC, x_masks)
            g_following = load_row(g_strip, row + 1, height, g_row * OWN_VEC, g_column * OWN_VEC, g_masks)
            rows = rows[COLUMNS:] + own_rows(current[AROUND : AROUND + COLUMNS], row + TOP, first, last, SEGMENTED)
            if ACT is not None:
                before = correlate(before, current, taps, KH, KW)
                g_current = times_derivative(g_current, before, ACT)
                before = before[AROUND_COLUMNS:] + repeat(start, AROUND_COLUMNS)
            if bias is not None:
                own_g = own_rows(g_current[LEFT : LEFT + COLUMNS], row, first, last, SEGMENTED)
                for j in tl.static_range(COLUMNS):
                    g_bias += own_g[j]
            g_taps = correlate_taps(g_taps, rows, g_current, KH, KW)
            if gx is not None:
                gx_sums = correlate(gx_sums, g_current, flip(taps), KH, KW)
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
        store_apart(parts + channels * TAPS + channel, tl.sum(g_bias, 0), exists)
    else:
        parts += part * channels * TAPS
    for t in tl.static_range(TAPS):
        store_apart(parts + channel * TAPS + t, tl.sum(g_taps[t], 0), exists)


def vec_of(*maps: Tensor) -> int:
    """Channels that a thread can load at once: 2 where every pixel starts at an even place."""
    return 2 if all(x.shape[1] % 2 == 0 and all(x.stride(i) % 2 == 0 for i in (0, 2, 3)) for x in maps) else 1


def in_pairs(*maps: Tensor) -> list[Tensor]:
    """Maps whose pixels are even numbers of 16-bit channels as maps of pairs, if all of them can be read alike."""
    if any(x.element_size() != 2 or x.dtype != maps[0].dtype or not starts_at_pair(x) for x in maps):
        return list(maps)
    return [x.permute(0, 2, 3, 1).view(torch.int32).permute(0, 3, 1, 2) for x in maps]


def strides_of(x: Tensor, vec: int) -> tuple[int, int, int]:
    """Strides of images, rows and columns in multiples of `vec`."""
    # That of columns is compiled for. Of a single one PyTorch may say anything.
    column = x.stride(3) if x.shape[3] > 1 else x.shape[1]
    return x.stride(0) // vec, x.stride(2) // vec, column // vec


def _tile(channels: int, taps: int, vec: int) -> tuple[int, int]:
    """Strips and channels of a warp, whose lanes have `vec` channels each.

    Up to 9 taps as few strips as leave hardly a lane idle; beyond, 16 channels, 32 bytes of a pixel in 16 bits.
    """
    for block_c in (64, 32):
        if taps <= SMALL and block_c <= 32 * vec and 8 * cdiv(channels, block_c) * block_c <= 9 * channels:
            return 32 * vec // block_c, block_c
    return 2 * vec, 16


def segment_of(programs: int, height: int, wanted: int, rows: int = 4) -> int:
    """Rows that a program walks: all of them, unless there are fewer programs than wanted; `rows` at least."""
    return cdiv(height, max(1, min(wanted // programs, height // rows)))


def shares(strips: int, blocks: int, height: int, at_once: int) -> tuple[int, int]:
    """Programs that share a block of channels' tiles of strips, and rows of each: as many as a GPU runs at once."""
    groups = max(1, min(strips, at_once // blocks))
    return groups, segment_of(groups * blocks, height, at_once)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, flip: bool, y: Tensor) -> None:
    """Writes the convolution of a channels-last map, with `flip` its adjoint, to a channels-last map y.

    Channels of y behind those of x are zeros.
    """
    batch, channels, height, width = x.shape
    written, (kh, kw) = y.shape[1], weight.shape[2:]
    is_large = kh * kw > SMALL
    columns, vec = 7 if not is_large and (act != "gelu" or width <= WIDE) else 4, vec_of(x, y)
    block_s, block_c = _tile(written, kh * kw, vec)
    strips = batch * cdiv(width, columns)
    programs = cdiv(strips, block_s) * cdiv(written, block_c)
    segment = segment_of(programs, height, 1024 if is_large else 4096)
    if not is_large:
        # The longer the walks, the longer a GPU waits for the last ones.
        segment = min(segment, segment_of(programs, height, 3 * 4096, rows=40))
    loaded = in_pairs(x)[0] if is_large and vec == 2 else x
    depthwise_conv2d_fwd_kernel[(programs, cdiv(height, segment))](
        loaded,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        channels // vec,
        written // vec,
        height,
        width,
        strips,
        segment,
        *strides_of(x, vec),
        *strides_of(y, vec),
        ACT=act,
        FLIP=flip,
        KH=kh,
        KW=kw,
        COLUMNS=columns,
        EVEN=width % columns == 0,
        DTYPE=DTYPES.get(x.dtype, tl.float32),
        VEC=vec,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=1,
    )


def backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of channels-last x, of kernels and bias; that of x is left out where it is a convolution's own work."""
    batch, channels, height, width = x.shape
    weight, kh, kw = weight.contiguous(), *weight.shape[2:]
    bias = None if bias is None else bias.contiguous()
    taps = kh * kw
    # All gradients in one pass, unless the registers only suffice for the sums of the taps.
    whole = taps <= SMALL or act is not None
    gx = torch.empty_like(x) if whole else None
    columns, vec, per_multiprocessor = (7 if taps <= SMALL else 2, 1, 16) if whole else (4, vec_of(g, x), 8)
    block_s, block_c = _tile(channels, taps, vec)
    strips = batch * cdiv(width, columns)
    blocks_c = cdiv(channels, block_c)
    groups, segment = shares(cdiv(strips, block_s), blocks_c, height, MULTIPROCESSORS * per_multiprocessor)
    segments = cdiv(height, segment)
    parts = x.new_empty(groups * segments, channels * (taps + (bias is not None)), dtype=torch.float32)
    loaded = in_pairs(g, x) if not whole and vec == 2 else [g, x]
    depthwise_conv2d_bwd_kernel[(groups * blocks_c, segments)](
        *loaded,
        weight,
        bias,
        gx,
        parts,
        channels // vec,
        height,
        width,
        strips,
        segment,
        *strides_of(g, vec),
        *strides_of(x, vec),
        *strides_of(x if gx is None else gx, vec),
        ACT=act,
        KH=kh,
        KW=kw,
        COLUMNS=columns,
        EVEN=width % columns == 0,
        SEGMENTED=segments > 1,
        DTYPE=DTYPES.get(x.dtype, tl.float32),
        VEC=vec,
        BLOCK_S=block_s,
        BLOCK_C=block_c,
        num_warps=1,
    )
    sums, size = sum_parts(parts), weight.numel()
    return gx, sums[:size].view(weight.shape), None if bias is None else sums[size:]
