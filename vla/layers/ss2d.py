"""2D-Selective-Scan (SS2D), the token mixer of VMamba, https://arxiv.org/abs/2401.10166, and its block."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer
from torch import Tensor, nn

from ..ops import cross_merge, projected_scan2d, ssd
from ..ops.scan2d.order import to_sequence
from .block import DEFAULT_NORM, ResidualBlock
from .depthwise import DepthwiseConv2d
from .hooks import is_plain
from .norm import LayerNorm2d, autocast_dtype, narrow
from .weights import Exact, Form

# Directions of the four parameter groups of each scan. `row_rev` is `row` from the last pixel to the first.
SCANS = {
    "cross2d": ["row", "col", "row_rev", "col_rev"],
    "unidi": ["row", "row", "row", "row"],
    "bidi": ["row", "row", "row_rev", "row_rev"],
    "cascade2d": ["row", "row_rev", "col", "col_rev"],
    "cascade2d_aligned": ["row", "row_rev", "col", "col_rev"],
}
OUT_NORMS = ("ln", "none", "dwconv3", "lndwconv3", "softmax", "sigmoid")
INITS = ("v0", "v1", "v2")


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Every pixel of x (B, D, H, W) through K weights (K, E, D) at once: (B, K, E, H, W), channels last in memory."""
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(0, 1))
    return y.unflatten(-1, (weight.shape[0], weight.shape[1])).permute(0, 3, 4, 1, 2)


def init_decay(init: str, decay: Tensor, *steps: Tensor) -> None:
    """The initialisations `'v1'` and `'v2'` of a decay (logarithm) and of the time step's parameters, in place."""
    if init == "v1":
        nn.init.normal_(decay)
        for step in steps:
            nn.init.normal_(step, std=0.1)
    else:
        nn.init.zeros_(decay)
        for step in steps:
            nn.init.uniform_(step, 0, 0.1)


def inverse_softplus(x: Tensor) -> Tensor:
    """The `y` with `softplus(y) = x`, for positive `x`."""
    return x + torch.log(-torch.expm1(-x))


