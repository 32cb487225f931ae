"""Compares what is compiled ahead for a model's first call with what the call launches, on a machine without a GPU.

CPU tensors pass for a GPU's, and kernels are noted instead of launched: it is not numbers that matter, but constants,
dtypes, alignments and divisibilities, which Triton compiles for. Prints models, modes and kernels that differ:

    python -m tests.models.ahead vmamba_atto [gspn_atto ...]

Needs a process without TRITON_INTERPRET, which decides about a kernel when it is defined.
"""

# ruff: noqa: T201  its result is what it prints

import sys
import weakref
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import timm
import torch

from vla.models import _ahead as ahead_of_models
from vla.ops import _ahead
from vla.ops._registry import Operator
from vla.ops._triton import Kernel
from vla.timing import evaluation, training

AUTOCAST = torch.autocast
H100 = SimpleNamespace(multi_processor_count=132)


class Notes:
    """Launches as Triton would tell them apart."""

    def __init__(self):
        self.launches: set[tuple] = set()

    def add(self, kernel: Kernel, *args, **kwargs) -> None:
        args = [_ahead._placeholder(x) for x in args]
        kwargs = {name: _ahead._placeholder(x) for name, x in kwargs.items()}
        arguments = dict(zip(kernel.jit.arg_names, args, strict=False)) | kwargs
        self.launches.add((kernel.__name__, _ahead._likeness(kernel.jit, arguments)))


@contextmanager
def pretence(notes: Notes):
    """CPU tensors are a GPU's, whose kernels are noted."""

    def launch(kernel: Kernel, grid: tuple[int, ...]):
        return partial(notes.add, kernel)

    def backend(operator: Operator, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        return "triton" if "triton" in operator.backends and dtype in operator.kernel_dtypes else "torch"

    def autocast(device: str, *args, **kwargs):
        return AUTOCAST("cpu", *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", True, create=True))
        stack.enter_context(patch.object(torch.Tensor, "is_cpu", False, create=True))
        stack.enter_context(patch.object(torch, "autocast", autocast))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda device: H100))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)))
        stack.enter_context(patch.object(Operator, "backend_for", backend))
        stack.enter_context(patch.object(Kernel, "__getitem__", launch))
        stack.enter_context(patch.object(ahead_of_models, "_expect", lambda *args: None))
        yield


def compare(name: str, train: bool) -> tuple[set[tuple], set[tuple]]:
    """Kernels that are compiled ahead for an inference or a training step, and those that are launched."""
    model = timm.create_model(name).to(memory_format=torch.channels_last).train(train)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    followed, launched = Notes(), Notes()
    with pretence(followed):
        meta = torch.empty_like(images, device="meta")
        call = ahead_of_models._Call(weakref.ref(model), (meta,), {}, images.device, torch.bfloat16, train)
        _ahead._thread.compilation = followed  # tensors have no memory
        try:
            call._follow()
        finally:
            _ahead._thread.compilation = None
    with pretence(launched):
        step = training if train else evaluation
        step(model, images, lambda: AUTOCAST("cpu", torch.bfloat16))()
    return followed.launches, launched.launches


def main() -> int:
    differences = 0
    for name in sys.argv[1:]:
        for train in (False, True):
            followed, launched = compare(name, train)
            mode = "training" if train else "inference"
            print(f"{name} {mode}: {len(launched)} kernels launched, {len(followed & launched)} of them compiled ahead")
            for difference in sorted(followed ^ launched, key=str):
                print("  ", "launched" if difference in launched else "compiled", *difference)
            differences += len(followed ^ launched) + (not launched)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
