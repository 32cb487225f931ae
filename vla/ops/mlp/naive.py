"""The definition of the MLP, as close to the equation as code can be."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype


def activation(act: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name."""
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda s: F.gelu(s, approximate="tanh"),
        "relu": torch.relu,
        "silu": F.silu,
        "squared_relu": lambda s: torch.relu(s).square(),
    }[act]


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str
) -> Tensor:
    state = state_dtype(x)
    hidden = x.to(state) @ weight1.to(state).T
    if bias1 is not None:
        hidden = hidden + bias1
    y = activation(act)(hidden) @ weight2.to(state).T
    if bias2 is not None:
        y = y + bias2
    return y.to(x.dtype)
