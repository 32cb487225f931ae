"""Whether this machine's Triton can run the operators' kernels."""

import pytest


def need_triton() -> None:
    """Skips the test, or the module that asks, where Triton is missing or too old."""
    # Not before the tests' settings are made: it imports Triton, which asks then whether to interpret kernels.
    from vla.ops._registry import MIN_TRITON

    version = "{}.{}".format(*MIN_TRITON)
    pytest.importorskip("triton", minversion=version, reason=f"kernels need Triton {version} or newer")
