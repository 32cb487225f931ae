"""Launches that are compiled ahead, on a machine without a GPU."""

import pytest

from tests.ops.test_aot import python
from vla.ops import _ahead
from vla.ops._registry import MIN_TRITON

pytest.importorskip("triton", minversion="{}.{}".format(*MIN_TRITON), reason="kernels need a newer Triton")

SETUP = """
import os, sys, time

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.driver import driver

from tests.ops.aot import Compiler, Device, OnMeta
from vla.ops import _ahead, layer_norm, squared_relu, use_backend

def call(device):
    x, weight = torch.empty(6, 48, device=device), torch.empty(48, device=device)
    squared_relu(layer_norm(x, weight, weight))
    squared_relu(layer_norm(x.bfloat16(), weight, weight))

device = Device(90)
device.launcher_cls = None
driver.set_active(device)
torch.cuda.current_device = lambda: 0
"""

LAUNCHED = """
with FakeTensorMode(), _ahead.compile_launches():
    call("cuda")
hits = []
triton.knobs.compilation.listener = lambda cache_hit, **details: hits.append(cache_hit)
with Compiler((90,), (90,)).intercept(), use_backend("triton"), OnMeta():
    call("meta")
assert hits == 4 * [True], hits
"""

LAUNCHERS = """
def note(source, metadata):
    with open(os.path.join(sys.argv[1], "launchers"), "a") as file:
        file.write(metadata.name + "\\n")

device.launcher_cls = note
with FakeTensorMode(), _ahead.compile_launches():
    for channels in (48, 64, 80):
        for dtype in (torch.float32, torch.float16):
            x = torch.empty(6, channels, dtype=dtype, device="cuda")
            squared_relu(layer_norm(x, x[0], x[0]))
with open(os.path.join(sys.argv[1], "launchers")) as file:
    names = sorted(file.read().split())
assert names == 2 * ["layer_norm_fwd_kernel"] + 2 * ["squared_relu_fwd_kernel"], names
"""

FAILING = """
def compile(*work):
    {failure}

compile.__module__, compile.__qualname__ = _ahead.__name__, "_compile"
_ahead._compile, _ahead._PATIENCE = compile, 1
start = time.monotonic()
with FakeTensorMode(), _ahead.compile_launches():
    call("cuda")
assert time.monotonic() - start < 30
"""


def run(script: str, folder) -> None:
    process = python("-c", SETUP + script, str(folder))
    assert process.returncode == 0, process.stdout + process.stderr


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    run(LAUNCHED, tmp_path)


def test_what_launches_is_compiled_once_for_equal_arguments(tmp_path):
    run(LAUNCHERS, tmp_path)


@pytest.mark.parametrize("failure", ["os._exit(1)", "time.sleep(1000)", "raise MemoryError"])
def test_a_compilation_that_fails_is_not_waited_for(failure, tmp_path):
    run(FAILING.format(failure=failure), tmp_path)


def test_one_kernel_that_is_not_in_the_cache_sets_it_off(monkeypatch):
    calls = []
    for processors, expected in ((1, 0), (2, 1)):
        monkeypatch.setattr(_ahead, "processors", lambda n=processors: n)
        _ahead.at_compilation(lambda: calls.append(None))
        for cache_hit in (True, False, False):
            _ahead.listen(None, cache_hit=cache_hit)
        assert len(calls) == expected
    _ahead.at_compilation(None)


NAMES = """
import sys

from vla.ops._triton import Kernel, _hash
from vla.ops.mlp import _triton as mlp
from vla.ops.scan2d import _triton as scan2d

kernels = {k.__name__: k for module in (mlp, scan2d) for k in vars(module).values() if type(k) is Kernel}
for name in sorted(kernels, reverse=sys.argv[1] == "reverse"):
    _hash(kernels[name].jit)
print(*((name, kernels[name].jit.cache_key) for name in sorted(kernels)))
"""


def test_names_in_the_cache_hang_on_no_order():
    first, second = (python("-c", NAMES, order) for order in ("forward", "reverse"))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
