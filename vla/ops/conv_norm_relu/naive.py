"""The layers as they are defined."""

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
    state, dtype = state_dtype(x), dtype or x.dtype
    channels, _, kh, kw = weight.shape
    x, weight = (t.to(dtype).to(state) for t in (x, weight))
    padded = F.pad(x, (padding_w, padding_w, padding_h, padding_h))
    windows = padded.unfold(2, kh, stride_h).unfold(3, kw, stride_w)  # (B, C, H', W', KH, KW)
    s = torch.einsum("bchwij,dcij->bhwd", windows, weight)
    mean, var, norm_weight, norm_bias = (
        t.to(state).repeat(channels // len(t)) for t in (mean, var, norm_weight, norm_bias)
    )
    y = (s - mean) / torch.sqrt(var + eps) * norm_weight + norm_bias
    return torch.clamp(y, min=0).to(dtype).contiguous().permute(0, 3, 1, 2)
