"""Layers: token mixers and blocks, (B, C, H, W) in and out, for use in any network."""

from .block import ResidualBlock
from .gspn import GSPNBlock, GSPNMixer
from .gspn_diffusion import GSPNAttention, GSPNGenerator
from .mambavision import MambaVisionBlock, MambaVisionMixer
from .ss2d import SS2D, VSSBlock

__all__ = [
    "GSPNAttention",
    "GSPNBlock",
    "GSPNGenerator",
    "GSPNMixer",
    "MambaVisionBlock",
    "MambaVisionMixer",
    "SS2D",
    "ResidualBlock",
    "VSSBlock",
]
