"""Models by name, and their weights: building, reading foreign files safely, saving and opening our own."""

import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import create_transform, infer_imagenet_subset, resolve_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.models import PretrainedCfg, clean_state_dict
from torch import Tensor, nn

from ..errors import UserError, suggest
from ..models._checkpoint import CONTAINERS
from ..models.vrwkv_mae import PRETRAINING_MODELS
from .run import RunFolder, atomic_file

_METADATA_KEY = "vla"


@dataclass
class ModelSpec:
    """What it takes to build a model again and to feed it.

    Args:
        architecture: timm model name.
        model_args: Arguments of `timm.create_model` beside the name.
        input_size: (C, H, W).
        mean: Per channel, in [0, 1].
        std: Per channel.
        interpolation: Filter for resizing.
        crop_pct: Part of the picture that the centre crop keeps.
        crop_mode: timm's crop mode.
        classes: Class names by index, or None.
    """

    architecture: str
    model_args: dict[str, Any]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    classes: list[str] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        architecture: str,
        model_args: dict[str, Any],
        img_size: int | None = None,
        crop_pct: float | None = None,
        classes: list[str] | None = None,
    ) -> "ModelSpec":
        """Describe a model as timm's data configuration does, with another input size or crop where given."""
        in_chans = model_args.get("in_chans", 3)
        overrides = {"img_size": img_size, "in_chans": in_chans, "crop_pct": crop_pct}
        config = resolve_data_config({k: v for k, v in overrides.items() if v is not None}, model=model)
        mean, std = (
            tuple(values) if len(values) == in_chans else (sum(values) / len(values),) * in_chans
            for values in (config["mean"], config["std"])
        )
        size = (in_chans, *config["input_size"][1:])
        crop = config["crop_pct"], config["crop_mode"]
        return cls(architecture, model_args, size, mean, std, config["interpolation"], *crop, classes)

    @property
    def mode(self) -> str:
        """PIL colour mode of the input."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def build(self) -> nn.Module:
        """Build the model with fresh weights."""
        return build_model(self.architecture, **self.model_args)

    def transform(self) -> Any:
        """Transform from a PIL picture to a uint8 tensor (C, H, W) of the input size, for evaluation."""
        return create_transform(
            self.input_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            use_prefetcher=True,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        values = json.loads(text)
        for name in ("input_size", "mean", "std"):
            values[name] = tuple(values[name])
        return cls(**values)


def build_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with one clear line for what cannot be built.

    Raises:
        UserError: For an unknown model, with near names, or an argument that it does not take.
    """
    if name in PRETRAINING_MODELS:
        create = PRETRAINING_MODELS[name]
        if kwargs.pop("pretrained", False):
            raise UserError(f"model: {name} has no published weights")
    elif not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name.split(".")[0]):
        raise UserError(f"model: unknown model {name!r}{suggest(name, [*timm.list_models(), *PRETRAINING_MODELS])}")
    else:
        create = partial(timm.create_model, name)
    try:
        return create(**kwargs)
    except Exception as error:  # whatever a model, the hub or the network raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model: cannot build {name}: {reason}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file or a PyTorch checkpoint, running no code from it.

    Raises:
        UserError: When the file is missing, damaged, unsafe or holds no weights.
    """
    return _state_dict(_read(path), path)


def _read(path: Path) -> Any:
    """What a weights file holds."""
    if not path.is_file():
        raise UserError(f"checkpoint: no file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # torch comments on other programs' pickles before it refuses them.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format and each kind of damage has its own
        raise UserError(
            f"checkpoint: cannot read {path}: truncated, no weights file, or it needs code to load"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file's content, averaged weights before others."""
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"checkpoint: {path} holds no state dict")
    return clean_state_dict({name: value for name, value in content.items() if isinstance(value, Tensor)})


def load_weights(model: nn.Module, path: Path, new_head: bool = False) -> list[str]:
    """Load a file's weights into a model, its own names or those of the model's official release.

    Args:
        model: Any timm model.
        path: Weights file, see `read_weights`.
        new_head: Leave the classifier as it is where its shape differs from the file's.

    Returns:
        Names of the tensors that were left as they are.

    Raises:
        UserError: When the file cannot be read or its weights are another model's.
    """
    content = _read(path)
    weights = _state_dict(content, path)
    own = model.state_dict()
    module = type(model).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if convert is not None and not own.keys() <= weights.keys():
        try:
            # This package's know in which part of a file their release has its weights.
            weights = convert(content if module.startswith("vla.") else weights, model)
        except Exception as error:  # a filter may trip over anything in a file that is not its model's
            raise UserError(f"checkpoint: {path} holds the weights of another model: {error}") from error

    left = []
    if new_head:
        head = _classifier_names(model)
        left = [n for n in own if n in head and (n not in weights or weights[n].shape != own[n].shape)]
        weights = {n: w for n, w in weights.items() if n not in left}
    missing = [n for n in own if n not in weights and n not in left]
    unexpected = [n for n in weights if n not in own]
    reshaped = [n for n in own if n in weights and weights[n].shape != own[n].shape]
    if missing or unexpected or reshaped:
        found = (
            f"{reshaped[0]} is {tuple(weights[reshaped[0]].shape)}, wanted {tuple(own[reshaped[0]].shape)}"
            if reshaped
            else f"no {missing[0]}"
            if missing
            else f"unknown {unexpected[0]}"
        )
        counts = f"{len(missing)} missing, {len(unexpected)} unknown, {len(reshaped)} of another shape"
        raise UserError(f"checkpoint: {path} holds the weights of another model: {found} ({counts})")
    model.load_state_dict(weights, strict=False)
    return left


