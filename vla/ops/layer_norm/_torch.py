"""Layer norm by PyTorch's own kernels, and its backward from the statistics that these return."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .._maps import with_columns
from .naive import added, scaled


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
    columns: int = 0,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else added(x, branch, factor, second)
    state = state_dtype(x, branch, weight, bias, gate)
    weight, bias = (None if t is None else t.to(state) for t in (weight, bias))
    if groups == 1:
        y = F.layer_norm(total.to(state), total.shape[-1:], weight, bias, eps)
    else:
        rows = total.to(state).unflatten(-1, (groups, -1))
        y = F.layer_norm(rows, rows.shape[-1:], eps=eps).flatten(-2)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    if gate is not None:
        y = y * F.silu(gate.to(state))
    y = with_columns(y.to(dtype or total.dtype).contiguous(), columns)
    return y, (total.contiguous() if branch is not None and with_sum else total.new_empty(0))


def backward(
    grads: list[Tensor],
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype | None,
    columns: int = 0,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> list[Tensor | None]:
    state = state_dtype(x, branch, weight, bias, gate)
    total = x if branch is None else added(x, branch, factor, second)
    rows = total.to(state).contiguous().unflatten(-1, (groups, -1))
    normal, mean, inverse = torch.native_layer_norm(rows, rows.shape[-1:], None, None, eps)
    flat = normal.flatten(-2)
    g = grads[0][..., : x.shape[-1]].to(state)
    g_gate = None
    if gate is not None:
        out = flat if weight is None else flat * weight
        out = out if bias is None else out + bias
        z = gate.to(state)
        share = torch.sigmoid(z)
        g_gate = g * out * share * (1 + z * (1 - share))
        g = g * z * share
    # Not over the leading dimensions: where there are none, PyTorch sums over all.
    tokens = (g.shape[:-1].numel(), g.shape[-1])
    g_weight = None if weight is None else (g * flat).reshape(tokens).sum(0)
    g_bias = None if bias is None else g.reshape(tokens).sum(0)
    g = g if weight is None else g * weight
    gx, _, _ = torch.ops.aten.native_layer_norm_backward(
        g.unflatten(-1, (groups, -1)), rows, rows.shape[-1:], mean, inverse, None, None, [True, False, False]
    )
    gx = gx.flatten(-2)
    if branch is None:
        return [gx, None, g_weight, g_bias, g_gate, None, None]
    gx = gx + grads[1] if with_sum else gx
    g_branch = scaled(gx, factor).to(branch.dtype, copy=True)
    g_second = None if second is None else gx.to(second.dtype, copy=True)
    return [gx.to(x.dtype), g_branch, g_weight, g_bias, g_gate, None, g_second]
