"""Directional selective scan (S6) over a 2-D map: the core of VMamba's SS2D, https://arxiv.org/abs/2401.10166."""

import torch
from torch import Tensor

from .._checks import check_directions, check_float, check_map, check_ndim, check_shape
from .._registry import Operator
from .order import DIRECTIONS, cross_merge, cross_scan

__all__ = ["DIRECTIONS", "cross_merge", "cross_scan", "scan2d"]

_OP = "scan2d"


def _infer(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    directions: list[str],
    D: Tensor | None,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    delta_softplus: bool,
    grouped: bool,
    per_line: bool,
) -> Tensor:
    check_directions(_OP, directions, DIRECTIONS)
    check_map(_OP, x)
    batch, channels, height, width = x.shape
    k = len(directions)
    if grouped and channels % k != 0:
        raise ValueError(f"{_OP}: x has {channels} channels, expected a multiple of the {k} grouped directions")
    d = channels // k if grouped else channels

    check_ndim(_OP, "A", A, (3,), "(K, D, N)")
    n = A.shape[2]
    check_shape(_OP, "A", A, (k, d, n), "(K, D, N)")
    check_shape(_OP, "B", B, (batch, k, n, height, width), "(B, K, N, H, W)")
    check_shape(_OP, "C", C, (batch, k, n, height, width), "(B, K, N, H, W)")
    check_ndim(_OP, "dt", dt, (5,), "(B, K, R, H, W), or (B, K, D, H, W) without dt_weight")
    if dt_weight is None:
        check_shape(_OP, "dt", dt, (batch, k, d, height, width), "(B, K, D, H, W)")
    else:
        check_shape(_OP, "dt", dt, (batch, k, dt.shape[2], height, width), "(B, K, R, H, W)")
        check_shape(_OP, "dt_weight", dt_weight, (k, d, dt.shape[2]), "(K, D, R)")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (k, d), "(K, D)")
    check_float(_OP, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_weight=dt_weight, dt_bias=dt_bias)
    return torch.empty_like(x)


def _flops(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line) -> int:
    steps = x[0] * x[2] * x[3] * A[0] * A[1]
    rank = 0 if dt_weight is None else dt_weight[2]
    return steps * (2 * rank + 7 * A[2] + (2 if D is not None else 0))


operator = Operator(
    _OP,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, str[] directions, Tensor? D, Tensor? dt_weight, "
    "Tensor? dt_bias, bool delta_softplus, bool grouped, bool per_line) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def scan2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    directions: list[str],
    D: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_bias: Tensor | None = None,
    delta_softplus: bool = True,
    grouped: bool = False,
    per_line: bool = False,
) -> Tensor:
    r"""Selective scan along K directions of a map, outputs put back to their pixels and merged.

    Every tensor is in the map's natural layout: a direction is only the order in which pixels are visited. With pixels
    numbered `l = 0, 1, ...` in the order of direction k and `h_0 = 0`:

        dt_l = softplus(dt_weight_k @ dt_{k,l} + dt_bias_k)
        h_l  = exp(dt_l A_k) * h_{l-1} + dt_l B_{k,l} x_l
        y_k  = <C_{k,l}, h_l> + D_k x_l

    and the result is `sum_k y_k` (VMamba's cross-scan and cross-merge), or with `grouped` the concatenation of the
    `y_k`, each computed from its own K-th of the channels (GroupMamba). State and reductions are float32 (float64 for
    float64 inputs). Every tensor argument is differentiable. Strides are free, channels-last maps included.

    Args:
        x: Map, (B, D, H, W); with `grouped` (B, K * D, H, W).
        dt: Low-rank time step (B, K, R, H, W), expanded by `dt_weight`; without `dt_weight` (B, K, D, H, W).
        A: Diagonal of the state matrix, (K, D, N), negative for a decaying state.
        B: Input projection, (B, K, N, H, W).
        C: Output projection, (B, K, N, H, W).
        directions: K of `'row'` (row-major), `'col'` (column-major), `'row_rev'` and `'col_rev'` (the same, from
            the last pixel to the first).
        D: Skip weight, (K, D).
        dt_weight: Expansion of the time step, (K, D, R).
        dt_bias: Bias of the time step, (K, D).
        delta_softplus: Apply softplus to the biased time step.
        grouped: Give direction k the k-th group of channels only, and concatenate instead of summing.
        per_line: Start again from a zero state at every row (column).

    Returns:
        Merged map, in the shape, dtype and memory format of `x`.

    Raises:
        ValueError: For a shape, device or direction that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.scan2d(
            x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line
        )
    else:
        return operator(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line)
