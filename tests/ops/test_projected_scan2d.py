"""The projected scan: every backend against the definition in float64."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.harness import check_machinery, check_saving, compare, randn, run
from vla.ops import projected_scan2d, scan2d, use_backend
from vla.ops.projected_scan2d import operator

FAST_BACKENDS = [name for name in operator.backends if name not in ("naive", "triton")]
CROSS = ["row", "col", "row_rev", "col_rev"]


def make(shape, states=2, rank=3, directions=CROSS, optional=True, norm=False, seed=0):
    """Tensor arguments by name, float64."""
    normal = randn(seed)
    channels, k = shape[1], len(directions)
    tensors = {
        "x": normal(*shape),
        "weight": normal(k, rank + 2 * states, channels) * channels**-0.5,
        "A": -normal(k, channels, states).exp(),
        "D": normal(k, channels) if optional else None,
        "dt_weight": normal(k, channels, rank),
        "dt_bias": normal(k, channels) if optional else None,
    }
    if norm:
        tensors |= {"norm_weight": normal(channels), "norm_bias": normal(channels) if optional else None}
    return tensors


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that the interpreter has little to do with, the backward's in runs."""
    kernels = importlib.import_module("vla.ops.scan2d._triton")
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(4, 16, 2, 1))
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: kernels.Config(4, 16, 2, 1, tiles=2))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("per_line", [False, True], ids=["whole", "per-line"])
@pytest.mark.parametrize("directions", [CROSS, ["col_rev"], ["col", "row_rev"]], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 3, 5), (1, 2, 9, 1), (0, 5, 1, 7), (1, 50, 6, 6)], ids=str)
def test_against_naive(shape, directions, per_line, backend):
    tensors = make(shape, directions=directions)
    compare(backend, projected_scan2d, tensors, directions=directions, per_line=per_line)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, backend):
    tensors = {n: t.to(dtype) for n, t in make((2, 24, 7, 6), 1).items()}
    compare(backend, projected_scan2d, tensors, 3e-5 if dtype == torch.float32 else None, directions=CROSS)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("optional", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(2, 3, 3, 5), (1, 2, 1, 1), (0, 5, 1, 7)], ids=str)
def test_norm(shape, optional, backend):
    compare(backend, projected_scan2d, make(shape, optional=optional, norm=True), directions=CROSS)


