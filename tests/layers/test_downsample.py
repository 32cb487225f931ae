import pytest
import torch
from torch import nn

from tests.tolerance import assert_close
from vla.layers import downsample
from vla.layers.downsample import ConvStem
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
