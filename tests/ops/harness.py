"""What every operator's tests do: run a backend with all gradients, and pass through PyTorch's machinery."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import golden
from tests.tolerance import assert_close
from vla.ops import use_backend

Tensors = dict[str, Tensor | None]


def randn(seed: int) -> Callable[..., Tensor]:
    """A source of reproducible standard normal float64 tensors, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        values = torch.randn(*size, dtype=torch.float64, device="cpu", generator=generator)
        return values.to(torch.get_default_device())

    return draw


def run(backend: str | None, function: Callable, tensors: Tensors, **options) -> dict[str, Tensor]:
    """Outputs of `function(**tensors, **options)` and the gradients of all tensors, by name.

    The loss weighs every output entry differently, so that no permutation of gradients goes unnoticed.
    """
    leaves = {n: t if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    with use_backend(backend):
        outputs = function(**leaves, **options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        weights = [torch.from_numpy(golden.fill_tensor(f"loss{i}", o.shape)) for i, o in enumerate(outputs)]
        torch.autograd.backward(outputs, [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)])
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"grad of {n}": t.grad for n, t in leaves.items() if t is not None}


def compare(
    backend: str | None, function: Callable, tensors: Tensors, relative: float | None = None, **options
) -> None:
    """Fails unless a backend gives the outputs and gradients of the definition in float64, in the tensors' dtypes."""
    expected = run("naive", function, {n: t if t is None else t.double() for n, t in tensors.items()}, **options)
    actual = run(backend, function, tensors, **options)
    for name, value in actual.items():
        if name.startswith("grad of "):
            assert value.dtype == tensors[name.removeprefix("grad of ")].dtype, name
        assert_close(name, value, expected[name], relative)


def check_saving(function: Callable, leaves: list[Tensor], overload, arguments: tuple) -> None:
    """Compilers see an operator whose kernels save, and give the direct path's gradients.

    Args:
        function: The public function of the leaves.
        leaves: Tensors that require gradients.
        overload: The dispatcher's overload of the operator that saves.
        arguments: Arguments of the operator, none of them requiring gradients.
    """

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    with use_backend("triton"):
        expected = gradients(function)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, gradients(compiled), expected))
        results = torch.library.opcheck(overload, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def check_machinery(module: nn.Module, inputs: tuple[Tensor, ...], overload, arguments: tuple) -> None:
    """opcheck on the operator; compile, export, fx and script on a module that calls its public function.

    Args:
        module: Module whose forward calls the function.
        inputs: Arguments of the module.
        overload: The dispatcher's overload of the operator.
        arguments: Arguments of the operator, some of them requiring gradients.
    """
    results = torch.library.opcheck(overload, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    expected = module(*inputs)
    traced = {
        "compile": torch.compile(module, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(module, inputs).module(),
        "fx": torch.fx.symbolic_trace(module),
        "script": torch.jit.script(module),
    }
    for name, version in traced.items():
        assert torch.equal(version(*inputs), expected), name
