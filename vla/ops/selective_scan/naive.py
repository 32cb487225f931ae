"""The selective scan as it is defined: one step after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def _projection(x: Tensor, channels: int) -> Tensor:
    """B or C in any accepted form -> (B or 1, D, N, L or 1)."""
    if x.dim() == 2:
        return x[None, :, :, None]
    if x.dim() == 3:
        x = x[:, None]
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    batch, channels, length = u.shape
    dtype = state_dtype(u)
    u_, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B = _projection(B, channels).to(dtype).expand(batch, -1, -1, length)
    C = _projection(C, channels).to(dtype).expand(batch, -1, -1, length)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    h = u_.new_zeros(batch, channels, A.shape[1])
    ys = []
    # Unbound once: a gradient of each single step's indexing would be as large as the whole sequence.
    for u_t, dt, B_t, C_t in zip(*(x.unbind(-1) for x in (u_, delta, B, C)), strict=True):
        dt = dt[..., None]
        h = torch.exp(dt * A) * h + dt * B_t * u_t[..., None]
        ys.append((C_t * h).sum(-1))
    y = torch.stack(ys, dim=-1)

    if D is not None:
        y = y + D.to(dtype)[:, None] * u_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h
