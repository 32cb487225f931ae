"""The norm of a modulated map: all backends against the definition in float64."""

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import modulated_layer_norm, use_backend

BACKENDS = ["torch", "triton"]


def make(shape, dtype=torch.float64):
    """Tensor arguments by name."""
    normal, channels = randn(0), shape[3]
    tensors = dict(a=normal(*shape), n=normal(*shape), gate=normal(shape[0], channels))
    tensors |= dict(weight=normal(channels), bias=normal(channels))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, columns",
    [((2, 3, 5, 16), 0), ((1, 1, 1, 3), 7), ((3, 4, 7, 20), 4), ((2, 9, 8, 72), 8), ((1, 5, 8, 348), 4)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, columns, dtype):
    compare(backend, modulated_layer_norm, make(shape, dtype), columns=columns)


def test_columns():
    """Behind the channels come ones, then zeros."""
    tensors = make((2, 3, 5, 12), dtype=torch.float32)
    for backend in ("naive", *BACKENDS):
        with use_backend(backend):
            y = modulated_layer_norm(**tensors, columns=3)
        assert torch.equal(y[..., 12:], torch.eye(1, 3).expand(2, 3, 5, 3))


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    results = run(backend, modulated_layer_norm, make((0, 3, 4, 8), dtype=torch.float32), columns=8)
    assert results["output 0"].shape == (0, 3, 4, 16)


def test_strides():
    """A part of wider rows, as an aligned product leaves it, and a map with its channels first."""
    tensors = make((2, 3, 5, 20), dtype=torch.bfloat16)
    with use_backend("triton"):
        expected = modulated_layer_norm(**tensors)
        tensors["a"] = torch.cat([tensors["a"], tensors["a"]], dim=-1)[..., :20]
        tensors["n"] = tensors["n"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(modulated_layer_norm(**tensors), expected)


def test_equal_numbers():
    """Rows without a variance stay finite."""
    tensors = {name: torch.ones_like(tensor) for name, tensor in make((1, 2, 3, 12), dtype=torch.float32).items()}
    results = run("triton", modulated_layer_norm, tensors)
    assert all(torch.isfinite(result).all() for result in results.values())


class Norm(nn.Module):
    def forward(self, a, n, gate, weight, bias):
        return modulated_layer_norm(a, n, gate, weight, bias, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 2, 5)).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), 3, 1e-5, None)
    check_machinery(Norm(), tensors, torch.ops.vla.modulated_layer_norm.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.ones(2, 3, 8)}, r"a has shape \(2, 3, 8\), expected \(B, H, W, C\)"),
        ({"n": torch.ones(2, 3, 4, 4)}, "n has shape .* expected that of a"),
        ({"gate": torch.ones(2, 4)}, r"gate has shape \(2, 4\), expected \(B, C\) = \(2, 8\)"),
        ({"weight": torch.ones(4)}, r"weight has shape \(4,\), expected \(C,\) = \(8,\)"),
        ({"columns": -1}, "columns is -1, expected none or more"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^modulated_layer_norm: {message}"):
        modulated_layer_norm(**(make((2, 3, 4, 8)) | change))
