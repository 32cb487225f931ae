"""MambaVision's token mixers and block, https://arxiv.org/abs/2407.08083."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from ..ops import scan2d
from .block import DEFAULT_NORM, ResidualBlock
from .depthwise import DepthwiseConv2d
from .hooks import is_plain
from .layout import channels_last
from .ss2d import inverse_softplus

__all__ = ["MambaVisionBlock", "MambaVisionMixer", "MapAttention", "window_partition", "window_reverse"]


def window_partition(x: Tensor, size: int) -> Tensor:
    """Cuts a map into square windows, after padding it with zeros at the bottom and on the right.

    Args:
        x: Map (B, C, H, W).
        size: Side of a window.

    Returns:
        Windows (B * ceil(H / size) * ceil(W / size), C, size, size) in channels-last memory: batch slowest, then rows
        of windows, then columns.
    """
    height, width = x.shape[2], x.shape[3]
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, columns * size - width, 0, rows * size - height))
    x = x.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
    return x.flatten(0, 2).permute(0, 3, 1, 2)


def window_reverse(windows: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `window_partition`: puts windows back and crops the padding.

    Args:
        windows: (B * ceil(H / size) * ceil(W / size), C, size, size).
        height: Rows H of the map.
        width: Columns W of the map.

    Returns:
        Map (B, C, H, W).
    """
    size = windows.shape[2]
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    x = windows.permute(0, 2, 3, 1).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return x.permute(0, 3, 1, 2)


class MambaVisionMixer(nn.Module):
    r"""MambaVision's mixer (section 3.2): a selective scan beside a plain convolution branch, concatenated.

        u, z = silu(conv(in_proj(x)))        depthwise, 'same' padding along the sequence: not causal
        dt, B, C = x_proj(u)
        y = out_proj(concat(selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D), z))

    The sequence is the map's pixels in row-major order.

    Args:
        dim: Channels C.
        d_state: State size N of the scan.
        d_conv: Kernel size of the depthwise convolution.
        expand: Inner width over `dim`; half of it is scanned.
        dt_rank: Rank of the time step, None for `ceil(dim / 16)`.
        double_dt_bias: Add the bias of the time step twice, `softplus(W dt + 2 b)`, as the released models were trained
            and as their weights need. False adds it once, as Mamba does.

    Raises:
        ValueError: If the inner width `expand * dim` is odd.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int = 1,
        dt_rank: int | None = None,
        double_dt_bias: bool = True,
    ):
        super().__init__()
        d_inner = expand * dim
        if d_inner % 2 != 0:
            raise ValueError(f"MambaVisionMixer: expand * dim is {d_inner}, expected an even number")
        d_scan = d_inner // 2
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.d_scan = d_scan
        self.splits = [dt_rank, d_state, d_state]
        self.dt_bias_scale = 2.0 if double_dt_bias else 1.0

        self.in_proj = nn.Linear(dim, d_inner, bias=False)
        # One row high: the sequence stays channels-last, where a 1-D convolution would be given a copy.
        self.conv = DepthwiseConv2d(d_inner, (1, d_conv), bias=False, act_layer=nn.SiLU)
        self.x_proj = nn.Linear(d_scan, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_scan)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_scan, 1))
        self.D = nn.Parameter(torch.ones(d_scan))
        self.out_proj = nn.Linear(d_inner, dim, bias=False)
        self.reset_time_step()

    def reset_time_step(self) -> None:
        """Gives the time step Mamba's initial values: `softplus(bias)` log-uniform in [0.001, 0.1]."""
        nn.init.uniform_(self.dt_proj.weight, -(self.splits[0] ** -0.5), self.splits[0] ** -0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(dt) / self.dt_bias_scale)

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Tensor | None]:
        """See `vla.layers.weights.product_weights`."""
        return {"dt_proj.weight": None}  # which the scan expands time steps with

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = self.in_proj(x.flatten(2).transpose(1, 2))
        x = self.conv(x.transpose(1, 2).unsqueeze(2))  # (B, d_inner, 1, L)
        u, z = x.split(self.d_scan, dim=1)
        if self.training:
            # By itself: a view kept for the backward would keep z with it, of which `out_proj` keeps a copy.
            u = channels_last(u)
        projected = self.x_proj(u.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).unsqueeze(1)
        dt, B, C = projected.split(self.splits, dim=2)
        y = self.scan(u, dt, B, C)
        x = self.out_proj(torch.cat([y, z], dim=1).flatten(2).transpose(1, 2))
        return x.transpose(1, 2).unflatten(2, shape[2:])

    def scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """Scan of u (B, D, 1, L) with time steps dt (B, 1, R, 1, L) to be expanded, B and C (B, 1, N, 1, L)."""
        A, D = -torch.exp(self.A_log).unsqueeze(0), self.D.unsqueeze(0)
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if not is_plain(self.dt_proj, nn.Linear):
                dt = self.dt_proj(dt.transpose(2, 4)).transpose(2, 4)
                if self.dt_bias_scale == 1.0:
                    return scan2d(u, dt, A, B, C, ["row"], D)
                if type(self.dt_proj) is nn.Linear and "forward" not in self.dt_proj.__dict__:
                    bias = self.dt_proj.bias.unsqueeze(0)  # whoever waits for its calls sees one
                else:
                    # Of zeros it is the bias, whatever stands for the layer.
                    bias = self.dt_proj(dt.new_zeros(1, self.splits[0]))
                return scan2d(u, dt, A, B, C, ["row"], D, dt_bias=(self.dt_bias_scale - 1) * bias)
        weight, bias = self.dt_proj.weight.unsqueeze(0), self.dt_bias_scale * self.dt_proj.bias.unsqueeze(0)
        return scan2d(u, dt, A, B, C, ["row"], D, weight, bias)


