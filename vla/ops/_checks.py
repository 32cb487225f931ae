"""One-line errors for operator arguments: the argument, what it was, what is wanted."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(op: str, name: str, tensor: Tensor, wanted: tuple[int, ...], pattern: str) -> None:
    """Raises `ValueError` unless `tensor` has the shape `wanted`, which `pattern` spells for the reader."""
    if tensor.shape != wanted:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {pattern} = {tuple(wanted)}")


def check_ndim(op: str, name: str, tensor: Tensor, ndims: tuple[int, ...], pattern: str) -> None:
    """Raises `ValueError` unless `tensor` has one of the numbers of dimensions `ndims`."""
    if tensor.dim() not in ndims:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {pattern}")


def convolved_size(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the convolution of maps x (B, C, H, W) with weight (D, C, KH, KW)."""
    height, width = ((x.shape[i] + 2 * padding[i - 2] - weight.shape[i]) // stride[i - 2] + 1 for i in (2, 3))
    return height, width


def check_convolution(op: str, x: Tensor, weight: Tensor) -> None:
    """Raises `ValueError` unless weight (D, C, KH, KW) is one for maps x (B, C, H, W)."""
    check_ndim(op, "x", x, (4,), "(B, C, H, W)")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (D, C, KH, KW) with C = {x.shape[1]}")


def check_window(op: str, x: Tensor, weight: Tensor, size: tuple[int, int]) -> None:
    """Raises `ValueError` unless x and its padding have room for a window: `size` is that of the convolution."""
    if min(*weight.shape, *size) < 1:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected a window within x of {tuple(x.shape)} and padding"
        )


def check_map(op: str, x: Tensor) -> None:
    """Raises `ValueError` unless x is a map with something in each picture."""
    check_ndim(op, "x", x, (4,), "(B, D, H, W)")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected at least one channel and one pixel")


def check_directions(op: str, directions: list[str], known: tuple[str, ...]) -> None:
    """Raises `ValueError` unless there are `directions`, all of them `known`."""
    for direction in directions:
        if direction not in known:
            raise ValueError(f"{op}: unknown direction {direction!r}, expected one of {', '.join(known)}")
    if not directions:
        raise ValueError(f"{op}: directions is empty, expected at least one of {', '.join(known)}")


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Raises `TypeError` unless every given tensor is real floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected a real floating-point type")


def check_result_dtype(op: str, dtype: torch.dtype | None) -> None:
    """Raises `TypeError` unless the dtype asked for is real floating point."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, expected a real floating-point type")


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """dtype of states and reductions: float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
