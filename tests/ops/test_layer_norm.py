"""Layer norm: all backends against the definition in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels import need_triton
from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import add_layer_norm, layer_norm, use_backend

BACKENDS = ["torch", "triton"]


def make(shape, dtype=torch.float64, branch=False, weight=True, bias=True, gate=False, second=False):
    """Tensor arguments by name."""
    normal = randn(0)
    tensors = {"x": 2 * normal(*shape) + 1}
    if branch:
        tensors["branch"] = normal(*shape)
    if weight:
        tensors["weight"] = normal(shape[-1])
    if bias:
        tensors["bias"] = normal(shape[-1])
    if gate:
        tensors["gate"] = normal(*shape)
    if second:
        tensors["second"] = normal(*shape)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


CASES = [
    ((2, 3, 5, 96), {}, {}),
    ((7, 348), dict(bias=False), dict(eps=1e-6)),
    ((2, 3, 33), dict(weight=False, bias=False), {}),
    ((40, 144), dict(weight=False), dict(eps=1e-3)),
    ((3, 2000), {}, {}),
    ((37, 64), dict(gate=True), dict(groups=4)),
    ((2, 5, 60), dict(gate=True, weight=False, bias=False), dict(groups=3)),
    ((41, 84), dict(gate=True, bias=False), dict(groups=12)),
    ((5, 348), {}, dict(groups=4)),
    ((33,), dict(gate=True), dict(groups=3)),
    ((2, 5, 20), {}, dict(columns=4)),
    ((9, 36), dict(gate=True), dict(groups=3, columns=4)),
    # Groups of odd numbers of channels, in one chunk or several.
    ((9, 348), dict(gate=True), dict(groups=4, columns=4)),
    ((3, 5, 14), dict(gate=True, bias=False), dict(groups=2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, kinds, options", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, kinds, options, dtype):
    compare(backend, layer_norm, make(shape, dtype, **kinds), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, kinds, options", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_against_naive(backend, shape, kinds, options, dtype):
    compare(backend, add_layer_norm, make(shape, dtype, branch=True, **kinds), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, parts, options", [((3, 5, 7, 20), 3, dict(columns=4)), ((6, 60), 2, dict(groups=3))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_factor(backend, shape, parts, options, dtype):
    """Stochastic depth: some pictures' branches are left out, the others' are larger."""
    factor = torch.tensor([1.25, 0.0, 1.25])[:parts]
    compare(backend, add_layer_norm, make(shape, dtype, branch=True), factor=factor, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, kinds, options",
    [
        ((2, 3, 5, 20), {}, dict(columns=4)),
        ((5, 348), dict(second=False), dict(with_sum=False, columns=4)),
        ((5, 348), dict(bias=False), dict(with_sum=False)),
        ((2, 3, 33), dict(weight=False, bias=False), dict(factor=torch.tensor([1.25, 0.0]))),
        ((9, 60), dict(gate=True), dict(groups=3, with_sum=False)),
        ((33,), dict(gate=True), dict(groups=3)),
        ((2, 0, 8), {}, dict(with_sum=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_branch(backend, shape, kinds, options, dtype):
    """Two residual connections at once, as where the first one's sum has not been written."""
    compare(backend, add_layer_norm, make(shape, dtype, **(dict(branch=True, second=True) | kinds)), **options)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_sum_of_three(backend):
    """It is rounded once, to what PyTorch gives a sum; without it the norm is the same.

    Of float16, as the interpreter cuts bfloat16 off.
    """
    tensors = make((37, 60), torch.float16, branch=True, second=True)
    exact = sum(tensors[name].float() for name in ("x", "branch", "second"))
    with use_backend(backend):
        total, y = add_layer_norm(**tensors)
        assert torch.equal(total, exact.half())
        nothing, alone = add_layer_norm(**tensors, with_sum=False)
        assert nothing.shape == (0,) and nothing.dtype is total.dtype and torch.equal(alone, y)
        # The bits of one after the other, if the stream is wide.
        tensors["x"] = tensors["x"].float()
        first, _ = add_layer_norm(tensors["x"], tensors["branch"])
        for name in ("branch", "second"):
            total, y = add_layer_norm(**tensors | {name: tensors[name].float()}, dtype=torch.float16)
            assert total.dtype is torch.float32 and y.dtype is torch.float16
            assert torch.equal(total, first + tensors["second"])
        assert add_layer_norm(**tensors | dict(second=tensors["second"].double()))[1].dtype is torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sum", [False, True])
