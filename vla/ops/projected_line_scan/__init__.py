"""The line scan with the projection of its proxy: GSPN's scan as a function of a map and its parameters."""

import torch
from torch import Tensor

from .._checks import check_directions, check_float, check_map, check_ndim, check_shape
from .._registry import Operator
from ..line_scan.frames import DIRECTIONS

__all__ = ["projected_line_scan"]

_OP = "projected_line_scan"


def _infer(
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor,
    directions: list[str],
    chunk: int,
    aligned: bool,
) -> Tensor:
    check_directions(_OP, directions, DIRECTIONS)
    if chunk < 0:
        raise ValueError(f"{_OP}: chunk is {chunk}, expected a number of lines, or 0 for whole sweeps")
    check_map(_OP, x)
    k, channels = len(directions), x.shape[1]
    check_ndim(_OP, "weight", weight, (2,), "(S, D)")
    rank = weight.shape[0]
    check_shape(_OP, "weight", weight, (rank, channels), "(S, D)")
    check_shape(_OP, "gates", gates, (3, k, channels, rank), "(3, K, D, S)")
    for name, tensor in (("lam", lam), ("u", u), ("skip", skip)):
        check_shape(_OP, name, tensor, (k, channels, rank), "(K, D, S)")
    check_float(_OP, x=x, weight=weight, gates=gates, lam=lam, u=u, skip=skip)
    return torch.empty_like(x)


def _flops(x, weight, gates, lam, u, skip, directions, chunk, aligned) -> int:
    # Of every direction the expansion of six coefficients, and the scan as in `line_scan`; the projection.
    return x[0] * x[1] * x[2] * x[3] * (len(directions) * (12 * weight[0] + 28) + 2 * weight[0])


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight, Tensor gates, Tensor lam, Tensor u, Tensor skip, str[] directions, int chunk, "
    "bool aligned) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def projected_line_scan(
    x: Tensor,
    weight: Tensor,
    gates: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor,
    directions: list[str],
    chunk: int = 0,
    aligned: bool = True,
) -> Tensor:
    r"""`line_scan` with a proxy that is projected from the map's pixels, in the map's dtype:

        proxy = weight @ x

    Every tensor argument is differentiable. Strides are free; channels-last maps are read in place.

    Args:
        x: Map, (B, D, H, W).
        weight: Projection of a pixel to its proxy, (S, D).
        gates: Expansion to the gates' logits, (3, K, D, S).
        lam: Expansion to the weight of the input, (K, D, S).
        u: Expansion to the weight of the state in the output, (K, D, S).
        skip: Expansion to the weight of the input in the output, (K, D, S).
        directions: K of `'right'`, `'down'`, `'left'` and `'up'`: where the line moves.
        chunk: Lines after which a sweep starts again from zero; 0 for whole sweeps.
        aligned: See `line_scan`.

    Returns:
        Sum of the directions' outputs, in the shape, dtype and memory format of `x`.

    Raises:
        ValueError: For a shape, device, direction or chunk that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.projected_line_scan(x, weight, gates, lam, u, skip, directions, chunk, aligned)
    else:
        return operator(x, weight, gates, lam, u, skip, directions, chunk, aligned)
