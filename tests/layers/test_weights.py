"""Weights that a compiled network casts at once."""

from unittest.mock import Mock

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import vla  # noqa: F401
from tests.tolerance import assert_close
from vla.layers import groupmamba
from vla.layers.groupmamba import GroupMambaMixer
from vla.layers.gspn import GSPNMixer
from vla.layers.weights import product_weights
from vla.models import _ahead

DEVICE = torch.get_default_device().type
# The narrow GroupMamba has groups whose widths are no multiples of 8, and wider ones than its kernels for groups take.
NETWORKS = {
    "groupmamba_narrow": ("groupmamba_tiny", dict(dims=(12, 28, 300, 44), depths=(1, 1, 1, 1))),
    "groupmamba": ("groupmamba_atto", {}),
    "vmamba": ("vmamba_atto", {}),
    "mambavision": ("mambavision_atto", {}),
    "gspn": ("gspn_atto", {}),
    "vrwkv": ("vrwkv_atto", {}),
    "vrwkv6": ("vrwkv6_atto", {}),
}


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    name, options = NETWORKS[name]
    model = timm.create_model(name, num_classes=10, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(model: nn.Module) -> torch.Tensor:
    # Vision-RWKV's are of one size.
    size = (32, 32) if hasattr(model, "stages") else model.default_cfg["input_size"][1:]
    return torch.randn(2, 3, *size)


def compiled(model: nn.Module, x: torch.Tensor, backend) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        return torch.compile(model, fullgraph=True, backend=backend)(x)


@pytest.fixture
def everywhere(monkeypatch):
    """A CPU is taken for a GPU, for which alone weights are cast at once."""
    monkeypatch.setattr(_ahead, "_casts_on_gpu", lambda args: not torch.is_grad_enabled())


@pytest.mark.parametrize("as_on_gpus", [False, True])
def test_forms_give_the_same_logits(as_on_gpus, monkeypatch):
    if as_on_gpus:
        monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
    model = create("groupmamba_narrow")
    x = images(model)
    with torch.no_grad():
        # Of the same dtype, so that there is nothing but the forms to make a difference.
        weights = product_weights(model, torch.float32)
        expected = model(x)
        y = torch.compile(lambda x: functional_call(model, weights, x), fullgraph=True, backend="eager")(x)
    assert any(weights.get(name, parameter).shape != parameter.shape for name, parameter in model.named_parameters())
    assert_close("logits", y, expected)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "groupmamba_narrow"])
def test_roundings_are_the_same(name, everywhere, monkeypatch):
    model = create(name)
    x, before = images(model), dict(model.named_parameters())
    y = compiled(model, x, "eager")
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    monkeypatch.setattr(_ahead, "_casts_on_gpu", lambda args: False)
    expected = compiled(model, x, "eager")
    assert_close("logits", y, expected)
    assert DEVICE != "cpu" or torch.equal(y, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_weight_of_a_product_is_cast_by_itself(name, everywhere):
    model = create(name)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled(model, images(model), aot_autograd(fw_compiler=keep))
    (graph,) = graphs
    aten = torch.ops.aten
    assert sum(node.target is aten._foreach_copy.default for node in graph.graph.nodes) == 1
    casts = set()
    for node in graph.graph.nodes:
        if node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            weight = node.args[-1]
            while weight.target in (aten.t.default, aten.permute.default):
                weight = weight.args[0]
            if weight.target is aten._to_copy.default and weight.args[0].op == "placeholder":
                casts.add(weight)
    # What operators of a GPU take as it is.
    kept = {GroupMambaMixer: 2, GSPNMixer: 1}
    assert DEVICE != "cpu" or len(casts) == sum(kept.get(type(module), 0) for module in model.modules())


def test_what_is_replaced():
    model = nn.ModuleDict(
        dict(
            plain=nn.Linear(4, 3),
            narrow=nn.Linear(4, 3, dtype=torch.bfloat16),
            normed=weight_norm(nn.Linear(4, 3)),
            conv=nn.Conv2d(4, 3, 1),
        )
    )
    model["tied"] = nn.Linear(4, 3)
    model["tied"].weight = model["plain"].weight
    weights = product_weights(model, torch.float16)
    assert set(weights) == {"plain.weight", "tied.weight"}
    for weight in weights.values():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, model["plain"].weight.half())
    assert product_weights(nn.Identity(), torch.float16) == {}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = nn.Linear(4, 3)
        self.padded = nn.Sequential(nn.Linear(4, 3))

    def product_weights(self):
        return {"kept.weight": None, "padded.0.weight": nn.functional.pad(self.padded[0].weight, (0, 0, 0, 5))}


def test_outer_modules_know_better(monkeypatch):
    monkeypatch.setattr(Outer, "__module__", "vla.layers.outer")
    weights = product_weights(nn.Sequential(Outer()), torch.bfloat16)
    assert {name: weight.shape for name, weight in weights.items()} == {"0.padded.0.weight": (8, 4)}


def test_modules_of_others_keep_theirs():
    assert set(product_weights(nn.Sequential(Outer(), nn.Linear(4, 3)), torch.bfloat16)) == {"1.weight"}


def test_where_weights_are_cast_at_once(monkeypatch):
    x = Mock(spec=torch.Tensor, is_cuda=True)
    monkeypatch.setattr(_ahead, "autocast_dtype", lambda x: torch.bfloat16)
    assert not _ahead._casts_on_gpu((x,))
    with torch.no_grad():
        assert _ahead._casts_on_gpu((x,))
        assert not _ahead._casts_on_gpu(())
        assert not _ahead._casts_on_gpu((Mock(spec=torch.Tensor, is_cuda=False),))
        monkeypatch.setattr(_ahead, "is_exporting", lambda: True)
        assert not _ahead._casts_on_gpu((x,))
        monkeypatch.undo()
        assert not _ahead._casts_on_gpu((x,))
