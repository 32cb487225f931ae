"""Vectorised line scan: the same line of all chunks, rows and channels at once, gates expanded line by line."""

import torch
from torch import Tensor

from .._checks import state_dtype
from .frames import from_frame, from_map_frame, to_frame, to_map_frame

_ALL = slice(None)
_MIN_TOTAL = 1e-7


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).to(dtype).contiguous()


class _Stored:
    """A coefficient given as a map (B, H, W, C) in the sweep's frame."""

    def __init__(self, value: Tensor):
        self.value = value
        self.gradient = None

    def at(self, columns: slice) -> Tensor:
        return self.value[:, :, columns]

    def accumulate(self, gradient: Tensor, columns: slice) -> None:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.value)
        self.gradient[:, :, columns] = gradient


class _Expanded:
    """A coefficient given as weights (C, S) of a proxy (B, H, W, S) in the sweep's frame."""

    def __init__(self, weight: Tensor, proxy: Tensor, proxy_gradient: Tensor | None):
        self.weight, self.proxy, self.proxy_gradient = weight, proxy, proxy_gradient
        self.gradient = torch.zeros_like(weight)

    def at(self, columns: slice) -> Tensor:
        return self.proxy[:, :, columns] @ self.weight.t()

    def accumulate(self, gradient: Tensor, columns: slice) -> None:
        self.gradient += gradient.flatten(0, -2).t() @ self.proxy[:, :, columns].flatten(0, -2)
        self.proxy_gradient[:, :, columns] += gradient @ self.weight


