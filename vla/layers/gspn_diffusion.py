"""GSPN for image generation, https://arxiv.org/abs/2501.12381: a class-conditional denoising network, and the module
that replaces the self-attention of text-to-image networks."""

import math
import re

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..ops import line_scan
from .depthwise import DepthwiseConv2d
from .gspn import LineScan2d, rename_released_scan

# Hidden width and depth of the networks of the paper; "B/2" is B with patches of 2.
GENERATOR_SIZES = {
    "S": {"dim": 368, "depth": 24},
    "B": {"dim": 900, "depth": 30},
    "L": {"dim": 1200, "depth": 56},
    "XL": {"dim": 1500, "depth": 56},
}


class GSPNGeneratorBlock(nn.Module):
    """Block of `GSPNGenerator`: adds what the previous block returned to the stream, then norm and mixer.

        stream = stream + drop_path(branch)
        branch = out_proj(relu(y) ** 2), y = depthwise(pointwise(scan(conv(in_proj(norm(stream))))))

    Args:
        dim: Channels C.
        d_state: Proxy channels of the scan.
        chunk: Lines after which a sweep starts again from zero, 0 for whole sweeps.
        drop_path: Rate of stochastic depth.
        skip: Take a skip connection, concatenated with the branch and projected.
        aligned: See `LineScan2d`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        chunk: int = 2,
        drop_path: float = 0.0,
        skip: bool = False,
        aligned: bool = False,
    ):
        super().__init__()
        self.skip_proj = nn.Linear(2 * dim, dim) if skip else None
        self.drop_path = DropPath(drop_path)
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv = DepthwiseConv2d(dim, 7)
        self.scan = LineScan2d(dim, d_state, chunk, aligned)
        self.out_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.out_dwconv = DepthwiseConv2d(dim, 3, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, branch: Tensor, stream: Tensor | None, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W, C) to the next branch and stream; `stream` is None at the first block."""
        if self.skip_proj is not None:
            branch = self.skip_proj(torch.cat([branch, skip], dim=-1))
        stream = branch if stream is None else stream + self.drop_path(branch)
        x = self.in_proj(self.norm(stream)).permute(0, 3, 1, 2)
        x = self.out_dwconv(self.out_conv(self.scan(self.conv(x))))
        return self.out_proj(F.relu(x).square().permute(0, 2, 3, 1)), stream


