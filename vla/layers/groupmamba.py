"""GroupMamba's modulated group mixer and block, https://arxiv.org/abs/2407.13772."""

import math
from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops._maps import with_columns
from ..ops.group_modulation import WHOLE
from ..ops.grouped_linear import TOGETHER
from ..ops.scan2d import DIRECTIONS
from .aligned import ALIGNMENT, is_worth_launches
from .block import DEFAULT_NORM, ResidualBlock
from .depthwise import DepthwiseConv2d
from .hooks import is_plain
from .norm import (
    FEW_CHANNELS,
    LARGE,
    LayerNorm2d,
    as_rows,
    autocast_dtype,
    narrow,
    normalize,
    result_dtype,
    takes_narrow_kernels,
)
from .ss2d import SelectiveScan2d
from .weights import Form

__all__ = ["ConvMlp", "GroupMambaBlock", "GroupMambaMixer", "GroupedLinear", "GroupedSS2D"]

# Tracing wraps a function by its name in the module that calls it.
torch.fx.wrap("normalize")


# Numbers of 16 bits in the 128 bytes that Inductor has long rows be multiples of, and from which on they are long. To
# rows further apart than they are long, a library adds no bias: that would be a copy to all rows before the product.
COMPILER_ALIGNMENT = 64
COMPILER_PADS = 1024
# Features up to which `vla.ops.conv_mlp` has registers for their sums, and numbers of a hidden map from which on it
# keeps a GPU busy.
SUMMED = 128
BUSY = 2**22


def is_narrow(x: Tensor) -> bool:
    """Whether a map has 16 bits and is on a GPU, which is what the kernels of GroupMamba's own operators are for."""
    # Tracing by torch.fx hands proxies through, and what is traced must not depend on whether gradients are on.
    return isinstance(x, Tensor) and x.is_cuda and x.dtype.itemsize == 2 and not torch.jit.is_tracing()


def infers(x: Tensor) -> bool:
    """Whether operators serve a map that have such kernels, and none for gradients."""
    return is_narrow(x) and not torch.is_grad_enabled()


def are_narrow_groups(weight: Tensor) -> bool:
    """Whether groups with such weights are of few channels, for which kernels read the weights as they are."""
    return max(weight.shape[1:]) <= TOGETHER


def has_grouped_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether `vla.ops.grouped_linear` with such weights is faster than one product with a block-diagonal matrix."""
    # A compiler makes few launches of what it takes to have that aligned.
    return is_narrow(x) and (are_narrow_groups(weight) or (infers(x) and not torch.compiler.is_compiling()))


def recomputed(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """`function(*maps)`, of which autograd keeps only `maps` on a GPU: what is in between, the backward computes anew.

    A compiler decides itself what to keep, and transforms of `torch.func` do without.
    """
    observed = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    # Tracing by torch.fx hands proxies through.
    if isinstance(maps[0], Tensor) and not observed and torch.is_grad_enabled() and is_worth_launches(maps[0]):
        return checkpoint(function, *maps, use_reentrant=False)
    return function(*maps)


def added_columns(in_features: int, out_features: int, bias: bool) -> int:
    """Columns that `aligned_linear` puts behind those of a map: zeros, but for ones in the first, for the bias."""
    # A product with fewer rows takes hardly longer than the copy that x may have to be.
    columns = -in_features % ALIGNMENT if out_features >= in_features else 0
    trains = torch.is_grad_enabled() and not torch.jit.is_tracing()
    if bias and columns == 0 and out_features > in_features and trains:
        columns = ALIGNMENT
    return columns


def aligned_matrix(weight: Tensor, bias: Tensor | None, columns: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for a map with so many columns: with rows behind the features, and the bias as a column."""
    rows = -weight.shape[0] % ALIGNMENT
    if columns > 0:
        if bias is not None:
            weight, columns = torch.cat([weight, bias[:, None]], dim=1), columns - 1
        return F.pad(weight, (0, columns, 0, rows)), None
    if torch.compiler.is_compiling() and len(weight) > COMPILER_PADS:
        rows = -len(weight) % COMPILER_ALIGNMENT
    if rows > 0:
        weight = F.pad(weight, (0, 0, 0, rows))
        bias = None if bias is None else F.pad(bias, (0, rows))
    return weight, bias


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The linear layer of an `aligned_matrix`, for a map with its columns."""
    y = F.linear(x, weight, bias)
    return y if len(weight) == out_features else y[..., :out_features]


def aligned_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with zeros between the rows of its matrices, so that they all start at multiples of 16 bytes.

    Where columns are added, or the bias' gradient would be a sum over a map much wider than x, the bias is one more
    column of the weight, and x has a column of ones: the product for the weight's gradient then has that sum. A map
    may come with its columns.
    """
    out_features, in_features = weight.shape
    columns = x.shape[-1] - in_features
    if columns == 0:
        columns = added_columns(in_features, out_features, bias is not None)
        # Concatenated, not padded: a compiler then lets what computes x write right into the wider rows.
        x = with_columns(x, columns)
    # Cast first: gradients are then what is cast of parts of a wider matrix, not parts of one, to be copied once more.
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return multiply(x, *aligned_matrix(weight, bias, columns), out_features)


