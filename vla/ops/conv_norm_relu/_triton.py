"""The convolution as products of pixels and taps on tensor cores, normed before it reaches memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _ahead
from .._checks import convolved_size
from .._triton import cdiv, kernel, next_power_of_2, product, product_precision
from .._walk import add_rows, find_windows, launch, load_rows, load_taps, matrices, no_sums, place, suits, windows

BLOCK_P = 128
# Channels of maps up to which programs walk, and from which on cuDNN's kernel is faster than those that do not.
MANY = 32
# Channels of results up to which reading x from shared memory for every product takes longer than the product.
NARROW = 32


@triton.jit
def _channel(pointer, i, exists):
    """A number of every channel, (1, WIDTH)."""
    return tl.load(pointer + i, exists, 0.0).to(tl.float32)[None, :]


@triton.jit
def _norm(mean, var, norm_weight, norm_bias, eps, d, exists, NORMED: tl.constexpr):
    """Factor and summand of the channels d."""
    d %= NORMED
    scale = _channel(norm_weight, d, exists) * tl.rsqrt(_channel(var, d, exists) + eps)
    return scale, _channel(norm_bias, d, exists) - _channel(mean, d, exists) * scale


@kernel(do_not_specialize=["columns", "height", "width", "out_height", "out_width", "chunks", "rows"])
def conv_norm_relu_walk_kernel(
    x,
    weight,
    mean,
    var,
    norm_weight,
    norm_bias,
    y,
    eps,
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
    NORMED: tl.constexpr,
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
    """`rows` rows of BLOCK_P columns and WIDTH channels of y (B, H', W', D), from x and weight (KH, SIZE, D)."""
    BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    d = tl.program_id(0) % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    image, column, inside, first, left, top = place(
        tl.program_id(0) // BLOCKS, columns, out_width, chunks, rows, STRIDE, COLUMN_STRIDE, TOP, LEFT, BLOCK_P
    )
    taps = load_taps(weight, d, D, KH, SIZE, LEAD, REST)
    offsets, masks = find_windows(left, inside, width, x_column, C, SIZE, LEAD, REST, TOGETHER)
    scale, shift = _norm(mean, var, norm_weight, norm_bias, eps, d, d < D, NORMED)

    BEFORE: tl.constexpr = (KH - 1) // STRIDE
    x += (image * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column)[:, None]
    y += ((image * out_height + (first - BEFORE)) * out_width + column)[:, None] * D + d[None, :]
    sums = no_sums(BEFORE, BLOCK_P, WIDTH)
    for i in range(tl.minimum(rows, out_height - first) + BEFORE):
        patches = load_rows(x, top + i * STRIDE, height, x_row, offsets, masks, STRIDE, DTYPE)
        done, sums = add_rows(patches, taps, sums, KH, STRIDE, BLOCK_P, WIDTH)
        out = tl.maximum(done * scale + shift, 0.0).to(y.dtype.element_ty)
        tl.store(y, out, inside[:, None] & (d < D)[None, :] & (i >= BEFORE))
        x += STRIDE * x_row
        y += out_width * D


@kernel(do_not_specialize=["pixels", "height", "width", "out_height", "out_width"])
def conv_norm_relu_fwd_kernel(
    x,
    weight,
    mean,
    var,
    norm_weight,
    norm_bias,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_row,
    x_column: tl.constexpr,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_P pixels of y (pixels, D), from x (B, H, W, C) and weight (KH, KW, C, D)."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    line = pixel // out_width
    row = (line % out_height).to(tl.int32) * STRIDE - TOP
    column = (pixel % out_width).to(tl.int32) * COLUMN_STRIDE - LEFT
    c, d = tl.arange(0, DEPTH), tl.arange(0, WIDTH)
    x += (line // out_height * x_batch + row.to(tl.int64) * x_row + column * x_column)[:, None] + c[None, :]
    weight += c[:, None] * D + d[None, :]
    sums = tl.zeros((BLOCK_P, WIDTH), tl.float32)
    for i in range(KH):
        # A row above the map is, without its sign, below it.
        inside = ((row + i).to(tl.uint32) < height) & (pixel < pixels)
        for j in tl.static_range(KW):
            mask = inside & ((column + j).to(tl.uint32) < width)
            patch = tl.load(x + j * x_column, mask[:, None] & (c < C)[None, :], 0.0)
            tap = tl.load(weight + (i * KW + j) * C * D, (c < C)[:, None] & (d < D)[None, :], 0.0)
            sums += product(patch.to(tap.dtype), tap, PRECISION)
        x += x_row

    scale, shift = _norm(mean, var, norm_weight, norm_bias, eps, d, d < D, NORMED)
    out = tl.maximum(sums * scale + shift, 0.0).to(y.dtype.element_ty)
    tl.store(y + pixel[:, None] * D + d[None, :], out, (pixel < pixels)[:, None] & (d < D)[None, :])


@kernel
def conv_norm_relu_fold_kernel(
    weight,
    mean,
    var,
    norm_weight,
    norm_bias,
    scaled,
    shift,
    eps,
    SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The SIZE weights of one channel of the result with the norm's scale as a factor, and what is left of the norm."""
    d = tl.program_id(0)
    scale = tl.load(norm_weight + d % NORMED).to(tl.float32)
    scale *= tl.rsqrt(tl.load(var + d % NORMED).to(tl.float32) + eps)
    rest = tl.load(norm_bias + d % NORMED).to(tl.float32) - tl.load(mean + d % NORMED).to(tl.float32) * scale
    tl.store(shift + d, rest.to(shift.dtype.element_ty))
    i = tl.arange(0, BLOCK)
    kernels = tl.load(weight + d * SIZE + i, i < SIZE, 0.0).to(tl.float32)
    tl.store(scaled + d * SIZE + i, (kernels * scale).to(scaled.dtype.element_ty), i < SIZE)


