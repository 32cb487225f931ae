"""How maps lie in memory."""

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """The map x (B, C, H, W) with its channels next to each other in memory.

    As `torch.channels_last` has it, which `torch.vmap` does not know.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
