"""The projection of all pixels as one matrix product, and what it makes of a backend of `line_scan`."""

from types import ModuleType

from torch import Tensor

from .._maps import as_map, pixels


def scan_arguments(projected: Tensor, args: tuple) -> tuple:
    """The arguments of `line_scan`, from the proxy (B H W, S) and the arguments here."""
    x, _, gates, lam, u, skip, directions, chunk, aligned = args
    return x, gates, lam, u, skip, as_map(projected, x), directions, chunk, True, aligned


def forward(scan: ModuleType, args: tuple) -> Tensor:
    """The forward, by a backend of `line_scan`."""
    x, weight, *_ = args
    return scan.forward(*scan_arguments(pixels(x) @ weight.to(x.dtype).T, args))


def backward(scan: ModuleType, grads: list[Tensor], args: tuple) -> list[Tensor | None]:
    """The backward, by a backend of `line_scan`."""
    x, weight, *_ = args
    rows, matrix = pixels(x), weight.to(x.dtype)
    gx, *g_weights, g_proxy = scan.backward(grads, *scan_arguments(rows @ matrix.T, args))
    g_rows = pixels(g_proxy).to(x.dtype)
    return [gx.to(x.dtype) + as_map(g_rows @ matrix, x), g_rows.T @ rows, *g_weights]