def _is_for_cudnn(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether cuDNN's convolution, which adds a vector and applies ReLU, is faster."""
    many = weight.shape[1] >= MANY and dtype.itemsize == 2
    cudnn = torch.backends.cudnn
    return many and x.device.type != "cpu" and torch.version.hip is None and cudnn.is_available() and cudnn.enabled


def _by_cudnn(
    x: Tensor,
    weight: Tensor,
    norm: list[Tensor],
    stride: tuple[int, int],
    padding: tuple[int, int],
    eps: float,
    size: tuple[int, int, int, int],
) -> Tensor:
    """The result, `size` (B, H, W, D), with channels last."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    scaled, shift = torch.empty_like(weight, dtype=x.dtype), x.new_empty(len(weight))
    taps = weight[0].numel()
    conv_norm_relu_fold_kernel[(len(weight),)](
        weight,
        *norm,
        scaled,
        shift,
        eps,
        SIZE=taps,
        NORMED=len(norm[0]),
        BLOCK=next_power_of_2(taps),
    )
    # Nothing is computed where kernels are compiled ahead, and the operator has no shapes for tensors without numbers.
    if x.is_meta or _ahead.current() is not None:
        return x.new_empty(size).permute(0, 3, 1, 2)
    return torch.cudnn_convolution_relu(x, scaled, shift, stride, padding, (1, 1), 1)


def forward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    padding_h: int,
    padding_w: int,
    eps: float,
    stride_h: int = 1,
    stride_w: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out_channels, channels, kh, kw = weight.shape
    dtype, stride, padding = dtype or x.dtype, (stride_h, stride_w), (padding_h, padding_w)
    height, width = convolved_size(x, weight, stride, padding)
    size = x.shape[0], height, width, out_channels
    norm = [t.contiguous() for t in (mean, var, norm_weight, norm_bias)]
    walked = channels <= MANY and suits(dtype, weight, stride_h)
    if 0 not in size and not walked and _is_for_cudnn(x, weight, dtype):
        return _by_cudnn(x.to(dtype), weight, norm, stride, padding, eps, size)
    y = x.new_empty(size, dtype=dtype)
    if y.numel() == 0:
        return y.permute(0, 3, 1, 2)
    if walked:
        maps = windows(x, bits=out_channels <= NARROW and x.dtype == dtype)
        grid, numbers, constants = launch(maps, weight, dtype, (height, width), stride, padding)
        taps = matrices(weight, dtype)
        conv_norm_relu_walk_kernel[grid](maps, taps, *norm, y, eps, *numbers, NORMED=len(mean), **constants)
        return y.permute(0, 3, 1, 2)
    x = windows(x, bits=False)
    pixels = y.numel() // out_channels
    conv_norm_relu_fwd_kernel[(cdiv(pixels, BLOCK_P),)](
        x,
        matrices(weight, dtype),
        *norm,
        y,
        pixels,
        x.shape[2],
        x.shape[3],
        height,
        width,
        x.stride(0),
        x.stride(2),
        x.stride(3),
        eps,
        C=channels,
        D=out_channels,
        NORMED=len(mean),
        KH=kh,
        KW=kw,
        STRIDE=stride_h,
        COLUMN_STRIDE=stride_w,
        TOP=padding_h,
        LEFT=padding_w,
        DEPTH=max(16, next_power_of_2(channels)),
        WIDTH=max(16, next_power_of_2(out_channels)),
        BLOCK_P=BLOCK_P,
        PRECISION=product_precision(y),
        num_warps=8,
        num_stages=1,
    )
    return y.permute(0, 3, 1, 2)