def _classifier_names(model: nn.Module) -> set[str]:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    modules = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {f"{module}.{tail}" for module in modules for tail in ("weight", "bias")}


def save_model(path: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Write weights and specification to one `.safetensors` file, readable by `open_model` and by timm.

    Raises:
        UserError: When the file cannot be written.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One entry only: safetensors writes several in random order, and equal runs are to give equal files.
    content = safetensors.torch.save(weights, {_METADATA_KEY: spec.to_json()})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def read_spec(path: Path) -> ModelSpec | None:
    """Specification inside a `.safetensors` file; None for a file that was not written by `save_model`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: cannot read {path}: truncated or not a safetensors file") from error
    return None if text is None else ModelSpec.from_json(text)


def weights_path(name: str) -> Path:
    """File that a checkpoint's name stands for: itself, or the weights of a run folder."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return path
    file = RunFolder(path).weights_file
    if not file.exists():
        raise UserError(f"{path} holds no {file.name}: no run, or one before the end of its first epoch")
    return file


def open_model(name: str, checkpoint: str | None = None, img_size: int | None = None) -> tuple[nn.Module, ModelSpec]:
    """Open a trained model for use.

    Args:
        name: A run folder, a `model.safetensors` of one, or a model name (with its published weights).
        checkpoint: Weights for the model name instead of the published ones.
        img_size: Input size in pixels instead of the model's own.

    Returns:
        The model in evaluation mode on the CPU, and its specification.

    Raises:
        UserError: When there is no such model or its weights cannot be had.
    """
    if Path(name).expanduser().exists() and not timm.is_model(name):
        if checkpoint is not None:
            raise UserError(f"checkpoint: {name} has weights of its own; give a model's name to open others")
        path = weights_path(name)
        spec = read_spec(path)
        if spec is not None and spec.architecture in PRETRAINING_MODELS:
            raise UserError(
                f"model: {path} reconstructs and cannot classify; train a classifier with --checkpoint {name}"
            )
        if spec is None:
            raise UserError(f"model: {path} does not say which model it is; give --model NAME --checkpoint {path}")
        model = spec.build()
        load_weights(model, path)
        if img_size is not None:
            spec.input_size = (spec.input_size[0], img_size, img_size)
        return model.eval(), spec

    if checkpoint is None:
        model = build_model(name, pretrained=True, **_size_args(name, img_size))
        spec = ModelSpec.of(model, name, {"pretrained": True}, img_size)
    else:
        path = weights_path(checkpoint)
        weights = read_weights(path)
        args = _size_args(name, img_size)
        model = build_model(name, **args)
        classes = _head_size(model, weights)
        if classes is not None and classes != model.num_classes:
            args["num_classes"] = classes
            model = build_model(name, **args)
        load_weights(model, path)
        spec = ModelSpec.of(model, name, args, img_size)
    spec.classes = imagenet_classes(model.num_classes)
    return model.eval(), spec


def _size_args(name: str, img_size: int | None) -> dict[str, Any]:
    return {"img_size": img_size} if img_size is not None and has_fixed_size(name) else {}


def has_fixed_size(name: str) -> bool:
    """Whether the model must be told its input size when it is built."""
    if name in PRETRAINING_MODELS:
        return True
    config = published(name)
    return bool(config is not None and config.fixed_input_size)


def published(name: str) -> PretrainedCfg | None:
    """What timm knows of a model's published weights: those of the tag in its name, or the default ones.

    Raises:
        UserError: For a tag that the model does not have.
    """
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        base, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        raise UserError(f"model: {base} has no weights {tag!r}, only: {', '.join(tags) or 'none'}") from error


def _head_size(model: nn.Module, weights: dict[str, Tensor]) -> int | None:
    names = [n for n in _classifier_names(model) if n.endswith(".weight") and n in weights]
    return weights[names[0]].shape[0] if names else None


def imagenet_classes(num_classes: int, words: bool = True) -> list[str] | None:
    """Classes of the ImageNet set with that many of them, in words or as folder names; None where there is none."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    name = info.index_to_description if words else info.index_to_label_name
    return [name(index) for index in range(info.num_classes())]
