"""Depthwise convolution, GELU and the linear layer behind them: GroupMamba's MLP from its hidden map on."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["conv_gelu_linear", "conv_gelu_linear_add_norm"]

_OP = "conv_gelu_linear"


def _infer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    stream: Tensor | None,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    with_sum: bool,
) -> tuple[Tensor, Tensor]:
    check_ndim(_OP, "x", x, (4,), "(B, H, W, C)")
    channels = x.shape[3]
    if channels == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected (B, H, W, C) with C > 0")
    layers = (weight, bias, out_weight, out_bias)
    return infer_from_hidden(_OP, "C", channels, x, *layers, stream, branch, norm_weight, norm_bias, dtype, with_sum)


def infer_from_hidden(
    op: str,
    letter: str,
    features: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    stream: Tensor | None,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype | None,
    with_sum: bool,
) -> tuple[Tensor, Tensor]:
    """Checks everything behind a hidden map of so many features, which `op` calls by a letter, and what is returned."""
    check_shape(op, "weight", weight, (features, 1, 3, 3), f"({letter}, 1, 3, 3)")
    check_shape(op, "bias", bias, (features,), f"({letter},)")
    if out_weight.dim() != 2 or out_weight.shape[1] != features:
        shape = tuple(out_weight.shape)
        raise ValueError(f"{op}: out_weight has shape {shape}, expected (D, {letter}) with {letter} = {features}")
    out = out_weight.shape[0]
    check_shape(op, "out_bias", out_bias, (out,), "(D,)")
    for name, tensor in dict(stream=stream, branch=branch).items():
        if tensor is not None:
            check_shape(op, name, tensor, (*x.shape[:3], out), "(B, H, W, D)")
    for name, tensor in dict(norm_weight=norm_weight, norm_bias=norm_bias).items():
        if tensor is not None:
            check_shape(op, name, tensor, (out,), "(D,)")
    check_float(op, x=x, weight=weight, bias=bias, out_weight=out_weight, out_bias=out_bias)
    check_float(op, stream=stream, branch=branch, norm_weight=norm_weight, norm_bias=norm_bias)
    check_result_dtype(op, dtype)
    return empty_results(x, out, stream, branch, dtype, with_sum)


def empty_results(
    x: Tensor, out: int, stream: Tensor | None, branch: Tensor | None, dtype: torch.dtype | None, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """What is returned for `out` columns: the layers' result or the norm, and the sum, which may be empty."""
    shape = (*x.shape[:3], out)
    if stream is None:
        return x.new_empty(shape), x.new_empty(0)
    total = torch.promote_types(stream.dtype, x.dtype)
    if branch is not None:
        total = torch.promote_types(total, branch.dtype)
    return x.new_empty(shape, dtype=dtype or total), x.new_empty(shape if with_sum else 0, dtype=total)


def count_flops(x, weight, bias, out_weight, out_bias, stream, branch, *others) -> int:
    # As in `add_layer_norm`, behind which is one more addition for a branch.
    per_entry = 0 if stream is None else 8 + (branch is not None)
    return x[0] * x[1] * x[2] * (2 * weight.numel() + 2 * out_weight.numel() + per_entry * out_weight[0])


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor bias, Tensor out_weight, Tensor out_bias, Tensor? stream, Tensor? branch,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType? dtype, bool with_sum) -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=count_flops,
    exact_strides=False,
    # Tensor cores multiply.
    kernel_dtypes=(torch.bfloat16, torch.float16),
)


def conv_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    r"""A depthwise 3x3 convolution, GELU and a linear layer, for inference without the map between them in memory.

        s[b, h, w, c] = bias[c] + sum_ij weight[c, 0, i, j] x[b, h + i - 1, w + j - 1, c]
        y             = gelu(s) out_weight^T + out_bias

    Sums are float32 (float64 for float64 x); the activated channels and the linear layer's weight are rounded to the
    dtype of x. Every tensor argument is differentiable, by PyTorch's own operators.

    Args:
        x: Map, (B, H, W, C).
        weight: Kernels, (C, 1, 3, 3).
        bias: Their bias, (C,).
        out_weight: Weight of the linear layer, (D, C).
        out_bias: Its bias, (D,).

    Returns:
        Contiguous (B, H, W, D) in the dtype of x.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        y, _ = torch.ops.vla.conv_gelu_linear(
            x, weight, bias, out_weight, out_bias, None, None, None, None, 0.0, None, False
        )
        return y
    else:
        return operator(x, weight, bias, out_weight, out_bias, None, None, None, None, 0.0, None, False)[0]


def conv_gelu_linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    stream: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    with_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """`conv_gelu_linear`, a residual connection and the layer norm that follows it, for inference in one pass.

    Sums are float32 (float64 for float64 x), and so is what is added to the stream; the norm is that of
    `vla.ops.add_layer_norm`. Every tensor argument is differentiable, by PyTorch's own operators.

    Args:
        x: Map, (B, H, W, C).
        weight: Kernels, (C, 1, 3, 3).
        bias: Their bias, (C,).
        out_weight: Weight of the linear layer, (D, C).
        out_bias: Its bias, (D,).
        stream: What the linear layer's result is added to, (B, H, W, D).
        norm_weight: Scale per channel of the norm, (D,).
        norm_bias: Shift per channel, (D,).
        branch: One more summand, (B, H, W, D).
        eps: Added to the variance.
        dtype: dtype of the norm; None for that of the sum.
        with_sum: Return the sum; without it there is less to write.

    Returns:
        The sum in the dtype that PyTorch gives it, and its norm, both contiguous (B, H, W, D). Without `with_sum` the
        first is empty, (0,).

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        y, total = torch.ops.vla.conv_gelu_linear(
            x, weight, bias, out_weight, out_bias, stream, branch, norm_weight, norm_bias, eps, dtype, with_sum
        )
    else:
        y, total = operator(
            x, weight, bias, out_weight, out_bias, stream, branch, norm_weight, norm_bias, eps, dtype, with_sum
        )
    return total, y
