"""Squared ReLU: all backends against the definition in float64, whose own gradient is PyTorch's."""

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import squared_relu, use_backend

BACKENDS = ["torch", "triton"]


def make(*size, dtype=torch.float32):
    return {"x": randn(0)(*size).to(dtype)}


def test_definition():
    x = randn(0)(3, 50).requires_grad_()
    (expected,) = torch.autograd.grad(torch.relu(x).square().sum(), x)
    with use_backend("naive"):
        y = squared_relu(x)
        (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.relu(x).square())
    assert_close("grad of x", actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1,), (3, 7, 5), (2, 1100)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, size, dtype):
    compare(backend, squared_relu, make(*size, dtype=dtype))


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_strides_empty_and_not_a_number(backend):
    tensors = make(4, 6)
    expected = run(backend, squared_relu, tensors)
    tensors["x"] = tensors["x"].t().contiguous().t()
    for name, value in run(backend, squared_relu, tensors).items():
        assert torch.equal(value, expected[name]), name
    with use_backend(backend):
        assert squared_relu(torch.empty(0, 3)).shape == (0, 3)
        assert squared_relu(torch.tensor([float("nan"), -1.0])).isnan().tolist() == [True, False]


class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return squared_relu(x)


def test_machinery():
    x = make(2, 5)["x"].requires_grad_()
    check_machinery(Layer(), (x.detach(),), torch.ops.vla.squared_relu.default, (x,))


def test_keeps_only_its_result():
    saved = []
    x = make(4, 5)["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = squared_relu(x)
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]


def test_bad_dtype():
    with pytest.raises(TypeError, match="^squared_relu: x has dtype torch.int64"):
        squared_relu(torch.arange(3))
