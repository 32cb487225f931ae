"""The option `per_sequence`, for backends that know decay and bonus per token only."""

from collections.abc import Callable
from functools import wraps

from torch import Tensor

from .._checks import state_dtype


def _per_token(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(w, u, k, v)
    return w.to(dtype) / k.shape[1], u.to(dtype) / k.shape[1]


def forward_per_sequence(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` with the argument `per_sequence` after its own."""

    @wraps(forward)
    def wrapped(w, u, k, v, gate, official_split, per_sequence=False):
        if per_sequence:
            w, u = _per_token(w, u, k, v)
        return forward(w, u, k, v, gate, official_split)

    return wrapped


def backward_per_sequence(backward: Callable[..., list[Tensor | None]]) -> Callable[..., list[Tensor | None]]:
    """`backward` with the argument `per_sequence` after its own."""

    @wraps(backward)
    def wrapped(grads, w, u, k, v, gate, official_split, per_sequence=False):
        if not per_sequence:
            return backward(grads, w, u, k, v, gate, official_split)
        gw, gu, *others = backward(grads, *_per_token(w, u, k, v), k, v, gate, official_split)
        return [gw / k.shape[1], gu / k.shape[1], *others]

    return wrapped
