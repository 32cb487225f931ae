"""SSD in chunks of matrix products (Mamba-2, sec. 6); its backward is autograd's over the same products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype

_CHUNK = 64


def _segment_sums(x: Tensor) -> Tensor:
    """(..., T) -> (..., T, T): sum of x over (s, t] for s <= t, -inf above the diagonal.

    Summed directly rather than as a difference of cumulative sums, which loses a weak decay next to a strong one.
    """
    length = x.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    sums = x.unsqueeze(-1).expand(*x.shape, length).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(~(below | torch.eye(length, dtype=torch.bool, device=x.device)), float("-inf"))


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
    groups, states = B.shape[2:]
    dtype = state_dtype(x)
    x_, dt = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)

    # A padded step has dt = 0: it neither decays the state nor adds to it.
    chunk = min(_CHUNK, length)
    padding = -length % chunk
    per_group = heads // groups
    xs, Bs, Cs, dts = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)).unflatten(1, (-1, chunk))
        for t in (x_, B.to(dtype), C.to(dtype), dt)
    )
    xs = (xs * dts[..., None]).unflatten(3, (groups, per_group))  # (B, c, T, G, R, P)
    log_decay = (dts * A.to(dtype)).permute(0, 3, 1, 2).unflatten(1, (groups, per_group))  # (B, G, R, c, T)

    # Inside a chunk: attention-like products masked by the decay between two steps.
    decay = _segment_sums(log_decay).exp()
    scores = torch.einsum("bctgn,bcsgn->bgcts", Cs, Bs)
    y = torch.einsum("bgrcts,bcsgrp->bctgrp", scores.unsqueeze(2) * decay, xs)

    # From chunk to chunk: each chunk's own contribution to the state, then the recurrence over chunks.
    to_end = decay[..., -1, :]
    added = torch.einsum("bcsgn,bgrcs,bcsgrp->cbgrpn", Bs, to_end, xs)
    from_start = log_decay.cumsum(-1).exp()  # (B, G, R, c, T)
    across = from_start[..., -1].permute(3, 0, 1, 2)[..., None, None]
    if initial_state is None:
        state = x_.new_zeros(batch, groups, per_group, width, states)
    else:
        state = initial_state.to(dtype).unflatten(1, (groups, per_group))
    entering = []
    for added_here, decay_here in zip(added.unbind(0), across.unbind(0), strict=True):
        entering.append(state)
        state = decay_here * state + added_here
    y = y + torch.einsum("bctgn,cbgrpn,bgrct->bctgrp", Cs, torch.stack(entering), from_start)

    y = y.flatten(1, 2)[:, :length].flatten(2, 3)
    if D is not None:
        D = D.to(dtype)
        y = y + (D if D.dim() == 2 else D[:, None]) * x_
    return y.to(x.dtype).contiguous(), state.flatten(1, 2).contiguous()
