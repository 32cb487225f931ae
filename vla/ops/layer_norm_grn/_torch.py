"""LayerNorm and global response normalisation in PyTorch: the response as one weight per picture and channel."""

import torch
from torch import Tensor

from .._checks import state_dtype


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    projection: Tensor | None,
) -> Tensor:
    state = state_dtype(x)
    norm_weight, norm_bias, weight, bias = (t.to(state) for t in (norm_weight, norm_bias, weight, bias))
    y = x.permute(0, 2, 3, 1).to(state)
    n = torch.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, norm_eps)
    response = torch.linalg.vector_norm(n, dim=(1, 2), keepdim=True)
    share = response / (response.mean(-1, keepdim=True) + eps)
    y = torch.addcmul(bias, n, 1 + weight * share)
    if projection is not None:
        y = y @ projection.to(state).T
    return y.to(dtype or x.dtype).contiguous().permute(0, 3, 1, 2)


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    projection: Tensor | None,
) -> list[Tensor | None]:
    state = state_dtype(x)
    norm_weight, norm_bias, weight, bias = (t.to(state) for t in (norm_weight, norm_bias, weight, bias))
    rows, g = (t.permute(0, 2, 3, 1).to(state) for t in (x, grads[0]))
    shape = list(rows.shape[-1:])
    n, mean, scale = torch.native_layer_norm(rows, shape, norm_weight, norm_bias, norm_eps)
    response = torch.linalg.vector_norm(n, dim=(1, 2), keepdim=True)
    total = response.mean(-1, keepdim=True) + eps
    share = response / total
    g_projection = None
    if projection is not None:
        y = torch.addcmul(bias, n, 1 + weight * share)
        g_projection = torch.einsum("bhwf,bhwc->fc", g, y)
        g = g @ projection.to(state)
    g_scale = (g * n).sum((1, 2), keepdim=True)
    g_share = g_scale * weight
    g_response = (g_share - (g_share * share).mean(-1, keepdim=True)) / total
    g_n = g * (1 + weight * share) + n * (g_response / response).masked_fill(response == 0, 0)
    gx, g_norm_weight, g_norm_bias = torch.ops.aten.native_layer_norm_backward(
        g_n, rows, shape, mean, scale, norm_weight, norm_bias, [True, True, True]
    )
    g_parameters = [g_norm_weight, g_norm_bias, (g_scale * share).sum((0, 1, 2)), g.sum((0, 1, 2))]
    return [gx.permute(0, 3, 1, 2), *g_parameters, g_projection]
