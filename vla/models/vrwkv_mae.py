"""Masked-autoencoder pre-training of Vision-RWKV: encoder on the visible patches, decoder on all.

`Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures` - https://arxiv.org/abs/2403.02308
`Masked Autoencoders Are Scalable Vision Learners` - https://arxiv.org/abs/2111.06377
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, calculate_drop_path_rates, to_2tuple
from torch import Tensor, nn

from ..layers.block import DEFAULT_NORM
from ..layers.vrwkv import VRWKVBlock, to_map, to_tokens
from ._ahead import Backbone
from ._checkpoint import unwrap
from .vrwkv import rename_released, resize_pos_embed

__all__ = ["PRETRAINING_MODELS", "VRWKVMAE", "mae_to_classifier", "mae_vrwkv_atto", "mae_vrwkv_base"]


def sincos_pos_embed(height: int, width: int, dim: int) -> Tensor:
    """Sine-cosine position embedding (1, height * width, dim): half the channels for the column, half for the row.

    Raises:
        ValueError: If `dim` is not a multiple of 4.
    """
    if dim % 4 != 0:
        raise ValueError(f"sincos_pos_embed: dim is {dim}, expected a multiple of 4")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [position.flatten()[:, None] * frequency for position in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


class VRWKVMAE(Backbone):
    """Masked autoencoder of Vision-RWKV v1: reconstructs images from a random part of their patches.

    The encoder sees the visible patches as one sequence in the random order that chose them, so its token shift runs
    along the sequence. As in the released code the encoder adds its position embedding twice.

    Args:
        img_size: Size, or (height, width), whose grid the position embeddings have.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        embed_dim: Channels of the encoder.
        depth: Blocks of the encoder.
        decoder_embed_dim: Channels of the decoder.
        decoder_depth: Blocks of the decoder.
        mask_ratio: Share of the patches that are hidden.
        norm_pix_loss: Reconstruct patches normalised to mean 0 and variance 1.
        mlp_ratio: Hidden width of the channel mixes.
        post_norm: Normalise the outputs of a block's halves instead of their inputs.
        layer_scale: Initial value of the learned scales of a block's halves, None for no scale.
        key_norm: LayerNorm on the attention's output and on the hidden channels of the channel mixes.
        shift_mode: Shift along the sequence, `'single_shift'` or `'double_shift'`.
        shift: Distance of the token shift.
        channel_gamma: Share of the channels per side, `'double_shift'` only.
        init_mode: See `vla.layers.SpatialMix`.
        drop_path_rate: Rate of stochastic depth in the last block, of the encoder and of the decoder.

    Raises:
        ValueError: For a `shift_mode` that needs a map, or a `mask_ratio` that leaves nothing visible or hidden.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        mlp_ratio: float = 4.0,
        post_norm: bool = True,
        layer_scale: float | None = 1e-5,
        key_norm: bool = True,
        shift_mode: str = "single_shift",
        shift: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        if shift_mode == "q_shift":
            raise ValueError("VRWKVMAE: shift_mode is 'q_shift', expected one along the sequence of visible patches")
        height, width = (-(-size // patch_size) for size in to_2tuple(img_size))
        if not 1 <= int(height * width * (1 - mask_ratio)) < height * width:
            raise ValueError(
                f"VRWKVMAE: mask_ratio is {mask_ratio}, expected some of {height * width} patches visible, some hidden"
            )
        self.grid_size = (height, width)
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss

        def blocks(dim: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(
                VRWKVBlock(
                    dim,
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    layer_scale=layer_scale,
                    post_norm=post_norm,
                    key_norm=key_norm,
                    shift=shift,
                    shift_mode=shift_mode,
                    channel_gamma=channel_gamma,
                    init_mode=init_mode,
                    index=i,
                    depth=count,
                )
                for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, count))
            )

        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim, flatten=False, dynamic_img_pad=True)
        self.pos_embed = nn.Parameter(sincos_pos_embed(height, width, embed_dim))
        self.norm_pre = DEFAULT_NORM(embed_dim)
        self.blocks = blocks(embed_dim, depth)
        self.norm = DEFAULT_NORM(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(height, width, decoder_embed_dim))
        self.decoder_norm_pre = DEFAULT_NORM(decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_depth)
        self.decoder_norm = DEFAULT_NORM(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> patches (B, h * w, patch_size^2 * in_chans), row, column, channel."""
        p = self.patch_size
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % p, 0, -height % p))
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
        return patches.flatten(3).flatten(1, 2)

    def forward_encoder(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes the visible patches.

        Args:
            images: (B, in_chans, H, W).
            noise: One number per patch, (B, h * w): those with the smallest stay visible. Random by default.

        Returns:
            Features of the visible patches (B, kept, C); mask (B, h * w), 1 where hidden; for every patch its place in
            the order of the noise, (B, h * w).
        """
        x = self.patch_embed(images)
        size = (x.shape[2], x.shape[3])
        x = to_tokens(x) + 2 * resize_pos_embed(self.pos_embed, self.grid_size, size, "bicubic")
        batch, length, _ = x.shape
        if noise is None:
            noise = torch.rand(batch, length, device=x.device)
        elif noise.shape != (batch, length):
            raise ValueError(f"VRWKVMAE: noise has shape {tuple(noise.shape)}, expected {(batch, length)}")
        order = noise.argsort(dim=1)
        place = order.argsort(dim=1)
        kept = int(length * (1 - self.mask_ratio))
        x = x.take_along_dim(order[:, :kept, None], dim=1)
        x = self.norm_pre(to_map(x, 1, kept))
        for block in self.blocks:
            x = block(x)
        return to_tokens(self.norm(x)), (place >= kept).to(x.dtype), place

    def forward_decoder(self, x: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
        """Features of the visible patches and every patch's place -> predicted patches (B, h * w, pixels)."""
        x = self.decoder_embed(x)
        batch, length = place.shape
        x = torch.cat([x, self.mask_token.expand(batch, length - x.shape[1], -1)], dim=1)
        x = x.take_along_dim(place[..., None], dim=1)
        x = x + resize_pos_embed(self.decoder_pos_embed, self.grid_size, size, "bicubic")
        x = self.decoder_norm_pre(to_map(x, 1, length))
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(to_tokens(self.decoder_norm(x)))

    def forward_loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the hidden patches."""
        target = self.patchify(images)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Hides patches and reconstructs them.

        Args:
            images: (B, in_chans, H, W), any size.
            noise: See `forward_encoder`.

        Returns:
            Loss, a scalar; predicted patches (B, h * w, patch_size^2 * in_chans); mask (B, h * w), 1 where hidden.
        """
        features, mask, place = self.forward_encoder(images, noise)
        size = tuple(-(-side // self.patch_size) for side in images.shape[2:])
        prediction = self.forward_decoder(features, place, size)
        return self.forward_loss(images, prediction, mask), prediction, mask


def checkpoint_filter_fn(state_dict: dict, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Checkpoint of the released pre-training code -> state dict with this module's names."""
    out = {}
    for name, value in unwrap(state_dict, prefixes=("module.",)).items():
        decoder = name.startswith("decoder_blocks.")
        # Named like an encoder's layer, which is what `rename_released` knows.
        name, value = rename_released(name.replace("decoder_blocks.", "layers.").replace("blocks.", "layers."), value)
        if decoder:
            name = name.replace("blocks.", "decoder_blocks.").replace("norm_pre.", "decoder_norm_pre.")
        out[name.replace("ln2.", "decoder_norm.") if name.startswith("ln2.") else name] = value
    return out


def mae_to_classifier(state_dict: dict) -> dict[str, Tensor]:
    """State dict of a pre-trained `VRWKVMAE` -> weights of a `VRWKV` of the same encoder, without the classifier's.

    Load them with `strict=False` into a model with the pre-training's `post_norm`, `layer_scale`, `key_norm` and
    `shift_mode`. The position embedding, which the pre-training adds twice, is doubled.

    Args:
        state_dict: Names of `VRWKVMAE` or of the released pre-training code, in any of their containers.

    Returns:
        Names and tensors of `vla.models.VRWKV`, all but `head.*`.
    """
    encoder = {
        name: value
        for name, value in checkpoint_filter_fn(state_dict).items()
        if not name.startswith(("decoder_", "mask_token"))
    }
    return encoder | {"pos_embed": 2 * encoder["pos_embed"]}


def mae_vrwkv_base(**kwargs) -> VRWKVMAE:
    """Pre-training of VRWKV-B."""
    return VRWKVMAE(**kwargs)


def mae_vrwkv_atto(**kwargs) -> VRWKVMAE:
    """Pre-training of `vrwkv_atto`; not in the paper."""
    model_args = dict(
        patch_size=8,
        embed_dim=96,
        depth=6,
        decoder_embed_dim=64,
        decoder_depth=2,
        post_norm=False,
        layer_scale=None,
        key_norm=False,
        drop_path_rate=0.0,
    )
    return VRWKVMAE(**dict(model_args, **kwargs))


# By name, for the command line: they classify nothing, so they are not timm's to create.
PRETRAINING_MODELS = {f.__name__: f for f in (mae_vrwkv_base, mae_vrwkv_atto)}
