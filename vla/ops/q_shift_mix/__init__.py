"""Q-Shift and the mixes of a map with its shifted self, Vision-RWKV: https://arxiv.org/abs/2403.02308."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_result_dtype, check_shape
from .._registry import Operator
from ..q_shift import check_shift

__all__ = ["q_shift_mix"]

_OP = "q_shift_mix"


def _infer(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    shift: int,
    gamma: float,
    head_dim: int | None,
    dtype: torch.dtype | None,
    keeps: bool,
) -> Tensor:
    check_ndim(_OP, "x", x, (4,), "(B, C, H, W)")
    check_shift(_OP, x, shift, gamma, head_dim)
    batch, channels, height, width = x.shape
    check_ndim(_OP, "weight", weight, (2,), "(mixes, C)")
    mixes = weight.shape[0]
    check_shape(_OP, "weight", weight, (mixes, channels), "(mixes, C)")
    if (low is None) != (up is None):
        raise ValueError(f"{_OP}: {'low' if low is None else 'up'} is missing, expected low and up or neither")
    if low is not None and up is not None:
        check_ndim(_OP, "up", up, (3,), "(mixes, rank, C)")
        check_shape(_OP, "up", up, (mixes, up.shape[1], channels), "(mixes, rank, C)")
        check_shape(_OP, "low", low, (batch, height * width, mixes * up.shape[1]), "(B, H * W, mixes * rank)")
    check_float(_OP, x=x, weight=weight, low=low, up=up)
    check_result_dtype(_OP, dtype)
    return x.new_empty(mixes, batch, height, width, channels, dtype=dtype).permute(0, 1, 4, 2, 3)


def _flops(x, weight, low, up, shift, gamma, head_dim, dtype, keeps) -> int:
    rank = 0 if up is None else up[1]
    return x[0] * x[1] * x[2] * x[3] * weight[0] * (2 * rank + 3)


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor? low, Tensor? up, int shift, float gamma, int? head_dim, ScalarType? dtype, "
    "bool keeps) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
)


def q_shift_mix(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
    shift: int = 1,
    gamma: float = 0.25,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    keeps: bool = False,
) -> Tensor:
    r"""Several mixes of a map with its shifted self, in one pass over memory (Vision-RWKV, eq. 1).

        y_m = x + (q_shift(x) - x) * (weight_m + low_m @ up_m)

    The weights are constant per channel; with `low` and `up` they also depend on the pixel (Vision-RWKV 6). Computed in
    float32 (float64 for float64 inputs). Every tensor argument is differentiable.

    Args:
        x: Map, (B, C, H, W), any memory format.
        weight: Share of the shifted map, (mixes, C).
        low: Low-rank part of the share per pixel, (B, H * W, mixes * rank).
        up: Expansion of `low` to channels, (mixes, rank, C). In products with a bfloat16 `low` rounded to bfloat16.
        shift: See `q_shift`.
        gamma: See `q_shift`.
        head_dim: See `q_shift`.
        dtype: dtype of the result; None for that of `x`.
        keeps: The shares are those that a mix keeps of the map itself, `q_shift(x) + (x - q_shift(x)) * share`.

    Returns:
        The mixes, (mixes, B, C, H, W), each in channels-last memory.

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.q_shift_mix(x, weight, low, up, shift, gamma, head_dim, dtype, keeps)
    else:
        return operator(x, weight, low, up, shift, gamma, head_dim, dtype, keeps)
