"""GroupMamba against reference values, through the names of the released checkpoints."""

import json
from collections import OrderedDict
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import vla  # noqa: F401
from tests import golden
from tests.models.official import Official, check
from tests.tolerance import assert_close
from vla.layers import downsample, groupmamba
from vla.layers.block import DEFAULT_NORM, run_blocks
from vla.layers.downsample import ConvDownsample
from vla.layers.groupmamba import (
    ConvMlp,
    GroupedSS2D,
    GroupMambaBlock,
    GroupMambaMixer,
    aligned_linear,
    block_diagonal,
    grouped_linear,
    normalize_wider,
)
from vla.layers.repeat import Repeated
from vla.models._hierarchical import Stage
from vla.models.groupmamba import ClassBlock, GroupMamba, ImageConv2d, Stem, checkpoint_filter_fn, convolve_blocks
from vla.ops import (
    add_layer_norm,
    conv_mlp,
    conv_mlp_add_norm,
    conv_norm_relu,
    cross_merge,
    cross_scan,
    group_modulation_add_norm,
    grouped_linear_pair_mean,
    use_backend,
)
from vla.ops.scan2d import DIRECTIONS

INDEX = golden.index("groupmamba")
KEYS = json.loads((golden.DATA / "groupmamba" / "keys.json").read_text())
PARAMETERS = {"groupmamba_tiny": 23_361_917, "groupmamba_small": 34_781_555, "groupmamba_base": 57_150_838}
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch")]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
PARTS = ("op_ss2d.npz", "op_group_mamba_layer.npz", "op_block_ffn.npz", "op_stem_down.npz")


def part(case: str) -> tuple[nn.Module, str, str]:
    """Module of a case `name_c16_..._HxW`, and its prefixes in the released model and in this one."""
    name, *options = case.split("_")
    dim = int(options[0].lstrip("cd"))
    block = ("block1.0.", "stages.0.blocks.0.")
    if name.startswith("dir"):
        mixer = GroupedSS2D(
            dim,
            directions=(DIRECTIONS[int(name.removeprefix("dir")) - 1],),
            d_state=int(options[1].removeprefix("n")),
            ssm_ratio=int(options[2].removeprefix("r")),
        )
        # The released keys know the group by its number; a single direction is the first group.
        return mixer, block[0] + "attn.mamba_g1.", block[1] + "mixer.ssm."
    if name == "layer":
        return GroupMambaMixer(dim), block[0] + "attn.", block[1] + "mixer."
    if name == "block":
        return GroupMambaBlock(dim, mlp_ratio=int(options[1].removeprefix("r"))), *block
    if name == "classblock":
        norm_layer = LayerNorm2d
        return ClassBlock(dim, int(options[1].removeprefix("r")), norm_layer), "post_network.0.", "class_block."
    if name == "dwffn":
        return ConvMlp(dim, int(options[1].removeprefix("h"))), block[0] + "mlp.", block[1] + "mlp."
    if name == "stem":
        channels, hidden, dim = (int(n) for n in options[:3])
        downsample = ConvDownsample(hidden, dim, DEFAULT_NORM, 3)
        layers = dict(stem=Stem(channels, hidden), stages=nn.Sequential(Stage(downsample, [])))
        return nn.Sequential(OrderedDict(layers)), "patch_embed1.", ""
    assert name == "down"
    return ConvDownsample(dim, int(options[1]), DEFAULT_NORM, 3), "patch_embed2.", "stages.1.downsample."


def single_tolerance(expected: torch.Tensor) -> float:
    """Relative tolerance in float32: 1e-4 of the values and 1e-4 besides, for sums that nearly cancel."""
    return 1e-4 + 1e-4 / max(expected.abs().max().item(), 1e-12)


def to_map(x: torch.Tensor, case: str) -> torch.Tensor:
    """Tokens (B, H * W, C) or a channels-last map -> (B, C, H, W)."""
    if x.dim() == 3:
        x = x.unflatten(1, [int(n) for n in case.rsplit("_", 1)[1].split("x")])
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file, case", [(file, case) for file in PARTS for case in INDEX[file]["cases"]])
def test_part(file, case, dtype, backend):
    info = INDEX[file]["cases"][case]
    data = golden.load("groupmamba", file)
    data = {key.removeprefix(case + "/"): value for key, value in data.items() if key.startswith(case + "/")}
    module, released, native = part(case)
    prefix = info["prefix"]

    def filter_fn(state_dict):
        renamed = {released + name.removeprefix(prefix): value for name, value in state_dict.items()}
        renamed = checkpoint_filter_fn(renamed, SimpleNamespace(stages=[None] * 4))
        return {name.removeprefix(native): value for name, value in renamed.items()}

    shapes = {prefix + name: shape for name, shape in info["params"].items()}
    official = Official(module.eval(), filter_fn, shapes, dtype)
    x = data["x"].to(dtype).requires_grad_()
    if case.startswith("classblock"):
        # The first token alone is used and updated.
        inputs, expected, upstream = x[:, :1, :, None].transpose(1, 2), data["out"][:, :1], data["gout"][:, :1]
        data["grad/x"] = data["grad/x"] * (torch.arange(x.shape[1]) == 0)[:, None]
    else:
        inputs, expected, upstream = x, data["out"], data["gout"]
        if not case.startswith(("stem", "down")):
            inputs = to_map(x, case)
    if case.startswith("dwffn"):
        inputs = inputs.permute(0, 2, 3, 1)
    with use_backend(backend):
        out = official(inputs)
        out = out if case.startswith("dwffn") else out.permute(0, 2, 3, 1)
        out = out.reshape(expected.shape)
        (out * upstream.to(dtype)).sum().backward()
    tolerance = single_tolerance if dtype == torch.float32 else lambda expected: None
    check("out", out, expected, tolerance(expected))
    check("grad/x", x.grad, data["grad/x"], tolerance(data["grad/x"]))
    gradients = official.gradients()
    for key, value in data.items():
        if key.startswith("grad/") and key != "grad/x":
            check(key, gradients[prefix + key.removeprefix("grad/")], value, tolerance(value))


