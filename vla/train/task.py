"""What a model is trained to do: from a batch to a loss."""

import torch.nn.functional as F
from torch import Tensor, nn


class Classification(nn.Module):
    """Cross entropy with the labels.

    Args:
        smoothing: Label smoothing, for labels given as class indices.
    """

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch, a float32 scalar.

        Args:
            model: Gives logits (B, num_classes), or several of them, one per head; the loss is then their mean.
            images: (B, C, H, W).
            targets: Class indices (B,), or probabilities (B, num_classes).
        """
        outputs = model(images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        smoothing = self.smoothing if targets.ndim == 1 else 0.0
        losses = [F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) for logits in outputs]
        return sum(losses) / len(losses)


class Reconstruction(nn.Module):
    """The loss that a masked autoencoder computes itself; targets are unused."""

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch, a scalar.

        Args:
            model: Gives a tuple that starts with its loss.
            images: (B, C, H, W).
            targets: Unused.
        """
        return model(images)[0]
