"""The frame of a sweep: the map turned so that lines advance along its last axis."""

import torch
from torch import Tensor

DIRECTIONS = ("right", "down", "left", "up")


def to_frame(x: Tensor, direction: str) -> Tensor:
    """(..., H, W) -> the frame of `direction`: (..., H, W), or (..., W, H) for the vertical sweeps."""
    x = x.transpose(-1, -2) if direction in ("down", "up") else x
    return x.flip(-1) if direction in ("left", "up") else x


def from_frame(x: Tensor, direction: str) -> Tensor:
    """The inverse of `to_frame`."""
    x = x.flip(-1) if direction in ("left", "up") else x
    return x.transpose(-1, -2) if direction in ("down", "up") else x


def to_map_frame(x: Tensor, direction: str) -> Tensor:
    """The frame of `direction`, brought back to the map's own shape (..., H, W).

    A square frame has that shape already. Any other is read at the nearest pixel of the same relative position, rounded
    down: row `i` of the result is row `i * W // H` of the (W, H) frame, and column `j` its column `j * H // W`.
    """
    height, width = x.shape[-2:]
    x = to_frame(x, direction)
    if x.shape[-2:] != (height, width):
        rows, columns = _nearest(height, width, x.device)
        x = x[..., rows[:, None], columns]
    return x


def from_map_frame(x: Tensor, direction: str) -> Tensor:
    """The adjoint of `to_map_frame`: every pixel gets the sum of what was read from it."""
    height, width = x.shape[-2:]
    if direction in ("down", "up") and height != width:
        rows, columns = _nearest(height, width, x.device)
        x = x.new_zeros(*x.shape[:-2], width, width).index_add(-2, rows, x)
        x = x.new_zeros(*x.shape[:-1], height).index_add(-1, columns, x)
    return from_frame(x, direction)


def _nearest(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the (W, H) frame that the pixels of an (H, W) map read."""
    rows = torch.arange(height, device=device) * width // height
    columns = torch.arange(width, device=device) * height // width
    return rows, columns
