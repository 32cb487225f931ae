"""MambaVision: convolutional stages, then windows mixed by a selective scan and by attention.

`MambaVision: A Hybrid Mamba-Transformer Vision Backbone` - https://arxiv.org/abs/2407.08083
Released weights: https://github.com/NVlabs/MambaVision
"""

import re
from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerScale2d,
    calculate_drop_path_rates,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.layout import channels_last
from ..layers.mambavision import MambaVisionBlock, window_partition, window_reverse
from ._checkpoint import unwrap
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ["MambaVision"]


class Stem(nn.Module):
    """Two strided convolutions, (B, in_chans, H, W) -> (B, dim, ~H / 4, ~W / 4)."""

    def __init__(self, in_chans: int, hidden_dim: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden_dim, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden_dim, eps=1e-4)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)))


class ConvBlock(nn.Module):
    """Residual pair of 3x3 convolutions with batch norm, (B, C, H, W) -> same."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale: float | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.ls = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.ls(self.norm2(self.conv2(y))))


class MambaVisionStage(Stage):
    """Downsampling and blocks of one resolution, (B, in_dim, H, W) -> (B, dim, ~H / 2, ~W / 2).

    Args:
        in_dim: Channels of the input, None for `dim` ones that are not downsampled.
        dim: Channels of the output.
        blocks: Blocks (B, C, H, W) -> same.
        window_size: Side of the windows that all the blocks see instead of the map, None for the map itself. Padding
            is zero when it enters the first block, and then takes part like any other pixel, unmasked.
    """

    def __init__(self, in_dim: int | None, dim: int, blocks: list[nn.Module], window_size: int | None = None):
        if in_dim is None:
            downsample = nn.Identity()
        else:
            downsample = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[2], x.shape[3]
        if self.window_size is not None:
            x = window_partition(x, self.window_size)
        x = self.run_blocks(x)
        if self.window_size is not None:
            x = window_reverse(x, height, width)
        return x


class MambaVision(HierarchicalBackbone):
    """MambaVision backbone and classifier, for images of any size.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier, `''` for none.
        dims: Channels of each of the four stages.
        stem_dim: Channels between the two convolutions of the stem.
        depths: Blocks per stage. The first two stages are convolutional; in the others the first half of the blocks
            (rounded up) scan, the rest attend.
        num_heads: Attention heads per stage; those of the first two stages are unused.
        window_size: Side of the windows per stage; those of the first two stages are unused. No weight depends on it,
            but the padding of maps that aren't a multiple of it enters the result.
        mlp_ratio: Hidden width of the MLPs over the stage's channels.
        qkv_bias: Bias in the attention's query, key and value.
        qk_norm: LayerNorm on the attention's queries and keys.
        layer_scale: Initial layer scale of the windowed stages, None for no layer scale.
        layer_scale_conv: Initial layer scale of the convolutional stages, None for no layer scale.
        drop_rate: Dropout rate of MLPs, of attention projections and before the classifier.
        attn_drop_rate: Dropout rate of the attention weights, in training only.
        drop_path_rate: Rate of stochastic depth at the last block, growing linearly from 0. Windows are dropped
            one by one.
        double_dt_bias: Add the time step's bias twice, as the released weights need; see `MambaVisionMixer`.
        dt_init: Initial time steps: `'zero'` as the released models were trained, from zero biases; `'mamba'` for
            Mamba's range of time scales.
        out_norm: Stages whose outputs get a norm for dense prediction, as in the released detection and segmentation
            backbones. These norms replace the batch norm before the classifier.
        out_norm_layer: Norm of those stages, `'layernorm2d'` as released, or `'batchnorm2d'`.

    Raises:
        ValueError: For an unknown `dt_init` or `out_norm_layer`, or lists of the wrong length.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (80, 160, 320, 640),
        stem_dim: int = 32,
        depths: tuple[int, ...] = (1, 3, 8, 4),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        window_size: tuple[int, ...] = (8, 8, 14, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        double_dt_bias: bool = True,
        dt_init: str = "zero",
        out_norm: tuple[int, ...] = (),
        out_norm_layer: str = "layernorm2d",
    ):
        for name, value in (
            ("dims", dims),
            ("depths", depths),
            ("num_heads", num_heads),
            ("window_size", window_size),
        ):
            if len(value) != 4:
                raise ValueError(f"MambaVision: {name} has {len(value)} entries, expected one for each of 4 stages")
        if dt_init not in ("zero", "mamba"):
            raise ValueError(f"MambaVision: dt_init is {dt_init!r}, expected 'zero' or 'mamba'")
        if out_norm_layer not in ("layernorm2d", "batchnorm2d"):
            raise ValueError(
                f"MambaVision: out_norm_layer is {out_norm_layer!r}, expected 'layernorm2d' or 'batchnorm2d'"
            )
        super().__init__(in_chans, num_classes, dims, 4, drop_rate)
        self.stem = Stem(in_chans, stem_dim, dims[0])
        self.stages = nn.Sequential()
        in_dim = None
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            if i < 2:
                blocks = [ConvBlock(dims[i], rate, layer_scale_conv) for rate in rates]
            else:
                blocks = [
                    MambaVisionBlock(
                        dims[i],
                        mixer="mamba" if j < (depths[i] + 1) // 2 else "attention",
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                        layer_scale=layer_scale,
                        drop=drop_rate,
                        num_heads=num_heads[i],
                        qkv_bias=qkv_bias,
                        qk_norm=qk_norm,
                        attn_drop=attn_drop_rate,
                        double_dt_bias=double_dt_bias,
                    )
                    for j, rate in enumerate(rates)
                ]
            self.stages.append(MambaVisionStage(in_dim, dims[i], blocks, window_size[i] if i >= 2 else None))
            in_dim = dims[i]

        if out_norm:
            norm_layer = get_norm_layer(out_norm_layer)
            norms = [norm_layer(dim, eps=1e-5) if i in out_norm else nn.Identity() for i, dim in enumerate(dims)]
        else:
            norms = [nn.Identity(), nn.Identity(), nn.Identity(), nn.BatchNorm2d(in_dim)]
        self.norms = nn.ModuleList(norms)
        self.head = ClassifierHead(in_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate)

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (dt_init == "mamba" and name.endswith("dt_proj")):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


