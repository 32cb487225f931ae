"""Makes Triton's interpreter quick enough for tests, and tests of operators independent of each other."""

import importlib.util

import numpy as np
import pytest


def _cumulate(op, operands):
    """The combined entries so far, slice by slice along the axis of `op`."""

    def at(i):
        return tuple(op.to_tensor(value[i], x.dtype) for value, x in zip(values, operands, strict=True))

    values = [np.moveaxis(x.handle.data, op.axis, 0) for x in operands]
    total = at(0)
    yield total
    for i in range(1, len(values[0])):
        total = op.combine_fn.fn(*total, *at(i))
        total = total if isinstance(total, tuple) else (total,)
        yield total


@pytest.fixture(autouse=True)
def interpret_by_slices(monkeypatch):
    """`tl.associative_scan` and `tl.reduce` by slices along their axis: the interpreter's way is entry by entry."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import ReduceOps, ScanOps

    by_entry = ReduceOps.generic_reduce

    def generic_scan(self, operands):
        steps = zip(*_cumulate(self, operands), strict=True)
        return [
            self.to_tensor(np.stack([np.asarray(s.handle.data).reshape(shape) for s in step], self.axis), x.dtype)
            for step, x in zip(steps, operands, strict=True)
            for shape in [tuple(int(n) for i, n in enumerate(x.shape) if i != self.axis)]
        ]

    def generic_reduce(self, operands):
        if self.axis is None or operands[0].handle.data.ndim == 1:
            return by_entry(self, operands)
        *_, total = _cumulate(self, operands)
        results = [x.handle.data for x in total]
        if self.keep_dims:
            results = [np.expand_dims(result, self.axis) for result in results]
        return [self.to_tensor(result, x.dtype) for result, x in zip(results, operands, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", generic_scan)
    monkeypatch.setattr(ReduceOps, "generic_reduce", generic_reduce)


@pytest.fixture(autouse=True)
def forget_launches(monkeypatch, request):
    """What a test has recorded of an operator is not repeated in another, which may have set a configuration."""
    from vla.ops._replay import Replays

    call = Replays.__call__

    def of_test(replays, function, first, state, *args):
        return call(replays, function, first, (state, request.node.nodeid), *args)

    monkeypatch.setattr(Replays, "__call__", of_test)
