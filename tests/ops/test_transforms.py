"""Operators under the transforms of `torch.func`."""

import pytest
import torch
from torch.func import functionalize, grad, grad_and_value, jacrev, jvp, vjp, vmap

from tests.ops import (
    test_bi_wkv,
    test_layer_norm,
    test_mlp,
    test_projected_line_scan,
    test_projected_scan2d,
    test_scan2d,
)
from tests.ops.harness import randn
from tests.tolerance import assert_close
from vla.ops import add_layer_norm, bi_wkv, layer_norm, mlp, projected_line_scan, projected_scan2d, scan2d, squared_relu

CASES = {
    "mlp": (mlp, lambda: test_mlp.make((3, 4), 5, 2, bias=False), {}),
    "layer_norm": (layer_norm, lambda: test_layer_norm.make((2, 3, 8)), dict(groups=2)),
    "add_layer_norm": (add_layer_norm, lambda: test_layer_norm.make((2, 3, 8), branch=True), {}),
    "scan2d": (scan2d, lambda: test_scan2d.make((2, 3, 4, 5)), dict(directions=["row", "col", "row_rev", "col_rev"])),
    "projected_scan2d": (
        projected_scan2d,
        lambda: test_projected_scan2d.make((2, 3, 4, 5)),
        dict(directions=["row", "col", "row_rev", "col_rev"]),
    ),
    "projected_line_scan": (
        projected_line_scan,
        lambda: test_projected_line_scan.make((2, 3, 4, 5)),
        dict(directions=test_projected_line_scan.ALL, chunk=2),
    ),
    "bi_wkv": (bi_wkv, lambda: test_bi_wkv.make(2, 5, 3), {}),
}


def call(name):
    """A scalar function of an operator's tensors, and those, of which None are left out."""
    function, make, options = CASES[name]
    tensors = {name: tensor for name, tensor in make().items() if tensor is not None}

    def loss(*values):
        absent = {} if function is not mlp else dict(bias1=None, bias2=None)
        outputs = function(**dict(zip(tensors, values, strict=True)), **absent, **options)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return sum(output.sin().sum() for output in outputs)

    return loss, tuple(tensors.values())


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    loss, tensors = call(name)
    numbers = tuple(range(len(tensors)))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    expected = torch.autograd.grad(value, leaves)
    grads, actual = grad_and_value(loss, numbers)(*tensors)
    assert torch.equal(actual, value)
    pulled = vjp(loss, *tensors)[1](torch.ones_like(value))
    for i, wanted in enumerate(expected):
        assert_close(f"gradient {i}", grads[i], wanted)
        assert_close(f"gradient {i}", pulled[i], wanted)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_sample(name):
    """Of the first tensor along a dimension of its own, and of all others, which the samples share."""
    if name == "mlp" and torch.__version__ < "2.6":
        pytest.skip("PyTorch 2.5 cannot differentiate inside of vmap")
    loss, (first, *others) = call(name)
    samples = torch.stack([first, 2 * first, -first], dim=1)
    numbers = tuple(range(1 + len(others)))
    dims = (1, *[None] * len(others))
    together = vmap(grad(loss, numbers), in_dims=dims)(samples, *others)
    for i, sample in enumerate(samples.unbind(1)):
        for found, wanted in zip(together, grad(loss, numbers)(sample, *others), strict=True):
            assert_close("gradient", found[i], wanted)
    assert_close("values", vmap(loss, in_dims=dims)(samples, *others)[1], loss(2 * first, *others))


def test_no_samples():
    """As many results, of the shapes that samples would give."""
    weight, bias = randn(0)(8), randn(1)(8)

    # PyTorch cannot add numbers to no samples, as the other tests' sums do.
    def loss(x, weight):
        return layer_norm(x, weight, bias).sum()

    grads = vmap(grad(loss, (0, 1)), in_dims=(1, None))(weight.new_empty(2, 0, 3, 8), weight)
    assert [tensor.shape for tensor in grads] == [(0, 2, 3, 8), (0, 8)]


def test_functionalize():
    x = randn(0)(2, 3)
    assert torch.equal(functionalize(squared_relu)(x), squared_relu(x))


def test_jacobian():
    x = randn(0)(2, 3)
    assert_close("jacobian", jacrev(squared_relu)(x), jacrev(lambda x: x.relu().square())(x))


@pytest.mark.parametrize("name", CASES)
def test_what_there_is_not(name):
    """Second derivatives and forward mode raise, instead of being zero."""
    loss, tensors = call(name)

    def penalty(*values):
        return grad(loss)(*values).square().sum()

    with pytest.raises(NotImplementedError, match="forward mode"):
        jvp(loss, tensors, tensors)
    with pytest.raises(NotImplementedError, match="has no second derivatives$"):
        grad(penalty)(*tensors)
    with pytest.raises(NotImplementedError, match="has no second derivatives$"):
        penalty(*(tensor.requires_grad_() for tensor in tensors)).backward()
