"""The directional scan as it is defined: gather each direction, scan step by step, put back, merge."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..selective_scan.naive import forward as selective_scan
from .order import to_map, to_sequence


def forward(
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
    height, width = x.shape[-2:]
    dtype = state_dtype(x)
    xs = x.to(dtype).chunk(len(directions), dim=1) if grouped else [x.to(dtype)] * len(directions)
    outputs = []
    for k, direction in enumerate(directions):
        step = dt[:, k].to(dtype)
        if dt_weight is not None:
            step = torch.einsum("brhw,dr->bdhw", step, dt_weight[k].to(dtype))

        def scan(u, delta, b, c, k=k, direction=direction):
            u, delta, b, c = (to_sequence(t, direction) for t in (u, delta, b, c))
            skip, bias = (None if t is None else t[k] for t in (D, dt_bias))
            y, _ = selective_scan(u, delta, A[k], b, c, skip, None, bias, delta_softplus)
            return y

        maps = (xs[k], step, B[:, k].to(dtype), C[:, k].to(dtype))
        if per_line:
            axis = 3 if direction.startswith("col") else 2
            lines = [scan(*line) for line in zip(*(m.split(1, dim=axis) for m in maps), strict=True)]
            h, w = (height, 1) if axis == 3 else (1, width)
            outputs.append(torch.cat([to_map(line, direction, h, w) for line in lines], dim=axis))
        else:
            outputs.append(to_map(scan(*maps), direction, height, width))
    y = torch.cat(outputs, dim=1) if grouped else torch.stack(outputs).sum(0)
    return torch.empty_like(x).copy_(y) if not y.requires_grad else y.to(x.dtype)
