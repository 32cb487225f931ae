"""The projected scan with the kernels of `line_scan`, the last of which takes the gradient of x through the proxy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..line_scan import _triton as scan
from ..line_scan import _triton_proxy as proxy_scan
from . import project
from .project import pixels, scan_arguments


def to_save(*args) -> list[Tensor]:
    """The proxy of all pixels, (B H W, S), and what the scan saves."""
    x, weight, *_ = args
    projected = x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0]))
    arguments = scan_arguments(projected, args)
    return [projected, *(proxy_scan.to_save(*arguments) if proxy_scan.suits(arguments) else [])]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, weight, *_ = args
    projected = torch.mm(pixels(x), weight.to(x.dtype).T, out=saved[0] if saved else None)
    return scan.forward(*scan_arguments(projected, args), saved=saved[1:])


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, weight, *_ = args
    rows, matrix = pixels(x), weight.to(x.dtype)
    projected, *states = saved or [torch.mm(rows, matrix.T)]
    arguments = scan_arguments(projected, args)
    if not proxy_scan.suits(arguments):
        return project.backward(scan, grads, args)
    gx, *g_weights, g_proxy = proxy_scan.backward(grads, *arguments, projection=matrix, saved=states)
    return [gx, pixels(g_proxy).T @ rows, *g_weights]
