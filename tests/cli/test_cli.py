"""The command line on real input, good and bad; a mistake is one line on the error stream and a failing exit code."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from vla.cli import app
from vla.cli.evaluate import _match_classes
from vla.data import open_pictures
from vla.train import RunFolder, TrainConfig, open_model

DIGIT = Path(__file__).parents[2] / "examples" / "digit.png"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def complaint(*arguments):
    """The one line that a mistake gives."""
    result = run(*arguments, code=1)
    assert result.stderr.startswith("vla: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits that is just long enough to be used."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--model", "vmamba_atto", "--data", "digits", "--epochs", 3, "--lr", 3e-3, "--device", "cpu"]
    return path, run("train", *options, "--out", path)


@pytest.fixture
def pictures(tmp_path):
    path = tmp_path / "pictures"
    for split, count in (("train", 6), ("val", 2)):
        for level, name in enumerate(("dark", "light")):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (200 * level,) * 3).save(path / split / name / f"{i}.png")
    return path


def small(pictures, tmp_path, *more):
    options = ["--model", "test_vit", "--data", pictures, "--img-size", 32, "--epochs", 1, "--batch-size", 4]
    return ["train", *options, "--device", "cpu", "--out", tmp_path / "run", *more]


def test_help_shows_every_command_and_option():
    assert re.search(r"train.*eval.*predict.*models.*info", run("--help").stdout, re.DOTALL)
    text = run("train", "--help").stdout
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    for command in ("train", "eval", "predict", "models", "info"):
        assert "Examples:" in run(command, "--help").stdout


def test_version():
    text = run("--version").stdout
    assert f"torch {torch.__version__}" in text and re.search(r"^vision-linear-attention \d", text, re.MULTILINE)


def test_train_reports_what_it_did(trained):
    path, result = trained
    row = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{row['val_top1']:.2f} %" in result.stdout and "360 pictures" in result.stdout
    assert result.stderr.count("epoch   ") == 3
    assert row["val_top1"] > 80


def test_eval_agrees_with_training(trained, tmp_path):
    path, _ = trained
    row = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    for model in (path, path / "model.safetensors"):
        result = run("eval", "--model", model, "--out", tmp_path / "result.json", "--batch-size", 50, "--device", "cpu")
        measured = json.loads((tmp_path / "result.json").read_text())
        assert measured["top1"] == row["val_top1"] and measured["count"] == 360
        assert measured["loss"] == pytest.approx(row["val_loss"], rel=1e-4)
        assert f"{row['val_top1']:.2f} %" in result.stdout


def test_eval_numbers_classes_by_name(pictures, tmp_path):
    """A set that lacks classes of the model is judged by their names, not by their order."""
    run(*small(pictures, tmp_path, "--epochs", 20, "--lr", 3e-3, "--no-augment"))
    (tmp_path / "part").mkdir()
    shutil.copytree(pictures / "val/light", tmp_path / "part/val/light")
    for data, count in ((pictures, 4), (tmp_path / "part", 2)):
        run("eval", "--model", tmp_path / "run", "--data", data, "--out", tmp_path / "result.json", "--device", "cpu")
        measured = json.loads((tmp_path / "result.json").read_text())
        assert (measured["top1"], measured["count"]) == (100.0, count)
    (tmp_path / "part/val/light").rename(tmp_path / "part/val/bright")
    told = complaint("eval", "--model", tmp_path / "run", "--data", tmp_path / "part", "--device", "cpu")
    assert "has classes that the model has not: bright" in told


def test_imagenet_folders_are_numbered_by_their_names(tmp_path):
    for name in ("n01440764", "n15075141"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "val" / name / "0.png")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "c.pth")
    options = ["--checkpoint", tmp_path / "c.pth", "--data", tmp_path, "--out", tmp_path / "result.json"]
    run("eval", "--model", "test_vit", *options, "--device", "cpu")
    assert json.loads((tmp_path / "result.json").read_text())["count"] == 2
    spec = open_model("test_vit", str(tmp_path / "c.pth"))[1]
    matched = _match_classes(open_pictures(str(tmp_path), "validation"), spec, "")
    assert [matched[i][1] for i in range(2)] == [0, 999]


def test_predict_names_the_digit(trained, tmp_path):
    path, _ = trained
    result = run("predict", DIGIT, "--model", path, "--topk", 3, "--out", tmp_path / "annotated.png", "--device", "cpu")
    percents = [float(p) for p in re.findall(r"([\d.]+) %", result.stdout)]
    assert len(percents) == 3 and percents == sorted(percents, reverse=True)
    assert re.search(r"│ 7 ", result.stdout)
    with Image.open(tmp_path / "annotated.png") as annotated:
        assert annotated.width > annotated.height == 320


def test_predict_several_goes_on_after_a_broken_one(trained, tmp_path):
    path, _ = trained
    (tmp_path / "broken.png").write_bytes(DIGIT.read_bytes()[:100])
    shutil.copy(DIGIT, tmp_path / "other.png")
    names = [tmp_path / "broken.png", tmp_path / "missing.png", DIGIT, tmp_path / "other.png"]
    result = run("predict", *names, "--model", path, "--out", tmp_path / "out", "--device", "cpu", code=1)
    assert result.stderr.splitlines() == [
        f"vla: {tmp_path}/broken.png: cannot be read as a picture",
        f"vla: {tmp_path}/missing.png: no such file",
    ]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"digit.png", "other.png"}


def test_resume_of_a_finished_run_trains_nothing(trained):
    path, _ = trained
    before = (path / "model.safetensors").read_bytes()
    result = run("train", "--model", "vmamba_atto", "--data", "digits", "--epochs", 3, "--out", path, "--resume")
    assert "epoch   " not in result.stderr and "validation top-1" in result.stdout
    assert (path / "model.safetensors").read_bytes() == before
    assert "epochs is 3" in complaint("train", "--epochs", 9, "--out", path, "--resume")
    assert "already holds a run" in complaint("train", "--model", "vmamba_atto", "--data", "digits", "--out", path)


def test_options_override_the_configuration_file(pictures, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"model: test_vit\ndata: {pictures}\nepochs: 1\nimg_size: 32\nlr: 1e-3\nhflip: 0\n"
    )
    options = ["--lr", 0.002, "--scale", 0.5, 1, "--no-augment", "--model-kwargs", "class_token=False"]
    options += ["--model-kwargs", "global_pool=avg", "--batch-size", 4, "--device", "cpu"]
    run("train", "--config", tmp_path / "c.yaml", *options, "--out", tmp_path / "run")
    config = RunFolder(tmp_path / "run").load_config()
    assert (config.lr, config.hflip, config.scale, config.augment) == (0.002, 0.0, (0.5, 1.0), False)
    assert config.model_kwargs == {"class_token": False, "global_pool": "avg"}
    # The folder's own file starts an equal run.
    run("train", "--config", tmp_path / "run/config.yaml", "--out", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


def test_out_is_a_fresh_folder_by_default(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("test_vit-pictures", "test_vit-pictures-2"):
        run(*small(pictures, tmp_path)[:-2])
        assert (tmp_path / "runs" / name / "model.safetensors").exists()


def test_unreadable_training_pictures_are_counted_and_named(pictures, tmp_path):
    broken = pictures / "train/dark/3.png"
    broken.write_bytes(b"\x89PNG")
    result = run(*small(pictures, tmp_path))
    assert result.stderr.splitlines()[-1] == f"vla: 1 unreadable picture left out: {broken}"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "vmamba_ato", "--data", "digits"], "unknown model 'vmamba_ato'; did you mean vmamba_atto"),
        (["--model", "test_vit", "--data", "digit"], "did you mean digits"),
        (["--model", "test_vit"], "data: missing, give --data"),
        (["--data", "digits"], "model: missing, give --model"),
        (["--model", "test_vit", "--data", "digits", "--epochs", "0"], "epochs: wanted at least 1, got 0"),
        (["--model", "test_vit", "--data", "digits", "--decay-epochs", "0"], "decay_epochs: wanted more than 0, got 0"),
        (["--model", "test_vit", "--data", "digits", "--model-kwargs", "x"], "model_kwargs: wanted key=value, got 'x'"),
        (["--model", "test_vit", "--data", "digits", "--model-kwargs", "x=1"], "cannot build test_vit"),
        (["--model", "test_vit", "--data", "digits", "--checkpoint", "no.pth"], "checkpoint: no file no.pth"),
        (["--model", "test_vit", "--data", "digits", "--resume"], "resume: say which run, with --out"),
        (["--config", "no.yaml"], "config: cannot read no.yaml: No such file or directory"),
        (["--model", "test_vit", "--data", "torch/cifar10", "--data-root", "nowhere"], "cannot open torch/cifar10"),
    ],
)
def test_training_mistakes(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in complaint("train", *options)
    assert not (tmp_path / "runs").exists()


def test_bad_folders(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no pictures in" in complaint("train", "--model", "test_vit", "--data", tmp_path / "empty")
    for picture in pictures.rglob("*.png"):
        picture.write_bytes(b"nothing")
    assert "none of 12 pictures can be read" in complaint(*small(pictures, tmp_path))


def test_unreadable_validation_set(pictures, tmp_path):
    for picture in (pictures / "val").rglob("*.png"):
        picture.write_bytes(b"nothing")
    result = run(*small(pictures, tmp_path), code=1)
    assert result.stderr.splitlines()[-1] == "vla: data: no picture to validate on can be read"


def test_checkpoint_mistakes(trained, tmp_path):
    path, _ = trained
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "foreign.pth")
    common = ["--data", "digits", "--device", "cpu"]
    foreign = complaint("eval", "--model", "vmamba_atto", "--checkpoint", tmp_path / "foreign.pth", *common)
    assert "foreign.pth holds the weights of another model" in foreign
    (tmp_path / "short.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    assert "cannot read" in complaint("eval", "--model", tmp_path / "short.safetensors", *common)
    assert "cannot read" in complaint("predict", DIGIT, "--model", tmp_path / "short.safetensors")
    assert "unknown model 'nothing'" in complaint("predict", DIGIT, "--model", "nothing")
    assert "cannot build vmamba_atto" in complaint("predict", DIGIT, "--model", "vmamba_atto")
    assert "data: missing" in complaint("eval", "--model", "vmamba_atto", "--checkpoint", path)
    assert "holds no model.safetensors" in complaint("eval", "--model", tmp_path)


def test_pictures_of_one_name_are_all_written(trained, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(DIGIT, tmp_path / folder / "1.png")
    shutil.copy(DIGIT, tmp_path / "a" / "1-2.png")
    names = [tmp_path / "a" / "1-2.png", tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"]
    run("predict", *names, "--model", trained[0], "--out", tmp_path / "out", "--device", "cpu")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"1-2.png", "1.png", "1-3.png"}


def test_evaluation_takes_all_of_a_folder(trained, tmp_path):
    for name in ("7", "8"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(5):
            shutil.copy(DIGIT, tmp_path / "set" / name / f"{i}.png")
    result = run("eval", "--model", trained[0], "--data", tmp_path / "set", "--device", "cpu")
    assert re.search(r"pictures\s*│\s*10 at", result.stdout)


def test_a_run_has_its_own_weights(trained):
    common = ["--model", trained[0], "--device", "cpu"]
    assert "has weights of its own" in complaint("predict", DIGIT, *common, "--checkpoint", trained[0])
    assert "crop_pct: -1.0, wanted more than 0" in complaint("eval", *common, "--crop-pct", -1)


def test_info_of_a_masked_autoencoder():
    assert "mae_vrwkv_atto reconstructs" in complaint("info", "mae_vrwkv_atto")


def test_picture_of_the_prediction_needs_a_format(trained, tmp_path):
    assert "has no picture format" in complaint("predict", DIGIT, "--model", trained[0], "--out", tmp_path / "x.what")


def test_models_lists_ours_with_size_and_licence():
    text = run("models").stdout
    line = next(line for line in text.splitlines() if "vmamba_tiny_s1l8" in line)
    assert re.search(r"in1k.*mit.*30\.25 M.*82\.6 %", line)
    assert "resnet50" not in text
    assert run("models", "vmamba_tiny_s1").stdout == run("models", "vmamba_tiny_s1*").stdout
    assert "resnet18" in run("models", "resnet18", "--all").stdout
    assert "no name matches 'resnet18'; --all searches timm's too" in complaint("models", "resnet18")


def test_info(trained):
    text = run("info", "vmamba_tiny_s1l8").stdout
    for part in (
        "30,249,064",
        "3x224x224",
        "mit",
        "arXiv:2401.10166",
        "82.6 %",
        "timm.create_model('vmamba_tiny_s1l8'",
    ):
        assert part in text
    assert "num_classes=10, checkpoint_path=" in run("info", trained[0]).stdout
    assert "did you mean" in complaint("info", "vmamba_tiny_s1l9")


def test_mistakes_have_no_traceback_in_a_real_process():
    command = [sys.executable, "-m", "vla", "info", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "vla: model: unknown model 'nothing'\n"
