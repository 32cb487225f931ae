"""Maps as rows of pixels, and back; columns behind a map's channels."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """The map itself if the channels of a pixel are neighbours in memory, else a channels-last copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def pixels(x: Tensor) -> Tensor:
    """A map (B, D, H, W) as (B H W, D), a view if it is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def as_map(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (B H W, C) as a map of the size of x (B, D, H, W), (B, C, H, W)."""
    return rows.view(x.shape[0], *x.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def with_columns(rows: Tensor, columns: int) -> Tensor:
    """Rows (..., C) with columns behind them: ones in the first and zeros in the others."""
    if columns == 0:
        return rows
    tail = torch.eye(1, columns, dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, tail.expand(*rows.shape[:-1], columns)], dim=-1)
