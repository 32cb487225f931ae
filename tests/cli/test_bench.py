"""`vla bench`: every figure, the mistakes, and a model that fails among others."""

import json

import pytest
import torch

from tests.cli.test_cli import complaint, run
from vla.cli import bench
from vla.ops import use_backend
from vla.timing import Timing


@pytest.fixture(autouse=True)
def no_compilation():
    """PyTorch's path of the operators, which needs no compiler."""
    with use_backend("torch"):
        yield


QUICK = ["--device", "cpu", "--img-size", 32, "--batch-size", 2, "--seconds", 0]


def test_every_figure_in_table_and_file(tmp_path):
    result = run("bench", "vmamba_atto", "test_vit", *QUICK, "--json", tmp_path / "speed.json")
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [row["model"] for row in content["results"]] == ["vmamba_atto", "test_vit"]
    for row in content["results"]:
        assert row["eval_batch"] == row["train_batch"] == 2
        for figure in ("parameters", "eval_per_second", "train_per_second", "latency_ms", "first_call_s"):
            assert row[figure] > 0, figure
        line = next(line for line in result.stdout.splitlines() if row["model"] in line)
        assert f"{row['eval_per_second']:.1f}" in line and f"{row['train_per_second']:.1f}" in line
    assert content["environment"]["packages"]["torch"] == torch.__version__
    assert content["settings"] == {"img_size": 32, "amp": "none", "channels_last": True, "compiled": False}
    assert "contiguous" in run("bench", "test_vit", *QUICK, "--no-channels-last", "--no-train").stdout


def test_mistakes_are_one_line():
    assert "did you mean" in complaint("bench", "vmamba_ato", *QUICK)
    assert "device" in complaint("bench", "test_vit", "--device", "nonsense")


def test_one_failure_leaves_the_others():
    # Nothing is left of one pixel after the first model's downsampling; the other one pads.
    result = run("bench", "test_convnext", "vmamba_atto", *QUICK, "--img-size", 1, code=1)
    assert "bench: test_convnext: " in result.stderr and result.stderr.count("\n") == 1
    assert "failed" in result.stdout and "vmamba_atto" in result.stdout


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def measure(step, device, seconds):
        if len(step()) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return Timing(1.0, 1.0, 1)

    monkeypatch.setattr(bench, "measure", measure)
    runtime = bench.Runtime.create("cpu")
    batch, _ = bench._largest(
        lambda model, images, autocast: lambda: images, torch.nn.Identity(), torch.zeros(1, 3, 4, 4), runtime, 13, 1.0
    )
    assert batch == 3
    monkeypatch.setattr(bench, "measure", lambda step, device, seconds: measure(lambda: range(4), device, seconds))
    with pytest.raises(torch.OutOfMemoryError):
        bench._largest(
            lambda model, images, autocast: None, torch.nn.Identity(), torch.zeros(1, 3, 4, 4), runtime, 2, 1.0
        )
