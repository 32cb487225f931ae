"""Line scan: GSPN's three-neighbour propagation over a 2-D map, https://arxiv.org/abs/2501.12381."""

import torch
from torch import Tensor

from .._checks import check_directions, check_float, check_map, check_ndim, check_shape
from .._registry import Operator
from .frames import DIRECTIONS

__all__ = ["DIRECTIONS", "line_scan"]

_OP = "line_scan"


def _infer(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    u: Tensor | None,
    skip: Tensor | None,
    proxy: Tensor | None,
    directions: list[str],
    chunk: int,
    normalize: bool,
    aligned: bool,
) -> Tensor:
    check_directions(_OP, directions, DIRECTIONS)
    k = len(directions)
    if chunk < 0:
        raise ValueError(f"{_OP}: chunk is {chunk}, expected a number of lines, or 0 for whole sweeps")
    check_map(_OP, x)
    batch, channels, height, width = x.shape
    if proxy is None:
        wanted, pattern = (k, channels, height, width), "K, D, H, W)"
        check_shape(_OP, "gates", gates, (batch, 3, *wanted), "(B, 3, " + pattern)
        lead: tuple[int, ...] = (batch,)
        pattern = "(B, " + pattern
    else:
        check_ndim(_OP, "proxy", proxy, (4,), "(B, S, H, W)")
        rank = proxy.shape[1]
        check_shape(_OP, "proxy", proxy, (batch, rank, height, width), "(B, S, H, W)")
        wanted, pattern = (k, channels, rank), "K, D, S)"
        check_shape(_OP, "gates", gates, (3, *wanted), "(3, " + pattern)
        lead = ()
        pattern = "(" + pattern
    for name, tensor in (("lam", lam), ("u", u), ("skip", skip)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (*lead, *wanted), pattern)
    check_float(_OP, x=x, gates=gates, lam=lam, u=u, skip=skip, proxy=proxy)
    return torch.empty_like(x)


def _flops(x, gates, lam, u, skip, proxy, directions, chunk, normalize, aligned) -> int:
    steps = x[0] * x[1] * x[2] * x[3] * len(directions)
    coefficients = 4 + (u is not None) + (skip is not None)
    expand = 0 if proxy is None else 2 * proxy[1] * coefficients
    # Three multiply-adds and the input product; per gate a sigmoid (4), its place in the sum and the division.
    return steps * (expand + 7 + (18 if normalize else 0) + (u is not None) + 2 * (skip is not None))


operator = Operator(
    _OP,
    "(Tensor x, Tensor gates, Tensor lam, Tensor? u, Tensor? skip, Tensor? proxy, str[] directions, int chunk, "
    "bool normalize, bool aligned) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def line_scan(
    x: Tensor,
    gates: Tensor,
    lam: Tensor,
    directions: list[str],
    u: Tensor | None = None,
    skip: Tensor | None = None,
    proxy: Tensor | None = None,
    chunk: int = 0,
    normalize: bool = True,
    aligned: bool = True,
) -> Tensor:
    r"""Propagates a map line by line in K directions, each pixel fed by three neighbours in the line before.

    A sweep to the `'right'` moves a vertical line over the columns `w = 0, 1, ...` (GSPN, eq. 1):

        h[i, w] = lam[i, w] x[i, w] + l h[i-1, w-1] + m h[i, w-1] + r h[i+1, w-1]
        y[i, w] = u[i, w] h[i, w] + skip[i, w] x[i, w]

    with the gates `l, m, r` of pixel (i, w), states outside the map equal to 0, and nothing carried into a line whose
    number (counted from the start of the sweep) is a multiple of `chunk`. The result is `sum_k y_k` over the
    directions; weights of the sum belong into `u` and `skip`. Without `u` and `skip`, `y = h`.

    With `normalize` the gates are logits: `l, m, r` become sigmoids divided by the sum (at least 1e-7) of those that
    have a neighbour, so that a state is a convex combination of its neighbours plus the input. For lines of one pixel
    the sum is `l + m`, which is how GSPN's weights were trained.

    The coefficients `gates`, `lam`, `u`, `skip` are maps; or, with `proxy`, weights: every coefficient is then the
    linear function `<weight[k, d], proxy[:, i, w]>` of a few channels shared by all (what GSPN does), expanded
    where it is used and never stored. State and reductions are float32 (float64 for float64 inputs). Every tensor
    argument is differentiable. Strides are free; with a proxy `torch.channels_last` is the fastest memory format.

    Args:
        x: Map, (B, D, H, W).
        gates: Logits (gates, without `normalize`) of the neighbours before, beside and after a pixel in the order of
            rows for horizontal and of columns for vertical sweeps; (B, 3, K, D, H, W), with `proxy` (3, K, D, S).
        lam: Weight of the input, (B, K, D, H, W), with `proxy` (K, D, S).
        directions: K of `'right'`, `'down'`, `'left'` and `'up'`: where the line moves.
        u: Weight of the state in the output, shaped like `lam`.
        skip: Weight of the input in the output, shaped like `lam`.
        proxy: Low-rank map (B, S, H, W) that all coefficients are linear functions of.
        chunk: Lines after which a sweep starts again from zero; 0 for whole sweeps. The last chunk may be shorter.
        normalize: Take `gates` as logits.
        aligned: Every pixel is propagated with its own coefficients and its output returns to it: the operator of the
            paper. False is what the released GSPN networks compute: the map is turned so that the line moves to the
            right, then scanned with coefficients of the unturned map, and the outputs are summed without turning them
            back. At pixel (i, j) of a square map, `'down'` so reads `x[j, i]`, `'left'` `x[i, W-1-j]` and `'up'`
            `x[H-1-j, i]`. Turned maps of another shape than (H, W) are read at the nearest pixel of the same relative
            position.

    Returns:
        Sum of the directions' outputs, in the shape, dtype and memory format of `x`.

    Raises:
        ValueError: For a shape, device, direction or chunk that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.line_scan(x, gates, lam, u, skip, proxy, directions, chunk, normalize, aligned)
    else:
        return operator(x, gates, lam, u, skip, proxy, directions, chunk, normalize, aligned)
