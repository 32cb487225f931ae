"""Batch-1 latency of whole models on the CPU, beside timm's peers in the same run."""

from collections.abc import Iterator

import timm
import torch

import vla  # noqa: F401  registers its models with timm
from vla.ops import use_backend

from ..registry import Measurement, case

PEERS = ("swin_tiny_patch4_window7_224", "deit_small_patch16_224", "convnext_tiny", "mambaout_tiny")
OURS = ("vmamba_tiny_s1l8", "mambavision_tiny", "vrwkv_tiny", "vrwkv6_tiny", "gspn_tiny", "groupmamba_tiny")


def _measure(name: str, backend: str | None, model: torch.nn.Module, x: torch.Tensor) -> Measurement:
    def run() -> torch.Tensor:
        with use_backend(backend), torch.inference_mode():
            return model(x)

    def check() -> None:
        actual = run()
        with use_backend("torch"), torch.inference_mode():
            expected = model.double()(x.double())
        model.float()
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"{name}: relative error {error:.2g}"

    details = {
        "model": name,
        "backend": backend or "default",
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": 224,
        "batch": 1,
        "dtype": "float32",
    }
    return Measurement(name if backend is None else f"{name}, {backend} backend", run, check, details=details, items=1)


@case
def cpu_models(device: torch.device) -> Iterator[Measurement]:
    """One 224 x 224 picture in float32, eager, in evaluation."""
    registered = set(timm.list_models())
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name in (*PEERS, *OURS):
        if name in registered:
            torch.manual_seed(0)
            model = timm.create_model(name).eval()
            for backend in (None, "torch") if name in OURS else (None,):
                yield _measure(name, backend, model, x)
