"""Batch-1 latency of whole models on the CPU, beside timm's peers in the same run."""

import copy
from collections.abc import Callable, Iterator

import timm
import torch

import vla  # noqa: F401  registers its models with timm
from vla.ops import use_backend

from ..checks import check_close
from ..registry import Measurement, Options, case
from .models import PEERS, TINY


def _measure(name: str, backend: str | None) -> Measurement:
    def setup() -> Callable[[], torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))

        def run() -> torch.Tensor:
            with use_backend(backend), torch.inference_mode():
                return model(x)

        with use_backend("torch"), torch.inference_mode():
            expected = copy.deepcopy(model).double()(x.double())
        check_close(name, run(), expected, 1e-4)
        return run

    details = {"model": name, "backend": backend or "default", "size": 224, "batch": 1, "dtype": "float32"}
    return Measurement(name if backend is None else f"{name}, {backend} backend", setup, details=details, items=1)


@case(in_turns=True)
def cpu_models(options: Options) -> Iterator[Measurement]:
    """One 224 x 224 picture in float32, eager, in evaluation, on a CPU."""
    for name in (*PEERS, *TINY):
        for backend in (None, "torch") if name in TINY else (None,):
            yield _measure(name, backend)
