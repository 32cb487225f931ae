"""Compiled CPU kernels for the form that GSPN uses: coefficients of a proxy, normalised gates, `u` and `skip`.

The channels-last map is walked in place; coefficients live for one pixel and one block of channels, in registers and
first-level cache. Every other form runs in PyTorch.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .._checks import state_dtype
from .._numba import exp, jit, run_tasks
from . import _torch
from .frames import to_frame, to_map_frame

# Channels of a task: six coefficients of as many channels, and their weights, stay in the first-level cache.
_BLOCK = 96
# Sequences with the same remainder share a task, and with it the storage for the weights' gradients.
_GROUPS = 16
_MIN_TOTAL = 1e-7


@jit
def _expand(weight, proxy, pixels, first, last, out):
    """`out[i, first:last] = proxy[pixels[i]] @ weight[:, first:last]`; weight (S, 6 * size)."""
    rank = weight.shape[0]
    for i in range(pixels.size):
        p, row = proxy[pixels[i]], out[i, first:last]
        w0, p0 = weight[0, first:last], p[0]
        for j in range(row.size):
            row[j] = w0[j] * p0
        s = 1
        while s + 3 <= rank:
            w0, w1, w2 = weight[s, first:last], weight[s + 1, first:last], weight[s + 2, first:last]
            p0, p1, p2 = p[s], p[s + 1], p[s + 2]
            for j in range(row.size):
                row[j] += w0[j] * p0 + w1[j] * p1 + w2[j] * p2
            s += 3
        while s < rank:
            w0, p0 = weight[s, first:last], p[s]
            for j in range(row.size):
                row[j] += w0[j] * p0
            s += 1


@jit
def _open_gates(coefficients, size, total):
    """Logits -> sigmoids, in place, and their clamped sum; of the outer two only those that count, the others 0."""
    rows = len(coefficients)
    smallest = total.dtype.type(_MIN_TOTAL)
    for i in range(rows):
        gates = coefficients[i, : 3 * size]
        for j in range(gates.size):
            gates[j] = 1 / (1 + exp(-gates[j]))
    if rows > 1:
        coefficients[0, :size] = 0
    coefficients[rows - 1, 2 * size : 3 * size] = 0
    for i in range(rows):
        gates, sums = coefficients[i], total[i]
        for d in range(size):
            sums[d] = max(gates[d] + gates[size + d] + gates[2 * size + d], smallest)


@jit
def _advance(coefficients, total, fresh, x, pixels, d0, before, now):
    """States of a line, (rows + 2, size) with a zero at either end, from those of the line before."""
    size = now.shape[1]
    for i in range(pixels.size):
        gates, lam, value = coefficients[i], coefficients[i, 3 * size :], now[i + 1]
        x_pixel = x[pixels[i], d0 : d0 + size]
        if fresh:
            for d in range(size):
                value[d] = lam[d] * x_pixel[d]
        else:
            left, middle, right, sums = before[i], before[i + 1], before[i + 2], total[i]
            for d in range(size):
                value[d] = gates[d] * left[d] + gates[size + d] * middle[d] + gates[2 * size + d] * right[d]
            for d in range(size):
                value[d] = value[d] / sums[d] + lam[d] * x_pixel[d]


@jit
def _local_weight(weight, d0, size):
    """(S, 6, D) -> the block's (S, 6 * size)."""
    local = np.empty((weight.shape[0], 6 * size), weight.dtype)
    for s in range(weight.shape[0]):
        for p in range(6):
            local[s, p * size : (p + 1) * size] = weight[s, p, d0 : d0 + size]
    return local


