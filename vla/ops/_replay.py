"""Calls that launch what an earlier call launched, without the Python that led to it.

A small model in eager mode waits for the host. What a backend with kernels does there, the checks, the choice of
blocks, views, Triton's look at every argument, depends on its arguments' layouts alone. So a call with a layout that
was met before is recorded: the memory it takes, the kernels it launches, the operators of PyTorch it calls. Later calls
repeat these with their own tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
_UNREPEATABLE = frozenset(
    (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
)


class _View:
    """Slot number `slot` in another layout, `offset` elements after its start. With no layout, the slot as it is."""

    def __init__(self, slot: int, offset: int, size: tuple[int, ...] | None, stride: tuple[int, ...] | None):
        self.slot, self.offset, self.size, self.stride = slot, offset, size, stride

    def of(self, slots: list[Tensor]) -> Tensor:
        base = slots[self.slot]
        if self.size is None:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class _Tree:
    """Containers and constants, with a `_View` where there was a tensor."""

    def __init__(self, leaves: list, spec):
        self.leaves, self.spec = leaves, spec

    def of(self, slots: list[Tensor]):
        return tree_unflatten([x.of(slots) if type(x) is _View else x for x in self.leaves], self.spec)


class _Allocation:
    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype):
        self.size, self.stride, self.dtype = size, stride, dtype

    def repeat(self, slots: list[Tensor], pointers: list[int]) -> None:
        new = slots[0].new_empty_strided(self.size, self.stride, dtype=self.dtype)
        slots.append(new)
        pointers.append(new.data_ptr())


class _Call:
    """An operator of PyTorch; all its results take slots."""

    def __init__(self, function: Callable, arguments: _Tree):
        self.function, self.arguments = function, arguments

    def repeat(self, slots: list[Tensor], pointers: list[int]) -> None:
        args, kwargs = self.arguments.of(slots)
        results = self.function(*args, **kwargs)
        for new in (results,) if isinstance(results, Tensor) else results:
            slots.append(new)
            pointers.append(new.data_ptr())


class _Launch:
    """A compiled kernel on its grid. Of its arguments, tensors stand in `places`: (argument, slot, bytes after it)."""

    def __init__(self, run: Callable, arguments: list, places: list[tuple[int, int, int]]):
        self.run, self.arguments, self.places = run, arguments, places

    def repeat(self, slots: list[Tensor], pointers: list[int]) -> None:
        arguments = self.arguments.copy()
        for i, slot, offset in self.places:
            arguments[i] = pointers[slot] + offset
        self.run(*arguments)


class Recording(TorchDispatchMode):
    """Follows a function of tensors through what it does on a GPU.

    Args:
        tensors: The function's tensors, each an object of its own. They are the first slots; new tensors are the next.

    Attributes:
        complete: Whether all can be repeated.
        steps: In order, what has to be.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.complete = True
        self.steps: list[_Allocation | _Call | _Launch] = []
        self._slots: list[Tensor] = []
        # With the tensors themselves: without, their `id` and memory could pass to others.
        self._known: dict[int, tuple[Tensor, int]] = {}
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        self._known.setdefault(id(tensor), (tensor, len(self._slots)))
        self._slots.append(tensor)

    def _slot(self, tensor: Tensor) -> int | None:
        """Whose memory the tensor is of. None, and nothing can be repeated, for one that came from elsewhere."""
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        self.complete = False
        return None

    def _view(self, tensor: Tensor) -> _View | None:
        slot = self._slot(tensor)
        if slot is None:
            return None
        base = self._slots[slot]
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
        if layout == (base.storage_offset(), base.shape, base.stride()):
            return _View(slot, 0, None, None)
        self.complete &= tensor.dtype == base.dtype
        return _View(slot, layout[0] - base.storage_offset(), *layout[1:])

    def _tree(self, tree) -> _Tree:
        leaves, spec = tree_flatten(tree)
        return _Tree([self._view(x) if isinstance(x, Tensor) else x for x in leaves], spec)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            self.steps.append(_Allocation(out.shape, out.stride(), out.dtype))
            self._add(out)
            return out
        results = [out] if isinstance(out, Tensor) else out
        if _UNREPEATABLE.intersection(func.tags) or not isinstance(results, (list, tuple)):
            self.complete = False
            return out
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        owners = {x.untyped_storage()._cdata: self._slot(x) for x in given}
        if not func._schema.is_mutable and all(x.untyped_storage()._cdata in owners for x in results):
            for x in results:
                self._known.setdefault(id(x), (x, owners[x.untyped_storage()._cdata]))
            return out
        self.steps.append(_Call(func, self._tree((args, kwargs))))
        for x in results:
            self._add(x)
        return out

    def launched(self, binary, grid: tuple[int, ...], arguments: list) -> None:
        """Takes note of a launch.

        Args:
            binary: What Triton's launch returned, to be launched again as `binary[grid](*arguments)`.
            grid: Numbers of programs.
            arguments: All that the kernel has, constants too.
        """
        if not hasattr(binary, "__getitem__"):  # interpreted
            self.complete = False
            return
        places = []
        for i, x in enumerate(arguments):
            slot = self._slot(x) if isinstance(x, Tensor) else None
            if slot is not None:
                base = self._slots[slot]
                offset = x.storage_offset() * x.itemsize - base.storage_offset() * base.itemsize
                places.append((i, slot, offset))
                arguments[i] = None
        self.steps.append(_Launch(binary[(*grid, 1, 1)[:3]], arguments, places))

    def finish(self, outputs) -> Callable | None:
        """What repeats the function that returned `outputs`, if that is possible and worth it."""
        outputs = self._tree(outputs)
        worth = any(isinstance(step, _Launch) for step in self.steps)
        # Their memory is no longer needed.
        self._slots.clear()
        self._known.clear()
        return partial(_repeat, [step.repeat for step in self.steps], outputs) if worth and self.complete else None


