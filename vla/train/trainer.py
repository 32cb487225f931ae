"""The training loop. It can be stopped after any update and goes on as if nothing had happened."""

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.models import is_model
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import Normalize, Pictures, PictureStream, TrainLoader, open_pictures
from ..data.loader import keep_a_bit
from ..data.seeds import Stream, seed_all
from ..errors import UserError, require_extra, suggest
from ..models.vrwkv_mae import PRETRAINING_MODELS
from .config import TrainConfig
from .distill import Distillation, Renormalized
from .evaluate import evaluate, evaluate_reconstruction, make_eval_loader
from .run import RunFolder
from .runtime import Runtime
from .task import Classification, Reconstruction
from .weights import ModelSpec, build_model, has_fixed_size, load_weights, open_model, save_model, weights_path

# Seconds between two drawings of the curves, which take a good part of one each.
_CURVES_INTERVAL = 20.0
# Updates between two looks at the loss for infinities: looking makes a GPU wait.
_CHECK_INTERVAL = 50


class Reporter:
    """Told how a run goes. This one keeps silent."""

    def begin(self, trainer: "Trainer") -> None:
        """Everything is built, and the state of an earlier part of the run is loaded."""

    def step(self, step: int, loss: Tensor, images: int) -> None:
        """An update is done; `loss` is a scalar on the device, `images` went into the update."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done and saved."""


def train(config: TrainConfig, out: Path | str, resume: bool = False, reporter: Reporter | None = None) -> RunFolder:
    """Train a model.

    Args:
        config: What to train, on what and how.
        out: Run folder.
        resume: Go on with the run in `out`, if it has saved anything; otherwise start it.
        reporter: Told how it goes.

    Returns:
        The run folder, with weights, metrics and state of the finished run.

    Raises:
        UserError: For whatever the user can mend, a full disk included; what was saved before stays intact.
    """
    require_extra("matplotlib", "train", "vla train")
    runtime = Runtime.create(config.device, config.amp, config.channels_last)
    try:
        trainer = Trainer(config, RunFolder(out), runtime, resume)
        trainer.run(reporter if reporter is not None and runtime.is_main else Reporter())
        return trainer.folder
    finally:
        runtime.close()


