"""The projected scan in vectorised PyTorch."""

from torch import Tensor

from ..line_scan import _torch as scan
from . import project


def forward(*args) -> Tensor:
    return project.forward(scan, args)


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    return project.backward(scan, grads, args)
