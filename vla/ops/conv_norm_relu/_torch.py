"""The same by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    padding_h: int,
    padding_w: int,
    eps: float,
    stride_h: int = 1,
    stride_w: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    state = state_dtype(x)
    dtype = dtype or x.dtype
    x, weight = (t.to(dtype).to(state) for t in (x, weight))
    y = F.conv2d(x, weight, stride=(stride_h, stride_w), padding=(padding_h, padding_w))
    mean, var, norm_weight, norm_bias = (
        t.to(state).repeat(weight.shape[0] // t.shape[0]) for t in (mean, var, norm_weight, norm_bias)
    )
    scale = norm_weight * torch.rsqrt(var + eps)
    y = y.permute(0, 2, 3, 1) * scale + (norm_bias - mean * scale)
    return F.relu(y).to(dtype).contiguous().permute(0, 3, 1, 2)
