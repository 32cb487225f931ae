"""Masked-autoencoder pre-training of Vision-RWKV against reference values, and what its weights are good for."""

import json

import pytest
import timm
import torch

import vla  # noqa: F401
from tests import golden
from tests.models.test_vrwkv import BACKENDS, DTYPES, check, official
from vla.models.vrwkv_mae import (
    VRWKVMAE,
    checkpoint_filter_fn,
    mae_to_classifier,
    mae_vrwkv_atto,
    mae_vrwkv_base,
    sincos_pos_embed,
)
from vla.ops import use_backend

MODELS = golden.index("vrwkv")["models"]
RENAMED = {"init_values": "layer_scale", "shift_pixel": "shift", "hidden_rate": "mlp_ratio"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mae_small.npz", "mae_small_normpix.npz"])
def test_reference_values(name, dtype, backend):
    case, data = MODELS[name], golden.load("vrwkv", name)
    config = {RENAMED.get(key, key): value for key, value in case["config"].items() if value is not None}
    module = VRWKVMAE(**config).eval()
    check("initial position embedding", module.pos_embed.detach(), data["sincos_pos_embed"])
    check("initial decoder embedding", module.decoder_pos_embed.detach(), data["sincos_decoder_pos_embed"])
    model = official(module, checkpoint_filter_fn, case["keys"], dtype)
    with use_backend(backend):
        loss, prediction, mask = model(golden.image(*case["inputs"][0]).to(dtype), noise=data["noise"])
        loss.backward()
    check("loss", loss, data["loss"])
    check("prediction", prediction, data["pred"])
    assert torch.equal(mask, data["mask"].to(dtype))
    names = golden.load_names("vrwkv", name, "grad_norm_names")
    norms = torch.stack([model.gradients()[str(key)].norm() for key in names])
    check("gradient norms", norms, data["grad_norms"])


def test_released_names():
    keys = json.loads((golden.DATA / "vrwkv" / "keys.json").read_text())["mae_vrwkv_base_patch16_dec512d8b"]
    with torch.device("meta"):
        model = mae_vrwkv_base()
        released = {"model": {key: torch.empty(shape) for key, shape in keys["keys"].items()}}
    assert sum(p.numel() for p in model.parameters()) == keys["parameters"] == 121_216_512
    model.load_state_dict(checkpoint_filter_fn(released))


def test_patches_are_those_of_the_image():
    model = mae_vrwkv_atto(img_size=16)
    image = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    patches = model.patchify(image)
    assert patches.shape == (2, 6, 8 * 8 * 3)
    # Second row and third column of patches; in it, row 3, column 5.
    assert torch.equal(patches[1, 5].view(8, 8, 3)[3, 5], image[1, :, 8 + 3, 16 + 5])


def test_any_size_and_seeded_mask():
    model = mae_vrwkv_atto(img_size=32)
    loss, prediction, mask = model(torch.randn(2, 3, 35, 50))
    assert prediction.shape == (2, 5 * 7, 192)
    assert (mask.sum(1) == 35 - 8).all()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_bad_mask_ratio(ratio):
    with pytest.raises(ValueError, match=f"^VRWKVMAE: mask_ratio is {ratio}"):
        mae_vrwkv_atto(mask_ratio=ratio)


def test_bad_arguments():
    with pytest.raises(ValueError, match="^VRWKVMAE: shift_mode is 'q_shift'"):
        mae_vrwkv_atto(shift_mode="q_shift")
    with pytest.raises(ValueError, match=r"^VRWKVMAE: noise has shape \(1, 3\), expected \(1, 16\)"):
        mae_vrwkv_atto(img_size=32)(torch.randn(1, 3, 32, 32), noise=torch.rand(1, 3))
    with pytest.raises(ValueError, match="^sincos_pos_embed: dim is 6"):
        sincos_pos_embed(2, 2, 6)


def test_encoder_becomes_a_classifier():
    """With nothing hidden the encoder and the classifier's backbone are the same network."""
    options = dict(img_size=32, post_norm=True, layer_scale=1e-5, key_norm=True, shift_mode="single_shift")
    pretrained = mae_vrwkv_atto(**options).eval()
    classifier = timm.create_model("vrwkv_atto", **options).eval()
    result = classifier.load_state_dict(mae_to_classifier(pretrained.state_dict()), strict=False)
    assert set(result.missing_keys) == {"head.fc.weight", "head.fc.bias"}
    assert not result.unexpected_keys
    pretrained.mask_ratio = 0.0
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, mask, _ = pretrained.forward_encoder(x, noise=torch.arange(16.0).expand(2, 16))
        features = classifier.forward_features(x)
    assert not mask.any()
    check("features", features.flatten(2).transpose(1, 2), expected)
