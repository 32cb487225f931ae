"""The same by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    stride: int,
    padding: int,
    eps: float,
    next_eps: float,
    act: str | None,
    dtype: torch.dtype | None,
    next_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    state = state_dtype(x, weight, bias, norm_weight, norm_bias)
    dtype = dtype or x.dtype
    inner = state if state == torch.float64 else dtype
    with torch.autocast(x.device.type, enabled=False):
        s = F.conv2d(x.to(inner), weight.to(inner), None, stride, padding).permute(0, 2, 3, 1).to(state)
        s = s if bias is None else s + bias
        y = F.layer_norm(s, s.shape[-1:], norm_weight.to(state), norm_bias.to(state), eps)
        y = (y if act is None else F.gelu(y)).to(dtype).contiguous()
        if next_weight is None:
            n = y[:0].clone()
        else:
            n = F.layer_norm(y.to(state), y.shape[-1:], next_weight.to(state), next_bias.to(state), next_eps)
    return y.permute(0, 3, 1, 2), n.to(next_dtype or dtype).permute(0, 3, 1, 2)
