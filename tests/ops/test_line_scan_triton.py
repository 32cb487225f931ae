"""Line scan's Triton kernels against the definition in float64: interpreted on CPUs, so on small maps."""

import pytest
import torch

from tests.ops.harness import compare, run
from tests.ops.test_line_scan import ALL, make
from vla.ops import line_scan

pytest.importorskip("triton")
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 3, 1, 5), (2, 3, 6, 1), (1, 17, 5, 7), (1, 2, 18, 18)], ids=str)
def test_proxy(shape, aligned):
    for chunk in (0, 1, 2, 3):
        compare("triton", line_scan, make(shape, 4, dtype=torch.float32), directions=ALL, aligned=aligned, chunk=chunk)
