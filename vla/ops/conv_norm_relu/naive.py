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
) -> Tensor:
    state = state_dtype(x)
    channels, _, kh, kw = weight.shape
    padded = F.pad(x.to(state), (padding_w, padding_w, padding_h, padding_h))
    windows = padded.unfold(2, kh, 1).unfold(3, kw, 1)  # (B, C, H', W', KH, KW)
    s = torch.einsum("bchwij,dcij->bhwd", windows, weight.to(x.dtype).to(state))
    mean, var, norm_weight, norm_bias = (
        t.to(state).repeat(channels // len(t)) for t in (mean, var, norm_weight, norm_bias)
    )
    y = (s - mean) / torch.sqrt(var + eps) * norm_weight + norm_bias
    return torch.clamp(y, min=0).to(x.dtype).contiguous().permute(0, 3, 1, 2)
