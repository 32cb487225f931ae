"""The end of GroupMamba's mixer: all backends against the definition in float64."""

import importlib

import pytest
import torch
from torch import nn

from tests.ops.harness import check_machinery, compare, randn, run
from tests.tolerance import RELATIVE
from vla.ops import group_modulation, group_modulation_add_norm, use_backend
from vla.ops.group_modulation import operator

BACKENDS = ["torch", "triton"]


def make(shape, groups=4, dtype=torch.float64, stream=None):
    """Tensor arguments by name, with a stream of that dtype if one is given."""
    normal, channels = randn(0), shape[3]
    tensors = {name: normal(*shape) for name in ("y", "z", "n")}
    tensors["gate"] = normal(shape[0], channels)
    for name in ("out_norm_weight", "out_norm_bias", "norm_weight", "norm_bias", "proj_bias"):
        tensors[name] = normal(channels)
    width = channels // groups
    tensors["out_proj"] = normal(groups, width, width) / width**0.5
    tensors["proj"] = normal(channels, channels) / channels**0.5
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if stream is not None:
        tensors["stream"] = normal(*shape).to(stream)
        tensors |= {name: normal(channels).to(dtype) for name in ("stream_norm_weight", "stream_norm_bias")}
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 3, 5, 16), 4), ((1, 1, 1, 12), 4), ((3, 4, 7, 20), 1), ((2, 9, 8, 72), 4), ((1, 9, 8, 148), 4)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_naive(backend, shape, groups, dtype):
    compare(backend, group_modulation, make(shape, groups, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, groups", [((2, 3, 5, 16), 4), ((3, 4, 7, 20), 1), ((2, 9, 8, 72), 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_the_stream_against_naive(backend, shape, groups, dtype):
    # A wider stream's norm and gradient are no more exact than the rounded result.
    options = dict(out_eps=1e-3, eps=1e-2, stream_eps=1e-1, relative=RELATIVE[dtype])
    compare(backend, group_modulation_add_norm, make(shape, groups, dtype, torch.float32), **options, norm_dtype=dtype)
    compare(backend, group_modulation_add_norm, make(shape, groups, dtype, stream=dtype), **options)


def test_norm_of_other_streams():
    """More channels than rows in registers have, and float64, which the kernel does not add."""
    for channels, stream in ((148, torch.float32), (16, torch.float64)):
        tensors = make((1, 9, 8, channels), 4, torch.bfloat16, stream)
        compare("triton", group_modulation_add_norm, tensors, relative=RELATIVE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows(dtype, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vla.ops.group_modulation._triton"), "MANY", 1)
    compare("triton", group_modulation, make((3, 9, 8, 148), 4, dtype))


def test_wide_gradients():
    """A result in float32 has a gradient in it, whose products would take more memory than a GPU's processor has."""
    tensors = make((1, 2, 3, 72), dtype=torch.bfloat16)
    backward = importlib.import_module("vla.ops.group_modulation._triton").backward
    grad = torch.ones(1, 2, 3, 72)
    arguments = (*(tensors[name] for name in operator.arguments[:11]), None, None, None, 1e-5, 1e-5, 0.0)
    assert backward([grad], *arguments, torch.float32, None) is None
    assert backward([grad.bfloat16()], *arguments, None, None) is not None
    compare("triton", group_modulation, tensors, relative=2e-2, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_empty_batch(backend):
    for function, stream in ((group_modulation, None), (group_modulation_add_norm, torch.float32)):
        results = run(backend, function, make((0, 3, 4, 8), dtype=torch.float32, stream=stream))
        assert {results[f"output {i}"].shape for i in range(1 + (stream is not None))} == {(0, 3, 4, 8)}


def test_strides():
    """Halves of a wider map, as a product with two weights leaves them, and one with its channels first."""
    tensors = make((2, 3, 5, 16), dtype=torch.bfloat16)
    wide = torch.cat([tensors["y"], tensors["z"]], dim=-1)
    with use_backend("triton"):
        expected = group_modulation(**tensors)
        tensors["y"], tensors["z"] = wide.chunk(2, dim=-1)
        tensors["n"] = tensors["n"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(group_modulation(**tensors), expected)


def test_transposed_gate():
    """Also where only the kernels of the backward for rows of 16 bits write its gradient."""
    tensors = make((2, 3, 5, 16), dtype=torch.bfloat16)
    tensors["gate"] = tensors["gate"].t().contiguous().t()
    compare("triton", group_modulation, tensors)


class End(nn.Module):
    def forward(self, y, z, n, gate, ow, ob, out_proj, nw, nb, proj, pb):
        return group_modulation(y, z, n, gate, ow, ob, out_proj, nw, nb, proj, pb)


NAMES = ("y", "z", "n", "gate", "out_norm_weight", "out_norm_bias", "out_proj", "norm_weight", "norm_bias", "proj")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery():
    tensors = make((2, 3, 2, 8))
    tensors = tuple(tensors[name] for name in (*NAMES, "proj_bias"))
    arguments = (*(t.clone().requires_grad_() for t in tensors), None, None, None, 1e-5, 1e-5, 0.0, None, None)
    check_machinery(End(), tensors, torch.ops.vla.group_modulation.default, arguments)


class EndWithNorm(nn.Module):
    def forward(self, y, z, n, gate, ow, ob, out_proj, nw, nb, proj, pb, stream, sw, sb):
        out, norm = group_modulation_add_norm(y, z, n, gate, ow, ob, out_proj, nw, nb, proj, pb, stream, sw, sb)
        return out + norm


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_machinery_with_a_stream():
    tensors = make((2, 3, 2, 8), stream=torch.float64)
    names = (*NAMES, "proj_bias", "stream", "stream_norm_weight", "stream_norm_bias")
    tensors = tuple(tensors[name] for name in names)
    arguments = (*(t.clone().requires_grad_() for t in tensors), 1e-5, 1e-5, 1e-5, None, None)
    check_machinery(EndWithNorm(), tensors, torch.ops.vla.group_modulation.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": torch.ones(2, 3, 8)}, r"y has shape \(2, 3, 8\), expected \(B, H, W, C\)"),
        ({"z": torch.ones(2, 3, 4, 4)}, "z has shape .* expected that of y"),
        ({"gate": torch.ones(2, 4)}, r"gate has shape \(2, 4\), expected \(B, C\) = \(2, 8\)"),
        ({"proj": torch.ones(8, 4)}, r"proj has shape \(8, 4\), expected \(C, C\) = \(8, 8\)"),
        ({"proj_bias": torch.ones(4)}, r"proj_bias has shape \(4,\), expected \(C,\) = \(8,\)"),
        ({"out_proj": torch.ones(3, 2, 2)}, "out_proj has 3 groups, expected a divisor of the 8 channels"),
        ({"out_proj": torch.ones(4, 2, 3)}, r"out_proj has shape \(4, 2, 3\), expected \(K, I, I\) = \(4, 2, 2\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"^group_modulation: {message}"):
        group_modulation(**(make((2, 3, 4, 8)) | change))


@pytest.mark.parametrize("name", ["stream", "stream_norm_weight", "stream_norm_bias"])
def test_bad_streams(name):
    tensors = make((2, 3, 4, 8), stream=torch.float64)
    with pytest.raises(ValueError, match=f"^group_modulation: {name} has shape"):
        group_modulation_add_norm(**(tensors | {name: tensors[name][..., :4]}))
