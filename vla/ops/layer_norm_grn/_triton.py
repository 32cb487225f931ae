"""Both norms by Triton kernels, and the product behind them: in these kernels or by PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from .._maps import as_map, pixels
from . import _triton_linear, _triton_norms


def to_save(*args) -> list[Tensor]:
    """Statistics, and before a projection that is not in these kernels the normalised map, (B H W, C)."""
    x, *_, projection = args
    if projection is None:
        return _triton_norms.to_save(x)
    if _triton_linear.suits(x, projection, training=True):
        return _triton_linear.to_save(x)
    batch, channels, height, width = x.shape
    return [*_triton_norms.to_save(x), x.new_empty(batch * height * width, channels)]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, *parameters, dtype, projection = args
    if projection is None:
        return _triton_norms.forward(x, *parameters, dtype, saved)
    if _triton_linear.suits(x, projection, training=len(saved) > 0):
        return _triton_linear.forward(x, *parameters, dtype, projection, saved)
    *saved, rows = saved or (None,)
    normed = _triton_norms.forward(x, *parameters, None, saved, None if rows is None else as_map(rows, x))
    return as_map((pixels(normed) @ projection.to(x.dtype).T).to(dtype or x.dtype), x)


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, *parameters, dtype, projection = args
    if projection is None:
        return [*_triton_norms.backward(grads, x, *parameters, dtype, saved), None]
    if _triton_linear.suits(x, projection, training=True):
        return _triton_linear.backward(grads[0], x, *parameters, projection, saved)
    if not saved:
        saved = to_save(*args)
        _triton_norms.forward(x, *parameters, None, saved[:2], as_map(saved[2], x))
    *saved, rows = saved
    g, matrix = pixels(grads[0].to(x.dtype)), projection.to(x.dtype)
    return [*_triton_norms.backward([as_map(g @ matrix, x)], x, *parameters, None, saved), g.T @ rows]
