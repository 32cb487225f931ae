"""Vision linear attention: operators, layers and timm-compatible backbones."""

from . import layers, models, ops

__all__ = ["layers", "models", "ops"]