class MapAttention(nn.Module):
    """Multi-head attention among all pixels of a (B, C, H, W) map.

    Args:
        dim: Channels C.
        **kwargs: Arguments of `timm.layers.Attention`: `num_heads`, `qkv_bias`, `qk_norm`, ...
    """

    def __init__(self, dim: int, **kwargs):
        super().__init__()
        self.attn = Attention(dim, norm_layer=nn.LayerNorm, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attn(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class Windowed(nn.Module):
    """Runs a mixer inside square windows, the map padded with zeros at the bottom and on the right.

    Args:
        mixer: Module from (B, C, H, W) to (B, C, H, W).
        size: Side of a window.
    """

    def __init__(self, mixer: nn.Module, size: int):
        super().__init__()
        self.mixer = mixer
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return window_reverse(self.mixer(window_partition(x, self.size)), x.shape[2], x.shape[3])


class MambaVisionBlock(ResidualBlock):
    """MambaVision's block: `MambaVisionMixer` or attention, then an MLP. Takes and returns (B, C, H, W).

    Args:
        dim: Channels C.
        mixer: `'mamba'` for the selective scan, `'attention'` for multi-head attention.
        window_size: Side of the windows that the mixer is confined to, None to mix the whole map.
        mlp_ratio: Hidden width of the MLP over `dim`.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of a learned scale per channel on both halves, None for no scale.
        norm_layer: Norm of (B, C, H, W) maps.
        act_layer: Activation of the MLP.
        drop: Dropout rate of the MLP and of the attention's projection.
        num_heads: Heads of the attention.
        qkv_bias: Bias in the attention's query, key and value.
        qk_norm: LayerNorm on queries and keys.
        attn_drop: Dropout rate of the attention weights, in training only.
        d_state: State size of the scan.
        d_conv: Kernel size of the convolution before the scan.
        expand: Inner width of the mixer over `dim`.
        double_dt_bias: Add the time step's bias twice, as released weights need; see `MambaVisionMixer`.

    Raises:
        ValueError: For an unknown `mixer` or heads that don't divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        mixer: str = "mamba",
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = DEFAULT_NORM,
        act_layer: str | type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int = 1,
        double_dt_bias: bool = True,
    ):
        if mixer == "mamba":
            module = MambaVisionMixer(dim, d_state, d_conv, expand, double_dt_bias=double_dt_bias)
        elif mixer == "attention":
            if dim % num_heads != 0:
                raise ValueError(f"MambaVisionBlock: num_heads is {num_heads}, expected a divisor of dim = {dim}")
            module = MapAttention(
                dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, attn_drop=attn_drop, proj_drop=drop
            )
        else:
            raise ValueError(f"MambaVisionBlock: mixer is {mixer!r}, expected 'mamba' or 'attention'")
        if window_size is not None:
            module = Windowed(module, window_size)
        super().__init__(dim, module, mlp_ratio, drop_path, layer_scale, norm_layer, act_layer, drop)
