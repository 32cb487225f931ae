"""What the released CUDA kernel computes, pair by pair: the compatibility mode `official_split` of every backend."""

import math

import torch
from torch import Tensor

from .._checks import state_dtype

_EPSILON = 1e-6
_MAX_ELEMENTS = 2**24


def _attend(w: Tensor, u: Tensor, k: Tensor, v: Tensor, split: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, denominator and its largest exponent, each (B, T, C); the denominator is scaled by exp(-exponent)."""
    length = k.shape[1]
    size = math.ceil(length / split)
    token = torch.arange(length, device=k.device)
    t, j = token[:, None, None], token[None, :, None]
    start = t // size * size
    gap = t - j
    minus_infinity = torch.full((), -math.inf, dtype=k.dtype, device=k.device)

    exponent = -w * torch.where((start <= j) & (j < t), gap - 1, gap.abs())
    exponent = k[:, None] + torch.where(gap == 0, u, exponent)
    # The sum over future tokens is the one over the whole split less the tokens passed, each rescaled by exp(w) per
    # step: a passed token leaves this residue.
    passed = (start < j) & (j <= t)
    future = torch.where(start <= j, k[:, None] + w * torch.where(passed, gap + 1, gap), minus_infinity)
    top = torch.where(gap >= 0, exponent, minus_infinity).amax(2).maximum(future.amax(2)).detach()

    shift = top[:, :, None]
    residue = -torch.expm1(w) * torch.exp(k[:, None] + w * torch.where(passed, gap, 0) - shift)
    weight = torch.exp(exponent - shift) + torch.where(passed, residue, 0)
    denominator = weight.sum(2)
    return (weight * v[:, None]).sum(2) / (denominator + epsilon), denominator, top


def _blocks(k: Tensor) -> list[slice]:
    """Blocks of channels whose pairs of tokens fit in memory."""
    block = max(1, _MAX_ELEMENTS // max(1, k.shape[0] * k.shape[1] ** 2))
    return [slice(i, i + block) for i in range(0, k.shape[2], block)]


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, split: int) -> Tensor:
    dtype = state_dtype(w, u, k, v)
    outputs = [_attend(*(x[..., c].to(dtype) for x in (w, u, k, v)), split, _EPSILON)[0] for c in _blocks(k)]
    y = torch.cat(outputs, dim=-1)
    if gate is not None:
        y = y * gate.to(dtype).sigmoid()
    return y.to(v.dtype)


def backward(
    grads: list[Tensor], w: Tensor, u: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, split: int
) -> list[Tensor | None]:
    dtype = state_dtype(w, u, k, v)
    gy, ggate = grads[0], None
    if gate is not None:
        y = forward(*(x.to(dtype) for x in (w, u, k, v)), None, split)
        gate = gate.to(dtype).sigmoid()
        ggate, gy = gy * y * gate * (1 - gate), gy * gate
    distance = torch.arange(k.shape[1], device=k.device)
    distance = (distance[:, None] - distance).abs()[..., None]
    results = []
    for c in _blocks(k):
        gyc, wc, uc, kc, vc = (x[..., c].to(dtype) for x in (gy, w, u, k, v))
        with torch.enable_grad():
            decay, bonus = wc.detach().requires_grad_(), uc.detach().requires_grad_()
            y, denominator, top = _attend(decay, bonus, kc, vc, split, 0.0)
            gw, gu = torch.autograd.grad(y, (decay, bonus), gyc)
        # Gradients of keys and values weight the pairs as the equation does, not as the released forward does.
        exponent = kc[:, None] + torch.where(distance == 0, uc, (1 - distance) * wc) - top[:, :, None]
        weight = torch.exp(exponent) * (gyc / denominator)[:, :, None]
        gv = weight.sum(1)
        gk = vc * gv - (weight * y[:, :, None]).sum(1)
        results.append([x.detach() for x in (gw, gu, gk, gv)])
    return [*(torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)), ggate]
