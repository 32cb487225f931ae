"""The gate of channels: all backends against the definition in float64."""

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import channel_gate

BACKENDS = ["torch", "triton"]


def make(batch, channels, hidden, dtype=torch.float64):
    """Tensor arguments by name."""
    normal = randn(0)
    tensors = {"x": normal(batch, channels)}
    tensors["weight1"], tensors["bias1"] = normal(hidden, channels) / channels**0.5, normal(hidden)
    tensors["weight2"], tensors["bias2"] = normal(channels, hidden) / hidden**0.5, normal(channels)
    tensors["scale"] = normal(1)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 32, 4), (1, 1, 1), (3, 348, 21)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, dtype):
    compare(backend, channel_gate, make(*shape, dtype))


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    assert run(backend, channel_gate, make(0, 8, 2, torch.float32))["output 0"].shape == (0, 8)


class Gate(nn.Module):
    def forward(self, x, weight1, bias1, weight2, bias2, scale):
        return channel_gate(x, weight1, bias1, weight2, bias2, scale)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make(2, 6, 3).values())
    arguments = tuple(t.clone().requires_grad_() for t in tensors)
    check_machinery(Gate(), tensors, torch.ops.vla.channel_gate.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 8)}, r"x has shape \(2, 3, 8\), expected \(B, C\)"),
        ({"weight1": torch.ones(2, 9)}, r"weight1 has shape \(2, 9\), expected \(H, C\) = \(2, 8\)"),
        ({"weight2": torch.ones(2, 8)}, r"weight2 has shape \(2, 8\), expected \(C, H\) = \(8, 2\)"),
        ({"scale": torch.ones(2)}, r"scale has shape \(2,\), expected \(1,\) = \(1,\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^channel_gate: {message}"):
        channel_gate(**(make(2, 8, 2) | change))
