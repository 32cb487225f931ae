"""LayerNorm and global response normalisation of a map, as GSPN's mixer ends: https://arxiv.org/abs/2501.12381."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator

__all__ = ["layer_norm_grn"]

_OP = "layer_norm_grn"


def _infer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    dtype: torch.dtype | None,
    projection: Tensor | None,
) -> Tensor:
    check_ndim(_OP, "x", x, (4,), "(B, C, H, W)")
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected at least one channel")
    parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)
    for name, tensor in parameters.items():
        check_shape(_OP, name, tensor, (channels,), "(C,)")
    features = channels
    if projection is not None:
        check_ndim(_OP, "projection", projection, (2,), "(F, C)")
        features = projection.shape[0]
        check_shape(_OP, "projection", projection, (features, channels), "(F, C)")
    check_float(_OP, x=x, **parameters, projection=projection)
    check_result_dtype(_OP, dtype)
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, features, dtype=dtype).permute(0, 3, 1, 2)


def _flops(x, norm_weight, norm_bias, weight, bias, norm_eps, eps, dtype, projection) -> int:
    # Mean, variance, norm and its square; the second pass scales; the product.
    return (12 + (0 if projection is None else 2 * projection[0])) * x[0] * x[1] * x[2] * x[3]


operator = Operator(
    _OP,
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, float norm_eps, float eps, "
    "ScalarType? dtype, Tensor? projection) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def layer_norm_grn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_eps: float = 1e-5,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    projection: Tensor | None = None,
) -> Tensor:
    r"""LayerNorm over the channels, then global response normalisation (ConvNeXt V2, eq. 1-3) over the pixels.

        n = layer_norm(x)                                    of each pixel
        G = sqrt(sum over pixels of n^2)                     of each picture and channel
        y = bias + n * (1 + weight * G / (mean over channels of G + eps))
        y = projection @ y                                   if there is one, of each pixel

    Computed in float32 (float64 for float64 inputs), in two passes over the map. Every tensor is differentiable.

    Args:
        x: Map, (B, C, H, W); channels last in memory is read in place.
        norm_weight: Scale of the LayerNorm, (C,).
        norm_bias: Shift of the LayerNorm, (C,).
        weight: Weight of the response, (C,).
        bias: Shift of the result, (C,).
        norm_eps: Added to the variance.
        eps: Added to the mean response.
        dtype: dtype of the result; None for that of `x`.
        projection: Weights of a linear layer behind the norms, (F, C).

    Returns:
        Map (B, C, H, W), with a projection (B, F, H, W), in channels-last memory.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.layer_norm_grn(x, norm_weight, norm_bias, weight, bias, norm_eps, eps, dtype, projection)
    else:
        return operator(x, norm_weight, norm_bias, weight, bias, norm_eps, eps, dtype, projection)
