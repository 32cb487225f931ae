"""LayerNorm with global response normalisation against its definition, and PyTorch's machinery around it."""

import importlib

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, check_saving, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import layer_norm_grn, use_backend

BACKENDS = ["torch", "triton"]
SHAPES = [(1, 5, 1, 1), (2, 3, 1, 7), (1, 33, 5, 4), (3, 16, 7, 7), (1, 144, 9, 8)]


def make(shape, dtype=torch.float64, channels_last=True, features=None):
    """Tensor arguments by name."""
    normal = randn(0)
    channels = shape[1]
    tensors = {
        "x": 2 * normal(*shape) + 1,
        "norm_weight": 1 + 0.3 * normal(channels),
        "norm_bias": normal(channels),
        "weight": normal(channels),
        "bias": normal(channels),
    }
    if features is not None:
        tensors["projection"] = normal(features, channels) / channels**0.5
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_naive_in_float64(shape):
    compare("torch", layer_norm_grn, make(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, dtype):
    compare(backend, layer_norm_grn, make(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [4, 20, 96])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_projection(backend, shape, features, dtype):
    compare(backend, layer_norm_grn, make(shape, dtype, features=features))


@pytest.fixture
def linear(monkeypatch):
    """The kernels that know the projection, for whatever size."""
    pytest.importorskip("triton")
    module = importlib.import_module("vla.ops.layer_norm_grn._triton_linear")
    monkeypatch.setattr(module, "suits", lambda x, projection, training: x.dtype.itemsize == 2)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [3, 20, 96])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (2, 3, 2, 9), (1, 180, 3, 3)], ids=lambda s: "x".join(map(str, s)))
def test_kernels_with_the_projection(linear, shape, features, dtype):
    compare("triton", layer_norm_grn, make(shape, dtype, features=features))


def test_projection_against_naive_in_float64():
    compare("torch", layer_norm_grn, make((2, 33, 5, 4), features=20))


def walk_far(monkeypatch):
    """As with large batches, where a program has many tiles of pixels."""
    norms = importlib.import_module("vla.ops.layer_norm_grn._triton_norms")
    monkeypatch.setattr(norms, "MULTIPROCESSORS", 0)
    monkeypatch.setattr(norms, "_PROGRAMS", 1)


@pytest.mark.parametrize("programs", [1, 1000])
def test_projection_of_parts_of_a_picture(linear, monkeypatch, programs):
    """Programs of many tiles of pixels, and pictures of many programs."""
    if programs == 1:
        walk_far(monkeypatch)
    monkeypatch.setattr(linear, "_PROGRAMS", programs)
    compare("triton", layer_norm_grn, make((2, 130, 15, 19), torch.bfloat16, features=70))


@pytest.mark.parametrize("channels, features", [(193, 20), (288, 31), (200, 30)])
def test_projection_without_gradients(channels, features):
    """Of maps as wide as these, only inference has the norms and the product in one kernel."""
    linear = pytest.importorskip("vla.ops.layer_norm_grn._triton_linear")
    tensors = make((2, channels, 9, 8), torch.bfloat16, features=features)
    suits = [linear.suits(tensors["x"], tensors["projection"], training) for training in (False, True)]
    assert suits == [True, False]
    with use_backend("triton"):
        y = layer_norm_grn(**tensors)
    with use_backend("naive"):
        expected = layer_norm_grn(**{name: tensor.double() for name, tensor in tensors.items()})
    assert_close("output", y, expected)


def test_projection_in_blocks_of_features(linear):
    compare("triton", layer_norm_grn, make((2, 130, 9, 8), torch.bfloat16, features=150))


def test_projection_of_pixels_far_from_zero(linear):
    """The mean is taken from the product: its share must be that of the weights as they were multiplied."""
    tensors = make((2, 48, 9, 8), torch.bfloat16, features=32)
    tensors["x"] = (tensors["x"] + 50).to(torch.bfloat16)
    compare("triton", layer_norm_grn, tensors)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_projection_of_an_empty_batch(backend):
    results = run(backend, layer_norm_grn, make((0, 8, 3, 4), torch.bfloat16, features=5))
    assert results["output 0"].shape == (0, 5, 3, 4)
    assert all((value == 0).all() for value in results.values())


def test_projection_in_mixed_precision(linear):
    """Activations of 16 bits, parameters of 32, the result in a dtype of its own; a crop of a map, channels first."""
    tensors = make((2, 24, 6, 9), torch.float32, channels_last=False, features=12)
    tensors["x"] = tensors["x"].bfloat16()[:, :, 1:, 2:]
    compare("triton", layer_norm_grn, tensors, dtype=torch.float32, relative=2e-2)
    with use_backend("triton"):
        y = layer_norm_grn(**tensors)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("features", [None, 3, 40], ids=["norms", "statistics", "normalised map"])
