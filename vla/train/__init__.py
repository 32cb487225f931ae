"""Training, evaluation and the files that they leave."""

from .config import TrainConfig
from .run import RunFolder
from .trainer import Reporter, train
from .weights import ModelSpec, build_model, load_weights, open_model, save_model

__all__ = [
    "ModelSpec",
    "Reporter",
    "RunFolder",
    "TrainConfig",
    "build_model",
    "load_weights",
    "open_model",
    "save_model",
    "train",
]
