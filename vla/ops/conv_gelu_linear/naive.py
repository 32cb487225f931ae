"""The layers as they are defined."""

from torch import Tensor

from .._checks import state_dtype
from ..depthwise_conv2d import naive


def forward(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    state = state_dtype(x)
    hidden = naive.forward(x.permute(0, 3, 1, 2), weight, bias, "gelu", state).permute(0, 2, 3, 1)
    y = hidden @ out_weight.to(x.dtype).to(state).T + out_bias.to(state)
    return y.to(x.dtype)
