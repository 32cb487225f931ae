"""The same by PyTorch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_gelu_linear import _torch as conv_gelu_linear


def forward(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
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
    hidden = F.linear(x, in_weight.to(x.dtype), in_bias.to(x.dtype))
    others = (stream, branch, norm_weight, norm_bias, eps, dtype, with_sum)
    return conv_gelu_linear.forward(hidden, weight, bias, out_weight, out_bias, *others)
