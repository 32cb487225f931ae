"""Repeated launches against ordinary ones. On the CPU a compiled kernel is pretended by an interpreted one."""

import ctypes
import importlib
import pkgutil
import sys
import weakref

import pytest
import torch
from torch import Tensor

from tests.kernels import need_triton

need_triton()

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402

import vla.ops  # noqa: E402
from tests.ops import (  # noqa: E402
    test_depthwise_conv2d,
    test_layer_norm,
    test_projected_line_scan,
    test_projected_scan2d,
    test_scan2d,
)
from vla.ops import (  # noqa: E402
    _replay,
    _triton,
    add_layer_norm,
    depthwise_conv2d,
    projected_line_scan,
    projected_scan2d,
    scan2d,
    squared_relu,
    use_backend,
)
from vla.ops._replay import Replays  # noqa: E402
from vla.ops._triton import Kernel, kernel  # noqa: E402

ON_CPU = torch.get_default_device().type == "cpu"


class Interpreted:
    """What an interpreted kernel's launch returns: a binary that is given addresses for tensors."""

    function = packed_metadata = None
    launches = 0

    def __init__(self, jit, options: dict, arguments: list):
        self.jit, self.options = jit, options
        self.layouts = {i: (t.shape, t.stride(), t.dtype) for i, t in enumerate(arguments) if isinstance(t, Tensor)}

    def __getitem__(self, grid):
        def launch(*arguments, stream):
            type(self).launches += 1
            self.run(*grid, stream, None, None, None, None, None, *arguments)

        return launch

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        arguments = list(arguments)
        for i, layout in self.layouts.items():
            arguments[i] = at(arguments[i], *layout)
        self.jit[x, y, z](*arguments, **self.options)


