"""The norm at the end of GroupMamba's mixer with the modulation before it, https://arxiv.org/abs/2407.13772."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["modulated_layer_norm"]

_OP = "modulated_layer_norm"


def _infer(
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    check_ndim(_OP, "a", a, (4,), "(B, H, W, C)")
    batch, channels = a.shape[0], a.shape[3]
    check_shape(_OP, "n", n, a.shape, "that of a")
    check_shape(_OP, "gate", gate, (batch, channels), "(B, C)")
    check_shape(_OP, "weight", weight, (channels,), "(C,)")
    check_shape(_OP, "bias", bias, (channels,), "(C,)")
    check_float(_OP, a=a, n=n, gate=gate, weight=weight, bias=bias)
    check_result_dtype(_OP, dtype)
    if columns < 0:
        raise ValueError(f"{_OP}: columns is {columns}, expected none or more")
    return a.new_empty((*a.shape[:3], channels + columns), dtype=dtype)


def _flops(a, n, gate, weight, bias, columns, eps, dtype) -> int:
    # Two factors, and the norm as in `layer_norm`.
    return 10 * a.numel()


operator = Operator(
    _OP,
    "(Tensor a, Tensor n, Tensor gate, Tensor weight, Tensor bias, int columns, float eps, ScalarType? dtype) "
    "-> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
)


def modulated_layer_norm(
    a: Tensor,
    n: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    columns: int = 0,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Layer norm over the channels of a map that is a product of three, in one pass over memory each way.

        y = layer_norm(a * n * gate) * weight + bias

    Computed in float32 (float64 for float64 inputs). Every tensor argument is differentiable; of the forward only the
    arguments are kept.

    Args:
        a: Map, (B, H, W, C).
        n: What it is multiplied with, (B, H, W, C).
        gate: Factor of every channel, (B, C).
        weight: Scale of the norm, (C,).
        bias: Shift of the norm, (C,).
        columns: Columns behind the channels of the result: ones in the first and zeros in the others. With them rows
            of any number of channels start at addresses that tensor cores like, and a linear layer's bias is a column
            of its weight.
        eps: Added to the variance.
        dtype: dtype of the result; None for that of `a`.

    Returns:
        Contiguous (B, H, W, C + columns).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.modulated_layer_norm(a, n, gate, weight, bias, columns, eps, dtype)
    else:
        return operator(a, n, gate, weight, bias, columns, eps, dtype)
