"""The same by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(x: Tensor, bias: Tensor) -> Tensor:
    state = state_dtype(x, bias)
    return F.gelu(x.to(state) + bias.to(state)).to(x.dtype).contiguous()


def backward(grads: list[Tensor], x: Tensor, bias: Tensor) -> list[Tensor]:
    state = state_dtype(x, bias)
    g = torch.ops.aten.gelu_backward(grads[0].to(state), x.to(state) + bias.to(state))
    return [g, g.flatten(0, -2).sum(0) if g.dim() > 1 else g.clone()]
