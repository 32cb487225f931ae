"""The depthwise convolution in front of every scan, with the activation that follows it."""

from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import GELU, get_act_layer
from torch import Tensor, nn

from ..ops import depthwise_conv2d
from .norm import autocast_dtype

# Activations that `vla.ops.depthwise_conv2d` applies itself.
FUSED = {nn.SiLU: "silu", nn.GELU: "gelu", GELU: "gelu"}


@torch.fx.wrap
def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], act: Optional[str]) -> Tensor:  # noqa: UP045
    """`vla.ops.depthwise_conv2d`, under autocast in its dtype.

    On a CPU PyTorch's own operators, for which autograd keeps what goes into the activation: that costs memory, but no
    second convolution in the backward. So do kernels of even size.
    """
    odd = weight.shape[2] % 2 == 1 and weight.shape[3] % 2 == 1
    if odd and not x.is_cpu:
        return depthwise_conv2d(x, weight, bias, act, autocast_dtype(x))
    y = F.conv2d(x, weight, bias, padding="same", groups=weight.shape[0])
    if act is None:
        return y
    return F.silu(y) if act == "silu" else F.gelu(y)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of stride 1 with zeros around the map, and an activation: (B, C, H, W) to the same.

    Args:
        dim: Channels C.
        kernel_size: Side of the kernels, or height and width.
        bias: Add a bias.
        act_layer: Class or timm name of the activation, None for none. SiLU and GELU take no pass of their own.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        act_layer: str | type[nn.Module] | None = None,
    ):
        super().__init__(dim, dim, kernel_size, padding="same", groups=dim, bias=bias)
        act_layer = get_act_layer(act_layer)
        self.fused_act = FUSED.get(act_layer)
        self.act = nn.Identity() if act_layer is None or self.fused_act is not None else act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(convolve(x, self.weight, self.bias, self.fused_act))

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act={self.fused_act}" if self.fused_act is not None else "")
