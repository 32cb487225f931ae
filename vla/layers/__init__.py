"""Layers: token mixers and blocks, (B, C, H, W) in and out, for use in any network."""

from .block import ResidualBlock
from .gspn import GSPNBlock, GSPNMixer
from .gspn_diffusion import GSPNAttention, GSPNGenerator
from .linear_attention import LinearAttentionBlock, SequenceMixer
from .mambavision import MambaVisionBlock, MambaVisionMixer
from .ss2d import SS2D, VSSBlock

__all__ = [
    "GSPNAttention",
    "GSPNBlock",
    "GSPNGenerator",
    "GSPNMixer",
    "LinearAttentionBlock",
    "MambaVisionBlock",
    "MambaVisionMixer",
    "ResidualBlock",
    "SS2D",
    "SequenceMixer",
    "VSSBlock",
]
