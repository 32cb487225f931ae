"""Compiles every Triton kernel ahead of time, as a launch would, on a machine without a GPU.

The public operators run on meta tensors of real sizes: nothing is computed, but the launchers choose blocks and warps
as they would on a GPU, and each launch is compiled for several GPUs with the specialisation that Triton's own launcher
derives from the arguments (dtypes, alignment, integers equal to 1 or divisible by 16). Grids and shared memory must
fit the GPU, results must have the right shapes. Prints registers and spills of every kernel:

    python -m tests.ops.aot selective_scan [scan2d ...] [--case SUBSTRING] [--target 90] [--dump FOLDER]
    python -m tests.ops.aot --model vmamba_tiny_s1l8 --target 90      what a model's first training step compiles

Needs a process without TRITON_INTERPRET, which decides about a kernel when it is defined.
"""

# ruff: noqa: T201  its result is what it prints

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import vla.ops
from tests.ops.aot_cases import CASES, Case
from vla.ops._registry import Operator, _as_gradient, triton_version, use_backend
from vla.ops._triton import Kernel

VERSION = triton_version()
# A100; H100 and H200; RTX 50, which Triton knows since 3.3. Bytes of shared memory that a program can have there.
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
TARGETS = tuple(t for t in SHARED_MEMORY if t < 120 or VERSION >= (3, 3))
# Compiled for in every case; the others once per kernel, unless chosen by hand.
MAIN_TARGET = 90
GRID_LIMIT = (2**31 - 1, 65535, 65535)


