"""The command line: `vla train`, `vla eval`, `vla predict`, `vla models`, `vla info`."""

# isort: off  (each registers its commands, in the order of the help)
from . import evaluate, models, predict, train  # noqa: F401
from .app import app, main

__all__ = ["app", "main"]
