"""GPU kernels: a program convolves a tile of pixels on tensor cores and norms them before they reach memory."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import convolved_size
from .._triton import DTYPES, cdiv, gelu, gelu_slope, kernel, mean_of_rows, next_power_of_2, sum_parts
from .._walk import (
    CHANNELS,
    add_rows,
    find_windows,
    launch,
    load_rows,
    load_taps,
    matrices,
    no_sums,
    place,
    suits,
    windows,
)
from ..layer_norm import _triton as layer_norm

# The D channels of a pixel are a tuple of chunks (BLOCK_P, WIDTH), as the width of a tile must be a power of two.


@triton.jit
def _patches(
    x,
    tile,
    pixels,
    height,
    width,
    out_height,
    out_width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the convolution multiplies, (BLOCK_P, TAPS): KH KW C numbers, a one for the bias, and zeros."""
    pixel = tl.cast(tile, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < pixels)[:, None]
    line = pixel // out_width
    top = (line % out_height * STRIDE - PADDING).to(tl.int32)[:, None]
    left = (pixel % out_width * STRIDE - PADDING).to(tl.int32)[:, None]
    tap = tl.arange(0, TAPS)[None, :]
    down, right, channel = tap // (KW * C), tap // C % KW, tap % C
    # Without its sign a negative number is above every height.
    valid = ((top + down).to(tl.uint32) < height) & ((left + right).to(tl.uint32) < width)
    start = (
        line[:, None] // out_height * batch_stride + top.to(tl.int64) * row_stride + left.to(tl.int64) * column_stride
    )
    offset = down.to(tl.int64) * row_stride + right.to(tl.int64) * column_stride + channel.to(tl.int64) * channel_stride
    numbers = tl.load(x + start + offset, valid & (tap < KH * KW * C) & inside, 0.0).to(DTYPE)
    one = tl.full((1, 1), 1.0, DTYPE)
    return tl.where((tap == KH * KW * C) & inside, one, numbers), pixel[:, None], inside


@triton.jit
def _weights(
    weight,
    bias,
    out_stride,
    in_stride,
    row_stride,
    column_stride,
    C: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What the windows are multiplied with, chunks of (TAPS, WIDTH), the bias with the one."""
    tap = tl.arange(0, TAPS)[:, None]
    place = tap % C * in_stride + tap // (KW * C) * row_stride + tap // C % KW * column_stride
    chunks = ()
    for i in tl.static_range(0, (D + WIDTH - 1) // WIDTH):
        d = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        numbers = tl.load(weight + d * out_stride + place, (tap < KH * KW * C) & (d < D), 0.0).to(DTYPE)
        if bias is not None:
            numbers = tl.where(tap == KH * KW * C, tl.load(bias + d, d < D, 0.0).to(DTYPE), numbers)
        chunks = chunks + (numbers,)
    return chunks


@triton.jit
def _vector(pointer, i, D: tl.constexpr, WIDTH: tl.constexpr):
    d = i * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + d, d < D, 0.0).to(tl.float32)


@triton.jit
def _convolve(patches, weights):
    chunks = ()
    for i in tl.static_range(0, len(weights)):
        chunks = chunks + (tl.dot(patches, weights[i], input_precision="ieee"),)
    return chunks


@triton.jit
def _normal(chunks, inside, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """The convolution with mean 0 and variance 1, and the inverse of its standard deviation, (BLOCK_P, 1)."""
    mean = mean_of_rows(chunks, D)
    centred = ()
    squares = ()
    for i in tl.static_range(0, len(chunks)):
        part = chunks[i] - mean
        if (i + 1) * WIDTH > D:
            part = tl.where(i * WIDTH + tl.arange(0, WIDTH)[None, :] < D, part, 0.0)
        centred = centred + (part,)
        squares = squares + (part * part,)
    inverse = tl.where(inside, tl.rsqrt(mean_of_rows(squares, D) + eps), 0.0)
    normal = ()
    for i in tl.static_range(0, len(chunks)):
        normal = normal + (centred[i] * inverse,)
    return normal, inverse


@triton.jit
def _affine(normal, norm_weight, norm_bias, i, D: tl.constexpr, WIDTH: tl.constexpr):
    return normal * _vector(norm_weight, i, D, WIDTH) + _vector(norm_bias, i, D, WIDTH)


@kernel
def conv_layer_norm_fwd_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    weight_out_stride,
    weight_in_stride,
    weight_row_stride,
    weight_column_stride,
    eps,
    GELU: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y (pixels, D) of every so many tiles of pixels of x (B, C, H, W)."""
    weights = _weights(
        weight,
        bias,
        weight_out_stride,
        weight_in_stride,
        weight_row_stride,
        weight_column_stride,
        C,
        D,
        KH,
        KW,
        TAPS,
        WIDTH,
        DTYPE,
    )
    for tile in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_P), tl.num_programs(0)):
        patches, pixel, inside = _patches(
            x,
            tile,
            pixels,
            height,
            width,
            out_height,
            out_width,
            batch_stride,
            channel_stride,
            row_stride,
            column_stride,
            C,
            KH,
            KW,
            STRIDE,
            PADDING,
            TAPS,
            BLOCK_P,
            DTYPE,
        )
        normal, _ = _normal(_convolve(patches, weights), inside, eps, D, WIDTH)
        for i in tl.static_range(0, len(normal)):
            s = _affine(normal[i], norm_weight, norm_bias, i, D, WIDTH)
            if GELU:
                s = gelu(s)
            d = i * WIDTH + tl.arange(0, WIDTH)[None, :]
            tl.store(y + pixel * D + d, s.to(y.dtype.element_ty), inside & (d < D))


