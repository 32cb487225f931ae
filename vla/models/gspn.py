"""GSPN: a hierarchical backbone whose token mixer propagates lines of pixels in four directions.

`Parallel Sequence Modeling via Generalized Spatial Propagation Network` - https://arxiv.org/abs/2501.12381
Official code, weights not released: https://github.com/NVlabs/GSPN
"""

import re

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.block import NORMS
from ..layers.downsample import DOWNSAMPLES, STEMS
from ..layers.gspn import GSPNBlock, rename_released_scan
from . import vmamba
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ["GSPN"]


def is_global(stage: int, block: int, global_stages: tuple[int, ...]) -> bool:
    """Whether a block sweeps the whole map: in the given stages its first seven blocks, and then every seventh."""
    return stage in global_stages and (block < 7 or (block + 1) % 7 == 0)


class GSPN(HierarchicalBackbone):
    """GSPN backbone and classifier, for images of any size.

    Stem, downsampling and head are VMamba's. Names and meaning of the arguments `ssm_*`, `mlp_*`, `*_version` and the
    like are those of the released configurations.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier, `''` for none.
        img_size: Size whose grid the position embedding has; used with `posembed` only.
        patch_size: Side of a patch.
        depths: Blocks per stage.
        dims: Channels per stage; a number is doubled from stage to stage.
        ssm_d_state: Proxy channels that the coefficients of the scan are functions of.
        ssm_ratio: Inner width of the mixer over the stage's channels.
        ssm_conv: Side of the mixer's depthwise convolution, odd.
        ssm_conv_bias: Bias of that convolution.
        ssm_drop_rate: Dropout rate of the mixer's output.
        items_each_chunk: Lines after which the sweeps of local blocks start again from zero.
        specific_glayers: Stages with global blocks, see `is_global`.
        feat_sizes: Lines after which the sweeps of global blocks start again, per stage: the grid of the size that a
            model was trained with, so that at another size its global blocks aren't global any more. That is how
            released configurations work. None for sweeps over the whole grid, whatever its size.
        aligned: Return the outputs of the four directions to their pixels, see `vla.layers.GSPNMixer`. Released
            configurations don't.
        mlp_ratio: Hidden width of the MLPs over the stage's channels, 0 for blocks without MLP.
        mlp_act_layer: Activation in the MLPs.
        mlp_drop_rate: Dropout rate in the MLPs.
        gmlp: Gated MLPs.
        patch_norm: Norms in the patch embedding.
        norm_layer: `'ln'` or `'ln2d'` (LayerNorm over channels) or `'bn'` (BatchNorm).
        downsample_version: `'v1'` (patch merging), `'v2'` (2x2 convolution) or `'v3'` (3x3 convolution).
        patchembed_version: `'v1'` (one convolution) or `'v2'` (two, total stride `(patch_size // 2) ** 2`).
        posembed: Add a learned position embedding, resized to the map it meets.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Rate of stochastic depth at the last block, growing linearly from 0.

    Raises:
        ValueError: For an unknown name, or lists of the wrong length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 7, 2),
        dims: int | tuple[int, ...] = 96,
        ssm_d_state: int = 8,
        ssm_ratio: float = 1.5,
        ssm_conv: int = 7,
        ssm_conv_bias: bool = False,
        ssm_drop_rate: float = 0.0,
        items_each_chunk: int = 2,
        specific_glayers: tuple[int, ...] = (2, 3),
        feat_sizes: tuple[int, ...] | None = None,
        aligned: bool = False,
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        patch_norm: bool = True,
        norm_layer: str = "ln2d",
        downsample_version: str = "v3",
        patchembed_version: str = "v2",
        posembed: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        for name, value, known in (
            ("norm_layer", norm_layer.lower(), NORMS),
            ("downsample_version", downsample_version, DOWNSAMPLES),
            ("patchembed_version", patchembed_version, STEMS),
        ):
            if value not in known:
                raise ValueError(f"GSPN: unknown {name} {value!r}, expected one of {', '.join(known)}")
        if isinstance(dims, int):
            dims = tuple(dims * 2**i for i in range(len(depths)))
        for name, value in (("dims", dims), ("feat_sizes", feat_sizes)):
            if value is not None and len(value) != len(depths):
                raise ValueError(f"GSPN: {name} has {len(value)} entries, expected {len(depths)} like depths")
        norm_layer = NORMS[norm_layer.lower()]

        reduction = (patch_size // 2) ** 2 if patchembed_version == "v2" else patch_size
        super().__init__(in_chans, num_classes, dims, reduction, drop_rate)
        self.stem = STEMS[patchembed_version](in_chans, dims[0], patch_size, norm_layer if patch_norm else nn.Identity)
        if posembed:
            height, width = to_2tuple(img_size)
            self.add_pos_embed(dims[0], (height // patch_size, width // patch_size))

        self.stages = nn.Sequential()
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            if i == 0:
                downsample = nn.Identity()
            else:
                downsample = DOWNSAMPLES[downsample_version](dims[i - 1], dims[i], norm_layer)
            whole = 0 if feat_sizes is None else feat_sizes[i]
            blocks = [
                GSPNBlock(
                    dims[i],
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    act_layer=mlp_act_layer,
                    mlp_drop=mlp_drop_rate,
                    gated_mlp=gmlp,
                    d_state=ssm_d_state,
                    ratio=ssm_ratio,
                    conv_kernel=ssm_conv,
                    conv_bias=ssm_conv_bias,
                    chunk=whole if is_global(i, j, specific_glayers) else items_each_chunk,
                    aligned=aligned,
                    drop=ssm_drop_rate,
                )
                for j, rate in enumerate(rates)
            ]
            self.stages.append(Stage(downsample, blocks))

        self.norms = nn.ModuleList([nn.Identity() for _ in dims[:-1]] + [norm_layer(dims[-1])])
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint of the official code -> state dict with this module's names."""
    out = {}
    for name, value in rename_released_scan(vmamba.checkpoint_filter_fn(state_dict, model)).items():
        if re.search(r"\.grn\.(gamma|beta)$", name):
            name = name.replace(".grn.gamma", ".grn.weight").replace(".grn.beta", ".grn.bias")
            value = value.flatten()
        out[name] = value
    return out


