"""GSPN against reference values, through the names of the official code."""

import json

import pytest
import timm
import torch

import vla  # noqa: F401
from tests import golden
from tests.models.official import Official
from tests.tolerance import assert_close
from vla.models.gspn import GSPN, checkpoint_filter_fn, is_global
from vla.ops import use_backend

INDEX = golden.index("gspn")
KEYS = json.loads((golden.DATA / "gspn" / "keys.json").read_text())
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch")]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
SMALL = [name for name in INDEX if name.startswith("model_")]


def relative(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Tolerance by the precision of computation and of the stored reference."""
    if dtype == torch.float32:
        return 2e-4
    return 1e-9 if expected.dtype == torch.float64 else 2e-7


def build(config: dict) -> GSPN:
    """A model from an official configuration."""
    config = {name: value for name, value in config.items() if name not in ("imgsize", "ssm_act_layer")}
    return GSPN(**config, img_size=64)


def official(model: GSPN, shapes: dict, dtype: torch.dtype) -> Official:
    return Official(model.eval(), lambda state_dict: checkpoint_filter_fn(state_dict, model), shapes, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_small(name, dtype, backend):
    case, data = INDEX[name], golden.load("gspn", f"{name}.npz")
    model = build(case["config"])
    net = official(model, case["keys"], dtype)
    batch, _, height, width = data["d_image"].shape
    image = golden.image(batch, height, width).to(dtype).requires_grad_()
    with use_backend(backend):
        logits = net(image)
        (logits * torch.from_numpy(golden.fill_tensor("loss", logits.shape))).sum().backward()
    assert_close("logits", logits, data["logits"], relative(data["logits"], dtype))
    assert_close("d_image", image.grad, data["d_image"], relative(data["d_image"], dtype))
    gradients = net.gradients()
    norms = torch.stack([gradients[key].norm() for key in case["grad_norms_order"]])
    assert_close("grad_norms", norms, data["grad_norms"], relative(data["grad_norms"], dtype))
    for key in data:
        if key.startswith("grad:"):
            assert_close(key, gradients[key.removeprefix("grad:")], data[key], relative(data[key], dtype))


@pytest.mark.parametrize("name", SMALL)
def test_small_features(name):
    case, data = INDEX[name], golden.load("gspn", f"{name}.npz")
    model = build(case["config"])
    net = official(model, case["keys"], torch.float64)
    batch, _, height, width = data["d_image"].shape
    image = golden.image(batch, height, width).double()
    for i, feature in enumerate(net(image, method="forward_intermediates", intermediates_only=True)):
        expected = data[f"feat:stage{i}"]
        assert_close(f"stage {i}", feature, expected, relative(expected, torch.float64))


@pytest.mark.parametrize("name", ["gspn_tiny", "gspn_small", "gspn_base"])
def test_released_sizes(name):
    params = {"gspn_tiny": 31_510_268, "gspn_small": 50_773_346, "gspn_base": 93_061_108}
    with torch.device("meta"):
        model = timm.create_model(name)
    state_dict = model.state_dict()
    official_weights = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    native = checkpoint_filter_fn(official_weights, model)
    assert {key: value.shape for key, value in native.items()} == {k: v.shape for k, v in state_dict.items()}
    assert sum(value.numel() for value in state_dict.values()) == params[name]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gspn_tiny", pytest.param("gspn_base", marks=pytest.mark.large)])
def test_full(name, dtype, backend):
    data = golden.load("gspn", f"full_{name}_224.npz")
    net = official(timm.create_model(name), KEYS[name], dtype)
    with torch.no_grad(), use_backend(backend):
        logits = net(golden.image(1, 224, 224).to(dtype))
    assert_close("logits", logits, data["logits"], relative(data["logits"], dtype))


def test_containers_and_native_names_load():
    model = timm.create_model("gspn_atto")
    native = model.state_dict()
    assert checkpoint_filter_fn(native, model).keys() == native.keys()
    small = build(INDEX["model_a"]["config"])
    weights = golden.fill_state_dict(INDEX["model_a"]["keys"])
    small.load_state_dict(checkpoint_filter_fn({"model": weights, "epoch": 3}, small))
    # Linear layers of blocks were 1x1 convolutions in older files, and some modules had other names.
    older = {
        name.replace(".norm.", ".ln_1.").replace(".op.", ".self_attention."): value
        for name, value in weights.items()
        if not name.startswith("classifier.")
    }
    older = {n: v[..., None, None] if n.endswith(("proj.weight", "fc1.weight")) else v for n, v in older.items()}
    older |= {n.removeprefix("classifier."): v for n, v in weights.items() if n.startswith("classifier.")}
    other = build(INDEX["model_a"]["config"])
    other.load_state_dict(checkpoint_filter_fn(older, other))
    for (name, expected), actual in zip(small.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_global_blocks():
    """Chunks of every block of the three sizes at 224 pixels; the third stage of the base model alternates."""
    chunks = {}
    for name in ("gspn_tiny", "gspn_small", "gspn_base"):
        with torch.device("meta"):
            model = timm.create_model(name)
        chunks[name] = [[block.mixer.scan.chunk for block in stage.blocks] for stage in model.stages]
    assert chunks["gspn_tiny"] == [[2] * 2, [2] * 2, [14] * 7, [7] * 2]
    assert chunks["gspn_small"] == [[2] * 5, [2] * 5, [2] * 10, [7] * 2]
    assert chunks["gspn_base"] == [[2] * 4, [2] * 4, [14] * 7 + [2] * 6 + [14, 2], [7] * 4]
    assert [is_global(1, j, (1,)) for j in (0, 6, 7, 13, 14)] == [True, True, False, True, False]


def test_global_blocks_follow_the_grid():
    """Without `feat_sizes` a global block is global at every size; with them it is at the size they were made for."""
    case = INDEX["model_a"]
    fixed, by_grid = build(case["config"]).eval(), build(case["config"] | {"feat_sizes": None}).eval()
    weights = checkpoint_filter_fn(golden.fill_state_dict(case["keys"]), fixed)
    for model in (fixed, by_grid):
        model.load_state_dict(weights)
    with torch.no_grad():
        trained_size, larger = golden.image(1, 64, 64), golden.image(1, 128, 96)
        assert_close("trained size", by_grid(trained_size), fixed(trained_size))
        difference = (by_grid(larger) - fixed(larger)).abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("size", [(32, 32), (1, 1), (33, 70), (96, 20)], ids=str)
def test_any_size(size, aligned):
    model = timm.create_model("gspn_atto", num_classes=7, aligned=aligned)
    x = torch.randn(2, 3, *size)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_layer="gn"), "unknown norm_layer 'gn', expected one of ln"),
        (dict(downsample_version="none"), "unknown downsample_version 'none'"),
        (dict(patchembed_version="v3"), "unknown patchembed_version 'v3'"),
        (dict(dims=(8, 16)), "dims has 2 entries, expected 4"),
        (dict(feat_sizes=(8, 4)), "feat_sizes has 2 entries, expected 4"),
        (dict(ssm_conv=4), "conv_kernel is 4, expected an odd number"),
        (dict(ssm_d_state=0), "d_state is 0"),
        (dict(items_each_chunk=-1), "chunk is -1"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        GSPN(**dict(depths=(1, 1, 1, 1), dims=8) | change)
