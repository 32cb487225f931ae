"""Repeated blocks against ordinary ones. On the CPU a compiled kernel is pretended by an interpreted one."""

import copy
import gc
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels import need_triton

need_triton()

from triton import knobs  # noqa: E402

import vla  # noqa: E402, F401
from tests.ops.test_replay import Interpreted, pretend_binaries  # noqa: E402, F401
from vla.layers import GroupMambaBlock, GSPNBlock, MambaVisionBlock, VRWKVBlock, VSSBlock, repeat  # noqa: E402
from vla.ops import _bound, _replay, use_backend  # noqa: E402

BLOCKS = {
    "vmamba": lambda: VSSBlock(8),
    "vmamba, gated": lambda: VSSBlock(8, layer_scale=0.5, gate=True, post_norm=True),
    "mambavision": lambda: MambaVisionBlock(8),
    "attention": lambda: MambaVisionBlock(8, "attention", num_heads=2),
    "windows": lambda: MambaVisionBlock(8, "attention", num_heads=2, window_size=2),
    "vrwkv": lambda: VRWKVBlock(8),
    "vrwkv6": lambda: VRWKVBlock(8, version=6, head_dim=4),
    "gspn": lambda: GSPNBlock(8, conv_kernel=3),
    "groupmamba": lambda: GroupMambaBlock(8),
}


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def ordinary(module: nn.Module, *args) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeat.Repeated, "__call__", nn.Module.__call__)
        return module(*args)


def kinds(module: nn.Module) -> list[str]:
    own = getattr(module, "_repeated", None)
    return [] if own is None else ["repetition" if callable(known) else known for known in own.known.values()]


def make(kind: str = "attention") -> nn.Module:
    """A block, without launches and so quick where that is not what a test is about."""
    torch.manual_seed(0)
    return BLOCKS[kind]().eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (1, 8, 2, 3)).contiguous(memory_format=torch.channels_last)


def check(module: nn.Module, x: Tensor, *args) -> None:
    actual, expected = module(x, *args), ordinary(module, x, *args)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride() and actual.dtype == expected.dtype


def recorded(module: nn.Module | None = None, x: Tensor | None = None) -> nn.Module:
    """A module of which a repetition is known."""
    module = make() if module is None else module
    for _ in range(3):
        module(image() if x is None else x)
    assert kinds(module)[-1] == "repetition"
    return module


@pytest.fixture
def counted(monkeypatch):
    """Numbers of modules that have been called."""
    calls = []
    monkeypatch.setattr(nn.LayerNorm, "forward", counting(calls, nn.LayerNorm.forward))
    return calls


def counting(calls: list, function):
    def wrapped(*args):
        calls.append(None)
        return function(*args)

    return wrapped


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind, autocast):
    block = make(kind)
    with torch.inference_mode(), torch.autocast(image().device.type, torch.bfloat16, enabled=autocast):
        recorded(block)
        for _ in range(2):
            check(block, image())


@pytest.mark.parametrize("name", ["vrwkv_atto", "mambavision_atto"])
def test_networks(name):
    options = dict(img_size=32) if name == "vrwkv_atto" else {}
    model = timm.create_model(name, num_classes=3, **options).eval()
    size = (1, 3, 32, 32)
    with torch.inference_mode(), torch.autocast(image().device.type, torch.bfloat16):
        recorded(model, image(*size))
        check(model, image(*size))


@torch.no_grad()
def test_layouts_have_their_own():
    block = make()
    for _ in range(4):
        for x in (image(), image(2, 8, 2, 3), image().contiguous(), image().half().float()[:, :, :1]):
            check(block, x)
    assert kinds(block) == ["repetition"] * 4


@pytest.mark.parametrize("cached", [True, False])
def test_one_autocast_for_many_calls(cached):
    block = make()
    with torch.no_grad(), torch.autocast(image().device.type, torch.bfloat16, cache_enabled=cached):
        recorded(block)
        check(block, image())
    with torch.no_grad():
        check(block, image())


