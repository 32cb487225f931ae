"""Pictures to train on: built-in digits, folders, and whatever timm reads."""

from .loader import Normalize, TrainLoader, eval_loader
from .sources import BUILTIN, Pictures, PictureStream, open_pictures

__all__ = ["BUILTIN", "Normalize", "PictureStream", "Pictures", "TrainLoader", "eval_loader", "open_pictures"]
