"""Line scan: every backend against the definition in float64, and the definition against reference values."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import assert_close
from vla.ops import line_scan, use_backend
from vla.ops.line_scan import operator
from vla.ops.line_scan.frames import DIRECTIONS, from_frame, from_map_frame, to_frame, to_map_frame
from vla.ops.line_scan.naive import normalize_gates

ALL = list(DIRECTIONS)
BACKENDS = [name for name in operator.backends if name != "triton"]
FAST_BACKENDS = [name for name in BACKENDS if name != "naive"]
# (chunk, normalize, output)
FORMS = [(0, True, True), (1, True, True), (3, True, True), (2, True, False), (2, False, True), (0, False, False)]


def make(shape, rank=3, directions=ALL, output=True, dtype=torch.float64, seed=0, scale=1.0):
    """Tensor arguments by name; `rank` 0 for stored maps, `output` False without `u` and `skip`."""
    batch, channels, height, width = shape
    draw = randn(seed)
    k = len(directions)
    lead, lam_lead, tail = ((3,), (), (rank,)) if rank else ((batch, 3), (batch,), (height, width))
    arguments = {
        "x": draw(*shape),
        "gates": draw(*lead, k, channels, *tail),
        "lam": draw(*lam_lead, k, channels, *tail),
        "u": draw(*lam_lead, k, channels, *tail) if output else None,
        "skip": draw(*lam_lead, k, channels, *tail) if output else None,
        "proxy": draw(batch, rank, height, width) if rank else None,
    }
    return {name: None if t is None else (scale * t).to(dtype) for name, t in arguments.items()}


SHAPES = [(2, 3, 1, 1), (1, 2, 1, 6), (1, 2, 6, 1), (2, 3, 5, 7), (1, 5, 8, 3), (2, 33, 6, 6)]


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("rank", [0, 1, 4], ids=lambda r: f"S{r}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_against_naive(shape, rank, aligned, backend):
    for chunk, normalize, output in FORMS:
        arguments = make(shape, rank, output=output)
        compare(backend, line_scan, arguments, directions=ALL, aligned=aligned, chunk=chunk, normalize=normalize)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("directions", [["up"], ["left", "left"], ["down", "right", "up"]], ids="-".join)
def test_directions(directions, backend):
    for aligned in (True, False):
        tensors = make((2, 4, 4, 6), directions=directions)
        compare(backend, line_scan, tensors, directions=directions, aligned=aligned, chunk=2)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 8], ids=["stored", "proxy"])
def test_dtypes(rank, dtype, backend):
    compare(backend, line_scan, make((2, 16, 9, 11), rank, dtype=dtype, scale=0.5), directions=ALL, chunk=4)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float32_weights_with_half_precision_maps(backend):
    arguments = make((2, 16, 6, 6), 8, dtype=torch.float32, scale=0.5)
    arguments |= {name: arguments[name].bfloat16() for name in ("x", "proxy")}
    compare(backend, line_scan, arguments, relative=2e-2, directions=ALL)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("offset", [-200.0, -20.0, 200.0])
def test_extreme_logits(offset, backend):
    """Sigmoids that underflow or saturate: finite, and with gradients like the definition's."""
    arguments = make((1, 4, 5, 6), 0, dtype=torch.float32)
    arguments["gates"] = arguments["gates"] + offset
    # Near the clamp of the sum, float32 and float64 sigmoids still agree, their quotients less so.
    compare(backend, line_scan, arguments, relative=1e-4, directions=ALL)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_long_sweep_is_stable(backend):
    """Normalised gates neither grow nor shrink a constant state over 2000 lines."""
    arguments = make((1, 2, 3, 2000), 0, ["right"], output=False, dtype=torch.float32)
    arguments["x"] = torch.zeros(1, 2, 3, 2000)
    arguments["x"][..., 0] = 1
    arguments["lam"] = torch.ones_like(arguments["lam"])
    with use_backend(backend):
        y = line_scan(directions=["right"], **arguments)
    assert_close("state", y, torch.ones_like(y), 1e-4)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rank", [0, 3], ids=["stored", "proxy"])
