"""The MLP: timm's on every path, and who decides which path is taken."""

from unittest import mock

import pytest
import timm.layers
import torch
from torch import nn

from tests.tolerance import assert_close
from vla.layers import mlp
from vla.layers.mlp import Mlp

ACTIVATIONS = [nn.GELU, timm.layers.GELU, timm.layers.GELUTanh, nn.ReLU, nn.SiLU, lambda: nn.GELU(approximate="tanh")]


@pytest.fixture
def calls(monkeypatch):
    """Takes the operator's path on the CPU too, and counts its calls."""
    count = []
    monkeypatch.setattr(mlp, "_has_kernels", lambda x: True)
    operator = mlp.mlp
    monkeypatch.setattr(mlp, "mlp", lambda *args: count.append(args[-1]) or operator(*args))
    return count


def as_in_timm(layer: Mlp, **options) -> timm.layers.Mlp:
    """timm's module with the same weights."""
    hidden, channels = layer.fc1.weight.shape[:2]
    reference = timm.layers.Mlp(channels, hidden, layer.fc2.weight.shape[0], **options)
    reference.load_state_dict(layer.state_dict())
    return reference.train(layer.training)


@pytest.mark.parametrize("act_layer", ACTIVATIONS)
def test_values(act_layer, calls):
    layer = Mlp(6, 12, 5, act_layer=act_layer, bias=(True, False))
    x = torch.randn(2, 3, 4, 6)
    assert_close("output", layer(x), as_in_timm(layer, act_layer=act_layer, bias=(True, False))(x))
    assert len(calls) == 1


def test_wide_in_training(calls):
    """PyTorch's products, and one operator for the first bias and the GELU."""
    layer, x = Mlp(200, 12), torch.randn(2, 3, 200)
    reference = as_in_timm(layer)
    assert_close("output", layer(x), reference(x))
    results = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (layer, reference)]
    for (name, _), found, expected in zip(layer.named_parameters(), *results, strict=True):
        assert_close(name, found, expected)
    assert not calls
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1


def test_autocast(calls):
    layer, x = Mlp(6, 12), torch.randn(3, 6)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, expected = layer(x), as_in_timm(layer)(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert_close("output", y, expected)
    assert calls


@pytest.mark.parametrize(
    "options",
    [{"act_layer": nn.Tanh}, {"norm_layer": nn.LayerNorm}, {"drop": 0.5}, {"drop": (0.0, 0.5)}],
    ids=str,
)
def test_what_the_operator_does_not_know(options, calls):
    layer, x = Mlp(6, 12, **options), torch.randn(3, 6)
    reference = as_in_timm(layer, **options)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert_close("output", y, reference(x))
    assert not calls
    if "drop" in options:
        layer.eval()
        assert_close("evaluation", layer(x), as_in_timm(layer)(x))
        assert calls


def test_convolutions(calls):
    layer, x = Mlp(6, 12, use_conv=True), torch.randn(2, 6, 3, 3)
    assert_close("output", layer(x), as_in_timm(layer, use_conv=True)(x))
    assert not calls


def test_replaced_layers(calls):
    """A low-rank adapter, a quantised layer or the like is called."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Mlp(6, 12), torch.randn(3, 6)
    expected = layer.fc2(layer.act(2 * layer.fc1(x)))
    doubled = Doubled(6, 12)
    doubled.load_state_dict(layer.fc1.state_dict())
    layer.fc1 = doubled
    calls.clear()
    assert_close("output", layer(x), expected)
    assert not calls


@pytest.mark.parametrize("name", ["fc1", "act", "fc2", "drop1"])
def test_hooks(name, calls):
    layer, seen = Mlp(6, 12), []
    hook = getattr(layer, name).register_forward_hook(lambda module, args, y: seen.append(y))
    layer(torch.randn(3, 6))
    assert seen and not calls
    hook.remove()
    layer(torch.randn(3, 6))
    assert calls


@pytest.mark.parametrize("name", ["fc1", "act", "fc2", "drop1"])
def test_replaced_forward(name, calls):
    """As tools do that bring weights to the GPU for a call."""
    layer, x, seen = Mlp(6, 12), torch.randn(3, 6), []
    module = getattr(layer, name)
    forward = module.forward
    module.forward = lambda x: seen.append(x) or forward(x)
    expected = layer(x)
    assert seen and not calls
    del module.forward
    assert_close("output", layer(x), expected)
    assert calls


@pytest.mark.parametrize(
    "case, taken",
    [
        (dict(dtype=torch.bfloat16), True),
        (dict(dtype=torch.float16), True),
        (dict(dtype=torch.float32), False),
        (dict(dtype=torch.float32, autocast=True), True),
        (dict(dtype=torch.bfloat16, training=True), True),
        (dict(dtype=torch.bfloat16, channels=mlp._NARROW + 1), True),
        (dict(dtype=torch.bfloat16, channels=mlp._NARROW + 1, training=True), False),
        (dict(dtype=torch.bfloat16, rows=3), False),
        (dict(dtype=torch.bfloat16, is_cuda=False), False),
    ],
    ids=str,
)
def test_path(case, taken, monkeypatch):
    """What passes through the operator, as if the tensors were on a GPU."""

    def choose(dtype, rows=10, channels=12, training=False, autocast=False, is_cuda=True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)
        monkeypatch.setattr(mlp, "LARGE", 10 * channels)
        operator = mock.Mock(wraps=mlp.mlp)
        monkeypatch.setattr(mlp, "mlp", operator)
        layer, x = Mlp(channels, 16).to(dtype), torch.randn(rows, channels, dtype=dtype)
        with torch.set_grad_enabled(training), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            assert_close("output", layer(x), as_in_timm(layer).to(dtype)(x))
        return operator.called

    assert choose(**case) == taken


def test_tracers_see_modules():
    x = torch.randn(3, 6)
    graph = torch.fx.symbolic_trace(Mlp(6, 12)).graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["fc1", "act", "drop1", "norm", "fc2", "drop2"]
    exported = torch.export.export(Mlp(6, 12), (x,)).graph
    assert "mlp" not in {getattr(n.target, "__name__", "") for n in exported.nodes}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    layer, x = Mlp(6, 12), torch.randn(3, 6)
    for version in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(layer, (x,)).module(),
        torch.fx.symbolic_trace(layer),
        torch.jit.script(layer),
        torch.jit.trace(layer, x),
    ):
        assert_close("output", version(x), layer(x))


@pytest.mark.usefixtures("calls")
def test_compiled_operator():
    layer, x = Mlp(6, 12), torch.randn(3, 6, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close("output", compiled(x), layer(x))
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).sin().sum(), leaves)
    for actual, wanted in zip(torch.autograd.grad(compiled(x).sin().sum(), leaves), expected, strict=True):
        assert_close("gradient", actual, wanted)
