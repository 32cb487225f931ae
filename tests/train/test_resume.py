"""An interrupted run that goes on ends with the same bits as an undisturbed one."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from vla.errors import UserError
from vla.train import Reporter, RunFolder, TrainConfig, train

BASE = {"model": "test_vit", "img_size": 32, "batch_size": 6, "epochs": 3, "save_steps": 2, "device": "cpu"}
VARIANTS = {
    "plain": {},
    "batch norm": {"model": "test_resnet", "opt": "sgd", "opt_kwargs": {"nesterov": True}},
    "everything random": {
        "ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "drop_path": 0.2, "drop": 0.2, "clip_grad": 1.0,
        "auto_augment": "rand-m9-mstd0.5-inc1", "grad_accum": 2, "save_steps": 1, "batch_size": 4, "workers": 2,
    },
    "linear attention": {"model": "vmamba_atto", "ema": 0.99, "drop_path": 0.1, "epochs": 2},
}  # fmt: skip


class Interrupted(Exception):
    pass


class StopAfter(Reporter):
    def __init__(self, step):
        self.last = step

    def step(self, step, loss, images):
        if step == self.last:
            raise Interrupted


def weights(run):
    return torch.load(run.state_file, weights_only=True)


def rows(run):
    """Metrics without what depends on the clock."""
    read = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read]


def assert_same_run(run, reference):
    assert run.weights_file.read_bytes() == reference.weights_file.read_bytes()
    assert rows(run) == rows(reference)
    ours, theirs = weights(run), weights(reference)
    for part in ("model", "ema"):
        assert (ours[part] is None) == (theirs[part] is None)
        for name in theirs[part] or ():
            assert torch.equal(ours[part][name], theirs[part][name])
    for index, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert value is None or torch.equal(ours["optimizer"]["state"][index][name], value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interruptions_leave_no_trace(folder, tmp_path, variant):
    config = TrainConfig.create(BASE | {"data": str(folder)} | VARIANTS[variant])
    reference = train(config, tmp_path / "reference")
    # Before the first save, right after one, between two, in the last update of an epoch, and in a later epoch.
    for step in (1, 2, 3, 6, 9):
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", resume=True, reporter=StopAfter(step))
    run = train(config, tmp_path / "run", resume=True)
    assert_same_run(run, reference)
    # Going on with a finished run changes nothing.
    assert_same_run(train(config, tmp_path / "run", resume=True), reference)


def vla(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "vla", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_kill_at_any_moment(folder, tmp_path):
    """SIGKILL, while the state is written after every single update."""
    command = ["train", "--model", "test_vit", "--data", folder, "--img-size", 32, "--batch-size", 6, "--epochs", 30]
    command += ["--save-steps", 1, "--ema", 0.9, "--mixup", 0.2, "--workers", 1, "--device", "cpu"]
    undisturbed = vla(*command, "--out", tmp_path / "reference")

    run = RunFolder(tmp_path / "run")
    moments = random.Random(0)
    killed_at = []
    for _ in range(3):
        process = vla(*command, "--out", run.path, "--resume", start_new_session=True)
        before = run.state_file.stat().st_mtime_ns if run.state_file.exists() else 0
        while process.poll() is None and (not run.state_file.exists() or run.state_file.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        # The whole group: a killed parent's loader workers must not outlive the test.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        killed_at.append(weights(run)["step"])
    assert killed_at == sorted(set(killed_at)) and killed_at[-1] < 180
    for process in (undisturbed, vla(*command, "--out", run.path, "--resume")):
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    assert_same_run(run, RunFolder(tmp_path / "reference"))
    assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_full_disk_keeps_the_last_state(folder, tmp_path):
    config = TrainConfig.create(BASE | {"data": str(folder)})
    reference = train(config, tmp_path / "reference")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", resume=True, reporter=StopAfter(5))
    before = (tmp_path / "run/state.pt").read_bytes()

    # A limit on the size of a file fails the same system call as a full disk.
    process = vla(
        "train", "--out", tmp_path / "run", "--resume",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if "state.pt" in line] == [
        f"vla: cannot write {tmp_path}/run/state.pt: File too large; the file is as it was before"
    ]
    assert "Traceback" not in errors
    assert (tmp_path / "run/state.pt").read_bytes() == before
    assert_same_run(train(config, tmp_path / "run", resume=True), reference)


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_damaged_state_is_one_line(folder, tmp_path, size):
    config = TrainConfig.create(BASE | {"data": str(folder), "epochs": 1})
    run = train(config, tmp_path / "run")
    run.state_file.write_bytes(run.state_file.read_bytes()[:size])
    with pytest.raises(UserError, match="state.pt is damaged") as error:
        train(config, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_changed_data_is_noticed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    config = TrainConfig.create(BASE | {"data": str(tmp_path / "data"), "epochs": 1})
    train(config, tmp_path / "run")
    (tmp_path / "data/train/red/0.png").unlink()
    with pytest.raises(UserError, match="are not those that the run began with"):
        train(config, tmp_path / "run", resume=True)


def test_two_processes_train_as_one(folder, tmp_path):
    """Two processes with half the batch each make the updates of one with the whole batch."""
    common = ["--model", "test_vit", "--data", folder, "--img-size", 32, "--epochs", 2, "--opt", "sgd", "--lr", 0.1]
    common += ["--no-augment", "--device", "cpu", "--weight-decay", 0, "--smoothing", 0]
    alone = vla("train", *common, "--batch-size", 12, "--out", tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "vla"]
    pair = subprocess.Popen(
        [*launcher, "train", *map(str, common), "--batch-size", "6", "--out", str(tmp_path / "pair")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for process in (alone, pair):
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    ours, theirs = (weights(RunFolder(tmp_path / name)) for name in ("pair", "alone"))
    assert ours["step"] == theirs["step"] == 6
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=1e-4, atol=1e-5)
    ours, theirs = (rows(RunFolder(tmp_path / name))[-1] for name in ("pair", "alone"))
    assert ours["val_top1"] == theirs["val_top1"] and ours["val_count"] == 12
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_resume_needs_as_many_processes(folder, tmp_path):
    config = TrainConfig.create(BASE | {"data": str(folder), "epochs": 1})
    run = train(config, tmp_path / "run")
    state = run.load_state()
    assert state["processes"] == 1
    run.save_state(state | {"processes": 2})
    with pytest.raises(UserError, match="the run began with 2 processes, not 1"):
        train(config, tmp_path / "run", resume=True)
