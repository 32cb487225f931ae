"""The end of GroupMamba's mixer as it is defined."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..layer_norm import naive as layer_norm


def _normalize(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps)


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
    state, groups = state_dtype(y, z, n), out_proj.shape[0]
    result_dtype = dtype or y.dtype
    y, z, n, gate, out_proj, proj = (t.to(state) for t in (y, z, n, gate, out_proj, proj))
    y = _normalize(y.unflatten(-1, (groups, -1)), out_eps).flatten(-2)
    y = (y * out_norm_weight.to(state) + out_norm_bias.to(state)) * z / (1 + torch.exp(-z))
    y = torch.einsum("bhwki,koi->bhwko", y.unflatten(-1, (groups, -1)), out_proj).flatten(-2)
    a = y * n * gate[:, None, None]
    a = _normalize(a, eps) * norm_weight.to(state) + norm_bias.to(state)
    out = (a @ proj.T + proj_bias.to(state)).to(result_dtype)
    if stream is None:
        return out, out.flatten()[:0].clone()
    vectors = (stream_norm_weight, stream_norm_bias)
    norm, _ = layer_norm.forward(stream, out, *vectors, None, 1, stream_eps, norm_dtype, with_sum=False)
    return out, norm
