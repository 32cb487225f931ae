"""GELU with a bias against its definition, and PyTorch's machinery around it."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import bias_gelu, use_backend

BACKENDS = ["torch", "triton"]
SHAPES = [(1,), (3, 1), (1, 7), (2, 5, 33), (3, 4, 5, 130)]


def make(shape, dtype=torch.float64):
    normal = randn(0)
    return {"x": (3 * normal(*shape)).to(dtype), "bias": normal(shape[-1]).to(dtype)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_naive_in_float64(shape):
    compare("torch", bias_gelu, make(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, dtype):
    compare(backend, bias_gelu, make(shape, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles_for_a_program(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("vla.ops.bias_gelu._triton"), "_PROGRAMS", 1)
    compare(backend, bias_gelu, make((50, 20), torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_stay_float32(backend):
    tensors = make((2, 5, 8), torch.float32)
    compare(backend, bias_gelu, tensors | {"x": tensors["x"].bfloat16()}, relative=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    tensors = make((4, 6, 40), torch.float32)
    compare(backend, bias_gelu, tensors | {"x": tensors["x"][:, ::2]})
    compare(backend, bias_gelu, {"x": tensors["x"][..., ::5], "bias": tensors["bias"][::5]})


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    results = run(backend, bias_gelu, make((0, 3, 8), torch.float32))
    assert results["output 0"].shape == (0, 3, 8)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_large_numbers(backend):
    x = torch.tensor([[-1e30, -40.0, 0.0, 40.0, 1e30]])
    results = run(backend, bias_gelu, {"x": x, "bias": torch.zeros(5)})
    assert_close("output", results["output 0"], F.gelu(x.double()))
    assert all(value.isfinite().all() for value in results.values())


def test_gradcheck():
    with use_backend("torch"):
        assert torch.autograd.gradcheck(bias_gelu, [t.requires_grad_() for t in make((3, 2, 5)).values()])


class Activation(nn.Module):
    def forward(self, x, bias):
        return bias_gelu(x, bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 5)).values())
    arguments = tuple(t.clone().requires_grad_() for t in tensors)
    check_machinery(Activation(), tensors, torch.ops.vla.bias_gelu.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(())}, r"x has shape \(\), expected \(..., C\)"),
        ({"bias": torch.ones(7)}, r"bias has shape \(7,\), expected \(C,\) = \(8,\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^bias_gelu: {message}"):
        bias_gelu(**(make((2, 8)) | change))
