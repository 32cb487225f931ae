"""Learning from a teacher, and masked-autoencoder pre-training, by the same loop as everything else."""

import json

import pytest
import torch

from vla.errors import UserError
from vla.train import RunFolder, TrainConfig, open_model, train
from vla.train.distill import Distillation
from vla.train.runtime import Runtime
from vla.train.trainer import Trainer
from vla.train.weights import load_weights, read_weights

SMALL = {"img_size": 32, "crop_pct": 1.0, "batch_size": 6, "epochs": 1, "device": "cpu"}


def config_for(folder, model, **options):
    return TrainConfig.create(SMALL | {"model": model, "data": str(folder)} | options)


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "run"
    train(config_for(folder, "test_resnet", epochs=4, lr=3e-3), path)
    return path


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_learns_from_a_teacher(kind, folder, teacher, tmp_path):
    options = {"distill": kind, "distill_alpha": 0.9, "model_kwargs": {"distilled": True}}
    config = config_for(folder, "groupmamba_atto", teacher=str(teacher), **options)
    trainer = Trainer(config, RunFolder(tmp_path / "run"), Runtime.create("cpu"))
    assert isinstance(trainer.task, Distillation) and trainer.task.kind == kind
    # Behind its own normalisation, which is not the student's.
    before = {name: p.clone() for name, p in trainer.task.teacher.model.named_parameters()}
    expected, _ = open_model(str(teacher))
    assert all(torch.equal(before[name], p) for name, p in expected.named_parameters())

    images = torch.randn(4, 3, 32, 32)
    loss = trainer.task(trainer.model.train(), images, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert trainer.model.head_dist.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in trainer.task.teacher.parameters())


def test_teacher_changes_the_result(folder, teacher, tmp_path):
    weights = {}
    for name, options in {"alone": {}, "taught": {"teacher": str(teacher)}}.items():
        run = train(config_for(folder, "groupmamba_atto", **options), tmp_path / name)
        weights[name] = read_weights(run.weights_file)
        assert not any("teacher" in key for key in weights[name])
    assert any(not torch.equal(weights["alone"][key], weights["taught"][key]) for key in weights["alone"])


def test_teacher_for_other_classes(folder, teacher, tmp_path):
    with pytest.raises(UserError, match="teacher: .* has 3 classes, wanted the 5 of"):
        train(config_for(folder, "groupmamba_atto", teacher=str(teacher), num_classes=5), tmp_path / "run")


def test_pretraining_and_what_follows(folder, tmp_path):
    run = train(config_for(folder, "mae_vrwkv_atto", epochs=3, lr=3e-3), tmp_path / "mae")
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] and rows[-1]["val_count"] == 12
    assert "val_top1" not in rows[-1]
    assert run.curves_file.read_bytes().startswith(b"\x89PNG")

    config = config_for(folder, "vrwkv_atto", checkpoint=str(run.path), model_kwargs={"img_size": 32})
    model = Trainer(config, RunFolder(tmp_path / "fine"), Runtime.create("cpu")).model
    pretrained = read_weights(run.weights_file)
    assert torch.equal(model.blocks[0].mixer.key.weight, pretrained["blocks.0.mixer.key.weight"])
    assert torch.equal(model.pos_embed, 2 * pretrained["pos_embed"])
    train(config, tmp_path / "classifier")


def test_validation_of_pretraining_repeats(folder, tmp_path):
    trainer = Trainer(config_for(folder, "mae_vrwkv_atto"), RunFolder(tmp_path / "run"), Runtime.create("cpu"))
    assert trainer._validate() == trainer._validate()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixup": 0.2}, "mixup: mae_vrwkv_atto is a masked autoencoder"),
        ({"teacher": "test_resnet"}, "teacher: mae_vrwkv_atto is a masked autoencoder"),
        ({"pretrained": True}, "model: mae_vrwkv_atto has no published weights"),
        ({"model_kwargs": {"mask_ratio": 1.0}}, "model: cannot build mae_vrwkv_atto: VRWKVMAE: mask_ratio is 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_pretraining_refuses(options, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        train(config_for(folder, "mae_vrwkv_atto", **options), tmp_path / "run")


def test_a_pretrained_encoder_is_no_classifier(folder, tmp_path):
    run = train(config_for(folder, "mae_vrwkv_atto"), tmp_path / "mae")
    with pytest.raises(UserError, match="reconstructs and cannot classify; train a classifier with --checkpoint"):
        open_model(str(run.path))
    model, _ = open_model(str(train(config_for(folder, "vrwkv_atto"), tmp_path / "classifier").path))
    with pytest.raises(UserError, match="holds the weights of another model"):
        load_weights(model, run.weights_file)
