"""Directional scan: every backend against the definition in float64; visiting orders against reference values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import cross_merge, cross_scan, scan2d, selective_scan, use_backend
from vla.ops.scan2d import DIRECTIONS, operator

FAST_BACKENDS = [name for name in operator.backends if name not in ("naive", "triton")]
CROSS = ["row", "col", "row_rev", "col_rev"]
MODES = {"cross2d": CROSS, "unidi": ["row"] * 4, "bidi": ["row", "row", "row_rev", "row_rev"]}


def make(shape, states=2, rank=3, directions=CROSS, grouped=False, optional=True, seed=0):
    """Tensor arguments by name, float64; channels are counted per group with `grouped`."""
    normal = randn(seed)
    batch, channels, height, width = shape
    k = len(directions)
    return {
        "x": normal(batch, channels * (k if grouped else 1), height, width),
        "dt": normal(batch, k, rank or channels, height, width) - 0.5,
        "A": -normal(k, channels, states).exp(),
        "B": normal(batch, k, states, height, width),
        "C": normal(batch, k, states, height, width),
        "D": normal(k, channels) if optional else None,
        "dt_weight": normal(k, channels, rank) if rank else None,
        "dt_bias": normal(k, channels) if optional else None,
    }


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("per_line", [False, True], ids=["whole", "per-line"])
@pytest.mark.parametrize("grouped", [False, True], ids=["merged", "grouped"])
@pytest.mark.parametrize("directions", [*MODES.values(), ["col_rev"], ["col", "row_rev"]], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 3, 5), (1, 2, 9, 1), (2, 5, 1, 7), (1, 50, 6, 6)], ids=str)
def test_against_naive(shape, directions, grouped, per_line, backend):
    tensors = make(shape, directions=directions, grouped=grouped)
    compare(backend, scan2d, tensors, directions=directions, grouped=grouped, per_line=per_line)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rank", [0, 1], ids=["expanded", "rank1"])
@pytest.mark.parametrize("states", [1, 16], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
def test_options(optional, states, rank, backend):
    tensors = make((2, 9, 5, 4), states, rank, optional=optional)
    if not optional:
        tensors["dt"] = tensors["dt"].abs() * 0.1
    compare(backend, scan2d, tensors, directions=CROSS, delta_softplus=optional)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    directions=st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=5),
    grouped=st.booleans(),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape(backend, shape, directions, grouped):
    tensors = make(shape, 1, 2, directions, grouped)
    compare(backend, scan2d, tensors, directions=directions, grouped=grouped)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, backend):
    tensors = {n: t.to(dtype) for n, t in make((2, 24, 14, 11), 1).items()}
    # The sums of time steps over channels and pixels amplify the rounding of single products.
    compare(backend, scan2d, tensors, 3e-5 if dtype == torch.float32 else None, directions=CROSS)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_mixed_precision(backend):
    tensors = {n: t.float() for n, t in make((2, 24, 7, 9), 1).items()}
    tensors |= {name: tensors[name].bfloat16() for name in ("x", "dt", "B", "C")}
    compare(backend, scan2d, tensors, 2e-2, directions=CROSS)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("offset", [-12.0, 60.0], ids=["long memory", "strong decay"])
def test_extremes(offset, backend):
    tensors = {n: t.float() for n, t in make((1, 8, 20, 20), 2).items()}
    tensors["dt_bias"] = tensors["dt_bias"] + offset
    compare(backend, scan2d, tensors, 1e-4, directions=CROSS)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_empty_batch(backend):
    assert run(backend, scan2d, make((0, 4, 3, 2)), directions=CROSS)["output 0"].shape == (0, 4, 3, 2)


@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_strides(backend):
    tensors = make((2, 6, 5, 7))
    expected = run(backend, scan2d, tensors, directions=CROSS)
    packed = torch.cat([tensors["dt"], tensors["B"], tensors["C"]], dim=2).permute(0, 3, 4, 1, 2).contiguous()
    dt, b, c = packed.permute(0, 3, 4, 1, 2).split((3, 2, 2), dim=2)
    views = {"x": tensors["x"].contiguous(memory_format=torch.channels_last), "dt": dt, "B": b, "C": c}
    with use_backend(backend):
        y = scan2d(**(tensors | views), directions=CROSS)
    assert_close("output", y, expected["output 0"])
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_repeated_runs_are_bit_equal(backend):
    tensors = {n: t.float() for n, t in make((2, 100, 9, 8), 4).items()}
    first, second = (run(backend, scan2d, tensors, directions=CROSS) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_is_a_selective_scan_of_the_crossed_map():
    """The definition itself, against sequences that are gathered, scanned and merged by other code."""
    tensors = make((2, 3, 4, 5))
    k, d, n = tensors["A"].shape
    delta = torch.einsum("bkrhw,kdr->bkdhw", tensors["dt"], tensors["dt_weight"])
    deltas, bs, cs = (
        torch.stack([cross_scan(t[:, i], [name])[:, 0] for i, name in enumerate(CROSS)], dim=1)
        for t in (delta, tensors["B"], tensors["C"])
    )
    with use_backend("naive"):
        ys = selective_scan(
            cross_scan(tensors["x"], CROSS).flatten(1, 2),
            deltas.flatten(1, 2),
            tensors["A"].reshape(k * d, n),
            bs,
            cs,
            tensors["D"].flatten(),
            delta_bias=tensors["dt_bias"].flatten(),
            delta_softplus=True,
        )
        expected = cross_merge(ys.unflatten(1, (k, d)), CROSS, 4, 5)
        assert_close("output", scan2d(**tensors, directions=CROSS), expected)


def test_one_direction_sees_only_the_past():
    """A change of one pixel moves the pixels after it in the direction's order, and no other."""
    tensors = make((1, 2, 3, 4), directions=["col"])
    changed = {**tensors, "x": tensors["x"].clone()}
    changed["x"][0, :, 1, 2] += 1
    moved = (scan2d(**changed, directions=["col"]) - scan2d(**tensors, directions=["col"])).abs().sum((0, 1)) > 0
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1:, 2] = True
    expected[:, 3] = True
    assert torch.equal(moved, expected)


