"""State-space duality (SSD): the scalar-decay state-space recurrence of Mamba-2, https://arxiv.org/abs/2405.21060."""

import torch
from torch import Tensor

from .._checks import check_float, check_ndim, check_shape
from .._registry import Operator

__all__ = ["ssd"]

_OP = "ssd"


def _infer(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    check_ndim(_OP, "x", x, (4,), "(B, L, H, P)")
    batch, length, heads, width = x.shape
    if length == 0 or heads == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected at least one step and one head")
    check_shape(_OP, "dt", dt, (batch, length, heads), "(B, L, H)")
    check_shape(_OP, "A", A, (heads,), "(H,)")
    check_ndim(_OP, "B", B, (4,), "(B, L, G, N)")
    groups, states = B.shape[2:]
    check_shape(_OP, "B", B, (batch, length, groups, states), "(B, L, G, N)")
    check_shape(_OP, "C", C, (batch, length, groups, states), "(B, L, G, N)")
    if groups == 0 or heads % groups != 0:
        raise ValueError(f"{_OP}: B has {groups} groups, expected a divisor of H = {heads}")
    if D is not None:
        check_ndim(_OP, "D", D, (1, 2), "(H,) or (H, P)")
        check_shape(_OP, "D", D, (heads, width)[: D.dim()], "(H,) or (H, P)")
    if dt_bias is not None:
        check_shape(_OP, "dt_bias", dt_bias, (heads,), "(H,)")
    if initial_state is not None:
        check_shape(_OP, "initial_state", initial_state, (batch, heads, width, states), "(B, H, P, N)")
    check_float(_OP, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, states, dtype=state)


def _flops(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus) -> int:
    # Per step, head, channel and state: input product, decay multiply-add, output multiply-add.
    steps = x[0] * x[1] * x[2] * x[3]
    return steps * (6 * B[3] + (2 if D is not None else 0))


operator = Operator(
    _OP,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, "
    "bool dt_softplus) -> (Tensor, Tensor)",
    package=__name__,
    backends=("naive", "torch"),
    infer=_infer,
    flops=_flops,
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""State-space duality scan of Mamba-2 (sec. 3 and 6): per head a scalar decay and a (P, N) state.

        dt_t = softplus(dt_t + dt_bias)              (softplus only if `dt_softplus`)
        h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t  = h_t C_t + D x_t

    State and reductions are float32 (float64 for float64 inputs). Every tensor argument is differentiable, and so are
    both results.

    Args:
        x: Input, (B, L, H, P): H heads of P channels.
        dt: Time step per head before bias and softplus, (B, L, H).
        A: Decay rate per head, (H,), negative for a decaying state.
        B: Input projection, (B, L, G, N), shared by the H // G heads of a group.
        C: Output projection, (B, L, G, N).
        D: Skip weight, (H,) or (H, P).
        dt_bias: Bias of the time step, (H,).
        initial_state: State before the first step, (B, H, P, N); zero by default.
        dt_softplus: Apply softplus to the biased time step.

    Returns:
        y (B, L, H, P) in the dtype of `x`, and the last state (B, H, P, N) in float32 or float64.

    Raises:
        ValueError: For a shape or device that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.ssd(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus)
    else:
        return operator(x, dt, A, B, C, D, dt_bias, initial_state, dt_softplus)
