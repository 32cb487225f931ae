"""Line scan's Triton kernels against the definition in float64: interpreted on CPUs, where it takes small maps."""

import importlib

import pytest
import torch

from tests.kernels import need_triton
from tests.ops.harness import check_saving, compare, run
from tests.ops.test_line_scan import ALL, make
from tests.tolerance import assert_close
from vla.ops import line_scan, use_backend

need_triton()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def check(shape, rank, chunk=0, dtype=FP32, normalize=True, output=True, directions=ALL, aligned=True, **options):
    """All outputs and gradients of a random case against the definition."""
    tensors = make(shape, rank, directions, output, dtype, **options)
    options = dict(directions=directions, chunk=chunk, normalize=normalize, aligned=aligned)
    compare("triton", line_scan, tensors, **options)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((1, 2, 1, 1), 0), ((1, 3, 1, 4), 2), ((2, 3, 4, 1), 0), ((1, 17, 3, 5), 3), ((2, 2, 4, 4), 1)],
    ids=str,
)
def test_proxy(shape, chunk, aligned):
    check(shape, 4, chunk, aligned=aligned)


def test_proxy_of_large_maps(monkeypatch):
    """Sums over sweeps and blocks of channels in a kernel."""
    monkeypatch.setattr(importlib.import_module("vla.ops.line_scan._triton_proxy"), "_LARGE", 0)
    check((1, 17, 6, 6), 4, 2, aligned=False)


@pytest.mark.parametrize(("rows", "chunk"), [(17, 0), (32, 0), (18, 2), (20, 3)], ids=str)
def test_proxy_with_several_tiles_or_large_ones(rows, chunk):
    check((1, 2, rows, 3), 2, chunk, directions=["left"])


@pytest.mark.parametrize("chunk", [0, 2])
def test_stored_coefficients_that_lie_differently(chunk):
    tensors = make((2, 3, 4, 6), 0, dtype=FP32)
    expected = run("naive", line_scan, tensors, directions=ALL, chunk=chunk)

    def of_views(**tensors):
        tensors["u"] = tensors["u"].mT.contiguous().mT
        return line_scan(**tensors, directions=ALL, chunk=chunk)

    for name, value in run("triton", of_views, tensors).items():
        assert_close(name, value, expected[name].double())


@pytest.mark.parametrize("rank", [0, 4])
def test_result_lies_in_memory_like_x(rank):
    """As compilers expect it, who never see the kernels."""
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = make((2, 3, 4, 5), rank, dtype=FP32)
        tensors["x"] = tensors["x"].contiguous(memory_format=layout)
        with use_backend("triton"):
            assert line_scan(**tensors, directions=ALL).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize(
    ("shape", "rank", "chunk"),
    [((2, 18, 3, 3), 4, 2), ((1, 4, 9, 4), 9, 1), ((1, 3, 16, 5), 8, 2), ((1, 5, 17, 2), 2, 2), ((1, 2, 31, 1), 3, 2)],
    ids=str,
)
def test_proxy_of_short_chunks(shape, rank, chunk, aligned):
    """Lines of fewer pairs of rows than a tile has, of as many, and of more, which take several tiles backward."""
    check(shape, rank, chunk, aligned=aligned)


def test_proxy_of_many_short_chunks():
    """An odd number of them a program, where a tile has those of several lines."""
    check((1, 2, 3, 114), 2, 2, directions=["right"])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("rank", "chunk"), [(8, 2), (11, 2), (8, 1)])
def test_proxy_of_short_chunks_in_half_precision(rank, chunk, dtype):
    check((1, 18, 5, 5), rank, chunk, dtype, scale=0.5, aligned=False)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rank", [8, 11])
def test_proxy_in_half_precision(rank, dtype):
    check((1, 16, 5, 5), rank, 4, dtype, scale=0.5, aligned=False)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_tiles_of_several_warps_in_half_precision(dtype):
    check((1, 17, 32, 4), 8, 0, dtype, scale=0.5, directions=["left"], aligned=False)


def test_float32_weights_with_half_precision_maps():
    arguments = make((1, 16, 4, 4), 8, dtype=FP32, scale=0.5)
    arguments |= {name: arguments[name].bfloat16() for name in ("x", "proxy")}
    compare("triton", line_scan, arguments, relative=2e-2, directions=ALL)


@pytest.mark.parametrize(
    "directions", [["up"], ["left", "left"], ["down", "right", "up"], ALL + ["left", "up"]], ids="-".join
)
def test_directions(directions):
    check((1, 2, 5, 5), 2, 2, directions=directions, aligned=False)


