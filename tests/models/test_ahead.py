"""Models that have their kernels compiled side by side."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import vla  # noqa: F401
from tests.kernels import need_triton
from vla.models._ahead import _Call, _shorten

ROOT = Path(__file__).parents[2]
FAMILIES = ["vmamba", "mambavision", "groupmamba", "gspn", "vrwkv", "vrwkv6"]


@pytest.mark.parametrize("grad", [False, True])
def test_to_follow_a_call_leaves_no_trace(grad):
    model = timm.create_model("vmamba_atto", drop_path_rate=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    model.stages[0].register_forward_hook(lambda *args: calls.append(args))
    state = torch.get_rng_state()
    images = torch.empty(2, 3, 32, 32, device="meta")
    _Call(weakref.ref(model), (images,), {}, torch.get_default_device(), None, grad)._follow()
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls and len(model.stages[0]._forward_hooks) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor and torch.equal(value, before[name]), name


def test_blocks_that_are_alike_are_followed_twice():
    rates = [DropPath(rate) for rate in (0.0, 0.1, 0.2, 0.3)]
    convolutions = [nn.Conv2d(4, 4, 3, stride) for stride in (1, 1, 2, 1, 1, 1)]
    linear = [nn.Sequential(nn.Linear(4, 4), rate) for rate in rates]
    identities = [nn.Identity() for _ in range(4)]
    model = nn.ModuleList([nn.Sequential(*blocks) for blocks in (convolutions, linear, identities)])
    _shorten(model)
    assert [list(blocks) for blocks in model] == [
        [*convolutions[:4], convolutions[5]],
        [linear[0], linear[1], linear[3]],
        identities,
    ]


def test_what_is_launched_has_been_compiled():
    need_triton()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The second GroupMamba has maps of a single pixel.
    models = [*(f"{family}_atto" for family in FAMILIES), "groupmamba_tiny"]
    command = [sys.executable, "-m", "tests.models.ahead", *models]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


FIRST_CALLS = """
import sys
import timm, torch, triton, vla
model = timm.create_model(sys.argv[1]).cuda()
images = torch.randn(2, 3, 64, 64, device="cuda")
hits = []
other = triton.knobs.compilation.listener
def listener(cache_hit, **details):
    hits.append(cache_hit)
    other and other(cache_hit=cache_hit, **details)
def run(grad):
    hits.clear()
    with torch.set_grad_enabled(grad), torch.autocast("cuda", torch.bfloat16):
        loss = model.train(grad)(images).sum()
    if grad:
        loss.backward()
    print(len(hits), hits.count(False))
import vla.ops._triton
other, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listener
run(False)
run(True)
"""


@pytest.mark.skipif(torch.get_default_device().type != "cuda", reason="run with --device cuda")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_compiles_one_kernel_itself(tmp_path, family):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_CALLS, f"{family}_atto"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for line in process.stdout.splitlines():
        kernels, compiled = map(int, line.split())
        assert compiled <= 1 < kernels
