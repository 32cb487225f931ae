"""Convolution with layer norm and GELU against its definition, and PyTorch's machinery around it."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import compare, randn, run
from tests.tolerance import assert_close
from vla.ops import _walk, conv_layer_norm, conv_layer_norm_twice, use_backend

BACKENDS = ["torch", "triton"]
# Pictures, channels of the output, side of the window, stride, padding.
CASES = [
    ((1, 3, 5, 4), 48, 3, 2, 1),
    ((2, 3, 8, 12), 33, 4, 4, 0),
    ((1, 1, 1, 1), 16, 1, 1, 0),
    ((1, 2, 7, 3), 5, (2, 3), 1, 2),
    ((3, 3, 9, 7), 80, 3, 2, 1),
]
MANY_CHANNELS = [
    ((2, 32, 9, 12), 64, 3, 2, 1),
    ((3, 16, 7, 5), 20, (4, 2), 1, 2),
    ((1, 24, 8, 9), 16, 2, 3, 0),
]


def make(case, dtype=torch.float64, bias=True):
    """Function of the parameters, and these by name."""
    (batch, channels, height, width), out, size, stride, padding = case
    normal = randn(0)
    size = (size, size) if isinstance(size, int) else size
    x = normal(batch, channels, height, width)
    tensors = {
        "weight": normal(out, channels, *size) / 3,
        "bias": normal(out) if bias else None,
        "norm_weight": 1 + 0.3 * normal(out),
        "norm_bias": normal(out),
    }
    tensors = {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    return partial(conv_layer_norm, x.to(dtype), stride=stride, padding=padding), tensors


def ids(value):
    return str(value).replace(" ", "")


@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_against_naive_in_float64(case, act):
    compare("torch", *make(case), act=act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, case, dtype):
    compare(backend, *make(case, dtype), act="gelu", dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_and_activation(backend):
    compare(backend, *make(CASES[0], torch.float32, bias=False))


@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("case", MANY_CHANNELS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_channels(dtype, case, act, monkeypatch):
    """Maps with a result in 16 bits, or one in float32 of numbers that have 16, whose products are exact."""
    for processors in (1, 5):
        monkeypatch.setattr(_walk, "PROCESSORS", processors)
        monkeypatch.setattr(_walk, "BLOCK_P", 16)
        function, tensors = make(case, dtype)
        compare("triton", function, tensors, act=act, dtype=dtype)
        if dtype != torch.float32:
            doubles = {n: t.double() for n, t in tensors.items()}
            expected = run("naive", function, doubles, act=act, dtype=torch.float64)["output 0"]
            with torch.no_grad(), use_backend("triton"):
                y = function(**tensors, act=act, dtype=torch.float32)
            assert y.dtype == torch.float32
            assert_close("output", y, expected)


def make_twice(case, dtype=torch.float64):
    """`make` for both norms."""
    function, tensors = make(case, dtype)
    normal, out = randn(1), case[1]
    tensors |= {"next_weight": 1 + 0.3 * normal(out).to(dtype), "next_bias": normal(out).to(dtype)}
    return partial(conv_layer_norm_twice, *function.args, **function.keywords), tensors


@pytest.mark.parametrize("case", [*CASES[:3], *MANY_CHANNELS], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_norm(backend, dtype, case, monkeypatch):
    monkeypatch.setattr(_walk, "BLOCK_P", 16)
    compare(backend, *make_twice(case, dtype), next_eps=1e-3)


@pytest.mark.parametrize("case", MANY_CHANNELS, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_norm_in_16_bits(backend, case, monkeypatch):
    """As under autocast: of a stream in float32 for a mixer."""
    monkeypatch.setattr(_walk, "BLOCK_P", 16)
    function, tensors = make_twice(case, torch.float16)
    dtypes = dict(dtype=torch.float32, next_dtype=torch.float16)
    expected = run("naive", function, {name: tensor.double() for name, tensor in tensors.items()}, dtype=torch.float64)
    with torch.no_grad(), use_backend(backend):
        y, n = function(**tensors, **dtypes)
    assert y.dtype is torch.float32 and n.dtype is torch.float16
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, n))
    assert_close("first norm", y, expected["output 0"])
    assert_close("second norm", n, expected["output 1"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tiles_for_a_program(backend, monkeypatch):
    if backend == "triton":
        module = importlib.import_module("vla.ops.conv_layer_norm._triton")
        monkeypatch.setattr(module, "_FORWARD_PROGRAMS", 2)
        monkeypatch.setattr(module, "_BACKWARD_PROGRAMS", 3)
    compare(backend, *make(((2, 3, 25, 23), 16, 3, 2, 1), torch.float32), act="gelu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_stay_float32(backend):
    """As in mixed precision: products and result in 16 bits."""
    function, tensors = make(CASES[0], torch.float32)
    compare(backend, function, tensors, relative=2e-2, act="gelu", dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Crops of a picture and of channels in either memory format; the result is channels last."""
    _, tensors = make(CASES[0], torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = randn(1)(2, 5, 9, 8).float().contiguous(memory_format=memory_format)[:, 1:4, 2:, :-1]
        compare(backend, partial(conv_layer_norm, x, stride=2, padding=1), tensors)
        with use_backend(backend):
            assert conv_layer_norm(x, **tensors).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    function, tensors = make(((0, 3, 5, 4), 48, 3, 2, 1), torch.float32)
    results = run(backend, function, tensors)
    assert results["output 0"].shape == (0, 48, 3, 2)
    assert all((value == 0).all() for value in results.values())


def test_equal_channels():
    """A norm of zero variance."""
    function, tensors = make(CASES[0], torch.float32)
    tensors |= {"weight": torch.ones(48, 3, 3, 3), "bias": torch.zeros(48)}
    assert all(value.isfinite().all() for value in run("triton", function, tensors).values())


def test_gradient_of_the_picture():
    function, tensors = make(CASES[0])
    x = function.args[0].requires_grad_()
    y = conv_layer_norm(x, **tensors, stride=2, padding=1, act="gelu")
    s = F.conv2d(x, tensors["weight"], tensors["bias"], 2, 1).permute(0, 2, 3, 1)
    s = F.gelu(F.layer_norm(s, (48,), tensors["norm_weight"], tensors["norm_bias"])).permute(0, 3, 1, 2)
    assert_close("output", y, s)
    (found,), (expected,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, s))
    assert_close("gradient", found, expected)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.LayerNorm(8)

    def forward(self, x):
        return conv_layer_norm(x, self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias, act="gelu")