@triton.jit
def _store_halves(pointers, rows, d, inside, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr):
    """Stores rows (BLOCK_P, WIDTH), of which `pointers` are the channels d of the lower half."""
    # One half after the other, for which the same shared memory is enough.
    lower, upper = tl.split(rows.reshape(BLOCK_P, 2, WIDTH // 2).permute(0, 2, 1))
    tl.store(pointers, lower, inside & (d < D))
    tl.store(pointers + WIDTH // 2, upper, inside & (d + WIDTH // 2 < D))


@kernel(do_not_specialize=["columns", "height", "width", "out_height", "out_width", "chunks", "rows"])
def conv_layer_norm_walk_kernel(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    next_weight,
    next_bias,
    y,
    n,
    eps,
    next_eps,
    columns,
    height,
    width,
    out_height,
    out_width,
    chunks,
    rows,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    GELU: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    LEAD: tl.constexpr,
    REST: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`rows` rows of BLOCK_P columns of y (B, H', W', D), from x (B, H, W, C) and weight (KH, SIZE, D).

    And of n, the norm of y with next_weight and next_bias, if there is one.
    """
    image, column, inside, first, left, top = place(
        tl.program_id(0), columns, out_width, chunks, rows, STRIDE, COLUMN_STRIDE, TOP, LEFT, BLOCK_P
    )
    taps = load_taps(weight, tl.arange(0, WIDTH), D, KH, SIZE, LEAD, REST)
    offsets, masks = find_windows(left, inside, width, x_column, C, SIZE, LEAD, REST, TOGETHER)
    inside, d = inside[:, None], tl.arange(0, WIDTH // 2)[None, :]
    norm_weight, norm_bias = _vector(norm_weight, 0, D, WIDTH), _vector(norm_bias, 0, D, WIDTH)
    if bias is not None:
        bias = _vector(bias, 0, D, WIDTH)

    BEFORE: tl.constexpr = (KH - 1) // STRIDE
    x += (image * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column)[:, None]
    at = ((image * out_height + (first - BEFORE)) * out_width + column)[:, None] * D + d
    sums = no_sums(BEFORE, BLOCK_P, WIDTH)
    for i in range(tl.minimum(rows, out_height - first) + BEFORE):
        patches = load_rows(x, top + i * STRIDE, height, x_row, offsets, masks, STRIDE, DTYPE)
        done, sums = add_rows(patches, taps, sums, KH, STRIDE, BLOCK_P, WIDTH)
        if bias is not None:
            done += bias
        normal, _ = _normal((done,), inside, eps, D, WIDTH)
        s = normal[0] * norm_weight + norm_bias
        if GELU:
            s = gelu(s)
        s = s.to(y.dtype.element_ty)
        _store_halves(y + at, s, d, inside & (i >= BEFORE), D, WIDTH, BLOCK_P)
        if n is not None:
            normal, _ = _normal((s.to(tl.float32),), inside, next_eps, D, WIDTH)
            # Loaded for every row: there are no registers left for them.
            s = _affine(normal[0], next_weight, next_bias, 0, D, WIDTH).to(n.dtype.element_ty)
            _store_halves(n + at, s, d, inside & (i >= BEFORE), D, WIDTH, BLOCK_P)
        x += STRIDE * x_row
        at += out_width * D


@kernel
def conv_layer_norm_bwd_kernel(
    g,
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    parts,
    pixels,
    height,
    width,
    out_height,
    out_width,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    weight_out_stride,
    weight_in_stride,
    weight_row_stride,
    weight_column_stride,
    eps,
    GELU: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """This program's part (TAPS + 2, D) of the parameters' gradients: coefficients, scale and shift of the norm."""
    weights = _weights(
        weight,
        bias,
        weight_out_stride,
        weight_in_stride,
        weight_row_stride,
        weight_column_stride,
        C,
        D,
        KH,
        KW,
        TAPS,
        WIDTH,
        DTYPE,
    )
    of_weights = ()
    of_scale = ()
    of_shift = ()
    for _ in tl.static_range(0, len(weights)):
        of_weights = of_weights + (tl.zeros((TAPS, WIDTH), tl.float32),)
        of_scale = of_scale + (tl.zeros((1, WIDTH), tl.float32),)
        of_shift = of_shift + (tl.zeros((1, WIDTH), tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_P), tl.num_programs(0)):
        patches, pixel, inside = _patches(
            x,
            tile,
            pixels,
            height,
            width,
            out_height,
            out_width,
            batch_stride,
            channel_stride,
            row_stride,
            column_stride,
            C,
            KH,
            KW,
            STRIDE,
            PADDING,
            TAPS,
            BLOCK_P,
            DTYPE,
        )
        normal, inverse = _normal(_convolve(patches, weights), inside, eps, D, WIDTH)
        of_normal = ()
        products = ()
        scales = ()
        shifts = ()
        for i in tl.static_range(0, len(normal)):
            d = i * WIDTH + tl.arange(0, WIDTH)[None, :]
            of_y = tl.load(g + pixel * D + d, inside & (d < D), 0.0).to(tl.float32)
            if GELU:
                of_y *= gelu_slope(_affine(normal[i], norm_weight, norm_bias, i, D, WIDTH))
            shifts = shifts + (of_shift[i] + tl.sum(of_y, 0, keep_dims=True),)
            scales = scales + (of_scale[i] + tl.sum(of_y * normal[i], 0, keep_dims=True),)
            of_y *= _vector(norm_weight, i, D, WIDTH)
            of_normal = of_normal + (of_y,)
            products = products + (of_y * normal[i],)
        of_shift = shifts
        of_scale = scales
        mean = mean_of_rows(of_normal, D)
        slope = mean_of_rows(products, D)
        updated = ()
        for i in tl.static_range(0, len(normal)):
            of_convolution = inverse * (of_normal[i] - mean - normal[i] * slope)
            if (i + 1) * WIDTH > D:
                of_convolution = tl.where(i * WIDTH + tl.arange(0, WIDTH)[None, :] < D, of_convolution, 0.0)
            updated = updated + (
                tl.dot(tl.trans(patches), of_convolution.to(DTYPE), of_weights[i], input_precision="ieee"),
            )
        of_weights = updated
    part = parts + tl.program_id(0) * (TAPS + 2) * D
    tap = tl.arange(0, TAPS)[:, None]
    for i in tl.static_range(0, len(weights)):
        d = i * WIDTH + tl.arange(0, WIDTH)
        tl.store(part + tap * D + d[None, :], of_weights[i], (tap < TAPS) & (d < D)[None, :])
        tl.store(part + TAPS * D + d, tl.sum(of_scale[i], 0), d < D)
        tl.store(part + (TAPS + 1) * D + d, tl.sum(of_shift[i], 0), d < D)


# Pixels of a tile.
_TILE = 32
# Most programs of a kernel: in the backward as many single warps as fit on a GPU at once, which its registers decide.
_FORWARD_PROGRAMS = 4224
_BACKWARD_PROGRAMS = 1056
# Channels from which on a row of a window is long enough for a product.
_MANY = 16


@cache
def _constants(channels: int, out: int, rows: int, columns: int, dtype: torch.dtype) -> dict:
    lowest = out & -out
    return dict(
        C=channels,
        D=out,
        KH=rows,
        KW=columns,
        TAPS=max(16, next_power_of_2(rows * columns * channels + 1)),
        WIDTH=min(64, lowest) if lowest >= 16 else max(16, next_power_of_2(out)),
        DTYPE=DTYPES.get(dtype, tl.float32),
        num_warps=1,
        num_stages=1,
    )


def _arguments(
    x: Tensor, weight: Tensor, stride: int, padding: int, eps: float, act: str | None, dtype: torch.dtype
) -> tuple[list, dict]:
    """What both kernels get after their tensors, of which the first is the number of pixels, and their constants."""
    # Triton's interpreter cannot multiply bfloat16.
    constants = _constants(x.shape[1], weight.shape[0], *weight.shape[2:], dtype if x.device.type != "cpu" else None)
    size = convolved_size(x, weight, (stride, stride), (padding, padding))
    numbers = [x.shape[0] * size[0] * size[1], *x.shape[2:], *size, *x.stride(), *weight.stride(), eps]
    return numbers, constants | dict(GELU=act == "gelu", STRIDE=stride, PADDING=padding)


def _is_walked(x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> bool:
    """Whether many channels are multiplied in their 16 bits: exact for a wider result too, if weights have as few."""
    channels = x.shape[1] >= _MANY and weight.shape[0] <= CHANNELS
    return channels and x.dtype in (dtype, weight.dtype) and suits(x.dtype, weight, stride)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    stride: int,
    padding: int,
    eps: float,
    next_eps: float,
    act: str | None,
    dtype: torch.dtype | None,
    next_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    dtype = dtype or x.dtype
    size = convolved_size(x, weight, (stride, stride), (padding, padding))
    y = x.new_empty(x.shape[0], *size, weight.shape[0], dtype=dtype)
    n = torch.empty_like(y if next_weight is not None else y[:0], dtype=next_dtype)
    vectors = [None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias)]
    if y.numel() > 0 and _is_walked(x, weight, stride, dtype):
        maps = windows(x, bits=True)
        grid, numbers, constants = launch(maps, weight, x.dtype, size, (stride, stride), (padding, padding))
        vectors += [None if t is None else t.contiguous() for t in (next_weight, next_bias)]
        results = (y, None if next_weight is None else n, eps, next_eps)
        conv_layer_norm_walk_kernel[grid](
            maps, matrices(weight, x.dtype), *vectors, *results, *numbers, GELU=act == "gelu", **constants
        )
    elif y.numel() > 0:
        numbers, constants = _arguments(x, weight, stride, padding, eps, act, dtype)
        programs = min(cdiv(numbers[0], _TILE), _FORWARD_PROGRAMS)
        conv_layer_norm_fwd_kernel[(programs,)](x, weight, *vectors, y, *numbers, BLOCK_P=_TILE, **constants)
        if next_weight is not None:
            n, _ = layer_norm.forward(y, None, next_weight, next_bias, None, 1, next_eps, n.dtype)
    return y.permute(0, 3, 1, 2), n.permute(0, 3, 1, 2)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    stride: int,
    padding: int,
    eps: float,
    next_eps: float,
    act: str | None,
    dtype: torch.dtype | None,
    next_dtype: torch.dtype | None,
) -> list[Tensor | None] | None:
    if next_weight is not None:
        return None
    g = grads[0].permute(0, 2, 3, 1)
    if g.numel() == 0:
        return [None] * 7
    if _is_walked(x, weight, stride, dtype or x.dtype):
        return None
    numbers, constants = _arguments(x, weight, stride, padding, eps, act, dtype or x.dtype)
    rows, out = constants["TAPS"] + 2, weight.shape[0]
    # More numbers would not fit into the registers.
    tile = _TILE if out <= 48 else _TILE // 2
    programs = min(cdiv(numbers[0], tile), _BACKWARD_PROGRAMS)
    parts = torch.empty(programs, rows * out, dtype=torch.float32, device=x.device)
    vectors = (None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    conv_layer_norm_bwd_kernel[(programs,)](
        g.contiguous(), x, weight, *vectors, parts, *numbers, BLOCK_P=tile, **constants
    )
    sums = sum_parts(parts).view(rows, out)
    taps = weight[0].numel()
    g_weight = sums[:taps].view(*weight.shape[2:], *weight.shape[1::-1]).permute(3, 2, 0, 1)
    # Not views of the same memory, which an operator's results must not be.
    g_bias = None if bias is None else sums[taps].clone()
    return [None, g_weight.clone(), g_bias, sums[-2].clone(), sums[-1].clone(), None, None]
