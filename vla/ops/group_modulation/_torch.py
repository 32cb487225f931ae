"""The end of GroupMamba's mixer by PyTorch's own norms and products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from ..grouped_linear._torch import product
from ..layer_norm import _torch as layer_norm


def forward(
    y: Tensor,
    z: Tensor,
    n: Tensor,
    gate: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    out_proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    stream: Tensor | None,
    stream_norm_weight: Tensor | None,
    stream_norm_bias: Tensor | None,
    out_eps: float,
    eps: float,
    stream_eps: float,
    dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    state, factor, channels, groups = state_dtype(y, z, n), y.dtype, y.shape[-1], out_proj.shape[0]
    rows = y.to(state).unflatten(-1, (groups, channels // groups))
    rows = F.layer_norm(rows, rows.shape[-1:], eps=out_eps).flatten(-2)
    rows = (rows * out_norm_weight.to(state) + out_norm_bias.to(state)) * F.silu(z.to(state))
    rows = product(rows.to(factor), out_proj)
    a = rows.to(state) * n.to(state) * gate.to(state)[:, None, None]
    a = F.layer_norm(a, (channels,), norm_weight.to(state), norm_bias.to(state), eps)
    out = (F.linear(a.to(factor), proj.to(factor)).to(state) + proj_bias.to(state)).to(dtype or factor)
    if stream is None:
        return out, out.flatten()[:0].clone()
    vectors = (stream_norm_weight, stream_norm_bias)
    norm, _ = layer_norm.forward(stream, out, *vectors, None, 1, stream_eps, norm_dtype, with_sum=False)
    return out, norm
