"""The definition: a projection of every pixel, then the scan, then a norm."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..layer_norm import naive as layer_norm
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
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    rank, states = dt_weight.shape[2], A.shape[2]
    dtype = state_dtype(x)
    projected = torch.einsum("bdhw,ked->bkehw", x.to(dtype), weight.to(dtype))
    dt, B, C = projected.split([rank, states, states], dim=2)
    y = naive.forward(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, False, per_line)
    if norm_weight is None:
        return y
    rows, _ = layer_norm.forward(y.permute(0, 2, 3, 1), None, norm_weight, norm_bias, None, 1, eps, None)
    return torch.empty_like(y).copy_(rows.permute(0, 3, 1, 2))