def test_gradients_of_summands(backend, with_sum):
    """Every one is that of the stream, rounded to the dtype of its own summand."""
    for wide, narrow in (("branch", "second"), ("second", "branch")):
        tensors = make((37, 60), torch.float32, branch=True, second=True)
        tensors[narrow] = tensors[narrow].half()
        results = run(backend, add_layer_norm, tensors, with_sum=with_sum)
        assert torch.equal(results[f"grad of {wide}"], results["grad of x"])
        assert torch.equal(results[f"grad of {narrow}"], results["grad of x"].half())
        compare(backend, add_layer_norm, tensors, with_sum=with_sum)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_mixed_precision(backend, groups):
    """As under autocast: a stream and parameters of 32 bits, branch and gate of 16, the norm in a dtype of its own."""
    tensors = make((37, 60), torch.float32, branch=True, gate=True)
    tensors |= {name: tensors[name].bfloat16() for name in ("branch", "gate")}
    compare(backend, add_layer_norm, tensors, relative=2e-2, groups=groups, dtype=torch.bfloat16)
    with use_backend(backend):
        total, y = add_layer_norm(**tensors, groups=groups, dtype=torch.bfloat16)
        assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(total, tensors["x"] + tensors["branch"])
        del tensors["branch"]
        assert layer_norm(**tensors, groups=groups, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert layer_norm(**tensors, groups=groups).dtype is torch.float32


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_many_tiles_for_one_program(groups, monkeypatch):
    """Sums of the parameters' gradients over all tiles of a program, whose rows are of the same groups every time."""
    from vla.ops.layer_norm import _triton

    monkeypatch.setattr(_triton, "_PROGRAMS", 4)
    shape = (333, 48)
    compare("triton", layer_norm, make(shape, torch.float32, gate=True), groups=groups)
    compare("triton", add_layer_norm, make(shape, torch.float32, branch=True), groups=groups)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(backend, shape):
    results = run(backend, layer_norm, make(shape, torch.float32, gate=True))
    assert results["output 0"].shape == shape
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel(backend):
    """It is its own mean: the output is the bias, and no gradient but rounding reaches the input."""
    tensors = make((5, 1), torch.float32)
    results = run(backend, layer_norm, tensors, eps=1e-2)
    assert torch.equal(results["output 0"], tensors["bias"].expand(5, 1))
    assert results["grad of x"].abs().max() < 1e-5
    assert torch.equal(results["grad of weight"], torch.zeros(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend):
    """A row without variance is normalised to zero; without eps its neighbours' gradients stay as they are."""
    tensors = make((5, 24), torch.float32)
    tensors["x"][2] = 3.0
    compare(backend, layer_norm, tensors)
    with use_backend(backend):
        assert torch.equal(layer_norm(tensors["x"], eps=1e-5)[2], torch.zeros(24))
    tensors = make((5, 24), torch.float32)
    compare(backend, layer_norm, tensors, eps=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_large_mean(backend, offset):
    """The variance is that of the differences from the mean, not one of large numbers that cancel."""
    tensors = make((9, 96), torch.float32)
    tensors["x"] += offset
    compare(backend, layer_norm, tensors, relative=1e-5 + 1e-7 * offset)


def _map(tensor):
    """A contiguous map (B, C, H, W), its channels last by a view."""
    return tensor.movedim(-1, 1).contiguous().movedim(1, -1)


def _crop(tensor):
    """Part of a larger map."""
    return F.pad(tensor, (0, 0, 1, 2, 1, 1))[:, 1:-1, 1:-2]


def _slice(tensor):
    """Channels of what a wider layer returned."""
    return F.pad(tensor, (8, 16))[..., 8:-16]


def _odd_slice(tensor):
    return F.pad(tensor, (1, 2))[..., 1:-2]


@pytest.mark.parametrize("layout", [_map, _crop, _slice, _odd_slice], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "function, kinds", [(layer_norm, {}), (add_layer_norm, dict(branch=True, second=True))], ids=["norm", "add"]
)
def test_strides(layout, function, kinds):
    shape = (2, 3, 4, 24)
    tensors = make(shape, torch.float32, gate=True, **kinds)
    expected = run("triton", function, tensors, groups=2)

    def of_views(**tensors):
        tensors |= {name: layout(t) for name, t in tensors.items() if t.dim() == 4}
        return function(**tensors, groups=2)

    for name, value in run("triton", of_views, tensors).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("channels, start, even", [(348, 348, 8), (14, 7, 2), (12, 0, 0), (12, 2, 4), (16, 8, 0)])
def test_gate_between_words(channels, start, even):
    """A part of wider rows of 16 bits, of which a kernel is told at multiples of how many bytes they begin."""
    need_triton()
    from vla.ops.layer_norm._triton import _evenness

    tensors = make((2, 3, channels), torch.bfloat16, gate=True)
    with use_backend("triton"):
        expected = layer_norm(**tensors, groups=2)
        tensors["gate"] = F.pad(tensors["gate"], (start, channels - start))[..., start : start + channels]
        assert _evenness(tensors["gate"], 2 * channels) == even
        assert torch.equal(layer_norm(**tensors, groups=2), expected)


def test_deterministic():
    tensors = make((301, 40), torch.bfloat16, gate=True)
    first, second = (run("triton", layer_norm, tensors, groups=4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("function, branch", [(layer_norm, False), (add_layer_norm, True)])
def test_gradcheck(function, branch):
    tensors = make((3, 12), branch=branch, gate=True)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(partial(function, groups=2), [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("with_sum", [False, True])
def test_gradcheck_of_a_second_branch(with_sum):
    tensors = make((3, 12), branch=True, second=True)

    def function(*leaves):
        results = add_layer_norm(**dict(zip(tensors, leaves, strict=True)), with_sum=with_sum)
        return results if with_sum else results[1]

    with use_backend("torch"):
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


class Norm(nn.Module):
    def forward(self, x, weight, bias, gate):
        return layer_norm(x, weight, bias, gate, 2, 1e-5)


class AddNorm(nn.Module):
    def forward(self, x, branch, weight, bias):
        total, y = add_layer_norm(x, branch, weight, bias)
        return total + y


class AddTwo(nn.Module):
    def forward(self, x, branch, weight, bias, second):
        return add_layer_norm(x, branch, weight, bias, second=second, with_sum=False)[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "module, kinds, with_sum",
    [
        (Norm(), dict(gate=True), False),
        (AddNorm(), dict(branch=True), True),
        (AddTwo(), dict(branch=True, second=True), False),
    ],
)
def test_machinery(module, kinds, with_sum):
    tensors = make((2, 3, 12), **kinds)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    arguments = (*(leaves.get(name) for name in ("x", "branch", "weight", "bias", "gate")), 2, 1e-5, None, 0, None)
    arguments += (leaves.get("second"), with_sum)
    check_machinery(module, tuple(tensors.values()), torch.ops.vla.layer_norm.default, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_tracers_and_transforms_see_the_operator():
    """Not the kernels, which eager mode launches without it."""
    x, weight, bias = make((2, 3, 8), torch.float32).values()

    def norm(x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, weight, bias)

    with use_backend("triton"):
        expected = norm(x)
        traced = torch.jit.trace(norm, x)
        assert "vla::layer_norm" in str(traced.graph)
        assert torch.equal(traced(x), expected)
        assert torch.equal(torch.func.vmap(norm)(x), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(())}, r"x has shape \(\), expected \(..., C\)"),
        ({"branch": torch.ones(2, 8)}, r"branch has shape \(2, 8\), expected that of x = \(3, 8\)"),
        ({"second": torch.ones(3, 1)}, r"second has shape \(3, 1\), expected that of x = \(3, 8\)"),
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\), expected \(C,\) = \(8,\)"),
        ({"bias": torch.ones(1, 8)}, "bias has shape"),
        ({"gate": torch.ones(3, 4)}, "gate has shape"),
        ({"groups": 3}, "groups is 3, expected a divisor of the 8 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"factor": torch.ones(2)}, r"factor has shape \(2,\), expected \(P,\) for a branch, with P a divisor"),
        ({"columns": -1}, "columns is -1, expected none or more"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^layer_norm: {message}"):
        add_layer_norm(**(make((3, 8), branch=True, gate=True) | change))


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"^layer_norm: dtype is torch.int64"):
        layer_norm(**make((3, 8)), dtype=torch.int64)
    with pytest.raises(TypeError, match=r"^layer_norm: x has dtype torch.int64"):
        layer_norm(torch.ones(3, 8, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_factor_of_an_empty_batch(backend):
    x = torch.ones(0, 2, 2, 8)
    with use_backend(backend):
        y, total = add_layer_norm(x, x, torch.ones(8), torch.ones(8), factor=torch.ones(0))
    assert y.shape == total.shape == x.shape
