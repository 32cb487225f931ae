"""The benchmarks: a wrong result is never timed, a failure is told and stops nothing, figures are kept."""

import json
import re
import time
import weakref
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import runner
from benchmarks.__main__ import app
from benchmarks.cases.models import captured, check_model, in_mode
from benchmarks.checks import check_operator
from benchmarks.registry import CASES, MODES, Case, Measurement, Options
from vla.ops import _registry, selective_scan, use_backend
from vla.timing import Timing, measure, measure_latency

CPU = Options(torch.device("cpu"))
FAST = torch.device("cpu")


def command(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def case(monkeypatch):
    """Registers a case of its own for a test."""

    def register(*measurements, in_turns=False):
        monkeypatch.setitem(CASES, "own", Case(lambda options: iter(measurements), in_turns))

    return register


def fails():
    raise ValueError("does not work\nand here is why")


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_failure_is_told_and_stops_nothing(case, tmp_path, in_turns):
    case(Measurement("bad", fails), Measurement("good", lambda: lambda: None, items=4, bytes=10), in_turns=in_turns)
    told = []
    runner.run_case("own", CPU, tmp_path, bandwidth=1e9, calls=2, tell=told.append)
    content = json.loads((tmp_path / "own.json").read_text())
    bad, good = content["results"]
    assert content["results"] == told
    assert bad == {"name": "bad", "error": "ValueError: does not work"}
    assert good["floor_ms"] == pytest.approx(1e-5)
    assert good["over_floor"] == pytest.approx(good["median_ms"] / 1e-5)
    assert good["items_per_second"] == pytest.approx(4e3 / good["median_ms"])
    assert content["environment"]["packages"]["torch"] == torch.__version__


def test_figures_up_to_the_time_limit_are_kept(case, tmp_path):
    case(Measurement("quick", lambda: lambda: None), Measurement("endless", lambda: lambda: time.sleep(60)))
    start = time.perf_counter()
    output = command("run", "own", "--device", "cpu", "--output", tmp_path, "--time-limit", 6)
    assert time.perf_counter() - start < 30
    assert "stopped after 6 seconds" in output
    assert [r["name"] for r in json.loads((tmp_path / "own.json").read_text())["results"]] == ["quick"]


def test_a_lost_device_ends_the_run(case, tmp_path, monkeypatch):
    def synchronize(device):
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setattr(runner, "synchronize", synchronize)
    case(Measurement("bad", fails), Measurement("never", lambda: pytest.fail("ran on a lost device")))
    output = command("run", "own", "--device", "cpu", "--output", tmp_path, code=1)
    assert "an illegal memory access was encountered)" in output
    assert [r["name"] for r in json.loads((tmp_path / "own.json").read_text())["results"]] == ["bad"]


def test_results_compare_and_merge(case, tmp_path):
    first, second = Measurement("first", lambda: lambda: None), Measurement("second", lambda: Timing(0.5, 0.25, 1))
    case(first)
    command("run", "own", "--device", "cpu", "--output", tmp_path / "a")
    case(second)
    output = command("run", "own", "--device", "cpu", "--output", tmp_path / "b", "--compare", tmp_path / "a")
    assert "500.000" in output
    command("merge", tmp_path / "c.json", tmp_path / "a" / "own.json", tmp_path / "b" / "own.json")
    merged = json.loads((tmp_path / "c.json").read_text())["results"]
    assert [r["name"] for r in merged] == ["first", "second"] and merged[1]["fastest_ms"] == 250
    merged[1]["median_ms"] = 1000
    (tmp_path / "old.json").write_text(json.dumps(json.loads((tmp_path / "c.json").read_text()) | {"results": merged}))
    assert "2.00" in command("compare", tmp_path / "old.json", tmp_path / "c.json")
    assert "cannot read" in command("compare", tmp_path / "none.json", tmp_path / "c.json", code=2)


def test_modes_of_cases():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert Options(cpu).modes_of("eager", "graph") == ["eager"]
    assert Options(cuda).modes_of("eager", "graph") == ["eager", "graph"]
    assert Options(cuda, modes=("compiled+graph",)).modes_of("eager") == ["compiled+graph"]
    assert Options(cpu, modes=("compiled+graph", "compiled")).modes_of("eager") == ["compiled"]


def test_wrong_words_are_refused():
    assert "unknown case" in command("run", "nonsense", code=2)
    assert "unknown mode" in command("run", "--modes", "slow", code=2)
    assert "expected numbers" in command("run", "--sizes", "224,large", code=2)


@pytest.mark.parametrize("wrong", [None, "output", "gradient"])
def test_a_wrong_operator_is_found(wrong):
    torch.manual_seed(0)
    tensors = dict(
        u=torch.randn(3, 8, 20),
        delta=torch.rand(3, 8, 20),
        A=-torch.rand(8, 2),
        B=torch.randn(3, 2, 2, 20),
        C=torch.randn(3, 2, 2, 20),
    )

    class WrongGradient(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * 1.01)

    def function(u, delta, A, B, C):
        if u.dtype == torch.float64:  # the reference
            return selective_scan(u, delta, A, B, C)
        if wrong == "gradient":
            B = WrongGradient.apply(B)
        return selective_scan(u, delta, A, B, C) * (1.01 if wrong == "output" else 1)

    row, group = {0: 1, 1: 4}, {0: 1, 1: 1}
    arguments = function, tensors, {}, dict(u=row, delta=row, A={0: 4}, B=group, C=group), row
    if wrong is None:
        check_operator(*arguments)
    else:
        with pytest.raises(AssertionError, match="output" if wrong == "output" else "gradient of B"):
            check_operator(*arguments)


def test_the_clock():
    def run():
        time.sleep(0.01)

    for timing in (measure(run, FAST, calls=3), measure_latency(run, FAST, calls=3)):
        assert 0.01 <= timing.fastest <= timing.median
    assert measure(run, FAST, calls=100, seconds=0.06).calls <= 6
    assert measure_latency(run, FAST, calls=100, seconds=0).calls == 3


@pytest.mark.parametrize("mode, told", [("eager", True), ("compiled+graph", False)])
def test_memory_of_graphs_is_not_told(mode, told):
    measurement = Measurement("anything", setup=lambda: lambda: None, details={"mode": mode})
    result = runner._result(measurement, Timing(1.0, 1.0, 1, peak_memory=2**30), bandwidth=1.0)
    assert ("peak_gib" in result) == told


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA graphs; those that were made."""
    for name in ("Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(mock.Mock()) or made[-1])
    return made


def test_a_graph_keeps_what_it_reads(graphs):
    def step():
        labels = torch.ones(3)
        return labels.sum, weakref.ref(labels)

    call, labels = step()
    replay = captured(call)
    del call
    assert replay() == 3
    assert labels() is not None
    graphs[0].replay.assert_called_once()
    del replay
    assert labels() is None


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_models(mode, graphs, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or (lambda x: model(x)))
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    call = in_mode(mode, lambda network: lambda: network(x), model, FAST)
    assert torch.equal(call(), model(x))
    assert compiled == [model] * ("compiled" in mode)
    assert len(graphs) == ("graph" in mode)
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: 1.1 * model(x))
    if "compiled" in mode:
        with pytest.raises(AssertionError, match=f"^{re.escape(mode)} against eager: relative error 0.1"):
            in_mode(mode, lambda network: lambda: network(x), model, FAST)


@pytest.mark.parametrize(
    ("own", "pytorch", "passes"),
    [(1.0005, 1.0, True), (1.0015, 1.0, False), (1.0015, 1.0013, True), (1.0015, 1.0011, False), (1.003, 1.003, False)],
)
def test_a_wrong_model_is_found(own, pytorch, passes):
    """Off float64 by more than the limit of 1e-3 only where PyTorch's path is about as far off, and never by twice."""

    class Off(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(5, 3)

        def forward(self, x):
            factor = 1.0 if x.dtype == torch.float64 else pytorch if _registry._override == "torch" else own
            return factor * self.fc(x)

    for train in (False, True):
        if passes:
            check_model(Off(), torch.randn(2, 5), train)
        else:
            with pytest.raises(AssertionError, match="^logits: relative error"):
                check_model(Off(), torch.randn(2, 5), train)


OFFICIAL = {"selective_scan", "bi_wkv", "line_scan", "mixers"}
OWN = {"scan2d", "wkv6", "q_shift", "q_shift_mix"}
OWN |= {"depthwise_conv2d", "layer_norm", "layer_norm_grn", "mlp", "squared_relu"}


@pytest.mark.parametrize("name", sorted(OFFICIAL | OWN))
def test_gpu_cases_have_whole_descriptions(name, monkeypatch):
    measurements = list(CASES[name].measurements(Options(torch.device("cuda"), batch=1)))
    assert len({m.name for m in measurements}) == len(measurements) > 1
    for measurement in measurements:
        assert measurement.details["dtype"] and measurement.details["pass"] and measurement.official_ms is None
    for gpu, comparable in (("NVIDIA H200", name in OFFICIAL), ("NVIDIA H100 80GB HBM3", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        official = [m.official_ms for m in CASES[name].measurements(Options(torch.device("cuda")))]
        assert any(official) == comparable


def test_models_run_small(tmp_path):
    options = ["--device", "cpu", "--models", "vmamba_atto", "--batch", 2, "--modes", "eager", "--output", tmp_path]
    with use_backend("torch"):  # needs no compiler
        command("run", "models", "latency", *options, "--sizes", 32, "--calls", 1)
    rows = json.loads((tmp_path / "models.json").read_text())["results"]
    assert [(r["pass"], r["size"], r["batch"], r["mode"]) for r in rows] == [
        ("eval", 32, 2, "eager"),
        ("train", 32, 2, "eager"),
    ]
    with use_backend("torch"):
        output = command("run", "resolution", *options, "--sizes", "32,64", "--calls", 1)
    rows = json.loads((tmp_path / "resolution.json").read_text())["results"]
    assert f"{rows[1]['median_ms'] / rows[0]['median_ms'] / 4:.2f}" in output.split("per pixel")[1]
    assert "no figures" in command("plot", tmp_path / "models.json", code=2)
    command("plot", tmp_path / "resolution.json", "--out", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
