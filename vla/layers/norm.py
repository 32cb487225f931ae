"""Layer norm over channels, in the dtype of the layer which follows."""

from typing import Optional

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops import _ahead
from .hooks import has_hooks

__all__ = [
    "LayerNorm",
    "LayerNorm2d",
    "as_rows",
    "autocast_dtype",
    "narrow",
    "normalize",
    "result_dtype",
    "takes_narrow_kernels",
]


@torch.fx.wrap
def autocast_dtype(x: Tensor) -> Optional[torch.dtype]:  # noqa: UP045
    """dtype of the linear layers that follow x under autocast, None without it."""
    if torch.jit.is_scripting() or x.is_meta:
        return None
    else:
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


# Numbers from which a map keeps a GPU busy for longer than an operator's forward and backward take the host, of which
# PyTorch's own take less.
LARGE = 2**20


# Channels up to which a compiler's norm of a sum is as fast as the operator: it does not write the sum, and so adds all
# branches anew in every norm that follows.
FEW_CHANNELS = 128


def _uses_operator(x: Tensor, composite: bool = False) -> bool:
    """Whether `vla.ops.layer_norm` is faster than PyTorch's own, or with `composite` than several of its operators."""
    # A CPU is served as well by PyTorch's own layer norm. What is traced must not depend on whether gradients are on.
    if not (x.is_cuda or x.is_xpu) or torch.jit.is_tracing():
        return False
    # A compiler fuses its own with what stands around it: better for small maps, and where no backward follows. Of
    # groups it makes two kernels.
    if torch.compiler.is_compiling():
        return (composite or torch.is_grad_enabled()) and x.numel() >= LARGE
    # Without a backward the operator is always the faster, as it casts and adds in its only launch.
    return composite or not torch.is_grad_enabled() or x.numel() >= LARGE


def takes_narrow_kernels(x: Tensor) -> bool:
    """Whether kernels for 16 bits may take the place of PyTorch's operators: on a GPU, and if no tracer looks on."""
    # Fake tensors stand for plain ones where kernels are compiled ahead.
    if (type(x) is not Tensor and _ahead.current() is None) or torch.jit.is_tracing():
        return False
    # To transforms of `torch.func` PyTorch's operators offer more: second derivatives, and `vmap` in one launch.
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return x.is_cuda and (autocast_dtype(x) or x.dtype) in (torch.float16, torch.bfloat16)


def as_rows(x: Tensor) -> Tensor:
    """x (..., C), for a compiler as (rows, C).

    Inductor takes all tensors of four dimensions that stand before or between convolutions for maps (B, C, H, W), and
    lays them out with their second dimension last in memory: on (B, H, W, C) every access would then be scattered.
    """
    return x.flatten(0, -2) if torch.compiler.is_compiling() else x


