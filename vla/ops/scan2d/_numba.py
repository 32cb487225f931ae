"""Directional scan on the CPU by compiled kernels: the channels-last map is walked in place in every direction."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..selective_scan._numba import Walk


@lru_cache(maxsize=64)
def _orders(directions: tuple[str, ...], height: int, width: int) -> np.ndarray:
    """(K, L) pixel number visited at each step of each direction."""
    pixels = np.arange(height * width).reshape(height, width)
    orders = []
    for direction in directions:
        order = (pixels.T if direction.startswith("col") else pixels).ravel()
        orders.append(order[::-1] if direction.endswith("rev") else order)
    return np.stack(orders)


def _pixels_first(x: Tensor) -> Tensor:
    """(B, ..., H, W) -> (B, L, ...), a view where the map is channels-last."""
    return x.movedim((-2, -1), (1, 2)).flatten(1, 2)


def _map(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_pixels_first`."""
    return x.unflatten(1, (height, width)).movedim((1, 2), (-2, -1))


def _walk(x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, grouped, per_line) -> Walk:
    height, width = x.shape[-2:]
    steps = np.arange(height * width)
    lines = [(height if direction.startswith("col") else width) if per_line else steps.size for direction in directions]
    return Walk(
        x=_pixels_first(x),
        low=_pixels_first(dt),
        weight=None if dt_weight is None else dt_weight.transpose(1, 2),
        bias=dt_bias,
        A=A.transpose(1, 2),
        B=_pixels_first(B),
        C=_pixels_first(C),
        skip=D,
        order=_orders(tuple(directions), height, width),
        fresh=np.stack([steps % line == 0 for line in lines]),
        grouped=grouped,
        softplus=delta_softplus,
    )


def forward(*args) -> Tensor:
    x = args[0]
    y, _ = _walk(*args).forward()
    return torch.empty_like(x).copy_(_map(y, *x.shape[-2:]))


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    x, D, dt_weight, dt_bias = args[0], *args[6:9]
    height, width = x.shape[-2:]
    gx, g_low, g_weight, g_bias, gA, gB, gC, g_skip = _walk(*args).backward(_pixels_first(grads[0]), None)
    gx, g_low, gB, gC = (_map(g, height, width) for g in (gx, g_low, gB, gC))
    return [
        gx,
        g_low,
        gA.transpose(1, 2),
        gB,
        gC,
        None if D is None else g_skip,
        None if dt_weight is None else g_weight.transpose(1, 2),
        None if dt_bias is None else g_bias,
    ]
