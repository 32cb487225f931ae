"""Runs cases: every figure is written as soon as it is there, and what fails is told without stopping the rest."""

import gc
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vla.timing import Timing, environment, measure, measure_bandwidth, measure_latency, synchronize

from .registry import CASES, Measurement, Options

ROUNDS_OF_SLOW = 3


class OutOfTime(BaseException):
    """The time limit is over. Not an `Exception`, so that no measurement takes it for its own failure."""


class DeviceLost(BaseException):
    """After an error in a kernel, this process can use the GPU no more."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises `OutOfTime` in the main thread when the time is over."""

    def stop(signum: int, frame: object) -> None:
        raise OutOfTime

    if seconds is None:
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Report:
    """The figures of one case, in a file that is complete after every figure.

    Args:
        path: JSON file.
        case: Name of the case.
        environment: What all figures depend on.
    """

    def __init__(self, path: Path, case: str, environment: dict):
        self.path = path
        self.content = {"case": case, "environment": environment, "results": []}

    @property
    def results(self) -> list[dict]:
        return self.content["results"]

    def add(self, result: dict) -> None:
        self.results.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=2) + "\n")
        temporary.replace(self.path)


def run_case(
    name: str,
    options: Options,
    output: Path,
    bandwidth: float,
    calls: int = 20,
    tell: Callable[[dict], None] = lambda result: None,
) -> Report:
    """Check, time and write the measurements of a case.

    Args:
        name: Name of the case.
        options: What the user chose.
        output: Folder of the result.
        bandwidth: Bytes a second, for the floors.
        calls: Calls per repetition; rounds, where measurements take turns.
        tell: Called with every result.
    """
    surroundings = environment(options.device) | {"bandwidth_gb_s": round(bandwidth / 1e9, 1)}
    report = Report(output / f"{name}.json", name, surroundings)

    def add(result: dict) -> None:
        report.add(result)
        tell(result)

    case = CASES[name]
    if case.in_turns:
        for result in _run_in_turns(list(case.measurements(options)), options.device, calls, bandwidth):
            add(result)
        return report
    for measurement in case.measurements(options):
        with _failures_told(measurement, options.device, add):
            run = measurement.setup()
            if isinstance(run, Timing):
                timing = run
            elif measurement.latency:
                timing = measure_latency(run, options.device, calls=3 if measurement.slow else 50)
            else:
                rounds = 1 if measurement.slow else calls
                timing = measure(run, options.device, rounds, alone=measurement.kernels)
            add(_result(measurement, timing, bandwidth))
        run = None
        _free(options.device)
    return report


@contextmanager
def _failures_told(measurement: Measurement, device: torch.device, add: Callable[[dict], None]) -> Iterator[None]:
    """A failure becomes the measurement's result; raises `DeviceLost` where no other could follow."""
    try:
        yield
    except Exception as error:
        traceback.print_exc(limit=-3)
        lines = str(error).strip().splitlines() or [""]
        add({"name": measurement.name, "error": f"{type(error).__name__}: {lines[0]}"[:300]} | measurement.details)
        try:
            synchronize(device)
        except RuntimeError as lost:
            raise DeviceLost(str(lost).partition("\n")[0]) from lost


def _run_in_turns(
    measurements: list[Measurement], device: torch.device, rounds: int, bandwidth: float
) -> Iterator[dict]:
    failed: list[dict] = []
    ready: list[tuple[Measurement, Callable[[], object], list[float]]] = []
    for measurement in measurements:
        with _failures_told(measurement, device, failed.append):
            ready.append((measurement, measurement.setup(), []))
    for turn in range(-2, rounds):
        for measurement, run, times in ready:
            if measurement.slow and not 0 <= turn < ROUNDS_OF_SLOW:
                continue
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= 0:
                times.append(time.perf_counter() - start)
    yield from failed
    for measurement, _, times in ready:
        yield _result(measurement, Timing(statistics.median(times), min(times), len(times)), bandwidth)


def _result(measurement: Measurement, timing: Timing, bandwidth: float) -> dict:
    result = {
        "name": measurement.name,
        "median_ms": 1e3 * timing.median,
        "fastest_ms": 1e3 * timing.fastest,
        "calls": timing.calls,
    }
    if measurement.items:
        result["items_per_second"] = measurement.items / timing.median
    # A CUDA graph's memory is a pool of its own, which its replays allocate nothing of.
    if timing.peak_memory is not None and "graph" not in measurement.details.get("mode", ""):
        result["peak_gib"] = timing.peak_memory / 2**30
    if measurement.bytes:
        result["floor_ms"] = 1e3 * measurement.bytes / bandwidth
        result["over_floor"] = result["median_ms"] / result["floor_ms"]
    if measurement.official_ms:
        result["official_ms"] = measurement.official_ms
        result["times_faster"] = measurement.official_ms / result["median_ms"]
    return result | measurement.details


def _free(device: torch.device) -> None:
    """What one measurement leaves must not be in the next one's memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


__all__ = ["DeviceLost", "OutOfTime", "Report", "measure_bandwidth", "run_case", "time_limit"]
