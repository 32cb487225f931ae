"""The line scan as it is defined: one line after the other, one sweep after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .frames import from_frame, to_frame, to_map_frame


def normalize_gates(left: Tensor, middle: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (..., H, W) whose sum over a pixel's neighbours is one, from logits; see `line_scan`."""
    left, middle, right = left.sigmoid(), middle.sigmoid(), right.sigmoid()
    height = left.shape[-2]
    row = torch.arange(height, device=left.device)[:, None]
    # The last row's rule comes second: of the outer neighbours, a map of one row counts the first.
    has_left = (row > 0) | (row == height - 1)
    has_right = row < height - 1
    total = (left * has_left + middle + right * has_right).clamp_min(1e-7)
    return left / total, middle / total, right / total


def scan(v: Tensor, left: Tensor, middle: Tensor, right: Tensor, chunk: int) -> Tensor:
    """States (..., H, W) of the sweep along W with inputs `v`."""
    chunk = chunk or v.shape[-1]
    lines = []
    columns = zip(*(t.unbind(-1) for t in (v, left, middle, right)), strict=True)
    for w, (line, left_w, middle_w, right_w) in enumerate(columns):
        if w % chunk != 0:
            above = F.pad(lines[-1][..., :-1], (1, 0))
            below = F.pad(lines[-1][..., 1:], (0, 1))
            line = line + left_w * above + middle_w * lines[-1] + right_w * below
        lines.append(line)
    return torch.stack(lines, dim=-1)


def forward(
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
    dtype = state_dtype(x)

    def coefficient(value: Tensor | None) -> Tensor | None:
        if value is None or proxy is None:
            return None if value is None else value.to(dtype)
        return torch.einsum("...ds,bshw->b...dhw", value.to(dtype), proxy.to(dtype))

    gates, lam, u, skip = (coefficient(value) for value in (gates, lam, u, skip))
    x_ = x.to(dtype)
    y = torch.zeros_like(x_)
    for k, direction in enumerate(directions):

        def turn(t: Tensor, direction: str = direction) -> Tensor:
            return to_frame(t, direction) if aligned else t

        x_k = to_frame(x_, direction) if aligned else to_map_frame(x_, direction)
        g = [turn(gate) for gate in gates[:, :, k].unbind(1)]
        if normalize:
            g = normalize_gates(*g)
        y_k = scan(turn(lam[:, k]) * x_k, *g, chunk)
        if u is not None:
            y_k = turn(u[:, k]) * y_k
        if skip is not None:
            y_k = y_k + turn(skip[:, k]) * x_k
        y = y + (from_frame(y_k, direction) if aligned else y_k)
    return torch.empty_like(x).copy_(y) if not y.requires_grad else y.to(x.dtype)
