"""The SSD recurrence as it is defined: one step after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x.shape
    dtype = state_dtype(x)
    x_, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    h = x_.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    ys = []
    # Unbound once: a gradient of each single step's indexing would be as large as the whole sequence.
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x_, dt, B, C)), strict=True):
        decay = torch.exp(dt_t * A)[..., None, None]
        h = decay * h + (dt_t[..., None] * x_t)[..., None] * B_t[..., None, :]
        ys.append((h * C_t[..., None, :]).sum(-1))
    y = torch.stack(ys, dim=1)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.dim() == 2 else D[:, None]) * x_
    return y.to(x.dtype), h.clone()
