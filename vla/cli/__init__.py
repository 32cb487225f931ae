"""The command line: `vla train`, `vla eval`, `vla predict`, `vla models`, `vla info`, `vla bench`."""

from .app import app, main

# Each registers its commands; the help keeps this order.
# isort: off
from . import train, evaluate, predict, models, bench  # noqa: F401

__all__ = ["app", "main"]