def test_machinery_of_what_is_saved(features):
    pytest.importorskip("triton")
    leaves = [t.requires_grad_() for t in make((1, 16, 3, 3), torch.bfloat16, features=features).values()]

    def norms(*leaves):
        return layer_norm_grn(*leaves[:5], projection=leaves[5] if features else None)

    tensors = [t.detach() for t in leaves]
    arguments = (*tensors[:5], 1e-5, 1e-6, None, tensors[5] if features else None)
    check_saving(norms, leaves, torch.ops.vla.layer_norm_grn_train.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_picture(backend, monkeypatch):
    if backend == "triton":
        walk_far(monkeypatch)
    compare(backend, layer_norm_grn, make((2, 130, 11, 13), torch.float32))


@pytest.mark.parametrize("features", [None, 9])
def test_many_parts_of_a_picture(linear, features):
    """More than the kernel of a picture's factors adds up by itself, and than another takes at once."""
    compare("triton", layer_norm_grn, make((2, 130, 23, 24), torch.bfloat16, features=features))


def test_backward_without_what_a_forward_saves():
    pytest.importorskip("triton")
    module = importlib.import_module("vla.ops.layer_norm_grn._triton")
    reference = importlib.import_module("vla.ops.layer_norm_grn._torch")
    for features in (None, 3, 40):
        tensors = make((1, 16, 5, 3), torch.bfloat16, features=features)
        projection = tensors.pop("projection", None)
        g = randn(1)(1, features or 16, 5, 3)
        actual = module.backward([g.bfloat16()], *tensors.values(), 1e-5, 1e-6, None, projection)
        doubles = [t if t is None else t.double() for t in (*tensors.values(), projection)]
        expected = reference.backward([g.bfloat16().double()], *doubles[:5], 1e-5, 1e-6, None, doubles[5])
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert (a is None) == (e is None)
            if a is not None:
                assert_close(f"gradient {i}", a, e, 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_stay_float32(backend):
    """As in mixed precision: activations of 16 bits, parameters of 32, the result in a dtype of its own."""
    tensors = make((2, 8, 3, 4), torch.float32)
    tensors["x"] = tensors["x"].bfloat16()
    compare(backend, layer_norm_grn, tensors, relative=2e-2, dtype=torch.float16)
    with use_backend(backend):
        assert layer_norm_grn(**tensors, dtype=torch.float16).dtype is torch.float16
        assert layer_norm_grn(**tensors).dtype is torch.bfloat16


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_constant_pixels(backend):
    """Channels without response have no direction to grow in: a finite gradient of zero."""
    tensors = make((1, 4, 2, 2), torch.float32) | {"x": torch.ones(1, 4, 2, 2), "norm_bias": torch.zeros(4)}
    with use_backend(backend):
        y = layer_norm_grn(**tensors)
    assert_close("output", y, tensors["bias"].double()[:, None, None].expand(1, 4, 2, 2))
    assert all(value.isfinite().all() for value in run(backend, layer_norm_grn, tensors).values())


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    results = run(backend, layer_norm_grn, make((0, 8, 3, 4), torch.float32))
    assert results["output 0"].shape == (0, 8, 3, 4)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """A crop of a map, channels first; the result is channels last."""
    tensors = make((2, 8, 6, 7), torch.float32, channels_last=False)
    tensors["x"] = tensors["x"][:, :, 1:5, 2:]
    compare(backend, layer_norm_grn, tensors)
    with use_backend(backend):
        assert layer_norm_grn(**tensors).is_contiguous(memory_format=torch.channels_last)


def test_gradcheck():
    with use_backend("torch"):
        assert torch.autograd.gradcheck(layer_norm_grn, [t.requires_grad_() for t in make((2, 4, 2, 3)).values()])


class Norm(nn.Module):
    def forward(self, x, norm_weight, norm_bias, weight, bias):
        return layer_norm_grn(x, norm_weight, norm_bias, weight, bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 16, 3, 5)).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), 1e-5, 1e-6, None, None)
    check_machinery(Norm(), tensors, torch.ops.vla.layer_norm_grn.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 8, 4)}, r"x has shape \(2, 8, 4\), expected \(B, C, H, W\)"),
        ({"x": torch.ones(2, 0, 4, 4)}, r"x has shape \(2, 0, 4, 4\), expected at least one channel"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight has shape \(7,\), expected \(C,\) = \(8,\)"),
        ({"bias": torch.ones(8, 1)}, r"bias has shape \(8, 1\)"),
        ({"projection": torch.ones(5, 7)}, r"projection has shape \(5, 7\), expected \(F, C\) = \(5, 8\)"),
        ({"projection": torch.ones(5)}, r"projection has shape \(5,\), expected \(F, C\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^layer_norm_grn: {message}"):
        layer_norm_grn(**(make((1, 8, 3, 4)) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^layer_norm_grn: dtype is torch.int64"):
        layer_norm_grn(**make((1, 8, 3, 4)), dtype=torch.int64)


def test_gradients_start_where_compiled_code_expects_them():
    """Gradients of parameters are parts of one sum, of 18 channels each."""
    leaves = [tensor.requires_grad_() for tensor in make((1, 18, 2, 3), torch.float32).values()]
    with use_backend("triton"):
        grads = torch.autograd.grad(layer_norm_grn(*leaves).sum(), leaves)
    assert [grad.data_ptr() % 16 for grad in grads] == [0] * len(leaves)
