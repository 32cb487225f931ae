"""What recorded calls consist of: memory, operators of PyTorch and views, each for two ways of repeating it.

Tensors have slots: first those that a function is given, then new ones. `repeat` makes new tensors in each call. Where
all but a few tensors are the same ones in every call, `bind` makes of a step calls without arguments.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

_aten = torch.ops.aten
# Operators of one tensor, and what does the same to many by one launch: to others, and in place.
OF_MANY = {
    _aten.exp.default: (torch._foreach_exp, torch._foreach_exp_),
    _aten.neg.default: (torch._foreach_neg, torch._foreach_neg_),
}
# Operators that can write to a tensor that is there, and others, by the functions that take the host the least time.
_WITH_OUT = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.addmm.default: torch.addmm,
    _aten.exp.default: torch.exp,
    _aten.neg.default: torch.neg,
    _aten.tanh.default: torch.tanh,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.gelu.default: torch._C._nn.gelu,
    _aten.silu.default: torch._C._nn.silu,
    _aten.cat.default: torch.cat,
    _aten.stack.default: torch.stack,
    _aten.mean.dim: torch.mean,
}
_DIRECT = _WITH_OUT | {
    _aten.linear.default: torch._C._nn.linear,
    _aten.matmul.default: torch.matmul,
    _aten.conv2d.default: torch.conv2d,
    _aten.conv2d.padding: torch.conv2d,
    _aten.batch_norm.default: torch.batch_norm,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    _aten.constant_pad_nd.default: torch.constant_pad_nd,
    _aten.relu.default: torch.relu,
}
_COPIES = frozenset((_aten._to_copy.default, _aten.clone.default))
# Made of products of matrices.
_PRODUCTS = frozenset((_aten.linear.default, _aten.matmul.default))

# Size, strides and dtype.
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class View:
    """Slot number `slot` in another layout, `offset` elements after its start. With no layout, the slot as it is."""

    def __init__(self, slot: int, offset: int, size: tuple[int, ...] | None, stride: tuple[int, ...] | None):
        self.slot, self.offset, self.size, self.stride = slot, offset, size, stride

    def of(self, slots: list[Tensor]) -> Tensor:
        base = slots[self.slot]
        if self.size is None:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)

    def shape(self, layouts: dict[int, Layout]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and strides."""
        return layouts[self.slot][:2] if self.size is None else (self.size, self.stride)


def fill(tree, slots: list[Tensor]):
    """Containers with tensors in place of views."""
    if type(tree) is View:
        return tree.of(slots)
    if isinstance(tree, (tuple, list)):
        return type(tree)([fill(x, slots) for x in tree])
    return {name: fill(x, slots) for name, x in tree.items()} if isinstance(tree, dict) else tree


def slots_of(tree) -> set[int]:
    return {view.slot for view in tree_flatten(tree)[0] if type(view) is View}


