from unittest.mock import Mock

import pytest
import torch
from torch import nn

from tests.tolerance import assert_close
from vla.layers import downsample
from vla.layers.downsample import ConvDownsample, ConvStem
from vla.layers.norm import LayerNorm2d


@pytest.fixture
def stem():
    stem = ConvStem(3, 16, 4, LayerNorm2d)
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.normal_()
    return stem


def results(stem: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = stem(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(stem.parameters()))]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operator_does_the_same(stem, memory_format, monkeypatch):
    x = torch.randn(2, 3, 11, 14).contiguous(memory_format=memory_format)
    expected = results(stem, x)
    monkeypatch.setattr(downsample, "_uses_operator", lambda *args: True)
    for i, (found, wanted) in enumerate(zip(results(stem, x), expected, strict=True)):
        assert_close(f"result {i}", found, wanted)


def test_stems_without_the_operator():
    x = torch.randn(2, 3, 11, 14)
    for norm in (nn.Identity, nn.BatchNorm2d):
        assert ConvStem(3, 16, 4, norm)(x).shape == (2, 16, 3, 4)


def test_few_channels_in_one_pass(monkeypatch):
    """How GPUs evaluate it, unless somebody waits for a module's call."""
    layer, x = ConvDownsample(16, 24, LayerNorm2d, 3).double(), torch.randn(2, 16, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    calls = Mock(side_effect=downsample.conv_layer_norm)
    monkeypatch.setattr(downsample, "conv_layer_norm", calls)
    expected = layer(x)
    monkeypatch.setattr(downsample, "takes_narrow_kernels", lambda x: True)
    with torch.no_grad():
        assert_close("output", layer(x), expected)
        assert calls.call_count == 1
        layer.norm.register_forward_hook(lambda module, args, y: None)
        assert_close("output", layer(x), expected)
    assert torch.equal(layer(x), expected)
    assert calls.call_count == 1
