"""Kernels compiled side by side, before they are launched one after the other.

What a function launches depends on its tensors' layouts alone. So it is run with fake tensors, and what it would launch
is compiled by other processes into Triton's cache on disk. Threads would mostly wait for each other: Triton reads the
source of a kernel in Python.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from typing import Any

import torch
from torch import Tensor

# Most processes: each has to be forked, and there are not that many kernels.
_PROCESSES = 16
# Seconds without a new kernel after which the rest is given up.
_PATIENCE = 120


class _Thread(threading.local):
    compilation: "Compilation | None" = None


_thread = _Thread()


def current() -> "Compilation | None":
    """What this thread hands its launches to instead of launching."""
    return _thread.compilation


class Compilation:
    """Has launches compiled by a pool of processes."""

    def __init__(self):
        from triton.runtime import driver

        self._launcher = driver.active.launcher_cls
        # Forks, because to import PyTorch takes as long as to compile. They have one thread and stay off the GPU.
        context, others = multiprocessing.get_context("fork"), multiprocessing.active_children()
        device = _Device(driver.active.get_current_target())
        self._pool = context.Pool(min(processors(), _PROCESSES), _begin, (device,))
        self._processes = [process for process in multiprocessing.active_children() if process not in others]
        self._results: dict[tuple, AsyncResult] = {}
        self._signatures: set[tuple] = set()

    def add(self, kernel, *args, **kwargs) -> None:
        """A launch of a `Kernel`."""
        args, kwargs = [_placeholder(x) for x in args], {name: _placeholder(x) for name, x in kwargs.items()}
        arguments = dict(zip(kernel.jit.arg_names, args, strict=False)) | kwargs
        likeness = _likeness(kernel.jit, arguments)
        key = (kernel, likeness)
        if key in self._results:
            return
        signature = _signature(kernel.jit, likeness)
        launcher = None if signature in self._signatures else self._launcher
        self._signatures.add(signature)
        work = (kernel.__module__, kernel.__name__, args, kwargs, launcher)
        self._results[key] = self._pool.apply_async(_compile, work)

    def finish(self) -> None:
        """Returns when all is compiled. What could not be compiled is compiled, or fails again, when it is launched."""
        pending, last = list(self._results.values()), time.monotonic()
        # With a process that dies, what it was about is lost.
        while pending and all(process.is_alive() for process in self._processes):
            pending[0].wait(1.0)
            left = [result for result in pending if not result.ready()]
            if len(left) < len(pending):
                last = time.monotonic()
            elif time.monotonic() - last > _PATIENCE:
                break
            pending = left
        self._pool.terminate()


_at_compilation: Callable[[], None] | None = None


def at_compilation(function: Callable[[], None] | None) -> None:
    """Has `function` called once, after Triton has compiled the next kernel that is not in its cache on disk."""
    global _at_compilation
    _at_compilation = function


def listen(other: Callable | None, *, cache_hit: bool, **details) -> None:
    """What Triton calls after every compilation.

    Args:
        other: What it would call without us.
        cache_hit: Whether the kernel was in Triton's cache on disk.
        **details: Of the kernel.
    """
    if other is not None:
        other(cache_hit=cache_hit, **details)
    function = _at_compilation
    if function is not None and not cache_hit and processors() > 1:
        at_compilation(None)
        function()


@contextmanager
def compile_launches() -> Iterator[None]:
    """Compiles what this thread would launch inside, where tensors must be fake, and ends when that is done."""
    compilation = _thread.compilation = Compilation()
    try:
        yield
    finally:
        _thread.compilation = None
        compilation.finish()


def processors() -> int:
    """Those that this process may use, shared with the other processes of a distributed training on this machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def address(x: Tensor) -> int:
    """Where a tensor starts, of a fake one in its memory."""
    return x.data_ptr() if _thread.compilation is None else x.storage_offset() * x.itemsize


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks a tensor that is not launched with."""

    dtype: torch.dtype
    start: int

    def data_ptr(self) -> int:
        return self.start

    def ptr_range(self) -> int:
        return 0  # of which AMD's compiler hopes for less than 2 GB


def _placeholder(x: Any) -> Any:
    return _Pointer(x.dtype, address(x) % 16) if isinstance(x, Tensor) else x


def _likeness(jit, arguments: dict[str, Any]) -> tuple:
    """What Triton compiles for: constants as they are, of other integers no more than size and divisibility."""
    parameters = {parameter.name: parameter for parameter in jit.params}
    likeness = []
    for name, x in arguments.items():
        parameter = parameters.get(name)
        if type(x) is int and parameter is not None and not parameter.is_constexpr:
            x = (abs(x) < 2**31, *((x == 1, x % 16 == 0) if not parameter.do_not_specialize else ()))
        likeness.append((name, x))
    return tuple(likeness)


def _signature(jit, likeness: tuple) -> tuple:
    """Equal for kernels that Triton launches with the same C code, which knows no constants and no alignment."""
    arguments, signature = dict(likeness), []
    for parameter in jit.params:
        x = None if parameter.is_constexpr else arguments.get(parameter.name)
        if isinstance(x, _Pointer):
            signature.append(x.dtype)
        else:
            signature.append(x[:2] if type(x) is tuple else type(x))
    return tuple(signature)


class _Device:
    """What Triton asks its driver when it compiles."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _begin(device: _Device) -> None:
    """First of all in a process that compiles."""
    from triton.runtime import driver

    # It ends soon, and to look through what it shares with the program would copy all of that.
    gc.disable()
    # Handlers of the program are not meant for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    driver.set_active(device)


def _compile(module: str, name: str, args: list, kwargs: dict, launcher: Callable | None) -> None:
    binary = getattr(importlib.import_module(module), name).compile(*args, **kwargs)
    # Up to Triton 3.6, C code that is compiled too. Later ones ask for more of the GPU, but have nothing to compile.
    if launcher is not None:
        with suppress(Exception):
            launcher(binary.src, binary.metadata)
