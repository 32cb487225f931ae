"""Bidirectional WKV of RWKV-6, as Vision-RWKV 6 uses it: https://arxiv.org/abs/2403.02308, https://arxiv.org/abs/2404.05892."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["wkv6"]

_OP = "wkv6"


def _infer(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    check_ndim(_OP, "r", r, (3,), "(B, T, C)")
    batch, length, channels = r.shape
    if length == 0 or channels == 0:
        raise ValueError(f"{_OP}: r has shape {tuple(r.shape)}, expected at least one token and one channel")
    for name, tensor in (("k", k), ("v", v), ("w", w)):
        check_shape(_OP, name, tensor, (batch, length, channels), "(B, T, C)")
    check_ndim(_OP, "u", u, (2,), "(heads, C // heads)")
    if u.shape[0] * u.shape[1] != channels:
        raise ValueError(f"{_OP}: u has shape {tuple(u.shape)}, expected (heads, head size), product C = {channels}")
    check_float(_OP, r=r, k=k, v=v, w=w, u=u)
    return v.new_empty(batch, length, channels)


def _flops(r, k, v, w, u) -> int:
    # Per token, head, direction and entry of the state: decay, outer product, readout; per channel: bonus and decay.
    return 2 * r[0] * r[1] * r[2] * (5 * u[1] + 4)


operator = Operator(
    _OP,
    "(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
)


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    r"""Bidirectional WKV6: RWKV-6's linear attention with data-dependent decay, read from both sides.

    Per batch entry and head of N channels, with `d_t = exp(-exp(w_t))` and the tokens from left to right

        y_t = r_t^T (S_t + diag(u) k_t v_t^T),   S_{t+1} = diag(d_t) S_t + k_t v_t^T,   S_0 = 0

    plus the same from right to left without the bonus u. The decay of the first and of the last token thus never
    matters. No denominator, no scale. State and reductions are float32 (float64 for float64 inputs) whatever
    the inputs' dtypes. Every tensor argument is differentiable.

    Args:
        r: Receptance, (B, T, C), heads side by side in the C = heads * N channels.
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        w: Decay before both exponentials, (B, T, C).
        u: Bonus of the token itself, (heads, N); its shape gives the heads.

    Returns:
        y, (B, T, C) in the dtype of `v`.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.wkv6(r, k, v, w, u)
    else:
        return operator(r, k, v, w, u)
