"""Kernels compiled side by side, before they are launched one after the other.

What a function launches depends on its tensors' layouts alone. So it is run with fake tensors, what it would launch is
noted, and other processes compile it into Triton's cache on disk. Threads would mostly wait for each other: Triton
reads the source of a kernel in Python.
"""

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What `Compilation` starts: this module in a package without models, whose imports take seconds.
_COMMAND = """
import sys, types
package = sys.modules["vla"] = types.ModuleType("vla")
package.__path__ = [sys.argv[1]]
from vla.ops import _ahead
_ahead.serve()
"""


class _Thread(threading.local):
    compilation: "Compilation | None" = None


_thread = _Thread()


def current() -> "Compilation | None":
    """What this thread notes launches in instead of launching."""
    return _thread.compilation


class Compilation:
    """Takes note of launches and has them compiled."""

    def __init__(self):
        package = Path(__file__).parent.parent
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        # Started first: the imports take as long as to find the launches.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, package],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._launches: dict[tuple, tuple] = {}

    def add(self, kernel, *args, **kwargs) -> None:
        """A launch of a `Kernel`."""
        args, kwargs = [_placeholder(x) for x in args], {name: _placeholder(x) for name, x in kwargs.items()}
        named = dict(zip(kernel.jit.arg_names, args, strict=False)) | kwargs
        key = (kernel.jit, *(_likeness(x, kernel.jit, name) for name, x in named.items()))
        self._launches.setdefault(key, (kernel.__module__, kernel.__name__, args, kwargs))

    def finish(self) -> None:
        """Returns when all is compiled. What could not be compiled fails again when it is launched."""
        from triton.runtime import driver

        self._process.communicate(pickle.dumps((driver.active.get_current_target(), list(self._launches.values()))))


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


def _placeholder(x: Any) -> Any:
    return x.dtype if isinstance(x, Tensor) else x


def _likeness(x: Any, jit, name: str) -> tuple:
    """What Triton compiles for: constants as they are, of other integers no more than size and divisibility."""
    parameter = next((p for p in jit.params if p.name == name), None)
    if type(x) is not int or parameter is None or parameter.is_constexpr:
        return name, type(x), x
    small = -(2**31) <= x < 2**31
    return (name, small) if parameter.do_not_specialize else (name, small, x == 1, x % 16 == 0)


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


def serve() -> None:
    """Compiles what `Compilation` sends."""
    from triton.runtime import driver

    target, launches = pickle.load(sys.stdin.buffer)
    driver.set_active(_Device(target))
    if launches:
        _compile(*launches[0])  # what all kernels need once
    with ProcessPoolExecutor(processors(), multiprocessing.get_context("fork")) as pool:
        # From the end, where a backward's are, which take longest.
        wait([pool.submit(_compile, *launch) for launch in reversed(launches)])


def _compile(module: str, name: str, args: list, kwargs: dict) -> None:
    getattr(importlib.import_module(module), name).jit.warmup(*args, grid=(1,), **kwargs)
