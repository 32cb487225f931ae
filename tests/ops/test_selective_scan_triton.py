"""The selective scan's Triton kernels, interpreted on the CPU, against the definition in float64."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels import need_triton

need_triton()

from tests.ops.harness import compare, run  # noqa: E402
from tests.ops.test_selective_scan import full, make  # noqa: E402
from tests.tolerance import assert_close  # noqa: E402
from vla.ops import use_backend  # noqa: E402

kernels = importlib.import_module("vla.ops.selective_scan._triton")
rows_kernels = importlib.import_module("vla.ops.selective_scan._triton_rows")


# With rows along the lanes, sums over rows are products on tensor cores, on a GPU in TF32 for float32, whose backward
# takes this way in tests alone.
ROWS_RELATIVE = None if torch.get_default_device().type == "cpu" else 2e-3


def single(*args, **kwargs):
    return {n: t if t is None else t.float() for n, t in make(*args, **kwargs).items()}


def choose_rows(monkeypatch, chosen, segment=1):
    """Whether rows go along the lanes, then in parallel segments of so many chunks of 16 steps."""
    for name in ("forward_suits", "backward_suits"):
        monkeypatch.setattr(rows_kernels, name, lambda sizes: chosen)
    monkeypatch.setattr(rows_kernels, "_segment_chunks", lambda sizes, programs: segment)


@pytest.fixture(params=[False, True], ids=["chunk after chunk", "chunks in parallel"])
def schedule(request, monkeypatch):
    monkeypatch.setattr(kernels, "_parallel", lambda programs, chunks: request.param and chunks > 1)


@pytest.fixture(params=[False, True], ids=["time along lanes", "rows along lanes"])
def layout(request, monkeypatch):
    """The tolerance for float32."""
    choose_rows(monkeypatch, request.param)
    return ROWS_RELATIVE if request.param else None


@pytest.mark.parametrize("length, states", [(1, 3), (7, 1), (49, 1), (68, 3), (136, 1)])
def test_against_naive(length, states, schedule):
    compare("triton", full, single(2, 6, length, states, groups=2), delta_softplus=True)


@pytest.mark.parametrize("length, states, channels", [(7, 3, 5), (260, 1, 3), (272, 5, 2)])
def test_forward_chunks(length, states, channels, schedule, monkeypatch):
    monkeypatch.setattr(kernels, "_forward_blocks", lambda scan: (2, 64, 2, kernels._launch()))
    tensors = single(1, channels, length, states)
    with torch.no_grad():
        with use_backend("naive"):
            expected = full(**{n: t.double() for n, t in tensors.items()}, delta_softplus=True)
        with use_backend("triton"):
            actual = full(**tensors, delta_softplus=True)
    for name, a, e in zip(("out", "last state"), actual, expected, strict=True):
        assert_close(name, a, e)


@pytest.mark.parametrize(
    "b, c", [("constant", "grouped"), ("per-channel", "constant"), ("shared", "per-channel"), ("grouped", "shared")]
)
def test_forms_of_projections(b, c, layout):
    tensors = single(2, 2, 17, 2, b, c, 1, optional=b == "shared")
    compare("triton", full, tensors, layout, delta_softplus=b != "constant")


@pytest.mark.parametrize("channels", [19, 35])
def test_rows_beyond_a_program(channels, layout):
    """Gradients of B and C add up over the rows of a program, and over the programs of a group."""
    compare("triton", full, single(1, channels, 17, 2), layout, delta_softplus=True)


def test_short_last_chunk():
    """Backwards its lanes have one step each, those of the chunk before eight."""
    tensors = {n: t if t is None else t.bfloat16() for n, t in make(1, 3, 272, 1).items()}
    compare("triton", full, tensors, delta_softplus=True)


@pytest.mark.parametrize(
    "length, states, segment, b, c",
    [
        (17, 2, 1, "grouped", "grouped"),
        (16, 18, 1, "shared", "shared"),
        (53, 3, 9, "grouped", "grouped"),
        (53, 3, 2, "grouped", "grouped"),
        (52, 4, 2, "grouped", "grouped"),
        (20, 4, 1, "constant", "grouped"),
        (35, 2, 1, "constant", "grouped"),
        (35, 2, 1, "grouped", "constant"),
    ],
)
def test_rows_along_lanes(length, states, segment, b, c, monkeypatch):
    """Chunks of 16 steps, parallel segments of so many chunks, states one by one and two at a time."""
    choose_rows(monkeypatch, True, segment)
    compare("triton", full, single(1, 4, length, states, b, c, groups=2), ROWS_RELATIVE, delta_softplus=True)


def saved_bytes(function):
    """Bytes of states (B, ..., ..., ...) that a call leaves for its backward."""
    sizes = []

    def pack(tensor):
        if tensor.dim() == 4:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


@pytest.mark.parametrize("length, states", [(130, 1), (272, 1), (20, 2)])
def test_forward_keeps_states_for_the_backward(length, states, monkeypatch):
    choose_rows(monkeypatch, states > 1, 2)
    monkeypatch.setattr(kernels, "_parallel", lambda programs, chunks: False)
    monkeypatch.setattr(kernels, "_entering", None)
    original = rows_kernels._Segments.walk

    def walk(self, out=None, border=None):
        assert out is not None
        return original(self, out, border)

    monkeypatch.setattr(rows_kernels._Segments, "walk", walk)
    compare("triton", full, single(1, 4, length, states, groups=2), ROWS_RELATIVE, delta_softplus=True)


def test_states_kept_for_other_chunks(monkeypatch):
    """Strides that the backward's chunks are shorter for."""
    choose_rows(monkeypatch, False)
    monkeypatch.setattr(kernels, "_parallel", lambda programs, chunks: False)
    tensors = single(1, 3, 136, 1)
    expected = run("triton", full, tensors, delta_softplus=True)
    padded = torch.nn.functional.pad(tensors["u"], (0, 1))[..., :-1]
    actual = run("triton", full, tensors | {"u": padded}, delta_softplus=True)
    for name, value in expected.items():
        assert_close(name, actual[name], value)