EDITS = {
    "numbers": lambda block: block.mlp.fc1.weight.mul_(2),
    "data": lambda block: block.mlp.fc1.weight.data.mul_(2),
    "place of data": lambda block: setattr(block.mlp.fc1.weight, "data", torch.randn(32, 8)),
    "layout of data": lambda block: setattr(
        block.mixer.attn.proj.weight, "data", block.mixer.attn.proj.weight.data.t()
    ),
    "parameter": lambda block: setattr(block.mlp.fc1, "weight", nn.Parameter(torch.randn(32, 8))),
    "part": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "attribute": lambda block: setattr(block.norm1, "eps", 1.0),
    "forward": lambda block: setattr(block.mlp, "forward", lambda x: 2 * x),
    "hook": lambda block: block.mlp.register_forward_hook(lambda module, args, out: 2 * out),
    "own hook": lambda block: block.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "parametrization": lambda block: nn.utils.parametrize.register_parametrization(block.mlp.fc1, "weight", nn.Tanh()),
    "type": lambda block: block.double().float(),
    "state": lambda block: block.load_state_dict(make_other().state_dict()),
}


def make_other() -> nn.Module:
    return MambaVisionBlock(8, "attention", num_heads=2)


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits_take_effect(edit):
    block = recorded()
    x = image()
    before = block(x)
    EDITS[edit](block)
    for _ in range(5):
        check(block, x)
    if edit != "type":
        assert not torch.equal(block(x), before)


@torch.no_grad()
def test_lists_changed_in_place():
    block, x = recorded(make("vmamba")), image()
    before = block(x)
    block.mixer.scan.directions.reverse()
    check(block, x)
    assert not torch.equal(block(x), before)
    assert make("vmamba").mixer.scan.directions != block.mixer.scan.directions


@torch.no_grad()
def test_number_replaced_by_an_equal_one():
    """Whose later changes count."""
    block, x = recorded(make("groupmamba")), image()
    block.mixer.skip_scale = nn.Parameter(block.mixer.skip_scale.clone())
    check(recorded(block), x)
    block.mixer.skip_scale.mul_(3)
    check(block, x)


@torch.no_grad()
def test_hooks_that_are_taken_away():
    block = recorded()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module)):
        block(image())
    assert block in seen and block.mlp in seen
    handle = block.mlp.register_forward_hook(lambda *args: seen.append(None))
    for _ in range(4):
        block(image())
    assert seen.count(None) == 4
    handle.remove()
    check(recorded(block), image())


def test_training_and_gradients():
    block = make()
    with torch.no_grad():
        recorded(block)
    x = image().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None and block.mlp.fc1.weight.grad is not None
    with torch.no_grad():
        block.train()
        check(block, image())
        block.eval()
        check(recorded(block), image())


@torch.no_grad()
def test_who_looks_on():
    block = recorded()
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Marked(Tensor):
        pass

    with Mode():
        block(image())
    assert seen
    with torch.device(image().device):
        check(recorded(), image())
    assert isinstance(block(image().as_subclass(Marked)), Marked)
    stacked = torch.randn(3, 1, 8, 2, 3)
    torch.testing.assert_close(torch.vmap(block)(stacked), torch.stack([ordinary(block, x) for x in stacked]))
    traced = torch.jit.trace(block, image())
    x = image()
    torch.testing.assert_close(traced(x), block(x))


@torch.no_grad()
def test_parts_of_others_are_called(counted):
    class Custom(nn.Linear):
        pass

    block = make()
    block.mlp.fc1 = Custom(8, 32)
    for _ in range(5):
        check(block, image())
    assert kinds(block) == []


@pytest.mark.parametrize("part", ["block", "layer", "method"])
@torch.no_grad()
def test_what_is_compiled_stays_so(part):
    def backend(graph, inputs):
        return lambda *args: calls.append(None) or graph(*args)

    calls = []
    block = make()
    if part == "method":
        block.summands = torch.compile(block.summands, backend=backend)
    else:
        (block if part == "block" else block.mlp).compile(backend=backend)
    for _ in range(5):
        before = len(calls)
        block(image())
        assert len(calls) > before


def test_forward_mode_derivatives():
    with torch.no_grad():
        block = recorded(make("vrwkv"))
    x = image()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), forward_ad.dual_level(), pytest.raises(NotImplementedError):
            block(forward_ad.make_dual(x, torch.ones_like(x)))


