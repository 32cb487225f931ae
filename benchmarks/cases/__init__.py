"""Importing this package registers every case."""

from . import cpu_models, cpu_scans

__all__ = ["cpu_models", "cpu_scans"]
