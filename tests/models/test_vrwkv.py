"""Vision-RWKV against reference values, through the names of the released checkpoints."""

import json

import pytest
import timm
import torch

import vla  # noqa: F401
from tests import golden
from tests.models.official import Official
from tests.tolerance import assert_close
from vla.models.vrwkv import VRWKV, checkpoint_filter_fn, resize_pos_embed
from vla.ops import use_backend

FOLDER = golden.DATA / "vrwkv"
INDEX = golden.index("vrwkv")
MODELS = INDEX["models"]
RELEASED = json.loads((FOLDER / "keys.json").read_text())
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch")]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
# How the reference scales some weights, by the start of the last part of their name; None as all others.
OFFSET_AND_SCALE = {
    "spatial_decay": (0, 5),
    "spatial_first": (0, 3),
    "spatial_mix_": (0.5, 0.25),
    "gamma": (0.5, 0.25),
    "pos_embed": (0, 0.2),
    "cls_token": (0, 0.5),
    "time_decay_w": None,
    "time_decay": (-3, 1.5),
    "time_faaaa": (0, 0.5),
    "time_maa_w1": None,
    "time_maa_w2": (0, 0.1),
    "time_maa_": (0.5, 0.25),
}
# Names of the released configurations that differ from this module's arguments.
RENAMED = {
    "in_channels": "in_chans",
    "embed_dims": "embed_dim",
    "init_values": "layer_scale",
    "interpolate_mode": "interpolation",
    "k_norm": "key_norm",
    "hidden_dims": "head_hidden_size",
    "with_cls_token": "class_token",
}


def official(module, filter_fn, shapes, dtype) -> Official:
    """Official weights, scaled as this family's reference does."""
    result = Official(module, filter_fn, shapes, dtype)
    for name, weight in result.weights.items():
        leaf = name.rsplit(".", 1)[-1]
        rule = next((rule for start, rule in OFFSET_AND_SCALE.items() if leaf.startswith(start)), None)
        if rule is not None:
            value = torch.from_numpy(golden.fill_tensor(name, weight.shape))
            weight.data = (torch.tensor(rule[0]) + torch.tensor(rule[1]) * value).to(dtype)
    return result


def build(case: dict, dtype, **kwargs) -> Official:
    config = {RENAMED.get(name, name): value for name, value in case["config"].items()}
    for name in ("out_indices", "output_cls_token"):
        config.pop(name, None)
    if case["kind"] == "vrwkv6":
        config |= {"version": 6, "head_dim": config["embed_dim"] // config.pop("num_heads")}
    if isinstance(config["img_size"], list):
        config["img_size"] = tuple(config["img_size"])
    module = VRWKV(num_classes=case["num_classes"], **config, **kwargs).eval()
    shapes = case["keys"] if isinstance(case["keys"], dict) else RELEASED[case["keys"]]["keys"]
    return official(module, lambda weights: checkpoint_filter_fn(weights, module), shapes, dtype)


def check(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`assert_close`, whose tolerance in float64 is the stored array's rounding."""
    stored_in_float32 = expected.dtype == torch.float32 and actual.dtype == torch.float64
    assert_close(name, actual, expected, 2e-7 if stored_in_float32 else 1e-9 if actual.dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("model_")])
def test_reference_values(name, dtype, backend):
    case, data = MODELS[name], golden.load("vrwkv", name)
    names = [str(key) for key in golden.load_names("vrwkv", name, "grad_norm_names")]
    for q, (batch, height, width) in enumerate(case["inputs"]):
        model = build(case, dtype)
        x = golden.image(batch, height, width, case["config"].get("in_channels", 3)).to(dtype)
        with use_backend(backend):
            with torch.no_grad():
                final, features = model(
                    x, "forward_intermediates", indices=case["config"]["out_indices"], return_prefix_tokens=True
                )
            logits = model(x)
            (logits * torch.from_numpy(golden.fill_tensor("loss", logits.shape)).to(dtype)).sum().backward()
        check("logits", logits, data[f"in{q}.logits"])
        # The released backbone normalises the last block's output, and that alone.
        for j, (pixels, cls) in enumerate(features):
            last = j == len(features) - 1
            if f"in{q}.feat{j}.cls" in data:
                check(f"features {j}", final if last else pixels, data[f"in{q}.feat{j}.patch"])
                if not last:
                    check(f"class token {j}", cls[:, 0], data[f"in{q}.feat{j}.cls"])
            else:
                check(f"features {j}", final if last else pixels, data[f"in{q}.feat{j}"])
        gradients = model.gradients()
        norms = torch.stack([gradients[key].norm() for key in names])
        check("gradient norms", norms, data[f"in{q}.grad_norms"])
        for key, expected in data.items():
            if key.startswith(f"in{q}.grad."):
                check(key, gradients[key.removeprefix(f"in{q}.grad.")], expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("model_v1")])
