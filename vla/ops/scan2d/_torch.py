"""Vectorised directional scan: all directions side by side as groups of one time-first selective scan."""

import torch
from torch import Tensor

from .._checks import state_dtype
from ..selective_scan._torch import TimeFirst, time_step, time_step_gradient


class _Walk:
    """Reads maps along K directions into time-first sequences, and puts sequences back.

    Maps are (B, K, X, H, W); sequences are (L, S, K, X), with S = B, or with `per_line` S = B times the number of lines
    of the direction's axis, which then must be the same for all directions of a walk.
    """

    def __init__(self, directions: list[str], batch: int, height: int, width: int, per_line: bool):
        self.directions = directions
        self.batch, self.height, self.width = batch, height, width
        self.per_line = per_line

    def read(self, x: Tensor, k: int) -> Tensor:
        """(B, X, H, W) along direction k -> (L, S, X)."""
        by_column = self.directions[k].startswith("col")
        x = x.permute(3, 2, 0, 1) if by_column else x.permute(2, 3, 0, 1)  # (lines, steps, B, X)
        if self.per_line:
            x = x.transpose(0, 1).flatten(1, 2)  # (steps, lines * B, X)
        else:
            x = x.flatten(0, 1)
        return x.flip(0) if self.directions[k].endswith("rev") else x

    def read_all(self, x: Tensor) -> Tensor:
        """(B, K, X, H, W) -> (L, S, K, X), contiguous."""
        return torch.stack([self.read(x[:, k], k) for k in range(len(self.directions))], dim=2)

    def write(self, y: Tensor, k: int) -> Tensor:
        """The inverse of `read`: (L, S, X) -> (B, X, H, W)."""
        by_column = self.directions[k].startswith("col")
        lines, steps = (self.width, self.height) if by_column else (self.height, self.width)
        y = y.flip(0) if self.directions[k].endswith("rev") else y
        if self.per_line:
            y = y.unflatten(1, (lines, self.batch)).transpose(0, 1)
        else:
            y = y.unflatten(0, (lines, steps))
        return y.permute(2, 3, 1, 0) if by_column else y.permute(2, 3, 0, 1)

    def write_all(self, y: Tensor) -> Tensor:
        """(L, S, K, X) -> (B, K, X, H, W)."""
        return torch.stack([self.write(y[:, :, k], k) for k in range(len(self.directions))], dim=1)

    def merge(self, y: Tensor, grouped: bool) -> Tensor:
        """(L, S, K, X) -> (B, X, H, W) summed over directions, or (B, K * X, H, W) with `grouped`."""
        maps = [self.write(y[:, :, k], k) for k in range(len(self.directions))]
        if grouped:
            return torch.cat(maps, dim=1)
        total = maps[0].clone()
        for other in maps[1:]:
            total += other
        return total


