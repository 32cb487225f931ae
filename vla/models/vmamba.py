"""VMamba: a hierarchical backbone whose token mixer scans the map along four directions.

`VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166
Released weights: https://github.com/MzeroMiko/VMamba
"""

import re

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers.block import NORMS
from ..layers.downsample import DOWNSAMPLES, STEMS
from ..layers.ss2d import VSSBlock
from ._checkpoint import unwrap
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ["VMamba", "parse_forward_type"]

# Stems of the released forward types: one scan each. What else told them apart were kernels, not results.
_SCANS = {
    **dict.fromkeys(("v01", "v02", "v03", "v04", "v05", "v2", "v3"), "cross2d"),
    "v051d": "unidi",
    "v052d": "bidi",
    "v052dc": "cascade2d",
}
_OUT_NORMS = {
    "_onnone": "none",
    "_ondwconv3": "dwconv3",
    "_oncnorm": "lndwconv3",
    "_onsoftmax": "softmax",
    "_onsigmoid": "sigmoid",
}


def parse_forward_type(forward_type: str) -> dict:
    """Options of `SS2D` that a `forward_type` of the released configurations stands for.

    A stem (`v0`, `v0seq`, `v01` ... `v05`, `v2`, `v3`: all VMamba's own scan; `v051d`: one direction; `v052d`: rows
    forwards and backwards; `v052dc`: rows, then columns; `m0`: Mamba-2) and then, each optional and in this order, the
    norm after the scan (`_onnone`, `_ondwconv3`, `_oncnorm`, `_onsoftmax`, `_onsigmoid`), `_nozact` (gate without
    activation), `_noz` (no gate), `_oact` (GELU after that norm) and `_no32` (no effect: the scan chooses precision).

    Args:
        forward_type: Name of a configuration, e.g. `'v05_noz'`.

    Raises:
        ValueError: For an unknown name, and for those that the released code lists but cannot run.
    """
    if forward_type in ("v0", "v0seq"):
        return dict(gate=True, act_layer="silu", conv_kernel=3, conv_bias=True, init="v0")
    stem = forward_type
    flags = set()
    for postfix in ("_no32", "_oact", "_noz", "_nozact"):
        if stem.endswith(postfix):
            stem = stem.removesuffix(postfix)
            flags.add(postfix)
    options = dict(gate="_noz" not in flags, gate_act="_nozact" not in flags, out_act="_oact" in flags)
    for postfix, out_norm in _OUT_NORMS.items():
        if stem.endswith(postfix):
            stem = stem.removesuffix(postfix)
            options["out_norm"] = out_norm
            break
    if stem == "m0" and not options["gate"]:
        return dict(options, ssd=True)
    if stem in _SCANS:
        return dict(options, scan=_SCANS[stem])
    raise ValueError(
        f"forward_type: cannot use {forward_type!r}, expected v0, v0seq, m0[norm]_noz[_oact][_no32] or "
        f"STEM[norm][_nozact][_noz][_oact][_no32] with STEM one of {', '.join(_SCANS)} and norm one of "
        f"{', '.join(_OUT_NORMS)}"
    )


