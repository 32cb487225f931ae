"""Layers: token mixers and blocks, (B, C, H, W) in and out, for use in any network."""

from .block import ResidualBlock
from .mambavision import MambaVisionBlock, MambaVisionMixer

__all__ = ["MambaVisionBlock", "MambaVisionMixer", "ResidualBlock"]
