"""The layers as they are defined."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..depthwise_conv2d import naive
from ..layer_norm import naive as layer_norm


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    stream: Tensor | None,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    with_sum: bool,
) -> tuple[Tensor, Tensor]:
    state = state_dtype(x)
    hidden = naive.forward(x.permute(0, 3, 1, 2), weight, bias, "gelu", state).permute(0, 2, 3, 1)
    y = (hidden @ out_weight.to(x.dtype).to(state).T + out_bias.to(state)).to(x.dtype)
    if stream is None:
        return y, x[..., :0].flatten().clone()
    branch, second = (y, None) if branch is None else (branch, y)
    options = dict(second=second, with_sum=with_sum)
    return layer_norm.forward(stream, branch, norm_weight, norm_bias, None, 1, eps, dtype, **options)
