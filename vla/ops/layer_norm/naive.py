"""The definition of the layer norm, as close to the equation as code can be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import state_dtype
from .._maps import with_columns
from . import sum_dtype


def scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    """The branch with one factor for as many tokens each, in the branch's dtype."""
    if factor is None:
        return branch
    # Not `repeat_interleave` by the tokens of a factor, which an empty batch has no number of.
    rows = branch.reshape(len(factor), branch.numel() // max(1, len(factor))) * factor[:, None].to(state_dtype(branch))
    return rows.view(branch.shape).to(branch.dtype)


def added(x: Tensor, branch: Tensor, factor: Tensor | None, second: Tensor | None) -> Tensor:
    """The sum of x, a branch and maybe a second one, rounded once."""
    branch = scaled(branch, factor)
    if second is None:
        return x + branch
    return (x.to(state_dtype(x, branch, second)) + branch + second).to(sum_dtype(x, branch, second))


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
    rows = total.to(state_dtype(x, branch, weight, bias, gate)).unflatten(-1, (groups, -1))
    mean = rows.mean(-1, keepdim=True)
    variance = (rows - mean).square().mean(-1, keepdim=True)
    y = ((rows - mean) / torch.sqrt(variance + eps)).flatten(-2)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if gate is not None:
        y = y * F.silu(gate.to(y.dtype))
    y = with_columns(y.to(dtype or total.dtype).contiguous(), columns)
    return y, (total.contiguous() if branch is not None and with_sum else total[..., :0].flatten().clone())
