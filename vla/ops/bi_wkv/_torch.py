"""Bi-WKV as two vectorised scans; see README.md for the derivation of the backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import state_dtype
from .._recurrence import linear_recurrence_
from . import released
from ._per_sequence import backward_per_sequence, forward_per_sequence


class Sums(NamedTuple):
    """Sums of `exp(k_i - (|t - i| - 1) w) x_i` over the tokens on one side of t: `exp(largest - fade) * scaled`.

    The exponent comes in two parts because the first may be large and the second small: differences of two exponents
    are exact to a rounding when the large parts are subtracted first.
    """

    scaled: Tensor  # (T, V, 2, B, C) for V things x, past and future
    largest: Tensor  # (T, 2, B, C)
    fade: Tensor  # (T, 2, B, C)


def _scan(w: Tensor, k: Tensor, values: Tensor) -> Sums:
    """Sums over the tokens strictly before and strictly after each token.

    Args:
        w: (C,).
        k: Exponents, (T, B, C).
        values: V things to sum, (T, V, B, C).
    """
    k = torch.stack((k, k.flip(0)), dim=1)
    values = torch.stack((values, values.flip(0)), dim=2)

    # The largest exponent so far, as a token and its age: aged by subtracting w at every step, it would drift.
    token = torch.arange(k.shape[0], device=k.device)[:, None, None, None]
    index = (k + w * token).cummax(0)[1]
    largest = k.gather(0, index)
    fade = (token - index) * w

    scaled = torch.zeros_like(values)
    torch.mul(torch.exp(k - largest + fade).unsqueeze(1)[:-1], values[:-1], out=scaled[1:])
    change = (largest[:-1] - largest[1:]) - (fade[:-1] + w) + fade[1:]
    keep = change.masked_fill_(index[:-1] == index[1:], 0).exp_().unsqueeze(1)
    if len(keep) > 1:
        linear_recurrence_(torch.cat((torch.zeros_like(keep[:1]), keep[:-1])), scaled[1:])
    # No token yet: low enough to vanish beside any other exponent, finite so that differences are.
    nothing = largest.new_full((), torch.finfo(largest.dtype).min / 4).expand_as(largest[:1])
    largest, fade = torch.cat((nothing, largest[:-1])), torch.cat((torch.zeros_like(fade[:1]), fade[:-1]))
    scaled = torch.stack((scaled[:, :, 0], scaled[:, :, 1].flip(0)), dim=2)
    return Sums(scaled, *(torch.stack((x[:, 0], x[:, 1].flip(0)), dim=1) for x in (largest, fade)))


def _attend(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Sums]:
    """Output, denominator scaled by exp(-top), and top, (T, B, C); with the sums behind them."""
    sums = _scan(w, k, torch.stack((v, torch.ones_like(v)), dim=1))
    # Relative to k, and rounded with it.
    exponents = (sums.largest - k.unsqueeze(1)) - sums.fade
    top = k + torch.maximum(exponents.amax(1), u)
    above = top - k
    own = torch.exp(u - above)
    total = (sums.scaled * torch.exp(exponents - above.unsqueeze(1)).unsqueeze(1)).sum(2)
    denominator = total[:, 1] + own
    return (total[:, 0] + own * v) / denominator, denominator, top, sums


@forward_per_sequence
def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None) -> Tensor:
    if official_split is not None:
        return released.forward(w, u, k, v, gate, official_split)
    dtype = state_dtype(w, u, k, v)
    k, v_ = (x.to(dtype).transpose(0, 1) for x in (k, v))
    y = _attend(w.to(dtype), u.to(dtype), k, v_)[0].transpose(0, 1)
    if gate is not None:
        y = y * gate.to(dtype).sigmoid()
    return y.to(v.dtype).contiguous()


@backward_per_sequence
def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, official_split: int | None
) -> list[Tensor | None]:
    if official_split is not None:
        return released.backward(grads, w, u, k, v, gate, official_split)
    dtype = state_dtype(w, u, k, v)
    w, u = w.to(dtype), u.to(dtype)
    gy, k, v = (x.to(dtype).transpose(0, 1) for x in (grads[0], k, v))
    mean, ggate = (k.softmax(0) * v).sum(0), None
    # Gradients see only differences `v_i - y_t`, formed as differences of sums: a common offset would cost digits.
    v = v - mean
    y, denominator, top, sums = _attend(w, u, k, v)
    if gate is not None:
        gate = gate.to(dtype).transpose(0, 1).sigmoid()
        ggate = (gy * (y + mean) * gate * (1 - gate)).transpose(0, 1)
        gy = gy * gate
    gy = gy / denominator
    # The attention weight of token i at token t is exp(k_i - (|t - i| - 1) w - top_t) / denominator_t: transposed, the
    # same scan.
    grads = _scan(w, -top, torch.stack((gy, gy * y), dim=1))

    own = torch.exp(u - (top - k)) * gy
    gu = (own * (v - y)).sum((0, 1))
    total = (grads.scaled * torch.exp((grads.largest + k.unsqueeze(1)) - grads.fade).unsqueeze(1)).sum(2)
    gv = total[:, 0] + own
    gk = v * total[:, 0] - total[:, 1] + own * (v - y)
    # d/dw counts, for a pair, the tokens between: at each, what came from one side meets what goes to the other.
    grads = Sums(grads.scaled.flip(2), grads.largest.flip(1), grads.fade.flip(1))
    between = torch.exp((sums.largest + grads.largest) - (sums.fade + grads.fade + w))
    met = sums.scaled[:, 0] * grads.scaled[:, 0] - sums.scaled[:, 1] * grads.scaled[:, 1]
    gw = -(between * met).sum((0, 1, 2))
    return [gw, gu, gk.transpose(0, 1), gv.transpose(0, 1), ggate]
