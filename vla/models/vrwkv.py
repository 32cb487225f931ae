"""Vision-RWKV: an isotropic backbone of bidirectional linear attention, in RWKV-4's (v1) and RWKV-6's (v6) form.

`Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures` - https://arxiv.org/abs/2403.02308
Official code and weights: https://github.com/OpenGVLab/Vision-RWKV
"""

import re

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import NormMlpClassifierHead, PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from torch import Tensor, nn

from ..layers.block import DEFAULT_NORM
from ..layers.repeat import Repeated
from ..layers.vrwkv import Grid, VRWKVBlock, to_map, to_tokens
from ._ahead import Backbone
from ._checkpoint import unwrap

__all__ = ["VRWKV"]


@register_notrace_function
def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Position embedding (1, h * w, C) of a grid -> (1, h' * w', C) of another; the same one is returned untouched."""
    if old[0] == new[0] and old[1] == new[1]:
        return pos_embed
    resized = F.interpolate(to_map(pos_embed, old[0], old[1]), size=[new[0], new[1]], mode=mode, align_corners=False)
    return to_tokens(resized)


class VRWKV(Backbone, Repeated):
    """Vision-RWKV backbone and classifier, for images of any size.

    An image is padded with zeros at the bottom and on the right to a multiple of the patch size; the position embedding
    is interpolated to the grid that results.

    Args:
        img_size: Size, or (height, width), whose grid the position embedding has.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier, `''` for none.
        embed_dim: Channels.
        depth: Blocks.
        version: 1 for bi-WKV, 6 for RWKV-6's data-dependent decay.
        mlp_ratio: Hidden width of the channel mixes over `embed_dim`.
        head_dim: Channels per head, version 6 only.
        post_norm: Normalise the outputs of a block's halves instead of their inputs.
        layer_scale: Initial value of the learned scales of a block's halves, None for no scale.
        key_norm: LayerNorm on the attention's output and on the hidden channels of the channel mixes.
        final_norm: LayerNorm after the last block.
        class_token: Append a class token to the pixels' sequence: it takes part in the mixing, the classifier and the
            features leave it out.
        shift: Distance of the token shift.
        shift_mode: See `vla.layers.TokenShift`.
        channel_gamma: Share of the channels per direction of the shift.
        init_mode: `'fancy'`, `'local'` or `'global'`, see `vla.layers.SpatialMix`.
        interpolation: Interpolation of the position embedding, `'bicubic'` or `'bilinear'`.
        head_hidden_size: Width of a hidden layer with tanh in the classifier, None for none.
        drop_rate: Dropout rate before the classifier.
        pos_drop_rate: Dropout rate after the position embedding.
        drop_path_rate: Rate of stochastic depth in the last block; it grows linearly from 0.
        official_split: Compute what the released CUDA kernel does, see `vla.ops.bi_wkv`; version 1 only.
    """

    # Of images, see `Repeated`.
    LIMIT = 2**20

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        version: int = 1,
        mlp_ratio: float = 4.0,
        head_dim: int = 64,
        post_norm: bool = False,
        layer_scale: float | None = None,
        key_norm: bool = False,
        final_norm: bool = True,
        class_token: bool = False,
        shift: int = 1,
        shift_mode: str = "q_shift",
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        interpolation: str = "bicubic",
        head_hidden_size: int | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        official_split: int | None = None,
    ):
        super().__init__()
        if interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"VRWKV: interpolation is {interpolation!r}, expected 'bicubic' or 'bilinear'")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = embed_dim
        self.interpolation = interpolation
        self.grad_checkpointing = False

        height, width = (-(-size // patch_size) for size in to_2tuple(img_size))
        self.grid_size = (height, width)
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim, flatten=False, dynamic_img_pad=True)
        self.pos_embed = nn.Parameter(torch.zeros(1, height * width, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = DEFAULT_NORM(embed_dim)
        self.blocks = nn.ModuleList(
            VRWKVBlock(
                embed_dim,
                version=version,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=layer_scale,
                post_norm=post_norm,
                key_norm=key_norm,
                shift=shift,
                shift_mode=shift_mode,
                channel_gamma=channel_gamma,
                init_mode=init_mode,
                head_dim=head_dim,
                index=i,
                depth=depth,
                official_split=official_split,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.feature_info = [dict(num_chs=embed_dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        self.norm = DEFAULT_NORM(embed_dim) if final_norm else nn.Identity()
        self.head = NormMlpClassifierHead(
            embed_dim,
            num_classes,
            hidden_size=head_hidden_size if num_classes > 0 or global_pool else None,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=nn.Identity,
        )
        self.head_hidden_size = self.head.num_features
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"} if self.cls_token is None else {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^pos_embed|^cls_token|^patch_embed|^norm_pre",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if num_classes == 0 and global_pool == "":
            # Unpooled features come without the classifier's norm and hidden layer.
            self.head.norm, self.head.pre_logits = nn.Identity(), nn.Identity()
            self.head.hidden_size, self.head.num_features = None, self.head.in_features
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the backbone and collects the blocks' outputs.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n blocks if an int, all if None, else the blocks listed.
            return_prefix_tokens: Return pairs of map and class token (B, 1, C) instead of maps.
            norm: Apply the final norm to every collected output.
            stop_early: Stop after the last block that is wanted.
            output_fmt: `'NCHW'`.
            intermediates_only: Return the collected outputs alone.

        Returns:
            Outputs of the blocks as (B, C, h, w); without `intermediates_only` the pair of final features and outputs.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, size, grid = self.forward_embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)
        if return_prefix_tokens:
            pixels = size[0] * size[1]
            intermediates = [(self.pixels(y, size), to_tokens(y)[:, pixels:]) for y in intermediates]
        else:
            intermediates = [self.pixels(y, size) for y in intermediates]
        if intermediates_only:
            return intermediates
        return self.pixels(self.norm(x), size), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the layers that the wanted blocks don't need."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Grid]:
        """Images -> what the blocks take, the grid of patches, and the blocks' argument `grid`."""
        x = self.patch_embed(x)
        size = (x.shape[2], x.shape[3])
        tokens = to_tokens(x) + resize_pos_embed(self.pos_embed, self.grid_size, size, self.interpolation)
        grid: Grid = None
        if self.cls_token is not None:
            grid = size
            tokens = self.pos_drop(torch.cat([tokens, self.cls_token.expand(tokens.shape[0], -1, -1)], dim=1))
            return self.norm_pre(to_map(tokens, 1, tokens.shape[1])), size, grid
        return self.norm_pre(to_map(self.pos_drop(tokens), size[0], size[1])), size, grid

    def pixels(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Output of a block without class token, (B, C, h, w)."""
        if self.cls_token is None:
            return x
        return to_map(to_tokens(x)[:, : size[0] * size[1]], size[0], size[1])

    def forward_features(self, x: Tensor) -> Tensor:
        x, size, grid = self.forward_embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.pixels(self.norm(x), size)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


_RENAMES = [
    (r"^backbone\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.0\.ln0\.", "norm_pre."),
    (r"^layers\.", "blocks."),
    (r"^ln1\.", "norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.att\.key_norm\.", ".mixer.wkv_norm."),
    (r"\.ffn\.key_norm\.", ".mlp.hidden_norm."),
    (r"\.att\.ln_x\.", ".mixer.group_norm."),
    (r"\.time_maa_w1$", ".mix_down"),
    (r"\.time_maa_w2$", ".mix_up"),
    (r"\.time_decay_w1$", ".decay_down"),
    (r"\.time_decay_w2$", ".decay_up"),
    (r"\.time_faaaa$", ".bonus"),
    (r"\.spatial_first$", ".bonus"),
    (r"\.time_maa_", ".mix_"),
    (r"\.spatial_mix_", ".mix_"),
    (r"\.(time|spatial)_decay$", ".decay"),
    (r"\.att\.", ".mixer."),
    (r"\.ffn\.", ".mlp."),
    (r"^head\.0\.", "head.pre_logits.fc."),
    (r"^head\.2\.", "head.fc."),
]


def rename_released(name: str, value: Tensor) -> tuple[str, Tensor]:
    """A name and tensor of the released code -> those of this one's; names that are this one's already stay."""
    for old, new in _RENAMES:
        name = re.sub(old, new, name)
    if re.search(r"\.(mix_[xwkvrg]|decay)$", name):
        value = value.flatten()
    return name, value


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Released or pre-trained checkpoint -> state dict with this module's names, position embedding resized."""
    state_dict = unwrap(state_dict, prefixes=("module.",))
    if "mask_token" in state_dict:
        from .vrwkv_mae import mae_to_classifier  # here, as it imports this module

        state_dict = mae_to_classifier(state_dict)
    out = dict(rename_released(name, value) for name, value in state_dict.items())
    pos_embed = out.get("pos_embed")
    if model is not None and pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        side = int(pos_embed.shape[1] ** 0.5)
        if side * side == pos_embed.shape[1]:
            out["pos_embed"] = resize_pos_embed(pos_embed, (side, side), model.grid_size, model.interpolation)
    return out


def _cfg(filename: str = "", **kwargs) -> dict:
    return {
        "hf_hub_id": "OpenGVLab/Vision-RWKV" if filename else None,
        "hf_hub_filename": filename or None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/OpenGVLab/Vision-RWKV",
        "paper_name": "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures",
        "paper_ids": "arXiv:2403.02308",
        **kwargs,
    }


def _atto_cfg() -> dict:
    return _cfg(pool_size=(28, 28), license="mit", origin_url=None, paper_name=None, paper_ids=None)


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_atto.untrained": _atto_cfg(),
        "vrwkv_tiny.in1k": _cfg("vrwkv_t_in1k_224.pth"),
        "vrwkv_small.in1k": _cfg("vrwkv_s_in1k_224.pth"),
        "vrwkv_base.in1k": _cfg("vrwkv_b_in1k_224.pth"),
        "vrwkv_large.in22k_ft_in1k_384": _cfg(
            "vrwkv_l_22kto1k_384.pth", input_size=(3, 384, 384), pool_size=(24, 24), crop_pct=1.0
        ),
        "vrwkv_large.in22k": _cfg(
            "vrwkv_l_in22k_192.pth", input_size=(3, 192, 192), pool_size=(12, 12), crop_pct=1.0, num_classes=21841
        ),
        "vrwkv6_atto.untrained": _atto_cfg(),
        "vrwkv6_tiny.in1k": _cfg("vrwkv6_t_in1k_224.pth"),
        "vrwkv6_small.in1k": _cfg("vrwkv6_s_in1k_224.pth"),
        "vrwkv6_base.in1k": _cfg("vrwkv6_b_in1k_224.pth"),
    }
)


