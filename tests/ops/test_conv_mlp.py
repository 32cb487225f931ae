"""MLP with a depthwise convolution: all backends against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import RELATIVE, assert_close
from vla.ops import conv_mlp, conv_mlp_add_norm, use_backend

DTYPES = [("torch", torch.float32), *((b, d) for b in ("torch", "triton") for d in (torch.bfloat16, torch.float16))]


def make(shape, features, out, dtype=torch.float64):
    """Tensor arguments by name."""
    normal, channels = randn(0), shape[3]
    tensors = {
        "x": normal(*shape),
        "in_weight": normal(features, channels) / channels**0.5,
        "in_bias": normal(features),
    }
    tensors |= {"weight": normal(features, 1, 3, 3) / 3, "bias": normal(features)}
    tensors |= {"out_weight": normal(out, features) / features**0.5, "out_bias": normal(out)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def make_all(shape, features, out, dtype=torch.float64, stream=None, branch=True):
    """Those of the layers with residual connection and norm."""
    normal, size = randn(1), (*shape[:3], out)
    tensors = {"stream": normal(*size), "norm_weight": normal(out), "norm_bias": normal(out)}
    if branch:
        tensors["branch"] = normal(*size)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["stream"] = tensors["stream"].to(stream or dtype)
    return make(shape, features, out, dtype) | tensors


SHAPES = {
    "even": ((2, 16, 20, 64), 128, 64),
    "rows of seven": ((1, 14, 8, 32), 64, 32),
    "one strip in a row": ((1, 16, 4, 16), 64, 16),
    "one row of strips": ((3, 8, 8, 48), 128, 40),
    "odd": ((3, 9, 7, 35), 67, 33),
    "few features on an even map": ((1, 8, 8, 20), 40, 24),
    "one pixel": ((2, 1, 1, 1), 5, 1),
    "many columns": ((1, 3, 5, 20), 24, 300),
    "many channels": ((1, 3, 5, 150), 24, 30),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, dtype", DTYPES, ids=str)
def test_against_naive(backend, dtype, shape):
    compare(backend, conv_mlp, make(*SHAPES[shape], dtype=dtype))


# The norm of a single channel is its shift whatever that is.
NORMED = SHAPES | {"one pixel": ((2, 1, 1, 1), 5, 3)}


@pytest.mark.parametrize("shape", NORMED)
@pytest.mark.parametrize("stream", [None, torch.float32], ids=["narrow", "wide"])
@pytest.mark.parametrize("backend, dtype", DTYPES, ids=str)
def test_norm_against_naive(backend, dtype, stream, shape):
    """A stream in the map's dtype with a branch, one in float32 alone, as under autocast."""
    tensors = make_all(*NORMED[shape], dtype=dtype, stream=stream, branch=stream is None)
    options = dict(eps=1e-3, dtype=None if stream is None else dtype)
    # What is added has the map's precision.
    compare(backend, conv_mlp_add_norm, tensors, RELATIVE[dtype], **options)


def test_definition_is_pytorch():
    tensors = make((2, 5, 6, 3), 8, 4)
    x, in_weight, in_bias, weight, bias, out_weight, out_bias = tensors.values()
    hidden = F.linear(x, in_weight, in_bias).permute(0, 3, 1, 2)
    hidden = F.gelu(F.conv2d(hidden, weight, bias, padding=1, groups=8)).permute(0, 2, 3, 1)
    with use_backend("naive"):
        assert_close("output", conv_mlp(**tensors), F.linear(hidden, out_weight, out_bias))


def test_norm_is_pytorch():
    tensors = make_all((2, 5, 6, 3), 8, 4)
    layers = {name: tensors[name] for name in make((2, 5, 6, 3), 8, 4)}
    with use_backend("naive"):
        total = tensors["stream"] + tensors["branch"] + conv_mlp(**layers)
        norm = F.layer_norm(total, (4,), tensors["norm_weight"], tensors["norm_bias"], 1e-3)
        for name, actual, expected in zip(
            ("sum", "norm"), conv_mlp_add_norm(**tensors, eps=1e-3), (total, norm), strict=True
        ):
            assert_close(name, actual, expected)


@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_dtypes_of_results(backend):
    """As PyTorch promotes a sum, and as asked for."""
    tensors = make_all((1, 2, 3, 8), 6, 4, torch.bfloat16, stream=torch.float16)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with use_backend(backend):
            total, norm = conv_mlp_add_norm(**tensors, dtype=dtype)
        assert (total.dtype, norm.dtype) == (torch.float32, expected)


@pytest.mark.parametrize("out", [8, 200])
@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_norm_without_its_sum(backend, out):
    tensors = make_all((1, 9, 3, 8), 16, out, torch.bfloat16)
    with use_backend(backend):
        _, expected = conv_mlp_add_norm(**tensors)
        total, norm = conv_mlp_add_norm(**tensors, with_sum=False)
    assert torch.equal(norm, expected) and total.shape == (0,)


def test_stream_is_as_exact_as_it_comes():
    """What is added to a stream in float32 is rounded to no fewer bits on the way, nor is the stream."""
    tensors = make_all((1, 8, 8, 32), 64, 16, torch.bfloat16, stream=torch.float32, branch=False)
    zeros = {name: torch.zeros_like(tensors[name]) for name in ("out_weight", "out_bias")}
    with use_backend("triton"):
        total, _ = conv_mlp_add_norm(**tensors | zeros)
    assert torch.equal(total, tensors["stream"])