@pytest.mark.parametrize(
    "batch, channels, length, states, bytes_per_step",
    [(128, 384, 3136, 1, 0.02), (1024, 160, 196, 8, 2.12), (8, 1536, 4096, 16, 4.0), (8, 1536, 4096, 18, 0.0)],
)
def test_memory_of_states_kept(batch, channels, length, states, bytes_per_step):
    """In bfloat16, of which each step of a row takes 2 bytes in `u` and in `delta`."""
    u = torch.empty(batch, channels, length, dtype=torch.bfloat16, device="meta")
    B = torch.empty(batch, states, length, dtype=torch.bfloat16, device="meta")
    saved = kernels.to_save(u, u, torch.empty(channels, states, device="meta"), B, B, None, None, None, True)
    assert sum(x.nbytes for x in saved) / u.numel() == pytest.approx(bytes_per_step, abs=5e-3)


def test_machinery_of_the_states_kept(monkeypatch):
    """The dispatcher and checkpoints give the direct path's gradients; nothing is kept where none is wanted."""
    choose_rows(monkeypatch, False)
    monkeypatch.setattr(kernels, "_parallel", lambda programs, chunks: False)
    tensors = single(1, 2, 136, 1)
    leaves = [t.requires_grad_() for t in tensors.values()]
    operator = torch.ops.vla.selective_scan.default

    def gradients(function):
        return torch.autograd.grad(function(*leaves, True)[0].sum(), leaves)

    with use_backend("triton"):
        expected = gradients(lambda *args: full(**dict(zip(tensors, args, strict=False)), delta_softplus=True))
        for function in (operator, lambda *args: checkpoint(operator, *args, use_reentrant=False)):
            assert all(map(torch.equal, gradients(function), expected))
        with torch.no_grad():
            assert saved_bytes(lambda: operator(*leaves, True)) == 0
        detached = tuple(t.detach() for t in leaves)
        results = torch.library.opcheck(torch.ops.vla.selective_scan_train.default, (*detached, True))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "batch, channels, length, states, forward, backward",
    [
        (1024, 160, 196, 8, True, True),
        (1024, 320, 49, 8, True, True),
        (1024, 160, 196, 1, False, False),
        (64, 160, 196, 8, False, False),
        (8, 1536, 4096, 16, True, True),
        (1, 1536, 65536, 16, True, True),
        (8, 1536, 256, 16, False, False),
        (1024, 168, 196, 8, False, False),
        (1024, 160, 9, 8, False, False),
    ],
)
def test_choice_of_rows(batch, channels, length, states, forward, backward):
    """Rows along the lanes: several states, lanes that rows fill, and enough rows or segments of them."""
    u = torch.empty(batch, channels, length, dtype=torch.bfloat16, device="meta")
    B = torch.empty(batch, states, length, dtype=torch.bfloat16, device="meta")
    scan = kernels.Scan(u, u, torch.empty(channels, states, device="meta"), B, B, None, None, None, True)
    assert rows_kernels.forward_suits(scan) == forward
    assert rows_kernels.backward_suits(scan) == backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, layout):
    compare("triton", full, {n: t.to(dtype) for n, t in make(1, 4, 72, 2).items()}, delta_softplus=True)


def test_mixed_precision(layout):
    """The form under autocast: maps in half precision, parameters in float32."""
    tensors = single(2, 4, 40, 1)
    tensors |= {name: tensors[name].bfloat16() for name in ("u", "delta", "B", "C", "z")}
    compare("triton", full, tensors, 2e-2, delta_softplus=True)


@pytest.mark.parametrize("case", ["strong decay", "long memory", "mixed decay", "large input"])
def test_extremes(case, layout):
    tensors = single(1, 4, 160, 2)
    if case == "strong decay":
        tensors["delta"] = tensors["delta"] + 60
    elif case == "long memory":
        tensors["delta"] = tensors["delta"] - 12
    elif case == "mixed decay":
        # A reset by a huge step, then a memory that must keep its digits: fatal for differences of cumulative sums.
        tensors["delta"] = torch.where(torch.arange(160) % 50 == 0, 2000.0, -8.0).expand(1, 4, 160)
    else:
        tensors["u"] = tensors["u"] * 1e15
    compare("triton", full, tensors, layout or 1e-4, delta_softplus=True)


def test_strides(layout):
    tensors = single(2, 4, 20, 3)
    expected = run("triton", full, tensors, delta_softplus=True)
    strided = {
        "u": tensors["u"].transpose(1, 2).contiguous().transpose(1, 2),
        "delta": tensors["delta"].repeat_interleave(2, -1)[..., ::2],
        "B": tensors["B"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }
    actual = run("triton", full, tensors | strided, delta_softplus=True)
    for name, value in expected.items():
        assert_close(name, actual[name], value)


def test_repeated_runs_are_bit_equal(layout):
    tensors = single(1, 5, 40, 2)
    first, second = (run("triton", full, tensors, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch():
    results = run("triton", full, single(0, 8, 5, 2), delta_softplus=True)
    assert results["output 0"].shape == (0, 8, 5)
    assert (results["grad of A"] == 0).all()
