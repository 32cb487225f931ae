import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from tests.tolerance import assert_close
from vla.layers import GroupMambaBlock, GSPNBlock, ResidualBlock, VRWKVBlock, VSSBlock, norm
from vla.layers.norm import LayerNorm, LayerNorm2d, narrow, normalize


@pytest.fixture(params=[False, True], ids=["plain", "operator"])
def operator(request, monkeypatch):
    """With PyTorch's layer norm, as on a CPU, and with the operator, as on a GPU."""
    monkeypatch.setattr(norm, "_uses_operator", lambda x, composite=False: request.param)


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.usefixtures("operator")
def test_as_in_timm():
    layer, reference = randomize(LayerNorm2d(12, eps=1e-3)), timm.layers.LayerNorm2d(12, eps=1e-3)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    assert_close("map", layer(x), reference(x))
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    tokens = randomize(LayerNorm(12, eps=1e-3))
    x = torch.randn(2, 7, 12)
    assert_close("tokens", tokens(x), F.layer_norm(x, (12,), tokens.weight, tokens.bias, 1e-3))


@pytest.mark.usefixtures("operator")
def test_dtypes():
    layer = LayerNorm2d(8)
    single, half = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3).bfloat16()
    assert layer(single).dtype is torch.float32
    assert layer.to(torch.bfloat16)(half).dtype is torch.bfloat16
    layer = layer.float()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert layer(single).dtype is layer(half).dtype is torch.float32
        narrow(layer)
        assert layer(single).dtype is layer(half).dtype is torch.bfloat16
        total, y = layer.add(single, half)
        assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert layer(single).dtype is torch.float32
    assert not hasattr(narrow(nn.BatchNorm2d(8)), "narrow")


@pytest.mark.usefixtures("operator")
def test_groups_and_gate():
    x, gate = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    weight, bias = torch.randn(12), torch.randn(12)
    expected = F.group_norm(x.flatten(0, 1), 3, weight, bias, 1e-3).view_as(x)
    assert_close("groups", normalize(x, weight, bias, 1e-3, True, 3), expected)
    assert_close("gate", normalize(x, weight, bias, 1e-3, True, 3, gate), expected * F.silu(gate))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ResidualBlock(8, nn.Conv2d(8, 8, 3, padding=1), layer_scale=0.5),
        lambda: ResidualBlock(8, nn.Conv2d(8, 8, 3, padding=1), post_norm=True),
        lambda: VSSBlock(8, gate=True),
        lambda: GSPNBlock(8),
        lambda: GroupMambaBlock(16),
        lambda: VRWKVBlock(8, key_norm=True),
        lambda: VRWKVBlock(8, version=6, head_dim=4),
    ],
)
def test_blocks(make, monkeypatch):
    """The operator changes no value and no dtype."""
    torch.manual_seed(0)
    block = make()
    x = torch.randn(2, 16 if isinstance(block, GroupMambaBlock) else 8, 3, 4, requires_grad=True)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]

    def run() -> list[torch.Tensor]:
        y = block(x)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            mixed = block(x)
        return [y, mixed, *torch.autograd.grad((y.sin().sum(), mixed.sin().sum()), leaves)]

    monkeypatch.setattr(norm, "_uses_operator", lambda x, composite=False: False)
    expected = run()
    monkeypatch.setattr(norm, "_uses_operator", lambda x, composite=False: True)
    for actual, wanted in zip(run(), expected, strict=True):
        assert actual.dtype is wanted.dtype
        assert_close("value", actual, wanted, 2e-2)


@pytest.mark.usefixtures("operator")
def test_hooks_of_the_second_norm():
    """The sum and its norm in one pass is not a call of the norm, for which a hook waits."""
    block, calls = ResidualBlock(8, nn.Identity()), []
    x = torch.randn(2, 8, 3, 4)
    expected = block(x)
    hooks = [
        block.norm2.register_forward_hook(lambda module, args, y: calls.append(y)),
        block.norm2.register_forward_pre_hook(lambda module, args: calls.append(args[0])),
        nn.modules.module.register_module_forward_hook(
            lambda module, args, y: calls.append(y) if module is block.norm2 else None
        ),
    ]
    for hook in hooks:
        assert_close("output", block(x), expected)
        assert calls
        hook.remove()
        calls.clear()


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = narrow(LayerNorm2d(8))
        self.tokens = LayerNorm(8)

    def forward(self, x, branch):
        x, y = self.norm.add(x, branch)
        return x + y + self.norm(x) + self.tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.usefixtures("operator")
def test_machinery():
    module, inputs = randomize(Norms()), (torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4))
    expected = module(*inputs)
    for version in (
        torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, inputs).module(),
        torch.fx.symbolic_trace(module),
        torch.jit.script(module),
    ):
        assert_close("value", version(*inputs), expected)


@pytest.mark.parametrize(
    "block", [ResidualBlock(8, nn.Identity()), VSSBlock(8), GSPNBlock(8)], ids=lambda b: type(b).__name__
)
def test_compiled_maps_have_their_channels_second(block):
    """Inductor lays out every tensor of four dimensions before a convolution as if it were (B, C, H, W)."""
    computed = []

    def keep(graph, inputs):
        # Versions of PyTorch before 2.14 write a dropout that drops nothing as a copy, which Inductor removes.
        views = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.permute, torch.ops.aten.clone}
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and getattr(node.target, "overloadpacket", None) not in views:
                computed.append(tuple(value.shape))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    # On the CPU, where operators are single nodes in the graph whatever the size.
    compiled = torch.compile(copy.deepcopy(block).cpu(), backend=aot_autograd(fw_compiler=keep))
    compiled(torch.randn(2, 8, 5, 7, device="cpu").contiguous(memory_format=torch.channels_last)).sum().backward()
    assert (2, 8, 5, 7) in computed
    assert [shape for shape in computed if shape[1:3] == (5, 7)] == []