def ready_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`aligned_linear` of an `aligned_matrix`, where x may lack its columns."""
    x = with_columns(x.to(weight.dtype), weight.shape[1] - x.shape[-1])
    return multiply(x, weight, bias, out_features)


@torch.fx.wrap
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
    """`F.linear`, in 16 bits at a GPU's full speed for any numbers of features."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
        if x.dtype.itemsize == 2 and is_worth_launches(x):
            return aligned_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, in 16 bits at a GPU's full speed for any numbers of features."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if torch.compiler.is_compiling() and self.weight.shape != (self.out_features, self.in_features):
                bias = self.bias if self.weight.shape[1] == self.in_features else None
                return ready_linear(x, self.weight, bias, self.out_features)
        return linear(x, self.weight, self.bias)

    @torch.jit.ignore
    def added_columns(self) -> int:
        return added_columns(self.in_features, self.out_features, self.bias is not None)

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        if self.weight.dtype.itemsize == 2:
            return {}
        weight, bias = aligned_matrix(self.weight, self.bias, self.added_columns())
        return {"weight": weight, "bias": bias}


def block_diagonal(weights: list[Tensor], zeros: int = 0) -> Tensor:
    """One matrix (len(weights) * K * O, K * I) that applies the K matrices (K, O, I) of each to groups of channels.

    With `zeros` rows of zeros behind those of each of the weights.
    """
    stacked = weights[0][None] if len(weights) == 1 else torch.stack(weights)
    stacked = stacked.permute(0, 2, 3, 1)  # (len(weights), O, I, K)
    matrices = torch.diag_embed(stacked, dim1=1, dim2=3).flatten(3, 4).flatten(1, 2)
    if zeros > 0:
        matrices = F.pad(matrices, [0, 0, 0, zeros])
    return matrices.flatten(0, 1)


def writes_columns(x: Tensor) -> bool:
    """Whether norms of a map write the columns that `aligned_linear` wants behind channels.

    In compiled graphs, where a compiler would have them written by another kernel, or by its own norm, which then takes
    rows in two passes.
    """
    return torch.compiler.is_compiling() and x.numel() >= LARGE and takes_narrow_kernels(x)


