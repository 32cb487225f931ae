"""GroupMamba: a hierarchical backbone in which every quarter of the channels is scanned in one direction.

`GroupMamba: Efficient Group-Based Visual State Space Model` - https://arxiv.org/abs/2407.13772
Released weights: https://github.com/Amshaker/GroupMamba
"""

import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .. import ops
from ..layers.aligned import is_worth_launches
from ..layers.block import DEFAULT_NORM
from ..layers.downsample import ConvDownsample
from ..layers.groupmamba import GroupedLinear, GroupMambaBlock, GroupMambaMixer
from ..layers.hooks import is_plain
from ..layers.layout import channels_last
from ..layers.norm import LayerNorm2d, autocast_dtype, narrow
from ._ahead import is_exporting
from ._checkpoint import unwrap
from ._hierarchical import HierarchicalBackbone, Stage

__all__ = ["GroupMamba"]


# cuDNN has no fast convolution of three channels with 7 x 7 kernels, stride 2 and padding 3. Of a block of 2 x 4 pixels
# they are 24, and kernels of 4 x 3 blocks make two neighbouring pixels of the result of them. Half of the numbers in
# those are zero, but tensor cores multiply all of them faster than other units the rest.


def to_blocks(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images (B, C, H, W), H and W multiples of 2 and 4, as blocks (B, 8 * C, H / 2 + 3, W / 4), channels last."""
    blocks = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)  # (B, H / 2, W / 4, 2, 4, C)
    blocks = blocks.to(dtype, memory_format=torch.contiguous_format).flatten(3)
    # Two rows of blocks above and one below; the convolution adds columns by itself.
    return F.pad(blocks, (0, 0, 0, 0, 2, 1)).permute(0, 3, 1, 2)


def to_block_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, C, 7, 7) as those of blocks, (2 * O, 8 * C, 4, 3)."""
    kernels = torch.stack([F.pad(weight, (1, 4, 1, 0)), F.pad(weight, (3, 2, 1, 0))])  # (2, O, C, 8, 12)
    kernels = kernels.unflatten(4, (3, 4)).unflatten(3, (4, 2)).permute(0, 1, 4, 6, 2, 3, 5)
    return kernels.flatten(2, 4).flatten(0, 1)


def from_pairs(y: Tensor) -> Tensor:
    """Pairs of pixels (B, 2 * O, H, W) as pixels (B, O, H, 2 * W)."""
    return y.permute(0, 2, 3, 1).unflatten(3, (2, -1)).flatten(2, 3).permute(0, 3, 1, 2)


def to_pair_kernels(weight: Tensor) -> Tensor:
    """Kernels (O, C, 7, 7) of stride 2 and padding 3 as those of two neighbouring pixels, (2 * O, C, 8, 10).

    Those are of strides 2 and 4 and paddings 3 and 4. Windows then begin where four pixels do, so that a kernel loads
    several numbers at once.
    """
    return torch.cat([F.pad(weight, (1, 2, 0, 1)), F.pad(weight, (3, 0, 0, 1))])


def convolve_blocks(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convolution of images with 7 x 7 kernels, stride 2 and padding 3, of blocks."""
    return from_pairs(F.conv2d(to_blocks(x, dtype), to_block_kernels(weight), padding=(0, 1)))


def is_in_pairs(x: Tensor) -> bool:
    """Whether two neighbouring pixels of an image's convolution are computed as one."""
    # An exported graph may be for all sizes.
    return not is_exporting() and is_worth_launches(x) and x.shape[2] % 2 == 0 and x.shape[3] % 4 == 0


@torch.fx.wrap
def convolve_images(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with 7 x 7 kernels, stride 2 and padding 3."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
        if is_in_pairs(x):
            return convolve_blocks(x, weight, autocast_dtype(x) or x.dtype)
    return F.conv2d(x, weight, stride=2, padding=3)


class ImageConv2d(nn.Conv2d):
    """`nn.Conv2d` of images with 7 x 7 kernels, stride 2 and padding 3, at a GPU's full speed."""

    def __init__(self, in_chans: int, out_chans: int):
        super().__init__(in_chans, out_chans, 7, stride=2, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_images(x, self.weight)


def dtype_of_inference(x: Tensor) -> torch.dtype | None:
    """16 bits in which a GPU takes x without a gradient, None for anything else."""
    # Tracing by torch.fx hands proxies through, and what is traced must not depend on whether gradients are on.
    if not isinstance(x, Tensor) or not x.is_cuda or torch.jit.is_tracing() or torch.is_grad_enabled():
        return None
    dtype = autocast_dtype(x) or x.dtype
    return dtype if dtype.itemsize == 2 else None


def dtype_of_one_pass(conv: nn.Module, norm: nn.Module, act: nn.Module, x: Tensor) -> torch.dtype | None:
    """dtype in which `vla.ops.conv_norm_relu` does what three modules would, None where it doesn't."""
    if norm.training:
        return None
    if not is_plain(conv, nn.Conv2d) and not is_plain(conv, ImageConv2d):
        return None
    if not is_plain(norm, nn.BatchNorm2d) or not is_plain(act, nn.ReLU):
        return None
    if norm.running_mean is None or norm.weight is None:
        return None
    return dtype_of_inference(x)


def in_one_pass(
    x: Tensor,
    weight: Tensor,
    norm: nn.BatchNorm2d,
    padding: tuple[int, int],
    stride: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Convolution, batch norm and ReLU."""
    vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return ops.conv_norm_relu(x, weight, *vectors, *padding, norm.eps, *stride, dtype)


class Stem(nn.Module):
    """Three convolutions, the first of them strided, (B, in_chans, H, W) -> (B, hidden_dim, ~H / 2, ~W / 2)."""

    def __init__(self, in_chans: int, hidden_dim: int):
        super().__init__()
        self.conv1 = ImageConv2d(in_chans, hidden_dim)
        self.norm1 = nn.BatchNorm2d(hidden_dim)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden_dim)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(hidden_dim)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        if torch.jit.is_scripting():
            x = self.act1(self.norm1(self.conv1(x)))
            x = self.act2(self.norm2(self.conv2(x)))
            return self.act3(self.norm3(self.conv3(x)))
        else:
            x = self.convolve1(x)
            x = self.convolve(self.conv2, self.norm2, self.act2, x)
            return self.convolve(self.conv3, self.norm3, self.act3, x)

    @torch.jit.ignore
    def convolve1(self, x: Tensor) -> Tensor:
        dtype = dtype_of_one_pass(self.conv1, self.norm1, self.act1, x)
        if dtype is None or not is_in_pairs(x):
            return self.act1(self.norm1(self.conv1(x)))
        kernels = to_pair_kernels(self.conv1.weight)
        return from_pairs(in_one_pass(x, kernels, self.norm1, (3, 4), (2, 4), dtype))

    @torch.jit.ignore
    def convolve(self, conv: nn.Module, norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
        dtype = dtype_of_one_pass(conv, norm, act, x)
        if dtype is None:
            return act(norm(conv(x)))
        return in_one_pass(x.to(dtype), conv.weight, norm, (1, 1), (1, 1), dtype)


class ClassBlock(nn.Module):
    """Block for the class token alone, which is the mean of all pixels: (B, C, 1, 1) to the same.

    The norm of the mixer acts on its output, that of the MLP on its input.
    """

    def __init__(self, dim: int, mlp_ratio: float, norm_layer: type[nn.Module]):
        super().__init__()
        self.mixer = GroupMambaMixer(dim)
        self.norm1 = norm_layer(dim)
        self.norm2 = narrow(norm_layer(dim))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.mixer(x))
        return x + self.mlp(self.norm2(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupMamba(HierarchicalBackbone):
    """GroupMamba backbone and classifier, for images of any size.

    Features are the stages' outputs, normalised but for the last one, whose norm acts behind the class block. Under
    autocast those that are have its dtype.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        global_pool: `'avg'` for the mean over the map and the class block behind it, `''` for the map itself.
        stem_dim: Channels between the convolutions of the stem.
        dims: Channels of each stage, multiples of 4.
        depths: Blocks per stage.
        mlp_ratios: Hidden width of the MLPs over the stage's channels, per stage.
        norm_eps: Added to the variance in the norms of blocks and stages.
        distilled: Have a second classifier, which learns from a teacher. In training the model returns the pair of
            both classifiers' logits, unless `set_distilled_training(False)`; in evaluation their mean.
        drop_rate: Dropout rate before the classifiers.
        drop_path_rate: Rate of stochastic depth at the last block, growing linearly from 0.

    Raises:
        ValueError: For an unknown `global_pool` or lists of different lengths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        dims: tuple[int, ...] = (64, 128, 348, 448),
        depths: tuple[int, ...] = (3, 4, 9, 3),
        mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
        norm_eps: float = 1e-6,
        distilled: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise ValueError(
                f"GroupMamba: dims, depths and mlp_ratios have {len(dims)}, {len(depths)} and {len(mlp_ratios)} "
                "entries, expected one for each stage"
            )
        super().__init__(in_chans, num_classes, dims, 4, drop_rate)
        self.distilled = distilled
        self.distilled_training = distilled
        norm_layer = partial(LayerNorm2d, eps=norm_eps)

        self.stem = Stem(in_chans, stem_dim)
        self.stages = nn.Sequential()
        last = len(dims) - 1
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)):
            self.stages.append(
                Stage(
                    ConvDownsample((stem_dim, *dims)[i], dims[i], DEFAULT_NORM, kernel_size=3),
                    [GroupMambaBlock(dims[i], mlp_ratios[i], rate, norm_layer=norm_layer) for rate in rates],
                    narrow(norm_layer(dims[i])) if i < last else None,
                )
            )

        # The trunk goes on with the normalised maps, so that there is nothing left for norms beside it.
        self.norms = nn.ModuleList([nn.Identity() for _ in dims])
        self.class_block = ClassBlock(dims[-1], mlp_ratios[-1], norm_layer)
        self.norm = norm_layer(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, GroupedLinear)):
            trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        # As released: vectors are exempt, also those that are stacked over the groups here; A_log and the time step's
        # bias decay like every matrix.
        stacked = (".D", ".out_norm.weight", ".out_norm.bias")
        return {name for name, _ in self.named_parameters() if name.endswith(stacked)}

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Chooses what a distilled model returns in training: the pair of logits, or their mean as in evaluation."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers, and with `global_pool` what they see; `''` needs `num_classes = 0`."""
        if global_pool is not None:
            if global_pool not in ("", "avg"):
                raise ValueError(f"GroupMamba: global_pool is {global_pool!r}, expected 'avg' or ''")
            self.global_pool = global_pool
        if not self.global_pool and num_classes > 0:
            raise ValueError(f"GroupMamba: global_pool is '' with {num_classes} classes, expected 'avg'")
        self.num_classes = num_classes

        def classifier() -> nn.Module:
            fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
            return fc.to(self.stem.conv1.weight).train(self.training)

        self.head = classifier()
        self.head_dist = classifier() if self.distilled else None

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the layers that the wanted stages don't need."""
        stages = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < stages:
            self.class_block = nn.Identity()
            self.norm = nn.Identity()
        return take_indices

    def forward_head(self, x: Tensor, pre_logits: bool = False):
        if self.global_pool == "":
            return x
        x = self.class_block(x.mean((2, 3), keepdim=True))
        x = self.head_drop(self.norm(x).flatten(1))
        if pre_logits or self.head_dist is None:
            return x if pre_logits else self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def forward(self, x: Tensor):
        x = self.forward_features(x)
        return self.forward_head(x)


_RENAMES = (
    (r"^patch_embed1\.conv\.(\d)\.", lambda m: f"stem.{('conv', 'norm')[int(m[1]) % 3]}{int(m[1]) // 3 + 1}."),
    (r"^patch_embed(\d+)\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.conv."),
    (r"^patch_embed(\d+)\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.norm."),
    (r"^block(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"^norm(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.norm."),
    (r"^post_network\.0\.", "class_block."),
    (r"\.attn\.", ".mixer."),
    (r"\.dwconv\.dwconv\.", ".conv."),
    (r"^dist_head\.", "head_dist."),
)
# Parameters of one group's scan that go by another name here.
_GROUP_RENAMES = {
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "scan.x_proj_weight",
    "dt_projs_weight": "scan.dt_proj_weight",
    "dt_projs_bias": "scan.dt_proj_bias",
    "A_logs": "scan.A_log",
    "Ds": "scan.D",
}
# Those whose first axis counts groups already, or channels of all groups here.
_JOINED = ("conv2d.weight", "conv2d.bias", "x_proj_weight", "dt_projs_weight", "dt_projs_bias")


def _stack_groups(leaves: dict[str, dict[int, Tensor]]) -> dict[str, Tensor]:
    """Parameters of the groups' scans, by name and number of the group -> those of one `GroupedSS2D`."""
    out = {}
    for name, by_group in leaves.items():
        values = [by_group[k] for k in sorted(by_group)]
        value = torch.cat(values) if name in _JOINED else torch.stack(values)
        if name == "in_proj.weight":
            out["in_proj.weight"], out["gate_proj.weight"] = value.chunk(2, dim=1)
        else:
            out[_GROUP_RENAMES.get(name, name)] = value
    return out


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Released checkpoint -> state dict with this module's names, the groups' parameters stacked."""
    state_dict = unwrap(state_dict)
    if "stem.conv1.weight" in state_dict:
        return state_dict
    last = len(model.stages) - 1
    out, mixers = {}, {}
    for name, value in state_dict.items():
        for old, new in _RENAMES:
            name = re.sub(old, new, name)
        mixer, _, leaf = name.partition(".mamba_g")
        if leaf:
            group, _, leaf = leaf.partition(".")
            mixers.setdefault(mixer, {}).setdefault(leaf, {})[int(group)] = value
        else:
            out[re.sub(rf"^stages\.{last}\.norm\.", "norm.", name)] = value
    for mixer, leaves in mixers.items():
        out |= {f"{mixer}.ssm.{name}": value for name, value in _stack_groups(leaves).items()}
    return out


def _cfg(hf_hub_id: str | None = None, hf_hub_filename: str | None = None, **kwargs) -> dict:
    return {
        "hf_hub_id": hf_hub_id,
        "hf_hub_filename": hf_hub_filename,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": ("head", "head_dist"),
        "license": "mit",
        "origin_url": "https://github.com/Amshaker/GroupMamba",
        "paper_name": "GroupMamba: Efficient Group-Based Visual State Space Model",
        "paper_ids": "arXiv:2407.13772",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "groupmamba_atto.untrained": _cfg(classifier="head", origin_url=None, paper_name=None, paper_ids=None),
        "groupmamba_tiny.dist_in1k": _cfg("Abdelrahman-shaker/GroupMamba-Tiny", "groupmamba_tiny_ema.pth"),
        "groupmamba_small.dist_in1k": _cfg("Abdelrahman-shaker/GroupMamba-Small", "groupmamba_small_ema.pth"),
        "groupmamba_base.dist_in1k": _cfg("Abdelrahman-shaker/GroupMamba-Base", "groupmamba_base_ema.pth"),
    }
)


def _create_groupmamba(variant: str, pretrained: bool = False, **kwargs) -> GroupMamba:
    return build_model_with_cfg(
        GroupMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def groupmamba_atto(pretrained: bool = False, **kwargs) -> GroupMamba:
    """0.6 M parameters and one classifier, for tests and first steps."""
    model_args = dict(
        stem_dim=16, dims=(16, 32, 64, 96), depths=(1, 1, 2, 1), mlp_ratios=(4.0, 4.0, 4.0, 4.0), distilled=False
    )
    return _create_groupmamba("groupmamba_atto", pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-T: 23.4 M parameters."""
    model_args = dict(stem_dim=32, dims=(64, 128, 348, 448), depths=(3, 4, 9, 3), drop_path_rate=0.05)
    return _create_groupmamba("groupmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-S: 34.8 M parameters."""
    model_args = dict(stem_dim=64, dims=(64, 128, 348, 512), depths=(3, 4, 16, 3), drop_path_rate=0.05)
    return _create_groupmamba("groupmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs) -> GroupMamba:
    """GroupMamba-B: 57.2 M parameters."""
    model_args = dict(stem_dim=64, dims=(96, 192, 424, 512), depths=(3, 6, 21, 3), drop_path_rate=0.05)
    return _create_groupmamba("groupmamba_base", pretrained, **dict(model_args, **kwargs))
