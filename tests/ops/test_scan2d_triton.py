"""The directional scan's Triton kernels, interpreted on the CPU, against the definition in float64."""

import importlib
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from tests.kernels import need_triton

need_triton()

from tests import golden  # noqa: E402
from tests.ops.harness import compare, run  # noqa: E402
from tests.ops.test_scan2d import CROSS, make  # noqa: E402
from tests.tolerance import assert_close  # noqa: E402
from vla.ops import scan2d, use_backend  # noqa: E402

kernels = importlib.import_module("vla.ops.scan2d._triton")
fwd, bwd = kernels._fwd_config, kernels._bwd_config  # as they are outside of `small_tiles`


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Runs of one tile of 16 pixels, in segments of 4: small maps have several, and the interpreter little to do."""
    for name in ("_fwd_config", "_bwd_config"):
        monkeypatch.setattr(kernels, name, lambda problem: kernels.Config(4, 16, 2, 1, tiles=1))


def single(*args, **kwargs):
    return {n: t if t is None else t.float() for n, t in make(*args, **kwargs).items()}


@pytest.mark.parametrize(
    "shape, directions, options",
    [
        ((1, 1, 1, 1), ["row"], {}),
        ((2, 3, 5, 4), ["row", "col"], {}),
        ((1, 17, 3, 7), ["row_rev", "col_rev"], {}),
        ((1, 2, 5, 4), ["col", "col"], dict(grouped=True)),
        ((1, 3, 2, 5), CROSS, dict(grouped=True)),
        ((1, 2, 3, 2), ["row_rev", "col"], dict(per_line=True)),
        ((1, 2, 2, 3), ["row", "col_rev"], dict(per_line=True, grouped=True)),
    ],
    ids=str,
)
def test_against_naive(shape, directions, options):
    tensors = single(shape, 1, directions=directions, grouped=options.get("grouped", False))
    compare("triton", scan2d, tensors, directions=directions, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_in_maps_of_directions(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(4, 16, 2, 1, ahead=True, apart=True))
    tensors = {n: t.to(dtype) for n, t in make((1, 5, 5, 4), 1, directions=CROSS).items()}
    compare("triton", scan2d, tensors, directions=CROSS)


@pytest.mark.parametrize("states", [3, 8], ids=lambda n: f"N{n}")
def test_states(states):
    compare("triton", scan2d, single((1, 3, 3, 6), states, directions=["col_rev"]), directions=["col_rev"])


@pytest.mark.parametrize("rank, optional", [(0, True), (1, False), (17, True)], ids=str)
def test_time_steps(rank, optional):
    tensors = single((1, 5, 3, 4), 1, rank, directions=["row"], optional=optional)
    if not optional:
        tensors["dt"] = tensors["dt"].abs() * 0.1
    compare("triton", scan2d, tensors, directions=["row"], delta_softplus=optional)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    tensors = {n: t.to(dtype) for n, t in make((1, 4, 5, 4), 1, directions=["row", "col"]).items()}
    compare("triton", scan2d, tensors, directions=["row", "col"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, states", [(3, 2), (17, 1)], ids=["one product", "sums by lanes"])
@pytest.mark.parametrize("config", [(4, 16, 2, 1), (4, 64, 4, 2)], ids=["narrow blocks", "wide blocks"])
def test_sums_over_channels(config, rank, states, dtype, monkeypatch):
    """Gradients that channels share, by blocks and as the dtype's products take them, in maps of directions."""
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: kernels.Config(*config, apart=True))
    tensors = {n: t.to(dtype) for n, t in make((1, 18, 3, 6), states, rank, directions=["row", "row_rev"]).items()}
    compare("triton", scan2d, tensors, directions=["row", "row_rev"])


@pytest.mark.parametrize("offset", [-12.0, 60.0], ids=["long memory", "strong decay"])
def test_extremes(offset):
    tensors = single((1, 4, 6, 6), 1, directions=["row"])
    tensors["dt_bias"] = tensors["dt_bias"] + offset
    compare("triton", scan2d, tensors, 1e-4, directions=["row"])


