"""Runs the tests' tensors, and so the operators' kernels, on another device than the CPU."""

import functools
import os
import warnings
from collections.abc import Callable

import torch


def use(device: str) -> None:
    """Makes tensors on `device` by default and float32 exact there."""
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # Without it, cuBLAS says at every product that it is not deterministic.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    from_numpy = torch.from_numpy
    torch.from_numpy = lambda array: from_numpy(array).to(device)
    torch.compile = _without_default_device(torch.compile)


def _without_default_device(compile: Callable) -> Callable:
    # Dynamo (torch 2.11) cannot trace `Tensor.unflatten` where there is a default device.
    def outside(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            device = torch.get_default_device()
            torch.set_default_device(None)
            try:
                return function(*args, **kwargs)
            finally:
                torch.set_default_device(device)

        return call

    @functools.wraps(compile)
    def compiled(*args, **kwargs):
        result = compile(*args, **kwargs)
        if not isinstance(result, torch.nn.Module):
            return outside(result)
        result.forward = outside(result.forward)
        return result

    return compiled
