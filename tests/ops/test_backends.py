"""Choice of the backend, and the form of gradients."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vla.ops import selective_scan, use_backend
from vla.ops._registry import MIN_TRITON, _as_gradient
from vla.ops.scan2d import operator as scan2d
from vla.ops.ssd import operator as ssd

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_override_is_nested_and_undone():
    with use_backend("naive"):
        with use_backend("torch"):
            assert scan2d.backend_for(CPU) == "torch"
        assert scan2d.backend_for(CPU) == "naive"
    assert scan2d.backend_for(CPU) == "numba"


def test_override_is_undone_after_an_error():
    with pytest.raises(KeyError), use_backend("naive"):
        raise KeyError
    assert scan2d.backend_for(CPU) == "numba"


def test_gpus_of_others(monkeypatch):
    """Triton's kernels are NVIDIA's unless they are asked for."""
    monkeypatch.setattr(scan2d, "_obstacle", lambda *args: None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(scan2d, "_warned", False)
    with pytest.warns(UserWarning, match="scan2d: backend 'triton' has only been tried on NVIDIA's GPUs"):
        assert scan2d.backend_for(CUDA) == "torch"
    with use_backend("triton"):
        assert scan2d.backend_for(CUDA) == "triton"


def test_overrides_that_are_left_in_another_order():
    """As threads may."""
    first, second = use_backend("naive"), use_backend("torch")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert scan2d.backend_for(CPU) == "torch"
    second.__exit__(None, None, None)
    assert scan2d.backend_for(CPU) == "numba"


def test_unknown_backend():
    message = "unknown backend 'cuda', expected one of naive, torch, numba, triton"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass


@pytest.mark.parametrize(("name", "value"), [("delta", 1.0), ("C", None), ("D", [1.0])])
def test_what_is_no_tensor(name, value):
    tensors = dict(u=torch.ones(1, 2, 3), delta=torch.ones(1, 2, 3), A=torch.ones(2, 1), B=torch.ones(2, 1))
    message = f"selective_scan: {name} is a {type(value).__name__}, expected a tensor"
    with pytest.raises(TypeError, match=message):
        selective_scan(**(tensors | dict(C=torch.ones(2, 1)) | {name: value}))


def test_asked_for_is_never_replaced(monkeypatch):
    with use_backend("numba"):
        with pytest.raises(RuntimeError, match="ssd: backend 'numba' does not exist, there are naive, torch"):
            ssd.backend_for(CPU)
        with pytest.raises(RuntimeError, match="scan2d: backend 'numba' runs on the CPU, the tensors are on cuda"):
            scan2d.backend_for(CUDA)
        monkeypatch.setattr("vla.ops._registry._is_installed", lambda name: False)
        with pytest.raises(RuntimeError, match="needs the package numba, which is not installed"):
            scan2d.backend_for(CPU)


def test_works_without_numba(monkeypatch):
    monkeypatch.setattr("vla.ops._registry._is_installed", lambda name: False)
    assert scan2d.backend_for(CPU) == "torch"


def test_slow_gpu_path_warns_once(monkeypatch):
    monkeypatch.setattr("vla.ops._registry._is_installed", lambda name: False)
    monkeypatch.setattr(ssd, "_warned", False)
    with pytest.warns(UserWarning, match="ssd: backend 'triton' .*; using slower PyTorch code"):
        assert ssd.backend_for(CUDA) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ssd.backend_for(CUDA) == "torch"


def test_too_old_triton(monkeypatch):
    monkeypatch.setattr("vla.ops._registry.triton_version", lambda: (3, 1))
    monkeypatch.setattr(scan2d, "_warned", False)
    with pytest.warns(UserWarning, match="scan2d: backend 'triton' needs Triton 3.4 or newer, 3.1 is installed; using"):
        assert scan2d.backend_for(CUDA) == "torch"
    with use_backend("triton"), pytest.raises(RuntimeError, match="needs Triton 3.4 or newer"):
        scan2d.backend_for(CUDA)


def test_float64_and_triton(monkeypatch):
    monkeypatch.setattr("vla.ops._registry.triton_version", lambda: MIN_TRITON)
    assert scan2d.backend_for(CUDA) == "triton"
    assert scan2d.backend_for(CUDA, torch.float64) == "torch"
    message = "has kernels for float32, bfloat16, float16, the tensors are float64"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        scan2d.backend_for(CUDA, torch.float64)


def test_environment_variable():
    code = "import torch; from vla.ops.scan2d import operator; print(operator.backend_for(torch.device('cpu')))"
    environment = {**os.environ, "VLA_BACKEND": "naive"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "naive"


def _scan_in_child(queue):
    torch.set_num_threads(2)
    queue.put(_scan().sum().item())


def _scan():
    with CPU:
        x = torch.arange(2.0 * 200 * 9).view(2, 200, 9) / 1000
        B = torch.ones(2, 1, 9)
        return selective_scan(x, x, -torch.ones(200, 1), B, B)


def test_threads_and_forks():
    """Compiled kernels give the same bits on any number of threads, from several threads at once and after a fork."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _scan()
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(result, expected) for result in pool.map(lambda _: _scan(), range(16)))
    finally:
        torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == expected.sum().item()
    child.join(60)


def test_gradients_take_no_copy_for_strides_of_single_entries():
    kernels = torch.ones(6, 1, 3, 3).to(memory_format=torch.channels_last)
    grad = torch.rand(6, 1, 3, 3)
    result = _as_gradient(grad, kernels)
    assert result.data_ptr() == grad.data_ptr() and result.stride() == kernels.stride() != grad.stride()
    assert torch.equal(result, grad)
    maps = torch.ones(6, 2, 3, 3).to(memory_format=torch.channels_last)
    assert _as_gradient(torch.rand(6, 2, 3, 3), maps).stride() == maps.stride()
