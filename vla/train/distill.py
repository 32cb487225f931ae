"""Learning from a teacher as well as from the labels: DeiT's distillation, https://arxiv.org/abs/2012.12877."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("hard", "soft", "none")


def distillation_loss(
    logits: Tensor,
    logits_dist: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    kind: str = "hard",
    alpha: float = 0.5,
    tau: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    r"""`(1 - alpha) * cross_entropy(logits, targets) + alpha * distance(logits_dist, teacher_logits)`.

    The distance is, for `'hard'`, the cross entropy with the teacher's most probable class; for `'soft'`,
    `tau^2 * sum(t * (log t - log s)) / (B * num_classes)` with `t` and `s` the teacher's and the student's softmax at
    temperature `tau` (DeiT, eqs. 2 and 3, as its code and GroupMamba's weight them).

    Args:
        logits: Of the classifier that learns from the labels, (B, num_classes).
        logits_dist: Of the classifier that learns from the teacher, (B, num_classes).
        teacher_logits: (B, num_classes).
        targets: Class indices (B,), or probabilities (B, num_classes).
        kind: `'hard'`, `'soft'`, or `'none'` for the labels' cross entropy alone.
        alpha: Weight of the teacher.
        tau: Temperature, for `'soft'`.
        smoothing: Label smoothing, for targets that are class indices.

    Returns:
        Loss, a scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: For an unknown `kind`, or a teacher with other classes.
    """
    if kind not in KINDS:
        raise ValueError(f"distillation: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if teacher_logits.shape != logits_dist.shape:
        raise ValueError(
            f"distillation: the teacher's logits have shape {tuple(teacher_logits.shape)}, "
            f"expected {tuple(logits_dist.shape)} like the student's"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, logits_dist, teacher_logits = (x.to(dtype) for x in (logits, logits_dist, teacher_logits))
    loss = F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.ndim == 1 else 0.0)
    if kind == "none":
        return loss
    if kind == "hard":
        distance = F.cross_entropy(logits_dist, teacher_logits.argmax(1))
    else:
        student, teacher = (F.log_softmax(x / tau, dim=1) for x in (logits_dist, teacher_logits))
        distance = tau**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / student.numel()
    return (1 - alpha) * loss + alpha * distance


class Renormalized(nn.Module):
    """A classifier behind pictures that are normalised for another one.

    Args:
        model: The classifier.
        mean: Its mean per channel.
        std: Its standard deviation per channel.
        given_mean: The pictures' mean per channel.
        given_std: Their standard deviation per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        given_mean: Sequence[float],
        given_std: Sequence[float],
    ):
        super().__init__()
        self.model = model
        mean, std, given_mean, given_std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std, given_mean, given_std))
        self.register_buffer("scale", given_std / std, persistent=False)
        self.register_buffer("shift", (given_mean - mean) / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


class Distillation(nn.Module):
    """Cross entropy with the labels, and the distance from a teacher that sees the same pictures.

    Args:
        teacher: Classifier in evaluation mode with frozen weights from here on; runs in its own precision, without
            autocast. It gets the pictures as the student does, normalised and mixed.
        kind: `'hard'` or `'soft'`, see `distillation_loss`.
        alpha: Weight of the teacher.
        tau: Temperature, for `'soft'`.
        smoothing: Label smoothing, for labels given as class indices.
    """

    def __init__(
        self, teacher: nn.Module, kind: str = "hard", alpha: float = 0.5, tau: float = 1.0, smoothing: float = 0.0
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"distillation: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        self.smoothing = smoothing

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch, a float32 scalar.

        Args:
            model: Gives logits (B, num_classes), which then learn from both, or the pair of the logits that learn
                from the labels and of those that learn from the teacher.
            images: (B, C, H, W).
            targets: Class indices (B,), or probabilities (B, num_classes).
        """
        outputs = model(images)
        logits, logits_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            teacher_logits = self.teacher(images)
        return distillation_loss(
            logits, logits_dist, teacher_logits, targets, self.kind, self.alpha, self.tau, self.smoothing
        )