@torch.no_grad()
def test_arrays_as_attributes():
    block = make()
    block.mean = np.zeros(3)
    recorded(block)
    block.mean = np.ones(3)
    for _ in range(4):
        check(block, image())


@torch.no_grad()
def test_a_recording_for_which_memory_is_too_small(monkeypatch):
    def forward(module, x, forward=nn.LayerNorm.forward):
        if _replay.current() is not None:
            raise torch.OutOfMemoryError
        return forward(module, x)

    block = make()
    monkeypatch.setattr(nn.LayerNorm, "forward", forward)
    block.norm1 = nn.LayerNorm(3)
    for _ in range(5):
        check(block, image())
    assert kinds(block) == [None]


@torch.no_grad()
def test_copies_have_their_own():
    block = recorded()
    other = copy.deepcopy(block)
    other.mlp.fc1.weight.mul_(3)
    for _ in range(4):
        check(other, image())
        check(block, image())
    assert kinds(copy.copy(block)) == []


@torch.no_grad()
def test_memory_is_given_back():
    block = recorded()
    alive = weakref.ref(block), weakref.ref(block.mlp.fc1.weight)
    del block
    gc.collect()
    assert [a() for a in alive] == [None, None]


@pytest.mark.parametrize("how", ["method", "itself", "compiled"])
@torch.no_grad()
def test_memory_of_a_module_that_refers_to_itself_is_given_back(how):
    block = make()
    if how == "method":
        block.forward_before = block.forward
    elif how == "itself":
        block.parts = (block,)
    else:
        block.compile(backend="eager")
    for _ in range(4):
        block(image())
    alive = weakref.ref(block)
    del block
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "leave, back",
    [(nn.Module.double, nn.Module.float), (lambda block: block.train(), lambda block: block.eval())],
    ids=["moved", "trained"],
)
@torch.no_grad()
def test_memory_of_a_module_in_other_use_is_given_back(leave, back):
    block = recorded()
    block(image())
    (known,) = block._repeated.known.values()
    alive = weakref.ref(known)
    del known
    leave(block)
    gc.collect()
    assert alive() is None
    back(block)
    check(recorded(block), image())


@torch.no_grad()
def test_networks_have_a_limit_of_their_own(monkeypatch):
    """A recording keeps all that it computes, of a network more than of a block."""
    small, large = image(1, 8, 2, 3), image(2, 8, 2, 3)
    block = make()
    monkeypatch.setattr(type(block), "LIMIT", small.numel())
    for _ in range(4):
        block(small), block(large)
    assert kinds(block) == ["repetition"]


@torch.no_grad()
def test_forgets_layouts_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(repeat.Repeated, "LAYOUTS", 2)
    block = make()
    for width in (1, 2, 3):
        for _ in range(4):
            check(block, image(1, 8, 2, width))
    assert kinds(block) == ["repetition"]


@pytest.fixture
def bound(monkeypatch):
    """Numbers of calls whose tensors stayed."""
    calls = []
    fill = _bound.fill
    monkeypatch.setattr(_bound, "fill", lambda *args: calls.append(None) or fill(*args))
    return calls


def workspace(module: nn.Module) -> _bound._Workspace:
    """What the only repetition of a module uses."""
    (known,) = module._repeated.known.values()
    (found,) = known._workspaces.values()
    return found


@pytest.mark.parametrize("kind", ["windows", "vrwkv", "vrwkv6", "vmamba, gated"])
@torch.no_grad()
def test_nothing_is_read_that_an_earlier_call_has_left(kind):
    block = recorded(make(kind))
    for autocast in (True, False):
        with torch.autocast(image().device.type, torch.bfloat16, enabled=autocast):
            recorded(block)
            block(image())
            for known in block._repeated.known.values():
                for used in known._workspaces.values():
                    used.memory.fill_(255)  # not a number, in any of the dtypes
            check(block, image())


