"""Every Triton kernel compiles for the GPUs it is meant for, on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import need_triton

need_triton()

ROOT = Path(__file__).parents[2]
OPERATORS = sorted({file.parent.name for file in (ROOT / "vla" / "ops").glob("*/_triton*.py")})


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Another Python, in which kernels are compiled instead of interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_compile(operator):
    process = python("-m", "tests.ops.aot", operator)
    assert process.returncode == 0, process.stdout + process.stderr


def test_what_cannot_run_is_found(tmp_path):
    (tmp_path / "kernels.py").write_text("""
import sys

import torch
import triton
import triton.language as tl

from tests.ops.aot import SHARED_MEMORY, TARGETS, Compiler
from vla.ops._triton import kernel


@kernel
def good_kernel(x, y, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@kernel
def broken_kernel(x, SIZE: tl.constexpr):
    tl.store(x, tl.nothing(SIZE))


@kernel
def sum_kernel(x, y, SIZE: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, SIZE))))


@triton.jit
def plain_kernel(x):
    tl.store(x, 0.0)


compiler = Compiler(TARGETS, TARGETS)
x = torch.empty(1 << 16, dtype=torch.float16, device="meta")
with compiler.intercept():
    good_kernel[(1,)](x, x, 300, SIZE=512)
    assert not compiler.errors, compiler.errors
    assert compiler.compiled == {("__main__", "good_kernel", target) for target in TARGETS}
    SHARED_MEMORY.update((target, 0) for target in TARGETS)
    for launch, message in (
        (lambda: good_kernel[lambda meta: (1, 128 * meta["SIZE"])](x, x, 300, SIZE=512), "the limit is"),
        (lambda: broken_kernel[(1,)](x, SIZE=512), "CompilationError"),
        (lambda: sum_kernel[(1,)](x, x, SIZE=1024), "bytes of shared memory"),
        (lambda: plain_kernel[(1,)](x), "plain_kernel is launched, which only a function with"),
    ):
        compiler.errors.clear()
        launch()
        assert compiler.errors and all(message in error for error in compiler.errors), compiler.errors
assert {name for _, name, _ in compiler.compiled} == {"good_kernel", "sum_kernel", "plain_kernel"}
""")
    process = python("-c", f"import runpy; runpy.run_path({str(tmp_path / 'kernels.py')!r}, run_name='__main__')")
    assert process.returncode == 0, process.stdout + process.stderr
