"""LayerNorm and global response normalisation as they are defined."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    projection: Tensor | None,
) -> Tensor:
    state = state_dtype(x)
    norm_weight, norm_bias, weight, bias = (t.to(state) for t in (norm_weight, norm_bias, weight, bias))
    y = x.permute(0, 2, 3, 1).to(state)
    centred = y - y.mean(-1, keepdim=True)
    n = norm_weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm_eps) + norm_bias
    response = torch.linalg.vector_norm(n, dim=(1, 2), keepdim=True)
    share = response / (response.mean(-1, keepdim=True) + eps)
    y = bias + n * (1 + weight * share)
    if projection is not None:
        y = y @ projection.to(state).T
    return y.to(dtype or x.dtype).contiguous().permute(0, 3, 1, 2)
