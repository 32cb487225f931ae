"""The linear layer of each group as it is defined."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(x: Tensor, weight: Tensor, weight2: Tensor | None) -> Tensor:
    state, (groups, _, width) = state_dtype(x), weight.shape
    rows = x.to(state).unflatten(-1, (groups, width))
    outputs = [
        torch.einsum("bhwki,koi->bhwko", rows, w.to(state)).flatten(-2) for w in (weight, weight2) if w is not None
    ]
    return torch.cat(outputs, dim=-1).to(x.dtype)
