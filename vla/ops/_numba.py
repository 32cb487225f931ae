"""What the compiled CPU kernels share: vectorisable elementary functions, and running one kernel on several threads."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload, register_jitable

# Sums may be reordered and products fused, as in any vectorised code; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "arcp", "nsz"}

jit = numba.njit(fastmath=FAST, nogil=True, cache=True, error_model="numpy")
inline = register_jitable(fastmath=FAST, error_model="numpy")

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@inline
def _exp_float32(x):
    """exp in float32 by range reduction and a polynomial (Cephes); 0 below -87.3, infinite above 88.3."""
    t = min(max(x, np.float32(-87.33)), np.float32(89))
    n = np.floor(t * _LOG2_E + np.float32(0.5))
    r = t - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    scale = np.int32((np.int32(n) + 127) << 23).view(np.float32)
    return p * scale if x > np.float32(-87.33) else np.float32(0)


@inline
def _log1p_unit_float32(t):
    """log(1 + t) for 0 <= t <= 1 in float32, by the series of 2 artanh(t / (2 + t))."""
    s = t / (np.float32(2) + t)
    q = s * s
    p = np.float32(2 / 15)
    p = p * q + np.float32(2 / 13)
    p = p * q + np.float32(2 / 11)
    p = p * q + np.float32(2 / 9)
    p = p * q + np.float32(2 / 7)
    p = p * q + np.float32(2 / 5)
    p = p * q + np.float32(2 / 3)
    return s * (p * q + np.float32(2))


def exp(x):
    """exp of a scalar inside a compiled kernel; in float32 a form that vectorises."""
    raise NotImplementedError("compiled kernels only")


def log1p_unit(t):
    """log(1 + t) for 0 <= t <= 1 inside a compiled kernel."""
    raise NotImplementedError("compiled kernels only")


@overload(exp, fastmath=FAST, inline="always")
def _overload_exp(x):
    return (lambda x: _exp_float32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(log1p_unit, fastmath=FAST, inline="always")
def _overload_log1p_unit(t):
    return (lambda t: _log1p_unit_float32(t)) if t == types.float32 else (lambda t: math.log1p(t))


@inline
def softplus(x):
    """log(1 + exp(x)) inside a compiled kernel."""
    return max(x, x * 0) + log1p_unit(exp(-abs(x)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="vla")


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_tasks(kernel: Callable, tasks: int, *args) -> None:
    """Calls `kernel(task, *args)` for every task of `range(tasks)`, on PyTorch's number of threads, this one included.

    The kernels release the interpreter lock. A pool of our own instead of Numba's parallel loops: those end the process
    when two threads launch them at once, and take several times longer to compile.
    """
    queue = iter(range(tasks))

    def work() -> None:
        for task in queue:
            kernel(task, *args)

    helpers = min(torch.get_num_threads(), tasks) - 1
    futures = [_pool(torch.get_num_threads() - 1).submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        future.result()
