"""Blocks and networks that repeat, for one more map of a size, what they did for the last one.

A small model in eager mode waits for the host, and most of what that does is to find out again what it has to do: calls
of modules, layouts, casts of weights. So what operators do (`vla/ops/_replay.py`) whole modules do as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from ..ops import _bound, _registry, _replay
from .hooks import PACKAGES, has_global_hooks, hooks_of

__all__ = ["Repeated", "is_repeated"]

# Types of arguments beside the map.
_CONSTANTS = (tuple, type(None))


class _Snapshot:
    """What the results of a module depend on beside its input and the numbers in its parameters.

    Attributes:
        tensors: Parameters and buffers.
        is_all: Whether there is nothing else.
    """

    def __init__(self, module: nn.Module):
        # Not the modules themselves: with a reference to the one that keeps this, memory would have to be collected.
        modules = list(module.modules())
        self.live = [d for m in modules for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        # Lists may be changed in place.
        self.copies = [{k: v.copy() if type(v) is list else v for k, v in d.items()} for d in self.live]
        self.places = [d for m in modules for d in (m._parameters, m._buffers)]
        self.hooks = [hooks for m in modules for hooks in hooks_of(m)]
        self.is_hooked = any(self.hooks)
        self.tensors = [*module.parameters(), *module.buffers()]
        self.layouts = self._layouts()
        self.is_all = not self.is_hooked and all(self._are_plain(modules))

    def _are_plain(self, modules: list[nn.Module]) -> Iterator[bool]:
        for m in modules:
            yield type(m).__module__.startswith(PACKAGES) and m._compiled_call_impl is None
            # A method of one's own, or a compiled one, in the place of the class's.
            yield not any(callable(getattr(type(m), name, None)) for name in m.__dict__)
        for t in self.tensors:
            yield type(t) in (Tensor, nn.Parameter)

    def _layouts(self) -> list[tuple]:
        tensors = (t for place in self.places for t in place.values() if t is not None)
        # A tensor of one number may equal the one it replaces.
        return [(id(t), t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]

    def holds(self) -> bool:
        """Whether all is still the same."""
        try:
            same = self.live == self.copies
        except (RuntimeError, ValueError):  # of tensors, of arrays: those that are the same ones are not compared
            return False
        return same and any(self.hooks) == self.is_hooked and self._layouts() == self.layouts


class _Repetitions:
    """Those of one module, as it is now.

    Attributes:
        snapshot: What they hold for.
        known: By layout of the input the number of calls, then a repetition, or None if that is not possible.
    """

    def __init__(self, module: nn.Module):
        self.snapshot = _Snapshot(module)
        self.known: dict[tuple, object] = {}


def _has_function_mode() -> bool:
    """Whether there is another mode than those of default devices."""
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def _is_observed() -> bool:
    """Whether a compiler, a tracer, a mode, forward-mode derivatives or a hook on all modules look on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or _has_function_mode()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or has_global_hooks()
    )


class Repeated(nn.Module):
    """Base class of modules whose evaluation on small maps on a GPU is repeated from the fourth call with a layout on.

    That needs a module of parts of this package, timm and PyTorch, without hooks, and no gradients; modules in it may
    be repeated where the whole is not. Numbers in parameters may change. Whatever else is changed, attributes, hooks,
    parts, the place of a parameter, makes it start anew, and so does training. What is computed on the way stays in one
    workspace for all of a stream's repetitions, see `vla/ops/_bound.py`.
    """

    # No part of the module's state, and no key in a table of all: what it holds may refer to the module. None after the
    # first call, as some modules live for one.
    __slots__ = ("_repeated",)

    # Numbers in a map up to which a recording has memory to keep all that it computes, and from which on a GPU takes
    # longer than the host.
    LIMIT = 2**24
    # A network's repetition takes a megabyte of the host's memory. One with ever new sizes starts anew.
    LAYOUTS = 128

    def __call__(self, x, *args, **kwargs):
        if torch.is_grad_enabled() or self.training or type(x) is not Tensor or kwargs or _is_observed():
            return super().__call__(x, *args, **kwargs)
        is_small = x.numel() <= self.LIMIT and all(type(a) in _CONSTANTS for a in args)
        stream = _replay.stream_of(x) if is_small else None
        own = None if stream is None else self._repetitions()
        if own is None or not own.snapshot.is_all:
            return super().__call__(x, *args)
        kind, pointer = x.device.type, x.data_ptr()
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        layout = (x.shape, x.stride(), x.dtype, x.get_device(), pointer % 16, autocast, _registry._override, *args)
        known = own.known.get(layout, 0)
        if callable(known):
            return known(x, pointer, stream)
        if known == 1:
            try:
                return self._record(own, layout, x, *args)
            except torch.OutOfMemoryError:  # as a recording keeps all that is computed
                own.known[layout] = None
        if known == 0:
            if len(own.known) >= self.LAYOUTS:
                own.known.clear()
            own.known[layout] = 1
        return super().__call__(x, *args)

    def _apply(self, *args, **kwargs):
        # Repetitions would keep the memory that a module is moved out of.
        self._forget()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True):
        if mode:
            # Training needs the memory that they keep.
            self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        if hasattr(self, "_repeated"):
            del self._repeated

    def _repetitions(self) -> _Repetitions | None:
        """Those of the module as it is now, None at the first call."""
        is_first = not hasattr(self, "_repeated")
        own = None if is_first else self._repeated
        if own is None or not own.snapshot.holds():
            own = self._repeated = None if is_first or own is not None else _Repetitions(self)
        return own

    def _record(self, own: _Repetitions, layout: tuple, x: Tensor, *args):
        # What autocast has cast in an earlier call would come from nowhere.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with _replay.Recording([x, *own.snapshot.tensors]) as recording:
                out = super().__call__(x, *args)
        finally:
            torch.set_autocast_cache_enabled(cached)
        repetition = recording.finish(out, needs_launch=False)
        own.known[layout] = None if repetition is None else _bound.Bound(repetition, own.snapshot.tensors)
        return out


def is_repeated(x: Tensor) -> bool:
    """Whether blocks are repeated for maps as small as x, as far as that depends on the map."""
    small = x.is_cuda and not torch.compiler.is_compiling() and x.numel() <= Repeated.LIMIT
    # What records a whole network has no use for repetitions of its parts.
    return small and not torch.is_grad_enabled() and _replay.current() is None
