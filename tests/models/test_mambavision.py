"""MambaVision against reference values, through the names of the released checkpoints."""

import json

import pytest
import timm
import torch
from torch import nn

import vla  # noqa: F401
from tests import golden
from tests.models.official import Official, check
from tests.tolerance import assert_close
from vla.layers.mambavision import MambaVisionBlock, MambaVisionMixer, MapAttention, window_partition, window_reverse
from vla.models.mambavision import (
    ConvBlock,
    MambaVision,
    MambaVisionStage,
    Stem,
    checkpoint_filter_fn,
)
from vla.ops import use_backend

INDEX = golden.index("mambavision")
KEYS = json.loads((golden.DATA / "mambavision" / "keys.json").read_text())
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch")]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def named(prefix: str):
    return [pytest.param(name, id=name.removesuffix(".npz")) for name in INDEX if name.startswith(prefix)]


def scoped(prefix: str, native: str):
    """Checkpoint filter of a part: what it is called in the released model, and in this one."""

    def filter_fn(state_dict):
        renamed = checkpoint_filter_fn({prefix + name: value for name, value in state_dict.items()}, None)
        return {name.removeprefix(native): value for name, value in renamed.items()}

    return filter_fn


class StageWithDownsample(nn.Module):
    """A released stage ends with its downsampling; ours starts with it."""

    def __init__(self, stage: nn.Module, downsample: nn.Module):
        super().__init__()
        self.stages = nn.ModuleDict({"2": stage, "3": nn.ModuleDict({"downsample": downsample})})

    def forward(self, x):
        return self.stages["3"]["downsample"](self.stages["2"](x))


def part(case: dict) -> tuple[nn.Module, callable]:
    config, op = case["config"], case["op"]
    if op == "mixer":
        mixer = MambaVisionMixer(config["d_model"], config["d_state"], config["d_conv"], config["expand"])
        return mixer, scoped("levels.2.blocks.0.mixer.", "stages.2.blocks.0.mixer.")
    if op == "attention":
        attention = MapAttention(
            config["dim"],
            num_heads=config["num_heads"],
            qkv_bias=config["qkv_bias"],
            qk_norm=config.get("qk_norm", False),
        )
        return attention, scoped("levels.2.blocks.0.mixer.", "stages.2.blocks.0.mixer.")
    if op == "block":
        block = MambaVisionBlock(
            config["dim"],
            mixer=config["mixer"],
            num_heads=config["num_heads"],
            mlp_ratio=config["mlp_ratio"],
            layer_scale=config["layer_scale"],
        )
        return block, scoped("levels.2.blocks.0.", "stages.2.blocks.0.")
    if op == "convblock":
        block = ConvBlock(config["dim"], layer_scale=config.get("layer_scale"))
        return block, scoped("levels.0.blocks.0.", "stages.0.blocks.0.")
    if op == "patch_embed":
        stem = Stem(config["in_chans"], config["in_dim"], config["dim"])
        return stem, scoped("patch_embed.", "stem.")
    dim = config["dim"]
    downsample = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
    if op == "downsample":
        return downsample, scoped("levels.2.downsample.", "stages.3.downsample.")
    assert op == "stage"
    if config.get("conv"):
        blocks = [ConvBlock(dim) for _ in range(config["depth"])]
        stage = MambaVisionStage(None, dim, blocks)
    else:
        blocks = [
            MambaVisionBlock(
                dim,
                mixer="attention" if j in config["transformer_blocks"] else "mamba",
                num_heads=config["num_heads"],
                layer_scale=config.get("layer_scale"),
            )
            for j in range(config["depth"])
        ]
        stage = MambaVisionStage(None, dim, blocks, config["window_size"])
    if config.get("downsample", True):
        return StageWithDownsample(stage, downsample), scoped("levels.2.", "")
    return stage, scoped("levels.2.", "stages.2.")