@pytest.mark.parametrize("output", [True, False])
def test_proxy_expanded_before(output):
    """Forms that the kernels with a proxy don't have: other gates, other outputs, many proxy channels, long lines."""
    check((1, 2, 3, 4), 2, 2, normalize=False, output=output)
    check((1, 2, 2, 3), 33, aligned=False, output=output)


@pytest.mark.parametrize("rows", [65, 129, 257])
def test_proxy_of_long_lines(rows):
    """In tiles of eight and 16 warps, or expanded before: those of more than 256 rows, and more than 64 in float32."""
    check((1, 1, rows, 2), 1, directions=["right"])
    check((1, 5, rows, 2), 6, dtype=BF16, directions=["left"])


@pytest.mark.parametrize("direction", ["right", "left", "down"])
@pytest.mark.parametrize("lines", [2, 4, 8, 7], ids=lambda n: f"{n} lines")
def test_stored(lines, direction):
    """Lines next to each other in memory are read two, four or eight at once."""
    for chunk, normalize, output in [(0, True, True), (3, True, False), (2, False, True), (1, False, False)]:
        check((2, 2, 3, lines), 0, chunk, FP32, normalize, output, [direction])


@pytest.mark.parametrize(
    ("lines", "dtype", "direction"),
    [(13, FP32, "left"), (18, FP32, "right"), (24, FP32, "left"), (34, FP16, "left"), (48, BF16, "right")],
    ids=str,
)
def test_stored_in_blocks(lines, dtype, direction):
    """Sweeps over several blocks of lines, with chunks that end inside of these."""
    for chunk, output in [(0, True), (5, False)]:
        check((1, 2, 3, lines), 0, chunk, dtype, output=output, directions=[direction], scale=0.5)


def test_stored_maps_that_start_between_words():
    """Two numbers of 16 bits are read as one of 32, unless that would be across words."""
    tensors = make((1, 2, 3, 20), 0, ["right"], dtype=FP16, scale=0.5)

    def of_views(**tensors):
        views = {
            n: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for n, t in tensors.items() if t is not None
        }
        return line_scan(**views, directions=["right"])

    expected = run("triton", line_scan, tensors, directions=["right"])
    for name, value in run("triton", of_views, tensors).items():
        assert_close(name, value, expected[name].double())


@pytest.mark.parametrize(
    ("shape", "rank", "dtype", "aligned", "blocks"),
    [
        ((1, 2, 3, 20), 0, FP32, True, [(3, 3), (1, 20), (3, 3), (1, 20)]),
        ((1, 2, 5, 12), 0, FP32, False, [(2, 5)] * 4),
        ((1, 2, 3, 3), 2, BF16, False, [(1, 3, 16, 16)]),
    ],
    ids=str,
)
def test_states_that_the_forward_leaves(shape, rank, dtype, aligned, blocks):
    """The backward's own are equal to the bit."""
    backend = importlib.import_module("vla.ops.line_scan._triton")
    tensors = make(shape, rank, dtype=dtype)
    arguments = (*tensors.values(), ALL, 0, True, aligned)
    saved = [torch.full_like(states, torch.nan) for states in backend.to_save(*arguments)]
    assert [tuple(states.shape[2:]) for states in saved] == blocks
    grad = torch.randn_like(backend.forward(*arguments, saved=saved))
    own = backend.backward([grad], *arguments)
    for with_states, without in zip(backend.backward([grad], *arguments, saved=saved), own, strict=True):
        assert with_states is without is None or torch.equal(with_states, without)


def test_machinery_of_the_states_that_are_saved():
    leaves = [t.requires_grad_() for t in make((1, 2, 3, 18), 0, ["left"], False, FP32).values() if t is not None]

    def scan(*leaves):
        return line_scan(*leaves, ["left"])

    arguments = (*(t.detach() for t in leaves), None, None, None, ["left"], 0, True, True)
    check_saving(scan, leaves, torch.ops.vla.line_scan_train.default, arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "direction"),
    [((1, 1, 35, 24), FP32, "right"), ((1, 1, 9, 34), FP32, "up"), ((1, 1, 66, 32), FP16, "left")],
    ids=str,
)
def test_stored_in_bands(shape, dtype, direction, monkeypatch):
    """Tall maps, of which a program has some rows only."""
    sweep = importlib.import_module("vla.ops.line_scan._triton")._Sweep
    monkeypatch.setattr(sweep, "BAND", 32 if dtype == FP32 else 64)
    monkeypatch.setattr(sweep, "HALO", 8 if dtype == FP32 else 16)
    check(shape, 0, 0, dtype, output=dtype == FP32, directions=[direction])


