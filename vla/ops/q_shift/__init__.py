"""Q-Shift: Vision-RWKV's token shift in four directions, https://arxiv.org/abs/2403.02308."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim
from .._registry import Operator

__all__ = ["q_shift"]

_OP = "q_shift"


def check_shift(op: str, x: Tensor, shift: int, gamma: float, head_dim: int | None) -> None:
    """Raises `ValueError` unless the options are those of a shift of x, (B, C, H, W)."""
    if shift < 0:
        raise ValueError(f"{op}: shift is {shift}, expected 0 or more pixels")
    if not 0 <= gamma <= 0.25:
        raise ValueError(f"{op}: gamma is {gamma}, expected a share of the channels between 0 and 1/4")
    if head_dim is not None and (head_dim < 1 or x.shape[1] % head_dim != 0):
        raise ValueError(f"{op}: head_dim is {head_dim}, expected a divisor of the {x.shape[1]} channels of x")


def _infer(x: Tensor, shift: int, gamma: float, head_dim: int | None) -> Tensor:
    check_ndim(_OP, "x", x, (4,), "(B, C, H, W)")
    check_float(_OP, x=x)
    check_shift(_OP, x, shift, gamma, head_dim)
    return torch.empty_like(x)


operator = Operator(
    _OP,
    "(Tensor x, int shift, float gamma, int? head_dim) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=lambda x, shift, gamma, head_dim: 0,
)


def q_shift(x: Tensor, shift: int = 1, gamma: float = 0.25, head_dim: int | None = None) -> Tensor:
    """Gives four groups of channels the value of the left, right, upper and lower neighbour (Vision-RWKV, eq. 2).

    The channels `[0, b1)`, `[b1, b2)`, `[b2, b3)`, `[b3, b4)` with `b_i = int(C * gamma * i)` come from the pixel
    `shift` columns to the left, to the right, `shift` rows above and below, zero outside of the map; the others stay.

    Args:
        x: Map, (B, C, H, W), any memory format.
        shift: Distance in pixels; 0 copies the map.
        gamma: Share of the channels per direction, at most 1/4.
        head_dim: Split the channels of every head of this size (Vision-RWKV 6) instead of all at once.

    Returns:
        Shifted map in the shape, dtype and memory format of `x`.

    Raises:
        ValueError: For a shape or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.q_shift(x, shift, gamma, head_dim)
    else:
        return operator(x, shift, gamma, head_dim)