_RENAMES = (
    (r"^patch_embed\.conv_down\.0\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.1\.", "stem.norm1."),
    (r"^patch_embed\.conv_down\.3\.", "stem.conv2."),
    (r"^patch_embed\.conv_down\.4\.", "stem.norm2."),
    # Released stages end with the downsampling that ours start with.
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"(\.blocks\.\d+)\.gamma$", r"\1.ls.gamma"),
    (r"\.mixer\.(qkv|proj|q_norm|k_norm)\.", r".mixer.attn.\1."),
    (r"\.mixer\.conv1d_x\.", ".mixer.conv."),
    (r"^norm\.", "norms.3."),
    (r"^outnorm(\d)\.", r"norms.\1."),
    (r"^head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Released checkpoint of a classifier or of a dense backbone -> state dict with this module's names."""
    state_dict = unwrap(state_dict, ("state_dict", "model"))
    if "stem.conv1.weight" in state_dict:
        return state_dict
    out = {}
    for name, value in state_dict.items():
        if name.endswith(".conv1d_z.weight"):
            continue
        if name.endswith(".conv1d_x.weight"):
            # Both branches' filters in one convolution, and that over maps one row high.
            value = torch.cat([value, state_dict[name.replace("conv1d_x", "conv1d_z")]]).unsqueeze(2)
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        out[name] = value
    return out


def _cfg(hf_hub_id: str = "", hf_hub_filename: str = "", **kwargs) -> dict:
    return {
        "hf_hub_id": hf_hub_id or None,
        "hf_hub_filename": hf_hub_filename or None,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "cc-by-nc-sa-4.0",
        "origin_url": "https://github.com/NVlabs/MambaVision",
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        "paper_ids": "arXiv:2407.08083",
        **kwargs,
    }


# Backbones of detectors and segmenters: no classifier.
_dense_cfg = partial(_cfg, num_classes=0, classifier=None)

default_cfgs = generate_default_cfgs(
    {
        "mambavision_atto.untrained": _cfg(license="mit", origin_url=None, paper_name=None, paper_ids=None),
        "mambavision_tiny.in1k": _cfg("nvidia/MambaVision-T-1K", "mambavision_tiny_1k.pth.tar"),
        "mambavision_tiny.coco": _dense_cfg(
            "nvidia/cascade_mask_rcnn_mamba_vision_tiny_3x_coco",
            "cascade_mask_rcnn_mamba_vision_tiny_3x_coco.pth",
            input_size=(3, 800, 1344),
            pool_size=(25, 42),
        ),
        "mambavision_tiny.ade20k": _dense_cfg(
            "nvidia/mamba_vision_160k_ade20k-512x512_tiny",
            "mamba_vision_160k_ade20k-512x512_tiny.pth",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
        ),
        "mambavision_tiny2.in1k": _cfg("nvidia/MambaVision-T2-1K", "mambavision_tiny2_1k.pth.tar", crop_pct=0.98),
        "mambavision_small.in1k": _cfg("nvidia/MambaVision-S-1K", "mambavision_small_1k.pth.tar", crop_pct=0.93),
        "mambavision_small.coco": _dense_cfg(
            "nvidia/cascade_mask_rcnn_mamba_vision_small_3x_coco",
            "cascade_mask_rcnn_mamba_vision_small_3x_coco.pth",
            input_size=(3, 800, 1344),
            pool_size=(25, 42),
        ),
        "mambavision_small.ade20k": _dense_cfg(
            "nvidia/mamba_vision_160k_ade20k-512x512_small",
            "mamba_vision_160k_ade20k-512x512_small.pth",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
        ),
        "mambavision_base.in1k": _cfg("nvidia/MambaVision-B-1K", "mambavision_base_1k.pth.tar"),
        "mambavision_base.in21k_ft_in1k": _cfg("nvidia/MambaVision-B-21K", "mambavision_base_21k.pth.tar"),
        "mambavision_base.coco": _dense_cfg(
            "nvidia/cascade_mask_rcnn_mamba_vision_base_3x_coco",
            "cascade_mask_rcnn_mamba_vision_base_3x_coco.pth",
            input_size=(3, 800, 1344),
            pool_size=(25, 42),
        ),
        "mambavision_base.ade20k": _dense_cfg(
            "nvidia/mamba_vision_160k_ade20k-512x512_base",
            "mamba_vision_160k_ade20k-512x512_base.pth",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
        ),
        "mambavision_large.in1k": _cfg("nvidia/MambaVision-L-1K", "mambavision_large_1k.pth.tar"),
        "mambavision_large.in21k_ft_in1k": _cfg("nvidia/MambaVision-L-21K", "mambavision_large_21k.pth.tar"),
        "mambavision_large2.in1k": _cfg("nvidia/MambaVision-L2-1K", "mambavision_large2_1k.pth.tar"),
        "mambavision_large2_512.in21k_ft_in1k": _cfg(
            "nvidia/MambaVision-L2-512-21K",
            "mambavision_L2_21k_240m_512.pth.tar",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
            crop_pct=0.93,
            crop_mode="squash",
        ),
        "mambavision_large3.in21k_ft_in1k": _cfg(
            "nvidia/MambaVision-L3-256-21K",
            "mambavision_L3_21k_740m_256.pth.tar",
            input_size=(3, 256, 256),
            pool_size=(8, 8),
        ),
        "mambavision_large3.ade20k": _dense_cfg(
            "nvidia/mamba_vision_160k_ade20k-640x640_l3_21k",
            "mamba_vision_160k_ade20k-640x640_l3_21k.pth",
            input_size=(3, 640, 640),
            pool_size=(20, 20),
        ),
        "mambavision_large3_512.in21k_ft_in1k": _cfg(
            "nvidia/MambaVision-L3-512-21K",
            "mambavision_L3_21k_740m_512.pth.tar",
            input_size=(3, 512, 512),
            pool_size=(16, 16),
            crop_pct=0.93,
            crop_mode="squash",
        ),
    }
)

# Windows that the dense backbones were trained with. They differ from the classifier's, and their padding changes
# the features, so weights and windows belong together.
_DENSE_WINDOWS = {
    "mambavision_tiny.coco": (8, 8, 112, 56),
    "mambavision_tiny.ade20k": (8, 8, 64, 32),
    "mambavision_small.coco": (8, 8, 112, 56),
    "mambavision_small.ade20k": (8, 8, 160, 56),
    "mambavision_base.coco": (8, 8, 112, 56),
    "mambavision_base.ade20k": (8, 8, 64, 32),
    "mambavision_large3.ade20k": (8, 8, 64, 32),
}


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs) -> MambaVision:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    windows = _DENSE_WINDOWS.get(f"{variant}.{kwargs.get('pretrained_cfg')}")
    if windows is not None:
        if pretrained and not kwargs.get("features_only"):
            raise ValueError(
                f"{variant}.{kwargs['pretrained_cfg']}: the weights have no classifier, expected features_only=True"
            )
        kwargs = dict(window_size=windows, out_norm=(0, 1, 2, 3)) | kwargs
    if kwargs.get("out_norm"):
        feature_cfg = dict(out_indices=kwargs["out_norm"], feature_cls="getter", norm=True)
    return build_model_with_cfg(
        MambaVision,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_model
def mambavision_atto(pretrained: bool = False, **kwargs) -> MambaVision:
    """0.5 M parameters, for tests and first steps: the textbook time step, added once, at Mamba's time scales."""
    model_args = dict(
        dims=(16, 32, 64, 96),
        stem_dim=16,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 3),
        # Padding a picture of 32 pixels to larger windows would be most of the work.
        window_size=(8, 8, 4, 2),
        drop_path_rate=0.0,
        double_dt_bias=False,
        dt_init="mamba",
    )
    return _create_mambavision("mambavision_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T: 31.8 M parameters."""
    model_args = dict(dims=(80, 160, 320, 640), stem_dim=32, depths=(1, 3, 8, 4))
    return _create_mambavision("mambavision_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-T2: 35.1 M parameters."""
    model_args = dict(dims=(80, 160, 320, 640), stem_dim=32, depths=(1, 3, 11, 4))
    return _create_mambavision("mambavision_tiny2", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-S: 50.1 M parameters."""
    model_args = dict(dims=(96, 192, 384, 768), stem_dim=64, depths=(3, 3, 7, 5))
    return _create_mambavision("mambavision_small", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-B: 97.7 M parameters."""
    model_args = dict(
        dims=(128, 256, 512, 1024), stem_dim=64, depths=(3, 3, 10, 5), layer_scale=1e-5, drop_path_rate=0.3
    )
    return _create_mambavision("mambavision_base", pretrained, **dict(model_args, **kwargs))


def _large_args(**kwargs) -> dict:
    dims = (196, 392, 784, 1568)
    return dict(dims=dims, stem_dim=64, num_heads=(4, 8, 16, 32), layer_scale=1e-5, drop_path_rate=0.3) | kwargs


@register_model
def mambavision_large(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L: 228.0 M parameters."""
    model_args = _large_args(depths=(3, 3, 10, 5))
    return _create_mambavision("mambavision_large", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L2: 241.6 M parameters."""
    model_args = _large_args(depths=(3, 3, 12, 5))
    return _create_mambavision("mambavision_large2", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large2_512(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L2 with windows for 512 x 512 pixels."""
    model_args = _large_args(depths=(3, 3, 12, 5), window_size=(8, 8, 32, 16))
    return _create_mambavision("mambavision_large2_512", pretrained, **dict(model_args, **kwargs))


def _large3_args(**kwargs) -> dict:
    return _large_args(dims=(256, 512, 1024, 2048), depths=(3, 3, 20, 10), drop_path_rate=0.5, **kwargs)


@register_model
def mambavision_large3(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L3 with windows for 256 x 256 pixels: 739.6 M parameters."""
    model_args = _large3_args(window_size=(8, 8, 16, 8))
    return _create_mambavision("mambavision_large3", pretrained, **dict(model_args, **kwargs))


@register_model
def mambavision_large3_512(pretrained: bool = False, **kwargs) -> MambaVision:
    """MambaVision-L3 with windows for 512 x 512 pixels."""
    model_args = _large3_args(window_size=(8, 8, 32, 16))
    return _create_mambavision("mambavision_large3_512", pretrained, **dict(model_args, **kwargs))
