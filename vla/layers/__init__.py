"""Layers: token mixers and blocks, (B, C, H, W) in and out, for use in any network."""

from .block import ResidualBlock
from .groupmamba import GroupedSS2D, GroupMambaBlock, GroupMambaMixer
from .gspn import GSPNBlock, GSPNMixer
from .gspn_diffusion import GSPNAttention, GSPNGenerator
from .linear_attention import LinearAttentionBlock, SequenceMixer
from .mambavision import MambaVisionBlock, MambaVisionMixer
from .ss2d import SS2D, VSSBlock
from .vrwkv import ChannelMix, SpatialMix, SpatialMix6, TokenShift, VRWKVBlock

__all__ = [
    "ChannelMix",
    "GSPNAttention",
    "GSPNBlock",
    "GSPNGenerator",
    "GSPNMixer",
    "GroupMambaBlock",
    "GroupMambaMixer",
    "GroupedSS2D",
    "LinearAttentionBlock",
    "MambaVisionBlock",
    "MambaVisionMixer",
    "ResidualBlock",
    "SS2D",
    "SequenceMixer",
    "SpatialMix",
    "SpatialMix6",
    "TokenShift",
    "VRWKVBlock",
    "VSSBlock",
]