def test_strides(rank, backend):
    arguments = make((2, 4, 6, 5), rank)
    expected = run(backend, line_scan, arguments, directions=ALL)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    if rank:
        arguments["proxy"] = arguments["proxy"].contiguous(memory_format=torch.channels_last)
    arguments["gates"] = arguments["gates"].transpose(-1, -2).contiguous().transpose(-1, -2)
    arguments["lam"] = arguments["lam"].repeat_interleave(2, -1)[..., ::2]
    actual = run(backend, line_scan, arguments, directions=ALL)
    for name in expected:
        assert_close(name, actual[name], expected[name])
    assert actual["output 0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("rank", [0, 3], ids=["stored", "proxy"])
def test_empty_batch(rank, backend):
    results = run(backend, line_scan, make((0, 4, 6, 5), rank), directions=ALL)
    assert results["output 0"].shape == (0, 4, 6, 5)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
def test_directions_are_sweeps(aligned):
    """The definition itself: where a single bright pixel reaches in one sweep of open gates."""
    height, width = 5, 6
    x = torch.zeros(1, 1, height, width)
    x[0, 0, 2, 3] = 1
    ones = torch.ones(1, 1, 1, height, width)
    for direction in DIRECTIONS:
        gates = torch.ones(1, 3, 1, 1, height, width)
        if not aligned and direction in ("down", "up"):
            continue
        y = line_scan(x, gates, ones, [direction], normalize=False, aligned=aligned)[0, 0]
        if not aligned and direction == "left":
            y = y.flip(-1)
        i, j = torch.meshgrid(torch.arange(height) - 2, torch.arange(width) - 3, indexing="ij")
        ahead = {"right": j, "left": -j, "down": i, "up": -i}[direction]
        aside = i if direction in ("right", "left") else j
        assert ((y > 0) == (aside.abs() <= ahead)).all(), direction


def test_released_orientation_on_a_square():
    """`aligned=False` is a sweep to the right over the turned map, whose coefficients stay where they are."""
    arguments = make((2, 3, 5, 5))
    x = arguments.pop("x")
    turned = {"right": x, "down": x.mT, "left": x.flip(-1), "up": x.mT.flip(-1)}
    expected = 0
    for k, direction in enumerate(ALL):
        one = {n: arguments[n][..., k : k + 1, :, :] for n in ("gates", "lam", "u", "skip")}
        expected += line_scan(turned[direction], directions=["right"], proxy=arguments["proxy"], chunk=2, **one)
    actual = line_scan(x, directions=ALL, chunk=2, aligned=False, **arguments)
    assert_close("y", actual, expected)


def test_aligned_sweeps_turn_with_the_map():
    """Turning everything by 180 degrees swaps opposite sweeps; transposing swaps rows and columns."""
    arguments = make((2, 3, 4, 6))
    maps = ("x", "proxy")
    expected = line_scan(directions=ALL, chunk=3, **arguments)
    transposed = arguments | {n: arguments[n].mT for n in maps}
    actual = line_scan(directions=["down", "right", "up", "left"], chunk=3, **transposed)
    assert_close("transposed", actual.mT, expected)
    mirrored = arguments | {n: arguments[n].flip(-1, -2) for n in maps}
    mirrored["gates"] = arguments["gates"].flip(0)
    actual = line_scan(directions=["left", "up", "right", "down"], chunk=3, **mirrored)
    # The two outer gates change places, and with them which of them is left out at the border.
    assert_close("mirrored", actual.flip(-1, -2), expected)


def test_proxy_equals_expanded_maps():
    arguments = make((2, 3, 4, 6), 5)
    proxy = arguments.pop("proxy")
    maps = {n: torch.einsum("...ds,bshw->b...dhw", arguments[n], proxy) for n in ("gates", "lam", "u", "skip")}
    for aligned in (True, False):
        expected = line_scan(arguments["x"], directions=ALL, aligned=aligned, **maps)
        actual = line_scan(directions=ALL, proxy=proxy, aligned=aligned, **arguments)
        assert_close("y", actual, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4), (3, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_frames_and_their_adjoints(direction, size):
    x = torch.randn(2, *size, dtype=torch.float64)
    assert torch.equal(from_frame(to_frame(x, direction), direction), x)
    y = torch.randn(2, *size, dtype=torch.float64)
    frame = to_map_frame(x, direction)
    assert frame.shape == x.shape
    torch.testing.assert_close((frame * y).sum(), (x * from_map_frame(y, direction)).sum())


SCANS = golden.load("gspn", "op_scan.npz")
SCAN_CASES = sorted({name.split("/")[0] for name in SCANS})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SCAN_CASES)
def test_reference_scan(case, backend, dtype):
    data = {name.removeprefix(f"{case}/"): value for name, value in SCANS.items() if name.startswith(f"{case}/")}
    gates = torch.stack([data["g1"], data["g2"], data["g3"]], 1).unsqueeze(2)
    arguments = {"x": data["x"], "gates": gates, "lam": data["lam"].unsqueeze(1)}
    arguments = {name: value.to(dtype).clone().requires_grad_() for name, value in arguments.items()}
    with use_backend(backend):
        y = line_scan(directions=["right"], chunk=int(data["chunk"]), normalize=False, **arguments)
        y.backward(data["cot"].to(dtype))
    assert_close("out", y, data["out"])
    assert_close("d_x", arguments["x"].grad, data["d_x"])
    assert_close("d_lam", arguments["lam"].grad[:, 0], data["d_lam"])
    for i, name in enumerate(("d_g1", "d_g2", "d_g3")):
        assert_close(name, arguments["gates"].grad[:, i, 0], data[name])


GATES = golden.load("gspn", "op_normalize_w.npz")


@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in GATES}))
def test_reference_gates(case):
    logits = [GATES[f"{case}/logit_{side}"].double().requires_grad_() for side in "lmr"]
    gates = normalize_gates(*logits)
    cotangents = [GATES[f"{case}/cot_{side}"].double() for side in "lmr"]
    gradients = torch.autograd.grad(gates, logits, cotangents)
    for side, gate, gradient in zip("lmr", gates, gradients, strict=True):
        assert_close(f"gate {side}", gate, GATES[f"{case}/out_{side}"])
        assert_close(f"gradient {side}", gradient, GATES[f"{case}/grad_{side}"])


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
def test_gradcheck(aligned, backend):
    arguments = make((1, 2, 2, 3), 2)
    tensors = [t.requires_grad_() for t in arguments.values()]
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *t: torch.ops.vla.line_scan(*t, ALL, 2, True, aligned), tensors, nondet_tol=1e-12
        )


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor, gates: torch.Tensor, lam: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
        return line_scan(x, gates, lam, ["right", "down", "left", "up"], proxy=proxy, chunk=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 2], ids=["stored", "proxy"])