@pytest.mark.parametrize("apart", [False, True], ids=["one map", "maps of directions"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 18, 3, 5), torch.float32), ((1, 18, 5, 4), torch.bfloat16), ((0, 3, 2, 2), torch.float32)],
    ids=str,
)
def test_kernels_of_norm(shape, dtype, layout, apart, small_tiles, monkeypatch):
    pytest.importorskip("triton")
    kernels = importlib.import_module("vla.ops.scan2d._triton")
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(4, 16, 2, 1, apart=apart))
    tensors = {n: t.to(dtype) for n, t in make(shape, 1, norm=True).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    compare("triton", projected_scan2d, tensors, directions=CROSS)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape, optional", [((2, 18, 5, 7), True), ((1, 2, 3, 1), False), ((0, 3, 2, 2), True)], ids=str
)
def test_kernels(shape, optional, layout, small_tiles):
    pytest.importorskip("triton")
    tensors = {n: t if t is None else t.float() for n, t in make(shape, 1, optional=optional).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    compare("triton", projected_scan2d, tensors, directions=["row_rev", "col", "row", "col_rev"])


def test_kernels_of_mixed_precision(small_tiles):
    """A bfloat16 map with float32 parameters, as under autocast: what a projection and `scan2d` give."""
    pytest.importorskip("triton")
    tensors = {n: t.float() for n, t in make((1, 18, 5, 4), 1).items()}
    tensors["x"] = tensors["x"].bfloat16().contiguous(memory_format=torch.channels_last)

    def composed(x, weight, A, D, dt_weight, dt_bias):
        rows = x.permute(0, 2, 3, 1).flatten(0, 2) @ weight.flatten(0, 1).to(x.dtype).T
        dt, B, C = rows.view(1, 5, 4, 4, 5).permute(0, 3, 4, 1, 2).split([3, 1, 1], dim=2)
        return scan2d(x, dt, A, B, C, CROSS, D, dt_weight, dt_bias)

    expected = run("triton", composed, tensors)
    actual = run("triton", projected_scan2d, tensors, directions=CROSS)
    for name, value in actual.items():
        if name in ("grad of x", "grad of weight"):
            torch.testing.assert_close(value.float(), expected[name].float(), rtol=0.02, atol=0.02)
        else:
            assert torch.equal(value, expected[name]), name


def test_forward_saves_projections_and_states(small_tiles):
    pytest.importorskip("triton")
    tensors = {n: t.float() for n, t in make((1, 4, 5, 4), 1).items()}
    shapes = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        projected_scan2d(tensors.pop("x").requires_grad_(), **tensors, directions=CROSS)
    assert shapes[6:] == [(20, 20), (1, 4, 1, 2, 1, 4)]


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.directions = list(CROSS)

    def forward(self, x, weight, A, D, dt_weight, dt_bias, norm_weight, norm_bias):
        norm = (norm_weight, norm_bias)
        return projected_scan2d(x, weight, A, self.directions, D, dt_weight, dt_bias, True, False, *norm)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 4, 5), norm=True).values())
    leaves = [t.clone().requires_grad_() for t in tensors]
    arguments = (*leaves[:3], CROSS, *leaves[3:6], True, False, *leaves[6:], 1e-5)
    check_machinery(Scan(), tensors, torch.ops.vla.projected_scan2d.default, arguments)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        projected_scan2d(**make((2, 3, 4, 5)), directions=CROSS)
    assert counter.get_total_flops() == 2 * 4 * 3 * 20 * (2 * 7 + 2 * 3 + 7 * 2 + 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 4, 5)}, r"x has shape \(3, 4, 5\), expected \(B, D, H, W\)"),
        ({"directions": ["row", "diagonal"]}, "unknown direction 'diagonal', expected one of row, col"),
        ({"directions": []}, "directions is empty"),
        ({"weight": torch.ones(4, 6, 3)}, r"weight has shape \(4, 6, 3\), expected \(K, R \+ 2N, D\) = \(4, 7, 3\)"),
        ({"norm_weight": torch.ones(4)}, r"norm_weight has shape \(4,\), expected \(D,\) = \(3,\)"),
        ({"norm_bias": torch.ones(3)}, "norm_bias is given without norm_weight"),
        ({"D": torch.ones(12)}, r"D has shape \(12,\), expected \(K, D\) = \(4, 3\)"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=f"projected_scan2d: {message}"):
        projected_scan2d(**(make((2, 3, 4, 5)) | {"directions": CROSS} | change))


def test_machinery_of_what_is_saved(small_tiles):
    pytest.importorskip("triton")
    tensors = make((1, 2, 3, 6), 1, directions=["row_rev"], norm=True)
    leaves = [t.float().requires_grad_() for t in tensors.values()]

    def scan(*leaves):
        return projected_scan2d(*leaves[:3], ["row_rev"], *leaves[3:6], True, False, *leaves[6:])

    arguments = tuple(t.detach() for t in leaves)
    arguments = (*arguments[:3], ["row_rev"], *arguments[3:6], True, False, *arguments[6:], 1e-5)
    check_saving(scan, leaves, torch.ops.vla.projected_scan2d_train.default, arguments)


def test_strided_weight(small_tiles):
    pytest.importorskip("triton")
    tensors = {name: tensor.float() for name, tensor in make((1, 8, 3, 4)).items()}
    tensors["weight"] = tensors["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not tensors["weight"].is_contiguous()
    compare("triton", projected_scan2d, tensors, directions=CROSS)