class VMamba(HierarchicalBackbone):
    """VMamba backbone and classifier, for images of any size.

    Names and meaning of the arguments `ssm_*`, `mlp_*`, `*_version` and the like are those of the released
    configurations.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        global_pool: Pooling before the classifier, `''` for none.
        img_size: Size whose grid the position embedding has; used with `posembed` only.
        patch_size: Side of a patch.
        depths: Blocks per stage.
        dims: Channels per stage; a number is doubled from stage to stage.
        ssm_d_state: States per channel of the scan.
        ssm_ratio: Inner width of the mixer over the stage's channels.
        ssm_dt_rank: Rank of the time step, `'auto'` for a 16th of the channels, rounded up.
        ssm_act_layer: Activation in the mixer.
        ssm_conv: Side of the mixer's depthwise convolution, odd; 1 (or less) for none.
        ssm_conv_bias: Bias of that convolution.
        ssm_drop_rate: Dropout rate of the mixer's output.
        ssm_init: Initialisation of the scan's parameters: `'v0'`, `'v1'`, `'v2'`.
        forward_type: Scan, gate and norm of the mixer, see `parse_forward_type`. `'v0'` fixes `ssm_act_layer`,
            `ssm_conv`, `ssm_conv_bias` and `ssm_init` to those of the first VMamba.
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
        out_norm: Stages whose outputs get a norm for dense prediction, as in the released detection and segmentation
            backbones. They replace the norm before the classifier.

    Raises:
        ValueError: For an unknown name or a combination that does not exist.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: int | tuple[int, ...] = 96,
        ssm_d_state: int = 1,
        ssm_ratio: float = 1.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = False,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v05_noz",
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
        out_norm: tuple[int, ...] = (),
    ):
        for name, value, known in (
            ("norm_layer", norm_layer.lower(), NORMS),
            ("downsample_version", downsample_version, DOWNSAMPLES),
            ("patchembed_version", patchembed_version, STEMS),
        ):
            if value not in known:
                raise ValueError(f"VMamba: unknown {name} {value!r}, expected one of {', '.join(known)}")
        if isinstance(dims, int):
            dims = tuple(dims * 2**i for i in range(len(depths)))
        if len(dims) != len(depths):
            raise ValueError(f"VMamba: dims has {len(dims)} entries, expected {len(depths)} like depths")
        norm_layer = NORMS[norm_layer.lower()]
        mixer_args = dict(
            d_state=ssm_d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=None if ssm_dt_rank == "auto" else ssm_dt_rank,
            act_layer=ssm_act_layer,
            conv_kernel=ssm_conv,
            conv_bias=ssm_conv_bias,
            init=ssm_init,
            drop=ssm_drop_rate,
        )
        mixer_args |= parse_forward_type(forward_type)
        ssm_act_layer = mixer_args.pop("act_layer")

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
            blocks = [
                VSSBlock(
                    dims[i],
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    act_layer=mlp_act_layer,
                    mlp_drop=mlp_drop_rate,
                    gated_mlp=gmlp,
                    ssm_act_layer=ssm_act_layer,
                    **mixer_args,
                )
                for rate in rates
            ]
            self.stages.append(Stage(downsample, blocks))

        normed_stages = out_norm or (len(dims) - 1,)
        self.norms = nn.ModuleList([norm_layer(d) if i in normed_stages else nn.Identity() for i, d in enumerate(dims)])
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        # As released: the skip weights D are exempt like every vector, while A_log decays like every matrix.
        return {name for name, _ in self.named_parameters() if name == "pos_embed" or name.endswith(".D")}


_RENAMES = (
    # Names of the first release.
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    # Names of the current one.
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    # Released stages end with the downsampling that ours start with.
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^layers\.", "stages."),
    (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"(blocks\.\d+)\.op\.", r"\1.mixer."),
    (r"\.mixer\.(x_proj_weight)$", r".mixer.scan.\1"),
    (r"\.mixer\.dt_projs_", ".mixer.scan.dt_proj_"),
    (r"\.mixer\.A_logs$", ".mixer.scan.A_log"),
    (r"\.mixer\.Ds$", ".mixer.scan.D"),
    (r"\.conv2d\.(1\.)?", ".conv."),
    (r"\.out_norm\.0\.", ".out_norm.norm."),
    (r"\.out_norm\.[12]\.", ".out_norm.conv."),
    (r"^outnorm(\d)\.", r"norms.\1."),
    (r"^classifier\.head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Released checkpoint of a classifier or of a dense backbone -> state dict with this module's names."""
    state_dict = unwrap(state_dict)
    if "stem.conv1.weight" in state_dict:
        return state_dict
    out = {}
    for name, value in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        steps = state_dict.get(f"{prefix}.dt_projs_weight")
        if leaf in ("A_logs", "Ds") and steps is not None:
            value = value.unflatten(0, steps.shape[:2])
        elif leaf == "weight" and value.ndim == 4 and re.search(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.", name):
            # A linear layer that was saved as a 1x1 convolution.
            value = value.flatten(1)
        elif leaf == "pos_embed" and model.pos_embed is not None:
            value = F.interpolate(value, model.pos_embed.shape[2:], mode="bicubic")
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        if name.startswith("classifier.norm."):
            name = f"norms.{len(model.norms) - 1}.{leaf}"
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
        "license": "mit",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        **kwargs,
    }


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_atto.untrained": _cfg(origin_url=None, paper_name=None, paper_ids=None),
        "vanilla_vmamba_tiny.in1k": _cfg(f"{_RELEASES}/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vanilla_vmamba_small.in1k": _cfg(f"{_RELEASES}/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vanilla_vmamba_base.in1k": _cfg(f"{_RELEASES}/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base_s2l15.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_tiny_s1l8.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s1l20.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        # Architectures without released weights.
        "vmamba_tiny_m2.untrained": _cfg(),
        "vmamba_small_m2.untrained": _cfg(),
        "vmamba_base_m2.untrained": _cfg(),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs) -> VMamba:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    if kwargs.get("out_norm"):
        feature_cfg = dict(out_indices=kwargs["out_norm"], feature_cls="getter", norm=True)
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


def _create_vanilla(variant: str, pretrained: bool, **kwargs) -> VMamba:
    model_args = dict(
        ssm_d_state=16,
        ssm_ratio=2.0,
        forward_type="v0",
        mlp_ratio=0.0,
        downsample_version="v1",
        patchembed_version="v1",
    )
    return _create_vmamba(variant, pretrained, **dict(model_args, **kwargs))


def _create_mamba2(variant: str, pretrained: bool, **kwargs) -> VMamba:
    model_args = dict(ssm_d_state=64, ssm_act_layer="gelu", ssm_init="v2", forward_type="m0_noz")
    return _create_vmamba(variant, pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_atto(pretrained: bool = False, **kwargs) -> VMamba:
    """Less than 1 M parameters, for tests and first steps."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(32, 48, 64, 96), mlp_ratio=3.0)
    return _create_vmamba("vmamba_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs) -> VMamba:
    """Vanilla-VMamba-T: 22.9 M parameters."""
    model_args = dict(depths=(2, 2, 9, 2), dims=96, drop_path_rate=0.2)
    return _create_vanilla("vanilla_vmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs) -> VMamba:
    """Vanilla-VMamba-S: 44.4 M parameters."""
    model_args = dict(depths=(2, 2, 27, 2), dims=96, drop_path_rate=0.3)
    return _create_vanilla("vanilla_vmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs) -> VMamba:
    """Vanilla-VMamba-B: 76.3 M parameters."""
    model_args = dict(depths=(2, 2, 27, 2), dims=128, drop_path_rate=0.6)
    return _create_vanilla("vanilla_vmamba_base", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T[s2l5]: 30.7 M parameters."""
    model_args = dict(depths=(2, 2, 5, 2), dims=96, ssm_ratio=2.0, drop_path_rate=0.2)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S[s2l15]: 50.1 M parameters."""
    model_args = dict(depths=(2, 2, 15, 2), dims=96, ssm_ratio=2.0, drop_path_rate=0.3)
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B[s2l15]: 88.6 M parameters."""
    model_args = dict(depths=(2, 2, 15, 2), dims=128, ssm_ratio=2.0, drop_path_rate=0.6)
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T[s1l8]: 30.2 M parameters."""
    model_args = dict(depths=(2, 2, 8, 2), dims=96, drop_path_rate=0.2)
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S[s1l20]: 49.0 M parameters."""
    model_args = dict(depths=(2, 2, 20, 2), dims=96, drop_path_rate=0.3)
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B[s1l20]: 86.6 M parameters."""
    model_args = dict(depths=(2, 2, 20, 2), dims=128, drop_path_rate=0.5)
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-T with Mamba-2's scan: 25.3 M parameters."""
    model_args = dict(depths=(2, 2, 4, 2), dims=96, drop_path_rate=0.2)
    return _create_mamba2("vmamba_tiny_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-S with Mamba-2's scan: 39.1 M parameters."""
    model_args = dict(depths=(2, 2, 12, 2), dims=96, drop_path_rate=0.3)
    return _create_mamba2("vmamba_small_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs) -> VMamba:
    """VMamba-B with Mamba-2's scan: 67.5 M parameters."""
    model_args = dict(depths=(2, 2, 12, 2), dims=128, drop_path_rate=0.3)
    return _create_mamba2("vmamba_base_m2", pretrained, **dict(model_args, **kwargs))
