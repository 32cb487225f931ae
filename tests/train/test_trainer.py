"""Training does what its options say."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from vla.data import Normalize, open_pictures
from vla.data.loader import keep_a_bit
from vla.errors import UserError
from vla.train import Reporter, RunFolder, TrainConfig, open_model, train
from vla.train.evaluate import evaluate, make_eval_loader
from vla.train.runtime import Runtime
from vla.train.task import Classification
from vla.train.trainer import Trainer

SMALL = {"model": "test_resnet", "img_size": 32, "crop_pct": 1.0, "batch_size": 6, "epochs": 2, "device": "cpu"}


def config_for(folder, **options):
    return TrainConfig.create(SMALL | {"data": str(folder)} | options)


def make_trainer(folder, tmp_path, **options):
    return Trainer(config_for(folder, **options), RunFolder(tmp_path / "run"), Runtime.create("cpu"))


def test_learns_and_leaves_a_whole_run(folder, tmp_path):
    run = train(config_for(folder, epochs=6, lr=3e-3, scale=(0.5, 1.0), color_jitter=0.0), tmp_path / "run")
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["step"] == 36 and rows[-1]["val_count"] == 12
    assert rows[-1]["val_top1"] == 100.0 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert run.curves_file.read_bytes().startswith(b"\x89PNG")
    assert run.load_config() == config_for(folder, epochs=6, lr=3e-3, scale=(0.5, 1.0), color_jitter=0.0)
    assert {path.name for path in run.path.iterdir()} == {
        "config.yaml", "curves.png", "metrics.jsonl", "model.safetensors", "state.pt",
    }  # fmt: skip

    # The saved model, opened alone, is as accurate as the run says.
    model, spec = open_model(str(run.path))
    assert spec.classes == ["blue", "green", "red"] and spec.input_size == (3, 32, 32)
    runtime = Runtime.create("cpu")
    pictures = open_pictures(str(folder), "validation")
    loader = make_eval_loader(pictures, spec, 5, 0, runtime)
    accuracy = evaluate(model, pictures, loader, Normalize(spec.mean, spec.std), runtime)
    assert (accuracy.top1, accuracy.count) == (rows[-1]["val_top1"], 12)
    assert accuracy.loss == pytest.approx(rows[-1]["val_loss"], rel=1e-5)


def test_workers_do_not_change_the_weights(folder, tmp_path):
    runs = [train(config_for(folder, epochs=1, workers=n, mixup=0.2), tmp_path / str(n)) for n in (0, 2)]
    assert runs[0].weights_file.read_bytes() == runs[1].weights_file.read_bytes()


def test_gradient_accumulation_is_a_larger_batch(folder, tmp_path):
    """Without batch statistics and random layers, 3 x 4 pictures and 12 pictures are the same update."""
    options = {"model": "test_vit", "opt": "momentum", "opt_kwargs": {"momentum": 0.0}, "lr": 0.1, "epochs": 1}
    options |= {"augment": False, "sched": "constant", "warmup_epochs": 0.0}
    whole = make_trainer(folder, tmp_path, batch_size=12, **options)
    parts = make_trainer(folder, tmp_path / "parts", batch_size=4, grad_accum=3, **options)
    assert whole.steps_per_epoch == parts.steps_per_epoch == 3
    before = [p.clone() for p in whole.model.parameters()]
    for trainer in (whole, parts):
        trainer.run(Reporter())
    moved = [not torch.equal(p, old) for p, old in zip(whole.model.parameters(), before, strict=True)]
    assert all(moved)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_learning_rate_warms_up_and_decays_by_update(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, epochs=4, warmup_epochs=1.0, lr=0.01, min_lr=0.001)
    rates = []

    class Watch(Reporter):
        def step(self, step, loss, images):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.run(Watch())
    assert len(rates) == 24
    assert rates[:6] == sorted(rates[:6]) and rates[0] == pytest.approx(1e-6)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[6] == pytest.approx(0.001 + 0.009 * (1 + math.cos(math.pi * 6 / 24)) / 2)
    assert rates[-1] == pytest.approx(0.001 + 0.009 * (1 + math.cos(math.pi * 23 / 24)) / 2)


def test_constant_schedule_keeps_layer_decay(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, sched="constant", warmup_epochs=0.0, layer_decay=0.5, lr=0.01)
    trainer.scheduler.step_update(7)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) == pytest.approx(0.01) and len(rates) > 2


def test_averaged_weights_are_what_is_kept(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, ema=0.9)
    trainer.run(Reporter())
    kept, _ = open_model(str(tmp_path / "run"))
    for name, value in kept.state_dict().items():
        assert torch.equal(value, trainer.ema.module.state_dict()[name])
    assert any(not torch.equal(p, q) for p, q in zip(kept.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("amp", ["bf16"])
@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0, "channels_last": True, "in_chans": 1, "reprob": 0.5}])
def test_runs_in_mixed_precision(folder, tmp_path, amp, options):
    run = train(config_for(folder, amp=amp, epochs=1, **options), tmp_path / "run")
    assert math.isfinite(json.loads(run.metrics_file.read_text())["val_loss"])


def test_grey_pictures(folder, tmp_path):
    run = train(config_for(folder, in_chans=1, epochs=1), tmp_path / "run")
    model, spec = open_model(str(run.path))
    assert spec.mode == "L" and len(spec.mean) == len(spec.std) == 1
    assert model(torch.zeros(1, *spec.input_size)).shape == (1, 3)


def test_fine_tuning_keeps_all_but_the_head(folder, tmp_path):
    first = train(config_for(folder, epochs=1), tmp_path / "first")
    trainer = make_trainer(folder, tmp_path, checkpoint=str(first.path), num_classes=5)
    source = open_model(str(first.path))[0].state_dict()
    own = trainer.model.state_dict()
    assert {name for name in own if not torch.equal(own[name], source[name])} == {"fc.weight", "fc.bias"}
    assert own["fc.weight"].shape[0] == 5


def test_unreadable_pictures_are_named(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    for name in ("train/red/3.png", "val/blue/1.png"):
        (data / name).write_bytes(b"\x89PNG broken")
    trainer = make_trainer(data, tmp_path, epochs=1, workers=2)
    trainer.run(Reporter())
    assert trainer.unreadable == {str(data / "train/red/3.png"), str(data / "val/blue/1.png")}
    assert trainer.history[-1]["val_count"] == 11


def test_heads_share_the_loss():
    class TwoHeads(nn.Module):
        def forward(self, x):
            return (x, 3 * x) if self.training else x

    logits, targets = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    loss = Classification(0.1)(TwoHeads().train(), logits, targets)
    single = [nn.functional.cross_entropy(k * logits, targets, label_smoothing=0.1) for k in (1, 3)]
    torch.testing.assert_close(loss, (single[0] + single[1]) / 2)
    soft = nn.functional.one_hot(targets, 5).float()
    torch.testing.assert_close(
        Classification(0.1)(nn.Identity(), logits, soft), nn.functional.cross_entropy(logits, targets)
    )


def test_top_five_and_loss_are_the_definitions():
    class Table(nn.Module):
        def forward(self, x):
            return scores[: len(x)]

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(360, 10, generator=generator)
    pictures = open_pictures("digits", "validation")
    runtime = Runtime.create("cpu")
    batch = torch.zeros(360, 3, 4, 4, dtype=torch.uint8)
    labels = torch.tensor([pictures[i][1] for i in range(360)])
    loader = [(batch, labels, torch.full((360,), -1))]
    accuracy = evaluate(Table(), pictures, loader, Normalize((0.5,) * 3, (0.5,) * 3), runtime)
    ranks = (scores > scores[torch.arange(360), labels][:, None]).sum(1)
    assert accuracy.top1 == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert accuracy.top5 == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert accuracy.loss == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"opt": "adamv"}, "opt: unknown optimiser 'adamv'; did you mean"),
        ({"opt_kwargs": {"nonsense": 1}}, "opt: cannot build adamw: .*nonsense"),
        ({"num_classes": 2}, "num_classes: wanted at least the 3 of"),
        ({"device": "nonsense"}, "device: cannot use 'nonsense'"),
        ({"device": "cpu", "amp": "fp16"}, "amp: fp16 needs a GPU"),
        ({"checkpoint": "missing.pth"}, "checkpoint: no file missing.pth"),
        ({"model": "test_resnets"}, "unknown model 'test_resnets'; did you mean test_resnet"),
        ({"model": "test_resnet.nonsense"}, "test_resnet has no weights 'nonsense', only: r160_in1k"),
        ({"auto_augment": "nonsense"}, "auto_augment: timm has no policy 'nonsense'"),
    ],
)
def test_mistakes_leave_no_folder(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        train(config_for(folder, **options), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_before_it_saves(folder, tmp_path):
    with pytest.raises(UserError, match="the loss became (nan|inf)"):
        train(config_for(folder, lr=1e30, opt="sgd", warmup_epochs=0.0, sched="constant"), tmp_path / "run")
    assert not (tmp_path / "run/state.pt").exists()


def test_an_existing_run_is_not_overwritten(folder, tmp_path):
    train(config_for(folder, epochs=1), tmp_path / "run")
    before = (tmp_path / "run/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds a run; go on with --resume"):
        train(config_for(folder, epochs=1, seed=1), tmp_path / "run")
    assert (tmp_path / "run/model.safetensors").read_bytes() == before


def test_teacher_gets_pictures_as_it_was_trained(folder, tmp_path):
    teacher = train(config_for(folder, epochs=1), tmp_path / "teacher")
    student = dict(model="test_vit", img_size=160, teacher=str(teacher.path))
    task = make_trainer(folder, tmp_path, **student).task
    network, spec = open_model(str(teacher.path))
    images = torch.rand(2, 3, 160, 160)
    expected = network(Normalize(spec.mean, spec.std)(255 * images))
    given = Normalize((0.5,) * 3, (0.5,) * 3)(255 * images)
    torch.testing.assert_close(task.teacher(given), expected, rtol=1e-4, atol=1e-4)


def test_teacher_of_other_classes(folder, tmp_path):
    teacher = train(config_for(folder, epochs=1), tmp_path / "teacher")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    first = min(p for p in other.rglob("*") if p.is_dir() and not any(q.is_dir() for q in p.iterdir()))
    for path in other.rglob(first.name):
        path.rename(path.with_name("zebra"))
    with pytest.raises(UserError, match="has other classes than"):
        make_trainer(other, tmp_path, teacher=str(teacher.path))


def test_posterize_keeps_a_bit():
    """Whatever Pillow makes of none."""
    transform = create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", use_prefetcher=True)
    policy = next(step for step in keep_a_bit(transform).transforms if hasattr(step, "ops"))
    ops = [op for op in policy.ops if "Posterize" in op.name]
    picture = Image.new("RGB", (4, 4), (200, 100, 50))
    assert ops and all(op.aug_fn(picture, 0).getpixel((0, 0)) == (128, 0, 0) for op in ops)
