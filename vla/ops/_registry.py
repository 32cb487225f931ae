"""How an operator of this package becomes a `torch.library` operator with interchangeable backends."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from . import _ahead, _replay
from ._transforms import register_vmap, transform

BACKENDS = ("naive", "torch", "numba", "triton")
# The first version, that of torch 2.8, which compiles all kernels (`tl.flip` along the first axis, `tl.gather`).
MIN_TRITON = (3, 4)

# Types of arguments that neither a compiler nor a subclass of tensors has made.
_PLAIN = frozenset((Tensor, Parameter, bool, int, float, str, list, tuple, torch.dtype, type(None)))

_LIBRARY = torch.library.Library("vla", "FRAGMENT")
_override: str | None = None


def _validate_backend(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_override = _validate_backend(os.environ.get("VLA_BACKEND") or None, "environment variable VLA_BACKEND")
# That, and what `use_backend` has set where it has not been left yet.
_settings: list[list[str | None]] = [[_override]]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every operator of `vla.ops` with one backend instead of the device's own choice.

    The setting is process-wide, like the flags under `torch.backends`, so that it also holds in autograd's threads.
    The environment variable `VLA_BACKEND` sets it from outside.

    Args:
        name: `'naive'` (the definition, slow), `'torch'` (vectorised PyTorch, any device), `'numba'` (compiled CPU
            kernels), `'triton'` (GPU kernels), or `None` for the default: Triton on GPUs, Numba on CPUs when it is
            installed, PyTorch elsewhere.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: By an operator called inside, where the backend cannot run (never a silent fallback).
    """
    global _override
    setting = [_validate_backend(name, "use_backend")]
    _settings.append(setting)
    _override = setting[0]
    try:
        yield
    finally:
        # Threads may leave in another order than they came.
        _settings[:] = [other for other in _settings if other is not setting]
        _override = _settings[-1][0]


