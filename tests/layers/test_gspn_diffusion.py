"""GSPN's generation network and text-to-image module against reference values."""

import json

import pytest
import torch

from tests import golden
from tests.models.official import Official
from tests.tolerance import assert_close
from vla.layers.gspn_diffusion import GENERATOR_SIZES, GSPNAttention, GSPNGenerator, checkpoint_filter_fn
from vla.ops import use_backend

INDEX = golden.index("gspn")
KEYS = json.loads((golden.DATA / "gspn" / "keys.json").read_text())
BACKENDS = [pytest.param(None, id="default"), pytest.param("torch", id="torch")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_generator(dtype, backend):
    case, data = INDEX["gen_model_small"], golden.load("gspn", "gen_model_small.npz")
    config = case["config"]
    model = GSPNGenerator(
        config["hidden_size"],
        config["depth"],
        patch_size=config["patch_size"],
        channels=config["channels"],
        num_classes=config["num_classes"],
        drop_path_rate=config["drop_path_rate"],
    ).eval()
    net = Official(model, checkpoint_filter_fn, case["keys"], dtype)
    latent = torch.from_numpy(golden.fill_tensor("latent:2x4x8x8", (2, 4, 8, 8))).to(dtype).requires_grad_()
    with use_backend(backend):
        y = net(latent, t=data["t"], labels=data["y"])
        (y * torch.from_numpy(golden.fill_tensor("loss", y.shape))).sum().backward()
    # The embedding of the time is float32, with a device's own sine and cosine.
    double = 1e-9 if y.device.type == "cpu" else 1e-5
    relative = double if dtype == torch.float64 else 2e-4
    assert_close("out", y, data["out"], relative)
    assert_close("d_latent", latent.grad, data["d_latent"], relative)
    norms = torch.stack([net.gradients()[key].norm() for key in case["grad_norms_order"]])
    assert_close("grad_norms", norms, data["grad_norms"], relative)


@pytest.mark.parametrize("name", [name for name in KEYS if name.startswith("gen_")])
def test_generator_sizes(name):
    _, _, size, patch = name.split("_")
    with torch.device("meta"):
        model = GSPNGenerator(**GENERATOR_SIZES[size.upper()], patch_size=int(patch))
    official = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    native = {key: value.shape for key, value in checkpoint_filter_fn(official).items()}
    assert native == {key: value.shape for key, value in model.state_dict().items()}


def small_generator(**options) -> GSPNGenerator:
    torch.manual_seed(0)
    model = GSPNGenerator(16, 2, num_classes=3, **options)
    for module in (model.out_proj, model.modulation):
        torch.nn.init.normal_(module.weight, std=0.1)
    return model.eval()


def test_generator_starts_from_zero_and_trains():
    model = GSPNGenerator(16, 2, num_classes=3)
    x, t, labels = torch.randn(2, 4, 6, 10), torch.tensor([3, 999]), torch.tensor([0, 3])
    assert (model(x, t, labels) == 0).all()
    torch.nn.init.normal_(model.out_proj.weight)
    torch.nn.init.normal_(model.modulation.weight)
    y = model(x, t, labels)
    assert y.shape == (2, 8, 6, 10)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_class_dropout_gives_the_null_class():
    model = small_generator(class_dropout=1.0, drop_path_rate=0.0)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    expected = model(x, t, torch.full((2,), 3))
    assert_close("dropped", model.train()(x, t, torch.tensor([0, 1])), expected)


def test_guidance():
    model = small_generator()
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1])
    with_class, without = model(x, t, labels), model(x, t, torch.full((2,), 3))
    assert_close("scale 1", model.forward_guided(x, t, labels, 1.0), with_class)
    guided = model.forward_guided(x, t, labels, 3.0)
    assert_close("guided", guided[:, :3], (without + 3 * (with_class - without))[:, :3])
    assert_close("rest", guided[:, 3:], with_class[:, 3:])


def test_unconditional_generator():
    model = GSPNGenerator(16, 2, num_classes=0)
    assert model(torch.randn(1, 4, 4, 4), torch.tensor([1])).shape == (1, 8, 4, 4)


@pytest.mark.parametrize(
    ("size", "labels", "message"),
    [((4, 5), torch.tensor([0]), "expected multiples of 2"), ((4, 4), None, "labels are missing, num_classes is 3")],
)
def test_generator_errors(size, labels, message):
    with pytest.raises(ValueError, match=message):
        small_generator()(torch.randn(1, 4, *size), torch.tensor([1]), labels)
    with pytest.raises(ValueError, match="depth is 3, expected an even number"):
        GSPNGenerator(16, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", INDEX["op_t2i_module"]["cases"])
def test_attention(name, dtype, backend):
    case = INDEX["op_t2i_module"]["cases"][name]
    arrays = golden.load("gspn", "op_t2i_module.npz")
    data = {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}
    module = GSPNAttention(case["dim"], mixed=not case["pure_gspn"], chunk=case["items_each_chunk"])
    assert module.scan.proxy_weight.shape[0] == case["d_state"]
    net = Official(module, checkpoint_filter_fn, case["keys"], dtype)
    x = data["x"].to(dtype).requires_grad_()
    with use_backend(backend):
        y = net(x)
        y.backward(data["cot"].to(dtype))
    exact, stored = (1e-9, 2e-7) if dtype == torch.float64 else (2e-4, 2e-4)
    assert_close("out", y, data["out"], exact)
    assert_close("d_x", x.grad, data["d_x"], exact)
    gradients = net.gradients()
    for key in case["keys"]:
        assert_close(key, gradients[key], data[f"d:{key}"], stored)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "released"])
@pytest.mark.parametrize("size", [(3, 5), (1, 7), (4, 8), (4, 4)], ids=str)
def test_attention_of_any_size(size, aligned):
    module = GSPNAttention(16, aligned=aligned)
    x = torch.randn(2, size[0] * size[1], 16, requires_grad=True)
    module(x, size).sum().backward()
    assert x.grad.isfinite().all()


def test_attention_errors():
    module = GSPNAttention(16)
    with pytest.raises(ValueError, match="x has 15 tokens, expected a square or twice a square"):
        module(torch.randn(1, 15, 16))
    with pytest.raises(ValueError, match="x has 15 tokens, expected 4 x 4"):
        module(torch.randn(1, 15, 16), (4, 4))
