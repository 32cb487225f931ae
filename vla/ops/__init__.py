"""Operators: pure functions on tensors, each a `torch.library` operator with one kernel per kind of device."""

from ._registry import use_backend
from .line_scan import line_scan
from .scan2d import cross_merge, cross_scan, scan2d
from .selective_scan import selective_scan
from .ssd import ssd

__all__ = ["cross_merge", "cross_scan", "line_scan", "scan2d", "selective_scan", "ssd", "use_backend"]
