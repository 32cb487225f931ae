"""Layers: token mixers and blocks, (B, C, H, W) in and out, for use in any network."""

from .block import ResidualBlock

__all__ = ["ResidualBlock"]
