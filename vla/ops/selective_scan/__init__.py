"""Selective scan (S6): the input-dependent diagonal state-space recurrence of Mamba, https://arxiv.org/abs/2312.00752."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["selective_scan"]

_OP = "selective_scan"


def _check_projection(name: str, tensor: Tensor, batch: int, channels: int, length: int) -> int:
    """Checks `B` or `C` in one of its three forms and returns the state size."""
    check_ndim(_OP, name, tensor, (2, 3, 4), "(D, N), (B, N, L) or (B, G, N, L)")
    if tensor.dim() == 2:
        check_shape(_OP, name, tensor, (channels, tensor.shape[1]), "(D, N)")
        return tensor.shape[1]
    if tensor.dim() == 3:
        check_shape(_OP, name, tensor, (batch, tensor.shape[1], length), "(B, N, L)")
        return tensor.shape[1]
    check_shape(_OP, name, tensor, (batch, tensor.shape[1], tensor.shape[2], length), "(B, G, N, L)")
    if tensor.shape[1] == 0 or channels % tensor.shape[1] != 0:
        raise ValueError(f"{_OP}: {name} has {tensor.shape[1]} groups, expected a divisor of D = {channels}")
    return tensor.shape[2]


def _infer(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    check_ndim(_OP, "u", u, (3,), "(B, D, L)")
    batch, channels, length = u.shape
    if length == 0 or channels == 0:
        raise ValueError(f"{_OP}: u has shape {tuple(u.shape)}, expected at least one channel and one step")
    check_shape(_OP, "delta", delta, (batch, channels, length), "(B, D, L)")
    check_ndim(_OP, "A", A, (2,), "(D, N)")
    check_shape(_OP, "A", A, (channels, A.shape[1]), "(D, N)")
    for name, tensor in (("B", B), ("C", C)):
        if _check_projection(name, tensor, batch, channels, length) != A.shape[1]:
            raise ValueError(f"{_OP}: {name} has shape {tuple(tensor.shape)}, expected N = {A.shape[1]} like A")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check_shape(_OP, name, tensor, (channels,), "(D,)")
    if z is not None:
        check_shape(_OP, "z", z, (batch, channels, length), "(B, D, L)")
    check_float(_OP, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    state = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(batch, channels, length), u.new_empty(batch, channels, A.shape[1], dtype=state)


def _flops(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> int:
    # Per state: decay product, exponential, input product, multiply-add, output multiply-add. Per step: skip, gate.
    per_step = u[0] * u[1] * u[2]
    return per_step * (7 * A[1] + (2 if D is not None else 0) + (5 if z is not None else 0))


operator = Operator(
    _OP,
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch", "numba", "triton"),
    infer=_infer,
    flops=_flops,
    saves="triton",
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
):
    r"""Selective scan (S6), a drop-in for the `selective_scan_fn` of Mamba, on any device.

    Per batch entry and channel, with `h_0 = 0` and `N` states (Mamba, eqs. 2 and 4, with the Euler rule for `B`):

        dt_t = softplus(delta_t + delta_bias)        (softplus only if `delta_softplus`)
        h_t  = exp(dt_t A) * h_{t-1} + dt_t B_t u_t
        y_t  = <C_t, h_t> + D u_t,   out_t = y_t * silu(z_t)

    State and reductions are float32 (float64 for float64 inputs) whatever the inputs' dtypes. Every tensor argument is
    differentiable, and so are both results.

    Args:
        u: Input, (B, D, L).
        delta: Time step before bias and softplus, (B, D, L).
        A: Diagonal of the state matrix, (D, N), negative for a decaying state.
        B: Input projection: (B, G, N, L) for G groups of D // G channels, (B, N, L) for one group, (D, N) if constant.
        C: Output projection, in any of the forms of `B`.
        D: Skip weight per channel, (D,).
        z: Gate, (B, D, L).
        delta_bias: Bias of the time step, (D,).
        delta_softplus: Apply softplus to the biased time step.
        return_last_state: Also return `h_L`.

    Returns:
        out (B, D, L) in the dtype of `u`; with `return_last_state` the pair (out, state), state (B, D, N) in float32
        or float64.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        out, last_state = torch.ops.vla.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        out, last_state = operator(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if return_last_state:
        return out, last_state
    return out
