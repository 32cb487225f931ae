"""Convolution, batch norm and ReLU: all backends against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import _walk, conv_norm_relu, use_backend

BACKENDS = ["torch", "triton"]


def make(size=(2, 5, 6, 7), out=8, kernel=(3, 3), normed=8, dtype=torch.float64):
    """Tensor arguments by name."""
    normal = randn(0)
    tensors = {"x": normal(*size), "weight": normal(out, size[1], *kernel) / (size[1] * kernel[0] * kernel[1]) ** 0.5}
    tensors |= {"mean": normal(normed), "var": normal(normed).square() + 0.5}
    # Far from where ReLU's derivative jumps.
    tensors |= {"norm_weight": normal(normed) / 8, "norm_bias": 3 * normal(normed).sign()}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


SHAPES = {
    "usual": (dict(size=(2, 32, 9, 11), out=32, normed=32), dict(padding_h=1, padding_w=1)),
    "repeated": (dict(size=(2, 24, 8, 6), out=16, kernel=(4, 3), normed=8), dict(padding_w=1)),
    "many results": (dict(size=(2, 24, 5, 6), out=136, kernel=(4, 3), normed=68), dict(padding_w=1)),
    "one pixel": (dict(size=(1, 1, 1, 1), out=1, kernel=(1, 1), normed=1), {}),
    "strided": (
        dict(size=(2, 3, 12, 16), out=16, kernel=(8, 10), normed=8),
        dict(padding_h=3, padding_w=4, stride_h=2, stride_w=4),
    ),
    "odd strides": (
        dict(size=(2, 5, 9, 14), out=40, kernel=(3, 5), normed=40),
        dict(padding_w=2, stride_h=3, stride_w=2),
    ),
    "wide padding": (dict(size=(3, 5, 2, 1), out=17, kernel=(5, 2), normed=17), dict(padding_h=3, padding_w=4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, dtype):
    arguments, padding = SHAPES[shape]
    compare(backend, conv_norm_relu, make(**arguments, dtype=dtype), **padding)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("processors", [1, 7])
def test_many_rows_for_a_program(processors, shape, monkeypatch):
    """Where there are enough columns to fill a GPU, a program walks down a part of the map or all of it."""
    monkeypatch.setattr(_walk, "PROCESSORS", processors)
    monkeypatch.setattr(_walk, "BLOCK_P", 16)
    arguments, padding = SHAPES[shape]
    compare("triton", conv_norm_relu, make(**arguments, dtype=torch.bfloat16), **padding)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_rounds_what_it_reads(backend, shape):
    """The same as of a map that has been rounded before; in float16, as the interpreter cuts bfloat16 off."""
    arguments, options = SHAPES[shape]
    tensors = make(**arguments, dtype=torch.float32)
    with use_backend(backend):
        y = conv_norm_relu(**tensors, **options, dtype=torch.float16)
        expected = conv_norm_relu(**tensors | {"x": tensors["x"].half()}, **options)
    assert y.dtype is torch.float16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, layout, dtype):
    tensors = make((2, 5, 8, 9), dtype=dtype)
    expected = run("naive", conv_norm_relu, {n: t.double() for n, t in tensors.items()})["output 0"]
    x = tensors["x"]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
        tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
    elif layout == "part":
        x = torch.cat([x, x, x], 1)[:, 5:10]
    with use_backend(backend):
        y = conv_norm_relu(**(tensors | {"x": x}))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close("output", y, expected)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_channels(weight_format, monkeypatch):
    """What cuDNN is handed for many channels, of which its operator makes the result on a GPU alone."""
    from vla.ops.conv_norm_relu import _triton

    def convolution(x, weight, bias, stride, padding, dilation, groups):
        return F.relu(F.conv2d(x.float(), weight.float(), bias.float(), stride, padding, dilation, groups)).to(x.dtype)

    monkeypatch.setattr(_triton, "_is_for_cudnn", lambda x, weight, dtype: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution)
    tensors = make((2, 40, 5, 6), out=48, kernel=(3, 2), normed=24, dtype=torch.float32)
    expected = run("naive", conv_norm_relu, {n: t.double() for n, t in tensors.items()}, padding_h=1)["output 0"]
    tensors["weight"] = tensors["weight"].contiguous(memory_format=weight_format)
    tensors["x"] = tensors["x"].bfloat16()
    with use_backend("triton"):
        y = conv_norm_relu(**tensors, padding_h=1)
    assert (y.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    assert run(backend, conv_norm_relu, make((0, 5, 6, 7), dtype=torch.float32))["output 0"].shape == (0, 8, 4, 5)


class Layers(nn.Module):
    def forward(self, x, weight, mean, var, norm_weight, norm_bias):
        return conv_norm_relu(x, weight, mean, var, norm_weight, norm_bias, 1, 0, 1e-5, 1, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make().values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), 1, 0, 1e-5, 1, 2, None)
    check_machinery(Layers(), tensors, torch.ops.vla.conv_norm_relu.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 5, 8)}, r"x has shape \(2, 5, 8\), expected \(B, C, H, W\)"),
        ({"weight": torch.ones(8, 4, 3, 3)}, r"weight has shape \(8, 4, 3, 3\), expected \(D, C, KH, KW\) with C = 5"),
        ({"weight": torch.ones(8, 5, 7, 3)}, r"weight has shape .*, expected a window within x"),
        ({"mean": torch.ones(3)}, r"mean has shape \(3,\), expected \(N,\), N a divisor of D = 8"),
        ({"var": torch.ones(3)}, r"var has shape \(3,\), expected \(N,\) = \(8,\)"),
        ({"padding_h": -1}, r"padding_h is -1 and padding_w 0, expected 0 or more"),
        ({"stride_w": 0}, r"stride_h is 1 and stride_w 0, expected 1 or more"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^conv_norm_relu: {message}"):
        conv_norm_relu(**(make() | change))
