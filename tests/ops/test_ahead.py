"""Launches that are compiled ahead, on a machine without a GPU."""

import pytest

from tests.ops.test_aot import python
from vla.ops._registry import MIN_TRITON

pytest.importorskip("triton", minversion="{}.{}".format(*MIN_TRITON), reason="kernels need a newer Triton")

SCRIPT = """
import os, sys

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
with FakeTensorMode(), _ahead.compile_launches():
    call("cuda")
hits = []
triton.knobs.compilation.listener = lambda cache_hit, **details: hits.append(cache_hit)
with Compiler((90,), (90,)).intercept(), use_backend("triton"), OnMeta():
    call("meta")
assert hits == 4 * [True], hits
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    process = python("-c", SCRIPT, str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
