"""GSPN's mixer and its parts against reference values, and the block as a plug-in."""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm

from tests import golden
from tests.models.official import Official
from tests.tolerance import assert_close
from vla.layers import GSPNBlock, GSPNMixer
from vla.models.gspn import checkpoint_filter_fn
from vla.ops import use_backend

INDEX = golden.index("gspn")
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch"), pytest.param("naive", id="naive")]


def arrays(name: str, case: str) -> dict[str, torch.Tensor]:
    prefix = f"{case}/"
    return {k.removeprefix(prefix): v for k, v in golden.load("gspn", name).items() if k.startswith(prefix)}


def mixer_filter(state_dict: dict) -> dict:
    prefix = "layers.0.blocks.0.op."
    renamed = checkpoint_filter_fn({prefix + name: value for name, value in state_dict.items()}, MODEL)
    return {name.removeprefix("stages.0.blocks.0.mixer."): value for name, value in renamed.items()}


class MODEL:
    """What the checkpoint filter asks of a model."""

    pos_embed = None
    norms = ()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (None, torch.float64),
        (None, torch.float32),
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("naive", torch.float64),
        ("naive", torch.float32),
        ("triton", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", INDEX["op_mixer"]["cases"])
def test_mixer(name, backend, dtype):
    case, data = INDEX["op_mixer"]["cases"][name], arrays("op_mixer.npz", name)
    mixer = GSPNMixer(
        case["dim"],
        d_state=case["d_state"],
        ratio=case["ratio"],
        conv_kernel=case["conv"],
        conv_bias=case["conv_bias"],
        chunk=case["feat_size"] if case["global"] else case["items_each_chunk"],
    )
    net = Official(mixer, mixer_filter, case["keys"], dtype)
    x = data["x"].to(dtype).requires_grad_()
    with use_backend(backend):
        y = net(x)
        y.backward(data["cot"].to(dtype))
    relative = 1e-9 if dtype == torch.float64 else 2e-4
    assert_close("out", y, data["out"], relative)
    assert_close("d_x", x.grad, data["d_x"], relative)
    for key, gradient in net.gradients().items():
        if data[f"d:{key}"].abs().max() < 1e-12:
            assert gradient.abs().max() < 1e-10 if dtype == torch.float64 else 1e-4, key
        else:
            assert_close(key, gradient, data[f"d:{key}"], relative)


@pytest.mark.parametrize("case", sorted({name.split("/")[0] for name in golden.load("gspn", "op_grn.npz")}))
def test_global_response_norm(case):
    """The library's layer is the one of the paper."""
    data = {name: value.double() for name, value in arrays("op_grn.npz", case).items()}
    norm = GlobalResponseNorm(data["x"].shape[1]).double()
    norm.load_state_dict({"weight": data["gamma"].flatten(), "bias": data["beta"].flatten()})
    x = data["x"].requires_grad_()
    y = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    y.backward(data["cot"])
    assert_close("out", y, data["out"])
    assert_close("d_x", x.grad, data["d_x"])
    assert_close("d_gamma", norm.weight.grad, data["d_gamma"].flatten())
    assert_close("d_beta", norm.bias.grad, data["d_beta"].flatten())


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (5, 12)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aligned": True},
        {"chunk": 2, "mlp_ratio": 0.0},
        {"gated_mlp": True, "layer_scale": 1e-5, "norm_layer": "batchnorm2d", "drop_path": 0.1, "conv_bias": True},
    ],
    ids=lambda o: "-".join(o) or "default",
)
def test_block_plugs_in(options, size):
    torch.manual_seed(0)
    block = GSPNBlock(10, **options)
    x = torch.randn(2, 10, *size, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    block.eval()
    last = x.detach().contiguous(memory_format=torch.channels_last)
    assert_close("channels-last", block(last), block(x.detach()))


def test_aligned_block_commutes_with_symmetric_turns():
    """With equal parameters in all directions, outputs that return to their pixels turn with the map."""
    torch.manual_seed(0)
    mixer = GSPNMixer(8, conv_kernel=1, aligned=True).double()
    with torch.no_grad():
        for name in ("gate_weight", "lam_weight", "u_weight", "skip_weight", "merge_weight"):
            weight = getattr(mixer.scan, name)
            weight.copy_(weight.narrow(-3, 0, 1).expand_as(weight))
        mixer.scan.gate_weight[2] = mixer.scan.gate_weight[0]
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    for turn in (lambda t: t.mT, lambda t: t.flip(-1), lambda t: t.flip(-2)):
        assert_close("turned", mixer(turn(x)), turn(mixer(x)))


def test_shared_gates():
    """One set of gates is the same as equal sets for all channels."""
    torch.manual_seed(0)
    shared, mixer = GSPNMixer(8, shared_gates=True), GSPNMixer(8)
    weights = shared.state_dict()
    weights["scan.gate_weight"] = weights["scan.gate_weight"].expand(-1, -1, 12, -1)
    mixer.load_state_dict(weights)
    x = torch.randn(2, 8, 5, 5)
    y, expected = shared(x), mixer(x)
    assert_close("out", y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close("gates", shared.scan.gate_weight.grad, mixer.scan.gate_weight.grad.sum(2, keepdim=True), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision(backend):
    """Under autocast maps are bfloat16 and weights float32, states float32."""
    torch.manual_seed(0)
    block = GSPNBlock(16, chunk=2)
    x = torch.randn(2, 16, 8, 6)
    expected = block(x)
    with use_backend(backend), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = block(x)
    actual.sum().backward()
    assert_close("out", actual, expected, 2e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


class LowRank(torch.nn.Module):
    """An adapter around a linear layer, whose parameters it shows as its own."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.down = torch.nn.Linear(linear.in_features, 2)
        self.up = torch.nn.Linear(2, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias) + self.up(self.down(x))


def test_script_calls_what_took_the_place_of_the_last_layer():
    torch.manual_seed(0)
    mixer, x = GSPNMixer(16).eval(), torch.randn(1, 16, 6, 5)
    plain = mixer(x)
    mixer.out_proj = LowRank(mixer.out_proj)
    expected = mixer(x)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert_close("output", torch.jit.script(mixer)(x), expected)
