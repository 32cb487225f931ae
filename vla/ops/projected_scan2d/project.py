"""The projection of all pixels as one matrix product, and what it makes of a backend of `scan2d`."""

from types import ModuleType

import torch
from torch import Tensor

from .._maps import as_map, pixels
from ..layer_norm import _torch as layer_norm


def matrix_of(weight: Tensor, x: Tensor) -> Tensor:
    """The weight (K, R + 2N, D) as a matrix (K (R + 2N), D) of neighbouring channels, in the dtype of x."""
    return weight.flatten(0, 1).to(x.dtype).contiguous()


def scan_arguments(projected: Tensor, args: tuple) -> tuple:
    """The arguments of `scan2d`, from the projections (B H W, K (R + 2N)), and the arguments here."""
    x, _, A, directions, D, dt_weight, dt_bias, delta_softplus, per_line, *_ = args
    rank, states = dt_weight.shape[2], A.shape[2]
    rows = projected.view(x.shape[0], *x.shape[2:], A.shape[0], rank + 2 * states).permute(0, 3, 4, 1, 2)
    dt, B, C = rows.split([rank, states, states], dim=2)
    return x, dt, A, B, C, directions, D, dt_weight, dt_bias, delta_softplus, False, per_line


def norm_arguments(y: Tensor, args: tuple) -> tuple:
    """The arguments of `layer_norm`, from the scans' sum and the arguments here."""
    *_, norm_weight, norm_bias, eps = args
    return y.permute(0, 2, 3, 1), None, norm_weight, norm_bias, None, 1, eps, None


def forward(scan: ModuleType, args: tuple) -> Tensor:
    """The forward, by a backend of `scan2d`."""
    x, weight, *_, norm_weight, _, _ = args
    y = scan.forward(*scan_arguments(pixels(x) @ matrix_of(weight, x).T, args))
    if norm_weight is None:
        return y
    rows, _ = layer_norm.forward(*norm_arguments(y, args))
    return torch.empty_like(y).copy_(rows.permute(0, 3, 1, 2))


def backward(scan: ModuleType, grads: list[Tensor], args: tuple) -> list[Tensor | None]:
    """The backward, by a backend of `scan2d`."""
    x, weight, *_, norm_weight, _, _ = args
    x_rows, matrix = pixels(x), matrix_of(weight, x)
    arguments = scan_arguments(x_rows @ matrix.T, args)
    g_norm: list[Tensor | None] = [None, None]
    if norm_weight is not None:
        g_rows = [g.permute(0, 2, 3, 1) for g in grads]
        g_y, _, *g_norm = layer_norm.backward(g_rows, *norm_arguments(scan.forward(*arguments), args))[:4]
        grads = [g_y.permute(0, 3, 1, 2)]
    gx, g_dt, g_A, g_B, g_C, *g_parameters = scan.backward(grads, *arguments)
    g_rows = torch.cat([g.permute(0, 3, 4, 1, 2) for g in (g_dt, g_B, g_C)], dim=-1)
    g_rows = g_rows.reshape(x_rows.shape[0], matrix.shape[0]).to(x.dtype)
    gx = gx.to(x.dtype) + as_map(g_rows @ matrix, x)
    return [gx, (g_rows.T @ x_rows).view(weight.shape), g_A, *g_parameters, *g_norm]
