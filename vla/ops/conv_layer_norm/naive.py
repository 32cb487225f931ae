"""The definition, as close to the equations as code can be."""

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
    stride: int,
    padding: int,
    eps: float,
    act: str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    state = state_dtype(x, weight, bias, norm_weight, norm_bias)
    batch, channels, height, width = x.shape
    out, _, rows, columns = weight.shape
    windows = F.unfold(x.to(state), (rows, columns), padding=padding, stride=stride)
    s = windows.transpose(1, 2) @ weight.to(state).flatten(1).T
    if bias is not None:
        s = s + bias
    mean = s.mean(-1, keepdim=True)
    variance = (s - mean).square().mean(-1, keepdim=True)
    y = (s - mean) / torch.sqrt(variance + eps) * norm_weight + norm_bias
    if act is not None:
        y = F.gelu(y)
    y = y.to(dtype or x.dtype).unflatten(1, (-1, (width + 2 * padding - columns) // stride + 1))
    return y.contiguous().permute(0, 3, 1, 2)