@pytest.mark.parametrize("size", ["1x1", "1x5", "5x1", "3x5", "4x4", "7x2", "6x9"])
@pytest.mark.parametrize("k", range(4))
def test_scan_and_merge(size, k):
    """Reading along a direction and putting back are each other's adjoint, on maps of any shape."""
    data = golden.load("groupmamba", "op_scan_merge.npz")
    case = f"{size}/dir{k + 1}/"
    x = data[f"{size}/x"].requires_grad_()
    scanned = cross_scan(x, [DIRECTIONS[k]])[:, 0]
    assert torch.equal(scanned, data[case + "scanned"])
    scanned.backward(data[f"{size}/gscan"])
    assert torch.equal(x.grad, data[case + "grad_scan_true"])
    y = scanned.detach().requires_grad_()
    merged = cross_merge(y.unsqueeze(1), [DIRECTIONS[k]], *x.shape[2:]).flatten(2)
    assert torch.equal(merged, y[..., data[case + "merge_index"].long()])
    merged.backward(data[f"{size}/gmerge"])
    assert torch.equal(y.grad, data[case + "grad_merge_true"])


def build(config: dict) -> GroupMamba:
    names = {"stem_hidden_dim": "stem_dim", "embed_dims": "dims", "distillation": "distilled"}
    return GroupMamba(**{names.get(name, name): value for name, value in config.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", [file for file in INDEX if file.startswith("model_")])
def test_classifier(file, dtype, backend):
    case, data = INDEX[file], golden.load("groupmamba", file)
    model = build(case["config"])
    training = case["mode"].startswith("train")
    model.train(training)
    official = Official(model, lambda s: checkpoint_filter_fn(s, model), case["keys"], dtype)
    features, modules = {}, {"cls": model.class_block, "prelogits": model.norm, "embed1": model.stages[0].downsample}
    for i, stage in enumerate(model.stages, 1):
        modules |= {f"blocks{i}": stage.blocks, f"norm{i}": stage.norm}
        if i > 1:
            modules[f"embed{i}"] = stage.downsample
    for key, module in modules.items():
        module.register_forward_hook(lambda _, __, out, key=key: features.update({f"feat/{key}": out}))
    x = golden.image(*(case["input"][k] for k in ("batch", "height", "width"))).to(dtype).requires_grad_()
    with use_backend(backend):
        out = official(x)
        outputs = dict(zip(("logits_head", "logits_dist"), out, strict=True)) if training else {"logits": out}
        names = ("loss", "loss_dist")
        loss = sum(
            (y * torch.from_numpy(golden.fill_tensor(name, y.shape)).to(dtype)).sum()
            for name, y in zip(names, outputs.values(), strict=False)
        )
        loss.backward()

    def relative(key: str, allowed: float | None) -> float | None:
        """In float32 four times the error that the released code makes in float32: sums are ordered otherwise."""
        return None if dtype == torch.float64 else allowed or 4 * case["f32_maxdev"][key] / data[key].abs().max().item()

    for key, y in outputs.items():
        check(key, y, data[key], relative(key, None))
    for key, expected in data.items():
        if key.startswith("feat/"):
            check(key, features[key].reshape(expected.shape), expected, relative(key, 1e-4))
        elif key.startswith("buf/"):
            check(key, official.weights[key.removeprefix("buf/")], expected, relative(key, 1e-5))
        elif key.startswith("grad/"):
            name = key.removeprefix("grad/")
            check(key, x.grad if name == "x" else official.weights[name].grad, expected, relative(key, 1e-3))
    gradients = official.gradients()
    norms = torch.stack([gradients[name].norm() for name in case["param_names"]])
    check("gradient norms", norms, data["gradnorm"], relative("gradnorm", 1e-3))


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_keys(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    native = checkpoint_filter_fn({"model": {}, "model_ema": state_dict, "epoch": 299}, model)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    # Neither the order of the groups' keys nor a native state dict matters.
    reverse = checkpoint_filter_fn(dict(reversed(state_dict.items())), model)
    assert reverse.keys() == native.keys()
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == native.keys()


def test_order_of_keys_is_free():
    model = build(INDEX["model_sq64.npz"]["config"])
    weights = golden.fill_state_dict(INDEX["model_sq64.npz"]["keys"])
    native = checkpoint_filter_fn(weights, model)
    for key, value in checkpoint_filter_fn(dict(reversed(weights.items())), model).items():
        assert torch.equal(value, native[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", [file for file in INDEX if file.startswith("full_")])
def test_full_size(file, dtype):
    case, data = INDEX[file], golden.load("groupmamba", file)
    model = timm.create_model(case["variant"]).eval()
    weights = golden.fill_state_dict(KEYS[case["variant"]])
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    model.to(dtype)
    with torch.no_grad():
        features = model.forward_features(golden.image(1, 224, 224).to(dtype))
        outputs = {"logits": model.forward_head(features), "prelogits": model.forward_head(features, pre_logits=True)}
        model.train()
        outputs["head"], outputs["dist_head"] = model.forward_head(features)
    for key, y in outputs.items():
        relative = None if dtype == torch.float64 else 4 * case["f32_maxdev"] / data[key].abs().max().item()
        check(key, y, data[key], relative)


def test_distilled_heads():
    model = build(INDEX["model_sq64.npz"]["config"])
    x = torch.randn(2, 3, 32, 32)
    model.stem.eval()
    logits, logits_dist = model(x)
    assert not torch.equal(logits, logits_dist)
    model.train(False)
    assert_close("mean", model(x), (logits + logits_dist) / 2)
    model.train()
    model.set_distilled_training(False)
    assert model(x).shape == (2, 10)
    assert len(model.get_classifier()) == 2
    model.reset_classifier(4)
    model.set_distilled_training()
    assert [y.shape for y in model(x)] == [(2, 4), (2, 4)]
    single = GroupMamba(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), distilled=False, num_classes=3)
    assert single(x).shape == (2, 3) and isinstance(single.get_classifier(), nn.Linear)


def test_initial_weights():
    torch.manual_seed(0)
    model = GroupMamba(num_classes=10)
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            assert (p == 0).all(), name
        elif name.endswith("dt_proj_bias"):
            dt = nn.functional.softplus(p)
            assert dt.min() >= 9e-4 and dt.max() <= 0.11, name
        elif name.endswith(("dt_proj_weight", "x_proj_weight")):
            bound = p.shape[-1] ** -0.5
            assert 0.8 * bound < p.abs().max() <= bound, name
        elif name.endswith((".D", "skip_scale")) or "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif "conv" in name:
            module = model.get_submodule(name.removesuffix(".weight"))
            fan_out = p[0, 0].numel() * module.out_channels // module.groups
            assert p.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name


def test_weight_decay_as_released():
    """The released recipe decays 688 of the tiny model's tensors and spares 569, in the released layout."""
    model = timm.create_model("groupmamba_tiny")
    spared = model.no_weight_decay()
    assert spared <= {name for name, _ in model.named_parameters()}
    decayed = {
        name: p for name, p in model.named_parameters() if not (p.ndim <= 1 or name.endswith(".bias") or name in spared)
    }
    released = {name: torch.zeros(shape) for name, shape in KEYS["groupmamba_tiny"].items()}
    parameters = {name for name in released if not name.endswith(("running_mean", "running_var", "tracked"))}
    expected = {name for name in parameters if released[name].ndim > 1 and not name.endswith(".bias")}
    assert (len(expected), len(parameters) - len(expected)) == (688, 569)
    assert sum(p.numel() for p in decayed.values()) == sum(released[name].numel() for name in expected)


@pytest.mark.parametrize("shape", [(2, 20, 7, 5), (1, 12, 1, 1), (0, 16, 4, 4), (1, 8, 2, 9)])
def test_plug_in_block(shape):
    block = GroupMambaBlock(shape[1], mlp_ratio=2.5, drop_path=0.1, layer_scale=1.0, d_state=2, ssm_ratio=2.0)
    x = torch.randn(shape)
    y = block(x)
    assert y.shape == x.shape and y.isfinite().all()
    block.eval()
    assert_close("channels last", block(x.contiguous(memory_format=torch.channels_last)), block(x))
    assert_close("script", torch.jit.script(block)(x), block(x))
    assert GroupMambaBlock(shape[1], mlp_ratio=0)(x).shape == x.shape


def test_groups_do_not_mix():
    """Each quarter of the output depends on the same quarter of the input, along its direction only."""
    mixer = GroupedSS2D(16).eval()
    mixer.conv = nn.Identity()
    x = torch.randn(1, 16, 3, 4, requires_grad=True)
    for k, seen in enumerate(
        # What the pixel in row 1, column 2 can see.
        (
            lambda row, column: (row, column) <= (1, 2),
            lambda row, column: (column, row) <= (2, 1),
            lambda row, column: (row, column) >= (1, 2),
            lambda row, column: (column, row) >= (2, 1),
        )
    ):
        (grad,) = torch.autograd.grad(mixer(x)[0, 4 * k : 4 * k + 4, 1, 2].abs().sum(), x)
        visible = torch.tensor([[seen(row, column) for column in range(4)] for row in range(3)])
        assert torch.equal(grad[0, 4 * k : 4 * k + 4].abs().sum(0) > 0, visible)
        grad[0, 4 * k : 4 * k + 4] = 0
        assert (grad == 0).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="dim is 18"):
        GroupMambaBlock(18)
    with pytest.raises(ValueError, match="dims, depths and mlp_ratios have 3, 4 and 4 entries"):
        GroupMamba(dims=(16, 16, 16))
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        GroupMamba(global_pool="max")
    with pytest.raises(ValueError, match="global_pool is '' with 1000 classes"):
        GroupMamba(global_pool="")


def test_grouped_linear_as_one_matrix():
    """How GPUs compute it."""
    x, *weights = (torch.randn(size, dtype=torch.float64) for size in ((2, 12, 5, 3), (4, 2, 3), (4, 2, 3)))
    expected = torch.cat(grouped_linear(x, weights), dim=1)
    assert_close("output", torch.einsum("bchw,oc->bohw", x, block_diagonal(weights)), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_first_convolution_of_blocks(channels):
    """How GPUs compute the stem's first layer."""
    x, weight = torch.randn(2, channels, 10, 16), torch.randn(5, channels, 7, 7)
    results = []
    for function in (
        lambda x, weight: convolve_blocks(x, weight, x.dtype),
        lambda x, weight: nn.functional.conv2d(x, weight, stride=2, padding=3),
    ):
        leaves = [t.double().requires_grad_() for t in (x, weight)]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_close("convolution", actual, expected)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_stem_in_one_pass(monkeypatch):
    """How GPUs evaluate the stem."""
    stem, x = Stem(3, 16).double().eval(), torch.randn(2, 3, 16, 24, dtype=torch.float64)
    for norm in (stem.norm1, stem.norm2, stem.norm3):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    with torch.no_grad():
        expected = stem(x)
        monkeypatch.setattr("vla.models.groupmamba.is_worth_launches", lambda x: True)
        monkeypatch.setattr("vla.models.groupmamba.dtype_of_inference", lambda x: x.dtype)
        calls = Mock(side_effect=conv_norm_relu)
        monkeypatch.setattr("vla.ops.conv_norm_relu", calls)
        assert_close("stem", stem(x), expected)
        assert calls.call_count == 3
        # Others wait for the modules' own calls.
        stem.norm2.register_forward_hook(lambda module, args, y: None)
        assert_close("stem", stem(x), expected)
        assert calls.call_count == 5


@pytest.mark.parametrize(
    "name", [None, "downsample.conv", "downsample.norm", "blocks.0.mixer.norm", "blocks.0", "blocks"]
)
@torch.no_grad()
def test_downsampling_with_the_first_norm(monkeypatch, name):
    """In compiled graphs of GPUs it is the operator of the convolution that a stage's first block has its norm from."""
    stage = Stage(ConvDownsample(16, 32, DEFAULT_NORM, 3), [GroupMambaBlock(32) for _ in range(2)]).double().eval()
    x, seen, graphs = torch.randn(2, 16, 9, 6, dtype=torch.float64), [], []
    randomize_vectors(stage.parameters())
    if name is not None:
        stage.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    expected = stage(x)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(downsample, "takes_narrow_kernels", lambda x: True)
    torch._dynamo.reset()
    assert_close("output", torch.compile(stage, fullgraph=True, backend=backend)(x), expected)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.vla.conv_layer_norm.default]
    is_hooked = name is not None and name.startswith("downsample")
    assert [node.args[5] is not None for node in calls] == ([] if is_hooked else [name is None])


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="needs PyTorch 2.7")
def test_first_convolution_is_exported_for_all_sizes(monkeypatch):
    monkeypatch.setattr("vla.models.groupmamba.is_worth_launches", lambda x: True)
    layer, sizes = ImageConv2d(3, 5), {2: Dim("height", min=8, max=64), 3: Dim("width", min=8, max=64)}
    exported = torch.export.export(layer, (torch.randn(2, 3, 16, 16),), dynamic_shapes=(sizes,)).module()
    x = torch.randn(2, 3, 19, 22)
    assert_close("convolution", exported(x), nn.functional.conv2d(x, layer.weight, stride=2, padding=3))


def test_first_convolution_is_compiled_of_blocks(monkeypatch):
    monkeypatch.setattr("vla.models.groupmamba.is_worth_launches", lambda x: True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    layer, x = ImageConv2d(3, 5), torch.randn(2, 3, 16, 16)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert_close("convolution", y, nn.functional.conv2d(x, layer.weight, stride=2, padding=3))
    assert "padding = (0, 1)" in graphs[0]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("features", [(8, 16), (16, 8), (12, 12), (12, 20), (21, 5), (3, 29)])
def test_aligned_linear(features, bias, trained):
    """How GPUs compute a linear layer: values and gradients are those of PyTorch's."""
    tensors = [torch.randn(size, dtype=torch.float64) for size in ((2, 3, features[0]), features[::-1])]
    tensors += [torch.randn(features[1], dtype=torch.float64)] if bias else []
    with torch.set_grad_enabled(trained):
        results = []
        for function in (aligned_linear, nn.functional.linear):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = function(*leaves)
            results.append([y, *(torch.autograd.grad(y.square().sum(), leaves) if trained else ())])
    for actual, expected in zip(*results, strict=True):
        assert_close("linear", actual, expected)


@pytest.mark.parametrize("count, zeros", [(1, 0), (2, 0), (2, 3)])
def test_block_diagonal(count, zeros):
    """One product with the matrix is those of all groups, with zeros behind each of the results."""
    weights = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(count)]
    x = torch.randn(7, 12, dtype=torch.float64)
    y = (x @ block_diagonal(weights, zeros).T).view(7, count, 15 + zeros)
    expected = [torch.einsum("bki,koi->bko", x.view(7, 3, 4), weight).flatten(1) for weight in weights]
    assert_close("products", y[:, :, :15], torch.stack(expected, 1))
    assert (y[:, :, 15:] == 0).all()


def test_bias_of_rows_that_a_compiler_pads(monkeypatch):
    """Rows of the result are as long as the compiler has them, so that the bias is part of the product."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, weight, bias = torch.randn(5, 8), torch.randn(1032, 8), torch.randn(1032)
    with torch.no_grad():
        y = aligned_linear(x, weight, bias)
    assert y.stride() == (1088, 1)
    assert_close("linear", y, nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dim", [16, 20])
def test_modulation_in_one_pass(monkeypatch, dim):
    """How GPUs compute the end of a wide mixer, with and without columns for alignment."""
    mixer, x = GroupMambaMixer(dim).double(), torch.randn(2, dim, 4, 3, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(mixer.proj.bias)
    leaves = [x, *mixer.parameters()]
    expected = torch.autograd.grad(mixer(x).square().sum(), leaves)
    for aligned in (False, True):
        monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
        monkeypatch.setattr(groupmamba, "is_worth_launches", lambda x, aligned=aligned: aligned)
        monkeypatch.setattr(groupmamba, "linear", aligned_linear if aligned else nn.functional.linear)
        monkeypatch.setattr(GroupMambaMixer, "ends_at_once", lambda self, y, n: False)
        actual = torch.autograd.grad(mixer(x).square().sum(), leaves)
        for grad, other in zip(actual, expected, strict=True):
            assert_close("gradient", grad, other)


def test_recomputed(monkeypatch):
    """What the backward computes anew gives the gradients of what is kept."""
    block = GroupMambaBlock(16).double()
    x = torch.randn(2, 16, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    calls = []

    def recomputed(function, *maps, is_random=False):
        calls.append(function.__name__)
        return checkpoint(function, *maps, use_reentrant=False, preserve_rng_state=is_random)

    monkeypatch.setattr(groupmamba, "recomputed", recomputed)
    actual = torch.autograd.grad(block(x).square().sum(), leaves)
    assert calls == ["close_and_modulate", "contract"]
    for grad, other in zip(actual, expected, strict=True):
        assert_close("gradient", grad, other)


def test_hooks_of_the_mixer():
    """A block applies its mixer's norm itself, unless someone waits for what goes into the mixer."""
    block, x = GroupMambaBlock(8), torch.randn(2, 8, 3, 5)
    expected, seen = block(x), []
    block.mixer.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    assert_close("value", block(x), expected)
    assert len(seen) == 1 and torch.equal(seen[0], x)


@pytest.mark.parametrize(
    "name", ["ssm", "ssm.in_proj", "ssm.gate_proj", "ssm.out_norm", "ssm.out_proj", "norm", "proj", "fc1", "fc2"]
)
def test_hooks(name):
    """Every module inside the mixer is called where somebody waits for that."""
    mixer, x, seen = GroupMambaMixer(16), torch.randn(2, 16, 4, 3), []
    expected = mixer(x)
    mixer.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close("output", mixer(x), expected)
    assert seen


def drop_every_second(x, rate, training=True, scale_by_keep=True):
    factors = torch.tensor([2, 0], dtype=x.dtype).view(2, *(1 for _ in x.shape[1:]))
    return x * factors


def write_columns(monkeypatch, dim: int) -> list:
    """Has blocks computed as on GPUs in compiled graphs, and returns a list of widths of maps to be multiplied."""
    seen = []

    def aligned(x, weight, bias=None):
        if x.shape[-1] >= dim:
            seen.append(x.shape[-1])
        return aligned_linear(x, weight, bias)

    def grouped(x, weights):
        parts = aligned(x.permute(0, 2, 3, 1), block_diagonal(weights)).chunk(len(weights), dim=-1)
        return [part.permute(0, 3, 1, 2) for part in parts]

    monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
    monkeypatch.setattr(groupmamba, "is_worth_launches", lambda x: True)
    monkeypatch.setattr(groupmamba, "writes_columns", lambda x: True)
    monkeypatch.setattr(groupmamba, "TOGETHER", 0)
    monkeypatch.setattr(groupmamba, "linear", aligned)
    monkeypatch.setattr(groupmamba, "grouped_linear", grouped)
    monkeypatch.setattr(GroupMambaMixer, "ends_at_once", lambda self, y, n: False)
    return seen


def randomize_vectors(leaves) -> None:
    for leaf in leaves:
        if leaf.dim() == 1:
            nn.init.normal_(leaf)


@pytest.mark.parametrize("dim, wide", [(12, (16, 16, 16)), (16, (16, 16, 24))])
def test_norms_write_columns(monkeypatch, dim, wide):
    """How GPUs compute a training step of blocks: with columns for alignment, and for the bias of the first layer.

    Stochastic depth leaves out half of the pictures, or has them twice.
    """
    monkeypatch.setattr("timm.layers.drop.drop_path", drop_every_second)
    blocks = nn.Sequential(*(GroupMambaBlock(dim, drop_path=0.5) for _ in range(2))).double()
    x = torch.randn(2, dim, 4, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *blocks.parameters()]
    randomize_vectors(leaves)
    expected = torch.autograd.grad(blocks(x).square().sum(), leaves)
    seen = write_columns(monkeypatch, dim)
    y = run_blocks(blocks, x)
    # Gate, both projections in front of the scan, time steps, the end of the scan and of the mixer, the MLP.
    assert seen == 2 * [dim, wide[0], wide[0], wide[0], wide[1], wide[2], 4 * dim]
    actual = torch.autograd.grad(y.square().sum(), leaves)
    for grad, other in zip(actual, expected, strict=True):
        assert_close("gradient", grad, other)


@pytest.mark.parametrize("name", ["norm", "proj"])
def test_one_pass_is_for_plain_modules(monkeypatch, name):
    """Modulation leaves norm and projection to adapters and whoever waits for their calls."""
    mixer, x, seen = GroupMambaMixer(16), torch.randn(2, 16, 4, 3), []
    monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
    mixer.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    mixer(x)
    assert seen


@pytest.mark.parametrize("name", ["ssm.out_norm", "ssm.out_proj", "norm", "proj"])
def test_one_kernel_is_for_plain_modules(name):
    """A low-rank adapter, a quantised layer or the like is called in inference too."""
    mixer = GroupMambaMixer(16)
    module = mixer.get_submodule(name)
    with FakeTensorMode(), torch.no_grad():
        y = torch.empty(2, 16, 4, 3, dtype=torch.bfloat16, device="cuda")
        assert mixer.ends_at_once(y, y)
        module.__class__ = type("Adapted", (type(module),), {})
        assert not mixer.ends_at_once(y, y)


@pytest.mark.parametrize("name", [None, "ssm.in_proj", "ssm.gate_proj", "ssm", "fc1"])
@torch.no_grad()
def test_means_of_projections(monkeypatch, name):
    """GPUs have the gate's means from the projections of narrow groups, if nobody waits for these."""
    mixer, x = GroupMambaMixer(16).double(), torch.randn(2, 16, 4, 3, dtype=torch.float64)
    expected, calls, seen = mixer(x), [], []

    def called(*args):
        calls.append(args)
        return grouped_linear_pair_mean(*args)

    monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
    monkeypatch.setattr(groupmamba.ops, "grouped_linear_pair_mean", called)
    if name is not None:
        mixer.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close("output", mixer(x), expected)
    assert len(calls) == (name in (None, "fc1")) and len(seen) == (name is not None)
    with torch.enable_grad():
        assert_close("output with gradients", mixer(x), expected)
    assert len(calls) == (name in (None, "fc1"))


def test_mlp_at_once(monkeypatch):
    """How GPUs evaluate the MLP of a large map."""
    mlp, x = ConvMlp(16, 40).double().eval(), torch.randn(2, 5, 6, 16, dtype=torch.float64)
    calls = []

    def called(*args):
        calls.append(args)
        return conv_mlp(*args)

    with torch.no_grad():
        expected = mlp(x)
        monkeypatch.setattr(groupmamba, "infers", lambda x: True)
        monkeypatch.setattr(groupmamba, "BUSY", 1)
        monkeypatch.setattr(groupmamba.ops, "conv_mlp", called)
        assert_close("output", mlp(x), expected)
    assert len(calls) == 1


def blocks_at_once(monkeypatch) -> tuple[nn.Sequential, torch.Tensor, list]:
    """Blocks whose MLPs are evaluated as large maps' on GPUs, such a map, and a list of the operator's calls to be."""
    blocks = nn.Sequential(*(GroupMambaBlock(16, mlp_ratio=2.0) for _ in range(3))).double().eval()
    calls = []

    def called(*args):
        calls.append(args)
        return conv_mlp_add_norm(*args)

    monkeypatch.setattr(groupmamba, "BUSY", 1)
    monkeypatch.setattr(groupmamba, "infers", lambda x: True)
    monkeypatch.setattr(groupmamba, "takes_narrow_kernels", lambda x: True)
    monkeypatch.setattr(groupmamba.ops, "conv_mlp_add_norm", called)
    # As for large maps; a GPU repeats blocks for small ones.
    monkeypatch.setattr(Repeated, "LIMIT", 0)
    randomize_vectors(blocks.parameters())
    return blocks, torch.randn(2, 16, 5, 6, dtype=torch.float64), calls


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mlps_add_and_norm(monkeypatch, compiled):
    """All but the last one do what the next block begins with."""
    blocks, x, calls = blocks_at_once(monkeypatch)
    with torch.no_grad():
        expected = blocks(x)
        run = torch.compile(run_blocks, fullgraph=True, backend="aot_eager") if compiled else run_blocks
        assert_close("output", run(blocks, x), expected)
    if not compiled:
        assert len(calls) == 2
        # The first half's sum, which there is already, is all that is added to; and the stream goes on.
        assert all(args[10] is None and args[13] for args in calls)


@torch.no_grad()
def test_last_mlp_norms_for_the_stage(monkeypatch):
    """Whose sum nobody needs."""
    blocks, x, calls = blocks_at_once(monkeypatch)
    norm = DEFAULT_NORM(16).double()
    nn.init.normal_(norm.weight)
    stage = Stage(nn.Identity(), list(blocks), norm)
    assert_close("output", stage(x), norm(blocks(x)))
    assert [args[13] for args in calls] == [True, True, False]
    seen = []
    norm.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.equal(stage(x), seen[0]) and len(calls) == 5


def test_mlps_add_and_norm_in_compiled_graphs(monkeypatch):
    """Both summands of the first half, so that nobody writes their sum."""
    blocks, x, _ = blocks_at_once(monkeypatch)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(run_blocks, fullgraph=True, backend=backend)(blocks, x)
    operators = [node for node in graphs[0].graph.nodes if node.target is torch.ops.vla.conv_mlp.default]
    assert [node.args[8] is not None for node in operators] == [True, True, False]


@pytest.mark.parametrize(
    "name", ["0.drop_path1", "0.ls2", "0.drop_path2", "0.mlp", "0.mlp.drop2", "1.mixer", "1.norm1", "1.mixer.norm", "1"]
)
@torch.no_grad()
def test_mlps_add_and_norm_for_plain_modules(monkeypatch, name):
    """Whoever waits for a module that is left out, or took its place, is heard."""
    blocks, x, calls = blocks_at_once(monkeypatch)
    expected, seen = blocks(x), []
    handle = blocks.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close("output", run_blocks(blocks, x), expected)
    assert seen and len(calls) == (0 if name == "1" else 1)
    calls.clear()
    handle.remove()
    run_blocks(blocks, x)
    assert len(calls) == 2


@torch.no_grad()
def test_mlps_that_do_not_add(monkeypatch):
    """Stochastic depth and learned scales are between MLP and sum, and there may be no MLP."""
    blocks, x, calls = blocks_at_once(monkeypatch)
    others = [GroupMambaBlock(16, drop_path=0.5), GroupMambaBlock(16, layer_scale=0.1).eval()]
    for block in (*others, GroupMambaBlock(16, mlp_ratio=0.0)):
        run_blocks(nn.Sequential(block.double(), blocks[1]), x)
    assert calls == []


def blocks_that_add_last(monkeypatch, dim: int) -> tuple[nn.Sequential, nn.Module, torch.Tensor, torch.Tensor, list]:
    """Wide blocks as compiled graphs evaluate them, a norm behind them, a map, and what comes of that.

    Of every addition the number of columns, whether there are two branches, and whether the sum is written, will be in
    a list.
    """
    blocks = nn.Sequential(*(GroupMambaBlock(dim, drop_path=0.5) for _ in range(3))).double().eval()
    norm, x = DEFAULT_NORM(dim).double(), torch.randn(2, dim, 4, 3, dtype=torch.float64)
    randomize_vectors([*blocks.parameters(), *norm.parameters()])
    expected, calls = norm(blocks(x)), []

    def called(*args, columns=0, second=None, with_sum=True, **kwargs):
        calls.append((columns, second is not None, with_sum))
        return add_layer_norm(*args, columns=columns, second=second, with_sum=with_sum, **kwargs)

    monkeypatch.setattr(groupmamba, "FEW_CHANNELS", 0)
    monkeypatch.setattr(groupmamba, "takes_narrow_kernels", lambda x: True)
    monkeypatch.setattr(groupmamba.ops, "add_layer_norm", called)
    monkeypatch.setattr(Repeated, "LIMIT", 0)
    write_columns(monkeypatch, dim)
    return blocks, norm, x, expected, calls


@pytest.mark.parametrize("dim, columns", [(12, 4), (16, 0)])
@torch.no_grad()
def test_halves_without_a_sum(monkeypatch, dim, columns):
    """A block's first norm leaves both summands to the second one, which is that of the next block or of the stage."""
    blocks, norm, x, expected, calls = blocks_that_add_last(monkeypatch, dim)
    assert_close("output", run_blocks(blocks, x, norm), expected)
    assert calls == [
        *(2 * [(columns, False, False), (columns, True, True)]),
        (columns, False, False),
        (0, True, False),
    ]
    torch._dynamo.reset()  # or channels would be a size that varies, as those of other tests' blocks are others
    compiled = torch.compile(run_blocks, fullgraph=True, backend="aot_eager")
    assert_close("compiled", compiled(blocks, x, norm), expected)
    # Without a norm behind it, the last block writes all of its sums.
    calls.clear()
    assert_close("without a norm", norm(run_blocks(blocks, x)), expected)
    assert [call for call in calls if call[1]] == 2 * [(columns, True, True)]


@pytest.mark.parametrize(
    "name", ["0.norm2", "0.drop_path1", "0.ls2", "0.drop_path2", "0.mlp", "0.mlp.fc1", "1.mixer", "1.mixer.norm", "1"]
)
@torch.no_grad()
def test_halves_without_a_sum_of_plain_modules(monkeypatch, name):
    """Whoever waits for a module that is left out is heard."""
    blocks, norm, x, expected, calls = blocks_that_add_last(monkeypatch, 12)
    seen = []
    blocks.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close("output", run_blocks(blocks, x, norm), expected)
    assert seen and sum(second for _, second, _ in calls) == (1 if name == "1" else 2)


@torch.no_grad()
def test_wide_norms_dtype():
    """Autocast's, but that of a sum where a sum follows."""
    x, branch = torch.randn(1, 12, 2, 3), torch.randn(1, 12, 2, 3).bfloat16()
    for norm, dtype in ((DEFAULT_NORM(12), torch.float32), (DEFAULT_NORM(12, narrow=True), torch.bfloat16)):
        with torch.autocast(x.device.type, torch.bfloat16):
            total, y = normalize_wider(norm, x, branch, 4, second=branch)
        assert total.dtype is torch.float32 and y.dtype is dtype
        assert torch.equal(total, x + branch + branch) and y.shape == (1, 16, 2, 3)


@pytest.mark.parametrize(
    "name", [None, "0.norm2", "0.ls1", "0.mixer", "0.mixer.norm", "0.mixer.proj", "0.mixer.ssm.out_norm"]
)
@torch.no_grad()
def test_mixers_norm_for_the_mlp(monkeypatch, name):
    """One operator ends the mixer and norms its sum with the stream, unless somebody waits for a module in it."""
    blocks, x, calls = blocks_at_once(monkeypatch)
    expected, seen, ends = blocks(x), [], []

    def called(*args, **kwargs):
        ends.append(args)
        return group_modulation_add_norm(*args, **kwargs)

    monkeypatch.setattr(groupmamba, "is_narrow", lambda x: True)
    monkeypatch.setattr(groupmamba.ops, "group_modulation_add_norm", called)
    if name is not None:
        blocks.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close("output", run_blocks(blocks, x), expected)
    assert len(calls) == 2 and len(ends) == (2 if name is None else 1)
    assert name is None or seen
    # The MLP adds both the stream and the branch, whose sum has not been written.
    assert all(args[8] is not None for args in calls[name is not None :])


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="compares bits of the CPU's convolutions")
@torch.no_grad()
def test_norms_between_stages_are_narrow():
    """Convolutions follow, which under autocast would round the same numbers."""
    model, x = timm.create_model("groupmamba_atto").eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = model(x), model.forward_intermediates(x, intermediates_only=True)
        *others, _ = model.stages
        for stage in others:
            stage.norm.narrow = False
        assert torch.equal(model(x), logits)
    assert [f.dtype for f in features] == 3 * [torch.bfloat16] + [torch.float32]


@pytest.mark.parametrize("name", ["fc1", "conv", "conv.act", "drop1", "fc2"])
def test_one_operator_is_of_plain_modules(name):
    """Whatever took a module's place is called, and so is a module that somebody waits for."""
    mlp = ConvMlp(16, 512).eval()
    module = mlp.get_submodule(name)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(16, 32, 32, 16, dtype=torch.bfloat16, device="cuda")
        assert mlp.runs_at_once(x)
        handle = module.register_forward_hook(lambda module, args, y: None)
        assert not mlp.runs_at_once(x)
        handle.remove()
        module.__class__ = type("Adapted", (type(module),), {})
        assert not mlp.runs_at_once(x)
        parent, _, leaf = name.rpartition(".")
        setattr(mlp.get_submodule(parent), leaf, nn.Sequential(module))
        assert not mlp.runs_at_once(x)


def test_one_operator_of_what_else():
    """Gradients, dropout, other activations, small maps and many features have no such kernel."""
    with FakeTensorMode():
        x = torch.empty(16, 32, 32, 16, dtype=torch.bfloat16, device="cuda")
        small = torch.empty(4, 32, 32, 16, dtype=torch.bfloat16, device="cuda")
        wide = torch.empty(16, 32, 32, 16, device="cuda")
        assert not ConvMlp(16, 512).eval().runs_at_once(x)
        with torch.no_grad():
            assert ConvMlp(16, 512).eval().runs_at_once(x)
            assert not ConvMlp(16, 512).runs_at_once(x)
            assert not ConvMlp(16, 512, nn.SiLU).eval().runs_at_once(x)
            many = torch.empty(16, 32, 32, 348, dtype=torch.bfloat16, device="cuda")
            assert not ConvMlp(348, 512).eval().runs_at_once(many)
            assert not ConvMlp(16, 512).eval().runs_at_once(small)
            assert not ConvMlp(16, 512).eval().runs_at_once(wide)