class _Problem:
    """The arguments of one walk, time-first and in the state's dtype."""

    def __init__(self, walk: _Walk, x, dt, A, B, C, D, dt_weight, dt_bias, delta_softplus, grouped):
        dtype = state_dtype(x)
        k, d, n = A.shape
        self.walk, self.grouped, self.softplus = walk, grouped, delta_softplus
        x = x.to(dtype)
        self.x = walk.read_all(x.unflatten(1, (k, d)) if grouped else x.unsqueeze(1).expand(-1, k, -1, -1, -1))
        self.weight = None if dt_weight is None else dt_weight.to(dtype)
        self.low = walk.read_all(dt.to(dtype))
        self.delta = self.low if dt_weight is None else torch.einsum("lskr,kdr->lskd", self.low, self.weight)
        self.delta = self.delta.contiguous()
        self.bias = None if dt_bias is None else dt_bias.to(dtype)
        self.D = None if D is None else D.to(dtype)
        self.scan = TimeFirst(
            self.x.flatten(2),
            time_step(self.delta, self.bias, delta_softplus).flatten(2),
            A.to(dtype).permute(2, 0, 1).reshape(n, k * d),
            walk.read_all(B.to(dtype)).transpose(2, 3),
            walk.read_all(C.to(dtype)).transpose(2, 3),
        )

    def forward(self) -> Tensor:
        y, _ = self.scan.forward()
        y = y.unflatten(2, self.x.shape[2:])
        if self.D is not None:
            y.addcmul_(self.x, self.D)
        return self.walk.merge(y, self.grouped)

    def backward(self, gy: Tensor) -> list[Tensor | None]:
        """Gradients of x, dt, A, B, C, D, dt_weight, dt_bias."""
        k, d = self.x.shape[2:]
        gy = gy.to(self.x.dtype)
        gy = self.walk.read_all(gy.unflatten(1, (k, d)) if self.grouped else gy.unsqueeze(1).expand(-1, k, -1, -1, -1))
        gx, gdt, gA, gB, gC = self.scan.backward(gy.flatten(2), None)
        gx = gx.unflatten(2, (k, d))
        gD = None
        if self.D is not None:
            gD = (gy * self.x).sum((0, 1))
            gx.addcmul_(gy, self.D)
        g_delta = time_step_gradient(gdt.unflatten(2, (k, d)), self.delta, self.bias, self.softplus)
        g_bias = None if self.bias is None else g_delta.sum((0, 1))
        g_weight = None
        if self.weight is not None:
            g_weight = torch.einsum("lskd,lskr->kdr", g_delta, self.low)
            g_delta = torch.einsum("lskd,kdr->lskr", g_delta, self.weight)
        return [
            self.walk.merge(gx, self.grouped),
            self.walk.write_all(g_delta),
            gA.unflatten(1, (k, d)).permute(1, 2, 0),
            self.walk.write_all(gB.transpose(2, 3)),
            self.walk.write_all(gC.transpose(2, 3)),
            gD,
            g_weight,
            g_bias,
        ]


def _problems(args: tuple) -> list[tuple[slice, _Problem]]:
    """Directions that can be walked side by side: all, or one each with `per_line`, as the axes differ in length."""
    x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line = args
    k = len(directions)
    batch, _, height, width = x.shape
    problems = []
    for part in [slice(i, i + 1) for i in range(k)] if per_line else [slice(0, k)]:
        walk = _Walk(directions[part], batch, height, width, per_line)
        x_part = x.unflatten(1, (k, -1))[:, part].flatten(1, 2) if grouped else x
        parameters = (None if t is None else t[part] for t in (D, dt_weight, dt_bias))
        problem = _Problem(
            walk, x_part, dt[:, part], A[part], B[:, part], C[:, part], *parameters, delta_softplus, grouped
        )
        problems.append((part, problem))
    return problems


def _merge(maps: list[Tensor], grouped: bool) -> Tensor:
    return torch.cat(maps, dim=1) if grouped else sum(maps[1:], maps[0])


def forward(*args) -> Tensor:
    x, grouped = args[0], args[-2]
    y = _merge([problem.forward() for _, problem in _problems(args)], grouped)
    return torch.empty_like(x).copy_(y)


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    directions, grouped = args[5], args[-2]
    results = []
    for part, problem in _problems(args):
        gy = grads[0]
        if grouped:
            gy = gy.unflatten(1, (len(directions), -1))[:, part].flatten(1, 2)
        results.append(problem.backward(gy))
    gx, *rest = (list(parts) for parts in zip(*results, strict=True))

    def join(parts: list[Tensor | None], dim: int) -> Tensor | None:
        return None if parts[0] is None else torch.cat(parts, dim)

    # dt, A, B, C, D, dt_weight, dt_bias: maps have their direction in dimension 1, parameters in dimension 0.
    return [_merge(gx, grouped), *(join(parts, dim) for parts, dim in zip(rest, (1, 0, 1, 1, 0, 0, 0), strict=True))]