class Device:
    """What Triton asks its driver when it compiles, answered for a GPU that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the key of the launcher's cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class OnMeta(TorchDispatchMode):
    """Runs the operators' backend on meta tensors, where PyTorch would only infer shapes."""

    def __init__(self):
        super().__init__()
        modules = [module for name, module in sys.modules.items() if name.startswith("vla.ops.")]
        self.operators = {o.name: o for m in modules for o in vars(m).values() if isinstance(o, Operator)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            # As on a GPU; on meta tensors the result is always contiguous.
            channels_last = args[0].is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            return func(*args, **(kwargs or {})).contiguous(memory_format=layout)
        if func.namespace != "vla":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("vla::")
        operator = self.operators[name.removesuffix("_backward").removesuffix("_train")]
        if "triton" not in operator.backends:
            return operator._fake(*args) if name == operator.name else operator._fake_backward(*args)
        backend = importlib.import_module(f"{operator.package}._triton")
        if not name.endswith("_backward"):
            training = name != operator.name
            extra = {"saved": backend.to_save(*args)} if training else {}
            expected, actual = operator.infer(*args), backend.forward(*args, **extra)
            single = isinstance(expected, torch.Tensor)
            for e, a in zip(*(([expected], [actual]) if single else (expected, actual)), strict=True):
                assert (a.shape, a.dtype) == (e.shape, e.dtype), f"{name} returned {a.dtype} {tuple(a.shape)}"
            if training:
                return *((actual,) if single else actual), extra["saved"]
            return actual
        if not hasattr(backend, "backward"):
            return operator._fake_backward(*args)
        grads, saved, *args = args
        wanted = operator._differentiable(args)
        results = []
        found = backend.backward(grads, *args, **({"saved": saved} if saved else {}))
        if found is None:
            return operator._fake_backward(grads, saved, *args)
        for i, grad in zip(operator.tensor_arguments, found, strict=True):
            if i not in wanted:
                results.append(torch.empty(0, device="meta"))
                continue
            argument, tensor = operator.arguments[i], args[i]
            assert grad is not None, f"{name} returned no gradient of {argument}"
            assert grad.shape == tensor.shape, f"{name} returned {tuple(grad.shape)} as gradient of {argument}"
            results.append(_as_gradient(grad, tensor))
        return results


class Compiler:
    """Compiles launches instead of launching, and keeps a row of text about every kernel.

    Args:
        targets: Compute capabilities to compile for.
        thorough: Those of them to compile for in every case.
        dump: Folder for the kernels' intermediate and machine code.

    Attributes:
        case: What the launches belong to, for messages.
        compiled: (module, kernel, target) of what was compiled.
        errors: Everything that went wrong.
    """

    HEADER = f"{'kernel':44} {'sm':>4} {'regs':>5} {'spill':>5} {'shared':>7} {'s':>5}  case, constants"

    def __init__(self, targets: tuple[int, ...], thorough: tuple[int, ...], dump: Path | None = None):
        self.targets = targets
        self.thorough = thorough
        self.dump = dump
        self.case = ""
        self.met: set[tuple[JITFunction, int]] = set()
        self.compiled: set[tuple[str, str, int]] = set()
        self.seen: set[str] = set()
        self.seconds: list[float] = []
        self.errors: list[str] = []

    @contextmanager
    def intercept(self) -> Iterator[None]:
        original = JITFunction.run

        def run(kernel: JITFunction, *args, grid, warmup, **kwargs):
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            self._check_grid(kernel, grid(arguments) if callable(grid) else grid)
            for target in self.targets:
                if (kernel, target) in self.met and target not in self.thorough:
                    continue
                self.met.add((kernel, target))
                driver.set_active(Device(target))
                start = time.perf_counter()
                try:
                    binary = original(kernel, *args, grid=grid, warmup=True, **kwargs)
                except Exception as error:
                    while error.__cause__ is not None:  # in the innermost of the functions that the kernel calls
                        error = error.__cause__
                    self.fail(f"{kernel.__name__} for sm_{target}: {type(error).__name__}: {error}")
                else:
                    self._report(kernel, target, binary, time.perf_counter() - start, arguments)

        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = original

    @property
    def failed(self) -> bool:
        """Whether the current case had an error."""
        return any(error.startswith(f"{self.case}: ") for error in self.errors)

    def fail(self, message: str) -> None:
        self.errors.append(f"{self.case}: {message}")
        print(f"ERROR {self.errors[-1]}", flush=True)

    def _check_grid(self, kernel: JITFunction, grid: tuple[int, ...]) -> None:
        if any(size > limit for size, limit in zip(grid, GRID_LIMIT, strict=False)):
            self.fail(f"{kernel.__name__}: grid {grid}, the limit is {GRID_LIMIT}")

    def _report(self, kernel: JITFunction, target: int, binary, seconds: float, arguments: dict) -> None:
        module = sys.modules[kernel.fn.__module__]
        if not isinstance(getattr(module, kernel.__name__), Kernel):
            self.fail(f"{kernel.__name__} is launched, which only a function with `vla.ops._triton.kernel` must be")
        self.compiled.add((module.__name__, kernel.__name__, target))
        if binary.hash in self.seen:
            return
        self.seen.add(binary.hash)
        self.seconds.append(seconds)
        # The launchers choose the same tiles for all GPUs, so that those of the largest must fit the smallest.
        limit = min(SHARED_MEMORY[t] for t in self.targets)
        if binary.metadata.shared > limit:
            self.fail(f"{kernel.__name__} needs {binary.metadata.shared} bytes of shared memory, the limit is {limit}")
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr and p.name in arguments}
        constants["num_warps"] = binary.metadata.num_warps
        text = " ".join(f"{name}={value}" for name, value in constants.items())
        registers, spilled = resources(binary.asm["cubin"])
        print(
            f"{kernel.__name__:44} {target:4} {registers:>5} {spilled:>5} {binary.metadata.shared:7} {seconds:5.1f}  "
            f"{self.case}, {text}",
            flush=True,
        )
        if self.dump is not None:
            stem = f"{kernel.__name__}.{self.case.replace(' ', '_').replace('/', '-')}.sm{target}.{binary.hash[:6]}"
            self.dump.mkdir(parents=True, exist_ok=True)
            for stage in ("ttgir", "ptx"):
                (self.dump / f"{stem}.{stage}").write_text(binary.asm[stage])
            (self.dump / f"{stem}.cubin").write_bytes(binary.asm["cubin"])
            (self.dump / f"{stem}.sass").write_text(tool("nvdisasm", "-c", self.dump / f"{stem}.cubin"))


