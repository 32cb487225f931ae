"""The linear layer of each group as it is defined."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor, weight: Tensor, weight2: Tensor | None, with_mean: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    state, (groups, _, width) = state_dtype(x), weight.shape
    rows = x.to(state).unflatten(-1, (groups, width))
    weights = [weight] if weight2 is None else [weight, weight2]
    outputs = [torch.einsum("bhwki,koi->bhwko", rows, w.to(state)).flatten(-2).to(x.dtype) for w in weights]
    # Empty results are ones of x, as autograd takes no other.
    second = x[:0].flatten().clone() if weight2 is None else outputs[1]
    mean = x.to(state).mean((1, 2)).to(x.dtype) if with_mean else x[:0].flatten().clone()
    return outputs[0], second, mean
