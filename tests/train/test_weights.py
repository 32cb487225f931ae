"""Weights load where they belong, and nowhere else; a bad file gets one line."""

import pickle
import sys

import pytest
import safetensors.torch
import timm
import torch

import vla  # noqa: F401
from vla.errors import UserError
from vla.train import ModelSpec, build_model, load_weights, open_model, save_model
from vla.train.weights import read_spec


def spec_of(model, **kwargs):
    return ModelSpec.of(model, "test_convnext", {"num_classes": 10}, **kwargs)


@pytest.fixture
def model():
    return build_model("test_convnext", num_classes=10)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_saved_model_opens_again(tmp_path, model):
    spec = spec_of(model, img_size=48, crop_pct=0.7, classes=[f"class {i}" for i in range(10)])
    save_model(tmp_path / "model.safetensors", model, spec)
    assert read_spec(tmp_path / "model.safetensors") == spec
    opened, its_spec = open_model(str(tmp_path / "model.safetensors"))
    assert same(opened, model) and its_spec == spec and not opened.training
    assert same(
        timm.create_model("test_convnext", num_classes=10, checkpoint_path=tmp_path / "model.safetensors"), model
    )


def test_spec_follows_the_model():
    spec = ModelSpec.of(build_model("test_vit", in_chans=1), "test_vit", {"in_chans": 1})
    assert spec.input_size == (1, 160, 160) and spec.mode == "L"
    assert spec.mean == (0.5,)


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pytorch_checkpoints(tmp_path, model, container, prefix):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    content = weights if container is None else {container: weights, "epoch": 3, "optimizer": {}}
    torch.save(content, tmp_path / "c.pth")
    other = build_model("test_convnext", num_classes=10)
    assert not same(other, model)
    assert load_weights(other, tmp_path / "c.pth") == []
    assert same(other, model)


def test_official_names_are_converted(tmp_path):
    source = build_model("vmamba_atto", num_classes=10)
    torch.save({"model": source.state_dict()}, tmp_path / "native.pth")
    other = build_model("vmamba_atto", num_classes=10)
    load_weights(other, tmp_path / "native.pth")
    assert same(other, source)


def test_a_family_takes_its_part_of_a_file(tmp_path, monkeypatch):
    """As where timm loads it: releases differ in which weights the reported accuracy is of."""
    source, other = (build_model("mambavision_atto", num_classes=10) for _ in range(2))
    seen = []
    module = sys.modules[type(source).__module__]
    monkeypatch.setattr(
        module, "checkpoint_filter_fn", lambda content, model: seen.append(content) or source.state_dict()
    )
    torch.save({"state_dict": {"x": torch.ones(1)}, "state_dict_ema": {"x": torch.zeros(1)}}, tmp_path / "c.pth")
    load_weights(other, tmp_path / "c.pth")
    assert seen[0].keys() == {"state_dict", "state_dict_ema"} and same(other, source)


def test_new_head(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "c.pth")
    other = build_model("test_convnext", num_classes=7)
    with pytest.raises(UserError, match=r"head.fc.weight is \(10, .*\), wanted \(7, "):
        load_weights(other, tmp_path / "c.pth")
    assert sorted(load_weights(other, tmp_path / "c.pth", new_head=True)) == ["head.fc.bias", "head.fc.weight"]
    assert torch.equal(other.stem[0].weight, model.stem[0].weight)
    headless = {name: value for name, value in model.state_dict().items() if not name.startswith("head.fc")}
    torch.save(headless, tmp_path / "c.pth")
    assert len(load_weights(other, tmp_path / "c.pth", new_head=True)) == 2


def test_another_models_weights_change_nothing(tmp_path, model):
    torch.save(build_model("test_vit").state_dict(), tmp_path / "c.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="c.pth holds the weights of another model") as error:
        load_weights(model, tmp_path / "c.pth", new_head=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("<html>404</html>"),
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        lambda path: torch.save({"model": Evil()}, path),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "empty", "text", "pickled code", "torch code", "missing"],
)
def test_bad_files(tmp_path, model, suffix, damage):
    path = tmp_path / f"c{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    damage(path)
    with pytest.raises(UserError, match="checkpoint: (cannot read|no file).*c[.]") as error:
        load_weights(model, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, torch.zeros(3), {"model": {"a": 1}}], ids=["dict", "tensor", "plain"]
)
def test_no_weights_inside(tmp_path, model, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_weights(model, tmp_path / "c.pth")


def test_model_names():
    with pytest.raises(UserError, match="unknown model 'vmamba_ato'; did you mean vmamba_atto"):
        build_model("vmamba_ato")
    with pytest.raises(UserError, match="cannot build test_vit: .*no_such_option"):
        build_model("test_vit", no_such_option=1)


def test_open_foreign_weights_by_name(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "c.pth")
    opened, spec = open_model("test_convnext", str(tmp_path / "c.pth"))
    assert same(opened, model) and spec.model_args == {"num_classes": 10}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="does not say which model it is; give --model NAME --checkpoint"):
        open_model(str(tmp_path / "c.safetensors"))
    with pytest.raises(UserError, match="holds no model.safetensors"):
        open_model(str(tmp_path))
