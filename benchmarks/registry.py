"""Cases by name. A case makes measurements; a measurement checks its result before anybody looks at the clock."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from vla.timing import Timing

# How a model runs. A graph is the whole call, eager or compiled, as one CUDA graph: the host's time is gone.
MODES = ("eager", "graph", "compiled", "compiled+graph")


@dataclass
class Measurement:
    """One thing to time.

    Args:
        name: What runs, e.g. `'forward N=1 torch'`; unique within the case.
        setup: Builds what is needed, raises `AssertionError` if it computes something wrong, and returns the call to
            time; or the time itself, of what can only be done once. Called late, one measurement after another, so that
            only one is in memory.
        slow: Few repetitions will do.
        latency: Time single calls from start to result instead of many in a row.
        kernels: Short calls, of which only the kernels' time is of interest, not Python's.
        details: Whatever belongs to the figure: shape, dtype, batch, ...
        bytes: Fewest bytes the call must move, for time over the memory-bandwidth floor.
        items: Work items of a call, for a rate (images).
        official_ms: Time of the official code on an H200, from the project's records.
    """

    name: str
    setup: Callable[[], Callable[[], object] | Timing]
    slow: bool = False
    latency: bool = False
    kernels: bool = False
    details: dict = field(default_factory=dict)
    bytes: int | None = None
    items: int | None = None
    official_ms: float | None = None


@dataclass(frozen=True)
class Options:
    """What a user chose.

    Args:
        device: Where to run.
        models: Models instead of a case's own.
        peers: Also run timm's models of the same size.
        modes: Of `MODES`, instead of a case's own.
        batch: Batch size instead of a case's own.
        sizes: Image sizes instead of a case's own.
        drop_path: Rate of stochastic depth in training, the same for all models.
    """

    device: torch.device
    models: tuple[str, ...] = ()
    peers: bool = False
    modes: tuple[str, ...] = ()
    batch: int | None = None
    sizes: tuple[int, ...] = ()
    drop_path: float = 0.0

    def modes_of(self, *own: str) -> list[str]:
        """The modes to run of those that a case has by default, or those chosen; graphs only on CUDA."""
        return [mode for mode in self.modes or own if self.device.type == "cuda" or "graph" not in mode]

    @property
    def on_official_gpu(self) -> bool:
        """Whether this is the kind of GPU on which the official code was timed."""
        return self.device.type == "cuda" and "H200" in torch.cuda.get_device_name(self.device)


@dataclass(frozen=True)
class Case:
    """A named set of measurements.

    Args:
        measurements: Makes them, cheaply: the work is in their `setup`.
        in_turns: Time one call of each in turns, so that a slow moment of the machine hits all alike; all are in
            memory at once.
    """

    measurements: Callable[[Options], Iterator[Measurement]]
    in_turns: bool = False

    @property
    def description(self) -> str:
        return (self.measurements.__doc__ or "").strip().partition("\n")[0]


CASES: dict[str, Case] = {}


def case(in_turns: bool = False) -> Callable:
    """Registers a function under its name, see `Case`."""

    def register(function: Callable[[Options], Iterator[Measurement]]) -> Callable:
        CASES[function.__name__] = Case(function, in_turns)
        return function

    return register
