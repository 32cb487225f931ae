"""The depthwise convolution as a layer: PyTorch's own, on every path that a tensor can take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tolerance import assert_close
from vla.layers import depthwise
from vla.layers.depthwise import DepthwiseConv2d

ACTIVATIONS = {None: lambda y: y, nn.SiLU: F.silu, "gelu": F.gelu, nn.GELU: F.gelu, nn.Tanh: torch.tanh}


@pytest.mark.parametrize("kernel_size", [3, (1, 5), (1, 4)])
@pytest.mark.parametrize("act_layer", ACTIVATIONS)
def test_values(kernel_size, act_layer):
    layer = DepthwiseConv2d(6, kernel_size, act_layer=act_layer).double()
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, padding="same", groups=6)
    assert_close("output", layer(x), ACTIVATIONS[act_layer](expected))


def test_operator_under_autocast(monkeypatch):
    """Where there are kernels the layer is the operator, and its result is in autocast's dtype."""
    calls = []

    def operator(x, weight, bias, act, dtype):
        calls.append((act, dtype))
        return x.to(dtype)

    monkeypatch.setattr(depthwise, "depthwise_conv2d", operator)
    monkeypatch.setattr(depthwise, "autocast_dtype", lambda x: torch.bfloat16)
    layer = DepthwiseConv2d(6, 3, act_layer=nn.SiLU).to("meta")
    assert layer(torch.empty(2, 6, 4, 5, device="meta")).dtype is torch.bfloat16
    assert calls == [("silu", torch.bfloat16)]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_script_and_trace():
    layer = DepthwiseConv2d(6, 3, bias=False, act_layer=nn.GELU)
    x = torch.randn(2, 6, 4, 5)
    for version in (torch.jit.script(layer), torch.fx.symbolic_trace(layer), torch.export.export(layer, (x,)).module()):
        assert torch.equal(version(x), layer(x))