def tool(name: str, *arguments: object) -> str:
    """Output of one of the binary tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[str, str]:
    """Registers a thread, and bytes of stack a thread: above 0, registers did not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = dict(word.split(":")[:2] for word in tool("cuobjdump", "-res-usage", file.name).split() if ":" in word)
    return words.get("REG", "?"), words.get("STACK", "?")


def operators() -> list[str]:
    """Folders below `vla/ops` that have Triton kernels."""
    return sorted({file.parent.name for file in Path(vla.ops.__file__).parent.glob("*/_triton*.py")})


def kernels_of(operator: str) -> set[tuple[str, str]]:
    """(module, name) of every kernel in the operator's Triton files."""
    found = set()
    for file in (Path(vla.ops.__file__).parent / operator).glob("_triton*.py"):
        name = f"vla.ops.{operator}.{file.stem}"
        members = vars(importlib.import_module(name)).values()
        found |= {(name, m.__name__) for m in members if isinstance(m, Kernel) and m.__module__ == name}
    return found


def run_case(compiler: Compiler, case: Case, dtype: torch.dtype) -> None:
    """Forward and backward of one case, and the forward without a gradient."""
    arguments = case.make(dtype)
    tensors = [t.requires_grad_() for t in arguments.values() if isinstance(t, torch.Tensor) and t.is_leaf]
    with torch.no_grad():
        run(compiler, lambda: case.function(**arguments), [])
    run(compiler, lambda: case.function(**arguments), tensors)


def run_model(compiler: Compiler, name: str) -> None:
    """Forward and backward of a model, in bfloat16."""
    with torch.device("meta"):
        model = timm.create_model(name).to(dtype=torch.bfloat16, memory_format=torch.channels_last).train()
        pictures = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    run(compiler, lambda: model(pictures), list(model.parameters()))
    print(f"{name}: {time.perf_counter() - start:.1f} s, of which compilation {sum(compiler.seconds):.1f} s")


def run(compiler: Compiler, call: Callable[[], object], tensors: list[torch.Tensor]) -> None:
    """A call and its gradients."""
    try:
        with compiler.intercept(), use_backend("triton"), OnMeta():
            outputs = call()
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            if tensors:
                torch.autograd.grad(outputs, tensors, [torch.empty_like(o) for o in outputs], allow_unused=True)
    except Exception as error:
        if not compiler.failed:  # what follows a kernel that does not compile is not worth a second message
            traceback.print_exc()
            compiler.fail(f"{type(error).__name__}: {error}")


def main() -> int:
    available = operators()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(available)}; all by default")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="compute capability")
    parser.add_argument("--model", help="a model instead of operators")
    parser.add_argument("--dump", type=Path, help="folder for TTGIR, PTX, cubin and SASS")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

    targets = tuple(options.target or TARGETS)
    compiler = Compiler(targets, tuple(options.target or (MAIN_TARGET,)), options.dump)
    print(f"Triton {triton.__version__}\n{Compiler.HEADER}")
    if options.model:
        compiler.case = options.model
        run_model(compiler, options.model)
    for operator in () if options.model else options.operators or available:
        if operator not in CASES:
            compiler.errors.append(f"{operator} has Triton kernels, but no cases in tests/ops/aot_cases.py")
            continue
        for case in CASES[operator]:
            for dtype in case.dtypes:
                if options.case in case.name:
                    compiler.case = f"{operator}/{case.name}/{str(dtype).removeprefix('torch.')}"
                    run_case(compiler, case, dtype)
        if not options.case:
            wanted = {(*kernel, target) for kernel in kernels_of(operator) for target in compiler.targets}
            for module, kernel, target in sorted(wanted - compiler.compiled):
                compiler.errors.append(f"{module}.{kernel} was not compiled for sm_{target}")
    print(f"{len(compiler.seen)} kernels compiled, {len(compiler.errors)} errors")
    for error in compiler.errors:
        print(error.partition("\n")[0])
    return 1 if compiler.errors else 0


if __name__ == "__main__":
    sys.exit(main())
