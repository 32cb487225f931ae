"""State-space duality: the chunked form against the definition in float64, and against reference values."""

import pytest
import torch

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import selective_scan, ssd, use_backend

CASES = ["L1", "L49", "L64", "L100", "L128_init", "L192_g1"]


def make(batch, length, heads, width, groups=1, states=3, optional=True, seed=0):
    """Tensor arguments by name, float64."""
    normal = randn(seed)
    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, width) if optional else None,
        "dt_bias": normal(heads) if optional else None,
        "initial_state": normal(batch, heads, width, states) if optional else None,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("length", [1, 7, 64, 65, 130], ids=lambda n: f"L{n}")
def test_against_naive(length, groups, dtype):
    tensors = {n: t.to(dtype) for n, t in make(2, length, 4, 5, groups).items()}
    compare("torch", ssd, tensors, 3e-5 if dtype == torch.float32 else None, dt_softplus=True)


def test_bare():
    tensors = make(1, 20, 4, 3, optional=False)
    tensors["dt"] = tensors["dt"].abs()
    compare("torch", ssd, tensors)


def test_skip_per_head():
    compare("torch", ssd, make(2, 9, 4, 3) | {"D": randn(1)(4)}, dt_softplus=True)


def test_empty_batch():
    assert run("torch", ssd, make(0, 9, 4, 3))["output 0"].shape == (0, 9, 4, 3)


def test_weak_decay_next_to_strong_decay():
    """A memory that must keep its digits after a reset by a huge step."""
    tensors = {n: t.float() for n, t in make(1, 128, 2, 3).items()}
    tensors["dt"] = torch.where(torch.arange(128) % 40 == 0, 3000.0, -8.0).view(1, 128, 1).expand(1, 128, 2)
    compare("torch", ssd, tensors, 3e-5, dt_softplus=True)


def test_is_a_selective_scan_with_shared_decay():
    tensors = make(2, 17, 4, 5, groups=2) | {"initial_state": None}
    y, state = ssd(**tensors, dt_softplus=True)
    u, delta, D = (t.flatten(-2) for t in (tensors["x"], tensors["dt"][..., None].expand(-1, -1, -1, 5), tensors["D"]))
    expected, expected_state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        tensors["A"].repeat_interleave(5)[:, None].expand(-1, 3),
        tensors["B"].permute(0, 2, 3, 1),
        tensors["C"].permute(0, 2, 3, 1),
        D,
        delta_bias=tensors["dt_bias"].repeat_interleave(5),
        delta_softplus=True,
        return_last_state=True,
    )
    assert_close("y", y.flatten(2), expected.transpose(1, 2))
    assert_close("state", state.flatten(1, 2), expected_state)


class Scan(torch.nn.Module):
    def forward(self, x, dt, A, B, C, D, dt_bias, initial_state):
        return ssd(x, dt, A, B, C, D, dt_bias, initial_state, True)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = tuple(make(2, 9, 4, 3).values())
    arguments = (*(t.clone().requires_grad_() for t in tensors), True)
    check_machinery(Scan(), tensors, torch.ops.vla.ssd.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 5, 4)}, r"x has shape \(2, 5, 4\), expected \(B, L, H, P\)"),
        ({"dt": torch.ones(2, 5, 3)}, "dt has shape"),
        ({"A": torch.ones(3)}, "A has shape"),
        ({"B": torch.ones(2, 5, 3, 3), "C": torch.ones(2, 5, 3, 3)}, "B has 3 groups, expected a divisor of H = 4"),
        ({"C": torch.ones(2, 5, 1, 4)}, "C has shape"),
        ({"D": torch.ones(4, 3)}, "D has shape"),
        ({"initial_state": torch.ones(2, 4, 3, 3)}, "initial_state has shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    good = {n: t.float() for n, t in make(2, 5, 4, 2).items()}
    with pytest.raises(ValueError, match=f"^ssd: {message}"):
        ssd(**(good | change))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_reference_values(backend, case):
    data = golden.load("ops", "op_ssd.npz")
    data = {n.removeprefix(f"{case}/"): t for n, t in data.items() if n.startswith(f"{case}/")}
    leaves = {n.removeprefix("in/"): t.double().requires_grad_() for n, t in data.items() if n.startswith("in/")}
    if "initial_states" in leaves:
        leaves["initial_state"] = leaves.pop("initial_states")
    with use_backend(backend):
        y, state = ssd(**leaves, dt_softplus=True)
        weights = [torch.from_numpy(golden.fill_tensor("loss", t.shape)) for t in (y, state)]
        ((y * weights[0]).sum() + (state * weights[1]).sum()).backward()
    # The reference arrays are stored in float32.
    assert_close("y", y, data["out"], 1e-7)
    assert_close("state", state, data["final_state"], 1e-7)
    for name, leaf in leaves.items():
        stored = "initial_states" if name == "initial_state" else name
        assert_close(f"grad of {name}", leaf.grad, data[f"grad/{stored}"], 1e-7)
