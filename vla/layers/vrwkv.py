"""Vision-RWKV's token mixers and block, https://arxiv.org/abs/2403.02308: spatial mix and channel mix, v1 and v6."""

import math
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import bi_wkv, q_shift, q_shift_mix, squared_relu, wkv6
from .block import DEFAULT_NORM, ResidualBlock
from .hooks import is_plain
from .norm import LayerNorm, autocast_dtype, norm_and_scale, normalize

__all__ = ["ChannelMix", "SpatialMix", "SpatialMix6", "TokenShift", "VRWKVBlock"]

# Tracing wraps a function by its name in the module that calls it.
torch.fx.wrap("autocast_dtype")
torch.fx.wrap("normalize")

# In the signatures of TorchScript-able methods: `X | None` of a tuple is not understood there.
Grid = Optional[tuple[int, int]]  # noqa: UP045

SHIFT_MODES = ("q_shift", "single_shift", "double_shift")


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view in channels-last memory."""
    return tokens.unflatten(1, [height, width]).permute(0, 3, 1, 2)


class TokenShift(nn.Module):
    """Gives every token its neighbours' channels, without parameters.

    Args:
        mode: `'q_shift'` for four directions on the map (`vla.ops.q_shift`); `'single_shift'` for the token before in
            the row-major sequence; `'double_shift'` for both sides of it, two groups of channels, the others zero.
        shift: Distance in pixels or tokens.
        gamma: Share of the channels per direction of `'q_shift'` and `'double_shift'`, at most 1/4.
        head_dim: Split every head of this many channels instead of all at once, `'q_shift'` only.

    Raises:
        ValueError: For an unknown `mode`, or `head_dim` with another mode than `'q_shift'`.
    """

    def __init__(self, mode: str = "q_shift", shift: int = 1, gamma: float = 0.25, head_dim: int | None = None):
        super().__init__()
        if mode not in SHIFT_MODES:
            raise ValueError(f"TokenShift: mode is {mode!r}, expected one of {', '.join(SHIFT_MODES)}")
        if head_dim is not None and mode != "q_shift":
            raise ValueError(f"TokenShift: head_dim is {head_dim}, expected None with mode {mode!r}")
        self.mode = mode
        self.shift = shift
        self.gamma = gamma
        self.head_dim = head_dim

    def forward(self, x: Tensor, grid: Grid = None) -> Tensor:
        if self.mode != "q_shift":
            return to_map(self.along_sequence(to_tokens(x)), x.shape[2], x.shape[3])
        if grid is None:
            return q_shift(x, self.shift, self.gamma, self.head_dim)
        tokens = to_tokens(x)
        pixels = grid[0] * grid[1]
        shifted = q_shift(to_map(tokens[:, :pixels], grid[0], grid[1]), self.shift, self.gamma, self.head_dim)
        return to_map(torch.cat([to_tokens(shifted), tokens[:, pixels:]], dim=1), x.shape[2], x.shape[3])

    def mix(
        self,
        x: Tensor,
        weight: Tensor,
        grid: Grid = None,
        low: Optional[Tensor] = None,  # noqa: UP045
        up: Optional[Tensor] = None,  # noqa: UP045
        keeps: bool = False,
    ) -> Tensor:
        """`x + (shift(x) - x) * (weight + low @ up)` for several weights, see `vla.ops.q_shift_mix`.

        Args:
            x: Map, (B, C, H, W).
            weight: Share of the shifted map, (mixes, C).
            grid: See `VRWKVBlock`.
            low: Low-rank part of the share, (B, T, mixes * rank), `'q_shift'` only.
            up: Its expansion, (mixes, rank, C).
            keeps: The weights are the shares of `x`.

        Returns:
            Tokens (mixes, B, T, C), under autocast in its dtype.
        """
        dtype = autocast_dtype(x)
        if self.mode == "q_shift" and grid is None:
            mixed = q_shift_mix(x, weight, low, up, self.shift, self.gamma, self.head_dim, dtype, keeps)
            return mixed.permute(0, 1, 3, 4, 2).flatten(2, 3)
        tokens = to_tokens(x)
        if grid is None or self.mode != "q_shift":
            shifted = self.along_sequence(tokens)
            start, end = (shifted, tokens) if keeps else (tokens, shifted)
            return start + (end - start) * weight[:, None, None]
        pixels = grid[0] * grid[1]
        low = None if low is None else low[:, :pixels]
        pixel_map = to_map(tokens[:, :pixels], grid[0], grid[1])
        mixed = q_shift_mix(pixel_map, weight, low, up, self.shift, self.gamma, self.head_dim, dtype, keeps)
        rest = tokens[:, pixels:].to(mixed.dtype).expand(weight.shape[0], -1, -1, -1)
        return torch.cat([mixed.permute(0, 1, 3, 4, 2).flatten(2, 3), rest], dim=2)

    def along_sequence(self, tokens: Tensor) -> Tensor:
        """`'single_shift'` and `'double_shift'` of tokens (B, T, C)."""
        before = F.pad(tokens, (0, 0, self.shift, -self.shift))
        if self.mode == "single_shift":
            return before
        after = F.pad(tokens, (0, 0, -self.shift, self.shift))
        channels = tokens.shape[2]
        a, b, c = int(channels * self.gamma * 2), int(channels * self.gamma * 3), int(channels * self.gamma * 4)
        return torch.cat([F.pad(before[..., a:b], (a, 0)), F.pad(after[..., b:c], (0, channels - c))], dim=2)


def depth_ratios(index: int, depth: int) -> tuple[float, float]:
    """How deep block `index` of `depth` lies: from 0 to 1, and from 1 to `1 / depth`."""
    return index / max(depth - 1, 1), 1 - index / depth


def _channel_share(dim: int) -> Tensor:
    return torch.arange(dim, dtype=torch.float64) / dim


def _channel_rank(dim: int) -> Tensor:
    return torch.arange(dim, dtype=torch.float64) / max(dim - 1, 1)


def _zigzag(dim: int) -> Tensor:
    """-1, 0 or 1 for each channel, in turn from 0."""
    return (torch.arange(1, dim + 1) % 3 - 1).double()


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(torch.get_default_dtype()))


class SpatialMix(nn.Module):
    r"""Vision-RWKV's spatial mix (section 3.2): shifted tokens, bidirectional linear attention, a sigmoid gate.

        k, v, r = key(mix_k(x)), value(mix_v(x)), receptance(mix_r(x))
        y = output(sigmoid(r) * bi_wkv(decay / T, bonus / T, k, v))

    with `mix(x) = mix * x + (1 - mix) * shift(x)` per channel. The sequence is the map's pixels in row-major order.

    Args:
        dim: Channels C.
        shift_mode: See `TokenShift`.
        shift: Distance of the shift; 0 leaves out the shift and the parameters `mix_*`.
        channel_gamma: Share of the channels per direction of the shift.
        key_norm: LayerNorm on the attention's output; the name is the released configurations'.
        init_mode: Initial decay, bonus and mixes: `'fancy'` spreads them over channels and depth, `'local'` starts
            without shift and with a decay of 1 / T, `'global'` with uniform attention.
        index: Position of the block in its network, for `'fancy'`.
        depth: Blocks of the network, for `'fancy'`.
        official_split: See `vla.ops.bi_wkv`.

    Raises:
        ValueError: For an unknown `init_mode` or `shift_mode`.
    """

    def __init__(
        self,
        dim: int,
        shift_mode: str = "q_shift",
        shift: int = 1,
        channel_gamma: float = 0.25,
        key_norm: bool = False,
        init_mode: str = "fancy",
        index: int = 0,
        depth: int = 1,
        official_split: int | None = None,
    ):
        super().__init__()
        self.official_split = official_split
        self.shift = TokenShift(shift_mode, shift, channel_gamma) if shift > 0 else None
        ratio, falling = depth_ratios(index, depth)
        if init_mode == "fancy":
            decay = -5 + 8 * _channel_rank(dim) ** (0.7 + 1.3 * ratio)
            bonus = math.log(0.3) + 0.5 * _zigzag(dim)
            mix_k = _channel_share(dim) ** falling
            mix_v, mix_r = mix_k + 0.3 * ratio, _channel_share(dim) ** (0.5 * falling)
        elif init_mode in ("local", "global"):
            decay = bonus = torch.full((dim,), 1.0 if init_mode == "local" else 0.0)
            mix_k = mix_v = mix_r = torch.full((dim,), 1.0 if init_mode == "local" else 0.5)
        else:
            raise ValueError(f"SpatialMix: init_mode is {init_mode!r}, expected 'fancy', 'local' or 'global'")
        self.decay = _parameter(decay.clone())
        self.bonus = _parameter(bonus.clone())
        if self.shift is not None:
            self.mix_k = _parameter(mix_k.clone())
            self.mix_v = _parameter(mix_v.clone())
            self.mix_r = _parameter(mix_r.clone())
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.wkv_norm = LayerNorm(dim, narrow=True) if key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Grid = None) -> Tensor:
        if self.shift is None:
            k = v = r = to_tokens(x)
        else:
            mixes = torch.stack([self.mix_k, self.mix_v, self.mix_r])
            k, v, r = self.shift.mix(x, mixes, grid, keeps=True).unbind(0)
        k, v, r = self.key(k), self.value(v), self.receptance(r)
        if isinstance(self.wkv_norm, nn.Identity):
            y = bi_wkv(self.decay, self.bonus, k, v, r, self.official_split, per_sequence=True)
        else:
            y = bi_wkv(self.decay, self.bonus, k, v, official_split=self.official_split, per_sequence=True)
            y = torch.sigmoid(r) * self.wkv_norm(y)
        return to_map(self.output(y), x.shape[2], x.shape[3])


class SpatialMix6(nn.Module):
    r"""Spatial mix of Vision-RWKV 6: RWKV-6's data-dependent mixes and decay, read from both sides.

        w, k, v, r, g = mixes of x and shift(x), whose weights are low-rank functions of the token
        w = decay + tanh(w @ decay_down) @ decay_up
        y = group_norm(wkv6(receptance(r), key(k), value(v), w, bonus))
        out = output(y * silu(gate(g)))

    Args:
        dim: Channels C.
        head_dim: Channels per head, 64 in every released model; a multiple of 4 that divides `dim`.
        shift: Distance of the shift in pixels.
        key_norm: LayerNorm on the attention's output, before the GroupNorm; the name is the released configurations'.
        mix_rank: Rank of the mixes.
        decay_rank: Rank of the decay.
        index: Position of the block in its network, for the initial values.
        depth: Blocks of the network, for the initial values.

    Raises:
        ValueError: For a `head_dim` that does not fit.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        shift: int = 1,
        key_norm: bool = False,
        mix_rank: int = 32,
        decay_rank: int = 64,
        index: int = 0,
        depth: int = 1,
    ):
        super().__init__()
        if head_dim < 4 or head_dim % 4 != 0 or dim % head_dim != 0:
            raise ValueError(f"SpatialMix6: head_dim is {head_dim}, expected a multiple of 4 that divides dim = {dim}")
        heads = dim // head_dim
        self.mix_rank = mix_rank
        self.shift = TokenShift(shift=shift, head_dim=head_dim)
        ratio, falling = depth_ratios(index, depth)
        rising = _channel_share(dim) ** falling
        self.mix_x = _parameter(1 - rising)
        self.mix_w = _parameter(1 - rising)
        self.mix_k = _parameter(1 - rising)
        self.mix_v = _parameter(1 - (rising + 0.3 * ratio))
        self.mix_r = _parameter(1 - _channel_share(dim) ** (0.5 * falling))
        self.mix_g = _parameter(1 - _channel_share(dim) ** (0.5 * falling))
        self.mix_down = nn.Parameter(torch.empty(dim, 5 * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay = _parameter(-6 + 5 * _channel_rank(dim) ** (0.7 + 1.3 * ratio))
        self.decay_down = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-1e-4, 1e-4))
        self.bonus = _parameter((ratio * (1 - _channel_rank(dim)) + 0.1 * _zigzag(dim)).view(heads, head_dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.wkv_norm = LayerNorm(dim, narrow=True) if key_norm else nn.Identity()
        self.group_norm = nn.GroupNorm(heads, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Grid = None) -> Tensor:
        low = torch.tanh(self.shift.mix(x, self.mix_x[None], grid)[0] @ self.mix_down)
        mixes = torch.stack([self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g])
        w, k, v, r, g = self.shift.mix(x, mixes, grid, low, self.mix_up).unbind(0)
        w = self.decay + torch.tanh(w @ self.decay_down) @ self.decay_up
        y = self.wkv_norm(wkv6(self.receptance(r), self.key(k), self.value(v), w, self.bonus))
        return to_map(self.output(self.normalize(y, self.gate(g))), x.shape[2], x.shape[3])

    @torch.jit.ignore
    def product_weights(self) -> dict[str, Tensor | None]:
        """See `vla.layers.weights.product_weights`."""
        return {"mix_down": self.mix_down, "decay_down": self.decay_down, "decay_up": self.decay_up}

    def normalize(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm of the heads and the gate's SiLU, (B, T, C)."""
        norm = self.group_norm
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if not is_plain(norm, nn.GroupNorm):
                return norm(y.flatten(0, 1)).view_as(y) * F.silu(gate)
        # GroupNorm of single tokens as LayerNorm of heads, whose kernels are many times faster at it.
        return normalize(y, norm.weight, norm.bias, norm.eps, True, norm.num_groups, gate)


class ChannelMix(nn.Module):
    r"""Vision-RWKV's channel mix: a gated MLP with squared ReLU on shifted tokens.

        out = sigmoid(receptance(mix_r(x))) * value(relu(key(mix_k(x)))^2)

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width over `dim`.
        shift_mode: See `TokenShift`.
        shift: Distance of the shift; 0 leaves out the shift and the parameters `mix_*` (with `head_dim` it stays).
        channel_gamma: Share of the channels per direction of the shift.
        head_dim: Shift every head of this many channels by itself, as Vision-RWKV 6 does.
        key_norm: LayerNorm on the squared hidden channels.
        init_mode: Initial mixes, see `SpatialMix`.
        index: Position of the block in its network, for `'fancy'`.
        depth: Blocks of the network, for `'fancy'`.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        shift_mode: str = "q_shift",
        shift: int = 1,
        channel_gamma: float = 0.25,
        head_dim: int | None = None,
        key_norm: bool = False,
        init_mode: str = "fancy",
        index: int = 0,
        depth: int = 1,
    ):
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.shift = None
        if shift > 0 or head_dim is not None:
            self.shift = TokenShift(shift_mode, shift, channel_gamma, head_dim)
            mix = {
                "fancy": _channel_share(dim) ** depth_ratios(index, depth)[1],
                "local": torch.ones(dim),
                "global": torch.full((dim,), 0.5),
            }[init_mode]
            self.mix_k = _parameter(mix.clone())
            self.mix_r = _parameter(mix.clone())
        self.key = nn.Linear(dim, hidden, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.hidden_norm = LayerNorm(hidden, narrow=True) if key_norm else nn.Identity()
        self.value = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, grid: Grid = None) -> Tensor:
        if self.shift is None:
            k = r = to_tokens(x)
        else:
            k, r = self.shift.mix(x, torch.stack([self.mix_k, self.mix_r]), grid, keeps=True).unbind(0)
        hidden = self.hidden_norm(squared_relu(self.key(k)))
        return to_map(torch.sigmoid(self.receptance(r)) * self.value(hidden), x.shape[2], x.shape[3])


class VRWKVBlock(ResidualBlock):
    """Vision-RWKV's block: spatial mix and channel mix. Takes and returns (B, C, H, W).

    Called with `grid=(H, W)` it takes a sequence (B, C, 1, T) instead, whose first H * W tokens are the map's pixels in
    row-major order and whose last ones, class tokens, are mixed but never shifted.

    Args:
        dim: Channels C.
        version: 1 for bi-WKV, 6 for RWKV-6's data-dependent decay.
        mlp_ratio: Hidden width of the channel mix over `dim`.
        drop_path: Rate of stochastic depth.
        layer_scale: Initial value of a learned scale per channel on both halves, None for no scale.
        norm_layer: Norm of (B, C, H, W) maps.
        post_norm: Normalise the outputs of both halves instead of their inputs.
        key_norm: LayerNorm on the attention's output and on the hidden channels of the channel mix.
        shift: Distance of the token shift.
        shift_mode: See `TokenShift`; version 6 has `'q_shift'` only.
        channel_gamma: Share of the channels per direction of the shift; version 6 has 1/4 only.
        init_mode: See `SpatialMix`; version 6 has `'fancy'` only.
        head_dim: Channels per head, version 6 only.
        index: Position of the block in its network, for the initial values.
        depth: Blocks of the network, for the initial values.
        official_split: See `vla.ops.bi_wkv`; version 1 only.

    Raises:
        ValueError: For an option that the version does not have.
    """

    def __init__(
        self,
        dim: int,
        version: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: str | Callable[..., nn.Module] = DEFAULT_NORM,
        post_norm: bool = False,
        key_norm: bool = False,
        shift: int = 1,
        shift_mode: str = "q_shift",
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        head_dim: int = 64,
        index: int = 0,
        depth: int = 1,
        official_split: int | None = None,
    ):
        where = dict(index=index, depth=depth)
        if version == 1:
            options = dict(shift_mode=shift_mode, shift=shift, channel_gamma=channel_gamma, key_norm=key_norm, **where)
            mixer = SpatialMix(dim, init_mode=init_mode, official_split=official_split, **options)
            mlp = ChannelMix(dim, mlp_ratio, init_mode=init_mode, **options)
        elif version == 6:
            for name, value, only in (
                ("shift_mode", shift_mode, "q_shift"),
                ("channel_gamma", channel_gamma, 0.25),
                ("init_mode", init_mode, "fancy"),
                ("official_split", official_split, None),
            ):
                if value != only:
                    raise ValueError(f"VRWKVBlock: {name} is {value!r}, expected {only!r} in version 6")
            mixer = SpatialMix6(dim, head_dim, shift, key_norm, **where)
            mlp = ChannelMix(dim, mlp_ratio, shift=shift, head_dim=head_dim, key_norm=key_norm, **where)
        else:
            raise ValueError(f"VRWKVBlock: version is {version}, expected 1 or 6")
        super().__init__(
            dim,
            mixer,
            drop_path=drop_path,
            layer_scale=layer_scale,
            norm_layer=norm_layer,
            mlp=mlp,
            post_norm=post_norm,
        )

    def forward(self, x: Tensor, grid: Grid = None) -> Tensor:
        if not self.post_norm:
            y = self.ls1(self.mixer(self.norm1(x), grid))
        elif torch.jit.is_scripting():
            y = self.ls1(self.norm1(self.mixer(x, grid)))
        else:
            y = norm_and_scale(self.norm1, self.ls1, self.mixer(x, grid))
        x, y = self.between(x, self.drop_path1(y))
        y = self.mlp(y, grid)
        if not self.post_norm:
            y = self.ls2(y)
        elif torch.jit.is_scripting():
            y = self.ls2(self.norm2(y))
        else:
            y = norm_and_scale(self.norm2, self.ls2, y)
        return x + self.drop_path2(y)
