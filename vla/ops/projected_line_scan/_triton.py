"""The projected scan with the kernels of `line_scan`, and one that takes the gradient of x through the proxy, too."""

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .._maps import pixels
from .._triton import cdiv, dot, dot_add, kernel, next_power_of_2
from ..line_scan import _triton as scan
from ..line_scan import _triton_proxy as proxy_scan
from . import project
from .project import scan_arguments


@kernel(do_not_specialize=["units"])
def projected_line_scan_proxy_kernel(
    x, weight, projected, rows, units,
    S: tl.constexpr, R: tl.constexpr, U: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Proxy of P pixels of x (rows, units U), in C channels at a time."""
    channels = units * U
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)[:, None]
    s = tl.arange(0, R)[None, :]
    total = tl.zeros((P, R), tl.float32)
    for start in range(0, channels, C):
        c = start + tl.arange(0, C)
        pixels = tl.load(x + row * channels + c[None, :], (row < rows) & (c < channels)[None, :], 0.0)  # (P, C)
        w = tl.load(weight + s * channels + c[:, None], (s < S) & (c < channels)[:, None], 0.0)  # (C, R)
        total = dot_add(pixels, w.to(pixels.dtype), total)
    tl.store(projected + row * S + s, total.to(projected.dtype.element_ty), (row < rows) & (s < S))


@kernel(do_not_specialize=["units"])
def projected_line_scan_sum_kernel(
    gx, gz, weight, total, rows, units,
    K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, U: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradient of P pixels of x through the scan, gx (K, rows, units U), and through its proxy's, gz (rows, S)."""
    channels = units * U
    blocks = tl.cdiv(channels, C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * P + tl.arange(0, P)[:, None]
    c = tl.program_id(0) % blocks * C + tl.arange(0, C)[None, :]
    s = tl.arange(0, R)
    mask = (row < rows) & (c < channels)
    at = row * channels + c
    value = tl.load(gx + at, mask, 0.0).to(tl.float32)
    for k in tl.static_range(1, K):
        value += tl.load(gx + k * tl.cast(rows, tl.int64) * channels + at, mask, 0.0).to(tl.float32)
    z = tl.load(gz + row * S + s[None, :], (row < rows) & (s < S)[None, :], 0.0)  # (P, R)
    w = tl.load(weight + s[:, None] * channels + c, (s < S)[:, None] & (c < channels), 0.0)  # (R, C)
    value += dot(z, w)
    tl.store(total + at, value.to(total.dtype.element_ty), mask)


def to_save(*args) -> list[Tensor]:
    """The proxy of all pixels, (B H W, S), and what the scan saves."""
    x, weight, *_ = args
    projected = x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], weight.shape[0]))
    return [projected, *scan.to_save(*scan_arguments(projected, args))]


def proxy_of(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The proxy of all pixels, (B H W, S), for few channels without a library's product, which takes a tenth longer."""
    rows, (rank, channels) = pixels(x), weight.shape
    if x.dtype.itemsize != 2 or rows.stride() != (channels, 1) or rank > 32 or channels > 256:
        return torch.mm(rows, weight.to(x.dtype).T, out=out)
    out = x.new_empty(len(rows), rank) if out is None else out
    if len(rows) > 0:
        unit = math.gcd(channels, 16)
        P = 128
        projected_line_scan_proxy_kernel[(cdiv(len(rows), P),)](
            rows, weight.contiguous(), out, len(rows), channels // unit,
            S=rank, R=max(16, next_power_of_2(rank)), U=unit, P=P, C=64, num_stages=3,
        )  # fmt: skip
    return out


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, weight, *_ = args
    projected = proxy_of(x, weight, saved[0] if saved else None)
    return scan.forward(*scan_arguments(projected, args), saved=saved[1:])


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, weight, *_ = args
    rows, matrix = pixels(x), weight.to(x.dtype).contiguous()
    projected, *states = saved or [proxy_of(x, weight)]
    arguments = scan_arguments(projected, args)
    if not proxy_scan.suits(arguments):
        return project.backward(scan, grads, args)

    def join(gx: Tensor, g_proxy: Tensor) -> Tensor:
        (sweeps, *_, channels), rank, total = gx.shape, len(matrix), torch.empty_like(gx[0], dtype=x.dtype)
        P, C, unit = 64, 32, math.gcd(channels, 16)
        projected_line_scan_sum_kernel[(cdiv(len(rows), P) * cdiv(channels, C),)](
            gx, g_proxy, matrix, total, len(rows), channels // unit,
            K=sweeps, S=rank, R=max(16, next_power_of_2(rank)), U=unit, P=P, C=C,
        )  # fmt: skip
        return total

    gx, *g_weights, g_proxy = proxy_scan.backward(grads, *arguments, join=join, saved=states)
    return [gx, pixels(g_proxy).T @ rows, *g_weights]
