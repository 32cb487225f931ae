"""The definition: a projection of every pixel, then the scan."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..scan2d import naive


def forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    directions: list[str],
    D: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    delta_softplus: bool,
    per_line: bool,
) -> Tensor:
    rank, states = dt_weight.shape[2], A.shape[2]
    dtype = state_dtype(x)
    projected = torch.einsum("bdhw,ked->bkehw", x.to(dtype), weight.to(dtype))
    dt, B, C = projected.split([rank, states, states], dim=2)
    return naive.forward(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, False, per_line)