@pytest.mark.parametrize("config", [(16, 16, 1, 1), (4, 32, 4, 2), (16, 32, 1, 1)], ids=str)
def test_every_tiling(config, monkeypatch):
    """One or several segments in a tile, tiles wider than the map, blocks wider than the channels."""
    monkeypatch.setattr(kernels, "_fwd_config", lambda problem: kernels.Config(*config))
    tensors = single((1, 18, 5, 7), 1, directions=["row_rev", "col"])
    with torch.no_grad():
        with use_backend("naive"):
            expected = scan2d(**{n: t.double() for n, t in tensors.items()}, directions=["row_rev", "col"])
        with use_backend("triton"):
            assert_close("output", scan2d(**tensors, directions=["row_rev", "col"]), expected)


@pytest.mark.parametrize("option", [{}, dict(ahead=True), dict(apart=True)], ids=["", "ahead", "apart"])
@pytest.mark.parametrize("tiles", [0, 2], ids=["whole", "runs of two"])
def test_every_cut(tiles, option, monkeypatch):
    """Whole sequences and runs of several tiles, which a direction and its reverse cut alike."""
    for name in ("_fwd_config", "_bwd_config"):
        monkeypatch.setattr(kernels, name, lambda problem: kernels.Config(4, 16, 2, 1, tiles, **option))
    compare("triton", scan2d, single((1, 2, 5, 7), 1, directions=["col", "col_rev"]), directions=["col", "col_rev"])
    compare("triton", scan2d, single((1, 2, 3, 7), 2, directions=CROSS), directions=CROSS)


@pytest.mark.parametrize("forward", [(4, 16, 2, 1), (4, 16, 4, 1), (4, 16, 4, 1, 1), (2, 16, 1, 1)], ids=str)
def test_runs_of_the_backward_alone(forward, monkeypatch):
    """With the states that the forward keeps, or without, where its tiles do not begin where the backward's do."""
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(*forward))
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: kernels.Config(4, 16, 2, 1, 2))
    compare("triton", scan2d, single((1, 2, 5, 7), 2, directions=["col_rev", "row"]), directions=["col_rev", "row"])


@pytest.fixture
def whole_sequences(monkeypatch):
    """Tiles of 16 pixels without runs, whose states at the borders the forward keeps for the backward."""
    for name in ("_fwd_config", "_bwd_config"):
        monkeypatch.setattr(kernels, name, lambda sizes: kernels.Config(4, 16, 2, 1))


def saved_bytes(function):
    """Bytes of float32 states (sequences, K, runs, tiles, N, D) that a call leaves for its backward."""
    sizes = []

    def pack(tensor):
        if tensor.dim() == 6:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


@pytest.mark.parametrize("config", [(4, 16, 2, 1), (4, 16, 4, 1), (8, 32, 4, 1), (4, 32, 4, 4)], ids=str)
@pytest.mark.parametrize(
    "shape, states, directions, options",
    [
        ((1, 18, 5, 7), 1, ["row_rev", "col"], {}),
        ((1, 3, 4, 9), 2, ["col_rev", "row"], dict(grouped=True)),
    ],
    ids=str,
)
def test_forward_keeps_states_for_the_backward(
    shape, states, directions, options, config, whole_sequences, monkeypatch
):
    """Tiles of the forward that are as long as the backward's or several times that, of as many channels or more."""
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(*config))
    monkeypatch.setattr(kernels, "scan2d_states_kernel", None)
    tensors = single(shape, states, directions=directions, grouped=options.get("grouped", False))
    compare("triton", scan2d, tensors, directions=directions, **options)


def test_forward_keeps_states_of_lines(whole_sequences, monkeypatch):
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: kernels.Config(4, 16, 4, 1))
    monkeypatch.setattr(kernels, "scan2d_states_kernel", None)
    tensors = single((1, 3, 2, 17), 1, directions=["row_rev"])
    compare("triton", scan2d, tensors, directions=["row_rev"], per_line=True)