def test_machinery():
    module, x = Stem(), torch.randn(2, 3, 5, 6)
    parameters = (module.conv.weight, module.conv.bias, module.norm.weight, module.norm.bias)
    for following, options in (((None, None), ("gelu", torch.float16, None)), (parameters[2:], (None, None, None))):
        arguments = (x, *parameters, *following, 2, 1, 1e-5, 1e-5, *options)
        results = torch.library.opcheck(torch.ops.vla.conv_layer_norm.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results
    expected = module(x)
    for version in (
        torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, (x,)).module(),
    ):
        assert torch.equal(version(x), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 8, 4)}, r"x has shape \(2, 8, 4\), expected \(B, C, H, W\)"),
        ({"weight": torch.ones(8, 2, 3, 3)}, r"weight has shape \(8, 2, 3, 3\), expected \(D, C, KH, KW\) with C = 3"),
        ({"weight": torch.ones(8, 3, 9, 3)}, r"weight has shape \(8, 3, 9, 3\), expected a window within x"),
        ({"bias": torch.ones(7)}, r"bias has shape \(7,\), expected \(D,\) = \(8,\)"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight has shape \(7,\)"),
        ({"act": "silu"}, r"act is 'silu', expected 'gelu' or None"),
        ({"stride": 0}, r"stride is 0"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(x=torch.ones(1, 3, 4, 4), weight=torch.ones(8, 3, 3, 3), bias=None)
    arguments |= dict(norm_weight=torch.ones(8), norm_bias=torch.ones(8)) | change
    with pytest.raises(ValueError, match=f"^conv_layer_norm: {message}"):
        conv_layer_norm(**arguments)
