"""Bidirectional WKV6: the chunked form against the definition in float64, and against reference values."""

import pytest
import torch
from torch import nn

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import use_backend, wkv6
from vla.ops.wkv6 import _torch

FILES = sorted(path.name for path in (golden.DATA / "vrwkv").glob("op_wkv6_*.npz"))


def make(batch, length, heads, size, dtype=torch.float64, scale=2.0):
    """Tensor arguments by name; decays from nearly 1 to nearly 0."""
    normal = randn(0)
    tensors = {name: normal(batch, length, heads * size) for name in ("r", "k", "v")}
    tensors |= {"w": scale * normal(batch, length, heads * size) - 1, "u": normal(heads, size)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


SHAPES = [(1, 1, 1, 1), (2, 2, 1, 4), (2, 3, 3, 5), (1, 16, 2, 8), (2, 17, 1, 64), (1, 33, 2, 7), (3, 100, 2, 16)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_naive(shape, dtype):
    compare("torch", wkv6, make(*shape, dtype))


def test_slabs(monkeypatch):
    """Pairs of tokens are formed for a few chunks at a time, whatever the batch."""
    monkeypatch.setattr(_torch, "_PAIR_ELEMENTS", 1)
    compare("torch", wkv6, make(2, 50, 2, 4))


@pytest.mark.parametrize("offset", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_decay(offset):
    """Decays that round to 1 and to 0: exact, and finite where exp(w) is not."""
    tensors = make(1, 40, 2, 8, torch.float32)
    tensors["w"] = tensors["w"] + torch.where(torch.arange(40) % 3 == 0, offset, 0.0)[:, None]
    compare("torch", wkv6, tensors)


def test_strides():
    tensors = make(3, 12, 2, 4)
    expected = run("torch", wkv6, tensors)
    tensors["k"] = tensors["k"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    tensors["w"] = tensors["w"].repeat_interleave(2, 1)[:, ::2]
    for name, value in run("torch", wkv6, tensors).items():
        assert_close(name, value, expected[name])


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_empty_batch(backend):
    results = run(backend, wkv6, make(0, 20, 2, 4))
    assert results["output 0"].shape == (0, 20, 8)
    assert all((value == 0).all() for value in results.values())


def test_gradcheck():
    with use_backend("torch"):
        assert torch.autograd.gradcheck(wkv6, [t.requires_grad_() for t in make(1, 19, 1, 2).values()])


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_reference_values(file, dtype, backend):
    data = golden.load("vrwkv", file)
    leaves = {name: data[name].to(dtype).requires_grad_() for name in ("r", "k", "v", "w", "u")}
    with use_backend(backend):
        y = wkv6(**leaves)
        y.backward(data["gy"].to(dtype))
    # One case is stored in float32.
    relative = 1e-7 if dtype is torch.float64 and data["y"].dtype is torch.float32 else None
    assert_close("y", y, data["y"], relative)
    for name, leaf in leaves.items():
        assert_close(f"g{name}", leaf.grad, data[f"g{name}"], relative)


class Mixer(nn.Module):
    def forward(self, r, k, v, w, u):
        return wkv6(r, k, v, w, u)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make(2, 9, 2, 4).values())
    check_machinery(Mixer(), tensors, torch.ops.vla.wkv6.default, tuple(t.clone().requires_grad_() for t in tensors))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": torch.ones(2, 5)}, r"r has shape \(2, 5\), expected \(B, T, C\)"),
        ({"k": torch.ones(2, 5, 3)}, "k has shape"),
        ({"v": torch.ones(2, 4, 8)}, "v has shape"),
        ({"w": torch.ones(8)}, "w has shape"),
        ({"u": torch.ones(8)}, r"u has shape \(8,\), expected \(heads, C // heads\)"),
        ({"u": torch.ones(3, 3)}, r"u has shape \(3, 3\), expected \(heads, head size\), product C = 8"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^wkv6: {message}"):
        wkv6(**(make(2, 5, 2, 4) | change))
