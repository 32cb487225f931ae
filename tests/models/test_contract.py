"""What timm asks of every model, asked of every model registered here.

The assertions of timm's own test matrix (tests/test_models.py), and `torch.compile`, `torch.func` and `torch.export`
besides. Models of more than 60 M parameters run on the meta device, where only shapes exist, and in full with
`-m large`.
"""

import math
import pkgutil

import pytest
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules, set_scriptable
from timm.optim import param_groups_layer_decay
from torch import fx, nn
from torch.func import functional_call, grad, vmap
from torchvision.models.feature_extraction import NodePathTracer

import vla.models
from tests.tolerance import assert_close

NAMES = sorted(
    name for module in pkgutil.iter_modules(vla.models.__path__) for name in timm.list_models(module=module.name)
)
ATTO = [name for name in NAMES if name.endswith("_atto")]
# More than 60 M parameters; `test_size` holds the list to that.
LARGE = {
    "gspn_base",
    "mambavision_base",
    "mambavision_large",
    "mambavision_large2",
    "mambavision_large2_512",
    "mambavision_large3",
    "mambavision_large3_512",
    "vanilla_vmamba_base",
    "vmamba_base_m2",
    "vmamba_base_s1l20",
    "vmamba_base_s2l15",
    "vrwkv6_base",
    "vrwkv_base",
    "vrwkv_large",
}
IN_FULL = [pytest.param(name, marks=[pytest.mark.large] if name in LARGE else []) for name in NAMES]
HERE = torch.get_default_device().type
SHAPES = [pytest.param(name, HERE, marks=[pytest.mark.large] if name in LARGE else []) for name in NAMES]
SHAPES += [pytest.param(name, "meta") for name in sorted(LARGE)]


def create(name: str, device: str = HERE, **kwargs) -> nn.Module:
    with torch.device(device):
        return timm.create_model(name, **kwargs).eval()


def image(batch: int, size: int, device: str = HERE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, device=device)


def has_nan(x: torch.Tensor) -> bool:
    return not x.is_meta and bool(x.isnan().any())


def check_gradients(model: nn.Module, outputs) -> None:
    """A training step's outputs for 2 pictures and 42 classes, and a gradient for every parameter."""
    outputs = torch.cat(outputs) if isinstance(outputs, tuple) else outputs
    assert outputs.shape[-1] == 42
    outputs.mean().backward()
    assert not has_nan(outputs)
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"


@pytest.mark.parametrize(("name", "device"), SHAPES)
def test_forward(name, device):
    model = create(name, device)
    size = min(model.default_cfg["input_size"][-1], 384)
    x = image(1, size, device)
    with torch.no_grad():
        y = model(x)
    assert y.shape == (1, model.num_classes)
    assert not has_nan(y)
    model.set_grad_checkpointing()
    checkpointed = model(x)
    assert checkpointed.shape == y.shape
    assert checkpointed.is_meta or torch.allclose(checkpointed, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_FULL)
def test_backward(name):
    model = create(name, num_classes=42).train()
    check_gradients(model, model(image(2, 128)))


@pytest.mark.parametrize(("name", "device"), SHAPES)
def test_default_cfg(name, device):
    for tag in timm.list_pretrained(f"{name}.*") or [name]:
        cfg = timm.get_pretrained_cfg(tag, allow_unregistered=False)
        if max(cfg.input_size) <= 448 and cfg.num_classes > 0:
            check_default_cfg(tag, cfg, device)


