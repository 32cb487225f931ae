"""Whoever wants to know of a module's calls, and whose modules are known."""

from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

# Packages whose modules' results depend on attributes, parameters and inputs alone.
PACKAGES = ("vla.layers.", "vla.models.", "timm.layers.", "torch.nn.modules.")
_OF_ALL_MODULES = (
    _global_forward_pre_hooks,
    _global_forward_hooks,
    _global_backward_pre_hooks,
    _global_backward_hooks,
)


def has_global_hooks() -> bool:
    """Whether there are hooks on the calls of all modules."""
    return any(_OF_ALL_MODULES)


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """What a module itself keeps of hooks on its calls."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`, or something else."""
    # Tools that move weights put a `forward` of their own on a module, `Module.compile` what it calls instead.
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return True
    return any(hooks_of(module)) or has_global_hooks()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, not one that replaced it, and nobody waits for its call."""
    return type(module) is kind and not has_hooks(module)
