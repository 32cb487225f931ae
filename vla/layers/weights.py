"""Weights in 16 bits, which a compiled network has from its parameters by one launch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .hooks import PACKAGES

__all__ = ["Exact", "Form", "product_weights"]


class Exact(NamedTuple):
    """What takes the place of a parameter in float32."""

    form: Tensor


# What a module says of a parameter, see `product_weights`.
Form = Tensor | Exact | None


def _collect(module: nn.Module, path: str, forms: dict[str, Form]) -> None:
    """Adds what a module and those in it want; what one outside of it has said stays."""
    # Modules of other packages may do anything with the weights of theirs.
    if not type(module).__module__.startswith(PACKAGES):
        return
    if hasattr(module, "product_weights"):
        for name, form in module.product_weights().items():
            forms.setdefault(path + name, form)
    elif type(module) is nn.Linear:
        forms.setdefault(path + "weight", module.weight)
    for name, child in module.named_children():
        _collect(child, f"{path}{name}.", forms)


def product_weights(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What layers take in the place of their parameters in float32, by the parameters' names.

    A compiler has one launch for every weight to be cast, laid out or padded. Here there is one for all.

    Args:
        network: Linear layers are taken as they are. Modules with a method `product_weights` return a dictionary:
            tensors by the names of parameters in them, in any shape that their `forward` takes in the place of the
            parameter, or None where it takes nothing but the parameter. It counts for the modules in them, too. Those
            that are `Exact` stay in float32.
        dtype: dtype of 16 bits.

    Returns:
        Tensors for `torch.func.functional_call`.
    """
    forms: dict[str, Form] = {}
    _collect(network, "", forms)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    names, sources, results = [], [], []
    for name, form in forms.items():
        form, result_dtype = (form.form, torch.float32) if isinstance(form, Exact) else (form, dtype)
        # Neither what is parametrised nor what is a tensor of another kind.
        known = name in parameters and type(parameters[name]) is nn.Parameter
        if form is not None and known and form.dtype == torch.float32:
            names.append(name)
            sources.append(form)
            results.append(form.new_empty(form.shape, dtype=result_dtype))
    if results:
        # The largest first: programs of a compiler's kernel ask for one weight after the other whether they are its.
        order = sorted(range(len(sources)), key=lambda i: -sources[i].numel())
        torch._foreach_copy_([results[i] for i in order], [sources[i] for i in order])
    return dict(zip(names, results, strict=True))
