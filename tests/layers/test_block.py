import pytest
import torch
from timm.layers import DropPath
from torch import nn

from vla.layers import ResidualBlock
from vla.layers.block import run_blocks


def block(**kwargs) -> ResidualBlock:
    return ResidualBlock(8, nn.Conv2d(8, 8, 3, padding=1), **kwargs)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("norm_layer", ["layernorm2d", nn.BatchNorm2d])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_equation(post_norm, norm_layer, layer_scale):
    layer = block(post_norm=post_norm, norm_layer=norm_layer, layer_scale=layer_scale).eval()
    x = torch.randn(2, 8, 5, 7)
    scale = layer_scale or 1.0

    def mlp(y):
        return layer.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    if post_norm:
        y = x + scale * layer.norm1(layer.mixer(x))
        y = y + scale * layer.norm2(mlp(y))
    else:
        y = x + scale * layer.mixer(layer.norm1(x))
        y = y + scale * mlp(layer.norm2(y))
    assert torch.allclose(layer(x), y, atol=1e-6)


def test_channels_last_stays():
    x = torch.randn(2, 8, 5, 7)
    layer = block()
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, layer(x), atol=1e-6)


def test_parts():
    layer = block(mlp_ratio=0.0, drop_path=0.1)
    assert layer.mlp is None
    assert isinstance(layer.drop_path1, DropPath)
    assert {name for name, _ in layer.named_parameters()} == {
        "norm1.weight", "norm1.bias", "mixer.weight", "mixer.bias"
    }  # fmt: skip
    custom = nn.Linear(8, 8)
    assert block(mlp=custom, mlp_ratio=0.0).mlp is custom


@pytest.mark.parametrize("norm_layer", ["layernorm2d", nn.BatchNorm2d])
@pytest.mark.parametrize("post_norm", [False, True])
def test_blocks_in_a_row(post_norm, norm_layer):
    blocks = nn.Sequential(*(block(post_norm=post_norm, norm_layer=norm_layer) for _ in range(2)), nn.Conv2d(8, 8, 1))
    blocks.append(block(mlp_ratio=0.0, post_norm=post_norm, norm_layer=norm_layer))
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    results = [run_blocks(blocks, x), blocks(x)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()]) for y in results]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_blocks_in_a_row_call_what_is_waited_for():
    blocks = nn.Sequential(block(), block())
    calls = []
    blocks[1].register_forward_hook(lambda module, args, y: calls.append(y))
    x = torch.randn(1, 8, 3, 3)
    assert torch.equal(run_blocks(blocks, x), calls[0])