@pytest.mark.parametrize(
    "config, states, count, channels",
    [
        ((4, 16, 2, 1), 1, 3, 20),  # 40 steps are 3 tiles of 16
        ((4, 16, 2, 1, 1), 1, 3, 21),  # in as many runs
        ((2, 16, 1, 1), 1, 0, 22),  # tiles of 4 do not begin where those of 16 do
        ((4, 16, 2, 1), 9, 0, 23),  # 2 directions of 9 states every 16 steps, 4.5 bytes a pixel, are more than x
    ],
    ids=str,
)
def test_memory_of_the_states_kept(config, states, count, channels, whole_sequences, monkeypatch):
    # Calls of a layout of its own: a GPU launches again what it has launched for one.
    backward = kernels.Config(4, 16, 2, 1)  # whatever the GPU
    monkeypatch.setattr(kernels, "_bwd_config", lambda _: backward)
    monkeypatch.setattr(kernels, "_fwd_config" if config[0] == 2 else "_bwd_config", lambda _: kernels.Config(*config))
    tensors = single((1, channels, 5, 8), states, directions=["row", "col"])
    tensors["x"].requires_grad_()
    with use_backend("triton"):
        assert saved_bytes(lambda: scan2d(**tensors, directions=["row", "col"])) == 4 * 2 * count * states * channels
        with torch.no_grad():
            assert saved_bytes(lambda: scan2d(**tensors, directions=["row", "col"])) == 0


def test_memory_is_that_of_half_a_map_in_vmamba():
    """Bytes per pixel and channel of VMamba-T's stages with 128 pictures, whose maps have 2."""

    def kept(channels, side, rank):
        x = torch.empty(128, channels, side, side, device="meta", dtype=torch.bfloat16)
        A, weight = torch.empty(4, channels, 1, device="meta"), torch.empty(4, channels, rank, device="meta")
        (states,) = kernels.to_save(x, None, A, None, None, CROSS, None, weight, None, True, False, False)
        return states.nbytes / x.numel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_fwd_config", fwd)
        patch.setattr(kernels, "_bwd_config", bwd)
        assert kept(96, 56, 6) == 1
        # In whole sequences, or in the interpreter's halves.
        assert kept(192, 28, 12) in (1, pytest.approx(1.02, abs=0.01))
        assert kept(384, 14, 24) in (pytest.approx(1.06, abs=0.01), pytest.approx(1.14, abs=0.01))
        assert kept(768, 7, 48) == pytest.approx(1.31, abs=0.01)


def targets(graph):
    return {str(node.target) for node in graph.nodes} & {"vla.scan2d.default", "vla.scan2d_train.default"}


def test_machinery_of_the_states_kept(whole_sequences):
    """The dispatcher, compilers, checkpoints and hooks give the direct path's gradients; exports stay as they were."""
    tensors = single((1, 2, 3, 6), 1, directions=["row_rev"])
    leaves = [t.requires_grad_() for t in tensors.values()]
    options = (True, False, False)

    def scan(*leaves):
        return scan2d(*leaves[:5], ["row_rev"], *leaves[5:])

    def gradients(function):
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    def compiler(graph, inputs):
        graphs.append(targets(graph.graph))
        return make_boxed_func(graph)

    class Scan(torch.nn.Module):
        def forward(self, *leaves):
            return scan(*leaves)

    graphs = []
    packed = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor)
    with use_backend("triton"):
        expected = gradients(scan)
        for function in (
            lambda *leaves: torch.ops.vla.scan2d(*leaves[:5], ["row_rev"], *leaves[5:], *options),
            lambda *leaves: checkpoint(scan, *leaves, use_reentrant=False),
            torch.compile(scan, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)),
        ):
            assert all(map(torch.equal, gradients(function), expected))
        with packed:
            assert all(map(torch.equal, gradients(scan), expected))
        assert graphs[0] == {"vla.scan2d_train.default"}
        exported = torch.export.export(Scan(), tuple(leaves))
        assert targets(exported.graph) == targets(exported.run_decompositions().graph) == {"vla.scan2d.default"}
        arguments = (*leaves[:5], ["row_rev"], *leaves[5:], *options)
        assert set(torch.library.opcheck(torch.ops.vla.scan2d.default, arguments).values()) == {"SUCCESS"}
        arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        assert set(torch.library.opcheck(torch.ops.vla.scan2d_train.default, arguments).values()) == {"SUCCESS"}


def test_second_derivative_raises(whole_sequences):
    tensors = single((1, 2, 3, 2), 1, directions=["row"])
    leaves = [t.requires_grad_() for t in tensors.values()]
    with use_backend("triton"):
        for function in (scan2d, lambda *args: torch.ops.vla.scan2d(*args, True, False, False)):
            y = function(*leaves[:5], ["row"], *leaves[5:])
            first = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)[0]
            with pytest.raises(RuntimeError, match="differentiate"):
                torch.autograd.grad(first.sum(), leaves[0])


