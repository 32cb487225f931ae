"""The directional scan with the projections that it depends on: S6 as a function of a map and its parameters."""

import torch
from torch import Tensor

from .._checks import check_directions, check_float, check_map, check_ndim, check_shape
from .._registry import Operator
from ..scan2d.order import DIRECTIONS

__all__ = ["projected_scan2d"]

_OP = "projected_scan2d"


def _infer(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    directions: list[str],
    D: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    delta_softplus: bool,
    per_line: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    check_directions(_OP, directions, DIRECTIONS)
    check_map(_OP, x)
    k, d = len(directions), x.shape[1]
    check_ndim(_OP, "A", A, (3,), "(K, D, N)")
    n = A.shape[2]
    check_shape(_OP, "A", A, (k, d, n), "(K, D, N)")
    check_ndim(_OP, "dt_weight", dt_weight, (3,), "(K, D, R)")
    rank = dt_weight.shape[2]
    check_shape(_OP, "dt_weight", dt_weight, (k, d, rank), "(K, D, R)")
    check_shape(_OP, "weight", weight, (k, rank + 2 * n, d), "(K, R + 2N, D)")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (k, d), "(K, D)")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (d,), "(D,)")
    if norm_weight is None and norm_bias is not None:
        raise ValueError(f"{_OP}: norm_bias is given without norm_weight, expected both or none")
    check_float(
        _OP, x=x, weight=weight, A=A, D=D, dt_weight=dt_weight, dt_bias=dt_bias,
        norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    return torch.empty_like(x)


def _flops(
    x, weight, A, directions, D, dt_weight, dt_bias, delta_softplus, per_line, norm_weight, norm_bias, eps
) -> int:
    pixels, (k, projected, channels) = x[0] * x[2] * x[3], weight
    scan = 2 * dt_weight[2] + 7 * A[2] + (2 if D is not None else 0)
    norm = 0 if norm_weight is None else 6 + (norm_bias is not None)  # as `layer_norm` counts
    return pixels * channels * (k * (2 * projected + scan) + norm)


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor A, str[] directions, Tensor? D, Tensor dt_weight, Tensor? dt_bias, "
    "bool delta_softplus, bool per_line, Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def projected_scan2d(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    directions: list[str],
    D: Tensor | None,
    dt_weight: Tensor,
    dt_bias: Tensor | None = None,
    delta_softplus: bool = True,
    per_line: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""`scan2d` with the time step and B and C projected from the map's pixels, in the map's dtype:

        (dt_k, B_k, C_k) = weight_k @ x

    and with `norm_weight` the layer norm of the result over its channels.

    Every tensor argument is differentiable. Strides are free; channels-last maps are read in place.

    Args:
        x: Map, (B, D, H, W).
        weight: Projection of a pixel to its time step, B and C in K directions, (K, R + 2N, D).
        A: Diagonal of the state matrix, (K, D, N), negative for a decaying state.
        directions: K of `'row'`, `'col'`, `'row_rev'` and `'col_rev'`, see `scan2d`.
        D: Skip weight, (K, D).
        dt_weight: Expansion of the time step, (K, D, R).
        dt_bias: Bias of the time step, (K, D).
        delta_softplus: Apply softplus to the biased time step.
        per_line: Start again from a zero state at every row (column).
        norm_weight: Scale of the norm per channel, (D,); None for no norm.
        norm_bias: Shift of the norm per channel, (D,).
        eps: Added to the norm's variance.

    Returns:
        Sum of the K outputs, or its norm, in the shape, dtype and memory format of `x`.

    Raises:
        ValueError: For a shape, device or direction that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.projected_scan2d(
            x, weight, A, directions, D, dt_weight, dt_bias, delta_softplus, per_line, norm_weight, norm_bias, eps
        )
    else:
        return operator(
            x, weight, A, directions, D, dt_weight, dt_bias, delta_softplus, per_line, norm_weight, norm_bias, eps
        )
