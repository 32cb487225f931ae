"""Bi-WKV: every backend against the definition in float64, and the definition against reference values."""

import pytest
import torch
from torch import nn

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import bi_wkv, use_backend
from vla.ops.bi_wkv import operator

BACKENDS = [name for name in operator.backends if name != "triton"]
FAST_BACKENDS = [name for name in BACKENDS if name != "naive"]
FILES = sorted(path.name for path in (golden.DATA / "vrwkv").glob("op_biwkv_*.npz"))


def make(batch, length, channels, decay=5.0, dtype=torch.float64, seed=0):
    """Tensor arguments by name; `decay` is that across the sequence."""
    normal = randn(seed)
    tensors = {
        "w": decay / length * normal(channels),
        "u": normal(channels),
        "k": 2 * normal(batch, length, channels),
        "v": normal(batch, length, channels),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


SHAPES = [(1, 1, 1), (2, 2, 3), (2, 7, 5), (1, 49, 33), (3, 100, 16), (1, 257, 4), (2, 16, 70)]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 5.0, 50.0], ids="decay{}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_naive(shape, decay, backend):
    compare(backend, bi_wkv, make(*shape, decay))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_dtypes(shape, dtype, backend):
    compare(backend, bi_wkv, make(*shape, dtype=dtype))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gate(dtype, backend):
    compare(backend, bi_wkv, make(2, 20, 8, dtype=dtype) | {"gate": randn(7)(2, 20, 8).to(dtype)})


@pytest.mark.parametrize("split", [None, 4])
def test_gate_is_a_factor(split):
    tensors = make(2, 9, 3) | {"gate": randn(7)(2, 9, 3)}

    def separate(gate, **others):
        return torch.sigmoid(gate) * bi_wkv(**others, official_split=split)

    expected = run("naive", separate, tensors)
    for name, value in run("naive", bi_wkv, tensors, official_split=split).items():
        assert_close(name, value, expected[name])


def check_per_sequence(backend, tensors, **options):
    """Decay and bonus of a whole sequence, and the gradients of these."""
    expected = run(
        "naive",
        lambda w, u, k, v: bi_wkv(w / k.shape[1], u / k.shape[1], k, v, **options),
        {name: tensor.double() for name, tensor in tensors.items()},
    )
    for name, value in run(backend, bi_wkv, tensors, per_sequence=True, **options).items():
        assert_close(name, value, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_per_sequence(dtype, split, backend):
    tensors = make(2, 20, 8, dtype=dtype)
    check_per_sequence(backend, tensors | {"w": 20 * tensors["w"]}, official_split=split)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float32_parameters_with_half_precision_tokens(backend):
    tensors = make(2, 20, 8)
    tensors = {n: t.float() if t.dim() == 1 else t.bfloat16() for n, t in tensors.items()}
    compare(backend, bi_wkv, tensors, 2e-2)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_sequence_keeps_its_exponents(backend):
    """A slow decay over thousands of tokens must not drift with the steps."""
    tensors = make(1, 3000, 4, 10.0, torch.float32)
    compare(backend, bi_wkv, tensors)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("name, value", [("w", -300.0), ("w", 1e4), ("u", 1e4), ("u", -1e4), ("k", 3e4)])
def test_extremes_are_finite(name, value, backend):
    tensors = make(2, 33, 4, dtype=torch.float32)
    tensors[name] = tensors[name] + value * torch.linspace(-1, 1, tensors[name].numel()).view_as(tensors[name])
    results = run(backend, bi_wkv, tensors)
    assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_strides(backend):
    tensors = make(3, 12, 8)
    expected = run(backend, bi_wkv, tensors)
    tensors["k"] = tensors["k"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    tensors["v"] = tensors["v"].repeat_interleave(2, 1)[:, ::2]
    for name, value in run(backend, bi_wkv, tensors).items():
        assert_close(name, value, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [None, 4])
def test_empty_batch(split, backend):
    results = run(backend, bi_wkv, make(0, 5, 3), official_split=split)
    assert results["output 0"].shape == (0, 5, 3)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradcheck(backend):
    with use_backend(backend):
        assert torch.autograd.gradcheck(bi_wkv, [t.requires_grad_() for t in make(2, 6, 3).values()])


def check_reference_values(file, dtype, backend, splits):
    data = golden.load("vrwkv", file)
    for split in splits:
        suffix = "" if split is None else f"_kernel{split}"
        if "y" + suffix not in data or (split and dtype is torch.float32):
            continue
        leaves = {name: data[name].to(dtype).requires_grad_() for name in ("w", "u", "k", "v")}
        with use_backend(backend):
            y = bi_wkv(**leaves, official_split=split)
            y.backward(data["gy"].to(dtype))
        # A float32 exponent of 200 or 640, as these cases have, is rounded by 1.5e-5 or 6e-5.
        relative = 6e-5 if dtype is torch.float32 and "stab" in file else None
        assert_close(f"y{suffix}", y, data[f"y{suffix}"], relative)
        for name, leaf in leaves.items():
            expected = data[f"g{name}{suffix}"]
            if expected.abs().max() < 1e-4:
                # Vanishes but for rounding: a saturated softmax, or a single token.
                assert (leaf.grad.double() - expected).abs().max() < 1e-6, name
            else:
                assert_close(f"g{name}{suffix}", leaf.grad, expected, relative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_reference_values(file, dtype, backend):
    if backend == "naive" and dtype is torch.float32 and torch.get_default_device().type != "cpu":
        pytest.skip("in float32 the definition is as exact as a device's exponential")
    check_reference_values(file, dtype, backend, (None, 32, 16))


class Mixer(nn.Module):
    def forward(self, w, u, k, v):
        return bi_wkv(w, u, k, v)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make(2, 9, 4).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), None, None, False)
    check_machinery(Mixer(), tensors, torch.ops.vla.bi_wkv.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.ones(2, 5)}, r"k has shape \(2, 5\), expected \(B, T, C\)"),
        ({"k": torch.ones(2, 0, 4), "v": torch.ones(2, 0, 4)}, "k has shape .* at least one token"),
        ({"v": torch.ones(2, 5, 3)}, "v has shape"),
        ({"w": torch.ones(3)}, r"w has shape \(3,\), expected \(C,\) = \(4,\)"),
        ({"u": torch.ones(1, 4)}, "u has shape"),
        ({"gate": torch.ones(2, 5)}, "gate has shape"),
        ({"official_split": 0}, "official_split is 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^bi_wkv: {message}"):
        bi_wkv(**(make(2, 5, 4) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match="^bi_wkv: k has dtype torch.int64"):
        bi_wkv(**(make(2, 5, 4) | {"k": torch.ones(2, 5, 4, dtype=torch.long)}))