class Trainer:
    """One training run: everything built from its configuration, and the state that changes.

    Args:
        config: What to train, on what and how.
        folder: Where results go.
        runtime: Device and precision.
        resume: Load the state in `folder`, if there is one.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, runtime: Runtime, resume: bool = False):
        self.config = config
        self.folder = folder
        self.runtime = runtime

        self.train_pictures, self.val_pictures = self._open_pictures()
        self.num_classes = None if config.model in PRETRAINING_MODELS else self._count_classes()
        seed_all(config.seed, Stream.INIT)
        self.model, self.spec = self._build_model()
        self.normalize = Normalize(self.spec.mean, self.spec.std).to(runtime.device)
        self.erase = RandomErasing(config.reprob, mode="pixel", device=runtime.device) if config.reprob else None
        self.mixup = self._build_mixup()
        self.task = self._build_task()
        self.train_loader = self._build_train_loader()
        self.val_loader = make_eval_loader(
            self.val_pictures, self.spec, config.batch_size, config.workers, self.runtime
        )
        self.steps_per_epoch = self.train_loader.batches // config.grad_accum
        self.total_steps = self.steps_per_epoch * config.epochs

        self.optimizer, self.scheduler = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(self.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.step = 0
        self.loss_sum = torch.zeros((), device=runtime.device)
        self.seconds = 0.0
        self.unreadable: set[str] = set()
        self.history: list[dict[str, Any]] = []

        state = folder.load_state() if resume else None
        if state is not None:
            self._load_state(state)
        elif runtime.is_main and not (resume and folder.config_file.exists()):
            folder.create(config)
        # Wrapped last: optimiser, averages and state know the bare model.
        self.forward_model = self._wrap_model()
        self._curves_drawn = -math.inf

    @property
    def kept_model(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module

    def run(self, reporter: Reporter) -> None:
        """Train to the end."""
        reporter.begin(self)
        if self.history:
            # Killed between saving the state and writing the rest, an earlier part may have left older files.
            self._publish()
        while self.step < self.total_steps:
            self._train_epoch(reporter)
            reporter.epoch(self.history[-1])

    def _train_epoch(self, reporter: Reporter) -> None:
        config = self.config
        epoch, done = divmod(self.step, self.steps_per_epoch)
        if self.mixup is not None:
            self.mixup.mixup_enabled = not config.mixup_off_epoch or epoch < config.mixup_off_epoch
        self.forward_model.train()
        batches = self.train_loader.epoch(epoch, done * config.grad_accum)
        start = time.monotonic()
        while group := list(islice(batches, config.grad_accum)):
            loss = self._update(group)
            reporter.step(self.step, loss, config.grad_accum * self.train_loader.batch_size * self.runtime.world_size)
            if self.step % _CHECK_INTERVAL == 0:
                self._check_loss()
            last = self.step % self.steps_per_epoch == 0
            if config.save_steps and not last and (self.step - epoch * self.steps_per_epoch) % config.save_steps == 0:
                self.seconds += time.monotonic() - start
                start = time.monotonic()
                self._save_state()
        self.seconds += time.monotonic() - start
        self._finish_epoch(epoch)

    def _update(self, group: list[list[Tensor]]) -> Tensor:
        config = self.config
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        total = torch.zeros((), device=self.runtime.device)
        for micro, (images, targets, broken) in enumerate(group):
            self.unreadable.update(self.train_pictures.name(int(index)) for index in broken[broken >= 0])
            classes = self.num_classes
            if classes is not None and (targets.min() < 0 or targets.max() >= classes):
                raise UserError(f"data: class index {int(targets.max())} of {classes}; --num-classes?")
            seed_all(config.seed, Stream.STEP, self.step, micro, self.runtime.rank, device=self.runtime.device)
            images, targets = self._prepare(images, targets)
            synchronise = micro == len(group) - 1
            if isinstance(self.forward_model, DistributedDataParallel):
                self.forward_model.require_backward_grad_sync = synchronise
            with self.runtime.autocast():
                loss = self.task(self.forward_model, images, targets) / len(group)
            self.scaler.scale(loss).backward()
            total += loss.detach()

        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), config.clip_grad, mode=config.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.loss_sum += total
        return total

    def _prepare(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = self.normalize(self.runtime.place_images(images))
        targets = targets.to(self.runtime.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def _finish_epoch(self, epoch: int) -> None:
        self._check_loss()
        if self.runtime.world_size > 1:
            distribute_bn(self.model, self.runtime.world_size, reduce=True)
            if self.ema is not None:
                distribute_bn(self.ema.module, self.runtime.world_size, reduce=True)
        validation, unreadable = self._validate()
        self.unreadable.update(unreadable)
        images = self.steps_per_epoch * self.config.grad_accum * self.train_loader.batch_size
        loss = self.runtime.sum(self.loss_sum.clone()).item() / self.runtime.world_size
        self.history.append(
            {
                "epoch": epoch + 1,
                "step": self.step,
                "lr": max(group["lr"] for group in self.optimizer.param_groups),
                "train_loss": loss / self.steps_per_epoch,
                **validation,
                "seconds": round(self.seconds, 3),
                "images_per_second": round(images * self.runtime.world_size / self.seconds, 1),
            }
        )
        self.loss_sum.zero_()
        self.seconds = 0.0
        self._save_state()
        self._publish()

    def _validate(self) -> tuple[dict[str, Any], list[str]]:
        """Figures of the validation, and the names of pictures that could not be read."""
        common = (self.kept_model, self.val_pictures, self.val_loader, self.normalize, self.runtime)
        if self.num_classes is None:
            loss, count, unreadable = evaluate_reconstruction(*common, self.config.seed)
            return {"val_loss": loss, "val_count": count}, unreadable
        accuracy = evaluate(*common)
        figures = {"val_loss": accuracy.loss, "val_top1": accuracy.top1, "val_top5": accuracy.top5}
        return {**figures, "val_count": accuracy.count}, accuracy.unreadable

    def _check_loss(self) -> None:
        loss = self.loss_sum.item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} before update {self.step}; a lower --lr, --clip-grad 1 or --amp none may help"
            )

    def _save_state(self) -> None:
        self._check_loss()
        self.unreadable = {name for part in self.runtime.gather(self.unreadable) for name in part}
        if not self.runtime.is_main:
            return
        self.folder.save_state(
            {
                "data": self._data_fingerprint(),
                "processes": self.runtime.world_size,
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "loss_sum": self.loss_sum,
                "seconds": self.seconds,
                "unreadable": sorted(self.unreadable),
                "history": self.history,
            }
        )

    def _load_state(self, state: dict[str, Any]) -> None:
        if state["data"] != self._data_fingerprint():
            raise UserError(f"resume: the pictures of {self.config.data} are not those that the run began with")
        processes = state.get("processes", self.runtime.world_size)
        if processes != self.runtime.world_size:
            # Steps are counted in batches of all processes.
            raise UserError(f"resume: the run began with {processes} processes, not {self.runtime.world_size}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss_sum.copy_(state["loss_sum"])
        self.seconds = state["seconds"]
        self.unreadable = set(state["unreadable"])
        self.history = state["history"]

    def _data_fingerprint(self) -> dict[str, Any]:
        return {
            "train": len(self.train_pictures),
            "validation": len(self.val_pictures),
            "classes": self.train_pictures.classes,
        }

    def _publish(self) -> None:
        if not self.runtime.is_main:
            return
        now = time.monotonic()
        draw = self.step == self.total_steps or now - self._curves_drawn > _CURVES_INTERVAL
        self.folder.save_metrics(self.history, curves=draw)
        if draw:
            self._curves_drawn = now
        save_model(self.folder.weights_file, self.kept_model, self.spec)

    def _open_pictures(self) -> tuple[Pictures | PictureStream, Pictures | PictureStream]:
        config = self.config
        common = {
            "root": config.data_root,
            "holdout": config.holdout,
            "mode": "L" if config.in_chans == 1 else "RGB",
            "download": config.download,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "options": config.data_kwargs,
        }
        train_pictures = open_pictures(config.data, "train", split_name=config.train_split, **common)
        return train_pictures, open_pictures(config.data, "validation", split_name=config.val_split, **common)

    def _count_classes(self) -> int:
        classes, given = self.train_pictures.classes, self.config.num_classes
        if classes is None and given is None:
            raise UserError(f"num_classes: {self.config.data} does not say how many classes it has; give --num-classes")
        if classes is not None and given is not None and given < len(classes):
            raise UserError(f"num_classes: wanted at least the {len(classes)} of {self.config.data}, got {given}")
        count = given or len(classes)
        if count < 2:
            raise UserError(f"data: {self.config.data} has one class only; wanted two or more")
        return count

    def _build_model(self) -> tuple[nn.Module, ModelSpec]:
        config = self.config
        args = dict(config.model_kwargs)
        if self.num_classes is not None:
            args = {"num_classes": self.num_classes, **args}
        optional = {"drop_path_rate": config.drop_path, "drop_rate": config.drop}
        if config.in_chans != 3:
            optional["in_chans"] = config.in_chans
        if config.img_size is not None and has_fixed_size(config.model):
            optional["img_size"] = config.img_size
        args |= {name: value for name, value in optional.items() if value is not None}
        model = build_model(config.model, pretrained=config.pretrained, **args)
        if config.checkpoint is not None:
            load_weights(model, weights_path(config.checkpoint), new_head=True)
        if config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()
            except (AssertionError, AttributeError) as error:
                raise UserError(f"grad_checkpointing: {config.model} does not offer it") from error
        spec = ModelSpec.of(model, config.model, args, config.img_size, config.crop_pct, self.train_pictures.classes)
        return self.runtime.place(model), spec

    def _build_task(self) -> nn.Module:
        config = self.config
        if self.num_classes is None:
            if config.teacher is not None:
                raise UserError(f"teacher: {config.model} is a masked autoencoder, which learns from no classifier")
            return Reconstruction()
        if config.teacher is None:
            return Classification(config.smoothing)
        teacher, spec = open_model(config.teacher, img_size=self.spec.input_size[-1])
        if teacher.num_classes != self.num_classes:
            raise UserError(
                f"teacher: {config.teacher} has {teacher.num_classes} classes, wanted the {self.num_classes} of "
                f"{config.data}"
            )
        # Names of ImageNet's classes, which timm's models have, differ from one data set to another.
        is_trained_here = not is_model(config.teacher)
        if is_trained_here and None not in (spec.classes, self.spec.classes) and spec.classes != self.spec.classes:
            raise UserError(f"teacher: {config.teacher} has other classes than {config.data}, or in another order")
        given, own = ([*map(tuple, (s.mean, s.std))] for s in (self.spec, spec))
        if given != own:
            teacher = Renormalized(teacher, *own, *given)
        teacher = self.runtime.place(teacher)
        return Distillation(teacher, config.distill, config.distill_alpha, config.distill_tau, config.smoothing)

    def _build_mixup(self) -> Mixup | None:
        config = self.config
        if not (config.mixup or config.cutmix):
            return None
        if self.num_classes is None:
            raise UserError(f"mixup: {config.model} is a masked autoencoder, which has no labels to mix")
        return Mixup(
            config.mixup,
            config.cutmix,
            prob=config.mixup_prob,
            label_smoothing=config.smoothing,
            num_classes=self.num_classes,
        )

    def _build_train_loader(self) -> TrainLoader:
        config = self.config
        try:
            transform = create_transform(
                self.spec.input_size,
                is_training=True,
                no_aug=not config.augment,
                scale=config.scale,
                ratio=config.ratio,
                hflip=config.hflip,
                vflip=config.vflip,
                color_jitter=config.color_jitter or None,
                auto_augment=config.auto_augment,
                interpolation="random",
                mean=self.spec.mean,
                use_prefetcher=True,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:  # by what is wrong with the policy's name
            raise UserError(f"auto_augment: timm has no policy {config.auto_augment!r}") from error
        return TrainLoader(
            self.train_pictures,
            keep_a_bit(transform),
            config.batch_size,
            group=config.grad_accum,
            even=self.mixup is not None,
            seed=config.seed,
            workers=config.workers,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
        )

    def _build_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        config = self.config
        if config.opt.lower() not in (known := list_optimizers()):
            raise UserError(f"opt: unknown optimiser {config.opt!r}{suggest(config.opt, known)}")
        try:
            optimizer = create_optimizer_v2(
                self.model,
                opt=config.opt,
                lr=config.lr,
                weight_decay=config.weight_decay,
                layer_decay=config.layer_decay,
                **config.opt_kwargs,
            )
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"opt: cannot build {config.opt}: {error or 'the model has no layer groups'}") from error
        constant = config.sched == "constant"
        scheduler, _ = create_scheduler_v2(
            optimizer,
            # timm's constant schedule is newer than its steps, which are the same when nothing drops.
            sched="step" if constant else config.sched,
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs,
            decay_rate=1.0 if constant else config.decay_rate,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=min(config.warmup_lr, config.lr),
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        return optimizer, scheduler

    def _wrap_model(self) -> nn.Module:
        model = torch.compile(self.model) if self.config.compile else self.model
        if self.runtime.world_size == 1:
            return model
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)
