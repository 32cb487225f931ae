"""A linear layer for each group of channels, as the ends of GroupMamba's scan, https://arxiv.org/abs/2407.13772."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["grouped_linear", "grouped_linear_pair", "grouped_linear_pair_mean"]

_OP = "grouped_linear"
# Channels that a program takes, several groups of them where they fit, so that its loads are wide. Up to so many in a
# group there are kernels for gradients too.
TOGETHER = 64


def _infer(x: Tensor, weight: Tensor, weight2: Tensor | None, with_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_ndim(_OP, "x", x, (4,), "(B, H, W, K * I)")
    check_ndim(_OP, "weight", weight, (3,), "(K, O, I)")
    groups, outputs, width = weight.shape
    if x.shape[3] != groups * width:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected {groups * width} channels, {groups} groups")
    if weight2 is not None:
        check_shape(_OP, "weight2", weight2, weight.shape, "that of weight")
    check_float(_OP, x=x, weight=weight, weight2=weight2)
    size = (*x.shape[:3], groups * outputs)
    return (
        x.new_empty(size),
        x.new_empty(0 if weight2 is None else size),
        x.new_empty((x.shape[0], x.shape[3]) if with_mean else 0),
    )


def _flops(x, weight, weight2, with_mean) -> int:
    pixels = x[0] * x[1] * x[2]
    return 2 * pixels * weight.numel() * (1 if weight2 is None else 2) + (pixels * x[3] if with_mean else 0)


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? weight2, bool with_mean) -> (Tensor, Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    r"""Every group of channels through its own matrix.

        y[..., k, o] = sum_i weight[k, o, i] x[..., k, i]

    Factors are rounded to the dtype of `x`, sums are float32 (float64 for float64 inputs). Every tensor argument is
    differentiable.

    Args:
        x: Map, (B, H, W, K * I), fastest where its channels are next to each other in memory.
        weight: Matrices of the groups, (K, O, I).

    Returns:
        Contiguous (B, H, W, K * O).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.grouped_linear(x, weight, None, False)[0]
    else:
        return operator(x, weight, None, False)[0]


def grouped_linear_pair(x: Tensor, weight: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """`grouped_linear` with two weights, in one pass over x forward and backward.

    Args:
        x: Map, (B, H, W, K * I), fastest where its channels are next to each other in memory.
        weight: Matrices of the groups, (K, O, I).
        weight2: More of them, (K, O, I).

    Returns:
        The results of both, contiguous (B, H, W, K * O).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.grouped_linear(x, weight, weight2, False)[:2]
    else:
        return operator(x, weight, weight2, False)[:2]


def grouped_linear_pair_mean(x: Tensor, weight: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`grouped_linear_pair`, which reads all of x, and the mean of each channel over a picture's pixels.

    Means are taken in float32 (float64 for float64 inputs). Gradients are by PyTorch's own operators.

    Args:
        x: Map, (B, H, W, K * I), fastest where its channels are next to each other in memory.
        weight: Matrices of the groups, (K, O, I).
        weight2: More of them, (K, O, I).

    Returns:
        The results of both, contiguous (B, H, W, K * O), and the means, (B, K * I).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.grouped_linear(x, weight, weight2, True)
    else:
        return operator(x, weight, weight2, True)
