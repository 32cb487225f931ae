"""GPU kernels of the line scan: which of them runs, and launches of those for stored coefficients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ahead
from .._triton import at_most, cdiv, next_power_of_2
from . import _triton_pairs, _triton_proxy, _triton_stored
from .frames import from_map_frame, to_map_frame


def _block(lines: int, itemsize: int) -> int:
    """Lines of a block of the backward, before which a forward leaves the states."""
    return min(32 // itemsize, next_power_of_2(lines))


def _lines(x: Tensor, direction: str, aligned: bool) -> tuple[int, int]:
    """Rows and lines of a sweep over `x` (B, D, H, W)."""
    height, width = x.shape[2:]
    return (width, height) if aligned and direction in ("down", "up") else (height, width)


class _Sweep:
    """One sweep with stored coefficients: its maps, and launches of the kernels for them.

    Coefficients that the proxy's kernels can't expand are expanded here, for one sweep at a time.
    """

    # Rows of a band, and rows that it shares with the next at each end: as many as a launch has lines.
    BAND, HALO = 256, 32

    def __init__(self, args: tuple, k: int):
        x, gates, lam, u, skip, proxy, directions, chunk, self.normalize, aligned = args
        self.direction, self.frame = directions[k], directions[k] if aligned else "right"
        self.in_place = self.direction == self.frame
        if proxy is None:
            self.gates, self.lam = gates[:, :, k], lam[:, k]
            self.u, self.skip = (None if t is None else t[:, k] for t in (u, skip))
        else:
            weights = torch.cat([gates[:, k].flatten(0, 1), *(t[k] for t in (lam, u, skip) if t is not None)])
            # Gradients of float16's maps and weights need float32's range.
            dtype = torch.bfloat16 if x.dtype == proxy.dtype == torch.bfloat16 else torch.float32
            # (B, coefficients * D, S), (B, S, H * W)
            self.weights, self.z = weights.to(dtype).expand(len(x), -1, -1), proxy.to(dtype).flatten(2)
            self.maps = torch.bmm(self.weights, self.z).view(len(x), -1, *x.shape[1:])
            self.gates, self.lam = self.maps[:, :3], self.maps[:, 3]
            self.u = None if u is None else self.maps[:, 4]
            self.skip = None if skip is None else self.maps[:, -1]
        self.x = x if self.in_place else to_map_frame(x, self.direction)
        if self.gates.stride(-1) == 1 and not self.in_place:
            # Only if lines follow each other in all maps are several read at once.
            self.x = self.x.contiguous()
        self.batch, self.channels = self.x.shape[:2]
        self.rows, self.lines = _lines(self.x, self.direction, aligned)
        self.chunk = chunk

    def strides(self, t: Tensor | None) -> list[int]:
        """Of a (B, ..., D, H, W): batch, channel, along the line, across."""
        if t is None:
            return [0, 0, 0, 0]
        *_, d, h, w = t.stride()
        return [t.stride(0), d, *((w, h) if self.frame in ("down", "up") else (h, w))]

    def contract(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the proxy (B, S, H, W) and of the sweep's weights (coefficients, D, S).

        Args:
            maps: Gradients of the coefficients, (B, coefficients, D, H, W), contiguous.
        """
        flat = maps.flatten(1, 2).flatten(2)
        g_proxy = torch.bmm(self.weights.mT, flat).unflatten(-1, maps.shape[3:])
        g_weights = torch.bmm(flat, self.z.mT).sum(0, dtype=torch.float32).unflatten(0, maps.shape[1:3])
        return g_proxy, g_weights

    def _long(self, maps: list[Tensor | None], backward: bool) -> tuple[tuple[int], list[list], list[int], dict]:
        """Grid, numbers of every launch, strides and constants for the kernels of longer chunks.

        Args:
            maps: (B, D, H, W), or (B, 3, D, H, W).
        """
        V, strides = self._vectors(maps, 8)
        itemsize = self.x.element_size()
        # Lines of a block: 32 bytes of a row, or forward, where rows are no longer, as few as can be read at once.
        W = 4 if V == 1 else _block(self.lines, itemsize)
        if V > 1 and not backward and self.lines <= W:
            W = V
        # Backward, a thread reads its row alone, 16 bytes at once, if they can be. Else threads share the rows' pieces.
        T = min(W, 16 // itemsize) if V * itemsize >= 16 and backward else W
        blocks, chunk = cdiv(self.lines, W), min(self.chunk or self.lines, self.lines)
        sequences = self.batch * self.channels
        P = min(next_power_of_2(self.rows), self.BAND)
        bands, halo = 1, 0
        if self.rows > P:
            halo = self.HALO
            bands = cdiv(self.rows, P - 2 * halo)
        rows_inner = self.x.stride(1) != 1 or self.channels == 1
        # Lines of one warp exchange states without waiting for others, but channels are read side by side.
        N = max(1, min((32 if rows_inner else 128) // P, next_power_of_2(sequences)))
        contiguous = [self.rows * self.lines, self.lines, 1]
        flat = rows_inner and self.channels % N == 0
        flat = flat and all(self.strides(t)[1:] == contiguous for t in maps if t is not None)
        # Segments of whole chunks, no more than there are processors for.
        whole = chunk // math.gcd(chunk, W)
        segments = 1 if bands > 1 else cdiv(32 * _triton_proxy.processors(self.x), max(1, sequences // N))
        span = min(blocks, cdiv(cdiv(blocks, segments), whole) * whole)
        segments = cdiv(blocks, span)
        constants = dict(
            N=N, P=P, W=W, V=V, T=T, WHOLE=self.lines % W == 0, ROWS_INNER=rows_inner,
            ROWS=self.rows if flat and N > 1 else 0, LINES=self.lines if flat else 0,
            REVERSE=self.frame in ("left", "up"), SHORT=chunk < W, BANDS=bands > 1, NORMALIZE=self.normalize,
            HAS_U=self.u is not None, HAS_SKIP=self.skip is not None, num_warps=max(1, N * P // 32),
        )  # fmt: skip
        sizes = [sequences, self.channels, self.rows, self.lines // V, chunk]
        grid = (cdiv(sequences, N) * bands * segments,)
        step = halo // W if bands > 1 else blocks
        # What passes between launches: of the last one, and of this.
        edges = self.x.new_empty((2, sequences, self.rows) if bands > 1 else (2, 0), dtype=torch.float32)
        launches = [
            [edges[n % 2], edges[1 - n % 2], *sizes, first, min(first + step, blocks), segments, span, halo]
            for n, first in enumerate(range(0, blocks, step))
        ]
        return grid, launches, strides, constants

    def _pairs(self, maps: list[Tensor | None]) -> tuple[tuple[int], list[int], dict] | None:
        """Grid, numbers and constants for the kernels of chunks of two lines, or None if they don't fit."""
        if self.chunk != 2 or (self.x.stride(1) == 1 and self.channels > 1):
            return None
        V, strides = self._vectors(maps, 8)
        W = max(V, 2)
        blocks = cdiv(self.lines, W)
        T = 128
        constants = dict(
            T=T, W=W, V=V, ROWS_INNER=V == 1, REVERSE=self.frame in ("left", "up"), WHOLE=self.lines % W == 0,
            NORMALIZE=self.normalize, HAS_U=self.u is not None, HAS_SKIP=self.skip is not None, num_warps=T // 32,
        )  # fmt: skip
        sequences = self.batch * self.channels
        grid = (cdiv(sequences * self.rows * blocks, T),)
        return grid, [sequences, self.channels, self.rows, self.lines, blocks, *strides], constants

    def _vectors(self, maps: list[Tensor | None], most: int) -> tuple[int, list[int]]:
        """How many numbers of a row can be read at once, and all strides in units of that but those across lines.

        Args:
            maps: (B, D, H, W), or (B, 3, D, H, W).
            most: Limit of these numbers, a power of two.
        """
        each = [self.strides(t) for t in maps]
        across = {s[3] for t, s in zip(maps, each, strict=True) if t is not None}
        threes = [t.stride(1) for t in maps if t is not None and t.dim() == 5]
        V = math.gcd(self.lines, most, *threes, *(v for s in each for v in s[:3])) if across == {1} else 1
        if any(_ahead.address(t) % min(4, V * t.itemsize) for t in maps if t is not None):
            V = 1
        flat = []
        for t, s in zip(maps, each, strict=True):
            s = [v // V for v in s[:3]] + s[3:]
            flat += s if t is None or t.dim() == 4 else [s[0], t.stride(1) // V, *s[1:]]
        return V, flat

    def forward(self, y: Tensor, add: bool, borders: Tensor | None = None) -> None:
        """Writes or adds the outputs to `y` (B, D, H, W), and writes the states before blocks to `borders`."""
        maps = [self.x, self.gates, self.lam, self.u, self.skip, y]
        if pairs := self._pairs(maps):
            grid, numbers, constants = pairs
            arguments = (self.x if t is None else t for t in maps)
            _triton_pairs.line_scan_pairs_fwd_kernel[grid](*arguments, *numbers, ADD=add, **constants)
        else:
            self._forward(maps, borders, _block(self.lines, self.x.element_size()), OUTPUTS=True, ADD=add)

    def _forward(self, maps: list[Tensor | None], borders: Tensor | None, block: int, **constants) -> None:
        grid, launches, strides, common = self._long(maps, False)
        every = 0 if borders is None else block // common["W"]
        arguments = [self.x if t is None else t for t in (*maps, borders)]
        numbers = [cdiv(self.lines, block), *strides]
        for launch in launches:
            _triton_stored.line_scan_fwd_kernel[grid](*arguments, *launch, *numbers, EVERY=every, **common | constants)

    def backward(
        self, gy: Tensor, gx: Tensor, add: bool, outputs: list[Tensor | None], borders: Tensor | None = None
    ) -> None:
        """Writes or adds the gradient of `x` to `gx`, and writes those of the coefficients."""
        gx_k = gx if self.in_place else torch.empty_like(self.x, dtype=torch.float32)
        add_k = add and self.in_place
        inputs = [self.x, self.gates, self.lam, self.u, self.skip]
        # The gradients of lambda, u and skip have one set of strides.
        maps = [*inputs, gy, gx_k, *outputs[:2]]
        if pairs := self._pairs(maps):
            grid, numbers, constants = pairs
            arguments = (self.x if t is None else t for t in (*inputs, gy, gx_k, *outputs))
            _triton_pairs.line_scan_pairs_bwd_kernel[grid](*arguments, *numbers, ADD=add_k, **constants)
        else:
            grid, launches, strides, constants = self._long(maps, True)
            W = constants["W"]
            blocks = cdiv(self.lines, W)
            if blocks > 1 and (borders is None or _block(self.lines, self.x.element_size()) != W):
                borders = self.x.new_empty((self.batch, self.channels, blocks, self.rows), dtype=torch.float32)
                self._forward([*inputs, gx_k], borders, W, OUTPUTS=False, ADD=False)
            # Of an odd number of lines, what may be the last word's second.
            constants |= dict(BLOCKS=blocks > 1, LAST=min(W, self.lines + self.lines % 2))
            if constants["num_warps"] == 1:
                # Three or four warps a scheduler; in programs of many warps that costs more than it brings.
                constants |= at_most(168 if blocks > 1 else 128)
            arguments = [self.x if t is None else t for t in (*inputs, gy, gx_k, *outputs, borders)]
            for launch in reversed(launches):
                _triton_stored.line_scan_bwd_kernel[grid](*arguments, *launch, blocks, *strides, ADD=add_k, **constants)
        if not self.in_place:
            turned = from_map_frame(gx_k, self.direction)
            gx.copy_(turned + gx if add else turned)


def to_save(*args) -> list[Tensor]:
    """States that the forward meets anyway.

    With a proxy those of its kernels; else, but for chunks of two lines, those before the backward's blocks,
    (B, D, blocks, rows) of every sweep.
    """
    if _triton_proxy.suits(args):
        return _triton_proxy.to_save(*args)
    x, proxy, directions, chunk, aligned = args[0], *args[5:8], args[9]
    sizes = [_lines(x, direction, aligned) for direction in directions]
    sizes = [(cdiv(lines, _block(lines, x.dtype.itemsize)), rows) for rows, lines in sizes]
    if proxy is not None or chunk == 2 or all(blocks == 1 for blocks, _ in sizes):
        return []
    return [x.new_empty((*x.shape[:2], *size), dtype=torch.float32) for size in sizes]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, proxy, directions = args[0], args[5], args[6]
    if _triton_proxy.suits(args):
        y = _triton_proxy.forward(*args, saved=saved)
        # Those kernels write channels last, the operator's result lies in memory as x does.
        return y if x.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(x).copy_(y)
    args = _beside_coefficients(args)
    y = torch.empty_like(args[0], dtype=x.dtype if len(directions) == 1 else torch.float32)
    for k in range(len(directions)):
        _Sweep(args, k).forward(y, k > 0, saved[k] if saved else None)
    return y.to(x.dtype) if proxy is None else torch.empty_like(x).copy_(y)


def _beside_coefficients(args: tuple) -> tuple:
    """The arguments, with `x` laid out as coefficients that are expanded from a proxy, which is contiguous."""
    return args if args[5] is None else (args[0].contiguous(), *args[1:])


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, gates, lam, u, skip, proxy, directions = args[:7]
    if _triton_proxy.suits(args):
        return _triton_proxy.backward(grads, *args, saved=saved)
    args = _beside_coefficients(args)
    g_x = torch.empty_like(args[0], dtype=x.dtype if len(directions) == 1 else torch.float32)
    gy = grads[0] if proxy is None else grads[0].contiguous()
    if proxy is None:
        # The kernels have one set of strides for the gradients of lambda, u and skip.
        others = (None if t is None else torch.empty_like(lam, dtype=t.dtype) for t in (lam, u, skip))
        results = [torch.empty_like(gates), *others]
    else:
        results = [None if t is None else torch.empty_like(t, dtype=torch.float32) for t in (gates, lam, u, skip)]
        g_proxy = torch.zeros_like(proxy, dtype=torch.float32, memory_format=torch.contiguous_format)
    for k in range(len(directions)):
        sweep = _Sweep(args, k)
        if proxy is None:
            g_gates, *others = results
            outputs = [g_gates[:, :, k], *(t if t is None else t[:, k] for t in others)]
            sweep.backward(gy, g_x, k > 0, outputs, saved[k] if saved else None)
            continue
        maps = torch.empty_like(sweep.maps)
        g_u, g_skip = None if u is None else maps[:, 4], None if skip is None else maps[:, -1]
        sweep.backward(gy, g_x, k > 0, [maps[:, :3], maps[:, 3], g_u, g_skip])
        g_z, g_weights = sweep.contract(maps)
        g_proxy += g_z
        results[0][:, k] = g_weights[:3]
        for result, gradient in zip((r for r in results[1:] if r is not None), g_weights[3:], strict=True):
            result[k] = gradient
    return [g_x, *results, None if proxy is None else g_proxy]
