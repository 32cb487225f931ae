"""The one comparison of the tests, and the one table of tolerances."""

import torch

RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, relative: float | None = None) -> None:
    """Fails unless `actual` equals `expected` up to `relative` times the largest expected magnitude.

    Args:
        name: What is compared, for the message.
        actual: Result under test; its dtype picks the tolerance unless `relative` is given.
        expected: Reference, usually float64.
        relative: Allowed error over `max(|expected|)`.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    relative = RELATIVE[actual.dtype] if relative is None else relative
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().clamp_min(1e-30)
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= relative, f"{name}: relative error {error:.3g}, allowed {relative:.3g}"
