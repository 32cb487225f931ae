"""The same by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..depthwise_conv2d import _torch
from ..layer_norm import _torch as layer_norm


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
    hidden = _torch.forward(x.permute(0, 3, 1, 2), weight, bias, "gelu", None).permute(0, 2, 3, 1)
    y = F.linear(hidden, out_weight.to(x.dtype), out_bias.to(x.dtype)).contiguous()
    if stream is None:
        return y, x[..., :0].flatten().clone()
    branch, second = (y, None) if branch is None else (branch, y)
    options = dict(second=second, with_sum=with_sum)
    return layer_norm.forward(stream, branch, norm_weight, norm_bias, None, 1, eps, dtype, **options)