class Operator:
    """A `torch.library` operator `vla::<name>` with its backward operator `vla::<name>_backward`.

    A backend is a module of the operator's folder, `naive.py` or `_<backend>.py`, imported at its first use, with two
    functions: `forward(*args)` returning the outputs, and `backward(grads, *args)` taking one gradient per output
    and returning one gradient (or None) per tensor argument. Without a `backward`, or where that returns None, autograd
    differentiates `forward`, that of `_torch.py` for kernels.
    (A submodule plainly called `torch` would shadow the library in its package's namespace.)

    One backend's forward may leave more for its backward than the arguments. Its `to_save(*args)` returns empty
    tensors, whose number and shapes are a function of the arguments' sizes and dtypes; `forward(*args, saved=...)`
    fills them when a gradient is wanted, `backward(grads, *args, saved=...)` gets them, and without `saved` both do
    without. For the dispatcher that forward is `vla::<name>_train`, which returns the tensors after the outputs. It
    stands below autograd: callers and exported programs see `vla::<name>` alone. What a compiler has traced with such
    a backend keeps to it, and what has been saved goes to the backward of the same.

    Args:
        name: Operator name inside the `vla` namespace.
        schema: Operator schema, e.g. `"(Tensor x, Tensor? bias, bool flag) -> Tensor"`. No aliasing.
        package: Name of the package that holds the backend modules.
        backends: Backends that exist, in `BACKENDS`.
        infer: `infer(*args)` checks the arguments (raises `ValueError` or `TypeError` with one clear line) and returns
            empty outputs of the right shape and dtype. It runs before every forward, real and fake.
        flops: Number of floating-point operations of a forward, from the arguments' shapes (tensors are replaced by
            their `torch.Size`).
        exact_strides: Whether a compiler has to hand maps over with the strides that they have in eager mode. Else it
            keeps the order of their dimensions, and may pad rows.
        saves: The backend that has `to_save`.
        kernel_dtypes: dtypes of the first tensor that there are Triton kernels for; PyTorch serves the others.
        without_gradient: Names of tensor arguments that the operator has no gradients for.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        package: str,
        backends: Sequence[str],
        infer: Callable,
        flops: Callable[..., int],
        exact_strides: bool = True,
        saves: str | None = None,
        kernel_dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
        without_gradient: Sequence[str] = (),
    ):
        self.name = name
        self.package = package
        self.backends = tuple(backends)
        self.infer = infer
        self.saves = saves
        self._forward_replays, self._train_replays, self._backward_replays = (_replay.Replays() for _ in range(3))
        self.kernel_dtypes = tuple(kernel_dtypes)
        self._modules: dict[str, ModuleType] = {}
        self._warned = False

        qualname = f"vla::{name}"
        tags = (torch.Tag.pt2_compliant_tag,)
        if not exact_strides and hasattr(torch.Tag, "needs_fixed_stride_order"):
            tags += (torch.Tag.needs_fixed_stride_order,)
        torch.library.define(qualname, schema, tags=tags)
        self._overload = getattr(torch.ops.vla, name).default
        forward_schema = self._overload._schema
        self.arguments = [a.name for a in forward_schema.arguments]
        types = [str(a.type) for a in forward_schema.arguments]
        self.tensor_arguments = [i for i, kind in enumerate(types) if kind in ("Tensor", "Optional[Tensor]")]
        self._optional = frozenset(i for i, kind in enumerate(types) if kind == "Optional[Tensor]")
        self._has_string_lists = "List[str]" in types
        self.without_gradient = frozenset(self.arguments.index(name) for name in without_gradient)
        inputs, outputs = (part.strip().removeprefix("(").removesuffix(")") for part in schema.split("->"))
        torch.library.define(
            f"{qualname}_backward",
            f"(Tensor[] grad_outputs, Tensor[] saved, {inputs}) -> Tensor[]",
            tags=tags,
        )

        torch.library.impl(qualname, "default", self._forward)
        torch.library.register_fake(qualname, self._fake)
        if saves is None:
            torch.library.register_autograd(qualname, self._autograd_backward, setup_context=self._setup_context)
        else:
            torch.library.define(f"{qualname}_train", f"({inputs}) -> ({outputs}, Tensor[])", tags=tags)
            torch.library.impl(f"{qualname}_train", "default", self._train)
            torch.library.register_fake(f"{qualname}_train", self._fake_train)
            self._train_overload = getattr(torch.ops.vla, f"{name}_train").default
            _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        torch.library.impl(f"{qualname}_backward", "default", self._backward)
        torch.library.register_fake(f"{qualname}_backward", self._fake_backward)
        register_vmap(self._overload)
        register_vmap(getattr(torch.ops.vla, f"{name}_backward").default)

        def forward_flops(*args, out_shape=None, **kwargs) -> int:
            return flops(*args, **kwargs)

        def backward_flops(grad_outputs, saved, *args, out_shape=None, **kwargs) -> int:
            # The forward recomputed, and two products where it had one.
            return 3 * flops(*args, **kwargs)

        register_flop_formula(getattr(torch.ops.vla, name))(forward_flops)
        if saves is not None:
            register_flop_formula(getattr(torch.ops.vla, f"{name}_train"))(forward_flops)
        register_flop_formula(getattr(torch.ops.vla, f"{name}_backward"))(backward_flops)

    def __call__(self, *args):
        """The operator of these arguments, straight to its backend unless somebody has to see it.

        The dispatcher and the autograd that `torch.library` registers take the host several times as long as to launch
        the kernels.
        """
        if self._is_observed(args):
            if torch.compiler.is_compiling():
                return self._overload(*args)
            if torch._C._are_functorch_transforms_active():
                return transform(self, *args)
            if torch._C._is_tracing() and self._has_string_lists:
                return self._script(**dict(zip(self.arguments, args, strict=True)))
            # A recording of more than this operator goes on with its launches.
            if _replay.current() is None:
                return self._overload(*args)
        # Forward-mode derivatives, which are not subject to `no_grad`, there are none of: autograd says so.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return _Direct.apply(self, *args)
        return self._forward(*args)

    @cached_property
    def _script(self) -> torch.jit.ScriptFunction:
        """The public function as TorchScript: `torch.jit.trace` takes its calls, and no lists of strings otherwise."""
        return torch.jit.script(getattr(importlib.import_module(self.package), self.name))

    def _is_observed(self, args: tuple) -> bool:
        """Whether a compiler, a tracer, a mode, a transform of `torch.func` or a subclass of tensors looks on."""
        if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
            return True
        if torch._C._are_functorch_transforms_active():
            return True
        return not _PLAIN.issuperset(map(type, args)) or getattr(args[self.tensor_arguments[0]], "is_meta", True)

    def backend_for(self, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """Name of the backend that serves tensors on `device` under the current `use_backend` setting.

        Triton's kernels keep float32 states; the rare float64 (`gradcheck`) goes to the vectorised PyTorch code, as do
        other dtypes that an operator has no kernels for.
        """
        if _override is not None:
            problem = self._obstacle(_override, device, dtype)
            if problem:
                raise RuntimeError(f"{self.name}: backend {_override!r} {problem}")
            return _override
        preferred = {"cpu": "numba", "cuda": "triton", "xpu": "triton"}.get(device.type)
        if preferred == "triton" and dtype not in self.kernel_dtypes:
            preferred = None
        if preferred is not None:
            problem = self._obstacle(preferred, device, dtype)
            if problem is None and (torch.version.hip is not None or device.type == "xpu"):
                problem = "has only been tried on NVIDIA's GPUs (`use_backend` tries it here)"
            if problem is None:
                return preferred
            # Without Numba a CPU is still served as usual; a GPU without Triton is slow, which must not stay unnoticed.
            if preferred == "triton" and not self._warned:
                self._warned = True
                warnings.warn(f"{self.name}: backend 'triton' {problem}; using slower PyTorch code", stacklevel=3)
        return "torch"

    def _obstacle(self, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why `backend` cannot serve tensors of `dtype` on `device`, or None when it can."""
        if backend not in self.backends:
            return f"does not exist, there are {', '.join(self.backends)}"
        if backend in ("numba", "triton") and not _is_installed(backend):
            return f"needs the package {backend}, which is not installed"
        if backend == "numba" and device.type != "cpu":
            return f"runs on the CPU, the tensors are on {device}"
        if backend == "triton" and triton_version() < MIN_TRITON:
            return "needs Triton {}.{} or newer, {}.{} is installed".format(*MIN_TRITON, *triton_version())
        if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"runs on GPUs, the tensors are on {device} (TRITON_INTERPRET=1 interprets kernels there, slowly)"
        if backend == "triton" and dtype not in self.kernel_dtypes:
            return f"has kernels for {_names(self.kernel_dtypes)}, the tensors are {_names([dtype])}"
        return None

    def _load(self, backend: str) -> ModuleType:
        """The module of a backend."""
        if backend not in self._modules:
            module = backend if backend == "naive" else f"_{backend}"
            self._modules[backend] = importlib.import_module(f"{self.package}.{module}")
        return self._modules[backend]

    def _check_devices(self, args: tuple) -> torch.device:
        """The device of the first tensor; raises `TypeError` for what is none, `ValueError` for one elsewhere."""
        first = args[self.tensor_arguments[0]].device
        for i in self.tensor_arguments[1:]:
            if args[i] is None and i in self._optional:
                continue
            if not isinstance(args[i], Tensor):
                raise TypeError(f"{self.name}: {self.arguments[i]} is a {type(args[i]).__name__}, expected a tensor")
            if args[i].device != first:
                raise ValueError(
                    f"{self.name}: {self.arguments[i]} is on {args[i].device}, "
                    f"expected {first} like {self.arguments[self.tensor_arguments[0]]}"
                )
        return first

    def _forward(self, *args):
        return self._forward_replays(self._run, args[self.tensor_arguments[0]], _override, *args)

    def _checked(self, args: tuple) -> torch.device:
        """The device of the tensors, after all checks of the arguments."""
        device = self._check_devices(args)
        if _replay.current() is None:  # else they have passed
            self.infer(*args)
        return device

    def _run(self, *args):
        device = self._checked(args)
        with _replay.full_precision(device), _current(device):
            return self._load(self.backend_for(device, args[self.tensor_arguments[0]].dtype)).forward(*args)

    def _is_saving(self, args: tuple) -> bool:
        """Whether the backend that serves these arguments has more to save than them."""
        first = args[self.tensor_arguments[0]]
        return self.saves is not None and self.backend_for(first.device, first.dtype) == self.saves

    def _train(self, *args) -> tuple:
        """The outputs, and a list of what else the backward gets."""
        return self._train_replays(self._run_train, args[self.tensor_arguments[0]], _override, *args)

    def _run_train(self, *args) -> tuple:
        device, module = self._checked(args), self._load(self.saves)
        with _replay.full_precision(device), _current(device):
            saved = module.to_save(*args)
            outputs = module.forward(*args, saved=saved)
        return *_as_tuple(outputs), saved

    def _fake_train(self, *args) -> tuple:
        if _ahead.current() is not None:
            return self._run_train(*args)
        return *_as_tuple(self._fake(*args)), self._load(self.saves).to_save(*args)

    def _autograd(self, keyset: torch._C.DispatchKeySet, *args):
        """What `torch.library.register_autograd` would register, for an operator that saves."""
        keyset &= torch._C._after_autograd_keyset
        tensors = (args[i] for i in self.tensor_arguments if args[i] is not None)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Dispatched.apply(self, keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload.redispatch(keyset, *args)

    def _fake(self, *args):
        if _ahead.current() is not None:
            return self._run(*args)
        self._check_devices(args)
        return self.infer(*args)

    def _setup_context(self, ctx, inputs, output, saved=()) -> None:
        ctx.save_for_backward(*(inputs[i] for i in self.tensor_arguments), *saved)
        ctx.constants = [None if i in self.tensor_arguments else value for i, value in enumerate(inputs)]

    def _autograd_backward(self, ctx, *grads):
        args, saved = self._saved(ctx)
        results = getattr(torch.ops.vla, f"{self.name}_backward")(list(grads), saved, *args)
        wanted = self._differentiable(args)
        return self._for_arguments(
            [r if i in wanted else None for r, i in zip(results, self.tensor_arguments, strict=True)]
        )

    def _differentiable(self, args: Sequence) -> list[int]:
        """Places of the tensors that there are gradients of."""
        return [i for i in self.tensor_arguments if args[i] is not None and i not in self.without_gradient]

    def _saved(self, ctx) -> tuple[list, list[Tensor]]:
        """The arguments that `_setup_context` saved, and what else."""
        args, tensors = list(ctx.constants), ctx.saved_tensors
        count = len(self.tensor_arguments)
        for i, tensor in zip(self.tensor_arguments, tensors[:count], strict=True):
            args[i] = tensor
        return args, list(tensors[count:])

    def _for_arguments(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the tensor arguments as those of all arguments."""
        results: list[Tensor | None] = [None] * len(self.arguments)
        for i, grad in zip(self.tensor_arguments, grads, strict=True):
            results[i] = grad
        return tuple(results)

    def _gradients(self, grads: list[Tensor], saved: list[Tensor], args: Sequence) -> list[Tensor | None]:
        """One gradient per tensor argument, None for absent ones."""
        first = args[self.tensor_arguments[0]]
        counts = (len(grads), len(saved))
        return self._backward_replays(self._run_backward, first, _override, *counts, *grads, *saved, *args)

    def _run_backward(self, outputs: int, kept: int, *args) -> list[Tensor | None]:
        """`_gradients`, from the gradients of `outputs` tensors, `kept` tensors that were saved, and the arguments."""
        grads, saved, args = list(args[:outputs]), list(args[outputs : outputs + kept]), args[outputs + kept :]
        tensors = [args[i] for i in self.tensor_arguments]
        device = tensors[0].device
        backend = self.saves if saved else self.backend_for(device, tensors[0].dtype)
        module = self._load(backend)
        with _replay.full_precision(device), _current(device):
            results = None
            if saved:
                results = module.backward(grads, *args, saved=saved)
            elif hasattr(module, "backward"):
                results = module.backward(grads, *args)
            if results is None:
                # Kernels of inference alone leave that to PyTorch's own operators.
                plain = module if backend in ("naive", "torch") else self._load("torch")
                results = self._differentiate(plain.forward, grads, args)
        wanted = self._differentiable(args)
        gradients = zip(self.tensor_arguments, results, strict=True)
        return [_as_gradient(g, args[i]) if i in wanted else None for i, g in gradients]

    def _backward(self, grads: list[Tensor], saved: list[Tensor], *args) -> list[Tensor]:
        return _present(self._gradients(grads, saved, args), args[self.tensor_arguments[0]])

    def _fake_backward(self, grads: list[Tensor], saved: list[Tensor], *args) -> list[Tensor]:
        if _ahead.current() is not None:
            results = self._run_backward(len(grads), len(saved), *grads, *saved, *args)
            return _present(results, args[self.tensor_arguments[0]])
        wanted, first = self._differentiable(args), args[self.tensor_arguments[0]]
        return [torch.empty_like(args[i]) if i in wanted else first.new_empty(0) for i in self.tensor_arguments]

    def _differentiate(self, forward: Callable, grads: list[Tensor], args: Sequence) -> list[Tensor | None]:
        inputs, places = list(args), self._differentiable(args)
        for i in places:
            inputs[i] = inputs[i].detach().requires_grad_(inputs[i].is_floating_point())
        with torch.enable_grad():
            outputs = _as_tuple(forward(*inputs))
            wanted = [inputs[i] for i in places]
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        results = (next(found) if i in places else None for i in self.tensor_arguments)
        # Autograd may hand an incoming gradient through, but an operator's outputs must not alias its inputs.
        return [None if grad is None else grad.clone() for grad in results]


class _Direct(torch.autograd.Function):
    """Autograd of an operator that nobody looks on, see `Operator.__call__`."""

    # Not with a `setup_context`: `apply` would spend more time on its signature than on all the rest.
    @staticmethod
    def forward(ctx, operator: Operator, *args):
        ctx.operator = operator
        # Without a wanted gradient, nothing reads what a forward saves.
        if any(ctx.needs_input_grad) and operator._is_saving(args):
            outputs, saved = _outputs_and_saved(operator._train(*args))
        else:
            outputs, saved = operator._forward(*args), ()
        operator._setup_context(ctx, args, outputs, saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        operator = ctx.operator
        args, saved = operator._saved(ctx)
        return None, *operator._for_arguments(operator._gradients(list(grads), saved, args))


class _Dispatched(torch.autograd.Function):
    """Autograd of an operator that saves, by way of the dispatcher."""

    @staticmethod
    def forward(ctx, operator: Operator, keyset: torch._C.DispatchKeySet, *args):
        ctx.operator = operator
        with torch._C._AutoDispatchBelowAutograd():
            if operator._is_saving(args):
                outputs, saved = _outputs_and_saved(operator._train_overload.redispatch(keyset, *args))
            else:
                outputs, saved = operator._overload.redispatch(keyset, *args), ()
        operator._setup_context(ctx, args, outputs, saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, None, *ctx.operator._autograd_backward(ctx, *grads)


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """What a forward returns, one tensor or several, as several."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _outputs_and_saved(results: tuple) -> tuple[Tensor | tuple[Tensor, ...], list[Tensor]]:
    """What `vla::<name>_train` returns, as what `vla::<name>` does and the rest."""
    *outputs, saved = results
    return outputs[0] if len(outputs) == 1 else tuple(outputs), saved


def _present(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator's schema has no optional results: an absent argument gets an empty gradient."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor number of the Triton that is installed."""
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


def _current(device: torch.device) -> AbstractContextManager:
    """The GPU of the tensors as the current one: that is where Triton launches."""
    # Asked first because to enter a device takes the host longer, also the one that is current.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def _as_gradient(grad: Tensor | None, tensor: Tensor) -> Tensor:
    """`grad` with the dtype and memory layout that the fake kernel promises for a gradient of `tensor`."""
    if grad is None:
        return torch.zeros_like(tensor)
    # A part of a larger tensor may start anywhere; compiled code takes new tensors to start at 16 bytes.
    if _ahead.address(grad) % 16:
        grad = grad.clone()
    # Asked first because a new tensor takes the host longer: dense tensors hand their strides on.
    if grad.dtype == tensor.dtype and grad.stride() == tensor.stride() and _is_dense(tensor):
        return grad
    out = torch.empty_like(tensor)
    # Strides of single entries say nothing: those of depthwise kernels differ in channels-last memory.
    strides = zip(grad.shape, grad.stride(), out.stride(), strict=True)
    if grad.dtype == out.dtype and all(size == 1 or given == wanted for size, given, wanted in strides):
        return grad.as_strided(out.shape, out.stride())
    return out.copy_(grad)


def _is_dense(tensor: Tensor) -> bool:
    """Whether `torch.empty_like` gives a tensor of the same strides; False also for rarer layouts that are dense."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
