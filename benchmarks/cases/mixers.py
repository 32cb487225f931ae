"""Token mixers as whole modules, which is what a block really pays."""

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vla.layers.groupmamba import GroupMambaMixer
from vla.layers.gspn import GSPNMixer
from vla.layers.mambavision import MambaVisionMixer
from vla.layers.ss2d import SS2D
from vla.layers.vrwkv import SpatialMix, SpatialMix6
from vla.ops import use_backend

from ..checks import check_close
from ..registry import Measurement, Options, case
from .models import autocast, captured, precision

# Name, module, channels, side, batch, milliseconds of the official forward and forward + backward on an H200.
MIXERS: tuple[tuple[str, Callable[[], nn.Module], int, int, int, tuple[float | None, float | None]], ...] = (
    ("VMamba SS2D", lambda: SS2D(96), 96, 56, 128, (4.53, 12.99)),
    ("VMamba SS2D", lambda: SS2D(192), 192, 28, 128, (2.06, 6.39)),
    ("VMamba SS2D", lambda: SS2D(384), 384, 14, 128, (1.31, 4.65)),
    ("GroupMamba layer", lambda: GroupMambaMixer(64), 64, 56, 128, (5.82, 14.18)),
    ("GroupMamba layer", lambda: GroupMambaMixer(348), 348, 14, 128, (4.52, 15.57)),
    ("GSPN mixer, local", lambda: GSPNMixer(96, chunk=2), 96, 56, 128, (15.16, 48.06)),
    ("GSPN mixer, local", lambda: GSPNMixer(192, chunk=2), 192, 28, 128, (7.40, 24.4)),
    ("GSPN mixer, global", lambda: GSPNMixer(384), 384, 14, 128, (6.62, 22.1)),
    ("VRWKV spatial mix", lambda: SpatialMix(192), 192, 14, 128, (0.93, 4.00)),
    ("VRWKV spatial mix", lambda: SpatialMix(384), 384, 14, 128, (1.79, 6.24)),
    ("VRWKV spatial mix", lambda: SpatialMix(192), 192, 64, 16, (1.49, 7.75)),
    ("VRWKV6 spatial mix", lambda: SpatialMix6(192), 192, 14, 128, (None, None)),
    ("MambaVision mixer", lambda: MambaVisionMixer(320), 320, 14, 128, (None, None)),
)
LIMITS = {"float32": 1e-3, "bfloat16 autocast": 3e-2}


def _check(module: nn.Module, x: Tensor, weight: Tensor) -> None:
    """Compares output and all gradients of a few pictures with float64 by PyTorch's path."""

    def outcome(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        inputs = inputs.detach().requires_grad_()
        y = network(inputs)
        grads = torch.autograd.grad(y, [inputs, *network.parameters()], weight.to(y.dtype))
        return y, torch.cat([grad.flatten() for grad in grads])

    with autocast(x.device):
        actual = outcome(module, x)
    with use_backend("torch"):
        expected = outcome(copy.deepcopy(module).double(), x.double())
    for what, a, e in zip(("output", "gradients"), actual, expected, strict=True):
        check_close(what, a, e, LIMITS[precision(x.device)])


@case()
def mixers(options: Options) -> Iterator[Measurement]:
    """Token mixers with their projections, forward and forward with backward: eager, and as a CUDA graph."""
    device = options.device

    def setup(
        create: Callable[[], nn.Module], size: tuple[int, ...], backward: bool, mode: str
    ) -> Callable[[], object]:
        torch.manual_seed(0)
        with torch.device(device):
            module = create()
            batch, channels, height, width = size
            x = torch.randn(batch, height, width, channels).permute(0, 3, 1, 2)
            weight = torch.randn_like(x)
        if device.type != "cpu":
            x = x.bfloat16()
        _check(module, x[:2], weight[:2])
        leaves = [x.requires_grad_(backward), *module.parameters()]

        def run() -> object:
            with torch.set_grad_enabled(backward), autocast(device):
                y = module(x)
            return torch.autograd.grad(y, leaves, weight.to(y.dtype)) if backward else y

        return captured(run) if mode == "graph" else run

    modes = [mode for mode in options.modes_of("eager", "graph") if "compiled" not in mode]
    comparable = options.batch is None and options.on_official_gpu
    for name, create, channels, side, batch, official in MIXERS:
        batch = options.batch or batch
        label = f"{name} C{channels} {side}x{side} B{batch}"
        details = {"module": label, "dtype": precision(device), "layout": "channels last"}
        for mode, backward in itertools.product(modes, (False, True)):
            what = "forward + backward" if backward else "forward"
            yield Measurement(
                f"{label} {what} {mode}",
                lambda c=create, s=(batch, channels, side, side), b=backward, m=mode: setup(c, s, b, m),
                details=details | {"pass": what, "mode": mode},
                official_ms=official[backward] if comparable else None,
            )
