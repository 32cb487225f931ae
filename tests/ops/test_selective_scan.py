"""Selective scan: every backend against the definition in float64, and against reference values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import selective_scan, use_backend
from vla.ops.selective_scan import operator

FAST_BACKENDS = [name for name in operator.backends if name not in ("naive", "triton")]
INDEX = golden.index("ops")


def make(batch, channels, length, states, b="grouped", c="grouped", groups=1, optional=True, seed=0):
    """Tensor arguments by name, float64, with decays from weak to strong."""
    normal = randn(seed)
    shapes = {
        "grouped": (batch, groups, states, length),
        "shared": (batch, states, length),
        "per-channel": (batch, channels, states, length),
        "constant": (channels, states),
    }
    return {
        "u": normal(batch, channels, length),
        "delta": normal(batch, channels, length) - 1,
        "A": -normal(channels, states).exp(),
        "B": normal(*shapes[b]),
        "C": normal(*shapes[c]),
        "D": normal(channels) if optional else None,
        "z": normal(batch, channels, length) if optional else None,
        "delta_bias": normal(channels) if optional else None,
    }


def full(**kwargs):
    return selective_scan(**kwargs, return_last_state=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("states", [1, 3, 16], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("length", [1, 7, 49, 197], ids=lambda n: f"L{n}")
def test_against_naive(length, states, dtype, backend):
    tensors = make(2, 18, length, states, groups=2)
    relative = None if dtype == torch.float64 else 3e-5
    compare(backend, full, {n: t.to(dtype) for n, t in tensors.items()}, relative, delta_softplus=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
@pytest.mark.parametrize("c", ["grouped", "shared", "per-channel", "constant"])
@pytest.mark.parametrize("b", ["grouped", "shared", "per-channel", "constant"])
def test_forms_of_projections(b, c, optional, backend):
    compare(backend, full, make(2, 9, 31, 2, b, c, 1, optional), delta_softplus=optional)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    per_group=st.integers(1, 60),
    groups=st.integers(1, 3),
    length=st.integers(1, 90),
    states=st.integers(1, 5),
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_any_shape(backend, batch, per_group, groups, length, states):
    compare(backend, full, make(batch, per_group * groups, length, states, groups=groups), delta_softplus=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_empty_batch(backend):
    results = run(backend, full, make(0, 8, 5, 2), delta_softplus=True)
    assert results["output 0"].shape == (0, 8, 5)
    assert (results["grad of A"] == 0).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, backend):
    """The state is float32: the only error is that of the rounded inputs and results."""
    tensors = {n: t.to(dtype) for n, t in make(2, 16, 300, 4).items()}
    compare(backend, full, tensors, delta_softplus=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_mixed_precision(backend):
    """The form under autocast: maps in half precision, parameters in float32."""
    tensors = {n: t.float() for n, t in make(2, 16, 60, 1).items()}
    tensors |= {name: tensors[name].bfloat16() for name in ("u", "delta", "B", "C", "z")}
    compare(backend, full, tensors, 2e-2, delta_softplus=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("case", ["strong decay", "long memory", "mixed decay", "large input"])
def test_extremes(case, backend):
    tensors = {n: t.float() for n, t in make(1, 16, 400, 2).items()}
    if case == "strong decay":
        tensors["delta"] = tensors["delta"] + 60
    elif case == "long memory":
        tensors["delta"] = tensors["delta"] - 12
    elif case == "mixed decay":
        # A reset by a huge step, then a memory that must keep its digits: fatal for differences of cumulative sums.
        tensors["delta"] = torch.where(torch.arange(400) % 50 == 0, 2000.0, -8.0).expand(1, 16, 400)
    else:
        tensors["u"] = tensors["u"] * 1e15
    compare(backend, full, tensors, 1e-4, delta_softplus=True)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("length", [3136, 16385])
def test_long_sequences(length, backend):
    tensors = {n: t.float() for n, t in make(1, 8, length, 1).items()}
    tensors["delta"] = tensors["delta"] - 4
    with use_backend("naive"), torch.no_grad():
        expected, state = full(**{n: t.double() for n, t in tensors.items()}, delta_softplus=True)
    with use_backend(backend):
        actual, actual_state = full(**tensors, delta_softplus=True)
    assert_close("out", actual, expected)
    assert_close("last state", actual_state, state)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_strides(backend):
    tensors = make(2, 16, 12, 3)
    expected = run(backend, full, tensors, delta_softplus=True)
    strided = {
        "u": tensors["u"].transpose(1, 2).contiguous().transpose(1, 2),
        "delta": tensors["delta"].repeat_interleave(2, -1)[..., ::2],
        "B": tensors["B"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }
    actual = run(backend, full, tensors | strided, delta_softplus=True)
    for name, value in expected.items():
        assert_close(name, actual[name], value)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_repeated_runs_are_bit_equal(backend):
    tensors = {n: t.float() for n, t in make(2, 100, 200, 4, groups=2).items()}
    first, second = (run(backend, full, tensors, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradcheck():
    tensors = make(1, 3, 5, 2)
    with use_backend("naive"):
        assert torch.autograd.gradcheck(
            lambda *t: full(**dict(zip(tensors, t, strict=True)), delta_softplus=True),
            [t.requires_grad_() for t in tensors.values()],
        )


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C, D, z, delta_bias):
        return torch.ops.vla.selective_scan(u, delta, A, B, C, D, z, delta_bias, True)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make(2, 9, 11, 2).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), True)
    check_machinery(Scan(), tensors, torch.ops.vla.selective_scan.default, arguments)


def test_flops():
    tensors = make(2, 9, 11, 2, optional=False)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**tensors)
    assert counter.get_total_flops() == 2 * 9 * 11 * 7 * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": torch.ones(2, 3)}, r"u has shape \(2, 3\), expected \(B, D, L\)"),
        ({"u": torch.ones(2, 4, 0)}, "u has shape .*at least one channel and one step"),
        ({"delta": torch.ones(2, 4, 6)}, r"delta has shape \(2, 4, 6\), expected \(B, D, L\) = \(2, 4, 5\)"),
        ({"A": torch.ones(3, 2)}, "A has shape"),
        ({"B": torch.ones(2, 3, 2, 5)}, "B has 3 groups, expected a divisor of D = 4"),
        ({"B": torch.ones(2, 3, 5)}, r"B has shape \(2, 3, 5\), expected N = 2 like A"),
        ({"C": torch.ones(2, 2, 6)}, "C has shape"),
        ({"D": torch.ones(5)}, "D has shape"),
        ({"z": torch.ones(2, 4)}, "z has shape"),
        ({"delta_bias": torch.ones(4, 1)}, "delta_bias has shape"),
        ({"C": torch.ones(2, 2, 5, device="meta")}, "C is on meta, expected (cpu|cuda:0) like u"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    good = {"u": torch.ones(2, 4, 5), "delta": torch.ones(2, 4, 5), "A": torch.ones(4, 2)}
    good |= {"B": torch.ones(2, 2, 5), "C": torch.ones(2, 2, 5)}
    with pytest.raises(ValueError, match=f"^selective_scan: {message}"):
        selective_scan(**(good | change))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="selective_scan: u has dtype torch.int64"):
        selective_scan(*(torch.ones(s, dtype=torch.long) for s in ((1, 2, 3), (1, 2, 3), (2, 1), (1, 1, 3), (1, 1, 3))))


@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
@pytest.mark.parametrize("case", INDEX["ss"])
def test_reference_values(case, backend):
    data = golden.load("ops", f"{case}.npz")
    tensors = {n.removeprefix("in_"): t.double() for n, t in data.items() if n.startswith("in_")}
    with use_backend(backend):
        out, state = full(**tensors, delta_softplus=INDEX["ss"][case])
        leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        loss = selective_scan(**leaves, delta_softplus=INDEX["ss"][case])
        (loss * torch.from_numpy(golden.fill_tensor("loss", loss.shape))).sum().backward()
    assert_close("out", out, data["out"])
    assert_close("last state", state, data["last_state"])
    for name, leaf in leaves.items():
        assert_close(f"grad of {name}", leaf.grad, data[f"grad_{name}"])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("case", INDEX["op_selective_scan"])
def test_reference_values_of_cross_scans(case, backend):
    data = golden.load("ops", "op_selective_scan.npz")
    data = {n.removeprefix(f"{case}/"): t for n, t in data.items() if n.startswith(f"{case}/")}
    leaves = {n.removeprefix("in/"): t.double().requires_grad_() for n, t in data.items() if n.startswith("in/")}
    with use_backend(backend):
        out = selective_scan(**leaves, delta_softplus=INDEX["op_selective_scan"][case]["delta_softplus"])
        (out * torch.from_numpy(golden.fill_tensor("loss", out.shape))).sum().backward()
    # The reference arrays are stored in float32.
    assert_close("out", out, data["out"], 1e-7)
    for name, leaf in leaves.items():
        assert_close(f"grad of {name}", leaf.grad, data[f"grad/{name}"], 1e-7)
