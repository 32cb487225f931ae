"""Cases by name. A case makes measurements; a measurement checks its result before anybody looks at the clock."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Measurement:
    """One thing to time.

    Args:
        name: What runs, e.g. `'forward N=1 torch'`.
        run: The call to time.
        check: Raises `AssertionError` if `run` computes something wrong.
        slow: Few repetitions will do.
        details: Whatever belongs to the figure: shape, dtype, batch, ...
        bytes: Fewest bytes the call must move, for time over the memory-bandwidth floor.
        items: Work items of a call, for a rate (images).
    """

    name: str
    run: Callable[[], object]
    check: Callable[[], None]
    slow: bool = False
    details: dict = field(default_factory=dict)
    bytes: int | None = None
    items: int | None = None


Case = Callable[[torch.device], Iterator[Measurement]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Registers `function` under its name."""
    CASES[function.__name__] = function
    return function
