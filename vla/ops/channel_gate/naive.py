"""The gate as it is defined."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, scale: Tensor) -> Tensor:
    state = state_dtype(x)
    mean, weight1, bias1, weight2, bias2, scale = (t.to(state) for t in (x, weight1, bias1, weight2, bias2, scale))
    hidden = torch.clamp(mean @ weight1.T + bias1, min=0)
    return (scale / (1 + torch.exp(-(hidden @ weight2.T + bias2)))).to(x.dtype)