def test_backward_of_another_backend(whole_sequences):
    """What was saved is read by the backend that has saved it."""
    tensors = single((1, 2, 3, 6), 1, directions=["row"])
    expected = run("triton", scan2d, tensors, directions=["row"])["grad of x"]
    x = tensors["x"].requires_grad_()
    with use_backend("triton"):
        y = scan2d(**tensors, directions=["row"])
    with use_backend("torch"):
        weight = torch.from_numpy(golden.fill_tensor("loss0", y.shape)).to(y.dtype)
        assert torch.equal(torch.autograd.grad(y, x, weight)[0], expected)


def test_long_sequences_of_few_programs_are_cut_into_runs():
    def problem(batch, channels, side):
        x = torch.empty(batch, channels, side, side, device="meta")
        dt, b, c = torch.empty(batch, 1, 8, side, side, device="meta").split([6, 1, 1], dim=2)
        A, weight = torch.empty(1, channels, 1, device="meta"), torch.empty(1, channels, 6, device="meta")
        return kernels._Problem(x, dt, A, b, c, ["row"], None, weight, None, True, False, False)

    pick = {(b, c, s): problem(b, c, s) for b, c, s in ((1, 96, 56), (128, 96, 56), (128, 384, 14), (1, 384, 14))}
    runs = {key: (p.cut(fwd(p))[1] > 1, p.cut(bwd(p))[1] > 1) for key, p in pick.items()}
    assert runs == {
        (1, 96, 56): (True, True),
        (128, 96, 56): (False, True),
        (128, 384, 14): (False, False),
        (1, 384, 14): (False, False),
    }


def test_empty_batch():
    assert run("triton", scan2d, single((0, 4, 3, 2)), directions=CROSS)["output 0"].shape == (0, 4, 3, 2)


def test_strides():
    """Channels-last maps and a split projection are read in place, others are copied, the values the same."""
    directions = ["row", "col"]
    tensors = single((1, 4, 3, 5), 1, directions=directions)
    packed = torch.cat([tensors["dt"], tensors["B"], tensors["C"]], dim=2).permute(0, 3, 4, 1, 2).contiguous()
    dt, b, c = packed.permute(0, 3, 4, 1, 2).split((3, 1, 1), dim=2)
    last = tensors["x"].contiguous(memory_format=torch.channels_last)
    cropped = torch.zeros(1, 4, 4, 7)
    cropped[:, :, 1:, 2:] = tensors["x"]
    assert kernels._packed(dt, b, c)[0] is dt
    assert kernels._walked(last) is last
    assert kernels._walked(tensors["x"]) is not tensors["x"]
    with use_backend("triton"):
        expected = scan2d(**tensors, directions=directions)
        for x in (last, cropped[:, :, 1:, 2:]):
            y = scan2d(**(tensors | {"x": x, "dt": dt, "B": b, "C": c}), directions=directions)
            assert_close("output", y, expected)
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    "shape, change",
    [
        ((2, 4, 5, 1), lambda x: x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)),
        ((2, 1, 3, 5), lambda x: x.contiguous()),
        ((2, 4, 3, 5), lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(2, -1, -1, -1)),
    ],
    ids=["a row turned", "one channel", "one picture for all"],
)
def test_strides_that_say_little(shape, change):
    tensors = single(shape, 1, directions=["row", "col_rev"])
    changed = change(tensors.pop("x"))
    results = []
    for x in (changed, changed.clone(memory_format=torch.channels_last)):
        x.requires_grad_()
        with use_backend("triton"):
            y = scan2d(x, **tensors, directions=["row", "col_rev"])
        results.append([y, *torch.autograd.grad(y.square().sum(), [x])])
    for name, actual, expected in zip(("output", "gradient"), *results, strict=True):
        assert_close(name, actual, expected)


def test_large_maps_use_wide_offsets():
    x = torch.empty(1, device="meta").expand(2, 64, 8192, 8192)
    dense = torch.empty(2, 8192, 8192, 64, device="meta").permute(0, 3, 1, 2)
    assert kernels._reach(x) == 0
    assert kernels._reach(dense) == 8192 * 8192 * 64 - 1