def normalize_wider(
    norm: LayerNorm2d,
    x: Tensor,
    branch: Tensor | None,
    columns: int,
    factor: Tensor | None = None,
    second: Tensor | None = None,
    with_sum: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """The sum and its norm with columns behind its channels, of maps (B, C, H, W) and to such.

    Args:
        norm: The norm.
        x: First summand.
        branch: Second summand, if there is one.
        columns: How many columns.
        factor: Factors of the pictures in the branch, (B,).
        second: Third summand, if there is one.
        with_sum: Whether somebody needs the sum; else it is None.
    """
    shape = x.permute(0, 2, 3, 1).shape
    dtype = autocast_dtype(x) or x.dtype if norm.narrow else result_dtype(x, False)
    options = dict(eps=norm.eps, dtype=dtype, columns=columns)
    rows = as_rows(x.permute(0, 2, 3, 1))
    if branch is None:
        y = ops.layer_norm(rows, norm.weight, norm.bias, **options)
    else:
        branch, second = (None if t is None else as_rows(t.permute(0, 2, 3, 1)) for t in (branch, second))
        total, y = ops.add_layer_norm(
            rows, branch, norm.weight, norm.bias, factor=factor, second=second, with_sum=with_sum, **options
        )
        x = total.view(shape).permute(0, 3, 1, 2) if with_sum else None
    return x, y.view(*shape[:3], shape[3] + columns).permute(0, 3, 1, 2)


def split_groups(y: Tensor, x: Tensor, outs: int, zeros: int) -> list[Tensor]:
    """Rows of results, with zeros behind `outs` of each of several matrices, as maps with the pixels of x."""
    batch, _, height, width = x.shape
    parts = y.split(outs + zeros, dim=-1)
    return [part[..., :outs].view(batch, height, width, outs).permute(0, 3, 1, 2) for part in parts]


def zeros_behind(outs: int, parts: int) -> int:
    """Zeros with which all parts of a product start at multiples of 16 bytes."""
    return -outs % ALIGNMENT if parts > 1 else 0


@torch.fx.wrap
def grouped_linear(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Every group of channels through its own matrix.

    Args:
        x: Map, (B, K * I, H, W).
        weights: Matrices of the groups, (K, O, I), all of one shape.

    Returns:
        A map (B, K * O, H, W) for each of the weights.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
        if len(weights) <= 2 and has_grouped_kernels(x, weights[0]):
            function = ops.grouped_linear if len(weights) == 1 else ops.grouped_linear_pair
            results = function(x.permute(0, 2, 3, 1), *weights)
            return [y.permute(0, 3, 1, 2) for y in ([results] if len(weights) == 1 else results)]
    if x.is_cuda:
        # Tensor cores have the multiplications with zero to spare; cuDNN would transpose the map before and after a
        # grouped convolution. Several weights make one product, which reads x once.
        # Parts of rows, so that a compiler has their gradients side by side with channels last.
        rows, outs = as_rows(x.permute(0, 2, 3, 1)), weights[0].shape[0] * weights[0].shape[1]
        zeros = 0
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            # A compiler's one launch for the matrix brings it about.
            if torch.compiler.is_compiling() and is_narrow(x):
                zeros = zeros_behind(outs, len(weights))
        return split_groups(linear(rows, block_diagonal(weights, zeros)), x, outs, zeros)
    # A convolution reads and writes channels-last maps in place, where a batched product would permute both.
    return [F.conv2d(x, w.flatten(0, 1)[:, :, None, None], groups=w.shape[0]) for w in weights]


# A compiled network has the matrices of large products from the weights of its groups at once, see `product_weights`.


def grouped_matrix(weights: list[Tensor]) -> Tensor | None:
    """The matrix that `grouped_linear` makes of weights in a compiled network, None where it takes them as they are."""
    if weights[0].dtype.itemsize == 2 or are_narrow_groups(weights[0]):
        return None
    groups, results, width = weights[0].shape
    matrix = block_diagonal(weights, zeros_behind(groups * results, len(weights)))
    return aligned_matrix(matrix, None, -(groups * width) % ALIGNMENT)[0]


def multiply_groups(x: Tensor, weights: list[Tensor], outs: int) -> list[Tensor]:
    """`grouped_linear` for maps of `outs` channels, where the first of the weights may be their `grouped_matrix`.

    x may have columns then.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
        if torch.compiler.is_compiling() and weights[0].dim() == 2:
            zeros, rows = zeros_behind(outs, len(weights)), as_rows(x.permute(0, 2, 3, 1))
            y = ready_linear(rows, weights[0], None, len(weights) * (outs + zeros))
            return split_groups(y, x, outs, zeros)
    return grouped_linear(x, weights)


class GroupedLinear(nn.Module):
    """A linear layer without bias for each group of channels, (B, groups * in, H, W) -> (B, groups * out, H, W).

    Args:
        groups: Number of groups.
        in_features: Input channels of a group.
        out_features: Output channels of a group.
    """

    def __init__(self, groups: int, in_features: int, out_features: int):
        super().__init__()
        self.groups = groups
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return multiply_groups(x, [self.weight], self.groups * self.out_features)[0]

    def extra_repr(self) -> str:
        return f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}"

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        return {"weight": grouped_matrix([self.weight])}


class GroupedLayerNorm(nn.Module):
    """Layer norm over the channels of each group, and a gate, for (B, groups * dim, H, W) maps.

    Args:
        groups: Number of groups.
        dim: Channels of a group.
        eps: Added to the variance.
    """

    def __init__(self, groups: int, dim: int, eps: float = 1e-5):
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(groups, dim))
        self.bias = nn.Parameter(torch.zeros(groups, dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Norm of x times SiLU of `gate`."""
        x, gate = x.permute(0, 2, 3, 1), gate.permute(0, 2, 3, 1)
        y = normalize(x, self.weight.flatten(), self.bias.flatten(), self.eps, True, self.groups, gate)
        return y.permute(0, 3, 1, 2)


class GroupedScan2d(SelectiveScan2d):
    """`SelectiveScan2d` in which direction k scans, and is parametrised by, the k-th group of channels only.

    Takes and returns (B, K * dim, H, W); `dim` is the width of a group.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x, x)

    def scan(self, x: Tensor, wide: Tensor) -> Tensor:
        """The scan of x with projections of `wide`: of x, which may have zeros behind its channels there."""
        k, n = len(self.directions), self.d_state
        width = self.dt_rank + 2 * n
        projected = multiply_groups(wide, [self.x_proj_weight], k * width)[0].unflatten(1, (k, width))
        dt, B, C = projected.split([self.dt_rank, n, n], dim=2)
        return ops.scan2d(
            x,
            dt,
            self.decay_rates(),
            B,
            C,
            self.directions,
            self.D,
            self.dt_proj_weight,
            self.dt_proj_bias,
            grouped=True,
        )

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        return {**super().product_weights(), "x_proj_weight": grouped_matrix([self.x_proj_weight])}


class GroupedSS2D(nn.Module):
    r"""VMamba's SS2D for K groups of channels, each scanned in one direction (GroupMamba, sec. 4.1).

        x, z = in_proj(x), gate_proj(x)
        out  = out_proj(out_norm(scan(silu(conv(x)))) * silu(z))

    All groups go through every operation together; none mixes channels of different groups.

    Args:
        dim: Channels C, a multiple of the number of directions.
        directions: Direction of each group, see `vla.ops.scan2d`.
        d_state: States N per channel.
        ssm_ratio: Inner width over `dim`.
        dt_rank: Rank of the time step, None for a sixteenth of a group's width, rounded up.

    Raises:
        ValueError: If the directions don't divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        directions: tuple[str, ...] = DIRECTIONS,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
    ):
        super().__init__()
        k = len(directions)
        if dim % k != 0:
            raise ValueError(f"GroupedSS2D: dim is {dim}, expected a multiple of the {k} directions")
        width = dim // k
        inner = int(ssm_ratio * width)
        dt_rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        self.in_proj = GroupedLinear(k, width, inner)
        self.gate_proj = GroupedLinear(k, width, inner)
        self.conv = DepthwiseConv2d(k * inner, 3, act_layer=nn.SiLU)
        self.scan = GroupedScan2d(inner, dt_rank, d_state, list(directions))
        self.out_norm = GroupedLayerNorm(k, inner)
        self.out_proj = GroupedLinear(k, inner, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if not self.has_plain_projections():
                return self.in_proj(x), self.gate_proj(x)
        in_proj = self.in_proj
        outs = in_proj.groups * in_proj.out_features
        x, z = multiply_groups(x, [in_proj.weight, self.gate_proj.weight], outs)
        return x, z

    @torch.jit.ignore
    def has_plain_projections(self) -> bool:
        return is_plain(self.in_proj, GroupedLinear) and is_plain(self.gate_proj, GroupedLinear)

    @torch.jit.ignore
    def projects_with_mean(self, x: Tensor) -> bool:
        """Whether there is a `project_with_mean` for a map like x."""
        if not infers(x) or not self.has_plain_projections():
            return False
        # A compiled network may have a `grouped_matrix` in the weight's place, and columns for it behind the channels.
        weight, channels = self.in_proj.weight, self.in_proj.groups * self.in_proj.in_features
        return weight.dim() == 3 and x.shape[1] == channels and has_grouped_kernels(x, weight)

    @torch.jit.ignore
    def project_with_mean(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`project`, and the mean of each channel over the pixels, (B, C)."""
        weights = self.in_proj.weight, self.gate_proj.weight
        y, z, mean = ops.grouped_linear_pair_mean(x.permute(0, 2, 3, 1), *weights)
        return y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2), mean

    def convolve_and_scan(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.conv_writes_zeros(x):
                return self.scan_with_zeros(x)
        return self.scan(self.conv(x))

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        if not self.has_plain_projections():
            return {}
        return {
            "in_proj.weight": grouped_matrix([self.in_proj.weight, self.gate_proj.weight]),
            "gate_proj.weight": None,
        }

    @torch.jit.ignore
    def conv_writes_zeros(self, x: Tensor) -> bool:
        """Whether the convolution writes zeros behind its channels, for the projections of the scan."""
        conv, scan = self.conv, self.scan
        if not writes_columns(x) or not is_plain(conv, DepthwiseConv2d) or not is_plain(conv.act, nn.Identity):
            return False
        # Kernels of narrower groups need no zeros.
        return is_plain(scan, GroupedScan2d) and scan.D.shape[1] > TOGETHER and x.shape[1] % ALIGNMENT > 0

    @torch.jit.ignore
    def scan_with_zeros(self, x: Tensor) -> Tensor:
        conv, channels = self.conv, x.shape[1]
        zeros, dtype = -channels % ALIGNMENT, autocast_dtype(x)
        wide = ops.depthwise_conv2d(x, conv.weight, conv.bias, conv.fused_act, dtype, zeros)
        return self.scan.scan(wide[:, :channels], wide)

    def close(self, y: Tensor, z: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.norm_writes_columns(y):
                return self.close_with_columns(y, z)
        return self.out_proj(self.out_norm(y, z))

    @torch.jit.ignore
    def norm_writes_columns(self, y: Tensor) -> bool:
        """Whether the norm writes columns for the last projection."""
        if not writes_columns(y) or not is_plain(self.out_norm, GroupedLayerNorm):
            return False
        # Kernels of narrower groups need no columns.
        out_proj = self.out_proj
        return is_plain(out_proj, GroupedLinear) and out_proj.in_features > TOGETHER and y.shape[1] % ALIGNMENT > 0

    @torch.jit.ignore
    def close_with_columns(self, y: Tensor, z: Tensor) -> Tensor:
        norm, columns = self.out_norm, -y.shape[1] % ALIGNMENT
        y, z = y.permute(0, 2, 3, 1), z.permute(0, 2, 3, 1)
        dtype, vectors = autocast_dtype(y) or y.dtype, (norm.weight.flatten(), norm.bias.flatten())
        rows = ops.layer_norm(as_rows(y), *vectors, as_rows(z), norm.groups, norm.eps, dtype, columns)
        rows = rows.view(*y.shape[:3], y.shape[3] + columns).permute(0, 3, 1, 2)
        return self.out_proj(rows)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.project(x)
        return self.close(self.convolve_and_scan(x), z)


class GroupMambaMixer(nn.Module):
    r"""GroupMamba's modulated group layer (sec. 4.1 and 4.2), (B, C, H, W) to the same.

        n    = norm(x)
        gate = sigmoid(fc2(relu(fc1(mean_hw(n)))))
        out  = proj(norm(ssm(n) * skip_scale * n * gate))

    One and the same norm is used twice. It belongs to the layer: a block needs no other in front of it.

    Args:
        dim: Channels C, a multiple of 4.
        reduction: Channels over the hidden width of the gate.
        d_state: States N per channel of the scan.
        ssm_ratio: Inner width of the scan over `dim`.
        dt_rank: Rank of the time step, None for a sixteenth of a group's width, rounded up.

    Raises:
        ValueError: If `dim` is not a multiple of 4.
    """

    def __init__(
        self, dim: int, reduction: int = 16, d_state: int = 1, ssm_ratio: float = 1.0, dt_rank: int | None = None
    ):
        super().__init__()
        if dim % 4 != 0:
            raise ValueError(f"GroupMambaMixer: dim is {dim}, expected a multiple of 4, one group per direction")
        self.dim = dim
        self.norm = narrow(DEFAULT_NORM(dim))
        hidden = max(1, dim // reduction)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.ssm = GroupedSS2D(dim, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x))

    def mix(self, n: Tensor) -> Tensor:
        """The mixer of a map that `norm` has been applied to, which may have columns behind its channels."""
        if torch.jit.is_scripting():
            return self.modulate(self.ssm(n), n, self.gate_of(n))
        else:
            return self.mix_and_norm(n)[0]

    @torch.jit.ignore
    def mix_and_norm(
        self, n: Tensor, stream: Tensor | None = None, norm: LayerNorm2d | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`mix`, and a norm of its sum with a stream where one operator does all that, else None."""
        wide = n
        if is_narrow(n) and n.shape[1] > self.dim:
            n = n[:, : self.dim]
        ssm = self.ssm
        if not is_plain(ssm, GroupedSS2D):
            return self.modulate(ssm(n), n, self.gate_of(n)), None
        if ssm.projects_with_mean(wide):
            x, z, mean = ssm.project_with_mean(wide)
            gate = self.gate(mean)
        else:
            gate = self.gate_of(n)
            x, z = ssm.project(wide)
        y = ssm.convolve_and_scan(x)
        if self.ends_at_once(y, n):
            return self.modulate_at_once(y, z, n, gate, stream, norm)
        return recomputed(self.close_and_modulate, y, z, n, gate), None

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        # Of the gate's layers there is no product.
        weights = {f"{layer}.{name}": None for layer in ("fc1", "fc2") for name in ("weight", "bias")}
        if self.dim <= WHOLE and is_plain(self.ssm, GroupedSS2D) and self.has_plain_end():
            # `vla.ops.group_modulation` aligns them itself.
            weights["ssm.out_proj.weight"] = self.ssm.out_proj.weight
            weights["proj.weight"] = self.proj.weight
            weights["proj.bias"] = None
        return weights

    def gate_of(self, n: Tensor) -> Tensor:
        # Over the map with its channels last, so that its gradient is laid out like the others that are added to it.
        return self.gate(n.permute(0, 2, 3, 1).mean((1, 2)))

    def gate(self, mean: Tensor) -> Tensor:
        """Factor of every channel, (B, C), from the channels' means (B, C)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if infers(mean) and is_plain(self.fc1, Linear) and is_plain(self.fc2, Linear):
                fc1, fc2 = self.fc1, self.fc2
                return ops.channel_gate(mean, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.skip_scale)
        return self.skip_scale * torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))

    def modulate(self, y: Tensor, n: Tensor, gate: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if is_narrow(y) and is_plain(self.norm, DEFAULT_NORM) and is_plain(self.proj, Linear):
                return self.modulate_in_one_pass(y, n, gate)
        y = y * n * gate[:, :, None, None]
        return self.proj(self.norm(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @torch.jit.ignore
    def modulate_in_one_pass(self, y: Tensor, n: Tensor, gate: Tensor) -> Tensor:
        """`modulate`, whose products and norm are one pass over memory, which leaves rows that `proj` takes."""
        norm, proj = self.norm, self.proj
        columns = proj.added_columns() if is_worth_launches(y) else 0
        y, n = y.permute(0, 2, 3, 1), n.permute(0, 2, 3, 1)
        rows = ops.modulated_layer_norm(y, n, gate, norm.weight, norm.bias, columns, norm.eps)
        return proj(as_rows(rows)).view(y.shape).permute(0, 3, 1, 2)

    @torch.jit.ignore
    def close_and_modulate(self, y: Tensor, z: Tensor, n: Tensor, gate: Tensor) -> Tensor:
        return self.modulate(self.ssm.close(y, z), n, gate)

    @torch.jit.ignore
    def ends_at_once(self, y: Tensor, n: Tensor) -> bool:
        """Whether `vla.ops.group_modulation` is what follows the scan."""
        if not is_narrow(y) or y.shape != n.shape:
            return False
        # A compiler makes few launches of the parts, which are faster on large maps than two passes; and the operator
        # has kernels for gradients only where it needs but one.
        if y.shape[1] > WHOLE and (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            return False
        return self.has_plain_end()

    @torch.jit.ignore
    def has_plain_end(self) -> bool:
        """Whether what follows the scan is what `vla.ops.group_modulation` does."""
        parts = (
            (self.ssm.out_norm, GroupedLayerNorm),
            (self.ssm.out_proj, GroupedLinear),
            (self.norm, DEFAULT_NORM),
            (self.proj, Linear),
        )
        return all(is_plain(module, kind) for module, kind in parts)

    @torch.jit.ignore
    def modulate_at_once(
        self, y: Tensor, z: Tensor, n: Tensor, gate: Tensor, stream: Tensor | None, stream_norm: LayerNorm2d | None
    ) -> tuple[Tensor, Tensor | None]:
        """`close_and_modulate`, and the norm of its sum with a stream if there is one, by one operator."""
        out_norm, norm, proj = self.ssm.out_norm, self.norm, self.proj
        arguments = (
            *(x.permute(0, 2, 3, 1) for x in (y, z, n)),
            gate,
            out_norm.weight.flatten(),
            out_norm.bias.flatten(),
            self.ssm.out_proj.weight,
            norm.weight,
            norm.bias,
            proj.weight,
            proj.bias,
        )
        if stream is None:
            return ops.group_modulation(*arguments, out_norm.eps, norm.eps).permute(0, 3, 1, 2), None
        out, normed = ops.group_modulation_add_norm(
            *arguments,
            stream.permute(0, 2, 3, 1),
            stream_norm.weight,
            stream_norm.bias,
            out_norm.eps,
            norm.eps,
            stream_norm.eps,
            norm_dtype=result_dtype(stream, stream_norm.narrow),
        )
        return out.permute(0, 3, 1, 2), normed.permute(0, 3, 1, 2)


class ConvMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution before its activation, (B, H, W, C) to the same.

    Args:
        dim: Channels C.
        hidden_dim: Channels between the linear layers.
        act_layer: Class or timm name of the activation.
        drop: Dropout rate after activation and output.
    """

    def __init__(self, dim: int, hidden_dim: int, act_layer: str | type[nn.Module] = nn.GELU, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.conv = DepthwiseConv2d(hidden_dim, 3, act_layer=act_layer)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim)
        # Inductor (torch 2.11) copies what goes through dropout that does nothing.
        self.drop2 = nn.Dropout(drop) if drop > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.runs_at_once(x):
                return self.drop2(ops.conv_mlp(x, *self.layers()))
        x = self.fc1(x).permute(0, 3, 1, 2)
        if torch.jit.is_scripting():
            return self.drop2(self.contract(x))
        else:
            return self.drop2(recomputed(self.contract, x))

    def contract(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop1(self.conv(x)).permute(0, 2, 3, 1))

    @torch.jit.ignore
    def layers(self) -> tuple[Tensor, ...]:
        """Weights and biases in the order of `vla.ops.conv_mlp`."""
        fc1, conv, fc2 = self.fc1, self.conv, self.fc2
        return fc1.weight, fc1.bias, conv.weight, conv.bias, fc2.weight, fc2.bias

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Form]:
        """See `vla.layers.weights.product_weights`."""
        if not self.is_one_operator(BUSY):
            return {}
        # As they are, where a product by itself would have them padded; the operator takes the last bias as it is.
        fc1, fc2 = self.fc1, self.fc2
        return {"fc1.weight": fc1.weight, "fc1.bias": fc1.bias, "fc2.weight": fc2.weight, "fc2.bias": None}

    @torch.jit.ignore
    def runs_at_once(self, x: Tensor) -> bool:
        """Whether `vla.ops.conv_mlp` does what the layers do."""
        if not infers(x) or autocast_dtype(x) not in (None, x.dtype):
            return False
        return self.is_one_operator(x.numel() // x.shape[-1])

    @torch.jit.ignore
    def is_one_operator(self, pixels: int) -> bool:
        """Whether that is what the operator does, and faster, with so many pixels."""
        fc1, conv, drop, fc2 = self.fc1, self.conv, self.drop1, self.fc2
        parts = ((fc1, Linear), (conv, DepthwiseConv2d), (drop, nn.Dropout), (fc2, Linear))
        if not all(is_plain(module, kind) for module, kind in parts):
            return False
        if not is_plain(conv.act, nn.Identity) or conv.fused_act != "gelu" or drop.training:
            return False
        return fc2.out_features <= SUMMED and pixels * fc1.out_features >= BUSY

    @torch.jit.ignore
    def add_and_norm(
        self, x: Tensor, stream: Tensor, branch: Tensor | None, norm: LayerNorm2d, with_sum: bool
    ) -> tuple[Tensor | None, Tensor]:
        """The MLP of x, where that `is_one_operator`, added to one or two maps, and the norm of the sum.

        All are (B, C, H, W).
        """
        total, y = ops.conv_mlp_add_norm(
            x.permute(0, 2, 3, 1),
            *self.layers(),
            stream.permute(0, 2, 3, 1),
            norm.weight,
            norm.bias,
            None if branch is None else branch.permute(0, 2, 3, 1),
            norm.eps,
            result_dtype(stream, norm.narrow),
            with_sum,
        )
        return total.permute(0, 3, 1, 2) if with_sum else None, y.permute(0, 3, 1, 2)


class GroupMambaBlock(ResidualBlock):
    """GroupMamba's block: `GroupMambaMixer`, then an MLP with a depthwise convolution. (B, C, H, W) to the same.

    Args:
        dim: Channels C, a multiple of 4.
        mlp_ratio: Hidden width of the MLP over `dim`; 0 for no MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of a learned scale per channel on both halves, None for no scale.
        norm_layer: Norm of (B, C, H, W) maps before the MLP; the mixer has its own.
        act_layer: Class or timm name of the MLP's activation.
        mlp_drop: Dropout rate inside the MLP.
        **mixer_args: Options of `GroupMambaMixer`: `reduction`, `d_state`, `ssm_ratio`, `dt_rank`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = partial(LayerNorm2d, eps=1e-6),
        act_layer: str | type[nn.Module] = nn.GELU,
        mlp_drop: float = 0.0,
        **mixer_args,
    ):
        mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer, mlp_drop) if mlp_ratio > 0 else None
        super().__init__(
            dim,
            GroupMambaMixer(dim, **mixer_args),
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
            norm_layer=norm_layer,
            mlp=mlp,
        )
        self.norm1 = nn.Identity()

    def begin(self, x: Tensor, y: Optional[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: UP045
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.norms_first():
                norm, columns = self.mixer.norm, self.columns_of_mixer(x)
                if columns > 0:
                    return normalize_wider(norm, x, y, columns)
                return (x, norm(x)) if y is None else norm.add(x, y)
        x = x if y is None else x + y
        return x, self.norm1(x)

    @torch.jit.ignore
    def first_norm(self, x: Tensor) -> tuple[nn.Module | None, int]:
        return (self.mixer.norm, self.columns_of_mixer(x)) if self.norms_first() else (None, 0)

    @torch.jit.ignore
    def adds_and_norms(self, x: Tensor, columns: int) -> bool:
        mlp = self.mlp
        if not is_plain(mlp, ConvMlp) or not is_plain(mlp.fc1, Linear) or not is_plain(mlp.drop2, nn.Identity):
            return False
        for module in (self.drop_path1, self.ls2, self.drop_path2):
            if not is_plain(module, nn.Identity) and (not is_plain(module, DropPath) or module.training):
                return False
        if torch.is_grad_enabled() or not takes_narrow_kernels(x):
            return False
        return self.ends_with_mlp(x, columns) or self.adds_last(x)

    @torch.jit.ignore
    def ends_with_mlp(self, x: Tensor, columns: int) -> bool:
        """Whether the MLP has a kernel that adds to the stream and norms the sum."""
        mlp = self.mlp
        return columns == 0 and mlp.is_one_operator(x.numel() // x.shape[1])

    @torch.jit.ignore
    def adds_last(self, x: Tensor) -> bool:
        """Whether the sum of the halves' stream is better not written, but added anew behind the MLP.

        A compiler's own norms of fewer channels do so anyway.
        """
        return x.shape[1] > FEW_CHANNELS and writes_columns(x) and is_plain(self.norm2, LayerNorm2d)

    @torch.jit.ignore
    def add_and_norm(
        self, x: Tensor, y: Tensor, norm: LayerNorm2d, columns: int, with_sum: bool
    ) -> tuple[Tensor | None, Tensor]:
        if not self.ends_with_mlp(x, columns):
            branch = self.ls1(self.mix(y))
            _, normed = normalize_wider(self.norm2, x, branch, self.columns_of_mlp(x), with_sum=False)
            second = self.mlp(normed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return normalize_wider(norm, x, branch, columns, second=second, with_sum=with_sum)
        stream, normed = x, None
        if self.norms_first() and is_plain(self.ls1, nn.Identity) and is_plain(self.norm2, LayerNorm2d):
            branch, normed = self.mixer.mix_and_norm(y, stream, self.norm2)
        else:
            branch = self.ls1(self.mix(y))
        if normed is None:
            x, normed = self.join(stream, branch)
            # A compiler does not write the sum of the halves, of which there was only the norm to make.
            if not torch.compiler.is_compiling():
                stream, branch = x, None
        return self.mlp.add_and_norm(normed, stream, branch, norm, with_sum)

    def join(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.jit.is_scripting():
            columns = self.columns_of_mlp(x)
            if columns > 0:
                y, factor = self.stochastic_depth(y)
                return normalize_wider(self.norm2, x, y, columns, factor)
        return self.between(x, self.drop_path1(y))

    @torch.jit.ignore
    def stochastic_depth(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mixer's map and, if that is all there is to do, the factors of its pictures."""
        if is_plain(self.drop_path1, DropPath) and self.drop_path1.training:
            return y, self.drop_path1(torch.ones(y.shape[0], device=y.device))
        return self.drop_path1(y), None

    def mix(self, y: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if self.norms_first():
                return self.mixer.mix(y)
        return self.mixer(y)

    @torch.jit.ignore
    def columns_of_mixer(self, x: Tensor) -> int:
        """Columns that the mixer's norm writes for the projections in front of the scan."""
        ssm = self.mixer.ssm
        if not writes_columns(x) or not is_plain(self.mixer.norm, LayerNorm2d) or not is_plain(ssm, GroupedSS2D):
            return 0
        if not ssm.has_plain_projections():
            return 0
        # Kernels of narrower groups need no columns.
        if ssm.in_proj.in_features <= TOGETHER:
            return 0
        return -x.shape[1] % ALIGNMENT

    @torch.jit.ignore
    def columns_of_mlp(self, x: Tensor) -> int:
        """Columns that the MLP's norm writes for its first layer."""
        mlp = self.mlp
        if not writes_columns(x) or not is_plain(self.norm2, LayerNorm2d) or not is_plain(mlp, ConvMlp):
            return 0
        return mlp.fc1.added_columns() if is_plain(mlp.fc1, Linear) else 0

    @torch.jit.ignore
    def norms_first(self) -> bool:
        """Whether `begin` applies the mixer's norm, in one pass with the residual connection before it."""
        plain = is_plain(self.mixer, GroupMambaMixer) and is_plain(self.norm1, nn.Identity)
        return plain and isinstance(self.mixer.norm, LayerNorm2d)
