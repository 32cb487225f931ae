"""Depthwise convolution as it is defined: a sum of shifted maps, then the activation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, dtype: torch.dtype | None, zeros: int = 0
) -> Tensor:
    state = state_dtype(x, weight, bias)
    height, width = x.shape[2:]
    rows, columns = weight.shape[2:]
    padded = F.pad(x.to(state), (columns // 2, columns // 2, rows // 2, rows // 2))
    y = torch.zeros_like(x, dtype=state)
    for i in range(rows):
        for j in range(columns):
            y = y + padded[:, :, i : i + height, j : j + width] * weight[:, 0, i, j, None, None].to(state)
    if bias is not None:
        y = y + bias[:, None, None].to(state)
    if act == "silu":
        y = y / (1 + torch.exp(-y))
    elif act == "gelu":
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    return F.pad(y.to(dtype or x.dtype).permute(0, 2, 3, 1), (0, zeros)).contiguous().permute(0, 3, 1, 2)