def _repeat(steps: list[Callable], outputs: _Tree, tensors: list[Tensor], pointers: list[int]):
    for step in steps:
        step(tensors, pointers)
    return outputs.of(tensors)


def current() -> Recording | None:
    """The recording that goes on in this thread."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recording) else None


_UNKNOWN, _SEEN, _NEVER = "unknown", "seen once", "never to be repeated"


class Replays:
    """Runs a function of tensors and constants, from the third call with a layout on as a repetition.

    A layout is all that the function may depend on: constants, and of the tensors shapes, strides, dtypes, devices, and
    where they start within 16 bytes, the most that Triton asks for.
    """

    # One with ever new sizes starts anew.
    LIMIT = 1024

    def __init__(self):
        self._known: dict[tuple, Callable] = {}

    def __call__(self, function: Callable, *args, state=None):
        """`function(*args)`.

        Args:
            function: Launches kernels on the GPU of its tensors. Returns tensors of its own.
            *args: Tensors, lists of tensors, or constants.
            state: What else the function depends on.
        """
        layout, tensors, pointers = [state], [], []
        for arg in args:
            group = arg if type(arg) is list else (arg,)
            layout.append(len(group))
            for x in group:
                if isinstance(x, Tensor):
                    pointer = x.data_ptr()
                    tensors.append(x)
                    pointers.append(pointer)
                    x = (x.shape, x.stride(), x.dtype, x.get_device(), pointer % 16)
                layout.append(x)
        if not self._serves(tensors[0]):
            return function(*args)
        layout = tuple(layout)
        replay = self._known.get(layout, _UNKNOWN)
        if replay is _UNKNOWN:
            if len(self._known) >= self.LIMIT:
                self._known.clear()
            self._known[layout] = _SEEN
        if replay in (_UNKNOWN, _NEVER):
            return function(*args)
        if replay is not _SEEN:
            return replay(tensors, pointers)
        # A tensor that is given twice may be two the next time.
        args = tree_map_only(Tensor, Tensor.detach, args)
        tensors = [x for x in tree_flatten(args)[0] if isinstance(x, Tensor)]
        with Recording(tensors) as recording:
            outputs = function(*args)
        self._known[layout] = recording.finish(outputs) or _NEVER
        return outputs

    @staticmethod
    def _serves(tensor: Tensor) -> bool:
        # Triton launches on the current GPU.
        return tensor.is_cuda and tensor.get_device() == torch.cuda.current_device()
