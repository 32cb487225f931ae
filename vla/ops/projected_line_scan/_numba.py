"""The projected scan on the CPU by compiled kernels."""

from torch import Tensor

from ..line_scan import _numba as scan
from . import project


def forward(*args) -> Tensor:
    return project.forward(scan, args)


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    return project.backward(scan, grads, args)
