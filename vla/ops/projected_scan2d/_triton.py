"""The projected scan with the kernels of `scan2d`: a product before the scan, and one into its gradient of x."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._maps import as_map, pixels
from .._triton import cdiv, kernel, next_power_of_2, product_precision, settle
from ..layer_norm import _triton as layer_norm
from ..layer_norm._triton import _add, _affine, _load, _place, _standardize, _store
from ..scan2d import _triton as scan
from ..scan2d._triton import _product
from .project import matrix_of, norm_arguments, scan_arguments


@kernel
def projected_scan2d_norm_kernel(
    maps, weight, bias, y, total, rows, stride, eps,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Layer norm of the sum of the directions' maps (COUNT, rows, CHANNELS), and the sum."""
    channel = tl.zeros((BLOCK_R, 1), tl.int32)
    token, inside = _place(tl.program_id(0), rows, GROUPS, BLOCK_R)
    start = token * CHANNELS
    row = _load(maps + start, inside, CHANNELS, WIDTH)
    for k in tl.static_range(1, COUNT):
        row = _add(row, _load(maps + k * tl.cast(stride, tl.int64) + start, inside, CHANNELS, WIDTH))
    if total is not None:
        _store(total + start, row, inside, CHANNELS, WIDTH)
    normal, _ = _standardize(row, inside, eps, CHANNELS, WIDTH)
    _store(y + start, _affine(normal, weight, bias, channel, CHANNELS, WIDTH), inside, CHANNELS, WIDTH)


@kernel
def projected_scan2d_bwd_kernel(
    maps, parts, matrix, gx, g_projected, rows, stride, blocks, part,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr, PROJECTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds what the blocks of channels give to the projections, (blocks, rows, PROJECTED), and to the sum of the
    directions' maps (COUNT, rows, CHANNELS) the product of that and the matrix (PROJECTED, CHANNELS)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = row < rows
    of_projected = ()
    for first in tl.static_range(0, PROJECTED, BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)[None, :]
        valid = inside & (column < PROJECTED)
        at = row * PROJECTED + column
        total = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        for block in range(blocks):
            total += tl.load(parts + block * part.to(tl.int64) + at, valid, 0.0)
        rounded = total.to(g_projected.dtype.element_ty)
        tl.store(g_projected + at, rounded, valid)
        of_projected = of_projected + (rounded,)
    for start in tl.static_range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)[None, :]
        valid = inside & (channel < CHANNELS)
        at = row * CHANNELS + channel
        total = tl.load(maps + at, valid, 0.0).to(tl.float32)
        for k in tl.static_range(1, COUNT):
            total += tl.load(maps + k * stride.to(tl.int64) + at, valid, 0.0).to(tl.float32)
        through = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in tl.static_range(0, len(of_projected)):
            column = i * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
            of_channels = tl.load(
                matrix + column * CHANNELS + channel, (column < PROJECTED) & (channel < CHANNELS), 0.0
            )  # (BLOCK_P, BLOCK_C)
            through = _product(of_projected[i], of_channels, through, PRECISION)
        # Of one step, so that it only keeps the layout of the product from that of the maps.
        through = tl.reshape(settle(tl.reshape(through, (1, BLOCK_R, BLOCK_C))), (BLOCK_R, BLOCK_C))
        tl.store(gx + at, (total + through).to(gx.dtype.element_ty), valid)


def to_save(*args) -> list[Tensor]:
    """The projections, the scans' sum if it is normalised, and what the scan saves."""
    x, weight, *_, norm_weight, _, _ = args
    projected = x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0] * weight.shape[1]))
    totals = [] if norm_weight is None else [torch.empty_like(x, memory_format=torch.channels_last)]
    return [projected, *totals, *scan.to_save(*scan_arguments(projected, args))]


def _unpack(saved: Sequence[Tensor], args: tuple) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
    """What `to_save` has made: projections, the scans' sum, and the scan's."""
    projected, *rest = saved
    return (projected, None, rest) if args[-3] is None else (projected, rest[0], rest[1:])


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, weight, *_, norm_weight, norm_bias, eps = args
    projected, total, states = _unpack(saved, args) if saved else (None, None, ())
    projected = torch.mm(pixels(x), matrix_of(weight, x).T, out=projected)
    arguments = scan_arguments(projected, args)
    if norm_weight is None:
        return scan.forward(*arguments, saved=states)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    out = torch.empty_like(x, memory_format=torch.channels_last) if total is None else total
    rows = y if y.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(out)
    maps = scan.walk(out, *arguments, saved=states)
    constants, _, _ = layer_norm._config(x.shape[1], 1)
    # Half as many rows for as many warps: a thread has several maps to wait for.
    block_r = max(1, constants["BLOCK_R"] // 2)
    projected_scan2d_norm_kernel[(cdiv(len(projected), block_r),)](
        maps, norm_weight.contiguous(), None if norm_bias is None else norm_bias.contiguous(), rows,
        None if maps is out else total, len(projected), maps.stride(0), eps,
        COUNT=1 if maps is out else len(maps), **constants | dict(BLOCK_R=block_r),
    )  # fmt: skip
    return y if rows is y else y.copy_(rows)


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, weight, *_, norm_weight, _, _ = args
    x_rows, matrix = pixels(x).contiguous(), matrix_of(weight, x)
    projected, total, states = _unpack(saved, args) if saved else (torch.mm(x_rows, matrix.T), None, ())
    arguments = scan_arguments(projected, args)
    if x.numel() == 0:
        gx, _, g_A, _, _, *g_parameters = scan.backward(grads, *arguments)
        return [gx, torch.zeros_like(weight), g_A, *g_parameters, None, None]
    g_norm: list[Tensor | None] = [None, None]
    if norm_weight is not None:
        total = scan.forward(*arguments) if total is None else total
        g_y, _, *g_norm = layer_norm.backward([grads[0].permute(0, 2, 3, 1), None], *norm_arguments(total, args))[:4]
        grads = [g_y.permute(0, 3, 1, 2)]
    g_rows, gx_rows = torch.empty_like(projected), torch.empty_like(x_rows)
    gx = as_map(gx_rows, x)
    maps, parts, _, (g_A, *g_parameters) = scan.walk_back(gx, grads[0], as_map(x_rows, x), *arguments[1:], saved=states)
    (rows, columns), channels = projected.shape, x.shape[1]
    block_p = max(16, min(64, next_power_of_2(columns)))
    block_r = max(16, min(32, 4096 // next_power_of_2(columns)))
    block_c = min((128, 64, 32), key=lambda block: -channels % block)
    projected_scan2d_bwd_kernel[(cdiv(rows, block_r),)](
        maps, parts, matrix, gx_rows, g_rows, rows, maps.stride(0), len(parts), parts.stride(0),
        COUNT=1 if maps is gx else len(maps), CHANNELS=channels, PROJECTED=columns,
        PRECISION=product_precision(x), BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    return [gx, (g_rows.T @ x_rows).view(weight.shape), g_A, *g_parameters, *g_norm]