class Places:
    """Where the tensors of a repetition are, and the steps that use them there.

    Args:
        slots: Tensors, None for those that come and go with each call.
        given: How many of the first the function is given. All but the very first of them stay.
        layouts: Those of the slots that are on the function's device.
        stream: Where launches go.

    Attributes:
        pointers: Addresses of the tensors.
        steps: Calls without arguments.
    """

    def __init__(self, slots: list[Tensor | None], given: int, layouts: dict[int, Layout], stream: int):
        self.slots, self.given, self.layouts, self.stream = slots, given, layouts, stream
        self.pointers = [None if t is None else t.data_ptr() for t in slots]
        self.steps: list[Callable[[], object]] = []
        self._copies: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}

    def stay(self, slots: Iterable[int]) -> bool:
        return all(self.slots[slot] is not None for slot in slots)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Has a tensor copied before all steps, by one launch together with its like."""
        targets, sources = self._copies.setdefault((source.dtype, target.dtype), ([], []))
        targets.append(target)
        sources.append(source)

    def call(self, function: Callable, args: Sequence, kwargs: dict, slot: int | None = None) -> None:
        """Adds a call with views for tensors, whose results take slots from `slot` on."""
        args = [fill(x, self.slots) if self.stay(slots_of(x)) else x for x in args]
        late = [(i, x) for i, x in enumerate(args) if slots_of(x)]
        if late or slot is not None or not self.stay(slots_of(kwargs)):
            self.steps.append(partial(_call, function, args, kwargs, late, self.slots, self.pointers, slot))
        else:
            kwargs = fill(kwargs, self.slots)
            self.steps.append(partial(function, *args, **kwargs))

    def all_steps(self) -> list[Callable[[], object]]:
        return [partial(torch._foreach_copy_, *copies) for copies in self._copies.values()] + self.steps


def _call(
    function: Callable,
    args: list,
    kwargs: dict,
    late: list[tuple[int, object]],
    slots: list[Tensor],
    pointers: list[int],
    slot: int | None,
) -> None:
    """Calls a function some of whose arguments, `late`, have views of slots. Its results take slots from `slot` on."""
    args = args.copy()
    for i, x in late:
        args[i] = x.of(slots) if type(x) is View else fill(x, slots)
    results = function(*args, **(fill(kwargs, slots) if kwargs else {}))
    if slot is None:
        return
    results = (results,) if isinstance(results, Tensor) else [x for x in results if isinstance(x, Tensor)]
    for i, new in enumerate(results, slot):
        slots[i] = new
        pointers[i] = new.data_ptr()


class Step:
    """What a recorded call does at one point.

    Attributes:
        is_launch: Whether it launches a kernel itself.
        is_mutable: Whether it changes tensors that were there.
    """

    is_launch = is_mutable = False

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        """Does it again, with the tensors in these slots."""
        raise NotImplementedError

    def slots(self) -> list[int]:
        """All that it reads or writes."""
        raise NotImplementedError

    def results(self, layouts: dict[int, Layout]) -> list[int]:
        """Slots of new tensors which it can also write to memory that is there."""
        return []

    def is_early(self, given: int) -> bool:
        """Whether it does no more than to copy what the function is given."""
        return False

    def bind(self, places: Places) -> bool:
        """Adds calls without arguments to `places`. False where its results don't stay, and it has to be repeated."""
        return False

    def is_watched(self) -> bool:
        """Whether somebody wants to know of every time that it is done, and so it must not be bound."""
        return False


class Allocation(Step):
    def __init__(self, slot: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype):
        self.slot, self.size, self.stride, self.dtype = slot, size, stride, dtype

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        new = slots[0].new_empty_strided(self.size, self.stride, dtype=self.dtype)
        slots[self.slot] = new
        pointers[self.slot] = new.data_ptr()

    def slots(self) -> list[int]:
        return [self.slot]

    def results(self, layouts: dict[int, Layout]) -> list[int]:
        return [self.slot]

    def bind(self, places: Places) -> bool:
        return places.stay([self.slot])


