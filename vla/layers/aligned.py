"""Layers whose channels are no multiple of what tensor cores load at once, in 16 bits at a GPU's full speed."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._maps import with_columns
from .norm import LARGE, as_rows, autocast_dtype, takes_narrow_kernels

# Numbers of 16 bits in the 16 bytes that the rows of a matrix have to be multiples of for tensor cores' full speed.
ALIGNMENT = 8


def is_worth_launches(x: Tensor) -> bool:
    """Whether small operations around a map of this size make a GPU faster; a compiler makes few launches of them."""
    return x.is_cuda and (torch.compiler.is_compiling() or x.numel() >= LARGE)


def aligned_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """`F.conv2d`, under autocast in its dtype, of channels with zeros behind them, so that pixels start at 16 bytes.

    cuDNN would add those by kernels of its own, before the convolution and behind it.
    """
    out_channels, in_channels = weight.shape[:2]
    rows = -out_channels % ALIGNMENT
    # PyTorch's own kernels would take as long as cuDNN's.
    columns = -in_channels % ALIGNMENT if torch.compiler.is_compiling() else 0
    dtype = autocast_dtype(x) or x.dtype
    batch, _, height, width = x.shape
    # As rows, and concatenated, not padded: a compiler then lets the norm that computes x write what is convolved.
    x = with_columns(as_rows(x.permute(0, 2, 3, 1)).to(dtype), columns)
    x = x.view(batch, height, width, in_channels + columns).permute(0, 3, 1, 2)
    weight = F.pad(weight.to(dtype), (0, 0, 0, 0, 0, columns, 0, rows))
    bias = None if bias is None else F.pad(bias.to(dtype), (0, rows))
    return F.conv2d(x, weight, bias, stride, padding)[:, :out_channels]


def _wants_zeros(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is the faster with zeros behind channels."""
    if not is_worth_launches(x) or not takes_narrow_kernels(x):
        return False
    out_channels, in_channels = weight.shape[:2]
    return out_channels % ALIGNMENT > 0 or (torch.compiler.is_compiling() and in_channels % ALIGNMENT > 0)


@torch.fx.wrap
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """`F.conv2d`, in 16 bits at a GPU's full speed for any numbers of channels."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
        if _wants_zeros(x, weight):
            return aligned_conv2d(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` without groups, dilation or other paddings than zeros, at a GPU's full speed for any channels."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)
