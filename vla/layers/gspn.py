"""Generalized spatial propagation (GSPN), https://arxiv.org/abs/2501.12381: scan, mixer and block."""

from collections.abc import Callable
from typing import Optional

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from ..ops import layer_norm_grn, projected_line_scan
from .block import DEFAULT_NORM, ResidualBlock
from .depthwise import DepthwiseConv2d
from .hooks import is_plain
from .norm import autocast_dtype

# Tracing wraps a function by its name in the module that calls it.
torch.fx.wrap("autocast_dtype")

# Order of the parameter groups in released weights.
DIRECTIONS = ["right", "down", "left", "up"]


class LineScan2d(nn.Module):
    r"""Line scan in four directions with input-dependent coefficients: (B, D, H, W) to the same, D being `dim`.

    Gates, input weight lambda, output weight u and skip weight of all directions are linear functions of S proxy
    channels of each pixel, expanded inside `vla.ops.projected_line_scan`. The directions' outputs are summed with one
    learned weight each.

    Args:
        dim: Channels D.
        d_state: Proxy channels S.
        chunk: Lines after which a sweep starts again from zero; 0 for sweeps over the whole map.
        aligned: Propagate every pixel with its own coefficients and return outputs to their pixels. The released
            networks don't, see `vla.ops.line_scan`.
        shared_gates: One set of gates for all channels, as in GSPN-2, https://arxiv.org/abs/2512.07884.

    Attributes:
        proxy_weight: Projection to the proxy channels, (S, D).
        gate_weight: Expansion to the logits of the three gates, (3, 4, D, S), with `shared_gates` (3, 4, 1, S).
        lam_weight: Expansion to lambda, (4, D, S).
        u_weight: Expansion to u, (4, D, S).
        skip_weight: Expansion to the skip weight, (4, D, S).
        merge_weight: Weights of the directions in the sum, (4, 1, 1).

    Raises:
        ValueError: For a negative `chunk`, or no proxy channel.
    """

    def __init__(
        self, dim: int, d_state: int = 8, chunk: int = 0, aligned: bool = False, shared_gates: bool = False
    ):  # fmt: skip
        super().__init__()
        if d_state < 1:
            raise ValueError(f"LineScan2d: d_state is {d_state}, expected at least 1")
        if chunk < 0:
            raise ValueError(f"LineScan2d: chunk is {chunk}, expected a number of lines, or 0 for whole sweeps")
        self.directions = list(DIRECTIONS)
        self.chunk = chunk
        self.aligned = aligned
        self.proxy_weight = nn.Parameter(torch.empty(d_state, dim))
        self.gate_weight = nn.Parameter(torch.empty(3, 4, 1 if shared_gates else dim, d_state))
        self.lam_weight = nn.Parameter(torch.empty(4, dim, d_state))
        self.u_weight = nn.Parameter(torch.empty(4, dim, d_state))
        self.skip_weight = nn.Parameter(torch.empty(4, dim, d_state))
        self.merge_weight = nn.Parameter(torch.empty(4, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of the 1x1 convolutions that these weights are."""
        for weight in (self.proxy_weight, self.gate_weight, self.lam_weight, self.u_weight, self.skip_weight):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        nn.init.uniform_(self.merge_weight, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return projected_line_scan(
            x,
            self.proxy_weight,
            self.gate_weight.expand(-1, -1, x.shape[1], -1),
            self.lam_weight,
            self.u_weight * self.merge_weight,
            self.skip_weight * self.merge_weight,
            self.directions,
            self.chunk,
            self.aligned,
        )


_RELEASED_NAMES = {
    "x_conv_down.weight": "proxy_weight",
    "w_conv_up.weight": "gate_weight",
    "l_conv_up.weight": "lam_weight",
    "u_conv_up.weight": "u_weight",
    "d_conv.weight": "skip_weight",
    "m_conv.weight": "merge_weight",
}


def rename_released_scan(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names and shapes of the 1x1 convolutions around a scan -> those of a `LineScan2d` named `scan`."""
    out = {}
    for name, value in state_dict.items():
        released = ".".join(name.split(".")[-2:])
        if released in _RELEASED_NAMES:
            name = f"{name.removesuffix(released)}scan.{_RELEASED_NAMES[released]}"
            value = value.flatten(1)
            if released == "w_conv_up.weight":
                value = value.unflatten(0, (3, 4, -1))
            elif released == "m_conv.weight":
                value = value.view(4, 1, 1)
            elif released != "x_conv_down.weight":
                value = value.unflatten(0, (4, -1))
        out[name] = value
    return out


class GSPNMixer(nn.Module):
    r"""GSPN's token mixer, (B, C, H, W) to the same, for maps of any size.

        y   = scan(conv(in_proj(x)))
        out = out_proj(grn(out_norm(y)))

    Linear in the number of pixels. With whole sweeps every pixel reaches every other; with chunks of `c` lines only
    those at most `c - 1` lines away.

    Args:
        dim: Channels C.
        d_state: Proxy channels that all coefficients of the scan are functions of.
        ratio: Inner width over C.
        conv_kernel: Side of the depthwise convolution, odd.
        conv_bias: Bias of that convolution.
        chunk: Lines after which a sweep starts again from zero; 0 for sweeps over the whole map.
        aligned: Return the directions' outputs to their pixels, see `LineScan2d`.
        shared_gates: One set of gates for all channels, as in GSPN-2.
        drop: Dropout rate of the output.

    Raises:
        ValueError: For an even `conv_kernel`, a negative `chunk` or no proxy channel.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        ratio: float = 1.5,
        conv_kernel: int = 7,
        conv_bias: bool = False,
        chunk: int = 0,
        aligned: bool = False,
        shared_gates: bool = False,
        drop: float = 0.0,
    ):
        super().__init__()
        if conv_kernel % 2 == 0:
            raise ValueError(f"GSPNMixer: conv_kernel is {conv_kernel}, expected an odd number")
        inner = int(ratio * dim)
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv = DepthwiseConv2d(inner, conv_kernel, conv_bias)
        self.scan = LineScan2d(inner, d_state, chunk, aligned, shared_gates)
        self.out_norm = nn.LayerNorm(inner)
        self.grn = GlobalResponseNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scan(self.conv(self.in_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
        return self.drop(self.project(y)).permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> Tensor:
        """Both norms and the last linear layer, as one operator where that is faster: (B, C, H, W) -> (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.out_norm, nn.LayerNorm) or not is_plain(self.grn, GlobalResponseNorm):
                return self.out_proj(self.grn(self.out_norm(x.permute(0, 2, 3, 1))))
            if self.projects_at_once(x):
                return self.normalize(x, self.out_proj.weight)
        return self.out_proj(self.normalize(x))

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Tensor | None]:
        """See `vla.layers.weights.product_weights`."""
        return {"out_proj.weight": None}  # whose rows the norms' operator scales first

    @torch.jit.ignore
    def projects_at_once(self, x: Tensor) -> bool:
        """Whether the norms' operator has the last linear layer."""
        # PyTorch's own layers know best about float32 and CPUs, and a graph of torch.fx has the layer as a module.
        if not isinstance(x, Tensor) or not x.is_cuda or x.dtype.itemsize != 2:
            return False
        return is_plain(self.out_proj, nn.Linear) and self.out_proj.bias is None

    def normalize(self, x: Tensor, projection: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """Both norms in one operator, and a linear layer: (B, C, H, W) -> (B, H, W, C)."""
        norm = self.out_norm
        grn = self.grn
        y = layer_norm_grn(
            x, norm.weight, norm.bias, grn.weight, grn.bias, norm.eps, grn.eps, autocast_dtype(x), projection
        )  # fmt: skip
        return y.permute(0, 2, 3, 1)


class GSPNBlock(ResidualBlock):
    """GSPN's block, (B, C, H, W) to the same, for maps of any size: `GSPNMixer` and an MLP.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width of the MLP over `dim`; 0 leaves the MLP out.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of the layer scale, None for none.
        norm_layer: Class or timm name of the norms.
        act_layer: Class or timm name of the MLP's activation.
        mlp_drop: Dropout rate inside the MLP.
        gated_mlp: Use a gated MLP, `fc2(u * act(g))` with `u, g = fc1(x)`.
        **mixer_args: Options of `GSPNMixer`: `d_state`, `ratio`, `conv_kernel`, `conv_bias`, `chunk`, `aligned`,
            `shared_gates`, `drop`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = DEFAULT_NORM,
        act_layer: str | type[nn.Module] = nn.GELU,
        mlp_drop: float = 0.0,
        gated_mlp: bool = False,
        **mixer_args,
    ):
        super().__init__(
            dim,
            GSPNMixer(dim, **mixer_args),
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
            norm_layer=norm_layer,
            act_layer=act_layer,
            mlp_drop=mlp_drop,
            gated_mlp=gated_mlp,
        )
