"""The selective scan's Triton kernels, interpreted on the CPU, against the definition in float64."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.harness import compare, run  # noqa: E402
from tests.ops.test_selective_scan import full, make  # noqa: E402
from tests.tolerance import assert_close  # noqa: E402
from vla.ops import selective_scan, use_backend  # noqa: E402

kernels = importlib.import_module("vla.ops.selective_scan._triton")


def single(tensors):
    return {n: t if t is None else t.float() for n, t in tensors.items()}


@pytest.mark.parametrize("parallel", [False, True], ids=["chunk after chunk", "chunks in parallel"])
@pytest.mark.parametrize("states", [1, 3], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("length", [1, 7, 49, 196, 520], ids=lambda n: f"L{n}")
def test_against_naive(length, states, parallel, monkeypatch):
    monkeypatch.setattr(kernels, "_parallel", lambda scan, programs, chunks: parallel and chunks > 1)
    compare("triton", full, single(make(2, 18, length, states, groups=2)), delta_softplus=True)