class _Sweep:
    """One direction, in its frame: maps are (B, H, W, channels) and the line moves over the columns."""

    def __init__(self, args: tuple, index: int, with_gradients: bool = False):
        x, gates, lam, u, skip, proxy, directions, chunk, self.normalize, self.aligned = args
        self.direction = directions[index]
        dtype = state_dtype(x)
        self.x = _channels_last(self._turn(x), dtype)
        self.channels = x.shape[1]
        self.chunk = min(chunk or self.x.shape[2], self.x.shape[2])
        if proxy is None:

            def coefficient(value: Tensor) -> _Stored:
                value = to_frame(value, self.direction) if self.aligned else value
                return _Stored(_channels_last(value, dtype))

            self.gates = coefficient(gates[:, :, index].flatten(1, 2))
            self.lam, self.u, self.skip = (None if t is None else coefficient(t[:, index]) for t in (lam, u, skip))
        else:
            turned = to_frame(proxy, self.direction) if self.aligned else proxy
            self.proxy = _channels_last(turned, dtype)
            self.proxy_gradient = torch.zeros_like(self.proxy) if with_gradients else None

            def coefficient(weight: Tensor) -> _Expanded:
                return _Expanded(weight.to(dtype), self.proxy, self.proxy_gradient)

            self.gates = coefficient(gates[:, index].flatten(0, 1))
            self.lam, self.u, self.skip = (None if t is None else coefficient(t[index]) for t in (lam, u, skip))

    def _turn(self, x: Tensor) -> Tensor:
        return to_frame(x, self.direction) if self.aligned else to_map_frame(x, self.direction)

    def turn_back(self, x: Tensor) -> Tensor:
        """Channels-last frame -> (B, C, H, W) on the pixels it belongs to."""
        x = x.permute(0, 3, 1, 2)
        return from_frame(x, self.direction) if self.aligned else x

    def turn_input_back(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        return from_frame(x, self.direction) if self.aligned else from_map_frame(x, self.direction)

    def columns(self, line: int) -> tuple[slice, slice]:
        """Columns of the given line of every chunk that has it, and the columns before them."""
        width = self.x.shape[2]
        return slice(line, width, self.chunk), slice(line - 1, width - 1, self.chunk)

    def open_gates(self, columns: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gates (B, H, n, 3, D), and with normalisation the sigmoids and their clamped sum, (B, H, n, 1, D)."""
        value = self.gates.at(columns).unflatten(-1, (3, self.channels))
        if not self.normalize:
            return value, None, None
        value = value.sigmoid()
        value[:, -1, :, 2] = 0
        if value.shape[1] > 1:
            value[:, 0, :, 0] = 0
        total = value.sum(3, keepdim=True).clamp_(min=_MIN_TOTAL)
        return value / total, value, total

    def states(self) -> Tensor:
        h = self.lam.at(_ALL) * self.x
        for line in range(1, self.chunk):
            now, before = (h[:, :, columns] for columns in self.columns(line))
            left, middle, right = self.open_gates(self.columns(line)[0])[0].unbind(3)
            now.addcmul_(middle, before)
            now[:, 1:].addcmul_(left[:, 1:], before[:, :-1])
            now[:, :-1].addcmul_(right[:, :-1], before[:, 1:])
        return h

    def forward(self) -> Tensor:
        y = self.states()
        if self.u is not None:
            y *= self.u.at(_ALL)
        if self.skip is not None:
            y.addcmul_(self.skip.at(_ALL), self.x)
        return y

    def backward(self, gy: Tensor) -> Tensor:
        """Accumulates the coefficients' gradients and returns that of `x`, all in the frame."""
        h = self.states()
        gx = torch.zeros_like(self.x)
        if self.skip is not None:
            self.skip.accumulate(gy * self.x, _ALL)
            gx.addcmul_(gy, self.skip.at(_ALL))
        if self.u is not None:
            self.u.accumulate(gy * h, _ALL)
        gh = gy * self.u.at(_ALL) if self.u is not None else gy.clone()
        for line in range(self.chunk - 1, 0, -1):
            columns, columns_before = self.columns(line)
            now, before, h_before = gh[:, :, columns], gh[:, :, columns_before], h[:, :, columns_before]
            gates, sigmoids, total = self.open_gates(columns)
            left, middle, right = gates.unbind(3)
            before.addcmul_(middle, now)
            before[:, :-1].addcmul_(left[:, 1:], now[:, 1:])
            before[:, 1:].addcmul_(right[:, :-1], now[:, :-1])

            g_gates = torch.zeros_like(gates)
            torch.mul(now[:, 1:], h_before[:, :-1], out=g_gates[:, 1:, :, 0])
            torch.mul(now, h_before, out=g_gates[:, :, :, 1])
            torch.mul(now[:, :-1], h_before[:, 1:], out=g_gates[:, :-1, :, 2])
            if self.normalize:
                through_total = (g_gates * gates).sum(3, keepdim=True) * (total > _MIN_TOTAL)
                g_gates = (g_gates - through_total) / total * (sigmoids - sigmoids.square())
            self.gates.accumulate(g_gates.flatten(-2), columns)
        self.lam.accumulate(gh * self.x, _ALL)
        return gx.addcmul_(gh, self.lam.at(_ALL))


def forward(x: Tensor, *args) -> Tensor:
    y = 0
    for k in range(len(args[5])):
        sweep = _Sweep((x, *args), k)
        y = y + sweep.turn_back(sweep.forward())
    return torch.empty_like(x).copy_(y)


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    x, gates, lam, u, skip, proxy, directions = args[:7]
    dtype = state_dtype(x)
    results = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in (x, gates, lam, u, skip, proxy)]
    gx, g_gates, g_lam, g_u, g_skip, g_proxy = results
    for k, direction in enumerate(directions):
        sweep = _Sweep(args, k, with_gradients=True)
        gy = to_frame(grads[0], direction) if sweep.aligned else grads[0]
        gx += sweep.turn_input_back(sweep.backward(_channels_last(gy, dtype)))
        coefficients = ((sweep.lam, g_lam), (sweep.u, g_u), (sweep.skip, g_skip))
        if proxy is None:
            if sweep.gates.gradient is not None:
                g_gates[:, :, k] = sweep.turn_back(sweep.gates.gradient).unflatten(1, (3, sweep.channels))
            for coefficient, gradient in coefficients:
                if coefficient is not None:
                    gradient[:, k] = sweep.turn_back(coefficient.gradient)
        else:
            g_proxy += sweep.turn_back(sweep.proxy_gradient)
            g_gates[:, k] = sweep.gates.gradient.unflatten(0, (3, sweep.channels))
            for coefficient, gradient in coefficients:
                if coefficient is not None:
                    gradient[k] = coefficient.gradient
    return results
