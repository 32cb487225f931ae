"""Importing this package registers every case."""

from . import cpu_models, cpu_scans, mixers, models, operators

__all__ = ["cpu_models", "cpu_scans", "mixers", "models", "operators"]
