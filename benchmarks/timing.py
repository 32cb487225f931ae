"""The clock and what a figure must carry with it."""

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .registry import Measurement


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict:
    """Everything that the figures of a run depend on."""
    packages = {name: version(name) for name in ("torch", "triton", "numba", "timm", "vision-linear-attention")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
        "packages": packages,
    }


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(measurements: list[Measurement], device: torch.device, rounds: int = 15) -> list[dict]:
    """Checks all measurements, then times them in turns, so that a slow moment of the machine hits all alike.

    Returns:
        Per measurement its name and details, the median and the fastest of `rounds` times in milliseconds.
    """
    for measurement in measurements:
        measurement.check()
    times: list[list[float]] = [[] for _ in measurements]
    for turn in range(-2, rounds):
        for measurement, own in zip(measurements, times, strict=True):
            if measurement.slow and not 0 <= turn < 3:
                continue
            elapsed = _time_once(measurement.run, device)
            if turn >= 0:
                own.append(elapsed)
    results = []
    for measurement, own in zip(measurements, times, strict=True):
        result = {"name": measurement.name, "median_ms": statistics.median(own), "fastest_ms": min(own)}
        result["rounds"] = len(own)
        if measurement.items:
            result["items_per_second"] = 1e3 * measurement.items / result["median_ms"]
        results.append(result | measurement.details)
    return results
