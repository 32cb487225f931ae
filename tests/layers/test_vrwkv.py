"""Vision-RWKV's layers: initial values, shifts along the sequence, and the block as a part of any network."""

import pytest
import torch

from tests import golden
from tests.tolerance import RELATIVE, assert_close
from vla.layers import ChannelMix, SpatialMix, SpatialMix6, TokenShift, VRWKVBlock
from vla.models.vrwkv import rename_released


def check_initial_values(prefix: str, data: dict, att: torch.nn.Module, ffn: torch.nn.Module) -> None:
    found = 0
    for name, expected in data.items():
        if name.startswith(prefix):
            native, expected = rename_released(name.replace(prefix, "layers.0."), expected)
            native = native.removeprefix("blocks.0.")
            parameter = {"mixer": att, "mlp": ffn}[native.split(".")[0]].get_parameter(native.split(".")[1])
            assert_close(name, parameter, expected, 1e-6)
            found += 1
    assert found


@pytest.mark.parametrize("index", [0, 1, 2])
def test_fancy_init(index):
    where = dict(index=index, depth=3)
    data = golden.load("vrwkv", "init_v1_fancy.npz")
    check_initial_values(f"layer{index}.", data, SpatialMix(24, **where), ChannelMix(24, **where))
    data = golden.load("vrwkv", "init_v6_fancy.npz")
    check_initial_values(f"layer{index}.", data, SpatialMix6(128, **where), ChannelMix(128, head_dim=64, **where))


@pytest.mark.parametrize("mode", ["local", "global"])
def test_local_and_global_init(mode):
    data = golden.load("vrwkv", "init_v1_local_global.npz")
    check_initial_values(f"{mode}.", data, SpatialMix(8, init_mode=mode), ChannelMix(8, init_mode=mode))


def test_sequence_shifts():
    data = golden.load("vrwkv", "op_seq_shift.npz")
    for case in golden.index("vrwkv")["ops"]["op_seq_shift.npz"]:
        shift = TokenShift(case["func"], case["shift_pixel"], case["gamma"] or 0.25)
        x = data[f"x{case['i']}"].transpose(1, 2)[:, :, None]
        assert torch.equal(shift(x)[:, :, 0].transpose(1, 2), data[f"y{case['i']}"]), case


def test_class_tokens_are_not_shifted():
    """The reference appends the class token to the sequence of pixels."""
    data = golden.load("vrwkv", "op_q_shift_multihead.npz")
    for case in golden.index("vrwkv")["ops"]["op_q_shift_multihead.npz"]:
        shift = TokenShift("q_shift", case["shift_pixel"], head_dim=case["head_dim"])
        x = data[f"x{case['i']}"].transpose(1, 2)[:, :, None]
        y = shift(x, (case["H"], case["W"]))
        assert torch.equal(y[:, :, 0].transpose(1, 2), data[f"y{case['i']}"]), case


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_mixes(grid, low_rank):
    """Class tokens are mixed with themselves; under autocast the mixes come in the dtype of what takes them."""
    torch.manual_seed(0)
    shift = TokenShift("q_shift", head_dim=4)
    x = torch.randn(2, 8, 1, 14) if grid else torch.randn(2, 8, 3, 4)
    weight, low, up = torch.randn(3, 8), None, None
    tokens = x.flatten(2).transpose(1, 2)
    change = shift(x, grid).flatten(2).transpose(1, 2) - tokens
    share = weight[:, None, None]
    if low_rank:
        low, up = torch.randn(2, tokens.shape[1], 3 * 2), torch.randn(3, 2, 8)
        share = share + torch.einsum("btmr,mrc->mbtc", low.unflatten(2, (3, 2)), up)
    expected = tokens + change * share
    assert_close("mixes", shift.mix(x, weight, grid, low, up), expected)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        mixed = shift.mix(x, weight, grid, low, up)
    assert mixed.dtype is torch.bfloat16
    assert_close("under autocast", mixed, expected)


@pytest.mark.parametrize("version", [1, 6])
def test_compiled_under_autocast(version):
    block = VRWKVBlock(16, version=version, head_dim=8)
    x = torch.randn(2, 16, 3, 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        expected = block(x)
        actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    if torch.get_default_device().type == "cpu":
        assert torch.equal(actual, expected)
    else:
        # A graph has PyTorch's own layer norm, which rounds the gate's SiLU to bfloat16; an operator rounds once.
        assert_close("compiled", actual, expected, RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 5), (20, 13)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"post_norm": True, "layer_scale": 0.5, "key_norm": True, "drop_path": 0.2},
        {"shift": 0, "init_mode": "global"},
        {"shift_mode": "single_shift", "mlp_ratio": 2.5},
        {"version": 6, "head_dim": 8},
        {"version": 6, "head_dim": 16, "post_norm": True, "layer_scale": 0.5, "key_norm": True, "shift": 0},
    ],
    ids=str,
)
def test_block_in_any_network(options, memory_format, size):
    torch.manual_seed(0)
    block = VRWKVBlock(32, **options)
    x = torch.randn(2, 32, *size).contiguous(memory_format=memory_format)
    y = block(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())
    block.eval()
    assert_close("contiguous", block(x), block(x.contiguous()), 1e-5)


@pytest.mark.parametrize("norm_layer", ["layernorm2d", "batchnorm2d"])
def test_layer_scale_after_norms(norm_layer):
    """The same values and gradients where a hook keeps norm and scale apart."""
    torch.manual_seed(0)
    block = VRWKVBlock(8, post_norm=True, layer_scale=0.5, norm_layer=norm_layer).double()
    for scale in (block.ls1, block.ls2):
        torch.nn.init.normal_(scale.gamma)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    actual = [block(x), *torch.autograd.grad(block(x).sin().sum(), leaves)]
    for scale in (block.ls1, block.ls2):
        scale.register_forward_hook(lambda *_: None)
    expected = [block(x), *torch.autograd.grad(block(x).sin().sum(), leaves)]
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(str(i), one, other, 1e-9)


def test_layer_scale_keeps_no_map():
    x = torch.randn(2, 16, 8, 8)

    def kept(**options) -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        block = VRWKVBlock(16, post_norm=True, **options)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    assert kept() < kept(layer_scale=0.5) < kept() + x.nbytes


def test_one_token_attends_to_itself():
    """A single pixel: the attention's output is its value."""
    mixer = SpatialMix(8, shift=0).double()
    x = torch.randn(2, 8, 1, 1, dtype=torch.float64)
    tokens = x.flatten(1)
    expected = mixer.output(torch.sigmoid(mixer.receptance(tokens)) * mixer.value(tokens))
    assert_close("y", mixer(x).flatten(1), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "zigzag"}, "TokenShift: mode is 'zigzag', expected one of q_shift, single_shift, double_shift"),
        ({"mode": "single_shift", "head_dim": 8}, "TokenShift: head_dim is 8, expected None"),
    ],
)
def test_bad_shift(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TokenShift(**arguments)