def test_machinery(rank, backend):
    inputs = tuple(make((2, 3, 4, 5), dtype=torch.float32)[name] for name in ("x", "gates", "lam", "proxy"))
    tensors = [t.requires_grad_() for t in make((1, 3, 3, 4), rank).values() if t is not None]
    tensors += [] if rank else [None]
    with use_backend(backend):
        check_machinery(Module(), inputs, torch.ops.vla.line_scan.default, (*tensors, ALL, 2, True, True))


def test_export_with_any_size():
    arguments = make((2, 3, 4, 5), dtype=torch.float32)
    size = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    inputs = tuple(arguments[name] for name in ("x", "gates", "lam", "proxy"))
    exported = torch.export.export(Module(), inputs, dynamic_shapes=(size, None, None, size)).module()
    larger = make((2, 3, 7, 3), dtype=torch.float32, seed=1)
    inputs = (larger["x"], *inputs[1:3], larger["proxy"])
    assert torch.equal(exported(*inputs), Module()(*inputs))


def test_flops_grow_with_pixels_and_rank():
    def count(shape, rank):
        with FlopCounterMode(display=False) as counter:
            run("torch", line_scan, make(shape, rank), directions=ALL)
        return counter.get_total_flops()

    assert count((1, 4, 8, 6), 2) == 2 * count((1, 4, 4, 6), 2)
    assert count((1, 4, 8, 6), 4) > count((1, 4, 8, 6), 2) > count((1, 4, 8, 6), 0) > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"directions": ["sideways"]}, ValueError, "unknown direction 'sideways', expected one of right, down"),
        ({"directions": []}, ValueError, "directions is empty"),
        ({"chunk": -1}, ValueError, "chunk is -1"),
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x has shape \(2, 3, 4\), expected \(B, D, H, W\)"),
        ({"x": torch.zeros(2, 3, 0, 5)}, ValueError, "at least one channel and one pixel"),
        ({"gates": torch.zeros(2, 4, 3, 2)}, ValueError, r"gates has shape .*, expected \(3, K, D, S\) = "),
        ({"lam": torch.zeros(4, 3)}, ValueError, r"lam has shape .*, expected \(K, D, S\) = \(4, 3, 2\)"),
        ({"u": torch.zeros(4, 3, 7)}, ValueError, r"u has shape \(4, 3, 7\), expected \(K, D, S\)"),
        ({"skip": torch.zeros(4, 5, 2)}, ValueError, "skip has shape"),
        ({"proxy": torch.zeros(2, 2, 5, 4)}, ValueError, r"proxy has shape \(2, 2, 5, 4\), expected \(B, S, H, W\)"),
        ({"proxy": None}, ValueError, r"gates has shape .*, expected \(B, 3, K, D, H, W\)"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.long)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "gates is on (cpu|cuda:0), expected meta like x"),
    ],
)
def test_errors(change, error, message):
    arguments = make((2, 3, 4, 5), 2) | {"directions": ALL} | change
    with pytest.raises(error, match=message):
        line_scan(**arguments)
