"""Bi-WKV as two vectorised scans; see README.md for the derivation of the backward."""

import torch
from torch import Tensor

from .._checks import state_dtype
from .._recurrence import linear_recurrence_
from . import released


def _scan(w: Tensor, k: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens strictly before and strictly after each token.

    Args:
        w: (C,).
        k: Exponents, (T, B, C).
        values: V things to sum, (T, V, B, C).

    Returns:
        Sums (T, V, 2, B, C) and exponents (T, 2, B, C), past first: the sum of `exp(k_i - (|t - i| - 1) w) values_i` is
        `exp(exponent) * sum`, with the exponent near the largest one summed.
    """
    k = torch.stack((k, k.flip(0)), dim=1)
    values = torch.stack((values, values.flip(0)), dim=2)

    # The largest exponent so far, as a token and its age: aged by subtracting w at every step, it would drift.
    token = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    largest = (k + w * token).cummax(0)[1]
    top = k.gather(0, largest) - (token - largest) * w

    sums = torch.zeros_like(values)
    torch.mul(torch.exp(k - top).unsqueeze(1)[:-1], values[:-1], out=sums[1:])
    aged = (top[:-2] - w - top[1:-1]).masked_fill_(largest[:-2] == largest[1:-1], 0)
    keep = torch.cat((torch.zeros_like(top[:1]), aged.exp_()))[: len(k) - 1].unsqueeze(1)
    if len(keep) > 0:
        linear_recurrence_(keep, sums[1:])
    # No token yet: low enough to vanish beside any other exponent, finite so that differences are.
    nothing = top.new_full((), torch.finfo(top.dtype).min / 4)
    top = torch.cat((nothing.expand_as(top[:1]), top[:-1]))
    return (
        torch.stack((sums[:, :, 0], sums[:, :, 1].flip(0)), dim=2),
        torch.stack((top[:, 0], top[:, 1].flip(0)), dim=1),
    )


def _attend(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, denominator scaled by exp(-top), and top, (T, B, C); with the sums and exponents of `_scan` behind."""
    sums, exponents = _scan(w, k, torch.stack((v, torch.ones_like(v)), dim=1))
    own = k + u
    top = torch.maximum(exponents.amax(1), own)
    own = torch.exp(own - top)
    total = (sums * torch.exp(exponents - top.unsqueeze(1)).unsqueeze(1)).sum(2)
    denominator = total[:, 1] + own
    return (total[:, 0] + own * v) / denominator, denominator, top, sums, exponents


def centred(k: Tensor, v: Tensor, dim: int) -> Tensor:
    """Values less their mean under softmax(k) along the tokens, for the backward.

    Gradients see only differences `v_i - y_t`, formed as differences of sums: a common offset would cost their digits.
    """
    return v - (k.softmax(dim) * v).sum(dim, keepdim=True)


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, official_split: int | None) -> Tensor:
    if official_split is not None:
        return released.forward(w, u, k, v, official_split)
    dtype = state_dtype(w, u, k, v)
    k, v_ = (x.to(dtype).transpose(0, 1) for x in (k, v))
    return _attend(w.to(dtype), u.to(dtype), k, v_)[0].transpose(0, 1).to(v.dtype).contiguous()


def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, official_split: int | None
) -> list[Tensor]:
    if official_split is not None:
        return released.backward(grads, w, u, k, v, official_split)
    dtype = state_dtype(w, u, k, v)
    w, u = w.to(dtype), u.to(dtype)
    gy, k, v = (x.to(dtype).transpose(0, 1) for x in (grads[0], k, v))
    v = centred(k, v, dim=0)
    y, denominator, top, sums, exponents = _attend(w, u, k, v)
    gy = gy / denominator
    # The attention weight of token i at token t is exp(k_i - (|t - i| - 1) w - top_t) / denominator_t: transposed, the
    # same scan.
    grad_sums, grad_exponents = _scan(w, -top, torch.stack((gy, gy * y), dim=1))

    own = torch.exp(k + u - top) * gy
    gu = (own * (v - y)).sum((0, 1))
    total = (grad_sums * torch.exp(grad_exponents + k.unsqueeze(1)).unsqueeze(1)).sum(2)
    gv = total[:, 0] + own
    gk = v * total[:, 0] - total[:, 1] + own * (v - y)
    # d/dw counts, for a pair, the tokens between: at each, what came from one side meets what goes to the other.
    between = torch.exp(exponents + grad_exponents.flip(1) - w)
    met = sums[:, 0] * grad_sums[:, 0].flip(1) - sums[:, 1] * grad_sums[:, 1].flip(1)
    gw = -(between * met).sum((0, 1, 2))
    return [gw, gu, gk.transpose(0, 1), gv.transpose(0, 1)]
