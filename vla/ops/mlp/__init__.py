"""Two linear layers and the activation between them: the MLP of every block, https://arxiv.org/abs/1706.03762."""

import torch
from torch import Tensor

from .._checks import check_float, check_shape
from .._registry import Operator

__all__ = ["ACTIVATIONS", "mlp"]

_OP = "mlp"
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "squared_relu")


def _infer(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, act: str) -> Tensor:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, expected (..., C) with C > 0")
    if weight1.dim() != 2 or weight1.shape[1] != x.shape[-1]:
        raise ValueError(f"{_OP}: weight1 has shape {tuple(weight1.shape)}, expected (H, C) with C = {x.shape[-1]}")
    hidden = weight1.shape[0]
    if hidden == 0:
        raise ValueError(f"{_OP}: weight1 has shape {tuple(weight1.shape)}, expected (H, C) with H > 0")
    if weight2.dim() != 2 or weight2.shape[1] != hidden:
        raise ValueError(f"{_OP}: weight2 has shape {tuple(weight2.shape)}, expected (O, H) with H = {hidden}")
    if bias1 is not None:
        check_shape(_OP, "bias1", bias1, (hidden,), "(H,)")
    if bias2 is not None:
        check_shape(_OP, "bias2", bias2, (weight2.shape[0],), "(O,)")
    if act not in ACTIVATIONS:
        raise ValueError(f"{_OP}: act is {act!r}, expected one of {', '.join(ACTIVATIONS)}")
    check_float(_OP, x=x)
    for name, tensor in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{_OP}: {name} has dtype {tensor.dtype}, expected {x.dtype} like x")
    return x.new_empty(*x.shape[:-1], weight2.shape[0])


def _flops(x, weight1, bias1, weight2, bias2, act) -> int:
    return 2 * (x.numel() // x[-1]) * (weight1.numel() + weight2.numel())


operator = Operator(
    _OP,
    "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str act) -> Tensor",
    package=__name__,
    backends=("naive", "torch", "triton"),
    infer=_infer,
    flops=_flops,
    # PyTorch multiplies float32 as fast.
    kernel_dtypes=(torch.bfloat16, torch.float16),
)


@torch.fx.wrap
def _autocast(tensor: Tensor | None) -> Tensor | None:
    """As `torch.nn.functional.linear` takes it: under autocast in the dtype of that, unless in float64."""
    if tensor is None or tensor.is_meta or tensor.dtype == torch.float64:
        return tensor
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "gelu",
) -> Tensor:
    r"""Two linear layers with an activation between them, whose hidden channels are not kept in memory.

        y = act(x weight1^T + bias1) weight2^T + bias2

    Sums are float32, hidden channels are rounded to the dtype of `x`. Every tensor argument is differentiable; of the
    forward only the arguments are kept, the backward computes the hidden channels anew. Under autocast all tensors are
    cast first, as those of `torch.nn.functional.linear` are.

    Args:
        x: Tokens or a map with its channels last, (..., C).
        weight1: Weight of the first layer, (H, C).
        bias1: Its bias, (H,), or None.
        weight2: Weight of the second layer, (O, H).
        bias2: Its bias, (O,), or None.
        act: `'gelu'` (with the exact error function), `'gelu_tanh'`, `'relu'`, `'silu'` or `'squared_relu'`.

    Returns:
        Contiguous (..., O).

    Raises:
        ValueError: For a shape, device or option that does not fit, naming the argument.
        TypeError: For a dtype that is not real floating point, or tensors of several dtypes.
    """
    if torch.jit.is_scripting():
        return torch.ops.vla.mlp(x, weight1, bias1, weight2, bias2, act)
    else:
        x, weight1, bias1 = _autocast(x), _autocast(weight1), _autocast(bias1)
        return operator(x, weight1, bias1, _autocast(weight2), _autocast(bias2), act)
