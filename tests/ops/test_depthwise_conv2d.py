"""Depthwise convolution: all backends against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels import need_triton
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import depthwise_conv2d, use_backend

BACKENDS = ["torch", "triton"]


def make(shape, kernel, bias=False, dtype=torch.float64, channels_last=True):
    """Tensor arguments by name."""
    normal = randn(0)
    tensors = {"x": normal(*shape), "weight": normal(shape[1], 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5}
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    if bias:
        tensors["bias"] = normal(shape[1])
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


CASES = [
    ((2, 16, 4, 5), (3, 3), True, True, "silu"),
    ((1, 33, 7, 9), (3, 3), False, False, "gelu"),
    ((3, 6, 1, 10), (1, 3), False, True, "silu"),
    ((1, 8, 11, 1), (3, 1), True, True, None),
    ((1, 5, 6, 5), (5, 3), False, True, "gelu"),
    ((1, 20, 9, 6), (7, 7), False, True, None),
    ((1, 3, 1, 1), (5, 5), True, True, "silu"),
    ((1, 2, 29, 3), (1, 3), False, True, "silu"),
    ((1, 2, 25, 2), (3, 3), True, True, None),
    ((2, 4, 3, 2), (1, 1), True, True, "gelu"),
    # Widths that strips of 4 and of 7 columns divide.
    ((1, 20, 9, 14), (3, 3), True, True, "gelu"),
    ((2, 64, 3, 28), (3, 3), False, True, "silu"),
]
# Interpreted, these take as long as all others.
LARGE = [
    # Many taps and many strips: in several blocks, as the channels are; of widths they divide or not; with segments.
    ((3, 20, 3, 24), (7, 7), False, True, None),
    ((2, 8, 10, 32), (7, 7), False, True, None),
    ((4, 10, 9, 13), (5, 7), True, True, "gelu"),
    ((18, 8, 2, 3), (7, 5), False, True, None),
    # A strip of one column behind those of a whole warp, and kernels of three columns.
    ((11, 4, 5, 9), (5, 5), False, True, None),
    ((6, 4, 5, 10), (5, 3), False, True, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, kernel, bias, channels_last, act", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, kernel, bias, channels_last, act, dtype):
    compare(backend, depthwise_conv2d, make(shape, kernel, bias, dtype, channels_last), act=act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, kernel, bias, channels_last, act", LARGE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_against_naive(backend, shape, kernel, bias, channels_last, act, dtype):
    compare(backend, depthwise_conv2d, make(shape, kernel, bias, dtype, channels_last), act=act)


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_two_dtypes_of_16_bits(dtype, result):
    """Maps and gradients that kernels with many taps must not take apart alike."""
    tensors = make((2, 16, 6, 8), (5, 5), True, dtype)
    compare("triton", depthwise_conv2d, tensors, relative=2e-2, dtype=result)


X = torch.ones(6, 8, 9, 9, dtype=torch.bfloat16, device="cpu").to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "x, kernel, dtype, expected",
    [
        (X, (7, 7), torch.bfloat16, True),
        (X, (5, 3), torch.bfloat16, True),
        (X[:, 2:], (7, 7), torch.bfloat16, True),
        (X.half(), (7, 7), torch.float16, True),
        (X, (7, 7), torch.float16, False),
        (X.float(), (7, 7), torch.float32, False),
        # Too few taps and too many, too few strips, no pairs of channels.
        (X, (3, 3), torch.bfloat16, False),
        (X, (9, 9), torch.bfloat16, False),
        (X[:5], (7, 7), torch.bfloat16, False),
        (X[:, :7], (7, 7), torch.bfloat16, False),
        (X[:, 1:7], (7, 7), torch.bfloat16, False),
    ],
)
def test_which_maps_tensor_cores_take(x, kernel, dtype, expected):
    need_triton()
    from vla.ops.depthwise_conv2d import _triton_tiles as tiles

    assert tiles.suits(x, torch.ones(x.shape[1], 1, *kernel), dtype) is expected


def test_memory_that_does_not_begin_at_a_pair():
    """At a multiple of 4 bytes, but not in its storage."""
    need_triton()
    from vla.ops.conv_gelu_linear._triton import _pairs
    from vla.ops.depthwise_conv2d._triton_strips import in_pairs

    values = torch.frombuffer(bytearray(200), dtype=torch.bfloat16, offset=2)[1:65].view(1, 4, 4, 4)
    assert values.data_ptr() % 4 == 0 and _pairs(values).shape == (1, 4, 4, 2)
    values = values.permute(0, 3, 1, 2)
    assert in_pairs(values)[0] is values


def test_gradient_of_many_groups(monkeypatch):
    """More groups of strips than programs, of a crop of a map, with kernels of 32 bits."""
    need_triton()
    from vla.ops.depthwise_conv2d import _triton_tiles as tiles

    monkeypatch.setattr(tiles, "MULTIPROCESSORS", 1)
    tensors = make((7, 24, 5, 20), (5, 5), False, torch.bfloat16)
    tensors["weight"] = tensors["weight"].float()
    x, weight = tensors["x"][:, 2:22, 1:, 2:], tensors["weight"][2:22]
    g = randn(1)(*x.shape).bfloat16().contiguous(memory_format=torch.channels_last)
    assert tiles.suits(x, weight, g.dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*leaves, padding=2, groups=20)
    expected = [y, *torch.autograd.grad(y, leaves, g.double())]
    leaves = [t.requires_grad_() for t in (x, weight)]
    with use_backend("triton"):
        y = depthwise_conv2d(*leaves)
        actual = [y, *torch.autograd.grad(y, leaves, g)]
    for name, a, e in zip(["y", "x", "weight"], actual, expected, strict=True):
        assert_close(name, a, e, 2e-2)


@pytest.mark.parametrize("act", [None, "silu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_definition_is_pytorch(act, bias):
    tensors = make((2, 5, 6, 7), (5, 3), bias)
    y = F.conv2d(tensors["x"], tensors["weight"], tensors.get("bias"), padding=(2, 1), groups=5)
    expected = {None: y, "silu": F.silu(y), "gelu": F.gelu(y)}[act]
    with use_backend("naive"):
        assert_close("output", depthwise_conv2d(**tensors, act=act), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_stay_float32(backend):
    """As in mixed precision: parameters of 32 bits, the result in a dtype of its own."""
    tensors = make((2, 8, 5, 4), (3, 3), True, torch.float32)
    compare(backend, depthwise_conv2d, tensors, relative=2e-2, act="silu", dtype=torch.bfloat16)
    tensors["x"] = tensors["x"].bfloat16()
    compare(backend, depthwise_conv2d, tensors, relative=2e-2, act="gelu")
    with use_backend(backend):
        y = depthwise_conv2d(**tensors, dtype=torch.float32)
    assert y.dtype is torch.float32 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    results = run(backend, depthwise_conv2d, make((0, 8, 3, 4), (3, 3), True, torch.float32), act="silu")
    assert results["output 0"].shape == (0, 8, 3, 4)
    assert all((value == 0).all() for value in results.values())


def test_strides():
    """A crop of a map, half of its channels, and parameters that are views."""
    tensors = make((2, 16, 6, 7), (3, 3), True, torch.float32)
    tensors["x"] = tensors["x"][:, 8:, 1:5, 2:]
    tensors["weight"] = tensors["weight"].mT[::2]
    tensors["bias"] = tensors["bias"][::2]
    compare("triton", depthwise_conv2d, tensors, act="silu")


ZEROS = [
    ((2, 12, 5, 9), (3, 3), 4, "silu"),
    ((1, 33, 7, 9), (3, 3), 7, "gelu"),
    # Pairs of channels with single ones behind them, zeros in a block of their own, and many taps.
    ((1, 6, 4, 5), (3, 3), 1, None),
    ((1, 64, 3, 7), (1, 3), 8, "silu"),
    ((3, 20, 3, 24), (7, 7), 4, None),
    ((0, 12, 3, 4), (3, 3), 4, "silu"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, kernel, zeros, act", ZEROS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_behind_channels(backend, shape, kernel, zeros, act, dtype):
    tensors = make(shape, kernel, True, dtype)
    compare(backend, depthwise_conv2d, tensors, act=act, zeros=zeros)
    for name in ["naive", backend]:
        with use_backend(name):
            y = depthwise_conv2d(**tensors, act=act, zeros=zeros)
            assert y.shape == (shape[0], shape[1] + zeros, *shape[2:])
            assert y.is_contiguous(memory_format=torch.channels_last) and (y[:, shape[1] :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_far_from_zero(backend, act):
    """Where the exponential of an activation overflows or vanishes."""
    tensors = make((1, 4, 3, 3), (3, 3), False, torch.float32)
    tensors["x"] = tensors["x"] * 200
    compare(backend, depthwise_conv2d, tensors, act=act)


def test_gradcheck():
    tensors = make((1, 3, 4, 3), (3, 3), True)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(
            lambda *args: depthwise_conv2d(*args, act="silu"), [t.requires_grad_() for t in tensors.values()]
        )


class Conv(nn.Module):
    def forward(self, x, weight, bias):
        return depthwise_conv2d(x, weight, bias, "silu", zeros=4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 8, 3, 5), (3, 3), True).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), "silu", None, 4)
    check_machinery(Conv(), tensors, torch.ops.vla.depthwise_conv2d.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 8, 4)}, r"x has shape \(2, 8, 4\), expected \(B, C, H, W\)"),
        ({"weight": torch.ones(8, 3, 3)}, r"weight has shape \(8, 3, 3\), expected \(C, 1, kh, kw\)"),
        ({"weight": torch.ones(4, 2, 3, 3)}, r"weight has shape .* = \(8, 1, 3, 3\)"),
        ({"weight": torch.ones(8, 1, 2, 3)}, "weight has shape .* expected odd kh and kw"),
        ({"bias": torch.ones(8, 1)}, r"bias has shape \(8, 1\), expected \(C,\) = \(8,\)"),
        ({"zeros": -1}, "zeros is -1, expected none or more"),
        ({"act": "relu"}, "act is 'relu', expected None or one of silu, gelu"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^depthwise_conv2d: {message}"):
        depthwise_conv2d(**(make((1, 8, 3, 4), (3, 3), True) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^depthwise_conv2d: dtype is torch.int64"):
        depthwise_conv2d(**make((1, 8, 3, 4), (3, 3)), dtype=torch.int64)