def several(x: Tensor, a: Tensor, b: Tensor) -> tuple:
    """Casts, operators of one tensor and products of all kinds of tensors, some of which are results."""
    narrow = [t.to(torch.bfloat16) for t in (x, a, b)]
    exps = [t.exp() for t in (x, a, b)]
    total = narrow[1] + narrow[2] @ narrow[0]
    written = torch.zeros_like(a)
    written[0].copy_(total[1])
    stacked = torch.stack([a, b], 1).sum(1) + torch.stack([a, x]).mean(0)
    scaled = torch.where(x > 0, exps[2], exps[1]).clone()
    return narrow[0], exps[1].neg(), total.float() * exps[0], [written, stacked.t()], F.linear(scaled, a, b[0])


@torch.no_grad()
def test_functions_of_several_tensors():
    constants = torch.randn(4, 4), torch.randn(4, 8)[:, :4]
    x = torch.randn(4, 4)
    with _replay.Recording([x, *constants]) as recording:
        outputs = several(x, *constants)
    known = _bound.Bound(recording.finish(outputs, needs_launch=False), constants)
    for _ in range(3):
        x = torch.randn(4, 4)
        for t in constants:
            t.normal_()
        actual, expected = (tree_leaves(f) for f in (known(x, x.data_ptr(), 0), several(x, *constants)))
        (used,) = known._workspaces.values()
        used.memory.fill_(255)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e) and a.stride() == e.stride()


@torch.no_grad()
def test_what_is_done_to_many_is_not_put_before_changes_in_place():
    def changed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        exps = a.exp(), b.exp()
        exps[0].mul_(2)
        return exps[0].neg() + exps[1].neg() + x

    x, *constants = (torch.randn(4) for _ in range(3))
    with _replay.Recording([x, *constants]) as recording:
        y = changed(x, *constants)
    known = _bound.Bound(recording.finish(y, needs_launch=False), constants)
    assert torch.equal(known(x, x.data_ptr(), 0), y)


@torch.no_grad()
def test_results_in_memory_of_others_are_not_repeated():
    library = torch.library.Library("vla_test_repeat", "DEF")
    library.define("both(Tensor(a) x) -> (Tensor(a), Tensor)")
    library.impl("both", lambda x: (x.view_as(x), x + 1), "CompositeExplicitAutograd")
    x, a = torch.randn(4), torch.randn(4)
    with _replay.Recording([x, a]) as recording:
        outputs = torch.ops.vla_test_repeat.both(x * a)
    assert recording.finish(outputs, needs_launch=False) is None


@torch.no_grad()
def test_results_are_not_written_to_again(bound):
    block = recorded()
    results = [(y, y.clone()) for y in (block(image()) for _ in range(3))]
    assert all(torch.equal(y, copy) for y, copy in results) and len(bound) == 3


@pytest.mark.parametrize("kind", ["attention", "vrwkv"])
def test_inference_mode_and_back(kind, bound):
    with torch.inference_mode():
        block = recorded(make(kind))
        check(block, image())
    with torch.no_grad():
        check(block, image())
        assert not block(image()).is_inference()
    with torch.inference_mode():
        check(block, image())
        assert block(image()).is_inference()
    assert len(bound) == 5


@torch.no_grad()
def test_blocks_share_memory(bound):
    shapes = (1, 8, 2, 3), (3, 8, 4, 5), (2, 8, 2, 2)
    blocks = [recorded(x=image(*shape)) for shape in shapes]
    for _ in range(2):
        for block, shape in zip(blocks, shapes, strict=True):
            check(block, image(*shape))
    used = [workspace(block) for block in blocks]
    assert len(bound) == 6 and used[0] is used[1] is used[2]
    alive = weakref.ref(used[0])
    del blocks, block, used
    gc.collect()
    assert alive() is None


@torch.no_grad()
def test_memory_that_is_in_use_or_too_small(bound, monkeypatch):
    block = recorded()
    check(block, image())
    with workspace(block).lock:  # another thread's call goes on
        check(block, image())
    assert len(bound) == 1
    check(block, image())
    assert len(bound) == 2
    monkeypatch.setattr(_bound._Workspace, "LIMIT", 0)
    check(recorded(), image())
    assert len(bound) == 2


@pytest.mark.skipif(image().device.type != "cpu", reason="counts pretended launches")
@torch.no_grad()
def test_hooks_on_launches(monkeypatch, bound):
    block = recorded(make("vrwkv"))
    check(block, image())
    before = Interpreted.launches
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    check(block, image())
    assert Interpreted.launches > before and len(bound) == 1
