"""SS2D against reference values, and as a layer in any network."""

import pytest
import torch
from torch import nn

from tests import golden
from tests.models.official import Official
from tests.models.test_vmamba import BACKENDS, DTYPES, set_long_memory, tolerance
from tests.tolerance import assert_close
from vla.layers import SS2D, VSSBlock
from vla.layers.ss2d import OUT_NORMS, SCANS
from vla.models.vmamba import checkpoint_filter_fn, parse_forward_type
from vla.ops import use_backend

CASES = golden.index("vmamba")["op_ss2d.npz"]["cases"]
DATA = golden.load("vmamba", "op_ss2d.npz")
LAYOUT = ("forward_type", "channel_first")


def build(config: dict) -> SS2D:
    """Mixer of a released configuration."""
    names = {"d_model": "dim", "initialize": "init"}
    ours = {names.get(name, name): value for name, value in config.items() if name not in LAYOUT}
    return SS2D(**ours | parse_forward_type(config["forward_type"]))


def rename(weights: dict) -> dict:
    weights = checkpoint_filter_fn({f"layers.0.blocks.0.op.{name}": value for name, value in weights.items()}, None)
    return {name.removeprefix("stages.0.blocks.0.mixer."): value for name, value in weights.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, backend, dtype):
    info = CASES[case]
    mixer = Official(build(info["config"]), rename, info["shapes"], dtype)
    if info["long_memory"]:
        set_long_memory(mixer)
    value_tolerance, gradient_tolerance = (1e-4, 1e-3) if "v052dc" in case else (1e-5, 1e-4)
    x = DATA[f"{case}/x"].to(dtype, copy=True).requires_grad_()
    with use_backend(backend):
        out = mixer(x)
        (out * torch.from_numpy(golden.fill_tensor("loss", out.shape)).to(dtype)).sum().backward()
    expected = DATA[f"{case}/out"]
    assert_close("out", out, expected, tolerance(expected, dtype, value_tolerance))
    gradients = mixer.gradients() | {"x": x.grad}
    assert gradients.keys() == {key.split("/")[2] for key in DATA if key.startswith(f"{case}/grad/")}
    for name, value in gradients.items():
        expected = DATA[f"{case}/grad/{name}"]
        assert_close(name, value, expected, tolerance(expected, dtype, gradient_tolerance))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("out_norm", OUT_NORMS)
@pytest.mark.parametrize("gate", [False, True])
def test_any_memory_format(scan, out_norm, gate):
    mixer = SS2D(12, d_state=2, ssm_ratio=1.5, scan=scan, out_norm=out_norm, gate=gate, out_act=gate).double()
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    y = mixer(x.contiguous(memory_format=torch.channels_last))
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close("out", mixer(x), y)


@pytest.mark.parametrize("ssd", [False, True])
def test_directions_are_symmetric(ssd):
    """With one weight for all directions, the scan of a flipped or transposed map is the flipped or transposed scan."""
    scan = SS2D(8, d_state=3, ssm_ratio=2.0, init="v1", ssd=ssd).double().scan
    for parameter in scan.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    x = torch.randn(2, 16, 4, 6, dtype=torch.float64)
    y = scan(x)
    assert_close("flipped", scan(x.flip([2, 3])), y.flip([2, 3]))
    assert_close("transposed", scan(x.transpose(2, 3)), y.transpose(2, 3))


def test_cascade_alignment():
    """Only the aligned cascade returns what a pixel started to that pixel: a single line tells them apart."""
    torch.manual_seed(0)
    released, aligned = (SS2D(8, scan=scan).double() for scan in ("cascade2d", "cascade2d_aligned"))
    aligned.load_state_dict(released.state_dict())
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    assert_close("one pixel", aligned(x), released(x))
    for mixer in (released, aligned):
        for parameter in mixer.scan.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    x = torch.randn(1, 8, 1, 7, dtype=torch.float64)
    assert_close("flipped", aligned.scan(x.flip([3])), aligned.scan(x).flip([3]))
    assert (released.scan(x.flip([3])) - released.scan(x).flip([3])).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": True, "gated_mlp": True, "layer_scale": 1e-2}, {"ssd": True, "dt_rank": 2}, {"scan": "cascade2d"}],
    ids=str,
)
def test_block_in_a_network(options):
    block = VSSBlock(16, mlp_ratio=2.0, drop_path=0.1, norm_layer=nn.BatchNorm2d, act_layer="silu", **options)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), block, nn.Conv2d(16, 1, 1))
    network(torch.randn(2, 3, 9, 6)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    x = torch.randn(1, 3, 5, 11)
    y = torch.fx.symbolic_trace(network)(x)
    # The graph holds the modules apart that a GPU's kernels join, so that rounding differs there.
    assert_close("graph", y, network(x))
    assert x.is_cuda or torch.equal(y, network(x))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(x), network(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    block = VSSBlock(32, d_state=4, ssm_ratio=2.0).eval()
    x = torch.randn(1, 32, 9, 7)
    with torch.no_grad():
        expected = block(x)
        with torch.autocast(torch.get_default_device().type, dtype):
            autocast = block(x)
        half = block.to(dtype)(x.to(dtype))
    assert_close("autocast", autocast, expected, 3e-2)
    assert_close("half", half, expected, 3e-2)


def test_hooks_of_scan_and_norm():
    """Who looks on at the scan or its norm gets their calls, and the same result."""
    torch.manual_seed(0)
    mixer = SS2D(8)
    x = torch.randn(1, 8, 5, 4)
    expected = mixer(x)
    called = []
    for name in ("scan", "out_norm"):
        getattr(mixer, name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert_close("output", mixer(x), expected)
    assert called == ["scan", "out_norm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssm_ratio": 0.0}, "SS2D: ssm_ratio is 0.0, expected one that leaves a channel of 8"),
        ({"scan": "diagonal"}, "SS2D: unknown scan 'diagonal', expected one of " + ", ".join(SCANS)),
        ({"out_norm": "bn"}, "SS2D: unknown out_norm 'bn', expected one of " + ", ".join(OUT_NORMS)),
        (
            {"ssd": True, "scan": "cascade2d"},
            "SS2D: scan is 'cascade2d', expected one of cross2d, unidi, bidi with ssd",
        ),
    ],
)
def test_bad_option(options, message):
    with pytest.raises(ValueError) as error:
        SS2D(8, **options)
    assert str(error.value) == message
