"""Settings for every test: the device, two threads at most, and uninitialised memory that shows."""

import os

import pytest
import torch

from tests.device import use
from tests.kernels import need_triton

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are made, e.g. cuda, which runs the Triton kernels")


def pytest_configure(config):
    device = config.getoption("--device")
    if device == "cpu":
        # Triton's kernels run on CPU tensors then, interpreted; it is read when a kernel is defined.
        os.environ["TRITON_INTERPRET"] = "1"
        return
    use(device)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == "numba":
            item.add_marker(pytest.mark.skip(reason="runs on CPU tensors"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips a test that asks for Triton's kernels where these cannot run."""
    try:
        return (yield)
    except RuntimeError as error:
        if "backend 'triton' needs" in str(error):
            need_triton()
        raise


@pytest.fixture(autouse=True)
def poison_memory():
    """Fills `torch.empty` with NaN, so that reading memory nothing has written fails a test."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous[0])
    torch.utils.deterministic.fill_uninitialized_memory = previous[1]
