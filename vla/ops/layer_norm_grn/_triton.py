"""Both norms by Triton kernels, and the product behind them: in these kernels or by PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from .._maps import as_map, pixels
from . import _triton_linear, _triton_norms


def to_save(*args) -> list[Tensor]:
    """With a projection: statistics for the kernels that know it, else the normalised map, (B H W, C)."""
    x, *_, projection = args
    if projection is None:
        return []
    if _triton_linear.suits(x, projection):
        return _triton_linear.to_save(x)
    batch, channels, height, width = x.shape
    return [x.new_empty(batch * height * width, channels)]


def forward(*args, saved: Sequence[Tensor] = ()) -> Tensor:
    x, *parameters, dtype, projection = args
    if projection is None:
        return _triton_norms.forward(x, *parameters, dtype)
    if _triton_linear.suits(x, projection):
        return _triton_linear.forward(x, *parameters, dtype, projection, saved)
    normed = _triton_norms.forward(x, *parameters, None, out=as_map(saved[0], x) if saved else None)
    return as_map((pixels(normed) @ projection.to(x.dtype).T).to(dtype or x.dtype), x)


def backward(grads: list[Tensor], *args, saved: Sequence[Tensor] = ()) -> list[Tensor | None]:
    x, *parameters, dtype, projection = args
    if projection is None:
        return [*_triton_norms.backward(grads, x, *parameters, dtype), None]
    if _triton_linear.suits(x, projection):
        return _triton_linear.backward(grads[0], x, *parameters, projection, saved)
    rows = saved[0] if saved else pixels(_triton_norms.forward(x, *parameters, None))
    g, matrix = pixels(grads[0].to(x.dtype)), projection.to(x.dtype)
    return [*_triton_norms.backward([as_map(g @ matrix, x)], x, *parameters, None), g.T @ rows]