class Call(Step):
    """An operator of PyTorch; all `count` tensors that it returns take slots, from `slot` on."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict, slot: int, count: int):
        self.function, self.args, self.kwargs, self.slot, self.count = function, list(args), kwargs, slot, count
        self.is_mutable = function._schema.is_mutable
        self._direct = _DIRECT.get(function, function)
        self._late = [(i, x) for i, x in enumerate(args) if slots_of(x)]

    @property
    def views(self) -> list[View]:
        """Arguments that are tensors."""
        return [x for x in self.args if type(x) is View]

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        _call(self._direct, self.args, self.kwargs, self._late, slots, pointers, self.slot)

    def slots(self) -> list[int]:
        return [*slots_of((self.args, self.kwargs)), *range(self.slot, self.slot + self.count)]

    def results(self, layouts: dict[int, Layout]) -> list[int]:
        if self.count != 1 or self.slot not in layouts:
            return []
        if self.function in _PRODUCTS:
            # Rows of one matrix; others PyTorch multiplies in other ways.
            x, weight = (view.shape(layouts) for view in self.args[:2])
            out = layouts[self.slot][:2]
            can_write = len(weight[0]) == 2 and _is_contiguous(*x) and _is_contiguous(*out) and 0 not in out[0]
        else:
            can_write = self.function in _WITH_OUT or self.function in _COPIES
        return [self.slot] if can_write else []

    def is_early(self, given: int) -> bool:
        return self.function is _aten.stack.default and all(0 < view.slot < given for view in self.args[0])

    def bind(self, places: Places) -> bool:
        if not places.stay([self.slot]):
            places.call(self._direct, self.args, self.kwargs, self.slot)
        elif self.is_early(places.given):
            parts = places.slots[self.slot].unbind(*self.args[1:])
            for view, part in zip(self.args[0], parts, strict=True):
                places.copy(view.of(places.slots), part)
        else:
            self._bind_with_out(places, places.slots[self.slot])
        return True

    def _bind_with_out(self, places: Places, out: Tensor) -> None:
        if self.function in _COPIES:
            places.call(out.copy_, self.args[:1], {})
        elif self.function in _PRODUCTS:
            x, weight, *bias = (x for x in self.args if x is not None)
            (*_, channels), _ = x.shape(places.layouts)
            rows = View(x.slot, x.offset, (out.numel() // out.shape[-1], channels), (channels, 1))
            size, stride = weight.shape(places.layouts)
            if self.function is _aten.linear.default:
                weight = View(weight.slot, weight.offset, size[::-1], stride[::-1])
            function = torch.addmm if bias else torch.mm
            places.call(function, [*bias, rows, weight], {"out": out.view(-1, out.shape[-1])})
        else:
            places.call(_WITH_OUT[self.function], self.args, {**self.kwargs, "out": out})


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return torch.empty_strided(size, stride, device="meta").is_contiguous()


class Casts(Step):
    """Several tensors in another dtype, by one launch instead of one for each.

    Args:
        casts: The calls that cast one tensor each.
        copies: What they returned, all of one dtype.
    """

    # Numbers of 16 bits in the 16 bytes that tensors have to start at multiples of.
    ALIGNMENT = 8

    def __init__(self, casts: list[Call], copies: list[Tensor]):
        self.dtype = copies[0].dtype
        # Where they can be, the copies are parts of one new tensor.
        self.size = 0
        self.parts, self.others = [], []
        for cast, copy in zip(casts, copies, strict=True):
            is_part = copy.is_contiguous() and copy.numel() % self.ALIGNMENT == 0
            (self.parts if is_part else self.others).append((cast.views[0], cast.slot))
            self.size += copy.numel() if is_part else 0
        self.targets = [slot for _, slot in self.parts + self.others]

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        sources = [view.of(slots) for view, _ in self.parts]
        flat = slots[0].new_empty(self.size, dtype=self.dtype)
        copies = list(torch._C._nn.unflatten_dense_tensors(flat, sources))
        for view, _ in self.others:
            source = view.of(slots)
            sources.append(source)
            copies.append(torch.empty_like(source, dtype=self.dtype))
        torch._foreach_copy_(copies, sources)
        for slot, copy in zip(self.targets, copies, strict=True):
            slots[slot] = copy
            pointers[slot] = copy.data_ptr()

    def slots(self) -> list[int]:
        return [view.slot for view, _ in self.parts + self.others] + self.targets

    def results(self, layouts: dict[int, Layout]) -> list[int]:
        return self.targets

    def is_early(self, given: int) -> bool:
        return True

    def bind(self, places: Places) -> bool:
        slots = places.slots
        if not places.stay(self.targets):
            return False
        for view, slot in self.parts + self.others:
            if places.stay([view.slot]):
                places.copy(view.of(slots), slots[slot])
            else:
                places.call(slots[slot].copy_, [view], {})
        return True


class CallOfMany(Step):
    """An operator of one tensor for several, by one launch instead of one for each."""

    def __init__(self, calls: list[Call]):
        self.function, self.in_place = OF_MANY[calls[0].function]
        self.views = [call.views[0] for call in calls]
        self.targets = [call.slot for call in calls]

    def repeat(self, slots: list[Tensor], pointers: list[int], stream: int) -> None:
        results = self.function([view.of(slots) for view in self.views])
        for slot, new in zip(self.targets, results, strict=True):
            slots[slot] = new
            pointers[slot] = new.data_ptr()

    def slots(self) -> list[int]:
        return [view.slot for view in self.views] + self.targets

    def results(self, layouts: dict[int, Layout]) -> list[int]:
        return self.targets

    def bind(self, places: Places) -> bool:
        if not places.stay(self.targets):
            return False
        targets = [places.slots[slot] for slot in self.targets]
        places.call(torch._foreach_copy_, [targets, self.views], {})
        places.call(self.in_place, [targets], {})
        return True
