import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_close
from vla.layers import aligned
from vla.layers.aligned import Conv2d


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [(8, 12), (20, 8), (5, 11)])
def test_zeros_behind_channels(monkeypatch, channels, compiled, bias):
    """How GPUs convolve maps whose pixels do not start at multiples of 16 bytes: values and gradients are the same."""
    conv = Conv2d(*channels, 3, stride=2, padding=1, bias=bias).double()
    x = torch.randn(2, channels[0], 7, 6, dtype=torch.float64, requires_grad=True)
    leaves, shapes, original = [x, *conv.parameters()], [], F.conv2d

    def conv2d(x, weight, *args):
        shapes.append((x.shape[1], *weight.shape[:2]))
        return original(x, weight, *args)

    results = []
    monkeypatch.setattr(aligned.F, "conv2d", conv2d)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    for wanted in (False, True):
        monkeypatch.setattr(aligned, "_wants_zeros", lambda x, weight, wanted=wanted: wanted)
        y = conv(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_close("convolution", actual, expected)
    ins, outs = (-(-number // 8) * 8 for number in channels)
    ins = ins if compiled else channels[0]
    assert shapes == [(channels[0], *channels[::-1]), (ins, outs, ins)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels, wanted", [((16, 24), False), ((16, 20), True), ((20, 16), None)])
def test_which_convolutions_have_zeros(monkeypatch, channels, wanted, compiled):
    wanted = compiled if wanted is None else wanted
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    monkeypatch.setattr(aligned, "is_worth_launches", lambda x: True)
    monkeypatch.setattr(aligned, "takes_narrow_kernels", lambda x: True)
    conv = Conv2d(*channels, 3)
    assert aligned._wants_zeros(torch.randn(1, channels[0], 4, 4), conv.weight) is wanted
    monkeypatch.setattr(aligned, "takes_narrow_kernels", lambda x: False)
    assert not aligned._wants_zeros(torch.randn(1, channels[0], 4, 4), conv.weight)