def result_dtype(x: Tensor, narrow: bool) -> torch.dtype:
    """dtype of a norm of x, see `normalize`."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x.dtype
    return dtype if narrow else torch.float32


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    groups: int,
    gate: Optional[Tensor],  # noqa: UP045
) -> Tensor:
    """`vla.ops.layer_norm` of PyTorch's own operators, in the dtype that comes of them."""
    if x.dtype == torch.float32 and weight.dtype != torch.float32:
        # A CPU has no kernels for narrower parameters, as a model in 16 bits has them under autocast.
        weight, bias = weight.float(), bias.float()
    if groups == 1:
        y = F.layer_norm(x, [x.shape[-1]], weight, bias, eps)
    else:
        rows = x.unflatten(-1, [groups, x.shape[-1] // groups])
        y = F.layer_norm(rows, [rows.shape[-1]], eps=eps).flatten(-2)
        y = torch.addcmul(bias, y, weight)
    return y if gate is None else y * F.silu(gate)


@torch.fx.wrap
def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    narrow: bool,
    groups: int = 1,
    gate: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """`vla.ops.layer_norm` of x (..., C), by PyTorch's own layer norm where that is as fast.

    Args:
        x: Tokens, (..., C).
        weight: Scale per channel, (C,).
        bias: Shift per channel, (C,).
        eps: Added to the variance.
        narrow: Under autocast return its dtype, for a linear layer or a mixer; otherwise float32, for a sum.
        groups: Groups of channels that are normalised each by itself.
        gate: Multiplies the result with its SiLU, (..., C).
    """
    if torch.jit.is_scripting():
        return _plain(x, weight, bias, eps, groups, gate)
    else:
        shape = x.shape
        x, gate = as_rows(x), None if gate is None else as_rows(gate)
        dtype = result_dtype(x, narrow)
        # Of long rows that begin at odd places a compiler's own norm reads every number twice.
        is_odd = x.shape[-1] > FEW_CHANNELS and x.shape[-1] % 8 > 0
        if _uses_operator(x, composite=groups > 1 or gate is not None or is_odd):
            y = ops.layer_norm(x, weight, bias, gate, groups, eps, dtype)
        else:
            y = _plain(x, weight, bias, eps, groups, gate).to(dtype)
        return y if y.shape == shape else y.view(shape)


@torch.fx.wrap
def add_normalize(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, narrow: bool
) -> tuple[Tensor, Tensor]:
    """`x + branch`, and its `normalize`, of maps (B, C, H, W)."""
    if _uses_operator(x, composite=torch.compiler.is_compiling() and x.shape[1] > FEW_CHANNELS):
        x, branch = x.permute(0, 2, 3, 1), branch.permute(0, 2, 3, 1)
        dtype = result_dtype(x, narrow)
        total, y = ops.add_layer_norm(as_rows(x), as_rows(branch), weight, bias, eps=eps, dtype=dtype)
        total, y = (t if t.shape == x.shape else t.view(x.shape) for t in (total, y))
        total = total.permute(0, 3, 1, 2)
    else:
        # As maps, not as rows: a compiler would else work out, for every row of the sum, where it lies in each map.
        total = x + branch
        y = normalize(total.permute(0, 2, 3, 1), weight, bias, eps, narrow)
    return total, y.permute(0, 3, 1, 2)


class LayerNorm(nn.LayerNorm):
    """Layer norm of tokens (..., C).

    Args:
        dim: Channels C.
        eps: Added to the variance.
        narrow: Under autocast return its dtype, for a linear layer or a mixer; otherwise float32, for a sum.
    """

    def __init__(self, dim: int, eps: float = 1e-5, narrow: bool = False):
        super().__init__(dim, eps)
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.narrow)


class LayerNorm2d(timm.layers.LayerNorm2d):
    """Layer norm over the channels of maps (B, C, H, W).

    Args:
        dim: Channels C.
        eps: Added to the variance.
        narrow: Under autocast return its dtype, for a linear layer or a mixer; otherwise float32, for a sum.
    """

    def __init__(self, dim: int, eps: float = 1e-5, narrow: bool = False):
        super().__init__(dim, eps)
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        y = normalize(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps, self.narrow)
        return y.permute(0, 3, 1, 2)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """A residual connection and the norm of its result, in one pass over memory: `x + branch` and its norm."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if not has_hooks(self):
                return add_normalize(x, branch, self.weight, self.bias, self.eps, self.narrow)
        x = x + branch
        return x, self(x)


def norm_and_scale(norm: nn.Module, scale: nn.Module, x: Tensor) -> Tensor:
    """A norm, then a learned scale per channel: of map norms as one with the products of both's parameters.

    The scale by itself would be a pass over memory, and would keep the norm for its backward.
    """
    known = isinstance(norm, LayerNorm2d) and isinstance(scale, timm.layers.LayerScale2d)
    if not known or has_hooks(norm) or has_hooks(scale):
        return scale(norm(x))
    weight, bias = norm.weight * scale.gamma, norm.bias * scale.gamma
    return normalize(x.permute(0, 2, 3, 1), weight, bias, norm.eps, norm.narrow).permute(0, 3, 1, 2)


def narrow(norm: nn.Module) -> nn.Module:
    """The same norm, which returns autocast's dtype if it is one of those above."""
    if isinstance(norm, (LayerNorm, LayerNorm2d)):
        norm.narrow = True
    return norm
