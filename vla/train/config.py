"""The configuration of a training run: one dataclass, from which the command line's options are made."""

import ast
import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import UserError, suggest


def _option(default: Any, panel: str, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"panel": panel, "help": help})
    return field(default=default, metadata={"panel": panel, "help": help})


@dataclass
class TrainConfig:
    """Everything that determines a training run. Option `--batch-size` is field `batch_size`, and so on."""

    model: str = _option("", "Model", "Model name, see `vla models`; any timm model works.")
    pretrained: bool = _option(False, "Model", "Start from the model's published weights.")
    checkpoint: str | None = _option(
        None, "Model", "Start from these weights: a run folder, .safetensors or .pth; a head of another size is new."
    )
    num_classes: int | None = _option(None, "Model", "Number of classes, where the data set does not say.")
    img_size: int | None = _option(None, "Model", "Input size in pixels; the model's own by default.")
    in_chans: Literal[1, 3] = _option(3, "Model", "Input channels: 3 for colour, 1 for grey.")
    drop_path: float | None = _option(None, "Model", "Stochastic depth rate.")
    drop: float | None = _option(None, "Model", "Dropout rate of the head.")
    model_kwargs: dict[str, Any] = _option({}, "Model", "Further model argument key=value; repeatable.")

    data: str = _option("", "Data", "`digits`, a picture folder, or timm's torch/…, hfds/…, hfids/…, wds/…, tfds/….")
    data_root: str | None = _option(None, "Data", "Where a set that timm reads lies.")
    download: bool = _option(False, "Data", "Download the set, where timm can.")
    train_split: str | None = _option(None, "Data", "Name of the training split, where it is not the usual one.")
    val_split: str | None = _option(None, "Data", "Name of the validation split, where it is not the usual one.")
    holdout: float = _option(0.1, "Data", "Part to validate on, where a folder has no split of its own.")
    data_kwargs: dict[str, Any] = _option({}, "Data", "Further create_dataset argument key=value; repeatable.")
    crop_pct: float | None = _option(None, "Data", "Centre crop in validation; the model's own by default.")
    workers: int = _option(0, "Data", "Loader processes; the result does not depend on it.")

    epochs: int = _option(100, "Optimisation", "Passes over the data.")
    batch_size: int = _option(128, "Optimisation", "Pictures per device and backward pass.")
    grad_accum: int = _option(1, "Optimisation", "Backward passes per update.")
    opt: str = _option("adamw", "Optimisation", "Optimiser, any of timm's.")
    lr: float = _option(1e-3, "Optimisation", "Peak learning rate, not scaled by the batch size.")
    weight_decay: float = _option(0.05, "Optimisation", "Weight decay.")
    layer_decay: float | None = _option(None, "Optimisation", "Learning rate factor from each layer to the one below.")
    opt_kwargs: dict[str, Any] = _option({}, "Optimisation", "Further optimiser argument key=value; repeatable.")
    sched: Literal["cosine", "poly", "step", "constant"] = _option("cosine", "Optimisation", "Schedule.")
    warmup_epochs: float | None = _option(
        None, "Optimisation", "Epochs of linear warm-up; a twentieth of all by default."
    )
    warmup_lr: float = _option(1e-6, "Optimisation", "Learning rate at the start of the warm-up.")
    min_lr: float = _option(1e-6, "Optimisation", "Learning rate at the end.")
    decay_epochs: float = _option(30.0, "Optimisation", "Epochs between the drops of the schedule step.")
    decay_rate: float = _option(0.1, "Optimisation", "Factor of each drop (step), or the power (poly).")
    clip_grad: float | None = _option(None, "Optimisation", "Limit of the gradient, see --clip-mode.")
    clip_mode: Literal["norm", "value", "agc"] = _option("norm", "Optimisation", "What --clip-grad limits.")
    ema: float | None = _option(None, "Optimisation", "Decay of the averaged weights, which are then what is kept.")

    augment: bool = _option(True, "Augmentation", "Random augmentation; without, only resize and crop.")
    scale: tuple[float, float] = _option((0.08, 1.0), "Augmentation", "Range of the random crop's area.")
    ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "Augmentation", "Range of the random crop's aspect ratio.")
    hflip: float = _option(0.5, "Augmentation", "Probability of a horizontal flip.")
    vflip: float = _option(0.0, "Augmentation", "Probability of a vertical flip.")
    color_jitter: float = _option(0.4, "Augmentation", "Strength of colour jitter, unused with --auto-augment.")
    auto_augment: str | None = _option(None, "Augmentation", "timm policy such as rand-m9-mstd0.5-inc1.")
    reprob: float = _option(0.0, "Augmentation", "Probability of random erasing.")
    mixup: float = _option(0.0, "Augmentation", "Mixup alpha.")
    cutmix: float = _option(0.0, "Augmentation", "CutMix alpha.")
    mixup_prob: float = _option(1.0, "Augmentation", "Probability of mixup or CutMix per batch.")
    mixup_off_epoch: int = _option(0, "Augmentation", "Epoch from which both are off; 0 is never.")
    smoothing: float = _option(0.1, "Augmentation", "Label smoothing.")

    teacher: str | None = _option(
        None, "Distillation", "Learn from this classifier too: a model name with published weights, or a run folder."
    )
    distill: Literal["hard", "soft"] = _option(
        "hard", "Distillation", "From the teacher's most probable class, or from its probabilities."
    )
    distill_alpha: float = _option(0.5, "Distillation", "Weight of the teacher against the labels.")
    distill_tau: float = _option(1.0, "Distillation", "Temperature of soft distillation.")

    device: str | None = _option(None, "Execution", "cpu, cuda, mps, …; the best that there is by default.")
    amp: Literal["none", "bf16", "fp16"] = _option("none", "Execution", "Mixed precision.")
    channels_last: bool = _option(False, "Execution", "Channels-last memory layout.")
    grad_checkpointing: bool = _option(False, "Execution", "Recompute activations to save memory.")
    compile: bool = _option(False, "Execution", "Compile the model with torch.compile.")
    seed: int = _option(0, "Execution", "Seed of everything random.")
    save_steps: int = _option(1000, "Execution", "Updates between saves within an epoch; every epoch ends with one.")

    @classmethod
    def create(cls, *layers: dict[str, Any]) -> "TrainConfig":
        """Make a configuration from the data set's own recipe, overridden by each of `layers` in turn.

        Raises:
            UserError: For an unknown key or a wrong value.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            given |= layer
        return cls(**_parse_fields(RECIPES.get(given.get("data"), {}) | given))

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Read a configuration back exactly as it was saved."""
        return cls(**_parse_fields(read_options(path)))

    def __post_init__(self):
        for name in ("model", "data"):
            if not getattr(self, name):
                raise UserError(f"{name}: missing, give --{name}")
        for name in ("epochs", "batch_size", "grad_accum", "img_size", "num_classes"):
            self._check(name, lambda x: x >= 1, "at least 1")
        for name in ("lr", "crop_pct", "clip_grad", "layer_decay", "distill_tau", "decay_epochs", "decay_rate"):
            self._check(name, lambda x: x > 0, "more than 0")
        for name in ("weight_decay", "warmup_epochs", "min_lr", "warmup_lr", "mixup", "cutmix", "workers", "seed"):
            self._check(name, lambda x: x >= 0, "at least 0")
        for name in ("save_steps", "mixup_off_epoch", "color_jitter"):
            self._check(name, lambda x: x >= 0, "at least 0")
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "distill_alpha"):
            self._check(name, lambda x: 0 <= x <= 1, "between 0 and 1")
        for name in ("ema", "smoothing", "drop", "drop_path"):
            self._check(name, lambda x: 0 <= x < 1, "at least 0 and less than 1")
        self._check("holdout", lambda x: 0 < x < 1, "more than 0 and less than 1")
        for name in ("scale", "ratio"):
            self._check(name, lambda x: 0 < x[0] <= x[1], "two numbers, low and high")
        if self.warmup_epochs is None:
            self.warmup_epochs = self.epochs / 20
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"warmup_epochs: wanted less than the {self.epochs} epochs, got {self.warmup_epochs:g}")

    def _check(self, name: str, valid: typing.Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not valid(value):
            raise UserError(f"{name}: wanted {wanted}, got {value}")

    def to_yaml(self) -> str:
        """The configuration as a file that `load` and `--config` read."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


# What suits a built-in data set; a configuration file and options come on top.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "img_size": 32,
        "crop_pct": 1.0,
        "epochs": 30,
        "batch_size": 64,
        "scale": (0.6, 1.0),
        "hflip": 0.0,
        "color_jitter": 0.0,
    },
}


def read_options(path: Path) -> dict[str, Any]:
    """Read a configuration file (YAML, and so JSON) without filling in defaults.

    Raises:
        UserError: When the file cannot be read or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {path} holds no `key: value` lines")
    return content


def parse_pairs(name: str, pairs: list[str]) -> dict[str, Any]:
    """Turn `['a=1', 'b=text']` into `{'a': 1, 'b': 'text'}`; values are Python literals, or else text."""
    parsed = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"{name}: wanted key=value, got {pair!r}")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = text
    return parsed


def _parse_fields(given: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(TrainConfig)
    known = {f.name for f in fields(TrainConfig)}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"config: unknown key {unknown[0]!r}{suggest(str(unknown[0]), known)}")
    return {name: _parse(name, value, hints[name]) for name, value in given.items()}


def _parse(name: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _parse(name, value, args[0])
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name}: wanted one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise UserError(f"{name}: wanted {len(args)} numbers, got {value!r}")
        return tuple(_parse(name, item, arg) for item, arg in zip(value, args, strict=True))
    kind = origin or hint
    # YAML reads 1e-3 as text: it wants 1.0e-3, which nobody writes.
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = {float: "a number", int: "a whole number", str: "text", bool: "true or false", dict: "key: value lines"}
    raise UserError(f"{name}: wanted {wanted[kind]}, got {value!r}")


def changed_fields(old: TrainConfig, given: dict[str, Any]) -> list[str]:
    """Names of the options in `given` that differ from `old`."""
    parsed = _parse_fields(given)
    return [f.name for f in dataclasses.fields(old) if f.name in parsed and parsed[f.name] != getattr(old, f.name)]
