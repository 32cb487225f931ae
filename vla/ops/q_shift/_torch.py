"""Q-Shift as copies of slices into one result."""

import torch
from torch import Tensor


def shifted(x: Tensor, shift: int, gamma: float, head_dim: int | None) -> Tensor:
    """Q-Shift; a negative `shift` moves every group the other way, which is the adjoint."""
    channels = x.shape[1]
    out = torch.empty_like(x)
    head_dim = channels if head_dim is None else head_dim
    source, target = (t.unflatten(1, (-1, max(head_dim, 1))) for t in (x, out))
    borders = [int(head_dim * gamma * i) for i in range(5)]
    for group, (first, last) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        axis = -1 if group < 2 else -2
        step = shift if group % 2 == 0 else -shift
        _move(source[:, :, first:last], target[:, :, first:last], axis, step)
    target[:, :, borders[-1] :] = source[:, :, borders[-1] :]
    return out


def _move(source: Tensor, target: Tensor, axis: int, step: int) -> None:
    """target[i] = source[i - step] along an axis, zero where that is outside."""
    size = source.shape[axis]
    outside = min(abs(step), size)
    if step >= 0:
        target.narrow(axis, 0, outside).zero_()
        target.narrow(axis, outside, size - outside).copy_(source.narrow(axis, 0, size - outside))
    else:
        target.narrow(axis, size - outside, outside).zero_()
        target.narrow(axis, 0, size - outside).copy_(source.narrow(axis, outside, size - outside))


def forward(x: Tensor, shift: int, gamma: float, head_dim: int | None) -> Tensor:
    return shifted(x, shift, gamma, head_dim)


def backward(grads: list[Tensor], x: Tensor, shift: int, gamma: float, head_dim: int | None) -> list[Tensor]:
    return [shifted(grads[0], -shift, gamma, head_dim)]
