"""Mixes of a map with its shifted self as they are defined."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..q_shift import naive


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
    x = x.to(state)
    change = naive.forward(x, shift, gamma, head_dim) - x
    share = weight.to(state)[:, None, None]
    if low is not None and up is not None:
        share = share + torch.einsum("btmr,mrc->mbtc", low.to(state).unflatten(2, up.shape[:2]), up.to(state))
    share = 1 - share if keeps else share
    share = share.expand(-1, x.shape[0], x.shape[2] * x.shape[3], -1).unflatten(2, x.shape[2:])
    mixes = x.permute(0, 2, 3, 1) + change.permute(0, 2, 3, 1) * share
    return mixes.to(out_dtype).contiguous().permute(0, 1, 4, 2, 3)
