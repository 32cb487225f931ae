"""The norm of a modulated map as it is defined."""

import torch
from torch import Tensor

from .._checks import state_dtype
from .._maps import with_columns


def forward(
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    state = state_dtype(a, n)
    rows = a.to(state) * n.to(state) * gate.to(state)[:, None, None]
    centred = rows - rows.mean(-1, keepdim=True)
    rows = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    rows = rows * weight.to(state) + bias.to(state)
    return with_columns(rows, columns).to(dtype or a.dtype)
