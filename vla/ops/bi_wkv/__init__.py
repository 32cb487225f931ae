"""Bi-WKV: the bidirectional linear attention of Vision-RWKV, https://arxiv.org/abs/2403.02308."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["bi_wkv"]

_OP = "bi_wkv"


def _infer(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    official_split: int | None,
    per_sequence: bool,
) -> Tensor:
    check_ndim(_OP, "k", k, (3,), "(B, T, C)")
    batch, length, channels = k.shape
    if length == 0 or channels == 0:
        raise ValueError(f"{_OP}: k has shape {tuple(k.shape)}, expected at least one token and one channel")
    check_shape(_OP, "v", v, (batch, length, channels), "(B, T, C)")
    if gate is not None:
        check_shape(_OP, "gate", gate, (batch, length, channels), "(B, T, C)")
    check_shape(_OP, "w", w, (channels,), "(C,)")
    check_shape(_OP, "u", u, (channels,), "(C,)")
    check_float(_OP, w=w, u=u, k=k, v=v, gate=gate)
    if official_split is not None and official_split < 1:
        raise ValueError(f"{_OP}: official_split is {official_split}, expected None or a positive number of splits")
    return v.new_empty(batch, length, channels)


def _flops(w, u, k, v, gate, official_split, per_sequence) -> int:
    # Per token, channel and direction: running maximum, two exponentials, two multiply-adds; then the combination.
    return k[0] * k[1] * k[2] * (2 * 8 + 13 + (0 if gate is None else 4))


operator = Operator(
    _OP,
    "(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? gate, int? official_split, bool per_sequence) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def bi_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    official_split: int | None = None,
    per_sequence: bool = False,
) -> Tensor:
    r"""Bidirectional WKV attention (Vision-RWKV, eq. 3), linear in the number of tokens.

    Per batch entry and channel, every token attends to every other with a weight that decays with their distance:

        y_t = sum_i exp(a_ti) v_i / sum_i exp(a_ti)
        a_ti = k_i - (|t - i| - 1) w   for i != t,   a_tt = k_t + u

    Computed as two scans, from the left and from the right, over sums that carry their largest exponent, so that the
    result is finite for any finite input, `w < 0` included (the farther, the heavier). State and reductions are float32
    (float64 for float64 inputs) whatever the inputs' dtypes. Every tensor argument is differentiable.

    Args:
        w: Decay per token of distance, (C,), any sign.
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        gate: Logits of a gate on the output, (B, T, C): `sigmoid(gate) * y` is returned, in the same pass over memory.
        official_split: Reproduce the released CUDA kernel instead, which cuts the sequence into this many splits (32
            in most of the released code, 16 in some): it weights pairs in different splits by one more factor
            `exp(-w)`, adds a residue inside a split and 1e-6 to the denominator, and its gradients of `k` and `v` are
            those of the equation above rather than its own. For comparisons only: quadratic in T, and not protected
            against a denominator near zero.
        per_sequence: w and u are those of a whole sequence: both are divided by T, as Vision-RWKV does.

    Returns:
        y, (B, T, C) in the dtype of `v`.

    Raises:
        ValueError: For a shape, device or number of splits that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.bi_wkv(w, u, k, v, gate, official_split, per_sequence)
    else:
        return operator(w, u, k, v, gate, official_split, per_sequence)
