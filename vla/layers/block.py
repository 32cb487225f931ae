"""The residual block that every family shares."""

from collections.abc import Callable
from typing import Optional

import torch
from timm.layers import DropPath, GluMlp, LayerScale2d, get_act_layer, get_norm_layer
from torch import Tensor, nn

from .hooks import has_hooks, is_plain
from .mlp import Mlp
from .norm import LayerNorm2d, narrow
from .repeat import Repeated, is_repeated

DEFAULT_NORM = LayerNorm2d
# Norms by the names that released configurations have for them.
NORMS = {"ln": DEFAULT_NORM, "ln2d": DEFAULT_NORM, "bn": nn.BatchNorm2d}


class ResidualBlock(Repeated):
    r"""A token mixer and an MLP, each with its norm and its residual connection.

        x = x + drop_path(layer_scale(mixer(norm(x))))
        x = x + drop_path(layer_scale(mlp(norm(x))))

    Takes and returns (B, C, H, W). Memory in `torch.channels_last` stays so and makes every permutation a free view;
    any other memory format gives the same values. Families subclass it with their mixer and its options.

    Args:
        dim: Channels C.
        mixer: Module from (B, C, H, W) to (B, C, H, W).
        mlp_ratio: Hidden width of the MLP over `dim`; 0 leaves out the second half of the block.
        drop_path: Rate of stochastic depth, for both halves.
        layer_scale: Initial value of a learned scale per channel on both halves, None for no scale.
        norm_layer: Class or timm name of a norm of (B, C, H, W) maps: `LayerNorm2d`, `nn.BatchNorm2d`, ...
        act_layer: Class or timm name of the MLP's activation.
        mlp_drop: Dropout rate inside the MLP.
        gated_mlp: Use a gated MLP, `fc2(u * act(g))` with `u, g = fc1(x)`.
        mlp: Replaces the MLP: a module from (B, H, W, C) to (B, H, W, C). The options of the MLP are then unused.
        post_norm: Normalise the outputs of mixer and MLP instead of their inputs.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = DEFAULT_NORM,
        act_layer: str | type[nn.Module] = nn.GELU,
        mlp_drop: float = 0.0,
        gated_mlp: bool = False,
        mlp: nn.Module | None = None,
        post_norm: bool = False,
    ):
        super().__init__()
        norm_layer = get_norm_layer(norm_layer)
        if mlp is None and mlp_ratio > 0:
            hidden, act_layer = int(dim * mlp_ratio), get_act_layer(act_layer)
            if gated_mlp:
                mlp = GluMlp(dim, 2 * hidden, act_layer=act_layer, drop=(0.0, mlp_drop))
            else:
                mlp = Mlp(dim, hidden, act_layer=act_layer, drop=mlp_drop)

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        def norm() -> nn.Module:
            # The sums stay in float32 under autocast; what goes into mixer and MLP needs its dtype only.
            return norm_layer(dim) if post_norm else narrow(norm_layer(dim))

        self.post_norm = post_norm
        self.norm1 = norm()
        self.mixer = mixer
        self.ls1 = scale()
        self.drop_path1 = stochastic_depth()
        self.mlp = mlp
        if mlp is not None:
            self.norm2 = norm()
            self.ls2 = scale()
            self.drop_path2 = stochastic_depth()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.summands(x, None)
        return x + y

    def summands(self, x: Tensor, y: Optional[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: UP045
        """The block of `x + y` (of x without y), before its last sum: the residual stream, and what is added to it."""
        x, y = self.begin(x, y)
        return self.halves(x, y)

    def halves(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`summands` from what `begin` returns."""
        y = self.norm1(self.mix(y)) if self.post_norm else self.mix(y)
        y = self.ls1(y)
        if self.mlp is None:
            return x, self.drop_path1(y)
        x, y = self.join(x, y)
        y = self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.norm2(y) if self.post_norm else y
        return x, self.drop_path2(self.ls2(y))

    def begin(self, x: Tensor, y: Optional[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: UP045
        """The residual connection of the block before, and the input of the first half's mixer."""
        if y is not None:
            if isinstance(self.norm1, LayerNorm2d) and not self.post_norm:
                return self.norm1.add(x, y)
            x = x + y
        return x, x if self.post_norm else self.norm1(x)

    @torch.jit.ignore
    def first_norm(self, x: Tensor) -> tuple[nn.Module | None, int]:
        """The norm of sums like x that `begin` returns, if that is all it does, and columns behind its channels."""
        return (None if self.post_norm else self.norm1), 0

    @torch.jit.ignore
    def adds_and_norms(self, x: Tensor, columns: int) -> bool:
        """Whether there is an `add_and_norm` for maps like x and so many columns, as a family may have kernels for."""
        return False

    @torch.jit.ignore
    def add_and_norm(
        self, x: Tensor, y: Tensor, norm: LayerNorm2d, columns: int, with_sum: bool
    ) -> tuple[Tensor | None, Tensor]:
        """The block from what `begin` returns on, its last sum, and a norm of that.

        Args:
            x: The residual stream.
            y: The input of the first half's mixer.
            norm: The norm.
            columns: Columns behind its channels.
            with_sum: Whether somebody needs the sum; else it is None.
        """
        raise NotImplementedError

    def mix(self, y: Tensor) -> Tensor:
        """The mixer of what `begin` returns."""
        return self.mixer(y)

    def join(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`between` the halves, with the first half's stochastic depth."""
        return self.between(x, self.drop_path1(y))

    def between(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The residual connection of the first half, and the input of the second half's MLP."""
        if isinstance(self.norm2, LayerNorm2d) and not self.post_norm:
            return self.norm2.add(x, y)
        x = x + y
        return x, x if self.post_norm else self.norm2(x)


def _is_plain(block: nn.Module) -> bool:
    """Whether calling a block is no more than `ResidualBlock.forward`."""
    return getattr(type(block), "forward", None) is ResidualBlock.forward and not has_hooks(block)


def first_norm(blocks: nn.Sequential, x: Tensor) -> LayerNorm2d | None:
    """The norm, without columns, that `run_blocks` may be handed with a map like x in a compiled graph, or None."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or type(blocks) is not nn.Sequential:
        return None
    if has_hooks(blocks) or len(blocks) == 0 or not _is_plain(blocks[0]):
        return None
    norm, columns = blocks[0].first_norm(x)
    return norm if is_plain(norm, LayerNorm2d) and columns == 0 else None


def run_blocks(blocks: nn.Sequential, x: Tensor, norm: nn.Module | None = None, normed: Tensor | None = None) -> Tensor:
    """`blocks(x)`, where a block's last sum and the norm that follows it are one pass over memory.

    Args:
        blocks: The blocks.
        x: A map (B, C, H, W).
        norm: Norm of the result.
        normed: The `first_norm` of x, if somebody has it.
    """

    def close(x: Tensor) -> Tensor:
        return x if norm is None else norm(x)

    # A graph that is traced has the blocks as modules.
    is_traced = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing()
    if is_traced or type(blocks) is not nn.Sequential or has_hooks(blocks) or is_repeated(x):
        return close(blocks(x))
    # The operator keeps both summands for its backward, and takes the host longer than an addition.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return close(blocks(x))
    y, is_normed = normed, normed is not None
    for block, following in zip(blocks, [*blocks[1:], None], strict=False):
        if not _is_plain(block):
            x, y = block(x if y is None else x + y), None
            continue
        x, y = (x, y) if is_normed else block.begin(x, y)
        next_norm, columns = norm, 0
        if following is not None:
            next_norm, columns = following.first_norm(x) if _is_plain(following) else (None, 0)
        is_normed = is_plain(next_norm, LayerNorm2d) and block.adds_and_norms(x, columns)
        if is_normed:
            x, y = block.add_and_norm(x, y, next_norm, columns, with_sum=following is not None)
        else:
            x, y = block.halves(x, y)
    if is_normed:
        return y
    return close(x if y is None else x + y)
