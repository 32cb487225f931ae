"""Squared ReLU as it is defined, and its derivative from its value."""

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    return torch.relu(x).square().contiguous()


def backward(grads: list[Tensor], y: Tensor) -> list[Tensor]:
    return [2 * grads[0] * y.sqrt()]
