"""Linear layers of groups: all backends against the definition in float64."""

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import grouped_linear, grouped_linear_pair, grouped_linear_pair_mean, use_backend
from vla.ops.grouped_linear._triton import _programs_of_picture

BACKENDS = ["torch", "triton"]
SHAPES = [
    ((2, 3, 5), 4, 16, 16),
    ((1, 5, 14), 4, 24, 9),
    ((1, 1, 1), 4, 5, 3),
    ((2, 4, 3), 2, 87, 40),
    ((1, 2, 3), 1, 130, 140),
]


def make(pixels, groups, width, outputs, dtype=torch.float64, two=True):
    """Tensor arguments by name."""
    normal = randn(0)
    tensors = {"x": normal(*pixels, groups * width)}
    tensors["weight"] = normal(groups, outputs, width) / width**0.5
    if two:
        tensors["weight2"] = normal(groups, outputs, width) / width**0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def function(tensors):
    """The public function that takes these tensors."""
    return grouped_linear_pair if "weight2" in tensors else grouped_linear


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, dtype, two):
    tensors = make(*shape, dtype, two)
    compare(backend, function(tensors), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, ((3, 23, 17), 4, 16, 16), ((2, 65, 64), 4, 10, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_against_naive(backend, shape, dtype):
    """Of pictures whose pixels do and do not fill a program's tiles, in one of them and in several."""
    compare(backend, grouped_linear_pair_mean, make(*shape, dtype))


@pytest.mark.parametrize(
    "blocks, tiles, programs",
    [(1, 10, 10), (8, 8192, 49), (128, 49, 3), (200, 49, 7), (396, 49, 1), (4000, 49, 7), (8, 1, 1)],
)
def test_programs_of_pictures(blocks, tiles, programs):
    """In one round where that keeps a GPU busy, else in as many as that takes."""
    assert _programs_of_picture(blocks, tiles) == programs


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    results = run(backend, grouped_linear_pair_mean, make((0, 3, 4), 4, 2, 3, torch.float32))
    assert results["output 0"].shape == results["output 1"].shape == (0, 3, 4, 12)
    assert results["output 2"].shape == (0, 8)


def test_weights_of_another_dtype():
    """Parameters in float32, as autocast leaves them, are rounded to the map's dtype."""
    tensors = make((2, 3, 5), 4, 16, 8, torch.float32, two=False)
    tensors["x"] = tensors["x"].half()
    with use_backend("triton"):
        rounded = {name: tensor.half() for name, tensor in tensors.items()}
        assert torch.equal(grouped_linear(**tensors), grouped_linear(**rounded))


def test_strides():
    """Half of a wider map, and one with its channels first."""
    tensors = make((2, 3, 5), 4, 4, 8, torch.bfloat16, two=False)
    x = tensors["x"]
    with use_backend("triton"):
        expected = grouped_linear(**tensors)
        tensors["x"] = torch.cat([x, x], dim=-1).chunk(2, dim=-1)[1]
        assert torch.equal(grouped_linear(**tensors), expected)
        tensors["x"] = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(grouped_linear(**tensors), expected)


class Layer(nn.Module):
    def forward(self, x, weight, weight2):
        y, z = grouped_linear_pair(x, weight, weight2)
        return (y + grouped_linear(x, weight2) * z).mean() + grouped_linear_pair_mean(x, weight, weight2)[2]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 2), 4, 2, 3).values())
    arguments = tuple(t.clone().requires_grad_() for t in tensors)
    check_machinery(Layer(), tensors, torch.ops.vla.grouped_linear.default, (*arguments, True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 8)}, r"x has shape \(2, 3, 8\), expected \(B, H, W, K \* I\)"),
        ({"x": torch.ones(2, 3, 4, 9)}, r"x has shape \(2, 3, 4, 9\), expected 8 channels, 4 groups"),
        ({"weight": torch.ones(8, 4)}, r"weight has shape \(8, 4\), expected \(K, O, I\)"),
        ({"weight2": torch.ones(4, 2, 2)}, r"weight2 has shape \(4, 2, 2\), expected that of weight = \(4, 3, 2\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^grouped_linear: {message}"):
        grouped_linear_pair(**(make((2, 3, 4), 4, 2, 3) | change))
