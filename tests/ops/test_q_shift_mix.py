"""Q-Shift's mixes: all backends against the definition in float64."""

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import q_shift, q_shift_mix, use_backend

BACKENDS = ["torch", "triton"]


def make(shape, mixes, rank=0, dtype=torch.float64, channels_last=True):
    """Tensor arguments by name."""
    normal = randn(0)
    batch, channels, height, width = shape
    tensors = {"x": normal(*shape), "weight": normal(mixes, channels)}
    if channels_last:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    if rank > 0:
        tensors["low"] = normal(batch, height * width, mixes * rank)
        tensors["up"] = normal(mixes, rank, channels)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


CASES = [
    ((2, 16, 4, 5), 3, 0, True, {}),
    ((2, 8, 4, 5), 2, 0, False, dict(keeps=True)),
    ((1, 8, 3, 5), 2, 2, True, dict(keeps=True)),
    ((1, 7, 1, 6), 2, 0, False, dict(shift=2, gamma=0.2)),
    ((2, 24, 6, 1), 5, 3, True, dict(head_dim=12)),
    ((1, 70, 7, 7), 2, 20, False, dict(shift=9, head_dim=10)),
    ((1, 8, 3, 3), 1, 4, True, dict(shift=0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, mixes, rank, channels_last, options", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, mixes, rank, channels_last, options, dtype):
    compare(backend, q_shift_mix, make(shape, mixes, rank, dtype, channels_last), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_parameters_stay_float32(backend, rank):
    """As in mixed precision: activations of 16 bits, parameters of 32, the result in a dtype of its own."""
    tensors = make((2, 8, 3, 4), 2, rank, torch.bfloat16)
    tensors |= {n: t.float() for n, t in tensors.items() if n in ("x", "weight", "up")}
    # Like a product under autocast: low is in bfloat16 and so is up's share of it.
    compare(backend, q_shift_mix, tensors, relative=2e-2, dtype=torch.bfloat16)
    with use_backend(backend):
        assert q_shift_mix(**tensors, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert q_shift_mix(**tensors).dtype is torch.float32


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_shares_zero_and_one(backend):
    x = randn(0)(2, 8, 3, 4).float()
    with use_backend(backend):
        y = q_shift_mix(x, torch.tensor([0.0, 1.0])[:, None].expand(2, 8), head_dim=4)
        assert torch.equal(y[0], x)
        assert torch.allclose(y[1], q_shift(x, head_dim=4), atol=1e-6)
        assert y[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("rank", [0, 3])
def test_empty_batch(backend, rank):
    results = run(backend, q_shift_mix, make((0, 8, 3, 4), 2, rank, torch.float32))
    assert results["output 0"].shape == (2, 0, 8, 3, 4)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("rank", [0, 3])
def test_strides(rank):
    """A crop of a map, and a slice of what a wider layer returned."""
    tensors = make((2, 8, 6, 7), 2, rank, torch.float32)
    tensors["x"] = tensors["x"][:, :, 1:5, 2:]
    if rank > 0:
        tensors["low"] = tensors["low"].repeat(1, 1, 2)[:, :20, :6]
    compare("triton", q_shift_mix, tensors)


def test_gradcheck():
    tensors = make((1, 4, 2, 3), 2, 2)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(q_shift_mix, [t.requires_grad_() for t in tensors.values()])


class Mix(nn.Module):
    def forward(self, x, weight, low, up):
        return q_shift_mix(x, weight, low, up, 1, 0.25, 8)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 16, 3, 5), 2, 3).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), 1, 0.25, 8, None, False)
    check_machinery(Mix(), tensors, torch.ops.vla.q_shift_mix.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 8, 4)}, r"x has shape \(2, 8, 4\), expected \(B, C, H, W\)"),
        ({"weight": torch.ones(2, 7)}, r"weight has shape \(2, 7\), expected \(mixes, C\) = \(2, 8\)"),
        ({"up": None}, "up is missing"),
        ({"low": None}, "low is missing"),
        ({"up": torch.ones(2, 3, 7)}, "up has shape"),
        ({"low": torch.ones(1, 12, 5)}, r"low has shape \(1, 12, 5\), expected \(B, H \* W, mixes \* rank\)"),
        ({"shift": -1}, "shift is -1"),
        ({"gamma": 0.3}, "gamma is 0.3"),
        ({"head_dim": 3}, "head_dim is 3"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^q_shift_mix: {message}"):
        q_shift_mix(**(make((1, 8, 3, 4), 2, 3) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^q_shift_mix: dtype is torch.int64"):
        q_shift_mix(**make((1, 8, 3, 4), 2), dtype=torch.int64)