def test_repeated_runs_are_bit_equal():
    tensors = single((1, 20, 4, 5), 1, directions=["row", "row_rev"])
    first, second = (run("triton", scan2d, tensors, directions=["row", "row_rev"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("chained", [False, True], ids=["", "chained"])
@pytest.mark.parametrize(
    "directions, shape, tiles",
    [
        (CROSS, (1, 18, 5, 8), 0),
        (CROSS, (1, 3, 5, 8), 2),
        (CROSS, (1, 1, 1, 1), 0),
        (["col_rev", "row", "col", "row_rev"], (2, 3, 3, 6), 0),
        (["col", "col_rev"], (1, 3, 3, 6), 1),
    ],
    ids=str,
)
def test_directions_that_meet_their_reverses(directions, shape, tiles, chained, monkeypatch):
    """Pairs of directions in one map each, in any order, with an odd number of tiles, or a half without a pixel."""
    forward = kernels.Config(4, 16, 2, 1, tiles=int(chained), ahead=not chained, apart=True, chained=chained)
    backward = kernels.Config(4, 16, 2, 1, tiles, ahead=True, apart=True, chained=chained)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: forward)
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: backward)
    found = []
    for name in ("walk", "walk_back"):
        function = getattr(kernels, name)

        def followed(*args, function=function, **kwargs):
            result = function(*args, **kwargs)
            found.append(result[0] if isinstance(result, tuple) else result)
            return result

        monkeypatch.setattr(kernels, name, followed)
    tensors = {n: t.bfloat16() for n, t in make(shape, 1, directions=directions).items()}
    compare("triton", scan2d, tensors, directions=directions)
    numbers = tensors["x"].numel()
    assert found and all(maps.shape == (len(directions) // 2, numbers) for maps in found)


@pytest.fixture
def side_by_side(monkeypatch):
    """Interprets directions apart as a GPU runs them: each program in a process of its own, so that they can meet."""
    if not kernels.INTERPRETED.value:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    one_by_one, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder

    def interpret(executor, program, *args, **kwargs):
        (programs,), executor.grid = executor.grid, (1,)
        set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
        builder.set_grid_dim = lambda *_: set_dim(programs, 1, 1)
        builder.set_grid_idx = lambda *_: set_index(program, 0, 0)
        one_by_one(executor, *args, **kwargs)

    def launch(executor, *args, **kwargs):
        if not kwargs.get("APART"):
            return one_by_one(executor, *args, **kwargs)
        for tensor in (arg for arg in args if isinstance(arg, torch.Tensor)):
            tensor.untyped_storage().share_memory_()
        children = []
        for program in range(executor.grid[0]):
            children.append(os.fork())
            if children[-1] == 0:
                signal.alarm(60)  # for one that waits in vain
                status = 1
                try:
                    interpret(executor, program, *args, **kwargs)
                    status = 0
                finally:
                    os._exit(status)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert not any(statuses)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(kernels, "INTERPRETED", SimpleNamespace(value=False))
    # What it remembers are halves.
    monkeypatch.setattr(kernels, "_known_cut", kernels._cut)


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize(
    "directions, shape",
    [(CROSS, (1, 3, 5, 8)), (["col", "row_rev", "row", "col_rev"], (1, 3, 7, 9)), (["row_rev", "row"], (2, 17, 1, 2))],
    ids=str,  # 3, 4 and 1 tiles
)
def test_directions_that_meet_in_the_middle(directions, shape, ahead, monkeypatch, side_by_side):
    cuts = []
    for name in ("_fwd_config", "_bwd_config"):
        config = kernels.Config(4, 16, 2, 1, ahead=ahead, apart=True)
        monkeypatch.setattr(kernels, name, lambda sizes, config=config: cuts.append(sizes.cut(config)) or config)
    tensors = {n: t.bfloat16() for n, t in make(shape, 1, directions=directions).items()}
    compare("triton", scan2d, tensors, directions=directions)
    assert cuts and all(runs == 1 for _, runs, _ in cuts)


@pytest.mark.parametrize(
    "directions, grouped, channels, group",
    [
        (["row", "row_rev"], False, 18, 8),
        (["row_rev", "col"], True, 18, 8),
        (["row_rev", "col"], True, 17, 4),  # groups begin between a thread's pairs of channels
    ],
    ids=str,
)
def test_runs_of_the_forward_that_hand_on(directions, grouped, channels, group, monkeypatch):
    """More runs than look at each other, with and without states kept for the backward."""
    chained = kernels.Config(4, 16, 2, 1, tiles=1, columns=True, apart=True, chained=True, group=group)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: chained)
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: kernels.Config(4, 16, 2, 1))
    monkeypatch.setattr(kernels, "scan2d_states_kernel", None)
    tensors = make((1, channels, 3, 100), 1, 2, directions=directions, grouped=grouped)
    tensors = {n: t.bfloat16() for n, t in tensors.items()}
    assert 16 * 2 * group < 300  # steps
    compare("triton", scan2d, tensors, directions=directions, grouped=grouped)
    with torch.no_grad(), use_backend("triton"):
        first, second = (scan2d(**tensors, directions=directions, grouped=grouped) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("grouped", [False, True])
def test_pictures_that_are_walked_at_once(grouped, monkeypatch):
    chained = kernels.Config(4, 16, 2, 1, tiles=1, columns=True, apart=True, chained=True, group=2)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: chained)
    tensors = {n: t.bfloat16() for n, t in make((3, 5, 5, 19), 1, 2, directions=CROSS, grouped=grouped).items()}
    results = []
    with torch.no_grad(), use_backend("triton"):
        for pictures in (3, 2, 1):
            monkeypatch.setattr(kernels, "_pictures_at_once", lambda problem, x, pictures=pictures: pictures)
            results.append(scan2d(**tensors, directions=CROSS, grouped=grouped))
    assert all(torch.equal(y, results[0]) for y in results)
    with torch.no_grad(), use_backend("naive"):
        assert_close("y", results[0], scan2d(**tensors, directions=CROSS, grouped=grouped))


def test_pictures_that_a_cache_holds():
    def pictures(shape, grouped):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return kernels._pictures_at_once(SimpleNamespace(grouped=grouped, batch=shape[0]), x)

    assert pictures((8, 64, 256, 256), True) == 2
    assert pictures((8, 64, 512, 512), True) == 2
    assert pictures((8, 348, 64, 64), True) == 6
    assert pictures((1, 64, 512, 512), True) == 1
    assert pictures((8, 64, 56, 56), True) == 8
    assert pictures((8, 96, 256, 256), False) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_low_ranks(rank, dtype, ahead, monkeypatch):
    """Time steps by multiply-adds, B and C with x, as two numbers or halves of a word."""
    config = kernels.Config(4, 16, 4, 1, ahead=ahead, columns=True)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: config)
    tensors = {n: t.to(dtype) for n, t in make((1, 5, 5, 9), 1, rank, directions=["row", "col_rev"]).items()}
    compare("triton", scan2d, tensors, directions=["row", "col_rev"])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)], ids=["neighbours", "apart", "C before B"])
