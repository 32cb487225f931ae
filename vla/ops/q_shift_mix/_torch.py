"""Mixes of a map with its shifted self: slice copies for the shift, one product per mix."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..q_shift._torch import shifted


def _last(x: Tensor) -> Tensor:
    """(..., C, H, W) -> (..., H, W, C)."""
    return x.movedim(-3, -1)


def _shares(weight: Tensor, low: Tensor | None, up: Tensor | None, height: int, width: int, keeps: bool) -> Tensor:
    """Share of the shifted map in every mix, broadcasting to (mixes, B, H, W, C)."""
    if keeps:
        return 1 - _shares(weight, low, up, height, width, False)
    if low is None or up is None:
        return weight[:, None, None, None]
    low = low.unflatten(2, up.shape[:2]).permute(2, 0, 1, 3)
    return (torch.matmul(low, up[:, None]) + weight[:, None, None]).unflatten(2, (height, width))


def forward(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    shift: int,
    gamma: float,
    head_dim: int | None,
    dtype: torch.dtype | None,
    keeps: bool,
) -> Tensor:
    state = state_dtype(x, weight, low, up)
    out_dtype = dtype or x.dtype
    x, weight, low, up = (None if t is None else t.to(state) for t in (x, weight, low, up))
    change = _last(shifted(x, shift, gamma, head_dim).sub_(x))
    out = x.new_empty(weight.shape[0], *change.shape, dtype=out_dtype)
    shares = _shares(weight, low, up, *x.shape[2:], keeps)
    for mix, share in zip(out, shares, strict=True):
        mix.copy_(torch.addcmul(_last(x), change, share))
    return out.movedim(-1, -3)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    shift: int,
    gamma: float,
    head_dim: int | None,
    dtype: torch.dtype | None,
    keeps: bool,
) -> list[Tensor | None]:
    state = state_dtype(x, weight, low, up)
    x, weight, low, up = (None if t is None else t.to(state) for t in (x, weight, low, up))
    change = _last(shifted(x, shift, gamma, head_dim).sub_(x))
    shares = _shares(weight, low, up, *x.shape[2:], keeps)
    g = _last(grads[0].to(state))
    moved = torch.zeros_like(x)
    for mix, share in zip(g, shares, strict=True):
        _last(moved).addcmul_(mix, share)
    gx = g.sum(0).movedim(-1, 1) - moved + shifted(moved, -shift, gamma, head_dim)
    g_shares = g * (change.neg_() if keeps else change)
    g_low = g_up = None
    if low is not None and up is not None:
        flat = g_shares.flatten(2, 3)
        g_low = torch.matmul(flat, up[:, None].mT).permute(1, 2, 0, 3).flatten(2)
        g_up = low.unflatten(2, up.shape[:2]).flatten(0, 1).permute(1, 2, 0) @ flat.flatten(1, 2)
    return [gx, g_shares.sum((1, 2, 3)), g_low, g_up]
