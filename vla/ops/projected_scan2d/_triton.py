"""The projected scan with the kernels of `scan2d`: a product before the scan, and one into its gradient of x."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..scan2d import _triton as scan
from .project import as_map, matrix_of, pixels, scan_arguments, split


def to_save(*args) -> list[Tensor]:
    """The projections, and what the scan saves."""
    x, weight, *_ = args
    projected = x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0] * weight.shape[1]))
    return [projected, *scan.to_save(*scan_arguments(projected, args))]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, weight, *_ = args
    projected = torch.mm(pixels(x), matrix_of(weight, x).T, out=saved[0] if saved else None)
    return scan.forward(*scan_arguments(projected, args), saved=saved[1:])


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, weight, *_ = args
    x_rows, matrix = pixels(x), matrix_of(weight, x)
    projected, *states = saved or [torch.mm(x_rows, matrix.T)]
    g_rows = torch.empty_like(projected)
    gx, _, g_A, _, _, *g_parameters = scan.backward(
        grads, *scan_arguments(projected, args), saved=states, projections=split(g_rows, args)
    )
    gx_rows = gx.permute(0, 2, 3, 1)
    if gx_rows.is_contiguous():
        gx_rows.view(x_rows.shape).addmm_(g_rows, matrix)
    else:
        gx += as_map(g_rows @ matrix, x)
    return [gx, (g_rows.T @ x_rows).view(weight.shape), g_A, *g_parameters]
