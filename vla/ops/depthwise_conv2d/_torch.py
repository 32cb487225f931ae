"""Depthwise convolution: PyTorch's own, then the activation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None, zeros: int = 0
) -> Tensor:
    dtype = dtype or x.dtype
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x.to(dtype), weight.to(dtype), bias, padding=padding, groups=weight.shape[0])
    if act == "silu":
        y = F.silu(y)
    elif act == "gelu":
        y = F.gelu(y)
    return F.pad(y.permute(0, 2, 3, 1), (0, zeros)).contiguous().permute(0, 3, 1, 2)
