"""The norm of a modulated map by PyTorch's own layer norm."""

import torch
import torch.nn.functional as F
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
    rows = F.layer_norm(rows, rows.shape[-1:], weight.to(state), bias.to(state), eps)
    return with_columns(rows.to(dtype or a.dtype), columns)