def at(address: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if 0 in size:
        return torch.empty(size, dtype=dtype)
    length = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    memory = (ctypes.c_char * (length * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(size, stride)


class Jit:
    """An interpreted kernel whose launches return something."""

    def __init__(self, jit):
        self.jit, self.arg_names = jit, jit.arg_names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.jit[grid](*args, **kwargs)
            arguments = [*args, *(kwargs.pop(name) for name in self.arg_names[len(args) :])]
            return Interpreted(self.jit, kwargs, arguments)

        return launch


def modules():
    for found in pkgutil.walk_packages(vla.ops.__path__, "vla.ops."):
        if found.name.rpartition(".")[2].startswith("_triton"):
            yield importlib.import_module(found.name)


@pytest.fixture(autouse=True)
def pretend_binaries(monkeypatch):
    if not ON_CPU:
        return
    monkeypatch.setattr(_replay, "stream_of", lambda tensor: 0)
    kernels = {id(k): k for m in modules() for k in vars(m).values() if isinstance(k, Kernel)}
    for k in [*kernels.values(), sum_kernel]:
        monkeypatch.setattr(k, "jit", Jit(k.jit))


@kernel
def sum_kernel(x, y, out, size, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, i < size, 0.0) + tl.load(y + i, i < size, 0.0)
    tl.store(out + i, total * factor, i < size)


def add(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """`(x + y) * factor`, as a backend would do it."""
    out = torch.empty_like(x)
    sum_kernel[(-(-x.numel() // 16),)](x, y, out, x.numel(), factor, BLOCK=16)
    return out


def call(replays: Replays, function, *args, state=None):
    return replays(function, args[0], state, *args)


def kinds(replays: Replays) -> list[str]:
    return ["replay" if callable(known) else known for known in replays._known.values()]


def test_third_call_is_a_repetition():
    replays, calls = Replays(), []

    def function(x, y):
        calls.append(None)
        return add(x, y)

    for _ in range(5):
        x, y = torch.randn(40), torch.randn(40)
        assert torch.equal(call(replays, function, x, y), x + y)
    assert len(calls) == 2 and kinds(replays) == ["replay"]


@pytest.mark.parametrize(
    "others",
    [
        (torch.float32, 40, 1, 1, 2.0),  # constant
        (torch.float32, 40, 1, 1, True),
        (torch.float32, 1, 1, 1, 1.0),  # Triton makes a constant of size 1
        (torch.float32, 48, 1, 1, 1.0),  # and another kernel for multiples of 16
        (torch.float32, 40, 1, 3, 1.0),  # addresses that are no multiples of 16 bytes
        (torch.float16, 40, 1, 1, 1.0),
        (torch.float16, 40, 1, 4, 1.0),
    ],
)
def test_layouts_have_their_own(others):
    replays = Replays()

    def make(dtype, size, stride, offset, factor):
        x, y = (torch.randn(200).to(dtype)[4 * offset :: stride][:size] for _ in range(2))
        return x[offset - 1 :], y[offset - 1 :], factor

    for _ in range(4):
        for kind in ((torch.float32, 40, 1, 1, 1.0), others):
            x, y, factor = make(*kind)
            torch.testing.assert_close(call(replays, add, x, y, factor), (x + y) * factor)
    assert set(kinds(replays)) == {"replay"} and len(kinds(replays)) == (1 if others[-1] is True else 2)


def test_strides_and_state_are_part_of_a_layout():
    replays = Replays()

    def function(x):
        return add(x.contiguous(), x.contiguous())

    for state in ("a", "b"):
        for _ in range(3):
            for x in (torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(4, 12)[:, ::2]):
                assert torch.equal(call(replays, function, x, state=state), x + x)
    assert kinds(replays) == ["replay"] * 6


def test_a_tensor_given_twice_is_two_the_next_time():
    replays = Replays()
    x = torch.randn(40)
    whole = torch.randn(80)
    for y, z in ((x, x), (x, x), (torch.randn(40), torch.randn(40)), (whole[40:], whole[:40]), (x, x)):
        assert torch.equal(call(replays, add, y, z), y + z)
    assert kinds(replays) == ["replay"]


def test_views_operators_and_results_of_all_kinds():
    replays = Replays()

    def function(x, y, names, factor, missing):
        unused = torch.empty(7)
        del unused
        total = add(x[1:].contiguous(), y.t().reshape(-1)[:-4].view(3, 4), factor)
        wide = torch.zeros(2, 3, 4)
        wide[1].copy_(total)
        first, second = wide.split([1, 1])
        twice = add(second[0].contiguous(), second[0])
        return [twice.t(), first], (None, wide.sum(0, keepdim=True), x), missing

    for _ in range(4):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        with torch.autocast(x.device.type, torch.bfloat16):
            (twice, zeros), (none, total, same), missing = call(replays, function, x, y, ["row"], 2.0, None)
        expected = (x[1:] + y.t().reshape(-1)[:-4].view(3, 4)) * 2.0
        assert torch.equal(twice, 2 * expected.t()) and twice.stride() == (1, 4)
        assert torch.equal(zeros, torch.zeros(1, 3, 4))
        assert torch.equal(total, expected[None]) and none is None and missing is None
        assert same.data_ptr() == x.data_ptr()
    assert kinds(replays) == ["replay"]


def test_products_of_a_repetition_are_not_cast():
    replays = Replays()

    def function(x):
        with _replay.full_precision(x.device):
            return add(x, x) @ x

    for _ in range(4):
        x = torch.randn(8, 8)
        with torch.autocast(x.device.type, torch.bfloat16):
            assert torch.equal(call(replays, function, x), function(x))
    assert kinds(replays) == ["replay"]


ELSEWHERE = torch.ones(40)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: add(x, x) if x[0].item() > 0 else add(x, 2 * x),
        lambda x: add(x, torch.rand_like(x)),
        lambda x: add(x, ELSEWHERE),
        lambda x: add(x, x) + ELSEWHERE,
        lambda x: add(x, x)[x > 0],
        lambda x: add(x, torch.tensor([2.0], device=x.device).expand(40).contiguous()),
        lambda x: x + x,  # nothing is launched
    ],
)
def test_what_depends_on_more_than_layouts_is_never_repeated(function):
    replays = Replays()
    for sign in (1, -1, 1, -1):
        x = sign * torch.arange(1.0, 41.0)
        torch.manual_seed(0)
        expected = function(x)
        torch.manual_seed(0)
        assert torch.equal(call(replays, function, x), expected)
    assert kinds(replays) == ["never to be repeated"]


def test_memory_of_a_recording_is_given_back():
    replays = Replays()
    alive = []

    def function(x):
        out = add(x, x)
        assert torch.promote_types(x.dtype, torch.float64) == torch.float64  # an operator for the dispatcher
        alive.append(weakref.ref(out))
        return add(out, x)

    for _ in range(2):
        call(replays, function, torch.randn(40))
    assert [a() for a in alive] == [None, None] and kinds(replays) == ["replay"]


def test_a_recording_for_which_memory_is_too_small():
    replays = Replays()

    def function(x):
        if _replay.current() is not None:
            raise torch.OutOfMemoryError
        return add(x, x)

    for _ in range(4):
        x = torch.randn(40)
        assert torch.equal(call(replays, function, x), x + x)
    assert kinds(replays) == ["never to be repeated"]


def test_forgets_layouts_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(Replays, "LIMIT", 3)
    replays = Replays()
    for size in (1, 2, 3, 4):
        for _ in range(3):
            x = torch.randn(size)
            assert torch.equal(call(replays, add, x, x), x + x)
    assert len(kinds(replays)) == 1


@pytest.mark.skipif(not ON_CPU, reason="counts pretended launches")
def test_hooks_see_every_launch(monkeypatch):
    replays = Replays()
    x = torch.randn(40)
    for _ in range(3):
        call(replays, add, x, x)
    before = Interpreted.launches
    call(replays, add, x, x)
    assert Interpreted.launches == before
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    call(replays, add, x, x)
    assert Interpreted.launches == before + 1


@pytest.mark.parametrize(
    "function, make, options",
    [
        (squared_relu, lambda: dict(x=torch.randn(3, 5)), {}),
        (add_layer_norm, lambda: test_layer_norm.make((2, 5), branch=True, weight=True, bias=True), {}),
        (add_layer_norm, lambda: test_layer_norm.make((2, 5), branch=True, second=True), dict(with_sum=False)),
        (depthwise_conv2d, lambda: test_depthwise_conv2d.make((1, 3, 4, 5), (3, 3), True), dict(act="silu")),
        (scan2d, lambda: test_scan2d.make((1, 2, 2, 3), 1, 2), dict(directions=test_scan2d.CROSS)),
        (
            projected_line_scan,
            lambda: test_projected_line_scan.make((1, 2, 2, 3), 1),
            dict(directions=test_projected_line_scan.ALL),
        ),
        (projected_scan2d, lambda: test_projected_scan2d.make((1, 2, 2, 3), 1, 2), dict(directions=test_scan2d.CROSS)),
    ],
)
def test_operators(monkeypatch, function, make, options):
    def run():
        leaves = {n: t if t is None else t.float().requires_grad_() for n, t in make().items()}
        for tensor in leaves.values():
            if tensor is not None:
                tensor.data.mul_(1 + torch.rand_like(tensor))
        results = []
        for stream in (_replay.stream_of, lambda tensor: None):
            with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
                patch.setattr(_replay, "stream_of", stream)
                outputs = function(**leaves, **options)
                outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
                tensors = [t for t in leaves.values() if t is not None]
                grads = torch.autograd.grad(outputs, tensors, [o.detach().cos() for o in outputs])
            results.append([*outputs, *grads])
        return results

    operator = sys.modules[function.__module__].operator
    for name, member in list(vars(operator).items()):
        if isinstance(member, Replays):
            monkeypatch.setattr(operator, name, Replays())
    for _ in range(4):
        for repeated, ordinary in zip(*run(), strict=True):
            assert torch.equal(repeated, ordinary) and repeated.stride() == ordinary.stride()
    used = [kinds(member) for member in vars(operator).values() if isinstance(member, Replays)]
    assert [kind for kind in used if kind] == [["replay"], ["replay"]]  # forward and backward


def test_launches_in_short():
    """Triton's launcher in Python is called once; later calls go to what it ends with, unless memory is allocated."""

    class Launcher:
        global_scratch_size = profile_scratch_size = 0

        def __init__(self):
            self.calls, self.launches = 0, []
            self.launch = lambda *args: self.launches.append(args)

        def __call__(self, *args):
            self.calls += 1
            self.launch(*args[:1], "flag", *args[1:])

    launcher = Launcher()
    launch = _triton._in_short(launcher, [1, 2])
    assert launcher.launches == []
    launch(), launch()
    assert launcher.launches == [(1, "flag", 2)] * 2 and launcher.calls == 0
    launcher.global_scratch_size = 16
    _triton._in_short(launcher, [3, 4])()
    assert launcher.launches[2:] == [(3, "flag", 4)] and launcher.calls == 1


def test_every_kernel_can_be_recorded():
    for module in modules():
        for name, member in vars(module).items():
            assert isinstance(member, Kernel) == name.endswith("_kernel"), f"{module.__name__}.{name}"


def test_what_is_done_to_many_tensors_takes_one_call():
    replays = Replays()

    def function(x, *weights):
        weights = [-torch.exp(weight) for weight in weights]
        return [add(x, weight) * weight.to(torch.bfloat16) for weight in weights], -x

    for _ in range(4):
        x, *weights = torch.randn(3, 16)
        results, negated = call(replays, function, x, *weights)
        expected, _ = function(x, *weights)
        assert all(torch.equal(a, e) for a, e in zip(results, expected, strict=True)) and torch.equal(negated, -x)
    assert kinds(replays) == ["replay"]
    (repetition,) = replays._known.values()
    steps = [step for step, _ in repetition.steps]
    assert [type(step).__name__ for step in steps].count("CallOfMany") == 2
