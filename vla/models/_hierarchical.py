"""timm's contract for backbones of stages with falling resolution: what does not depend on the family."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.block import first_norm, run_blocks
from ..layers.downsample import ConvDownsample
from ..layers.hooks import is_plain
from ..layers.repeat import Repeated
from ._ahead import Backbone


class Stage(nn.Module):
    """Downsampling, blocks and, where the family has one, norm of one resolution.

    Args:
        downsample: Module from the previous stage's output to (B, C, H, W).
        blocks: Blocks (B, C, H, W) -> same.
        norm: Norm of the output.
    """

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if norm is None else norm

    def run_blocks(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        if torch.jit.is_scripting():
            return self.blocks(x)
        return run_blocks(self.blocks, x)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (a script must not look into the second condition)
            if not self.grad_checkpointing:
                x, normed = self.begin(x)
                return run_blocks(self.blocks, x, self.norm, normed)
        x = self.downsample(x)
        return self.norm(self.run_blocks(x))

    @torch.jit.ignore
    def begin(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The downsampling, and the first block's norm behind it if both are one operator."""
        downsample = self.downsample
        if is_plain(downsample, ConvDownsample) and downsample.is_one_pass(x):
            # Of the map that is not there yet it only matters where and of which dtype it is, as it has few channels.
            norm = first_norm(self.blocks, x)
            if norm is not None:
                return downsample.norm_twice(x, norm)
        return downsample(x), None


class HierarchicalBackbone(Backbone, Repeated):
    """A stem, stages, norms beside the trunk, and a classifier.

    The constructor of a family adds `stem`, `stages` (an `nn.Sequential` of `Stage`), `norms` (an `nn.ModuleList` with
    one norm or identity for each stage; only the last one acts in classification) and `head` (timm's
    `ClassifierHead`).

    Args:
        in_chans: Channels of the image.
        num_classes: Classes, 0 for no classifier.
        dims: Channels per stage.
        reduction: Stride of the first stage; it doubles from stage to stage.
        drop_rate: Dropout rate before the classifier.
    """

    # Of images, see `Repeated`.
    LIMIT = 2**20

    def __init__(self, in_chans: int, num_classes: int, dims: tuple[int, ...], reduction: int, drop_rate: float):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.pos_embed = None

    def add_pos_embed(self, dim: int, grid: tuple[int, int]) -> None:
        """Adds a learned position embedding, which is resized to the map it meets."""
        self.pos_embed = nn.Parameter(torch.empty(1, dim, *grid))
        trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set() if self.pos_embed is None else {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stem|^pos_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^class_block|^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the backbone and collects the stages' outputs.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The last n stages if an int, all if None, else the stages listed.
            norm: Normalise the outputs, each by its entry of `norms`: in classifiers only the last stage has one.
            stop_early: Stop after the last stage that is wanted.
            output_fmt: `'NCHW'`.
            intermediates_only: Return the collected outputs alone.

        Returns:
            Outputs of the stages as (B, C, H, W); without `intermediates_only` the pair of final features and outputs.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stop = max_index + 1 if stop_early else len(self.stages)
        x = self.forward_stem(x)
        normed = x
        for i, (stage, stage_norm) in enumerate(zip(self.stages[:stop], self.norms[:stop], strict=True)):
            x = stage(x)
            normed = stage_norm(x)
            if i in take_indices:
                intermediates.append(normed if norm else x)
        if intermediates_only:
            return intermediates
        return normed, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the layers that the wanted stages don't need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.norms = self.norms[: max_index + 1]
        if prune_norm:
            self.norms = nn.ModuleList([nn.Identity() for _ in self.norms])
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """Patch embedding and position embedding, (B, in_chans, H, W) -> (B, C, ~H / reduction, ~W / reduction)."""
        x = self.stem(x)
        if self.pos_embed is not None:
            x = x + F.interpolate(self.pos_embed, x.shape[2:], mode="bicubic")
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.forward_stem(x)
        x = self.stages(x)
        return self.norms[-1](x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)