def _cfg(url: str = "", **kwargs) -> dict:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "nvidia-noncommercial",
        "origin_url": "https://github.com/NVlabs/GSPN",
        "paper_name": "Parallel Sequence Modeling via Generalized Spatial Propagation Network",
        "paper_ids": "arXiv:2501.12381",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "gspn_atto.untrained": _cfg(license="mit", origin_url=None, paper_name=None, paper_ids=None),
        # Architectures whose weights were announced and not released.
        "gspn_tiny.untrained": _cfg(),
        "gspn_small.untrained": _cfg(),
        "gspn_base.untrained": _cfg(),
    }
)


def _create_gspn(variant: str, pretrained: bool = False, **kwargs) -> GSPN:
    return build_model_with_cfg(
        GSPN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def gspn_atto(pretrained: bool = False, **kwargs) -> GSPN:
    """0.5 M parameters, for tests and first steps: sweeps over the whole grid, outputs returned to their pixels."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(24, 48, 72, 96), mlp_ratio=3.0, aligned=True)
    return _create_gspn("gspn_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def gspn_tiny(pretrained: bool = False, **kwargs) -> GSPN:
    """GSPN-T: 31.5 M parameters."""
    model_args = dict(depths=(2, 2, 7, 2), dims=96, feat_sizes=(56, 28, 14, 7), drop_path_rate=0.2)
    return _create_gspn("gspn_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def gspn_small(pretrained: bool = False, **kwargs) -> GSPN:
    """GSPN-S: 50.8 M parameters."""
    model_args = dict(
        depths=(5, 5, 10, 2),
        dims=108,
        ssm_d_state=16,
        specific_glayers=(3,),
        feat_sizes=(56, 28, 14, 7),
        drop_path_rate=0.4,
    )
    return _create_gspn("gspn_small", pretrained, **dict(model_args, **kwargs))


@register_model
def gspn_base(pretrained: bool = False, **kwargs) -> GSPN:
    """GSPN-B: 93.1 M parameters."""
    model_args = dict(depths=(4, 4, 15, 4), dims=120, feat_sizes=(56, 28, 14, 7), drop_path_rate=0.5)
    return _create_gspn("gspn_base", pretrained, **dict(model_args, **kwargs))
