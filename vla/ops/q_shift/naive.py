"""Q-Shift as it is defined: the map padded with zeros, read from four sides."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, shift: int, gamma: float, head_dim: int | None) -> Tensor:
    channels, height, width = x.shape[1:]
    head_dim = channels if head_dim is None else head_dim
    padded = F.pad(x, (shift, shift, shift, shift))
    rows, columns = slice(shift, shift + height), slice(shift, shift + width)
    neighbours = (
        padded[..., rows, :width],
        padded[..., rows, 2 * shift :],
        padded[..., :height, columns],
        padded[..., 2 * shift :, columns],
    )
    borders = [int(head_dim * gamma * i) for i in range(5)]
    out = x
    for neighbour, first, last in zip(neighbours, borders[:-1], borders[1:], strict=True):
        channel = torch.arange(channels, device=x.device) % head_dim
        out = torch.where(((first <= channel) & (channel < last))[:, None, None], neighbour, out)
    return torch.empty_like(x).copy_(out) if not out.requires_grad else out
