"""Patch embeddings and downsampling of hierarchical backbones, (B, C, H, W) in and out."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import conv_layer_norm, conv_layer_norm_twice
from .aligned import Conv2d
from .hooks import is_plain
from .layout import channels_last
from .norm import LayerNorm2d, autocast_dtype, narrow, result_dtype, takes_narrow_kernels

# Channels of a picture up to which its convolution costs a GPU no more than to read and write.
_FEW = 4
# Channels before and behind a convolution that is faster if it does the layer norm too.
_NARROW = range(16, 33), range(16, 65)


def _uses_operator(conv: nn.Module, norm: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether `vla.ops.conv_layer_norm` does the same as `act(norm(conv(x)))`, in 16 bits on a GPU."""
    if not takes_narrow_kernels(x) or x.requires_grad:
        return False
    if not is_plain(conv, nn.Conv2d) or not is_plain(norm, LayerNorm2d) or not is_plain(act, nn.GELU):
        return False
    return x.shape[1] <= _FEW and conv.kernel_size == (3, 3) and act.approximate == "none" and norm.narrow


def conv_norm_act(conv: nn.Module, norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """`act(norm(conv(x)))` of a picture."""
    if _uses_operator(conv, norm, act, x):
        (stride, _), (padding, _), dtype = conv.stride, conv.padding, autocast_dtype(x)
        return conv_layer_norm(
            x, conv.weight, conv.bias, norm.weight, norm.bias, stride, padding, norm.eps, "gelu", dtype
        )
    return act(norm(conv(channels_last(x))))


class PatchStem(nn.Module):
    """Patch embedding by one convolution, (B, in_chans, H, W) -> (B, dim, H // patch_size, W // patch_size)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm_layer: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm1 = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        return self.norm1(self.conv1(x))


class ConvStem(nn.Module):
    """Patch embedding by two convolutions with kernel `stride + 1`, (B, in_chans, H, W) -> (B, dim, ~H / stride^2, ..).

    Each has the stride `patch_size // 2`, so that only for `patch_size` 4 the total stride is `patch_size`.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm_layer: type[nn.Module]):
        super().__init__()
        stride = patch_size // 2
        self.conv1 = nn.Conv2d(in_chans, dim // 2, stride + 1, stride=stride, padding=1)
        self.norm1 = narrow(norm_layer(dim // 2))
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, stride + 1, stride=stride, padding=1)
        self.norm2 = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.act(self.norm1(self.conv1(channels_last(x))))
        else:
            x = conv_norm_act(self.conv1, self.norm1, self.act, x)
        return self.norm2(self.conv2(x))


class PatchMerging(nn.Module):
    """2x2 pixels side by side in the channels, normed and projected: (B, C, H, W) -> (B, out_dim, ~H / 2, ~W / 2).

    Odd maps are padded with zeros at the bottom and at the right, before the norm.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: type[nn.Module]):
        super().__init__()
        self.norm = narrow(norm_layer(4 * dim))
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], dim=1)
        return self.reduction(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvDownsample(nn.Module):
    """Strided convolution and norm, (B, C, H, W) -> (B, out_dim, ~H / 2, ~W / 2).

    Few channels are convolved and normed in one pass over memory by a GPU without gradients.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: type[nn.Module], kernel_size: int):
        super().__init__()
        self.conv = Conv2d(dim, out_dim, kernel_size, stride=2, padding=kernel_size // 2 if kernel_size % 2 else 0)
        self.norm = norm_layer(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.is_one_pass(x):
                return self.norm_once(x)
        return self.norm(self.conv(x))

    @torch.jit.ignore
    def is_one_pass(self, x: Tensor) -> bool:
        """Whether that is what both are."""
        if not takes_narrow_kernels(x) or torch.is_grad_enabled():
            return False
        conv = self.conv
        if not is_plain(conv, Conv2d) or not is_plain(self.norm, LayerNorm2d):
            return False
        return conv.in_channels in _NARROW[0] and conv.out_channels in _NARROW[1]

    @torch.jit.ignore
    def arguments(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict]:
        """Those of `vla.ops.conv_layer_norm`."""
        conv, norm, dtype = self.conv, self.norm, autocast_dtype(x) or x.dtype
        (stride, _), (padding, _) = conv.stride, conv.padding
        # The same products as those of the convolution alone, which has both its operands in 16 bits.
        arguments = (x.to(dtype), conv.weight.to(dtype), conv.bias, norm.weight, norm.bias)
        return arguments, dict(stride=stride, padding=padding, eps=norm.eps, dtype=result_dtype(x, norm.narrow))

    @torch.jit.ignore
    def norm_once(self, x: Tensor) -> Tensor:
        """What `forward` returns of an x that takes one pass."""
        arguments, options = self.arguments(x)
        return conv_layer_norm(*arguments, **options)

    @torch.jit.ignore
    def norm_twice(self, x: Tensor, norm: LayerNorm2d) -> tuple[Tensor, Tensor]:
        """`norm_once`, and a norm of that."""
        arguments, options = self.arguments(x)
        options |= dict(next_eps=norm.eps, next_dtype=result_dtype(x, norm.narrow))
        return conv_layer_norm_twice(*arguments, norm.weight, norm.bias, **options)


STEMS = {"v1": PatchStem, "v2": ConvStem}
DOWNSAMPLES = {
    "v1": PatchMerging,
    "v2": partial(ConvDownsample, kernel_size=2),
    "v3": partial(ConvDownsample, kernel_size=3),
}
