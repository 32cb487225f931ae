"""A block around any token mixer, the layers of `fla` (flash-linear-attention) among them."""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops.scan2d.order import DIRECTIONS, to_map, to_sequence
from .block import DEFAULT_NORM, ResidualBlock


def _create_mixer(mixer: nn.Module | Callable[..., nn.Module] | str, dim: int, mixer_args: dict) -> nn.Module:
    if isinstance(mixer, nn.Module):
        if mixer_args:
            raise ValueError(f"mixer: got a module and options {sorted(mixer_args)}, expected a class to take options")
        return mixer
    if isinstance(mixer, str):
        try:
            layers = importlib.import_module("fla.layers")
        except ImportError as error:
            raise ImportError(
                f"mixer {mixer!r} is a layer of fla: pip install 'vision-linear-attention[fla]'"
            ) from error
        if not hasattr(layers, mixer):
            raise ValueError(f"mixer: fla has no layer {mixer!r}, expected one of {', '.join(layers.__all__)}")
        mixer = getattr(layers, mixer)
    return mixer(hidden_size=dim, **mixer_args)


class SequenceMixer(nn.Module):
    """Runs a mixer of token sequences over a map, along one or several directions: (B, C, H, W) to the same.

    A causal mixer sees, in the one direction `'row'`, only what is above and to the left; with several directions every
    pixel sees every other. The directions share the mixer's weights, and their outputs are averaged.

    Args:
        mixer: Module from (B, L, C) to (B, L, C), or to a tuple whose first entry that is (as `fla`'s layers, which
            also return attention weights and a cache).
        directions: Orders in which the pixels are read, of `'row'`, `'col'`, `'row_rev'`, `'col_rev'`.

    Raises:
        ValueError: For an unknown direction, or, when run, for a mixer that changes the shape of its input.
    """

    def __init__(self, mixer: nn.Module, directions: Sequence[str] = ("row",)):
        super().__init__()
        for direction in directions:
            if direction not in DIRECTIONS:
                raise ValueError(f"unknown direction {direction!r}, expected one of {', '.join(DIRECTIONS)}")
        if not directions:
            raise ValueError(f"directions is empty, expected at least one of {', '.join(DIRECTIONS)}")
        self.mixer = mixer
        self.directions = list(directions)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # One call on a larger batch instead of one call a direction.
        tokens = torch.cat([to_sequence(x, direction) for direction in self.directions]).transpose(1, 2)
        out = self.mixer(tokens)
        if isinstance(out, tuple):
            out = out[0]
        if out.shape != tokens.shape:
            raise ValueError(
                f"mixer {type(self.mixer).__name__} returned shape {tuple(out.shape)}, expected {tuple(tokens.shape)}"
            )
        outs = out.transpose(1, 2).chunk(len(self.directions))
        maps = [to_map(y, direction, height, width) for y, direction in zip(outs, self.directions, strict=True)]
        return sum(maps[1:], maps[0]) / len(maps)


class LinearAttentionBlock(ResidualBlock):
    """Any token mixer and an MLP, each with its norm and its residual connection, (B, C, H, W) to the same.

        LinearAttentionBlock(64, "GatedLinearAttention", num_heads=4)            # a layer of fla
        LinearAttentionBlock(64, MyMixer, directions=("row", "row_rev"))          # MyMixer(hidden_size=64)
        LinearAttentionBlock(64, nn.Identity())                                   # a module, as it is

    Args:
        dim: Channels C.
        mixer: Module from (B, L, C) to (B, L, C) or to a tuple that starts with it; a class or function that makes one
            from `hidden_size` and `mixer_args`; or the name of a layer of `fla.layers` (optional extra `fla`).
        mlp_ratio: Hidden width of the MLP over `dim`; 0 for no MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of a learned scale per channel on both residual branches, None for no scale.
        norm_layer: Class or timm name of the norm of (B, C, H, W) maps.
        act_layer: Class or timm name of the MLP's activation.
        mlp_drop: Dropout rate inside the MLP.
        directions: Orders in which the mixer reads the pixels, see `SequenceMixer`.
        **mixer_args: Options of the mixer.

    Raises:
        ImportError: For the name of an `fla` layer without `fla`.
        ValueError: For an unknown layer or direction.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | Callable[..., nn.Module] | str,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = DEFAULT_NORM,
        act_layer: str | type[nn.Module] = nn.GELU,
        mlp_drop: float = 0.0,
        directions: Sequence[str] = ("row",),
        **mixer_args,
    ):
        super().__init__(
            dim,
            SequenceMixer(_create_mixer(mixer, dim, mixer_args), directions),
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
            norm_layer=norm_layer,
            act_layer=act_layer,
            mlp_drop=mlp_drop,
        )
