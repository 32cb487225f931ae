"""Bi-WKV as it is defined: a softmax over all pairs of tokens, per channel."""

import torch
from torch import Tensor

from .._checks import state_dtype
from . import released
from ._per_sequence import backward_per_sequence, forward_per_sequence


@forward_per_sequence
def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None) -> Tensor:
    if official_split is not None:
        return released.forward(w, u, k, v, gate, official_split)
    dtype = state_dtype(w, u, k, v)
    w, u, keys, values = w.to(dtype), u.to(dtype), k.to(dtype)[:, None], v.to(dtype)[:, None]
    position = torch.arange(k.shape[1], device=k.device)
    distance = (position[:, None] - position).abs()[..., None]
    exponent = torch.where(distance == 0, keys + u, keys - (distance - 1) * w)
    y = (exponent.softmax(dim=2) * values).sum(2)
    if gate is not None:
        y = y * gate.to(dtype).sigmoid()
    return y.to(v.dtype)


@backward_per_sequence
def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None
) -> list[Tensor | None]:
    if official_split is not None:
        return released.backward(grads, w, u, k, v, gate, official_split)
    with torch.enable_grad():
        inputs = [x if x is None else x.detach().requires_grad_() for x in (w, u, k, v, gate)]
        found = torch.autograd.grad(forward(*inputs, None), [x for x in inputs if x is not None], grads)
    return list(found) + [None] * (gate is None)