def test_released_kernel(name):
    """The compatibility mode gives what the released CUDA kernel computes."""
    case, data = MODELS[name], golden.load("vrwkv", name)
    for q, (batch, height, width) in enumerate(case["inputs"]):
        model = build(case, torch.float64, official_split=32)
        with torch.no_grad():
            logits = model(golden.image(batch, height, width, case["config"].get("in_channels", 3)).double())
        check("logits", logits, data[f"in{q}.logits_kernel32"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.large] if "base" in name or "large" in name else [])
        for name in MODELS
        if name.startswith("full_")
    ],
)
def test_full_size(name):
    case, data = MODELS[name], golden.load("vrwkv", name)
    for stored in data.keys() & {"logits", "logits_kernel32", "logits_kernel16"}:
        split = int(stored[-2:]) if "kernel" in stored else None
        model = build(case, torch.float64, official_split=split)
        with torch.no_grad():
            x = golden.image(*case["inputs"][0]).double()
            check(stored, model(x)[0], data[stored])
            if split is None:
                check("mean of the features", model(x, "forward_features").abs().mean(), data["feat_mean_abs"])


@pytest.mark.parametrize("name", [name for name in RELEASED if not name.startswith("mae")])
def test_released_names(name):
    """Released state dicts load, with the released number of parameters."""
    entry = RELEASED[name]
    native = "vrwkv_large" if "large" in name else name
    with torch.device("meta"):
        model = timm.create_model(native, num_classes=21841 if "in22k" in name else 1000)
        released = {"state_dict": {key: torch.empty(shape) for key, shape in entry["keys"].items()}}
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    converted = checkpoint_filter_fn(released, model)
    model.load_state_dict(converted)
    assert checkpoint_filter_fn(converted, model).keys() == converted.keys()


def test_position_embedding_is_resized_to_the_model():
    model = timm.create_model("vrwkv_atto", img_size=(48, 80))
    weights = timm.create_model("vrwkv_atto", img_size=64).state_dict()
    assert checkpoint_filter_fn(weights, model)["pos_embed"].shape == (1, 6 * 10, 96)


def test_resize_pos_embed():
    data = golden.load("vrwkv", "op_resize_pos_embed.npz")
    for case in INDEX["ops"]["op_resize_pos_embed.npz"]:
        x = data[f"x{case['i']}"].double()
        y = resize_pos_embed(x, tuple(case["src"]), tuple(case["dst"]), case["mode"])
        check(f"case {case['i']}", y, data[f"y{case['i']}"])


def test_class_token():
    """The class token takes part in the mixing, and only the features' extra output shows it."""
    model = timm.create_model("vrwkv6_atto", class_token=True).eval()
    x = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        final, outputs = model.forward_intermediates(x, return_prefix_tokens=True)
        assert [(a.shape, b.shape) for a, b in outputs] == [((2, 96, 5, 9), (2, 1, 96))] * 4
        assert torch.equal(final, model.forward_features(x))
        before = model(x)
        model.cls_token.normal_()
        assert not torch.allclose(model(x), before)
    assert torch.jit.script(model)(x).shape == (2, 1000)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"init_mode": "random"}, "SpatialMix: init_mode is 'random'"),
        ({"shift_mode": "none"}, "TokenShift: mode is 'none'"),
        ({"version": 5}, "VRWKVBlock: version is 5, expected 1 or 6"),
        ({"version": 6, "init_mode": "local"}, "VRWKVBlock: init_mode is 'local', expected 'fancy' in version 6"),
        ({"version": 6, "official_split": 32}, "VRWKVBlock: official_split is 32"),
        ({"version": 6, "head_dim": 48}, "SpatialMix6: head_dim is 48, expected a multiple of 4 that divides dim = 64"),
        ({"interpolation": "nearest"}, "VRWKV: interpolation is 'nearest'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        VRWKV(embed_dim=64, depth=1, **arguments)


@pytest.mark.parametrize("name", ["vrwkv_atto", "vrwkv6_atto"])
def test_bfloat16_autocast(name):
    model = timm.create_model(name)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = model(torch.randn(2, 3, 40, 40))
    y.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