def check_default_cfg(name: str, cfg, device: str) -> None:
    model = create(name, device)
    x = torch.randn(1, *cfg.input_size, device=device)
    pooled = (1, model.head_hidden_size)
    state_dict = model.state_dict()
    for module in (cfg.classifier, cfg.first_conv):
        for path in module if isinstance(module, tuple) else (module,):
            assert f"{path}.weight" in state_dict
    with torch.no_grad():
        features = model.forward_features(x)
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape[1] == model.head_hidden_size
        if features.ndim == 4:
            assert features.shape == (1, model.num_features, *cfg.pool_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == pooled
        assert model.get_classifier() is not None
        if features.ndim == 4:
            unpooled = (1, model.num_features, *cfg.pool_size)
            model.reset_classifier(0, "")
            assert model(x).shape == unpooled
            assert create(name, device, num_classes=0, global_pool="")(x).shape == unpooled
        assert create(name, device, num_classes=0)(x).shape == pooled


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("name", IN_FULL)
def test_torchscript(name):
    with set_scriptable(True):
        model = create(name)
    scripted = torch.jit.script(model)
    x = image(1, 128)
    with torch.no_grad():
        y = scripted(x)
        assert y.shape == (1, model.num_classes)
        assert not has_nan(y)
        assert torch.allclose(y, model(x), rtol=1e-4, atol=1e-5)


def check_levels(outputs: list[torch.Tensor], channels: list[int], reductions: list[int], size: int) -> None:
    assert len(outputs) == len(channels) >= 3
    for output, num_channels, reduction in zip(outputs, channels, reductions, strict=True):
        assert output.shape[1] == num_channels
        assert max(output.shape[2:]) <= math.ceil(size / reduction) + 1
        assert min(output.shape[2:]) >= size // reduction
        assert not has_nan(output)


@pytest.mark.parametrize(("name", "device"), SHAPES)
def test_features(name, device):
    model = create(name, device, features_only=True)
    with torch.no_grad():
        outputs = model(image(1, 96, device))
    check_levels(outputs, model.feature_info.channels(), model.feature_info.reduction(), 96)


@pytest.mark.parametrize(("name", "device"), SHAPES)
def test_forward_intermediates(name, device):
    model = create(name, device)
    channels = [info["num_chs"] for info in model.feature_info]
    reductions = [info["reduction"] for info in model.feature_info]
    x = image(1, 96, device)
    with torch.no_grad():
        final, outputs = model.forward_intermediates(x, output_fmt="NCHW")
        check_levels(outputs, channels, reductions, 96)
        expected = model.forward_features(x)
    assert final.shape == expected.shape
    assert final.is_meta or torch.equal(final, expected)
    model.set_grad_checkpointing()
    checkpointed, _ = model.forward_intermediates(x, output_fmt="NCHW")
    if not checkpointed.is_meta:
        assert_close("checkpointed", checkpointed, expected)


def trace(model: nn.Module) -> nn.Module:
    """The model as a torch.fx graph, traced symbolically as timm's feature extraction does."""
    tracer = NodePathTracer(
        leaf_modules=get_notrace_modules(),
        autowrap_functions=get_notrace_functions(),
        param_shapes_constant=True,
    )
    return fx.GraphModule(model, tracer.trace(model))


@pytest.mark.parametrize("name", IN_FULL)
def test_fx_forward(name):
    model = create(name)
    x = image(1, 128)
    with torch.no_grad():
        y = trace(model)(x)
        # The graph holds the modules apart that a GPU's kernels join, so that rounding differs there.
        assert_close("graph", y, model(x))
        assert x.is_cuda or torch.equal(y, model(x))


@pytest.mark.parametrize("name", IN_FULL)
def test_fx_backward(name):
    model = trace(create(name, num_classes=42).train())
    check_gradients(model, model(image(2, 128)))


@pytest.mark.parametrize("name", ATTO)
def test_narrow_weights_under_autocast(name):
    """A model in bfloat16 takes autocast's sums in float32, and trains."""
    model, x = create(name, num_classes=42), image(2, 64)
    with torch.no_grad():
        expected = model(x)
    model.bfloat16()
    with torch.autocast(HERE, torch.bfloat16):
        y = model(x.bfloat16())
    assert_close("logits", y, expected, relative=0.1)
    check_gradients(model, y)


@pytest.mark.parametrize("name", ATTO)
def test_compile(name):
    model = create(name)
    x = image(2, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    trained = torch.compile(create(name, num_classes=42).train(), fullgraph=True, backend="aot_eager")
    check_gradients(trained, trained(x))


@pytest.mark.parametrize("name", ATTO)
def test_functional_gradients(name):
    """`torch.func.grad` of a model called with its parameters gives what `backward` gives."""
    model, x = create(name), image(2, 32)

    def loss(parameters: dict) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).logsumexp(1).sum()

    loss(dict(model.named_parameters())).backward()
    grads = grad(loss)({key: parameter.detach() for key, parameter in model.named_parameters()})
    for key, parameter in model.named_parameters():
        assert torch.allclose(grads[key], parameter.grad, rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ATTO)
def test_gradients_per_picture(name):
    """`torch.vmap` of `torch.func.grad`: one gradient for each picture, which sum up to that of all."""
    model, x = create(name), image(2, 32)
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}

    def loss(parameters: dict, images: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (images,)).logsumexp(1).sum()

    each = vmap(grad(lambda parameters, picture: loss(parameters, picture[None])), (None, 0))(parameters, x)
    for key, total in grad(loss)(parameters, x).items():
        assert torch.allclose(each[key].sum(0), total, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("name", ATTO)
def test_export(name):
    model = create(name)
    x = image(2, 64)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ATTO)
def test_trace(name, tmp_path):
    """`torch.jit.trace`, as counters of operations and exporters use it, for any number of pictures."""
    model, x = create(name), image(2, 64)
    traced = torch.jit.trace(model, x)
    traced.save(tmp_path / "model.pt")
    loaded, more = torch.jit.load(tmp_path / "model.pt"), torch.cat([x, -x])
    with torch.no_grad():
        assert torch.allclose(traced(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(loaded(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTO)
@pytest.mark.parametrize("size", [(61, 75), (32, 96), (224, 160)], ids=str)
def test_any_size_and_channels(name, size):
    model = create(name, in_chans=2, num_classes=5)
    with torch.no_grad():
        y = model(torch.randn(3, 2, *size))
    assert y.shape == (3, 5)
    assert not has_nan(y)


@pytest.mark.parametrize("name", ATTO)
def test_hooks(name):
    """Whoever hooks modules, to look on or to fetch their weights from elsewhere, sees each that has some called."""
    model, x = create(name), image(2, 64)
    called = set()
    with torch.no_grad():
        expected = model(x)
        for path, module in model.named_modules():
            module.register_forward_hook(lambda *_, path=path: called.add(path))
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    assert {path.rpartition(".")[0] for path, _ in model.named_parameters()} <= called


@pytest.mark.parametrize("name", ATTO)
def test_pruned_features(name):
    """Features of early stages need none of the later ones."""
    model = create(name, features_only=True, feature_cls="getter", out_indices=(0, 1))
    full = create(name)
    with torch.no_grad():
        outputs = model(image(1, 96))
    assert [y.shape[1] for y in outputs] == model.feature_info.channels()
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize("name", ATTO)
def test_layer_groups(name):
    """Layer-wise decay finds a group for every parameter, the classifier's last."""
    model = create(name)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=model.no_weight_decay()
    )
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    classifier = list(model.get_classifier().parameters())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert all(scales[id(p)] == max(scales.values()) for p in classifier)
    assert len(set(scales.values())) > 3
    assert model.no_weight_decay() <= {parameter for parameter, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_size(name):
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    assert (size > 60e6) == (name in LARGE)
    assert size < 1e6 or name not in ATTO