def test_stages_of_one_width_are_halved():
    model = MambaVision(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2)).eval()
    _, features = model.forward_intermediates(torch.zeros(1, 3, 64, 64))
    assert [64 // f.shape[2] for f in features] == [info["reduction"] for info in model.feature_info]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in INDEX if "op" in INDEX[name] and "keys" in INDEX[name]])
def test_part(name, dtype, backend):
    case, data = INDEX[name], golden.load("mambavision", name)
    module, filter_fn = part(case)
    official = Official(module, filter_fn, case["keys"], dtype)
    module.train(case["mode"] == "train")
    x = data["x"].to(dtype).requires_grad_()
    tokens = x.dim() == 3
    with use_backend(backend):
        # A token mixer sees the map's pixels in row-major order, so one row is a sequence.
        out = official(x.transpose(1, 2).unsqueeze(2) if tokens else x)
        out = out.squeeze(2).transpose(1, 2) if tokens else out
        loss = torch.from_numpy(golden.fill_tensor("loss", out.shape)).to(dtype)
        (out * loss).sum().backward()
    check("out", out, data["out"])
    check("grad_x", x.grad, data["grad_x"])
    gradients = official.gradients()
    for key, expected in data.items():
        if key.startswith("grad:"):
            check(key, gradients[key.removeprefix("grad:")], expected)
        elif key.startswith("buffer_after:"):
            check(key, official.weights[key.removeprefix("buffer_after:")].to(dtype), expected)


def test_window_partition():
    data = golden.load("mambavision", "window_partition.npz")
    windows = window_partition(data["x"], 3)
    assert torch.equal(windows.flatten(2).transpose(1, 2), data["windows"])
    assert torch.equal(window_reverse(windows, 6, 9), data["back"])


@pytest.mark.parametrize("height, width, size", [(1, 1, 1), (5, 11, 4), (3, 2, 7), (8, 8, 8)])
def test_window_padding(height, width, size):
    x = torch.randn(2, 3, height, width)
    windows = window_partition(x, size)
    rows, columns = -(-height // size), -(-width // size)
    assert windows.shape == (2 * rows * columns, 3, size, size)
    assert windows.sum().item() == pytest.approx(x.sum().item(), abs=1e-4)
    assert torch.equal(window_reverse(windows, height, width), x)


def build(config: dict) -> MambaVision:
    config = dict(config)
    dim = config.pop("dim")
    if "norm_layer" in config:
        layer = {"ln2d": "layernorm2d", "bn": "batchnorm2d"}[config.pop("norm_layer")]
        config |= dict(out_norm=config.pop("out_indices"), out_norm_layer=layer, num_classes=0)
    return MambaVision(dims=[dim * 2**i for i in range(4)], stem_dim=config.pop("in_dim"), **config)


def image(case: dict, dtype: torch.dtype) -> torch.Tensor:
    batch, height, width = (int(n) for n in case["input"].split("(")[1].split(",")[:3])
    return golden.image(batch, height, width).to(dtype)


def tolerance(case: dict, dtype: torch.dtype, expected: torch.Tensor) -> float | None:
    """In float32 four times the error that the released code makes in float32: sums are ordered otherwise."""
    if dtype == torch.float64:
        return None
    return 4 * case["float32_reference_abs_error"] / expected.abs().max().item()


def check_gradients(official: Official, data: dict, names: list[str], x: torch.Tensor) -> None:
    gradients = official.gradients()
    relative = None if x.dtype == torch.float64 else 1e-4
    check("grad_x", x.grad, data["grad_x"], relative)
    norms = torch.stack([gradients[name].norm() for name in names])
    check("gradient norms", norms, data["grad_norms"].double(), relative)
    for key, expected in data.items():
        if key.startswith("grad:"):
            check(key, gradients[key.removeprefix("grad:")], expected, relative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", named("small_"))
def test_classifier(name, dtype, backend):
    case, data = INDEX[name], golden.load("mambavision", name)
    model = build(case["config"])
    official = Official(model, lambda s: checkpoint_filter_fn(s, model), case["keys"], dtype)
    model.train(case["mode"] == "train")
    features = {}
    hooks = {"stem": model.stem, "norm": model.norms[3]}
    for i in range(4):
        hooks[f"stage{i}"] = model.stages[i]
        if i < 3:
            hooks[f"stage{i}_down"] = model.stages[i + 1].downsample
    for key, module in hooks.items():
        module.register_forward_hook(lambda _, __, out, key=key: features.update({key: out}))
    with use_backend(backend):
        x = image(case, dtype).requires_grad_()
        logits = official(x)
        loss = torch.from_numpy(golden.fill_tensor("loss", logits.shape)).to(dtype)
        (logits * loss).sum().backward()
    relative = tolerance(case, dtype, data["logits"])
    check("logits", logits, data["logits"], relative)
    for key, expected in data.items():
        if key.startswith("feat:"):
            check(key, features[key.removeprefix("feat:")], expected)
        elif key.startswith("buffer_after:"):
            check(key, official.weights[key.removeprefix("buffer_after:")].to(dtype), expected)
    check_gradients(official, data, case["grad_norm_names"], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", named("det_"))
def test_dense_backbone(name, dtype, backend):
    case, data = INDEX[name], golden.load("mambavision", name)
    model = build(case["config"])
    official = Official(model, lambda s: checkpoint_filter_fn(s, model), case["keys"], dtype)
    model.eval()
    with use_backend(backend):
        x = image(case, dtype).requires_grad_()
        outputs = official(x, "forward_intermediates", norm=True, intermediates_only=True)
        losses = [torch.from_numpy(golden.fill_tensor(f"loss{i}", y.shape)).to(dtype) for i, y in enumerate(outputs)]
        sum((y * w).sum() for y, w in zip(outputs, losses, strict=True)).backward()
    for i, y in enumerate(outputs):
        check(f"out{i}", y, data[f"out{i}"], tolerance(case, dtype, data[f"out{i}"]))
    check_gradients(official, data, case["grad_norm_names"], x)


# Released files and the models that read them.
RELEASED = {
    "mamba_vision_T": "mambavision_tiny",
    "mamba_vision_T2": "mambavision_tiny2",
    "mamba_vision_S": "mambavision_small",
    "mamba_vision_B": "mambavision_base",
    "mamba_vision_L": "mambavision_large",
    "mamba_vision_L2": "mambavision_large2",
    "mamba_vision_L3_256_21k": "mambavision_large3",
    "det_T_3x_backbone": "mambavision_tiny.coco",
    "det_S_3x_backbone": "mambavision_small.coco",
    "det_B_3x_backbone": "mambavision_base.coco",
    "seg_L3_160k_backbone": "mambavision_large3.ade20k",
}
PARAMETERS = {
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
    "mambavision_large2": 241_554_824,
    "mambavision_large2_512": 241_554_824,
    "mambavision_large3": 739_570_472,
    "mambavision_large3_512": 739_570_472,
    "mambavision_tiny.coco": 31_154_368,
    "mambavision_tiny.ade20k": 31_154_368,
    "mambavision_small.coco": 49_372_928,
    "mambavision_small.ade20k": 49_372_928,
    "mambavision_base.coco": 96_662_080,
    "mambavision_base.ade20k": 96_662_080,
    "mambavision_large3.ade20k": 737_525_056,
}


def create(name: str, device: str) -> nn.Module:
    with torch.device(device):
        return timm.create_model(name, features_only=name.endswith(("coco", "ade20k")))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in create(name, "meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("released", RELEASED)
def test_keys(released):
    model = create(RELEASED[released], "meta")
    model = model.model if "backbone" in released else model
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in KEYS[released].items()}
    native = checkpoint_filter_fn({"state_dict": state_dict, "meta": {}}, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("container", ["state_dict", "model", None])
def test_containers(prefix, container):
    case = INDEX["small_a.npz"]
    model = build(case["config"])
    weights = {prefix + key: value for key, value in golden.fill_state_dict(case["keys"]).items()}
    model.load_state_dict(checkpoint_filter_fn({container: weights, "epoch": 3} if container else weights, model))
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def full_cases():
    models = {
        "mamba_vision_T": "mambavision_tiny",
        "mamba_vision_S": "mambavision_small",
        "mamba_vision_L": "mambavision_large",
        "mamba_vision_L2_512_21k": "mambavision_large2_512",
        "mamba_vision_L3_256_21k": "mambavision_large3",
    }
    for name in INDEX:
        if name.startswith("full_"):
            model = models[INDEX[name]["variant"]]
            marks = [pytest.mark.large] if PARAMETERS[model] > 60e6 else []
            yield pytest.param(name, model, marks=marks, id=name.removesuffix(".npz"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, model_name", list(full_cases()))
def test_full_size(name, model_name, dtype):
    case, data = INDEX[name], golden.load("mambavision", name)
    model = create(model_name, torch.get_default_device()).eval()
    released = next(key for key in (case["keys"], case["keys"].replace("L2_512_21k", "L2")) if key in KEYS)
    model.load_state_dict(checkpoint_filter_fn(golden.fill_state_dict(KEYS[released]), model))
    model.to(dtype)
    statistics = {}

    def record(i):
        return lambda _, __, out: statistics.update({i: torch.stack([out.mean(), out.std()]).double()})

    for i in range(4):
        (model.stages[i + 1].downsample if i < 3 else model.stages[3]).register_forward_hook(record(i))
    with torch.no_grad():
        logits = model(image(case, dtype))
    check("logits", logits, data["logits"], tolerance(case, dtype, data["logits"]))
    stages = torch.stack([statistics[i] for i in range(4)])
    check("stages", stages, data["stage_mean_std"], None if dtype == torch.float64 else 1e-5)


def test_full_size_dense_backbone():
    data = golden.load("mambavision", "backbone_seg_T_512x512.npz")
    backbone = create("mambavision_tiny.ade20k", torch.get_default_device()).eval()
    shapes = {key.removeprefix("backbone."): shape for key, shape in KEYS["det_T_3x_backbone"].items()}
    backbone.model.load_state_dict(checkpoint_filter_fn(golden.fill_state_dict(shapes), backbone.model))
    with torch.no_grad():
        outputs = backbone.double()(golden.image(1, 512, 512).double())
    for i, y in enumerate(outputs):
        check(f"out{i}", y[:, ::10, ::4, ::4], data[f"out{i}_sub"])
    check("mean", torch.stack([y.mean() for y in outputs]), data["mean"])
    check("std", torch.stack([y.std() for y in outputs]), data["std"])


def test_dense_weights_need_features_only():
    with pytest.raises(ValueError, match="features_only=True"):
        timm.create_model("mambavision_tiny.coco", pretrained=True)


def test_foreign_checkpoint_is_refused():
    model = create("mambavision_atto", torch.get_default_device())
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint_filter_fn({"epoch": 3}, model)
    with pytest.raises(RuntimeError, match="stem.conv1.weight"):
        model.load_state_dict(checkpoint_filter_fn({"conv.weight": torch.zeros(1)}, model))


def test_single_time_step_bias():
    """With the bias added once, the same result needs a bias twice as large."""
    double, single = MambaVisionMixer(16), MambaVisionMixer(16, double_dt_bias=False)
    single.load_state_dict(double.state_dict())
    with torch.no_grad():
        single.dt_proj.bias.mul_(2)
    x = torch.randn(2, 16, 5, 3)
    assert_close("double bias", double(x), single(x))
    torch.manual_seed(0)
    for mixer in (MambaVisionMixer(512), MambaVisionMixer(512, double_dt_bias=False)):
        dt = nn.functional.softplus(mixer.dt_bias_scale * mixer.dt_proj.bias)
        assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1


@pytest.mark.parametrize("double_dt_bias", [True, False])
def test_time_step_by_another_layer(double_dt_bias):
    """A layer that takes the place of the time step's projection, like an adapter or a quantised one, is called."""

    class Adapter(nn.Module):
        def __init__(self, layer: nn.Linear):
            super().__init__()
            self.layer = layer
            self.change = nn.Parameter(torch.zeros_like(layer.weight))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + x @ self.change.T

    mixer = MambaVisionMixer(16, double_dt_bias=double_dt_bias)
    x = torch.randn(2, 16, 5, 3)
    expected = mixer(x)
    mixer.dt_proj = Adapter(mixer.dt_proj)
    assert_close("adapted", mixer(x), expected)
    mixer(x).square().sum().backward()
    assert mixer.dt_proj.change.grad.abs().sum() > 0


def test_initial_weights():
    torch.manual_seed(0)
    model = MambaVision(num_classes=10, layer_scale=1e-5)
    for name, p in model.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        if name.endswith("A_log"):
            assert_close(name, p, torch.arange(1.0, 9).log().expand_as(p))
        elif name.endswith(".D") or ("norm" in name and name.endswith("weight")):
            assert (p == 1).all(), name
        elif ".gamma" in name:
            assert (p == 1e-5).all(), name
        elif "conv" in name or "downsample" in name:
            assert p.abs().max() <= (p[0].numel() ** -0.5 if p.dim() > 1 else 1), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
    mamba = MambaVision(num_classes=10, dt_init="mamba")
    biases = [p for name, p in mamba.named_parameters() if name.endswith("dt_proj.bias")]
    assert biases and all((p < 0).all() for p in biases)


@pytest.mark.parametrize("mixer", ["mamba", "attention"])
@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize("shape", [(2, 16, 7, 5), (1, 16, 1, 1), (0, 16, 4, 4)])
def test_plug_in_block(mixer, window_size, shape):
    block = MambaVisionBlock(16, mixer=mixer, window_size=window_size, num_heads=4, layer_scale=1.0, drop_path=0.1)
    x = torch.randn(shape)
    y = block(x)
    assert y.shape == x.shape and y.isfinite().all()
    block.eval()
    assert_close("channels last", block(x.contiguous(memory_format=torch.channels_last)), block(x))
    assert_close("script", torch.jit.script(block)(x), block(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="mixer is 'conv'"):
        MambaVisionBlock(16, mixer="conv")
    with pytest.raises(ValueError, match="num_heads is 3"):
        MambaVisionBlock(16, mixer="attention", num_heads=3)
    with pytest.raises(ValueError, match="expand"):
        MambaVisionMixer(15)
    with pytest.raises(ValueError, match="dt_init is 'one'"):
        MambaVision(dt_init="one")
    with pytest.raises(ValueError, match="out_norm_layer is 'ln'"):
        MambaVision(out_norm_layer="ln")
    with pytest.raises(ValueError, match="depths has 3 entries"):
        MambaVision(depths=(1, 1, 1))
