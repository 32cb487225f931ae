"""The norm of a modulated map by PyTorch's own layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


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
    state, dtype = state_dtype(a, n), dtype or a.dtype
    rows = a.to(state) * n.to(state) * gate.to(state)[:, None, None]
    rows = F.layer_norm(rows, rows.shape[-1:], weight.to(state), bias.to(state), eps).to(dtype)
    if columns == 0:
        return rows
    tail = torch.eye(1, columns, dtype=dtype, device=a.device)
    return torch.cat([rows, tail.expand(*a.shape[:3], columns)], dim=-1)