def _create_vrwkv(variant: str, pretrained: bool = False, **kwargs) -> VRWKV:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        VRWKV,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def vrwkv_atto(pretrained: bool = False, **kwargs) -> VRWKV:
    """A very small Vision-RWKV for tests, small pictures and slow machines; not in the paper."""
    model_args = dict(patch_size=8, embed_dim=96, depth=6)
    return _create_vrwkv("vrwkv_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_tiny(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV-T."""
    model_args = dict(embed_dim=192)
    return _create_vrwkv("vrwkv_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_small(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV-S."""
    model_args = dict(embed_dim=384, post_norm=True, layer_scale=1.0)
    return _create_vrwkv("vrwkv_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_base(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV-B."""
    model_args = dict(embed_dim=768, post_norm=True, layer_scale=1e-5)
    return _create_vrwkv("vrwkv_base", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv_large(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV-L: pre-trained on ImageNet-22k at 192 pixels, whose position embedding the fine-tuned model keeps."""
    model_args = dict(
        img_size=192,
        embed_dim=1024,
        depth=24,
        post_norm=True,
        layer_scale=1e-5,
        key_norm=True,
        head_hidden_size=3072,
    )
    return _create_vrwkv("vrwkv_large", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv6_atto(pretrained: bool = False, **kwargs) -> VRWKV:
    """A very small Vision-RWKV 6 for tests, small pictures and slow machines; not in the paper."""
    model_args = dict(version=6, patch_size=8, embed_dim=96, depth=4, head_dim=32)
    return _create_vrwkv("vrwkv6_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv6_tiny(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV6-T."""
    model_args = dict(version=6, embed_dim=192)
    return _create_vrwkv("vrwkv6_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv6_small(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV6-S."""
    model_args = dict(version=6, embed_dim=384, post_norm=True, layer_scale=1e-5)
    return _create_vrwkv("vrwkv6_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vrwkv6_base(pretrained: bool = False, **kwargs) -> VRWKV:
    """VRWKV6-B."""
    model_args = dict(version=6, embed_dim=768, post_norm=True, layer_scale=1e-5)
    return _create_vrwkv("vrwkv6_base", pretrained, **dict(model_args, **kwargs))
