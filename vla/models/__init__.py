"""Backbones, one file per family. Importing this package registers them with timm."""

from .mambavision import MambaVision

__all__ = ["MambaVision"]
