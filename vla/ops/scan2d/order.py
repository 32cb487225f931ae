"""The orders in which a 2-D map is visited, as explicit gathers, for operators that want sequences."""

import torch
from torch import Tensor

from .._checks import check_directions

DIRECTIONS = ("row", "col", "row_rev", "col_rev")


def to_sequence(x: Tensor, direction: str) -> Tensor:
    """(..., H, W) -> (..., L) in the order of `direction`."""
    x = (x.transpose(-1, -2) if direction.startswith("col") else x).flatten(-2)
    return x.flip(-1) if direction.endswith("rev") else x


def to_map(y: Tensor, direction: str, height: int, width: int) -> Tensor:
    """The inverse of `to_sequence`: (..., L) -> (..., H, W)."""
    y = y.flip(-1) if direction.endswith("rev") else y
    if direction.startswith("col"):
        return y.unflatten(-1, (width, height)).transpose(-1, -2)
    return y.unflatten(-1, (height, width))


def cross_scan(x: Tensor, directions: list[str]) -> Tensor:
    """Reads a map along K directions (VMamba, fig. 3).

    Args:
        x: Map (B, D, H, W), one for all directions.
        directions: K names of `DIRECTIONS`.

    Returns:
        Sequences (B, K, D, L) with L = H * W.

    Raises:
        ValueError: For an unknown direction, or none.
    """
    if not torch.jit.is_scripting():
        check_directions("cross_scan", directions, DIRECTIONS)
    return torch.stack([to_sequence(x, direction) for direction in directions], dim=1)


def cross_merge(ys: Tensor, directions: list[str], height: int, width: int) -> Tensor:
    """Puts K sequences back to their pixels and sums them: the adjoint of `cross_scan`.

    Args:
        ys: Sequences (B, K, D, L), L = height * width.
        directions: K names of `DIRECTIONS`.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        Map (B, D, H, W).

    Raises:
        ValueError: For an unknown direction, or more or fewer than there are sequences.
    """
    if not torch.jit.is_scripting():
        check_directions("cross_merge", directions, DIRECTIONS)
        # Under torch.fx it is none, and has no number of sequences yet.
        if isinstance(ys, Tensor) and ys.shape[1] != len(directions):
            raise ValueError(f"cross_merge: ys has {ys.shape[1]} sequences, expected {len(directions)} like directions")
    y = to_map(ys[:, 0], directions[0], height, width)
    for k in range(1, len(directions)):
        y = y + to_map(ys[:, k], directions[k], height, width)
    return y
