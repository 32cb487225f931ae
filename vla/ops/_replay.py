"""Calls that launch what an earlier call launched, without the Python that led to it.

A small model in eager mode waits for the host. What a backend with kernels does there, the checks, the choice of
blocks, views, Triton's look at every argument, depends on its arguments' layouts alone. So a call with a layout that
was met before is recorded: the memory it takes, the kernels it launches, the operators of PyTorch it calls. Later calls
repeat these with their own tensors.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map_only

from ._steps import OF_MANY, Allocation, Call, CallOfMany, Casts, Layout, Step, View, fill, slots_of

_aten = torch.ops.aten
# Of memory that nothing is written to.
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
# Operators that PyTorch makes of others without autocast's looking at these.
_CAST_AS_ONE = frozenset(
    (
        _aten.linear.default,
        _aten.matmul.default,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.layer_norm.default,
        _aten.batch_norm.default,
        _aten.scaled_dot_product_attention.default,
    )
)
# What depends on more than layouts.
_UNREPEATABLE = frozenset(
    (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
)


class Recording(TorchDispatchMode):
    """Follows a function of tensors through what it does on a GPU.

    Args:
        tensors: The function's tensors, each an object of its own. They are the first slots; new tensors are the next.

    Attributes:
        complete: Whether all can be repeated.
        launches: Whether that takes a launch.
        steps: In order, what has to be done.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.complete = True
        self.launches = False
        self.steps: list[Step] = []
        self._given = len(tensors)
        self._slots: list[Tensor] = []
        self._used: set[int] = set()
        # With the tensors themselves: without, their `id` and memory could pass to others.
        self._known: dict[int, tuple[Tensor, int]] = {}
        # By memory, for new objects of the same tensors; None where several tensors were given that share it.
        self._owners: dict[int, int | None] = {}
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        slot, memory = len(self._slots), tensor.untyped_storage()._cdata
        if self._known.setdefault(id(tensor), (tensor, slot))[1] == slot:
            shared = slot < self._given and memory in self._owners
            self._owners[memory] = None if shared else self._owners.get(memory, slot)
        self._slots.append(tensor)

    def _owner(self, tensor: Tensor) -> int | None:
        """Slot that holds the tensor or its memory, None for one that came from elsewhere."""
        known = self._known.get(id(tensor))
        return self._owners.get(tensor.untyped_storage()._cdata) if known is None else known[1]

    def _slot(self, tensor: Tensor) -> int | None:
        """Whose memory the tensor is of. None, and nothing can be repeated, for one that came from elsewhere."""
        slot = self._owner(tensor)
        if slot is None:
            self.complete = False
        else:
            self._used.add(slot)
        return slot

    def _view(self, tensor: Tensor) -> View | None:
        slot = self._slot(tensor)
        if slot is None:
            return None
        base = self._slots[slot]
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
        if layout == (base.storage_offset(), base.shape, base.stride()):
            return View(slot, 0, None, None)
        self.complete &= tensor.dtype == base.dtype
        return View(slot, layout[0] - base.storage_offset(), *layout[1:])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _CAST_AS_ONE and self._is_composite(func):
            # As PyTorch does it; its decompositions in Python are others.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        if func in _ALLOCATIONS and out.device == self._slots[0].device:
            self.steps.append(Allocation(len(self._slots), out.shape, out.stride(), out.dtype))
            self._add(out)
            return out
        results = [x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, Tensor)]
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if not results:
            # Constants make others, as for `torch.promote_types`.
            self.complete &= not given
            return out
        owners = {x.untyped_storage()._cdata: self._owner(x) for x in given}
        storages = [x.untyped_storage()._cdata for x in results]
        if not func._schema.is_mutable and all(owners.get(storage) is not None for storage in storages):
            for x, storage in zip(results, storages, strict=True):
                self._known.setdefault(id(x), (x, owners[storage]))
            return out
        # What the function was given is not its own to write to.
        written = any(s in owners and (owners[s] is None or owners[s] < self._given) for s in storages)
        # Of such a result it is not known whose memory it is, which would be taken for free while it is in use.
        aliased = not func._schema.is_mutable and any(s in owners for s in storages)
        if written or aliased or _is_unrepeatable(func, args, kwargs):
            self.complete = False
            return out
        args, kwargs = tree_map_only(Tensor, self._view, (args, kwargs))
        self.steps.append(Call(func, args, kwargs, len(self._slots), len(results)))
        for x in results:
            self._add(x)
        return out

    def _is_composite(self, func: Callable) -> bool:
        """Whether what runs is made of other operators."""
        own, composite = (
            torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
            for key in (self._slots[0].device.type.upper(), "CompositeImplicitAutograd")
        )
        return composite and not own

    def places(self, arguments: list) -> list[tuple[int, int, int]]:
        """Where a launch has tensors among its arguments: (argument, slot, bytes after the slot's start)."""
        places = []
        for i, x in enumerate(arguments):
            slot = self._slot(x) if isinstance(x, Tensor) else None
            if slot is not None:
                base = self._slots[slot]
                places.append((i, slot, x.storage_offset() * x.itemsize - base.storage_offset() * base.itemsize))
        return places

    def finish(self, outputs, needs_launch: bool = True) -> "Repetition | None":
        """What repeats the function that returned `outputs`, None if that is not possible.

        Nor is it worth it without launches, unless the function does more than to call operators of PyTorch.
        """
        outputs = tree_map_only(Tensor, self._view, outputs)
        steps = []
        if self.complete and (self.launches or not needs_launch):
            steps = self._joined(self._without_unused(self.steps))
        device = self._slots[0].device
        layouts = {i: (x.shape, x.stride(), x.dtype) for i, x in enumerate(self._slots) if x.device == device}
        count = len(self._slots)
        self._forget()
        if not steps:
            return None
        return Repetition(self._with_ends(steps, slots_of(outputs)), outputs, count, self._given, layouts)

    def _forget(self) -> None:
        """Gives back memory that is no longer needed."""
        self._slots.clear()
        self._known.clear()
        self._owners.clear()

    def _without_unused(self, steps: list) -> list:
        return [step for step in steps if not isinstance(step, Allocation) or step.slot in self._used]

    def _with_ends(self, steps: list[Step], needed: set[int]) -> list[tuple[Step, list[int]]]:
        """Each step, and the slots whose memory no other one after it needs."""
        ends = []
        seen = needed | set(range(self._given))
        for step in reversed(steps):
            own = set(step.slots())
            ends.append((step, sorted(own - seen)))
            seen |= own
        return ends[::-1]

    def _joined(self, steps: list) -> list:
        """The same steps, those that do alike to what the function was given joined and put first."""
        casts: dict[torch.dtype, list[Call]] = {}
        rest = []
        for step in steps:
            group = casts.setdefault(self._slots[step.slot].dtype, []) if self._is_cast(step) else rest
            group.append(step)
        # A launch for many tensors gives a small one to a single block of threads: one cast by itself is faster.
        joined: list = [
            Casts(group, [self._slots[step.slot] for step in group]) if len(group) > 1 else group[0]
            for group in casts.values()
        ]
        early = set(range(self._given))
        written = {slot for step in rest if step.is_mutable for slot in step.slots()}
        for function in OF_MANY:
            calls = [step for step in rest if isinstance(step, Call) and step.function is function]
            calls = [call for call in calls if call.views[0].slot in early]
            if len(calls) > 1:
                early.update({call.slot for call in calls} - written)
                joined.append(CallOfMany(calls))
                rest = [step for step in rest if step not in calls]
        return joined + rest

    def _is_cast(self, step) -> bool:
        if not isinstance(step, Call) or step.function is not _aten._to_copy.default or len(step.views) != 1:
            return False
        view = step.views[0]
        stride = self._slots[view.slot].stride() if view.stride is None else view.stride
        return view.slot < self._given and stride == self._slots[step.slot].stride()


