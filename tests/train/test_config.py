"""The configuration survives its file exactly, and refuses what it does not understand."""

import pytest

from vla.errors import UserError
from vla.train import TrainConfig
from vla.train.config import RECIPES, changed_fields, parse_pairs, read_options

BASE = {"model": "test_vit", "data": "somewhere"}


def test_round_trip(tmp_path):
    config = TrainConfig.create(
        BASE | {"lr": 1e-3 / 3, "scale": (0.1, 1 / 3), "ema": 0.9999, "model_kwargs": {"depth": 2, "name": "a b"}}
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_later_layers_override_the_recipe():
    config = TrainConfig.create({"model": "test_vit", "data": "digits", "epochs": 7}, {"epochs": 8})
    recipe = RECIPES["digits"]
    assert (config.epochs, config.img_size, config.hflip) == (8, recipe["img_size"], recipe["hflip"])
    assert TrainConfig.create(BASE).hflip == 0.5


def test_warm_up_is_a_twentieth():
    assert TrainConfig.create(BASE | {"epochs": 300}).warmup_epochs == 15
    with pytest.raises(UserError, match="warmup_epochs: wanted less than the 3 epochs, got 5"):
        TrainConfig.create(BASE | {"epochs": 3, "warmup_epochs": 5})


def test_file_takes_numbers_as_people_write_them(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ndata: d\nlr: 1e-3\nweight_decay: 0\nscale: [1e-1, 1]\n")
    config = TrainConfig.create(read_options(tmp_path / "c.yaml"))
    assert (config.lr, config.weight_decay, config.scale) == (1e-3, 0.0, (0.1, 1.0))
    (tmp_path / "c.json").write_text('{"model": "m", "data": "d", "lr": 1e-3}')
    assert TrainConfig.create(read_options(tmp_path / "c.json")).lr == 1e-3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"batchsize": 1}, "unknown key 'batchsize'; did you mean batch_size"),
        ({"lr": "fast"}, "lr: wanted a number, got 'fast'"),
        ({"epochs": 1.5}, "epochs: wanted a whole number, got 1.5"),
        ({"epochs": True}, "epochs: wanted a whole number, got True"),
        ({"ema": 1.0}, "ema: wanted at least 0 and less than 1, got 1.0"),
        ({"amp": "int8"}, "amp: wanted one of none, bf16, fp16, got 'int8'"),
        ({"scale": [1]}, "scale: wanted 2 numbers"),
        ({"scale": [2, 1]}, r"scale: wanted two numbers, low and high, got \(2.0, 1.0\)"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
        ({"holdout": 1}, "holdout: wanted more than 0 and less than 1"),
        ({"model": ""}, "model: missing"),
        ({"pretrained": "yes"}, "pretrained: wanted true or false"),
        ({"model_kwargs": 3}, "model_kwargs: wanted key: value lines, got 3"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.create(BASE | given)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\x00"])
def test_bad_files(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="c.yaml") as error:
        read_options(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read .*missing.yaml"):
        read_options(tmp_path / "missing.yaml")


def test_pairs():
    assert parse_pairs("x", ["a=1", "b=1.5", "c=(1, 2)", "d=text", "e=None", "f=k=v"]) == {
        "a": 1, "b": 1.5, "c": (1, 2), "d": "text", "e": None, "f": "k=v",
    }  # fmt: skip
    with pytest.raises(UserError, match="x: wanted key=value, got 'alone'"):
        parse_pairs("x", ["alone"])


def test_changed_fields():
    config = TrainConfig.create(BASE)
    assert changed_fields(config, {"model": "test_vit", "lr": 1e-3, "epochs": 3}) == ["epochs"]
