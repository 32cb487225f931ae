"""Layer norm over channels, with the addition before it and the gate after it: https://arxiv.org/abs/1607.06450."""

from functools import reduce

import torch
from torch import Tensor

from .._checks import check_float, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["add_layer_norm", "layer_norm"]

_OP = "layer_norm"


def _check(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
    columns: int,
    factor: Tensor | None,
    second: Tensor | None,
) -> None:
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x has shape (), expected (..., C)")
    channels = x.shape[-1]
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{_OP}: groups is {groups}, expected a divisor of the {channels} channels")
    for name, tensor, shape, pattern in (
        ("branch", branch, x.shape, "that of x"),
        ("second", second, x.shape, "that of x"),
        ("weight", weight, (channels,), "(C,)"),
        ("bias", bias, (channels,), "(C,)"),
        ("gate", gate, x.shape, "that of x"),
    ):
        if tensor is not None and tensor.shape != shape:
            check_shape(_OP, name, tensor, shape, pattern)
    if columns < 0:
        raise ValueError(f"{_OP}: columns is {columns}, expected none or more")
    if factor is not None and (factor.dim() != 1 or branch is None or not _divides(len(factor), x)):
        raise ValueError(
            f"{_OP}: factor has shape {tuple(factor.shape)}, expected (P,) for a branch, with P a divisor of the tokens"
        )
    check_float(_OP, x=x, branch=branch, weight=weight, bias=bias, gate=gate, factor=factor, second=second)
    check_result_dtype(_OP, dtype)


def _divides(parts: int, x: Tensor) -> bool:
    return x.shape[:-1].numel() % parts == 0 if parts > 0 else x.shape[:-1].numel() == 0


def _infer(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
    columns: int,
    factor: Tensor | None,
    second: Tensor | None,
    with_sum: bool,
) -> tuple[Tensor, Tensor]:
    _check(x, branch, weight, bias, gate, groups, eps, dtype, columns, factor, second)
    return empty_results(x, branch, dtype, columns, second, with_sum)


def sum_dtype(*summands: Tensor | None) -> torch.dtype:
    """The dtype that PyTorch gives a sum."""
    return reduce(torch.promote_types, (x.dtype for x in summands if x is not None))


def empty_results(
    x: Tensor, branch: Tensor | None, dtype: torch.dtype | None, columns: int, second: Tensor | None, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """The norm, and the sum, which is empty where there is none or nobody wants it."""
    shape, total = (*x.shape[:-1], x.shape[-1] + columns), sum_dtype(x, branch, second)
    size = x.shape if branch is not None and with_sum else 0
    return x.new_empty(shape, dtype=dtype or total), x.new_empty(size, dtype=total)


def _flops(x, branch, weight, bias, gate, groups, eps, dtype, columns, factor, second, with_sum) -> int:
    # Two sums, a difference and a product, and one operation for each of the optional arguments; a SiLU counts as four.
    optional = (branch, second, weight, bias, factor)
    per_entry = 5 + sum(size is not None for size in optional) + (0 if gate is None else 5)
    return per_entry * x.numel()


operator = Operator(
    _OP,
    "(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, Tensor? gate, int groups, float eps, ScalarType? dtype,"
    " int columns, Tensor? factor, Tensor? second, bool with_sum) -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    without_gradient=("factor",),
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    columns: int = 0,
) -> Tensor:
    r"""Layer norm over the last dimension, in one pass over memory.

        n = (x - mean(x)) / sqrt(var(x) + eps)
        y = (n * weight + bias) * silu(gate)                (each only if given)

    Computed in float32 (float64 for float64 inputs) whatever the inputs are. Every tensor argument is differentiable.

    Args:
        x: Tokens or a map with its channels last, (..., C); fastest where these are next to each other in memory.
        weight: Scale per channel, (C,).
        bias: Shift per channel, (C,).
        gate: Multiplies the result with its SiLU, (..., C).
        groups: Normalise every one of so many groups of C / groups channels by itself.
        eps: Added to the variance.
        dtype: dtype of the result, under autocast that of the layer which follows; None for that of `x`.
        columns: Columns behind the channels of the result: ones in the first and zeros in the others. With them rows
            of any number of channels start at addresses that tensor cores like, and a linear layer's bias is a column
            of its weight.

    Returns:
        Contiguous (..., C + columns).

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        y, _ = torch.ops.vla.layer_norm(x, None, weight, bias, gate, groups, eps, dtype, columns, None, None, False)
        return y
    else:
        return operator(x, None, weight, bias, gate, groups, eps, dtype, columns, None, None, False)[0]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    columns: int = 0,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """A residual connection and the norm that follows it, in one pass over memory.

    Args:
        x: Residual stream, (..., C).
        branch: What is added to it, (..., C).
        weight: See `layer_norm`, like all that follow.
        bias: Shift per channel.
        gate: Multiplies the result with its SiLU.
        groups: Groups of channels.
        eps: Added to the variance.
        dtype: dtype of the norm; None for that of the sum.
        columns: Columns behind the norm's channels.
        factor: Factors of the branch, (P,), the first for the first of P equally many tokens and so on: those of a
            batch's pictures under stochastic depth. No gradient.
        second: One more summand, (..., C): that of the residual connection before, if only its norm was written.
        with_sum: Return the sum; without it there is less to write.

    Returns:
        `x + factor * branch + second` in the dtype that PyTorch gives the sum, to which it is rounded once, (..., C),
        and its norm, (..., C + columns), both contiguous. Without `with_sum` the first is empty, (0,).

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        y, total = torch.ops.vla.layer_norm(
            x, branch, weight, bias, gate, groups, eps, dtype, columns, factor, second, with_sum
        )
        return total, y
    else:
        y, total = operator(x, branch, weight, bias, gate, groups, eps, dtype, columns, factor, second, with_sum)
        return total, y