@pytest.mark.parametrize("direction", ["right", "left", "up"])
@pytest.mark.parametrize("shape", [(2, 2, 5, 8), (1, 3, 4, 6), (1, 2, 3, 5), (1, 2, 1, 4)], ids=str)
def test_stored_chunks_of_two(shape, direction):
    for normalize, output in [(True, True), (True, False), (False, True)]:
        check(shape, 0, 2, FP32, normalize, output, [direction])
    check(shape, 0, 2, directions=[direction, "down"], aligned=False)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 2, 1, 4), (1, 2, 4, 1), (1, 3, 3, 5)], ids=str)
def test_stored_directions(shape, aligned):
    check(shape, 0, 2, aligned=aligned)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_stored_in_half_precision(dtype):
    check((2, 3, 5, 8), 0, 4, dtype, scale=0.5)


@pytest.mark.parametrize("offset", [-200.0, -20.0, 200.0])
@pytest.mark.parametrize("rank", [0, 1], ids=["stored", "proxy"])
def test_extreme_logits(rank, offset):
    """Sigmoids that underflow or saturate: finite, and with gradients like the definition's."""
    arguments = make((1, 4, 4, 4), rank, dtype=FP32)
    if rank:
        arguments["proxy"] = torch.ones_like(arguments["proxy"])
    arguments["gates"] = arguments["gates"] + offset
    # Near the clamp of the sum, float32 and float64 sigmoids still agree, their quotients less so.
    compare("triton", line_scan, arguments, relative=1e-4, directions=ALL)


@pytest.mark.parametrize("rank", [0, 2], ids=["stored", "proxy"])
def test_long_sweep_is_stable(rank):
    """Normalised gates neither grow nor shrink a constant state."""
    arguments = make((1, 1, 3, 120), rank, ["right"], dtype=FP32)
    arguments["x"] = torch.zeros(1, 1, 3, 120)
    arguments["x"][..., 0] = 1
    for name, value in (("lam", 1), ("u", 1), ("skip", 0)):
        arguments[name] = torch.full_like(arguments[name], value / max(rank, 1))
    if rank:
        arguments["proxy"] = torch.ones_like(arguments["proxy"])
    with use_backend("triton"):
        y = line_scan(directions=["right"], **arguments)
    assert_close("state", y, torch.ones_like(y), 1e-5)


@pytest.mark.parametrize("rank", [0, 3], ids=["stored", "proxy"])
def test_strides_and_repetition(rank):
    arguments = make((2, 3, 4, 5), rank, dtype=FP32)
    expected = run("triton", line_scan, arguments, directions=ALL)
    for name, value in run("triton", line_scan, arguments, directions=ALL).items():
        assert torch.equal(value, expected[name]), name
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    arguments["gates"] = arguments["gates"].transpose(-1, -2).contiguous().transpose(-1, -2)
    arguments["lam"] = arguments["lam"].repeat_interleave(2, -1)[..., ::2]
    if not rank:
        arguments["u"] = arguments["u"][:, :, :1].expand_as(arguments["lam"])
    changed = run("torch", line_scan, arguments, directions=ALL)
    actual = run("triton", line_scan, arguments, directions=ALL)
    for name, value in actual.items():
        assert_close(name, value, changed[name])
    assert actual["output 0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rank", [0, 3], ids=["stored", "proxy"])
def test_empty_batch(rank):
    results = run("triton", line_scan, make((0, 4, 3, 4), rank, dtype=FP32), directions=ALL)
    assert results["output 0"].shape == (0, 4, 3, 4)
    assert all((value == 0).all() for value in results.values())


def test_compiled_module():
    class Module(torch.nn.Module):
        def forward(self, x, gates, lam, proxy):
            return line_scan(x, gates, lam, ["right", "up"], proxy=proxy, chunk=2)

    arguments = make((1, 2, 2, 3), 2, ["right", "up"], dtype=FP32)
    inputs = [arguments[name].requires_grad_() for name in ("x", "gates", "lam", "proxy")]
    with use_backend("triton"):
        expected = Module()(*inputs)
        actual = torch.compile(Module(), fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(actual, expected)
        for e, a in zip(
            torch.autograd.grad(expected.sum(), inputs), torch.autograd.grad(actual.sum(), inputs), strict=True
        ):
            assert torch.equal(a, e)
