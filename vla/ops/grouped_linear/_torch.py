"""The linear layer of each group as a grouped convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(x: Tensor, weight: Tensor, weight2: Tensor | None) -> Tensor:
    weights = [w.flatten(0, 1)[:, :, None, None].to(x.dtype) for w in (weight, weight2) if w is not None]
    outputs = [F.conv2d(x.permute(0, 3, 1, 2), w, groups=weight.shape[0]).permute(0, 2, 3, 1) for w in weights]
    return torch.cat(outputs, dim=-1)


def backward(grads: list[Tensor], x: Tensor, weight: Tensor, weight2: Tensor | None) -> list[Tensor | None]:
    state, (groups, _, width) = state_dtype(x), weight.shape
    weights = [w for w in (weight, weight2) if w is not None]
    rows = x.to(state).unflatten(-1, (groups, width))
    gradients = [g.unflatten(-1, (groups, -1)) for g in grads[0].to(state).chunk(len(weights), dim=-1)]
    gx = sum(torch.einsum("bhwko,koi->bhwki", g, w.to(state)) for g, w in zip(gradients, weights, strict=True))
    g_weights = [torch.einsum("bhwko,bhwki->koi", g, rows).to(weight.dtype) for g in gradients]
    return [gx.flatten(-2).to(x.dtype), *g_weights, *[None] * (2 - len(weights))]
