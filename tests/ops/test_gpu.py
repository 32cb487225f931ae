"""What only a GPU can show in reasonable time: long sequences, equal bits, addresses beyond 32 bits.

python -m pytest --device cuda tests/ops             every operator's tests, with its kernels
python -m pytest --device cuda -m large tests/ops    also more than 2^31 elements (80 GB)
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops import (
    test_bi_wkv,
    test_bias_gelu,
    test_conv_gelu_linear,
    test_conv_layer_norm,
    test_conv_mlp,
    test_depthwise_conv2d,
    test_group_modulation,
    test_grouped_linear,
    test_layer_norm,
    test_layer_norm_grn,
    test_line_scan,
    test_mlp,
    test_modulated_layer_norm,
    test_projected_line_scan,
    test_projected_scan2d,
    test_q_shift_mix,
    test_scan2d,
    test_selective_scan,
    test_wkv6,
)
from tests.ops.harness import randn, run
from tests.tolerance import RELATIVE, assert_close
from vla.ops import (
    add_layer_norm,
    bi_wkv,
    bias_gelu,
    conv_gelu_linear,
    conv_gelu_linear_add_norm,
    conv_layer_norm,
    conv_layer_norm_twice,
    conv_mlp,
    conv_mlp_add_norm,
    depthwise_conv2d,
    group_modulation,
    grouped_linear_pair,
    grouped_linear_pair_mean,
    layer_norm,
    layer_norm_grn,
    line_scan,
    mlp,
    modulated_layer_norm,
    projected_line_scan,
    projected_scan2d,
    q_shift,
    q_shift_mix,
    scan2d,
    squared_relu,
    use_backend,
    wkv6,
)

if torch.get_default_device().type != "cuda":
    pytest.skip("run with --device cuda", allow_module_level=True)

CROSS = test_scan2d.CROSS
SWEEPS = test_line_scan.ALL
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Function, maker of float64 tensors, options.
Case = tuple[Callable, Callable[[], dict], dict]


def scan(batch: int, channels: int, length: int, states: int, groups: int = 1, **kwargs) -> Case:
    return (
        test_selective_scan.full,
        lambda: test_selective_scan.make(batch, channels, length, states, groups=groups, **kwargs),
        dict(delta_softplus=True),
    )


def directional(shape: tuple[int, ...], states: int = 1, rank: int = 6, **options) -> Case:
    grouped = options.get("grouped", False)
    return (
        scan2d,
        lambda: test_scan2d.make(shape, states, rank, grouped=grouped),
        dict(directions=CROSS) | options,
    )


def projected(shape: tuple[int, ...], states: int = 1, rank: int = 6) -> Case:
    return projected_scan2d, lambda: test_projected_scan2d.make(shape, states, rank), dict(directions=CROSS)


def lines(shape: tuple[int, ...], rank: int = 8, **options) -> Case:
    return line_scan, lambda: test_line_scan.make(shape, rank), dict(directions=SWEEPS) | options


def projected_lines(shape: tuple[int, ...], rank: int = 8, **options) -> Case:
    return (
        projected_line_scan,
        lambda: test_projected_line_scan.make(shape, rank),
        dict(directions=SWEEPS) | options,
    )


def depthwise(shape: tuple[int, ...], *kernel: int, act: str | None = None, bias: bool = False) -> Case:
    kernel = kernel if len(kernel) == 2 else kernel * 2
    return depthwise_conv2d, lambda: test_depthwise_conv2d.make(shape, kernel, bias), dict(act=act)


def norm(function: Callable, shape: tuple[int, ...], groups: int = 1, **kinds: bool) -> Case:
    return function, lambda: test_layer_norm.make(shape, **kinds), dict(groups=groups)


def grouped(pixels: tuple[int, ...], width: int, outputs: int, function: Callable = grouped_linear_pair) -> Case:
    return function, lambda: test_grouped_linear.make(pixels, 4, width, outputs), {}


def two_layers(shape: tuple[int, ...], hidden: int, **kwargs) -> Case:
    return mlp, lambda: test_mlp.make(shape, hidden, **kwargs), {}


def pictures(shape: tuple[int, ...], out: int) -> Case:
    def function(**tensors: Tensor) -> Tensor:
        # The same numbers in every dtype.
        x = randn(1)(*shape).bfloat16().to(tensors["weight"].dtype)
        return conv_layer_norm(x, **tensors, stride=2, padding=1, act="gelu")

    return function, lambda: test_conv_layer_norm.make((shape, out, 3, 2, 1))[1], {}


def normed_twice(shape: tuple[int, ...], out: int) -> Case:
    def function(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        x = randn(1)(*shape).bfloat16().to(tensors["weight"].dtype)
        return conv_layer_norm_twice(x, **tensors, stride=2, padding=1)

    return function, lambda: test_conv_layer_norm.make_twice((shape, out, 3, 2, 1))[1], {}


CASES: dict[str, Case] = {
    "selective_scan L1": scan(2, 5, 1, 3),
    "selective_scan L7 N16": scan(3, 7, 7, 16),
    "selective_scan L49 windows": scan(300, 33, 49, 8),
    "selective_scan L196 windows": scan(1024, 32, 196, 8),
    "selective_scan L529 segments": scan(512, 32, 529, 2),
    "selective_scan L197 N8": scan(2, 37, 197, 8),
    "selective_scan L3136 grouped": scan(2, 44, 3136, 1, 4),
    "selective_scan L16385": scan(1, 3, 16385, 3),
    "selective_scan L16384 N16": scan(1, 64, 16384, 16),
    "selective_scan many rows N16": scan(64, 96, 257, 16),
    "scan2d 56x56": directional((2, 96, 56, 56)),
    "scan2d 61x67": directional((1, 33, 61, 67), states=2),
    "scan2d 14x14": directional((64, 48, 14, 14), rank=24),
    "scan2d windows": directional((300, 40, 7, 7), states=8, directions=CROSS[:1] * 4),
    "scan2d grouped": directional((3, 29, 21, 17), rank=3, grouped=True),
    "scan2d narrow groups": directional((26, 15, 21, 17), rank=1, grouped=True),
    "scan2d groups of one word": directional((1, 32, 56, 56), rank=2, grouped=True),
    "scan2d per line": directional((2, 40, 30, 19), per_line=True),
    "scan2d 129x128": directional((1, 16, 129, 128), rank=0),
    "projected_scan2d 56x56": projected((2, 96, 56, 56)),
    "projected_scan2d 14x14": projected((64, 48, 14, 14), rank=24),
    "bi_wkv T197": (bi_wkv, lambda: test_bi_wkv.make(5, 197, 192), {}),
    "bi_wkv T3136": (bi_wkv, lambda: test_bi_wkv.make(2, 3136, 33), {}),
    # A seed whose gradient of w fits float16.
    "bi_wkv T16385 strong": (bi_wkv, lambda: test_bi_wkv.make(1, 16385, 40, decay=50.0, seed=2), {}),
    "wkv6 T196": (wkv6, lambda: test_wkv6.make(5, 196, 3, 64), {}),
    "wkv6 T4097": (wkv6, lambda: test_wkv6.make(1, 4097, 2, 32), {}),
    "projected_line_scan 56x56": projected_lines((2, 144, 56, 56), chunk=2, aligned=False),
    "projected_line_scan 14x14": projected_lines((3, 180, 14, 14), aligned=False),
    "projected_line_scan 15x22": projected_lines((3, 33, 15, 22)),
    "line_scan 56x56": lines((2, 144, 56, 56), chunk=2),
    "line_scan 28x28": lines((2, 90, 28, 28), chunk=2, aligned=False),
    "line_scan 14x14": lines((8, 96, 14, 14)),
    "line_scan 67x130": lines((1, 18, 67, 130), aligned=True),
    "line_scan stored": lines((2, 24, 56, 56), rank=0, chunk=2),
    "line_scan stored long": lines((1, 6, 257, 200), rank=0, aligned=True),
    "q_shift": (q_shift, lambda: {"x": randn(0)(3, 70, 33, 17)}, {}),
    "q_shift_mix": (q_shift_mix, lambda: test_q_shift_mix.make((8, 192, 14, 14), 3), {}),
    "q_shift_mix low": (q_shift_mix, lambda: test_q_shift_mix.make((4, 192, 15, 13), 5, 32), dict(head_dim=64)),
    "depthwise_conv2d 3x3": depthwise((8, 96, 56, 57), 3, act="silu", bias=True),
    "depthwise_conv2d 3x3 stage 3": depthwise((8, 348, 14, 14), 3, act="gelu", bias=True),
    "depthwise_conv2d 7x7": depthwise((8, 144, 56, 56), 7),
    "depthwise_conv2d 5x5 activation": depthwise((8, 96, 28, 29), 5, act="silu", bias=True),
    "depthwise_conv2d 7x7 odd": depthwise((16, 90, 14, 23), 7),
    "depthwise_conv2d 7x7 many groups": depthwise((128, 288, 6, 18), 7),
    "depthwise_conv2d 5x3": depthwise((8, 64, 33, 30), 5, 3),
    "depthwise_conv2d 5x5 bias": depthwise((8, 64, 33, 30), 5, bias=True),
    "depthwise_conv2d one picture": depthwise((1, 33, 67, 130), 7),
    "depthwise_conv2d one large picture": depthwise((1, 48, 67, 130), 7),
    "group_modulation": (group_modulation, lambda: test_group_modulation.make((4, 56, 57, 64)), {}),
    "group_modulation wide": (group_modulation, lambda: test_group_modulation.make((3, 29, 28, 128)), {}),
    "group_modulation two passes": (group_modulation, lambda: test_group_modulation.make((30, 14, 14, 348)), {}),
    "modulated_layer_norm": (
        modulated_layer_norm,
        lambda: test_modulated_layer_norm.make((30, 14, 14, 348)),
        dict(columns=4),
    ),
    "modulated_layer_norm wide": (modulated_layer_norm, lambda: test_modulated_layer_norm.make((3, 7, 6, 1030)), {}),
    "grouped_linear": grouped((30, 14, 14), 87, 87),
    "grouped_linear many": grouped((8, 56, 57), 16, 3),
    "grouped_linear mean": grouped((8, 56, 57), 16, 16, function=grouped_linear_pair_mean),
    "grouped_linear mean wide": grouped((300, 14, 14), 87, 87, function=grouped_linear_pair_mean),
    "layer_norm": norm(layer_norm, (8, 3136, 96)),
    "layer_norm gated": norm(layer_norm, (64, 197, 348), groups=4, gate=True),
    "add_layer_norm": norm(add_layer_norm, (64, 197, 192), branch=True),
    "add_layer_norm two branches": norm(add_layer_norm, (64, 197, 348), branch=True, second=True),
    "layer_norm_grn": (layer_norm_grn, lambda: test_layer_norm_grn.make((8, 144, 56, 56)), {}),
    "layer_norm_grn linear": (layer_norm_grn, lambda: test_layer_norm_grn.make((8, 144, 56, 56), features=96), {}),
    "layer_norm_grn linear 288": (layer_norm_grn, lambda: test_layer_norm_grn.make((8, 288, 28, 28), features=192), {}),
    "layer_norm_grn linear 180": (layer_norm_grn, lambda: test_layer_norm_grn.make((8, 180, 56, 56), features=120), {}),
    "bias_gelu": (bias_gelu, lambda: test_bias_gelu.make((3, 1003, 1000)), {}),
    "conv_layer_norm": pictures((3, 3, 224, 223), 48),
    "conv_layer_norm wide": pictures((2, 4, 65, 64), 100),
    "conv_layer_norm twice": normed_twice((3, 32, 112, 111), 64),
    "squared_relu": (squared_relu, lambda: {"x": randn(0)(7, 1001, 33)}, {}),
    "mlp C96": two_layers((5, 57, 56, 96), 384),
    "mlp C128": two_layers((5, 57, 56, 128), 512, bias=False),
    "mlp C192": two_layers((9, 29, 28, 192), 768),
    "mlp C384": two_layers((3, 197, 384), 1536),
    "mlp odd": two_layers((7, 65, 100), 333, out=41),
    "mlp odd, wide": two_layers((7, 65, 403), 1001, out=77),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, dtype):
    """The reference is PyTorch's path, which every operator's tests compare with the definition."""
    function, make, options = CASES[name]
    if function is mlp and dtype == torch.float32:
        pytest.skip("has kernels for 16 bits only")
    tensors = {n: t if t is None else t.to(dtype) for n, t in make().items()}
    expected = run("torch", function, {n: t if t is None else t.double() for n, t in tensors.items()}, **options)
    actual = run("triton", function, tensors, **options)
    again = run("triton", function, tensors, **options)
    for key, value in actual.items():
        assert torch.equal(value, again[key]), f"{key} differs between two runs"
        # Sums over ten thousands of float32 terms.
        relative = 5e-5 if dtype == torch.float32 else RELATIVE[dtype]
        assert_close(key, value, expected[key], relative)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, out",
    [
        ((9, 56, 56, 512), 64),
        ((9, 28, 28, 1024), 128),
        ((3, 56, 56, 768), 96),
        ((5, 57, 31, 256), 64),
        ((2, 19, 9, 90), 70),
    ],
    ids=str,
)
def test_convolution_to_linear(shape, out, dtype):
    """Without gradients, which are PyTorch's."""
    tensors = {n: t.to(dtype) for n, t in test_conv_gelu_linear.make(shape, out).items()}
    with use_backend("torch"):
        expected = conv_gelu_linear(**{n: t.double() for n, t in tensors.items()})
    with torch.no_grad(), use_backend("triton"):
        y, again = conv_gelu_linear(**tensors), conv_gelu_linear(**tensors)
    assert torch.equal(y, again)
    assert_close("output", y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branch", [False, True], ids=["stream", "branch"])
@pytest.mark.parametrize(
    "shape, out",
    [
        ((9, 56, 56, 512), 64),
        ((9, 28, 28, 1024), 128),
        ((3, 56, 56, 768), 96),
        ((5, 57, 31, 256), 64),
        ((2, 19, 9, 90), 70),
    ],
    ids=str,
)
def test_convolution_to_norm(shape, out, branch, dtype):
    """The same with a stream in float32, and the norm behind it."""
    tensors = test_conv_gelu_linear.make_all(shape, out, dtype, torch.float32, branch)
    with use_backend("torch"):
        exact = {n: t.double() for n, t in tensors.items()}
        expected = conv_gelu_linear_add_norm(**exact)
    with torch.no_grad(), use_backend("triton"):
        results, again = (conv_gelu_linear_add_norm(**tensors, dtype=dtype) for _ in range(2))
        _, norm = conv_gelu_linear_add_norm(**tensors, dtype=dtype, with_sum=False)
    assert all(map(torch.equal, results, again))
    # What is added has the map's precision.
    assert_close("sum", results[0], expected[0], RELATIVE[dtype])
    assert_close("norm", results[1], expected[1])
    # Another kernel, in which other multiplications are one instruction with the addition behind them.
    assert_close("norm without its sum", norm, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branch", [False, True], ids=["stream", "branch"])
@pytest.mark.parametrize(
    "shape, features, out",
    [
        ((9, 56, 56, 64), 512, 64),
        ((2, 64, 64, 64), 512, 64),
        ((3, 28, 28, 128), 1024, 128),
        ((5, 57, 31, 48), 256, 64),
        ((5, 16, 20, 48), 200, 24),
        ((2, 19, 9, 20), 90, 50),
    ],
    ids=str,
)
def test_whole_mlp(shape, features, out, branch, dtype):
    """Alone, and with a stream in float32 and the norm behind it."""
    tensors = test_conv_mlp.make_all(shape, features, out, dtype, torch.float32, branch)
    layers = {n: tensors[n] for n in test_conv_mlp.make((1, 1, 1, 1), 1, 1)}
    with use_backend("torch"):
        alone = conv_mlp(**{n: t.double() for n, t in layers.items()})
        expected = conv_mlp_add_norm(**{n: t.double() for n, t in tensors.items()})
    with torch.no_grad(), use_backend("triton"):
        y, same = conv_mlp(**layers), conv_mlp(**layers)
        results, again = (conv_mlp_add_norm(**tensors, dtype=dtype) for _ in range(2))
        _, norm = conv_mlp_add_norm(**tensors, dtype=dtype, with_sum=False)
    assert torch.equal(y, same) and all(map(torch.equal, results, again))
    assert_close("output", y, alone)
    # What is added has the map's precision.
    assert_close("sum", results[0], expected[0], RELATIVE[dtype])
    assert_close("norm", results[1], expected[1])
    assert_close("norm without its sum", norm, expected[1])


# Arguments with a dimension for the batch, in some operators.
BATCHED = ("x", "u", "delta", "dt", "B", "C", "r", "k", "v", "w", "gates", "lam", "skip", "proxy", "low")
HUGE: dict[str, Case] = {
    "selective_scan": scan(1, 64, 4096, 1, optional=False),
    "selective_scan N8": scan(1, 64, 4096, 8, optional=False),
    "scan2d": directional((1, 64, 64, 64), rank=2),
    "bi_wkv": (bi_wkv, lambda: test_bi_wkv.make(1, 4096, 64), {}),
    "wkv6": (wkv6, lambda: test_wkv6.make(1, 4096, 4, 16), {}),
    "line_scan": lines((1, 64, 64, 64), chunk=2),
    "line_scan stored": lines((1, 64, 64, 64), rank=0),
    "line_scan stored chunks": lines((1, 64, 64, 64), rank=0, chunk=2),
    "q_shift": (q_shift, lambda: {"x": randn(0)(1, 64, 64, 64)}, {}),
    "q_shift_mix": (q_shift_mix, lambda: test_q_shift_mix.make((1, 64, 64, 64), 2), {}),
    "q_shift_mix low": (q_shift_mix, lambda: test_q_shift_mix.make((1, 64, 64, 64), 2, 16), {}),
    "depthwise_conv2d": depthwise((1, 64, 64, 64), 3, act="silu"),
    "depthwise_conv2d 7x7": depthwise((1, 64, 64, 64), 7),
    "layer_norm": norm(layer_norm, (1, 4096, 64)),
    "layer_norm_grn": (layer_norm_grn, lambda: test_layer_norm_grn.make((1, 64, 64, 64)), {}),
    "layer_norm_grn linear": (layer_norm_grn, lambda: test_layer_norm_grn.make((1, 64, 64, 64), features=64), {}),
    "squared_relu": (squared_relu, lambda: {"x": randn(0)(1, 4096, 64)}, {}),
    "mlp": two_layers((1, 4096, 64), 128),
    "mlp wide": two_layers((1, 4096, 208), 208),
}


@pytest.mark.large
@pytest.mark.parametrize("name", HUGE)
def test_more_than_two_billion_elements(name):
    """The last of many equal batch entries has the output and the gradients of one alone."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    function, make, options = HUGE[name]
    alone = {n: None if t is None else t.bfloat16() for n, t in make().items()}
    batched = [n for n, t in alone.items() if n in BATCHED and t is not None and t.dim() > 1 and t.shape[0] == 1]
    count = 2**31 // max(alone[n].numel() for n in batched) + 1

    def outcome(tensors: dict[str, Tensor | None]) -> list[Tensor]:
        leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
        y = function(**leaves, **options)
        y = y if isinstance(y, Tensor) else y[0]
        axis = 1 if function is q_shift_mix else 0
        last = y.narrow(axis, y.shape[axis] - 1, 1).detach().clone()
        grads = torch.autograd.grad(y, [leaves[n] for n in batched], torch.ones_like(y))
        return [last, *(g[-1:].clone() for g in grads)]

    expected = outcome(dict(alone))
    repeated = {n: t.detach().expand(count, *t.shape[1:]).contiguous() if n in batched else t for n, t in alone.items()}
    for what, a, e in zip(["output", *batched], outcome(repeated), expected, strict=True):
        assert_close(what, a, e.double())


@pytest.mark.large
def test_scan_of_a_picture_of_more_than_two_billion_elements():
    """Some channels of one large picture, whose runs are handed on, come out as they do alone."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    channels, alone, side = 256, 32, 2900
    arguments = {n: t.bfloat16() for n, t in test_scan2d.make((1, channels, 1, 1), 1, 2).items()}
    for name in ("x", "dt", "B", "C"):
        arguments[name] = torch.randn(1, side, side, arguments[name][..., 0, 0].numel(), dtype=torch.bfloat16)
        arguments[name] = arguments[name].permute(0, 3, 1, 2)
    assert arguments["x"].numel() > 2**31
    for name, states in (("dt", 2), ("B", 1), ("C", 1)):
        arguments[name] = arguments[name].unflatten(1, (4, states))

    def last(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, -alone:] if name in ("x", "A", "D", "dt_weight", "dt_bias") else tensor

    with torch.no_grad():
        expected = scan2d(**{n: last(n, t) for n, t in arguments.items()}, directions=CROSS)
        y = scan2d(**arguments, directions=CROSS)[:, -alone:]
    assert_close("output", y, expected.double())
