"""Bidirectional WKV6 as it is defined: a matrix state per head, one token after the other, from both sides."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    dtype = state_dtype(r, k, v, w, u)
    heads, size = u.shape
    # exp(w) stays finite; beyond this bound the decay is 0 either way.
    decay = torch.exp(-torch.exp(w.to(dtype).clamp(max=80))).unflatten(2, (heads, size))
    r, k, values = (x.to(dtype).unflatten(2, (heads, size)) for x in (r, k, v))
    length = r.shape[1]

    outputs = [(r[:, t] * u.to(dtype) * k[:, t]).sum(-1, keepdim=True) * values[:, t] for t in range(length)]
    for order in (range(length), range(length - 1, -1, -1)):
        state = r.new_zeros(r.shape[0], heads, size, size)
        for t in order:
            outputs[t] = outputs[t] + torch.einsum("bhn,bhnm->bhm", r[:, t], state)
            state = decay[:, t].unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * values[:, t].unsqueeze(-2)
    return torch.stack(outputs, dim=1).flatten(2).to(v.dtype)