def _is_unrepeatable(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call may return something else for the same tensors, or other shapes for others of their layouts."""
    for i, argument in enumerate(function._schema.arguments):
        if argument.name == "dropout_p":
            return (args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)) > 0
    if function is _aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(_UNREPEATABLE.intersection(function.tags))


def _run(steps: list[tuple[Step, list[int]]], slots: list, pointers: list, stream: int) -> None:
    for step, ends in steps:
        step.repeat(slots, pointers, stream)
        for slot in ends:
            slots[slot] = None


class Repetition:
    """Repeats a function.

    Args:
        steps: What it does, and after each step the slots whose memory no other one after it needs.
        outputs: What it returns.
        count: Number of slots.
        given: How many of the first it is given.
        layouts: Those of the slots that are on its device.
    """

    def __init__(
        self, steps: list[tuple[Step, list[int]]], outputs, count: int, given: int, layouts: dict[int, Layout]
    ):
        self.steps, self.outputs, self.given, self.layouts = steps, outputs, given, layouts
        self.new = [None] * (count - given)
        # Of these alone autocast takes notice.
        self._has_calls = any(isinstance(step, (Call, Casts, CallOfMany)) for step, _ in steps)

    def __call__(self, tensors: list[Tensor], pointers: list[int], stream: int):
        tensors += self.new
        pointers += self.new
        if self._has_calls:
            with full_precision(tensors[0].device):
                _run(self.steps, tensors, pointers, stream)
        else:
            _run(self.steps, tensors, pointers, stream)
        return fill(self.outputs, tensors)


class full_precision(AbstractContextManager):  # noqa: N801
    """Autocast off: it would take the products inside a backend out of the float32 of its states.

    The flag alone; `torch.autocast` takes the host longer than some backends need.
    """

    def __init__(self, device: torch.device):
        self.kind = device.type
        self.enabled = torch.is_autocast_enabled(self.kind)

    def __enter__(self) -> None:
        if self.enabled:
            torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *exception) -> None:
        if self.enabled:
            torch.set_autocast_enabled(self.kind, True)


def current() -> Recording | None:
    """The recording that goes on in this thread."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recording) else None


def stream_of(tensor: Tensor) -> int | None:
    """Where a launch with this tensor goes, None unless it is on the current GPU, where Triton launches."""
    device = tensor.get_device()
    if device < 0 or not tensor.is_cuda or device != torch.cuda.current_device():
        return None
    return torch._C._cuda_getCurrentRawStream(device)


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

    def __call__(self, function: Callable, first: Tensor, state, *args):
        """`function(*args)`.

        Args:
            function: Launches kernels on the GPU of its tensors. Returns tensors of its own.
            first: One of the tensors.
            state: What else the function depends on.
            *args: Tensors and constants.
        """
        stream = None if current() is not None else stream_of(first)
        if stream is None:
            return function(*args)
        layout, tensors, pointers = [state], [], []
        for x in args:
            if isinstance(x, Tensor):
                pointer = x.data_ptr()
                tensors.append(x)
                pointers.append(pointer)
                x = (x.shape, x.stride(), x.dtype, x.get_device(), pointer % 16)
            elif type(x) is list:
                x = tuple(x)
            layout.append(x)
        layout = tuple(layout)
        replay = self._known.get(layout, _UNKNOWN)
        if replay is _UNKNOWN:
            if len(self._known) >= self.LIMIT:
                self._known.clear()
            self._known[layout] = _SEEN
        if replay in (_UNKNOWN, _NEVER):
            return function(*args)
        if replay is not _SEEN:
            return replay(tensors, pointers, stream)
        try:
            return self._record(layout, function, args)
        except torch.OutOfMemoryError:  # as a recording keeps all that is computed
            self._known[layout] = _NEVER
        return function(*args)

    def _record(self, layout: tuple, function: Callable, args: tuple):
        # A tensor that is given twice may be two the next time.
        args = [x.detach() if isinstance(x, Tensor) else x for x in args]
        with Recording([x for x in args if isinstance(x, Tensor)]) as recording:
            outputs = function(*args)
        self._known[layout] = recording.finish(outputs) or _NEVER
        return outputs
