"""Whether this machine's Triton can run the operators' kernels."""

import pytest

from vla.ops._registry import MIN_TRITON


def need_triton() -> None:
    """Skips the test, or the module that asks, where Triton is missing or too old."""
    version = "{}.{}".format(*MIN_TRITON)
    pytest.importorskip("triton", minversion=version, reason=f"kernels need Triton {version} or newer")