@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_strides(backend):
    """Some channels of a crop, a map with its channels first, and parameters that are views."""
    tensors = make((2, 9, 8, 40), 48, 20, dtype=torch.bfloat16)
    for name in ("weight", "bias", "in_bias", "out_bias"):
        tensors[name] = tensors[name][::2]
    tensors["in_weight"], tensors["out_weight"] = tensors["in_weight"][::2, 20:], tensors["out_weight"][::2, 24:]
    x = tensors["x"][:, 1:, :7, 3:23]
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    results = [run(backend, conv_mlp, tensors | {"x": t})["output 0"] for t in (x, x.contiguous(), first)]
    if backend == "triton":  # a library has algorithms for each order
        assert all(torch.equal(y, results[0]) for y in results)
    with use_backend("naive"):
        expected = conv_mlp(**{name: t.double() for name, t in (tensors | {"x": x}).items()})
    for y in results:
        assert y.is_contiguous()
        assert_close("output", y, expected)


def test_places_on_the_map():
    """Kernels of ones and one feature: with zeros for x, a pixel has the first layer's bias once for each neighbour."""
    tensors = {name: torch.zeros_like(t) for name, t in make((1, 16, 8, 16), 1, 16, torch.bfloat16).items()}
    for name in ("weight", "in_bias", "out_weight"):
        tensors[name].fill_(1)
    with use_backend("triton"):
        y = conv_mlp(**tensors)[0, :, :, 0]
    expected = torch.full((16, 8), 9.0)
    expected[[0, -1]] = expected[:, [0, -1]] = 6
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    assert torch.equal(y.float().round(), expected)


@pytest.mark.parametrize("backend", ["naive", "torch", "triton"])
def test_empty_batch(backend):
    results = run(backend, conv_mlp, make((0, 4, 3, 8), 6, 5, torch.bfloat16))
    assert results["output 0"].shape == (0, 4, 3, 5)
    results = run(backend, conv_mlp_add_norm, make_all((0, 4, 3, 8), 6, 5, torch.bfloat16))
    assert results["output 0"].shape == results["output 1"].shape == (0, 4, 3, 5)


class Layers(nn.Module):
    def forward(self, x, in_weight, in_bias, weight, bias, out_weight, out_bias):
        return conv_mlp(x, in_weight, in_bias, weight, bias, out_weight, out_bias)


class AllLayers(nn.Module):
    def forward(self, x, in_weight, in_bias, weight, bias, out_weight, out_bias, stream, norm_weight, norm_bias):
        layers = (x, in_weight, in_bias, weight, bias, out_weight, out_bias)
        total, norm = conv_mlp_add_norm(*layers, stream, norm_weight, norm_bias, dtype=torch.float32)
        return total + norm


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 4, 6), 7, 5).values())
    arguments = tuple(t.clone().requires_grad_() for t in tensors)
    nothing = (None, None, None, None, 0.0, None, False)
    check_machinery(Layers(), tensors, torch.ops.vla.conv_mlp.default, arguments + nothing)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery_with_norm():
    tensors = tuple(make_all((2, 3, 4, 6), 7, 5, branch=False).values())
    *layers, stream, norm_weight, norm_bias = (t.clone().requires_grad_() for t in tensors)
    arguments = (*layers, stream, stream, norm_weight, norm_bias, 1e-5, None, True)
    check_machinery(AllLayers(), tensors, torch.ops.vla.conv_mlp.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 6)}, r"x has shape \(2, 3, 6\), expected \(B, H, W, C\)"),
        ({"x": torch.ones(2, 3, 6, 0)}, r"x has shape \(2, 3, 6, 0\), expected \(B, H, W, C\) with C > 0"),
        ({"in_weight": torch.ones(7, 5)}, r"in_weight has shape \(7, 5\), expected \(F, C\) with F > 0, C = 6"),
        ({"in_weight": torch.ones(0, 6)}, r"in_weight has shape \(0, 6\), expected \(F, C\) with F > 0, C = 6"),
        ({"in_bias": torch.ones(6)}, r"in_bias has shape \(6,\), expected \(F,\) = \(7,\)"),
        ({"weight": torch.ones(7, 1, 5, 5)}, r"weight has shape .*, expected \(F, 1, 3, 3\) = \(7, 1, 3, 3\)"),
        ({"bias": torch.ones(5)}, r"bias has shape \(5,\), expected \(F,\) = \(7,\)"),
        ({"out_weight": torch.ones(5, 6)}, r"out_weight has shape \(5, 6\), expected \(D, F\) with F = 7"),
        ({"out_bias": torch.ones(6)}, r"out_bias has shape \(6,\), expected \(D,\) = \(5,\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^conv_mlp: {message}"):
        conv_mlp(**(make((2, 3, 4, 6), 7, 5) | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": torch.ones(2, 3, 5, 4)}, r"stream has shape .*, expected \(B, H, W, D\) = \(2, 3, 4, 5\)"),
        ({"branch": torch.ones(3, 4, 5)}, r"branch has shape .*, expected \(B, H, W, D\) = \(2, 3, 4, 5\)"),
        ({"norm_weight": torch.ones(6)}, r"norm_weight has shape \(6,\), expected \(D,\) = \(5,\)"),
        ({"norm_bias": torch.ones(1, 5)}, r"norm_bias has shape \(1, 5\), expected \(D,\) = \(5,\)"),
    ],
)
def test_bad_arguments_of_the_norm(change, message):
    with pytest.raises(ValueError, match=f"^conv_mlp: {message}"):
        conv_mlp_add_norm(**(make_all((2, 3, 4, 6), 7, 5) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match="^conv_mlp: weight has dtype torch.int64"):
        conv_mlp(**(make((2, 3, 4, 6), 7, 5) | {"weight": torch.ones(7, 1, 3, 3, dtype=torch.int64)}))
    with pytest.raises(TypeError, match="^conv_mlp: dtype is torch.int8"):
        conv_mlp_add_norm(**make_all((2, 3, 4, 6), 7, 5), dtype=torch.int8)
