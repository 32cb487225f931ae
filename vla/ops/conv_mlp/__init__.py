"""An MLP with a depthwise convolution before its activation: GroupMamba's, without its hidden map in memory."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator
from ..conv_gelu_linear import count_flops, infer_from_hidden

__all__ = ["conv_mlp", "conv_mlp_add_norm"]

_OP = "conv_mlp"


def _infer(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
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
    if in_weight.dim() != 2 or in_weight.shape[1] != channels or len(in_weight) == 0:
        shape = tuple(in_weight.shape)
        raise ValueError(f"{_OP}: in_weight has shape {shape}, expected (F, C) with F > 0, C = {channels}")
    features = len(in_weight)
    check_shape(_OP, "in_bias", in_bias, (features,), "(F,)")
    layers = (weight, bias, out_weight, out_bias)
    results = infer_from_hidden(_OP, "F", features, x, *layers, stream, branch, norm_weight, norm_bias, dtype, with_sum)
    check_float(_OP, in_weight=in_weight, in_bias=in_bias)
    return results


def _flops(x, in_weight, in_bias, *others) -> int:
    return 2 * x[0] * x[1] * x[2] * in_weight.numel() + count_flops(x, *others)


operator = Operator(
    _OP,
    "(Tensor x, Tensor in_weight, Tensor in_bias, Tensor weight, Tensor bias, Tensor out_weight, Tensor out_bias,"
    " Tensor? stream, Tensor? branch, Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType? dtype,"
    " bool with_sum) -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    exact_strides=False,
    # Tensor cores multiply.
    kernel_dtypes=(torch.bfloat16, torch.float16),
)


def conv_mlp(
    x: Tensor, in_weight: Tensor, in_bias: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Tensor:
    r"""A linear layer, a depthwise 3x3 convolution, GELU and a linear layer, without the maps between them in memory.

        h[b, h, w]    = in_weight x[b, h, w] + in_bias, zeros outside of the map
        s[b, h, w, f] = bias[f] + sum_ij weight[f, 0, i, j] h[b, h + i - 1, w + j - 1, f]
        y             = gelu(s) out_weight^T + out_bias

    For inference: every tensor argument is differentiable, by PyTorch's own operators. Sums are float32 (float64 for
    float64 x); the linear layers' weights and the activated features are rounded to the dtype of x, and h where it has
    to be written.

    Args:
        x: Map, (B, H, W, C).
        in_weight: Weight of the first linear layer, (F, C).
        in_bias: Its bias, (F,).
        weight: Kernels, (F, 1, 3, 3).
        bias: Their bias, (F,).
        out_weight: Weight of the second linear layer, (D, F).
        out_bias: Its bias, (D,).

    Returns:
        Contiguous (B, H, W, D) in the dtype of x.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        y, _ = torch.ops.vla.conv_mlp(
            x, in_weight, in_bias, weight, bias, out_weight, out_bias, None, None, None, None, 0.0, None, False
        )
        return y
    else:
        layers = (x, in_weight, in_bias, weight, bias, out_weight, out_bias)
        return operator(*layers, None, None, None, None, 0.0, None, False)[0]


def conv_mlp_add_norm(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
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
    """`conv_mlp`, a residual connection and the layer norm that follows it, for inference in one pass.

    Sums are float32 (float64 for float64 x), and so is what is added to the stream; the norm is that of
    `vla.ops.add_layer_norm`. Every tensor argument is differentiable, by PyTorch's own operators.

    Args:
        x: Map, (B, H, W, C).
        in_weight: Weight of the first linear layer, (F, C).
        in_bias: Its bias, (F,).
        weight: Kernels, (F, 1, 3, 3).
        bias: Their bias, (F,).
        out_weight: Weight of the second linear layer, (D, F).
        out_bias: Its bias, (D,).
        stream: What the MLP's result is added to, (B, H, W, D).
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
        y, total = torch.ops.vla.conv_mlp(
            x,
            in_weight,
            in_bias,
            weight,
            bias,
            out_weight,
            out_bias,
            stream,
            branch,
            norm_weight,
            norm_bias,
            eps,
            dtype,
            with_sum,
        )
    else:
        layers = (x, in_weight, in_bias, weight, bias, out_weight, out_bias)
        y, total = operator(*layers, stream, branch, norm_weight, norm_bias, eps, dtype, with_sum)
    return total, y
