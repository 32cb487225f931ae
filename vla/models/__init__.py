"""Backbones, one file per family. Importing this package registers them with timm."""

from .groupmamba import GroupMamba
from .gspn import GSPN
from .mambavision import MambaVision
from .vmamba import VMamba
from .vrwkv import VRWKV
from .vrwkv_mae import VRWKVMAE

__all__ = ["GSPN", "GroupMamba", "MambaVision", "VMamba", "VRWKV", "VRWKVMAE"]
