"""The MLP of timm, of which a GPU keeps fewer hidden channels in memory."""

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bias_gelu, mlp
from .hooks import has_hooks
from .norm import LARGE, as_rows, takes_narrow_kernels

__all__ = ["Mlp"]

# Channels up to which the kernels save time in training too, where they compute the hidden channels anew.
_NARROW = 192


def _activation(module: nn.Module) -> str | None:
    """Name that `vla.ops.mlp` has for an activation, None if it has none."""
    if type(module) in (nn.GELU, timm.layers.GELU):
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    return {timm.layers.GELUTanh: "gelu_tanh", nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _has_kernels(x: Tensor) -> bool:
    """Whether there are faster kernels for an MLP of this input than PyTorch's."""
    # Asked last for its size, of which a compiler would make a condition.
    return takes_narrow_kernels(x) and x.numel() >= LARGE


class Mlp(timm.layers.Mlp):
    """timm's MLP, `fc2(act(fc1(x)))` with its options, for tokens or maps with their channels last.

    Large inputs of 16 bits on a GPU pass through `vla.ops.mlp`, if nothing else stands between the linear layers and
    nobody waits for one of the modules to be called; wide ones do so where no gradient follows, else, if they are
    compiled, their GELU takes the bias with it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # a script must not look into the second conditions
            if torch.compiler.is_compiling() and x.dim() > 2:
                return self.forward(as_rows(x)).unflatten(0, x.shape[:-1])
            if _has_kernels(x) and self._is_plain():
                act = _activation(self.act)
                if x.shape[-1] <= _NARROW or not torch.is_grad_enabled():
                    return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, act)
                # In eager mode one more node of the graph costs the host what it saves the GPU.
                if act == "gelu" and self.fc1.bias is not None and torch.compiler.is_compiling():
                    return self.fc2(bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias))
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))

    def _is_plain(self) -> bool:
        """Whether the MLP is two linear layers with an activation that the operator knows, and nothing else."""
        if type(self.fc1) is not nn.Linear or type(self.fc2) is not nn.Linear or _activation(self.act) is None:
            return False
        if self.training and (self.drop1.p > 0 or self.drop2.p > 0):
            return False
        if not isinstance(self.norm, nn.Identity):
            return False
        return not any(has_hooks(module) for module in self.children())