def test_halves_of_a_word(order, monkeypatch):
    config = kernels.Config(4, 16, 2, 1, columns=True)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: config)
    tensors = {n: t.bfloat16() for n, t in make((1, 3, 5, 4), 1, 2, directions=["row", "col"]).items()}
    parts = [tensors[n] for n in ("dt", "B", "C")]
    joined = torch.cat([parts[i] for i in order], dim=2).permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    views = dict(zip(order, joined.split([parts[i].shape[2] for i in order], dim=2), strict=True))
    with torch.no_grad():
        with use_backend("naive"):
            expected = scan2d(**{n: t.double() for n, t in tensors.items()}, directions=["row", "col"])
        with use_backend("triton"):
            y = scan2d(**(tensors | dict(dt=views[0], B=views[1], C=views[2])), directions=["row", "col"])
    assert_close("output", y, expected)


@pytest.mark.parametrize("channels, how", [(5, 2), (6, 2), (12, 1), (15, 0), (16, 0)], ids=str)
def test_groups_between_vectors(channels, how, monkeypatch):
    """Groups that begin inside of a thread's vectors of four channels, at their borders, or leave blocks no room."""
    config = kernels.Config(4, 16, 4, 1, ahead=True)
    monkeypatch.setattr(kernels, "_fwd_config", lambda sizes: config)
    monkeypatch.setattr(kernels, "_bwd_config", lambda sizes: kernels.Config(4, 16, 2, 1))
    found, shifted = [], kernels._Problem.shifted
    monkeypatch.setattr(kernels._Problem, "shifted", lambda *args: found.append(shifted(*args)) or found[-1])
    tensors = single((1, channels, 3, 7), 1, directions=CROSS, grouped=True)
    compare("triton", scan2d, tensors, directions=CROSS, grouped=True)
    assert set(found) == {how}
