"""The definition, as close to the equations as code can be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def norm(s: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = s.mean(-1, keepdim=True)
    variance = (s - mean).square().mean(-1, keepdim=True)
    return (s - mean) / torch.sqrt(variance + eps) * weight + bias


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
    batch, channels, height, width = x.shape
    out, _, rows, columns = weight.shape
    windows = F.unfold(x.to(state), (rows, columns), padding=padding, stride=stride)
    s = windows.transpose(1, 2) @ weight.to(state).flatten(1).T
    if bias is not None:
        s = s + bias
    y = norm(s, norm_weight, norm_bias, eps)
    if act is not None:
        y = F.gelu(y)
    y = y.to(dtype or x.dtype)
    n = y[:0].clone() if next_weight is None else norm(y.to(state), next_weight, next_bias, next_eps)
    size = (-1, (width + 2 * padding - columns) // stride + 1)
    y, n = (t.unflatten(1, size).contiguous().permute(0, 3, 1, 2) for t in (y, n.to(next_dtype or y.dtype)))
    return y, n