class TimestepEmbed(nn.Module):
    """Diffusion time (B,) -> (B, dim): sinusoids of 128 frequencies and an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(256, dim)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        # Times reach 1000, which half precision can't tell apart.
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * frequencies
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.fc2(self.act(self.fc1(table.to(self.fc1.weight.dtype))))


class GSPNGenerator(nn.Module):
    """GSPN's class-conditional denoising network for latent diffusion.

    A stack of `GSPNGeneratorBlock` in which the second half receives the first half's outputs in reverse order. The
    sum of time and class embedding is added to every token once, and modulates the final layer.

    Args:
        dim: Channels of the tokens, see `GENERATOR_SIZES`.
        depth: Blocks, not counting the one in the middle; even.
        patch_size: Side of a patch of the latent.
        channels: Channels of the latent.
        num_classes: Classes, 0 for an unconditional network.
        class_dropout: Probability of training without the class, for classifier-free guidance.
        chunk: Lines after which the sweeps start again from zero, 0 for whole sweeps. In the released network it is 2
            everywhere, also where its configuration means whole sweeps.
        drop_path_rate: Rate of stochastic depth at the last block, growing linearly from 0.
        aligned: Return the outputs of the four directions to their pixels, see `LineScan2d`. The released network
            doesn't.

    Raises:
        ValueError: For an odd `depth`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        patch_size: int = 2,
        channels: int = 4,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        chunk: int = 2,
        drop_path_rate: float = 0.1,
        aligned: bool = False,
    ):
        super().__init__()
        if depth % 2 != 0:
            raise ValueError(f"GSPNGenerator: depth is {depth}, expected an even number")
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.class_dropout = class_dropout
        self.patch_embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.time_embed = TimestepEmbed(dim)
        # The last class stands for none.
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes > 0 else None
        half = depth // 2
        rates = torch.linspace(0, drop_path_rate, depth + 1, device="cpu").tolist()
        blocks = [
            GSPNGeneratorBlock(dim, max(1, dim // 16), chunk, rate, skip=i > half, aligned=aligned)
            for i, rate in enumerate(rates)
        ]
        self.in_blocks = nn.ModuleList(blocks[:half])
        self.mid_block = blocks[half]
        self.out_blocks = nn.ModuleList(blocks[half + 1 :])
        self.drop_path = DropPath(drop_path_rate)
        self.norm = nn.LayerNorm(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, patch_size**2 * 2 * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released initialisation: Xavier, and an output of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)
        for module in (self.time_embed.fc1, self.time_embed.fc2, self.label_embed):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
        for module in (self.modulation, self.out_proj):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts noise and its variance.

        Args:
            x: Noisy latents (B, channels, H, W), H and W multiples of `patch_size`.
            t: Diffusion times (B,).
            labels: Classes (B,), `num_classes` for none. Needed unless the network is unconditional.

        Returns:
            (B, 2 * channels, H, W): the noise, then the interpolation of the variance.

        Raises:
            ValueError: For a size that is no multiple of `patch_size`, or labels that are missing or not expected.
        """
        p = self.patch_size
        if x.shape[2] % p != 0 or x.shape[3] % p != 0:
            raise ValueError(f"GSPNGenerator: x has shape {tuple(x.shape)}, expected multiples of {p} as H and W")
        if (labels is None) != (self.label_embed is None):
            state = "missing" if labels is None else "given"
            raise ValueError(f"GSPNGenerator: labels are {state}, num_classes is {self.num_classes}")
        condition = self.time_embed(t)
        if self.label_embed is not None:
            if self.training and self.class_dropout > 0:
                dropped = torch.rand(labels.shape, device=labels.device) < self.class_dropout
                labels = torch.where(dropped, self.num_classes, labels)
            condition = condition + self.label_embed(labels)

        x = self.patch_embed(x).permute(0, 2, 3, 1) + condition[:, None, None]
        stream = None
        skips = []
        for block in self.in_blocks:
            x, stream = block(x, stream)
            skips.append(x)
        x, stream = self.mid_block(x, stream)
        for block in self.out_blocks:
            x, stream = block(x, stream, skips.pop())

        x = self.norm(stream + self.drop_path(x))
        shift, scale = self.modulation(F.silu(condition))[:, None, None].chunk(2, dim=-1)
        x = self.out_proj(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        # (B, H, W, p * p * channels) -> (B, channels, H * p, W * p)
        return x.unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_guided(self, x: Tensor, t: Tensor, labels: Tensor, scale: float, guided_channels: int = 3) -> Tensor:
        """`forward` with classifier-free guidance.

        Args:
            x: Noisy latents (B, channels, H, W).
            t: Diffusion times (B,).
            labels: Classes (B,).
            scale: Guidance: 1 for none, larger for more of the class.
            guided_channels: Channels of the noise that guidance applies to; the released code leaves out the last.

        Returns:
            (B, 2 * channels, H, W) as from `forward`.
        """
        nothing = torch.full_like(labels, self.num_classes)
        with_class, without = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, nothing])).chunk(2)
        guided = torch.lerp(without[:, :guided_channels], with_class[:, :guided_channels], scale)
        return torch.cat([guided, with_class[:, guided_channels:]], dim=1)


class GSPNAttention(nn.Module):
    """GSPN in the place of self-attention in a text-to-image network: tokens (B, T, C) of a map to the same.

    Args:
        dim: Channels C.
        mixed: Compute lambda, u and the scanned map from tokens to which a learned key, query and value is added, as
            when the weights of an attention are distilled. The scan alone by default.
        d_state: Proxy channels, default `dim // 8`, with `mixed` `dim // 32`.
        chunk: Lines after which a sweep starts again from zero, 0 for whole sweeps.
        drop: Dropout rate of the output.
        aligned: Return the outputs of the four directions to their pixels, see `LineScan2d`. The released networks
            don't.
    """

    def __init__(
        self,
        dim: int,
        mixed: bool = False,
        d_state: int | None = None,
        chunk: int = 4,
        drop: float = 0.0,
        aligned: bool = False,
    ):
        super().__init__()
        self.mixed = mixed
        self.scan = LineScan2d(dim, d_state or max(1, dim // (32 if mixed else 8)), chunk, aligned)
        if mixed:
            self.q_proj = nn.Linear(dim, dim, bias=False)
            self.k_proj = nn.Linear(dim, dim, bias=False)
            self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Mixes the tokens of a map.

        Args:
            x: Tokens (B, H * W, C), row by row.
            size: (H, W). Default: a square, or else W = 2 H.

        Returns:
            Tokens (B, H * W, C).

        Raises:
            ValueError: If the number of tokens does not fit the size, or is neither a square nor twice one.
        """
        height, width = self._size(x.shape[1]) if size is None else size
        if height * width != x.shape[1]:
            raise ValueError(f"GSPNAttention: x has {x.shape[1]} tokens, expected {height} x {width}")
        x = x.unflatten(1, (height, width))
        weights = self.scan
        gates, lam = weights.gate_weight, weights.lam_weight
        u, skip = weights.u_weight * weights.merge_weight, weights.skip_weight * weights.merge_weight
        if self.mixed:
            sources = torch.cat([x, x + self.k_proj(x), x + self.q_proj(x)]).unflatten(0, (3, -1))
            proxy = F.linear(sources, weights.proxy_weight).permute(1, 2, 3, 0, 4).flatten(-2)
            # One proxy of three parts, of which every coefficient reads its own.
            s = gates.shape[-1]
            gates, skip = F.pad(gates, (0, 2 * s)), F.pad(skip, (0, 2 * s))
            lam, u = F.pad(lam, (s, s)), F.pad(u, (2 * s, 0))
            x = x + self.v_proj(x)
        else:
            proxy = F.linear(x, weights.proxy_weight)
        x, proxy = x.permute(0, 3, 1, 2), proxy.permute(0, 3, 1, 2)
        options = dict(proxy=proxy, chunk=weights.chunk, aligned=weights.aligned)
        if weights.aligned or width != 2 * height:
            y = line_scan(x, gates, lam, weights.directions, u, skip, **options)
        else:
            # What the released code does with wide maps: instead of turning the map it swaps channels and rows in
            # memory, and the gates' weights are laid out pair by pair.
            gates = gates.flatten(0, 2).unflatten(0, (2, 3, 2, -1))
            pair = ["right", "left"]
            swapped = x.transpose(1, 2).reshape(x.shape)
            y = line_scan(x, gates[0], lam[:2], pair, u[:2], skip[:2], **options)
            y = y + line_scan(swapped, gates[1], lam[2:], pair, u[2:], skip[2:], **options)
        return self.drop(self.out_proj(y.permute(0, 2, 3, 1).flatten(1, 2)))

    @staticmethod
    def _size(tokens: int) -> tuple[int, int]:
        side = math.isqrt(tokens)
        if side * side == tokens:
            return side, side
        height = math.isqrt(tokens // 2)
        if 2 * height * height == tokens:
            return height, 2 * height
        raise ValueError(f"GSPNAttention: x has {tokens} tokens, expected a square or twice a square without size")


_RENAMES = (
    (r"^x_embedder\.proj\.", "patch_embed."),
    (r"^t_embedder\.mlp\.0\.", "time_embed.fc1."),
    (r"^t_embedder\.mlp\.2\.", "time_embed.fc2."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"\.conv2d\.", ".conv."),
    (r"\.out_dconv\.", ".out_dwconv."),
    (r"\.skip_linear\.", ".skip_proj."),
    (r"^norm_f\.", "norm."),
    (r"^final_layer\.linear\.", "out_proj."),
    (r"^final_layer\.adaLN_modulation\.1\.", "modulation."),
    (r"^to_([qkv])\.", r"\1_proj."),
    (r"^to_out\.0\.", "out_proj."),
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the official generation network or text-to-image module -> those of the classes here."""
    out = {}
    for name, value in rename_released_scan(state_dict).items():
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        out[name] = value
    return out
