"""Bidirectional WKV6 in Triton against the definition in float64."""

import pytest
import torch

from tests import golden
from tests.ops.harness import compare, run
from tests.ops.test_wkv6 import make
from tests.tolerance import assert_close
from vla.ops import use_backend, wkv6
from vla.ops.wkv6 import _triton

# One token; chunks of 16 and 32 tokens, one and several; heads of 16 channels, fewer, more, and of two tiles.
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 1, 4),
    (1, 16, 2, 16),
    (2, 17, 3, 5),
    (1, 64, 1, 32),
    (2, 77, 1, 48),
    (1, 131, 2, 16),
    (1, 67, 1, 80),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_naive(shape):
    compare("triton", wkv6, make(*shape, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    compare("triton", wkv6, make(2, 70, 2, 16, dtype))


def test_mixed_precision():
    """As under autocast: the decay and the bonus in float32, the rest in bfloat16."""
    tensors = make(2, 70, 1, 16, torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in "wu"}
    compare("triton", wkv6, tensors, relative=2e-2)


@pytest.mark.parametrize("offset", [-200.0, -20.0, 20.0, 200.0])
def test_extreme_decay(offset):
    """Decays that round to 1 and to 0: exact, and finite where exp(w) is not."""
    tensors = make(1, 80, 2, 8, torch.float32)
    tensors["w"] = tensors["w"] + torch.where(torch.arange(80) % 3 == 0, offset, 0.0)[:, None]
    compare("triton", wkv6, tensors)


@pytest.mark.parametrize("segments", [2, 3, 5])
def test_segments(segments, monkeypatch):
    """Few long sequences are walked in parts, some of them shorter or empty."""
    monkeypatch.setattr(_triton, "_segments", lambda chunks, walks: segments)
    compare("triton", wkv6, make(1, 170, 1, 16, torch.float32))


def test_strides():
    tensors = make(3, 36, 2, 4, torch.float32)
    tensors["r"] = tensors["r"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["k"] = tensors["k"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    tensors["v"] = torch.cat((tensors["v"], tensors["v"]), 2)[:, :, :8]
    tensors["w"] = tensors["w"].repeat_interleave(2, 1)[:, ::2]
    compare("triton", wkv6, tensors)


def test_empty_batch_and_repeats():
    results = run("triton", wkv6, make(0, 20, 2, 4, torch.float32))
    assert results["output 0"].shape == (0, 20, 8)
    assert all((value == 0).all() for value in results.values())
    tensors = make(1, 40, 1, 8, torch.float32)
    first, second = run("triton", wkv6, tensors), run("triton", wkv6, tensors)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("file", sorted(path.name for path in (golden.DATA / "vrwkv").glob("op_wkv6_*.npz")))
def test_reference_values(file):
    data = golden.load("vrwkv", file)
    leaves = {name: data[name].float().requires_grad_() for name in ("r", "k", "v", "w", "u")}
    with use_backend("triton"):
        y = wkv6(**leaves)
        y.backward(data["gy"].float())
    assert_close("y", y, data["y"])
    for name, leaf in leaves.items():
        assert_close(f"g{name}", leaf.grad, data[f"g{name}"])