@jit
def line_scan_fwd_kernel(task, block, groups, x, proxy, weight, source, target, rows, chunk, y):
    """Adds the outputs of one block of channels of one group of sequences to `y`.

    x, y (B, L, D); proxy (B, L, S); weight (K, S, 6, D) for the three gates, lambda, u and skip; source, target (K, L)
    pixels that are read and written, line by line; rows (K,) pixels of a line.
    """
    batch, length, width = x.shape
    group = task % groups
    d0 = (task // groups) * block
    size = min(block, width - d0)
    for k in range(weight.shape[0]):
        n = rows[k]
        local = _local_weight(weight[k], d0, size)
        coefficients, total = np.empty((n, 6 * size), x.dtype), np.empty((n, size), x.dtype)
        states = np.zeros((2, n + 2, size), x.dtype)
        for b in range(group, batch, groups):
            for line in range(length // n):
                read, written = source[k, line * n : (line + 1) * n], target[k, line * n : (line + 1) * n]
                fresh = line % chunk == 0
                before, now = states[(line + 1) % 2], states[line % 2]
                _expand(local, proxy[b], written, 3 * size if fresh else 0, 6 * size, coefficients)
                if not fresh:
                    _open_gates(coefficients, size, total)
                _advance(coefficients, total, fresh, x[b], read, d0, before, now)
                for i in range(n):
                    u, skip, value = coefficients[i, 4 * size :], coefficients[i, 5 * size :], now[i + 1]
                    x_pixel, y_pixel = x[b, read[i], d0 : d0 + size], y[b, written[i], d0 : d0 + size]
                    for d in range(size):
                        y_pixel[d] += u[d] * value[d] + skip[d] * x_pixel[d]


@jit
def _gate_gradients(coefficients, total, h_before, gh, carried, flow, mean, g):
    """Gradients of a line's logits, and what its states' gradients hand to the line before."""
    size = total.shape[1]
    zero, smallest = total.dtype.type(0), total.dtype.type(_MIN_TOTAL)
    for i in range(len(total)):
        gates, sums, gradient = coefficients[i], total[i], gh[i + 1]
        for d in range(size):
            flow[d] = gradient[d] / sums[d]
        for offset in range(3):
            gate, handed = gates[offset * size :], carried[i + offset]
            for d in range(size):
                handed[d] += gate[d] * flow[d]
        left, middle, right = h_before[i], h_before[i + 1], h_before[i + 2]
        for d in range(size):
            mean[d] = gates[d] * left[d] + gates[size + d] * middle[d] + gates[2 * size + d] * right[d]
        for d in range(size):
            mean[d] = mean[d] / sums[d] if sums[d] > smallest else zero
        for offset in range(3):
            gate, neighbour, out = gates[offset * size :], h_before[i + offset], g[i, offset * size :]
            for d in range(size):
                out[d] = flow[d] * (neighbour[d] - mean[d]) * gate[d] * (1 - gate[d])


@jit
def _contract(g, weight, proxy, pixels, first, g_weight, g_proxy):
    """Adds to the gradients of `_expand`'s weight and proxy those that come from `g[:, first:]`."""
    for s in range(weight.shape[0]):
        w, g_w = weight[s, first:], g_weight[s, first:]
        for i in range(pixels.size):
            row, p = g[i, first:], proxy[pixels[i], s]
            for j in range(row.size):
                g_w[j] += p * row[j]
        for i in range(pixels.size):
            row, total = g[i, first:], g.dtype.type(0)
            for j in range(row.size):
                total += w[j] * row[j]
            g_proxy[pixels[i], s] += total


@jit
def line_scan_bwd_kernel(
    task, block, groups, x, proxy, weight, source, target, rows, chunk, gy, gx, g_proxy, g_weight
):  # fmt: skip
    """Gradients that come from one block of channels of one group of sequences; shapes as in the forward.

    So that no two tasks write to one place, g_weight has a leading axis of groups and g_proxy one of channel blocks.
    """
    batch, length, width = x.shape
    group, part = task % groups, task // groups
    d0 = part * block
    size = min(block, width - d0)
    flow, mean = np.empty(size, x.dtype), np.empty(size, x.dtype)
    for k in range(weight.shape[0]):
        n = rows[k]
        local = _local_weight(weight[k], d0, size)
        g_local = np.zeros_like(local)
        coefficients, g = np.empty((n, 6 * size), x.dtype), np.empty((n, 6 * size), x.dtype)
        total = np.empty((n, size), x.dtype)
        states = np.zeros((length // n, n + 2, size), x.dtype)
        adjoint = np.zeros((2, n + 2, size), x.dtype)
        for b in range(group, batch, groups):
            for line in range(length // n):
                read, written = source[k, line * n : (line + 1) * n], target[k, line * n : (line + 1) * n]
                fresh = line % chunk == 0
                _expand(local, proxy[b], written, 3 * size if fresh else 0, 4 * size, coefficients)
                if not fresh:
                    _open_gates(coefficients, size, total)
                _advance(coefficients, total, fresh, x[b], read, d0, states[line - 1], states[line])

            adjoint[:] = 0
            for line in range(length // n - 1, -1, -1):
                read, written = source[k, line * n : (line + 1) * n], target[k, line * n : (line + 1) * n]
                fresh = line % chunk == 0
                first = 3 * size if fresh else 0
                gh, carried = adjoint[line % 2], adjoint[(line + 1) % 2]
                carried[:] = 0
                _expand(local, proxy[b], written, first, 6 * size, coefficients)
                for i in range(n):
                    lam, u, skip = coefficients[i, 3 * size :], coefficients[i, 4 * size :], coefficients[i, 5 * size :]
                    g_lam, g_u, g_skip = g[i, 3 * size :], g[i, 4 * size :], g[i, 5 * size :]
                    x_pixel, gx_pixel = x[b, read[i], d0 : d0 + size], gx[b, read[i], d0 : d0 + size]
                    gy_pixel, value, gradient = gy[b, written[i], d0 : d0 + size], states[line, i + 1], gh[i + 1]
                    for d in range(size):
                        gradient[d] += gy_pixel[d] * u[d]
                    for d in range(size):
                        gx_pixel[d] += gradient[d] * lam[d] + gy_pixel[d] * skip[d]
                    for d in range(size):
                        g_lam[d] = gradient[d] * x_pixel[d]
                    for d in range(size):
                        g_u[d] = gy_pixel[d] * value[d]
                    for d in range(size):
                        g_skip[d] = gy_pixel[d] * x_pixel[d]
                if not fresh:
                    _open_gates(coefficients, size, total)
                    _gate_gradients(coefficients, total, states[line - 1], gh, carried, flow, mean, g)
                _contract(g, local, proxy[b], written, first, g_local, g_proxy[part, b])
        for s in range(local.shape[0]):
            for p in range(6):
                g_weight[group, k, s, p, d0 : d0 + size] = g_local[s, p * size : (p + 1) * size]


@lru_cache(maxsize=64)
def _orders(directions: tuple[str, ...], height: int, width: int, aligned: bool) -> tuple[np.ndarray, ...]:
    """Pixels (K, L) that each sweep reads and those that it writes, line by line, and the pixels of a line (K,)."""
    pixels = torch.arange(height * width, device="cpu").view(height, width)
    source, target, rows = [], [], []
    for direction in directions:
        turned = to_frame(pixels, direction)
        source.append((turned if aligned else to_map_frame(pixels, direction)).t().flatten())
        target.append((turned if aligned else pixels).t().flatten())
        rows.append(len(turned) if aligned else height)
    return torch.stack(source).numpy(), torch.stack(target).numpy(), np.array(rows)


def _pixels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> contiguous (B, L, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).to(dtype).contiguous()


def _suits(args: tuple) -> bool:
    """Whether the compiled kernels have this form."""
    _, _, _, u, skip, proxy, _, _, normalize, _ = args
    return normalize and u is not None and skip is not None and proxy is not None and proxy.shape[1] > 0


def _prepare(args: tuple) -> tuple[int, tuple]:
    """Number of tasks, and the kernels' common arguments."""
    x, gates, lam, u, skip, proxy, directions, chunk, _, aligned = args
    dtype = state_dtype(x)
    batch, channels, height, width = x.shape
    weight = torch.cat([gates.to(dtype), torch.stack([lam, u, skip]).to(dtype)])
    # Equal blocks, but whole vector registers.
    block = -(-channels // -(-channels // _BLOCK) // 16) * 16
    blocks, groups = -(-channels // block), max(1, min(batch, _GROUPS))
    arrays = (_pixels_first(x, dtype), _pixels_first(proxy, dtype), weight.permute(1, 3, 0, 2).contiguous())
    orders = _orders(tuple(directions), height, width, aligned)
    return blocks * groups, (block, groups, *(t.detach().numpy() for t in arrays), *orders, chunk or max(height, width))


def forward(*args) -> Tensor:
    if not _suits(args):
        return _torch.forward(*args)
    x = args[0]
    tasks, kernel_args = _prepare(args)
    y = x.new_zeros(x.shape[0], x.shape[2] * x.shape[3], x.shape[1], dtype=state_dtype(x))
    run_tasks(line_scan_fwd_kernel, tasks, *kernel_args, y.numpy())
    return torch.empty_like(x).copy_(y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


def backward(grads: list[Tensor], *args) -> list[Tensor | None]:
    if not _suits(args):
        return _torch.backward(grads, *args)
    x = args[0]
    tasks, (block, groups, *arrays) = _prepare(args)
    dtype = state_dtype(x)
    gy = _pixels_first(grads[0], dtype)
    gx = torch.zeros_like(gy)
    g_proxy = x.new_zeros(tasks // groups, *arrays[1].shape, dtype=dtype)
    g_weight = x.new_zeros(groups, *arrays[2].shape, dtype=dtype)
    run_tasks(line_scan_bwd_kernel, tasks, block, groups, *arrays, *(t.numpy() for t in (gy, gx, g_proxy, g_weight)))
    gx, g_proxy = (t.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2) for t in (gx, g_proxy.sum(0)))
    g_gates, g_lam, g_u, g_skip = g_weight.sum(0).permute(2, 0, 3, 1).split([3, 1, 1, 1])
    return [gx, g_gates, g_lam[0], g_u[0], g_skip[0], g_proxy]