def test_gradcheck():
    tensors = make((1, 2, 2, 3))
    with use_backend("naive"):
        assert torch.autograd.gradcheck(
            lambda *t: scan2d(**dict(zip(tensors, t, strict=True)), directions=CROSS),
            [t.requires_grad_() for t in tensors.values()],
        )


@pytest.mark.parametrize("size", ["3x5", "1x7", "6x1"])
@pytest.mark.parametrize("mode", MODES)
def test_orders_against_reference(mode, size):
    data = golden.load("ops", "op_cross_scan.npz")
    height, width = (int(side) for side in size.split("x"))
    pixels = torch.arange(height * width).view(1, 1, height, width)
    assert (cross_scan(pixels, MODES[mode])[0, :, 0] == data[f"{size}/{mode}/index"]).all()
    merged = cross_merge(data[f"{size}/{mode}/merge_in"].flatten(3), MODES[mode], height, width)
    assert_close("merged", merged.flatten(2), data[f"{size}/{mode}/merge_out"], 2e-7)


def test_merge_is_the_adjoint_of_scan():
    normal = randn(0)
    x, ys = normal(2, 3, 4, 5), normal(2, 4, 3, 20)
    left = (cross_scan(x, CROSS) * ys).sum()
    right = (x * cross_merge(ys, CROSS, 4, 5)).sum()
    assert_close("inner product", left, right)


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.directions = list(CROSS)

    def forward(self, x, dt, A, B, C, D, dt_weight, dt_bias):
        return scan2d(x, dt, A, B, C, self.directions, D, dt_weight, dt_bias)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make((2, 3, 4, 5)).values())
    leaves = [t.clone().requires_grad_() for t in tensors]
    arguments = (*leaves[:5], CROSS, *leaves[5:], True, False, False)
    check_machinery(Scan(), tensors, torch.ops.vla.scan2d.default, arguments)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        scan2d(**make((2, 3, 4, 5)), directions=CROSS)
    assert counter.get_total_flops() == 2 * 4 * 3 * 20 * (2 * 3 + 7 * 2 + 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(3, 4, 5)}, r"x has shape \(3, 4, 5\), expected \(B, D, H, W\)"),
        ({"directions": ["row", "diagonal"]}, "unknown direction 'diagonal', expected one of row, col"),
        ({"directions": []}, "directions is empty"),
        ({"directions": CROSS[:3], "grouped": True}, "A has shape"),
        ({"dt": torch.ones(2, 4, 2, 4, 5)}, r"dt_weight has shape \(4, 3, 3\), expected \(K, D, R\) = \(4, 3, 2\)"),
        ({"dt_weight": None, "dt": torch.ones(2, 4, 2, 4, 5)}, r"dt has shape .* expected \(B, K, D, H, W\)"),
        ({"B": torch.ones(2, 4, 2, 5, 4)}, "B has shape"),
        ({"C": torch.ones(2, 4, 1, 4, 5)}, "C has shape"),
        ({"D": torch.ones(12)}, r"D has shape \(12,\), expected \(K, D\) = \(4, 3\)"),
        ({"dt_bias": torch.ones(4, 3, device="meta")}, "dt_bias is on meta, expected (cpu|cuda:0) like x"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    good = {n: t.float() for n, t in make((2, 3, 4, 5)).items()} | {"directions": CROSS}
    with pytest.raises(ValueError, match=f"^scan2d: {message}"):
        scan2d(**(good | change))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="scan2d: x has 3 channels, expected a multiple of the 4 grouped directions"):
        scan2d(**make((2, 3, 4, 5)), directions=CROSS, grouped=True)


def test_bad_directions_of_sequences():
    x = torch.ones(1, 2, 3, 4)
    ys = cross_scan(x, ["row", "col"])
    with pytest.raises(
        ValueError, match="^cross_scan: unknown direction 'column', expected one of row, col, row_rev, col_rev"
    ):
        cross_scan(x, ["column"])
    with pytest.raises(ValueError, match="^cross_scan: directions is empty, expected at least one of row, col"):
        cross_scan(x, [])
    with pytest.raises(ValueError, match="^cross_merge: ys has 2 sequences, expected 1 like directions"):
        cross_merge(ys, ["row"], 3, 4)
    with pytest.raises(ValueError, match="^cross_merge: unknown direction 'cool'"):
        cross_merge(ys, ["row", "cool"], 3, 4)
