import sys
import types

import pytest
import torch
from torch import nn

from vla.layers import LinearAttentionBlock
from vla.layers.linear_attention import SequenceMixer


class RunningMean(nn.Module):
    """A causal mixer: each token becomes the mean of itself and those before it."""

    def __init__(self, hidden_size: int = 0, as_tuple: bool = False):
        super().__init__()
        self.hidden_size = hidden_size
        self.as_tuple = as_tuple

    def forward(self, x):
        y = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        return (y, None, None) if self.as_tuple else y


@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
def test_every_sample_is_mixed_by_itself(as_tuple):
    """Also where the mixer returns a bare tensor, whose first entry is a sample of the batch."""
    block = LinearAttentionBlock(8, RunningMean, as_tuple=as_tuple)
    x = torch.randn(3, 8, 4, 5)
    y = block(x)
    assert y.shape == x.shape
    for i in range(3):
        assert torch.allclose(y[i : i + 1], block(x[i : i + 1]), atol=1e-6)
    assert not torch.allclose(y[0] - x[0], y[1] - x[1], atol=1e-3)


def test_directions():
    x = torch.randn(2, 3, 4, 5)
    rows = SequenceMixer(RunningMean())(x)
    assert torch.allclose(rows[:, :, 0, 0], x[:, :, 0, 0])
    assert torch.allclose(rows[:, :, -1, -1], x.mean((2, 3)), atol=1e-6)
    flipped = SequenceMixer(RunningMean(), ["row_rev"])(x)
    assert torch.allclose(flipped, SequenceMixer(RunningMean())(x.flip(2, 3)).flip(2, 3), atol=1e-6)
    columns = SequenceMixer(RunningMean(), ["col"])(x)
    assert torch.allclose(columns, SequenceMixer(RunningMean())(x.mT).mT, atol=1e-6)
    both = SequenceMixer(RunningMean(), ["row", "row_rev"])(x)
    assert torch.allclose(both, (rows + flipped) / 2, atol=1e-6)


def test_causality():
    """One direction sees only the past, all of them see the whole map."""
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    (past,) = torch.autograd.grad(SequenceMixer(RunningMean())(x)[0, 0, 1, 1], x)
    assert torch.equal(past[0, 0] != 0, torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool))
    (everything,) = torch.autograd.grad(SequenceMixer(RunningMean(), ["row", "row_rev"])(x)[0, 0, 1, 1], x)
    assert (everything[0, 0] != 0).all()


def test_options_reach_the_mixer():
    block = LinearAttentionBlock(8, RunningMean, as_tuple=True)
    assert block.mixer.mixer.hidden_size == 8 and block.mixer.mixer.as_tuple
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        LinearAttentionBlock(8, RunningMean, heads=2)
    with pytest.raises(ValueError, match=r"got a module and options \['heads'\]"):
        LinearAttentionBlock(8, RunningMean(), heads=2)


def test_layers_of_fla_by_name(monkeypatch):
    layers = types.ModuleType("fla.layers")
    layers.__all__ = ["RunningMean"]
    layers.RunningMean = RunningMean
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    assert isinstance(LinearAttentionBlock(8, "RunningMean").mixer.mixer, RunningMean)
    with pytest.raises(ValueError, match="fla has no layer 'GatedLinear', expected one of RunningMean"):
        LinearAttentionBlock(8, "GatedLinear")


def test_missing_fla(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(ImportError, match=r"pip install 'vision-linear-attention\[fla\]'"):
        LinearAttentionBlock(8, "GatedLinearAttention")


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown direction 'diagonal'"):
        LinearAttentionBlock(8, RunningMean, directions=["diagonal"])
    with pytest.raises(ValueError, match="directions is empty"):
        LinearAttentionBlock(8, RunningMean, directions=[])
    with pytest.raises(ValueError, match=r"mixer Linear returned shape \(1, 4, 3\), expected \(1, 4, 8\)"):
        LinearAttentionBlock(8, nn.Linear(8, 3))(torch.randn(1, 8, 2, 2))
