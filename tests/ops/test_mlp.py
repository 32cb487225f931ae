"""MLP: all backends against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels import need_triton
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import mlp, use_backend
from vla.ops.mlp import ACTIVATIONS


def make(shape, hidden, out=None, bias=True, dtype=torch.float64):
    """Tensor arguments by name."""
    normal, channels = randn(0), shape[-1]
    out = channels if out is None else out
    tensors = {
        "x": normal(*shape),
        "weight1": normal(hidden, channels) / channels**0.5,
        "bias1": normal(hidden) if bias else None,
        "weight2": normal(out, hidden) / hidden**0.5,
        "bias2": normal(out) if bias else None,
    }
    return {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}


SHAPES = [
    ((2, 3, 5, 24), 96, None, True),
    ((37, 16), 64, 48, True),
    ((1, 1, 33), 20, 7, False),
    ((3, 1), 1, 1, True),
    ((150, 96), 100, None, False),
    ((70, 112), 70, 130, True),
    ((5, 400), 130, None, True),
]
DTYPES = [("torch", torch.float32), *((b, d) for b in ("torch", "triton") for d in (torch.bfloat16, torch.float16))]


@pytest.mark.parametrize("backend, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, hidden, out, bias", SHAPES, ids=str)
def test_against_naive(backend, shape, hidden, out, bias, dtype):
    compare(backend, mlp, make(shape, hidden, out, bias, dtype))


@pytest.mark.parametrize("backend, dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(backend, act, dtype):
    compare(backend, mlp, make((20, 16), 32, dtype=dtype), act=act)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_definition_is_pytorch(act):
    tensors = make((4, 5), 7, 3)
    modules = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "squared_relu": lambda s: F.relu(s) ** 2,
    }
    hidden = modules[act](F.linear(tensors["x"], tensors["weight1"], tensors["bias1"]))
    with use_backend("naive"):
        assert_close("output", mlp(**tensors, act=act), F.linear(hidden, tensors["weight2"], tensors["bias2"]))


@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_empty_batch(backend):
    results = run(backend, mlp, make((0, 4, 8), 16, dtype=torch.bfloat16))
    assert results["output 0"].shape == (0, 4, 8)
    assert all((value == 0).all() for value in results.values())


def test_strides():
    """Half of the channels of a crop, and parameters that are views."""
    tensors = make((2, 6, 7, 32), 48, dtype=torch.bfloat16)
    tensors["x"] = tensors["x"][:, 1:5, 2:, 16:]
    tensors["weight1"] = tensors["weight1"][::2, 16:]
    tensors["bias1"] = tensors["bias1"][::2]
    tensors["weight2"] = tensors["weight2"].T[:24].T
    compare("triton", mlp, tensors)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_far_from_zero(act):
    """Where the exponential of an activation overflows or vanishes."""
    tensors = make((20, 16), 32, dtype=torch.bfloat16)
    tensors["weight1"] = tensors["weight1"] * 1000
    compare("triton", mlp, tensors, act=act)


def test_infinite_alone_with_its_bias():
    """A hidden channel that would overflow where there is no input, as in the rows that fill the last block."""
    tensors = make((3, 16), 32, dtype=torch.float16)
    tensors["x"][:, 0], tensors["weight1"][:, 0] = 32, -9
    tensors["bias1"][:] = 300
    compare("triton", mlp, tensors, act="squared_relu")


def test_gelu_is_exact():
    """As near to the exact function as float32 sums would let it be, also where the hidden channels are tiny."""
    grid = torch.linspace(-8, 8, 1000).bfloat16()[:, None]
    one, zero = torch.ones(1, 1).bfloat16(), torch.zeros(1).bfloat16()
    with use_backend("triton"):
        y = mlp(grid, one, zero, one, zero)
    expected = F.gelu(grid.double())
    assert ((y.double() - expected).abs() <= 2**-7 * expected.abs() + 1e-6).all()


def test_autocast():
    """All tensors are cast as those of a linear layer are, and the gradients come in the parameters' dtype."""
    tensors = {n: t.requires_grad_() for n, t in make((9, 16), 32, dtype=torch.float32).items()}
    for x in (tensors["x"], tensors["x"].bfloat16()):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = mlp(**(tensors | {"x": x}))
            hidden = F.gelu(F.linear(x, tensors["weight1"], tensors["bias1"]))
            expected = F.linear(hidden, tensors["weight2"], tensors["bias2"])
            assert mlp(**{n: t.double() for n, t in tensors.items()}).dtype is torch.float64
        assert y.dtype is expected.dtype is torch.bfloat16
        assert_close("output", y, expected)
        wanted = torch.autograd.grad(expected.sum(), list(tensors.values()))
        for actual, other in zip(torch.autograd.grad(y.sum(), list(tensors.values())), wanted, strict=True):
            assert actual.dtype is torch.float32
            assert_close("gradient", actual, other, 2e-2)


def test_gradcheck():
    with use_backend("torch"):
        assert torch.autograd.gradcheck(mlp, [t.requires_grad_() for t in make((3, 4), 5, 2).values()])


class TwoLayers(nn.Module):
    def forward(self, x, weight1, bias1, weight2, bias2):
        return mlp(x, weight1, bias1, weight2, bias2, "silu")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 4), 8, 5).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), "silu")
    check_machinery(TwoLayers(), tensors, torch.ops.vla.mlp.default, arguments)


def test_backends():
    """The kernels are for 16 bits."""
    need_triton()
    message = "^mlp: backend 'triton' has kernels for bfloat16, float16, the tensors are float32"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        mlp(**make((3, 4), 5, dtype=torch.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(())}, r"x has shape \(\), expected \(\.\.\., C\) with C > 0"),
        ({"x": torch.ones(3, 0)}, r"x has shape \(3, 0\), expected \(\.\.\., C\) with C > 0"),
        ({"weight1": torch.ones(16, 5)}, r"weight1 has shape \(16, 5\), expected \(H, C\) with C = 8"),
        ({"weight1": torch.ones(0, 8)}, r"weight1 has shape \(0, 8\), expected \(H, C\) with H > 0"),
        ({"bias1": torch.ones(8)}, r"bias1 has shape \(8,\), expected \(H,\) = \(16,\)"),
        ({"weight2": torch.ones(8, 8)}, r"weight2 has shape \(8, 8\), expected \(O, H\) with H = 16"),
        ({"bias2": torch.ones(16)}, r"bias2 has shape \(16,\), expected \(O,\) = \(8,\)"),
        ({"act": "tanh"}, "act is 'tanh', expected one of gelu, gelu_tanh, relu, silu, squared_relu"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^mlp: {message}"):
        mlp(**(make((3, 8), 16) | change))


def test_bad_dtypes():
    tensors = make((3, 8), 16)
    with pytest.raises(TypeError, match="^mlp: x has dtype torch.int64, expected a real floating-point type"):
        mlp(**(tensors | {"x": torch.ones(3, 8, dtype=torch.int64)}))
    with pytest.raises(TypeError, match="^mlp: weight2 has dtype torch.float32, expected torch.float64 like x"):
        mlp(**(tensors | {"weight2": tensors["weight2"].float()}))