class SelectiveScan2d(nn.Module):
    r"""S6 along directions of a map, with its input-dependent parameters: (B, D, H, W) to the same.

    Per direction k, `dt`, `B` and `C` are a linear projection of the pixel, the time step through a bottleneck of width
    R (VMamba, sec. 4.2; Mamba, sec. 3.2). The projection is pointwise, so it is done once for all directions, in the
    map's own layout, and the directions only exist inside `vla.ops.projected_scan2d`.

    Args:
        dim: Channels D.
        dt_rank: Rank R of the time step.
        d_state: States N per channel.
        directions: K directions, see `vla.ops.scan2d`.
        init: `'v0'`: the S4D-real initialisation of Mamba with time steps in [0.001, 0.1]; `'v1'`: normal and
            `'v2'`: constant decay with uniform time-step parameters.

    Attributes:
        x_proj_weight: Projection to (dt, B, C), (K, R + 2N, D).
        dt_proj_weight: Expansion of the time step, (K, D, R).
        dt_proj_bias: Time step before softplus, (K, D).
        A_log: Logarithm of the decay rate, (K, D, N).
        D: Skip weight, (K, D).
    """

    def __init__(self, dim: int, dt_rank: int, d_state: int, directions: list[str], init: str = "v0"):
        super().__init__()
        k = len(directions)
        self.directions = list(directions)
        self.dt_rank = dt_rank
        self.d_state = d_state
        self.x_proj_weight = nn.Parameter(torch.empty(k, dt_rank + 2 * d_state, dim))
        self.dt_proj_weight = nn.Parameter(torch.empty(k, dim, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(k, dim))
        self.A_log = nn.Parameter(torch.empty(k, dim, d_state))
        self.D = nn.Parameter(torch.ones(k, dim))
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Fills the parameters by the rule `init`, see the class."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        if init == "v0":
            bound = self.dt_rank**-0.5
            nn.init.uniform_(self.dt_proj_weight, -bound, bound)
            dt = torch.empty_like(self.dt_proj_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj_bias.copy_(inverse_softplus(dt.clamp(min=1e-4)))
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
        else:
            init_decay(init, self.A_log, self.dt_proj_weight, self.dt_proj_bias)

    def decay_rates(self) -> Tensor:
        """A, (K, D, N)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            # A compiled network may have those in the parameter's place, see `product_weights`.
            if torch.compiler.is_compiling() and self.A_log.dim() == 4:
                return self.A_log[0]
        return -torch.exp(self.A_log)

    def parameter_groups(self) -> list[Tensor]:
        """Everything that a scan takes, with the K groups in front."""
        return [self.x_proj_weight, self.decay_rates(), self.D, self.dt_proj_weight, self.dt_proj_bias]

    def scan(
        self,
        x: Tensor,
        groups: list[Tensor],
        directions: list[str],
        per_line: bool,
        norm_weight: Optional[Tensor] = None,  # noqa: UP045
        norm_bias: Optional[Tensor] = None,  # noqa: UP045
        eps: float = 1e-5,
    ) -> Tensor:
        """Sum of scans with some of the `parameter_groups`, one per direction; with weights for it, its layer norm."""
        weight, A, D, dt_weight, dt_bias = groups
        return projected_scan2d(
            x, weight, A, directions, D, dt_weight, dt_bias, True, per_line, norm_weight, norm_bias, eps
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x, self.parameter_groups(), self.directions, False)

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        return {"x_proj_weight": self.x_proj_weight, "A_log": Exact(self.decay_rates()[None])}


class CascadeScan2d(SelectiveScan2d):
    """Scans every row in both directions, then every column of the result, each line from a zero state.

    Both passes read a map normalised over its channels. As released, the output of a reversed scan stays in the order
    of the scan: what was computed for the last pixel of a line is added to the first one. Checkpoints need that;
    `aligned` puts every output back to its pixel.

    Args:
        dim: Channels D.
        dt_rank: Rank of the time step.
        d_state: States per channel.
        directions: Two directions of the rows, then two of the columns.
        init: See `SelectiveScan2d`.
        aligned: Put the outputs of reversed scans back to their pixels.
    """

    def __init__(
        self, dim: int, dt_rank: int, d_state: int, directions: list[str], init: str = "v0", aligned: bool = False
    ):
        super().__init__(dim, dt_rank, d_state, directions, init)
        self.dim = dim
        self.aligned = aligned

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        return {}  # norms of float32 are what is projected

    def scan_lines(self, x: Tensor, first: int, axis: int) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), [self.dim]).permute(0, 3, 1, 2)
        if self.aligned:
            return self.scan_groups(x, first, first + 2)
        return self.scan_groups(x, first, first + 1) + self.scan_groups(x, first + 1, first + 2).flip([axis])

    def scan_groups(self, x: Tensor, first: int, last: int) -> Tensor:
        groups = [parameter[first:last] for parameter in self.parameter_groups()]
        return self.scan(x, groups, self.directions[first:last], True)

    def forward(self, x: Tensor) -> Tensor:
        return self.scan_lines(self.scan_lines(x, 0, 3), 2, 2)


class SSD2d(nn.Module):
    r"""Mamba-2's state-space duality along directions of a map: (B, D, H, W) to the same.

    Like `SelectiveScan2d` with one decay and one time step per head instead of per channel and state (Mamba-2,
    https://arxiv.org/abs/2405.21060, sec. 5 and 7): R heads of D // R channels per direction.

    Args:
        dim: Channels D, a multiple of `heads`.
        heads: Heads R per direction.
        d_state: States N per channel.
        directions: K directions, see `vla.ops.scan2d`.
        init: `'v1'` or `'v2'`, see `SelectiveScan2d`.

    Attributes:
        x_proj_weight: Projection to (dt, B, C), (K, R + 2N, D).
        dt_proj_bias: Time step before softplus, (K, R).
        A_log: Logarithm of the decay rate, (K, R).
        D: Skip weight, (K, R, D // R).
    """

    def __init__(self, dim: int, heads: int, d_state: int, directions: list[str], init: str = "v2"):
        super().__init__()
        if dim % heads != 0:
            raise ValueError(f"SSD2d: dim is {dim}, expected a multiple of the {heads} heads")
        if init == "v0":
            raise ValueError("SSD2d: init is 'v0', expected one of v1, v2")
        k = len(directions)
        self.directions = list(directions)
        self.heads = heads
        self.d_state = d_state
        self.x_proj_weight = nn.Parameter(torch.empty(k, heads + 2 * d_state, dim))
        self.dt_proj_bias = nn.Parameter(torch.empty(k, heads))
        self.A_log = nn.Parameter(torch.empty(k, heads))
        self.D = nn.Parameter(torch.ones(k, heads, dim // heads))
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Fills the parameters by the rule `init`, see the class."""
        bound = self.x_proj_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_decay(init, self.A_log, self.dt_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        projected = project(x, self.x_proj_weight)
        us: list[Tensor] = []
        steps: list[Tensor] = []
        for k, direction in enumerate(self.directions):
            us.append(to_sequence(x, direction))
            steps.append(to_sequence(projected[:, k], direction))
        # (B, L, K, D) and (B, L, K, R + 2N)
        u = torch.stack(us, dim=1).permute(0, 3, 1, 2)
        dt, B, C = torch.stack(steps, dim=1).permute(0, 3, 1, 2).split([self.heads, self.d_state, self.d_state], dim=3)
        y, _ = ssd(
            u.unflatten(3, (self.heads, -1)).flatten(2, 3),
            dt.flatten(2, 3),
            -torch.exp(self.A_log.flatten()),
            B,
            C,
            self.D.flatten(0, 1),
            self.dt_proj_bias.flatten(),
            dt_softplus=True,
        )
        ys = y.unflatten(2, (len(self.directions), self.heads)).flatten(3).permute(0, 2, 3, 1)
        return cross_merge(ys, self.directions, height, width)


class SpatialSoftmax(nn.Module):
    """Softmax over the pixels of each channel, (B, C, H, W) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return y.flatten(1, 2).softmax(dim=1).view(y.shape).permute(0, 3, 1, 2)


def create_out_norm(name: str, dim: int) -> nn.Module:
    """What stands between the merged scans and the gate, by its name in `OUT_NORMS`."""
    if name == "none":
        return nn.Identity()
    if name == "softmax":
        return SpatialSoftmax()
    if name == "sigmoid":
        return nn.Sigmoid()
    layers = OrderedDict()
    if name in ("ln", "lndwconv3"):
        layers["norm"] = narrow(DEFAULT_NORM(dim))
    if name in ("dwconv3", "lndwconv3"):
        layers["conv"] = DepthwiseConv2d(dim, 3, bias=False)
    return layers["norm"] if name == "ln" else nn.Sequential(layers)


class SS2D(nn.Module):
    r"""2D-Selective-Scan: VMamba's token mixer, (B, C, H, W) to the same, for maps of any size.

        x, z = in_proj(x)
        y    = out_norm(scan(act(conv(x))))
        out  = out_proj(y * act(z))                 (the gate only if `gate`)

    Linear in the number of pixels; every pixel sees every other one through four directional scans (`'cross2d'`). Any
    memory format goes in; `torch.channels_last` is the one that needs no copies.

    Args:
        dim: Channels C.
        d_state: States N per channel.
        ssm_ratio: Inner width D over C.
        dt_rank: Rank R of the time step (with `ssd` the number of heads per direction), default `ceil(C / 16)`.
        act_layer: Class or timm name of the activation after the convolution and of the gate.
        conv_kernel: Side of the depthwise convolution, odd; 1 (or less) for none.
        conv_bias: Bias of that convolution.
        gate: Multiply the scan's output with a projection of the input.
        gate_act: Activation on the gate.
        scan: `'cross2d'` (rows, columns and both reversed: VMamba), `'unidi'` (rows), `'bidi'` (rows and reversed
            rows), `'cascade2d'` (every row by itself, then every column; see `CascadeScan2d`) or `'cascade2d_aligned'`.
        ssd: Scan by Mamba-2's state-space duality instead of S6. Not for the cascades.
        out_norm: Between scan and gate: `'ln'` (over channels), `'none'`, `'dwconv3'` (depthwise 3x3 convolution),
            `'lndwconv3'` (both), `'softmax'` (over the pixels of each channel), `'sigmoid'`.
        out_act: GELU after `out_norm`.
        init: `'v0'`, `'v1'` or `'v2'`, see `SelectiveScan2d`; default `'v0'`, with `ssd` `'v2'`.
        drop: Dropout rate of the output.

    Raises:
        ValueError: For an unknown name or a combination that does not exist.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        act_layer: str | type[nn.Module] = nn.SiLU,
        conv_kernel: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        gate_act: bool = True,
        scan: str = "cross2d",
        out_norm: str = "ln",
        ssd: bool = False,
        out_act: bool = False,
        init: str | None = None,
        drop: float = 0.0,
    ):
        super().__init__()
        init = init or ("v2" if ssd else "v0")
        for name, value, known in (("scan", scan, SCANS), ("out_norm", out_norm, OUT_NORMS), ("init", init, INITS)):
            if value not in known:
                raise ValueError(f"SS2D: unknown {name} {value!r}, expected one of {', '.join(known)}")
        if conv_kernel > 1 and conv_kernel % 2 == 0:
            raise ValueError(f"SS2D: conv_kernel is {conv_kernel}, expected an odd number, or 1 for none")
        inner = int(ssm_ratio * dim)
        if inner < 1:
            raise ValueError(f"SS2D: ssm_ratio is {ssm_ratio}, expected one that leaves a channel of {dim}")
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        act_layer = get_act_layer(act_layer)

        self.gate = gate
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.gate_act = act_layer() if gate_act else nn.Identity()
        # With its activation, which a network without the convolution keeps.
        self.conv = DepthwiseConv2d(inner, conv_kernel, conv_bias, act_layer) if conv_kernel > 1 else act_layer()
        if ssd:
            if scan.startswith("cascade2d"):
                raise ValueError(f"SS2D: scan is {scan!r}, expected one of cross2d, unidi, bidi with ssd")
            self.scan = SSD2d(inner, dt_rank, d_state, SCANS[scan], init)
        elif scan.startswith("cascade2d"):
            self.scan = CascadeScan2d(inner, dt_rank, d_state, SCANS[scan], init, aligned=scan == "cascade2d_aligned")
        else:
            self.scan = SelectiveScan2d(inner, dt_rank, d_state, SCANS[scan], init)
        self.out_norm = create_out_norm(out_norm, inner)
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.gate:
            x, z = x.chunk(2, dim=1)
            y = self.mix(x) * self.gate_act(z)
        else:
            y = self.mix(x)
        return self.drop(self.out_proj(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def mix(self, x: Tensor) -> Tensor:
        """Everything between the two projections but the gate, (B, D, H, W) to the same."""
        return self.out_act(self.scan_and_norm(self.conv(x)))

    def scan_and_norm(self, x: Tensor) -> Tensor:
        """`out_norm(scan(x))`: a layer norm takes part in the sum over directions."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.scan_takes_norm(x):
                scan, norm = self.scan, self.out_norm
                groups = scan.parameter_groups()
                return scan.scan(x, groups, scan.directions, False, norm.weight, norm.bias, norm.eps)
        return self.out_norm(self.scan(x))

    @torch.jit.ignore
    def scan_takes_norm(self, x: Tensor) -> bool:
        """Whether there are kernels for scan and norm as one operator, whose result has the norm's dtype."""
        # Tracing by torch.fx hands proxies through.
        if not isinstance(x, Tensor) or not (x.is_cuda or x.is_xpu):
            return False
        if autocast_dtype(x) not in (None, x.dtype):
            return False
        return is_plain(self.scan, SelectiveScan2d) and is_plain(self.out_norm, LayerNorm2d) and self.out_norm.narrow


class VSSBlock(ResidualBlock):
    """VMamba's block: `SS2D` and an MLP, each with its norm and its residual connection, (B, C, H, W) to the same.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width of the MLP over `dim`; 0 for no MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of a learned scale per channel on both residual branches, None for no scale.
        norm_layer: Class or timm name of the norm of (B, C, H, W) maps.
        act_layer: Class or timm name of the MLP's activation.
        mlp_drop: Dropout rate inside the MLP.
        gated_mlp: Use a gated MLP, `fc2(u * act(g))` with `u, g = fc1(x)`.
        post_norm: Normalise outputs instead of inputs of mixer and MLP.
        ssm_act_layer: Class or timm name of the mixer's activation.
        **mixer_args: Further options of `SS2D`: `d_state`, `ssm_ratio`, `gate`, `scan`, ...
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
        post_norm: bool = False,
        ssm_act_layer: str | type[nn.Module] = nn.SiLU,
        **mixer_args,
    ):
        super().__init__(
            dim,
            SS2D(dim, act_layer=ssm_act_layer, **mixer_args),
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
            norm_layer=norm_layer,
            act_layer=act_layer,
            mlp_drop=mlp_drop,
            gated_mlp=gated_mlp,
            post_norm=post_norm,
        )
