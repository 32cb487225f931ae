"""Q-Shift: all backends against reference values and against the definition."""

import pytest
import torch
from torch import nn

from tests import golden
from tests.ops.harness import check_machinery, compare, randn, run
from vla.ops import q_shift, use_backend

BACKENDS = ["naive", "torch", "triton"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 1, 2, 9])
@pytest.mark.parametrize(
    "shape, gamma, head_dim",
    [((2, 16, 4, 5), 0.25, None), ((1, 7, 1, 6), 0.25, None), ((2, 24, 6, 1), 0.2, 12), ((1, 8, 3, 3), 0.0, None)],
)
def test_against_naive(shape, gamma, head_dim, shift, dtype):
    compare("torch", q_shift, {"x": randn(0)(*shape).to(dtype)}, shift=shift, gamma=gamma, head_dim=head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape, shift, gamma, head_dim",
    [
        ((2, 16, 4, 5), 1, 0.25, None),
        ((1, 7, 1, 6), 2, 0.25, None),
        ((2, 24, 6, 1), 1, 0.2, 12),
        ((1, 8, 3, 3), 9, 0.1, None),
    ],
)
def test_triton(shape, shift, gamma, head_dim, dtype):
    x = randn(0)(*shape).to(dtype)
    compare("triton", q_shift, {"x": x}, shift=shift, gamma=gamma, head_dim=head_dim)
    wide = torch.cat((x, x), 3).contiguous(memory_format=torch.channels_last)
    compare("triton", q_shift, {"x": wide[..., : x.shape[3]]}, shift=shift, gamma=gamma, head_dim=head_dim)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_and_empty_batch(backend):
    x = randn(0)(2, 8, 3, 4).float().contiguous(memory_format=torch.channels_last)
    expected = run(backend, q_shift, {"x": x.contiguous()})
    actual = run(backend, q_shift, {"x": x})
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with use_backend(backend):
        assert q_shift(x).is_contiguous(memory_format=torch.channels_last)
        assert q_shift(x[:0]).shape == (0, 8, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["op_q_shift.npz", "op_q_shift_multihead.npz"])
def test_reference_values(file, backend):
    data = golden.load("vrwkv", file)
    for case in golden.index("vrwkv")["ops"][file]:
        height, width = case["H"], case["W"]
        tokens, expected = (data[f"{name}{case['i']}"][:, : height * width] for name in "xy")
        x = tokens.transpose(1, 2).unflatten(2, (height, width)).float()
        with use_backend(backend):
            y = q_shift(x, case["shift_pixel"], case.get("gamma", 0.25), case.get("head_dim"))
        assert torch.equal(y.flatten(2).transpose(1, 2), expected.float()), case


class Shift(nn.Module):
    def forward(self, x):
        return q_shift(x, 1, 0.25, 8)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    x = randn(0)(2, 16, 3, 5)
    check_machinery(Shift(), (x,), torch.ops.vla.q_shift.default, (x.clone().requires_grad_(), 1, 0.25, 8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.ones(2, 4, 4)}, r"x has shape \(2, 4, 4\), expected \(B, C, H, W\)"),
        ({"shift": -1}, "shift is -1"),
        ({"gamma": 0.3}, "gamma is 0.3, expected a share of the channels between 0 and 1/4"),
        ({"head_dim": 3}, "head_dim is 3, expected a divisor of the 8 channels of x"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^q_shift: {message}"):
        q_shift(**({"x": torch.ones(1, 8, 2, 2)} | arguments))
