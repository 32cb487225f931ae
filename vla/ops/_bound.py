"""Repetitions whose tensors stay where they are: parameters, and all that is computed on the way.

To prepare a recorded step takes the host longer than to carry it out: memory to allocate, views, lists of arguments. Of
a module's repetition, all tensors but the input and the outputs can be the same ones in every call. Its steps are then
calls with arguments that have been made once.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ._replay import Repetition, full_precision
from ._steps import Layout, Places, fill, slots_of

# Bytes that tensors start at multiples of, enough for every kernel that is compiled or chosen for aligned memory.
_ALIGNMENT = 256


@dataclass
class _Program:
    """Steps of a repetition in a workspace.

    Args:
        steps: Calls without arguments.
        places: Their tensors.
        passing: Slots whose tensors come and go.
    """

    steps: list[Callable[[], object]]
    places: Places
    passing: list[int]


class _Workspace:
    """Memory of one stream for what is computed on the way. Repetitions use it one after the other.

    Attributes:
        memory: The memory, which grows.
        programs: What uses it.
        lock: Held by the thread whose call goes on.
    """

    LIMIT = 2**28  # bytes

    def __init__(self):
        self.memory: Tensor | None = None
        self.programs: WeakKeyDictionary[Bound, _Program] = WeakKeyDictionary()
        self.lock = threading.Lock()

    def grow(self, size: int, device: torch.device) -> Tensor:
        if self.memory is None or len(self.memory) < size:
            self.programs.clear()  # which would keep the memory so far
            self.memory = None
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self.memory


# Those that some repetition uses, by device and stream.
_workspaces: WeakValueDictionary[tuple[int, int], _Workspace] = WeakValueDictionary()


class Bound:
    """A repetition of a function of one tensor that varies and of others that stay.

    Args:
        repetition: The repetition.
        constants: The function's tensors but the first, as they are and where they are.
    """

    # Streams of a device for which there is a workspace at most.
    STREAMS = 4

    def __init__(self, repetition: Repetition, constants: Sequence[Tensor]):
        self._repetition, self._constants = repetition, list(constants)
        self._pointers = [t.data_ptr() for t in constants]
        self._workspaces: dict[int, _Workspace] = {}
        self._offsets, self._size = _plan(repetition)
        # One launch answers for all: hooks on launches are global.
        self._launch = next((step for step, _ in repetition.steps if step.is_launch), None)

    def __call__(self, x: Tensor, pointer: int, stream: int):
        workspace = self._workspace(x, stream)
        if workspace is None or not workspace.lock.acquire(blocking=False):
            return self._repetition([x, *self._constants], [pointer, *self._pointers], stream)
        try:
            program = workspace.programs.get(self)
            if program is None:
                # Tensors made in inference mode could not be written to outside of it.
                with torch.inference_mode(False):
                    program = self._bind(workspace.grow(self._size, x.device), stream)
                workspace.programs[self] = program
            slots = program.places.slots
            slots[0], program.places.pointers[0] = x, pointer
            try:
                with full_precision(x.device), torch._C._AutoDispatchBelowAutograd():
                    for step in program.steps:
                        step()
                return fill(self._repetition.outputs, slots)
            finally:
                for slot in program.passing:
                    slots[slot] = None
        finally:
            workspace.lock.release()

    def _workspace(self, x: Tensor, stream: int) -> _Workspace | None:
        """That of a stream, None if all tensors have to be new ones."""
        # A CUDA graph keeps its memory for itself.
        watched = self._launch is not None and self._launch.is_watched()
        if watched or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        found = self._workspaces.get(stream)
        if found is None and self._size <= _Workspace.LIMIT:
            place = x.get_device(), stream
            found = _workspaces.get(place)
            if found is None and sum(device == place[0] for device, _ in _workspaces) < self.STREAMS:
                found = _workspaces.setdefault(place, _Workspace())
            if found is not None:
                self._workspaces[stream] = found
        return found

    @torch.no_grad()
    def _bind(self, memory: Tensor, stream: int) -> _Program:
        repetition = self._repetition
        slots: list[Tensor | None] = [None, *self._constants, *repetition.new]
        for slot, offset in self._offsets.items():
            size, stride, dtype = repetition.layouts[slot]
            slots[slot] = memory.view(dtype).as_strided(size, stride, offset // dtype.itemsize)
        places = Places(slots, repetition.given, repetition.layouts, stream)
        for step, ends in repetition.steps:
            if not step.bind(places):
                places.steps.append(partial(step.repeat, slots, places.pointers, stream))
            ends = [slot for slot in ends if not places.stay([slot])]
            if ends:
                places.steps.append(partial(_clear, slots, ends))
        passing = [slot for slot, tensor in enumerate(slots) if tensor is None]
        return _Program(places.all_steps(), places, passing)


def _clear(slots: list, ends: list[int]) -> None:
    for slot in ends:
        slots[slot] = None


def _plan(repetition: Repetition) -> tuple[dict[int, int], int]:
    """Where in a workspace slots are that can stay, in bytes from its start, and its size."""
    layouts, steps = repetition.layouts, [step for step, _ in repetition.steps]
    passing = slots_of(repetition.outputs).union(*(step.slots() for step in steps if step.is_mutable))
    first, last = {}, {}
    for i, step in enumerate(steps):
        results = step.results(layouts)
        # All results of a step, or none.
        if passing.isdisjoint(results) and layouts.keys() >= set(results):
            first.update(dict.fromkeys(results, 0 if step.is_early(repetition.given) else i))
        last.update(dict.fromkeys(step.slots(), i))
    offsets: dict[int, int] = {}
    size = 0
    live: list[tuple[int, int, int]] = []  # start, end, last step
    for slot in sorted(first, key=first.get):
        live = sorted(part for part in live if part[2] >= first[slot])
        start, needed = 0, _bytes(layouts[slot])
        for begin, end, _ in live:
            if begin - start >= needed:
                break
            start = max(start, end)
        offsets[slot] = start
        live.append((start, start + needed, last[slot]))
        size = max(size, start + needed)
    return offsets, size


def _bytes(layout: Layout) -> int:
    """Memory that a tensor takes, a multiple of `_ALIGNMENT`."""
    size, stride, dtype = layout
    extent = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    return -(-extent * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
