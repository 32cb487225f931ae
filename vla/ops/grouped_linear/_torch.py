"""The linear layer of each group as a grouped convolution."""

import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    kernels = weight.flatten(0, 1)[:, :, None, None].to(x.dtype)
    return F.conv2d(x.permute(0, 3, 1, 2), kernels, groups=weight.shape[0]).permute(0, 2, 3, 1).contiguous()


def forward(x: Tensor, weight: Tensor, weight2: Tensor | None) -> tuple[Tensor, Tensor]:
    # An empty second result is one of x, as autograd takes no other.
    return product(x, weight), x[:0].flatten().clone() if weight2 is None else product(x, weight2)
