"""The projected line scan: every backend against the definition in float64."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.harness import check_machinery, check_saving, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import line_scan, projected_line_scan, use_backend
from vla.ops._maps import as_map, pixels
from vla.ops.line_scan.frames import DIRECTIONS
from vla.ops.projected_line_scan import operator

FAST_BACKENDS = [name for name in operator.backends if name not in ("naive", "triton")]
ALL = list(DIRECTIONS)


def make(shape, rank=3, directions=ALL, seed=0):
    """Tensor arguments by name, float64."""
    normal = randn(seed)
    channels, k = shape[1], len(directions)
    return {
        "x": normal(*shape),
        "weight": normal(rank, channels) * channels**-0.5,
        "gates": normal(3, k, channels, rank),
        "lam": normal(k, channels, rank),
        "u": normal(k, channels, rank),
        "skip": normal(k, channels, rank),
    }


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("directions", [ALL, ["up"], ["down", "left"]], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 3, 5), (0, 5, 1, 7), (1, 50, 6, 6)], ids=str)
def test_against_naive(shape, directions, aligned, backend):
    tensors = make(shape, directions=directions)
    compare(backend, projected_line_scan, tensors, directions=directions, chunk=2, aligned=aligned)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, backend):
    tensors = {n: (0.5 * t).to(dtype) for n, t in make((2, 24, 7, 6), 1).items()}
    compare(backend, projected_line_scan, tensors, 3e-5 if dtype == torch.float32 else None, directions=ALL)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape, rank, options",
    [
        ((2, 18, 5, 5), 3, dict(chunk=2, aligned=False)),
        ((1, 65, 3, 4), 8, dict(aligned=False)),
        ((1, 2, 3, 5), 17, dict(chunk=3)),
        ((1, 2, 3, 3), 33, dict()),  # more proxy channels than the kernels for a proxy take
        ((0, 3, 2, 2), 2, dict()),
    ],
    ids=str,
)
def test_kernels(shape, rank, options, layout):
    pytest.importorskip("triton")
    tensors = {n: t.float() for n, t in make(shape, rank).items()}
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    tensors["weight"] = tensors["weight"].T.contiguous().T
    compare("triton", projected_line_scan, tensors, directions=ALL, **options)


@pytest.mark.parametrize(("side", "aligned"), [(4, True), (5, False)], ids=["aligned", "states saved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_mixed_precision(dtype, side, aligned):
    """A map in half precision with float32 parameters, as under autocast: what a projection and `line_scan` give."""
    pytest.importorskip("triton")
    tensors = {n: t.float() for n, t in make((1, 18, 5, side), 4).items()}
    tensors["x"] = tensors["x"].to(dtype).contiguous(memory_format=torch.channels_last)

    project = importlib.import_module("vla.ops.projected_line_scan._triton").proxy_of
    expected = tensors["x"].permute(0, 2, 3, 1).flatten(0, 2).double() @ tensors["weight"].double().T
    assert_close("proxy", project(tensors["x"], tensors["weight"]), expected)

    class Project(torch.autograd.Function):
        """The kernel's sums, which may end in other digits than a library's."""

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return as_map(project(x, weight), x)

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            rows = pixels(g).to(dtype)
            return as_map(rows @ weight.to(dtype), x), rows.T @ pixels(x)

    def composed(x, weight, gates, lam, u, skip):
        proxy = Project.apply(x, weight)
        return line_scan(x, gates, lam, ALL, u, skip, proxy, aligned=aligned)

    expected = run("triton", composed, tensors)
    actual = run("triton", projected_line_scan, tensors, directions=ALL, aligned=aligned)
    for name, value in actual.items():
        if name in ("grad of x", "grad of weight"):
            assert_close(name, value, expected[name])
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("dtype", "chunk", "saved"),
    [
        (torch.bfloat16, 0, [(18, 2), (1, 4, 2, 3, 16, 16)]),
        (torch.bfloat16, 2, [(18, 2)]),
        (torch.float32, 0, [(18, 2)]),
    ],
    ids=str,
)
def test_forward_saves_the_proxy_and_states(dtype, chunk, saved):
    pytest.importorskip("triton")
    tensors = {n: t.to(dtype) for n, t in make((2, 17, 3, 3), 2).items()}
    shapes = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):
        x = tensors.pop("x").requires_grad_()
        projected_line_scan(x, **tensors, directions=ALL, chunk=chunk, aligned=False)
    assert shapes[6:] == saved


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.directions = list(ALL)

    def forward(self, x, weight, gates, lam, u, skip):
        return projected_line_scan(x, weight, gates, lam, u, skip, self.directions)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 4, 5)).values())
    leaves = [t.clone().requires_grad_() for t in tensors]
    arguments = (*leaves, ALL, 0, True)
    check_machinery(Scan(), tensors, torch.ops.vla.projected_line_scan.default, arguments)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        projected_line_scan(**make((2, 3, 4, 5)), directions=ALL)
    assert counter.get_total_flops() == 2 * 3 * 20 * (4 * (6 * 2 * 3 + 7 + 18 + 1 + 2) + 2 * 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 4, 5)}, r"x has shape \(3, 4, 5\), expected \(B, D, H, W\)"),
        ({"directions": ["right", "diagonal"]}, "unknown direction 'diagonal', expected one of right"),
        ({"directions": []}, "directions is empty"),
        ({"chunk": -1}, "chunk is -1"),
        ({"weight": torch.ones(3, 4)}, r"weight has shape \(3, 4\), expected \(S, D\) = \(3, 3\)"),
        ({"u": torch.ones(12)}, r"u has shape \(12,\), expected \(K, D, S\) = \(4, 3, 3\)"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=f"projected_line_scan: {message}"):
        projected_line_scan(**(make((2, 3, 4, 5)) | {"directions": ALL} | change))


def test_machinery_of_what_is_saved():
    pytest.importorskip("triton")
    leaves = [t.bfloat16().requires_grad_() for t in make((1, 2, 3, 3), 1, directions=["up"]).values()]

    def scan(*leaves):
        return projected_line_scan(*leaves, ["up"], aligned=False)

    arguments = (*(t.detach() for t in leaves), ["up"], 0, False)
    check_saving(scan, leaves, torch.ops.vla.projected_line_scan_train.default, arguments)
