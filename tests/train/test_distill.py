"""Distillation: the loss against reference values, and a student that learns from a teacher."""

import pytest
import timm
import torch
from torch import nn

import vla  # noqa: F401
from tests import golden
from tests.tolerance import assert_close
from vla.train.distill import Distillation, distillation_loss

CASES = golden.index("groupmamba")["op_distill_loss.npz"]["cases"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_loss(case, dtype):
    data = golden.load("groupmamba", "op_distill_loss.npz")
    data = {key.removeprefix(case + "/"): value for key, value in data.items() if key.startswith(case + "/")}
    config = CASES[case]
    logits, logits_dist, teacher = (data[key].to(dtype).requires_grad_() for key in ("cls", "dist", "teacher"))
    targets = data["target"].to(torch.promote_types(dtype, torch.float32))
    options = {"kind": config["type"], "alpha": config["alpha"], "tau": config["tau"]}
    loss = distillation_loss(logits, logits_dist, teacher.detach(), targets, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close("loss", loss, data["loss"], 1e-2 if dtype == torch.bfloat16 else None)
    loss.backward()
    for name, x in (("cls", logits), ("dist", logits_dist)):
        expected = data[f"grad/{name}"]
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        assert_close(name, grad, expected, 5e-2 if dtype == torch.bfloat16 else None)


def test_class_indices_and_smoothing():
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 5), torch.randn(4, 5)
    labels = torch.tensor([0, 3, 4, 1])
    soft = nn.functional.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = distillation_loss(logits, logits, teacher, soft)
    assert_close("smoothing", distillation_loss(logits, logits, teacher, labels, smoothing=0.1), expected)


@pytest.mark.parametrize("distilled", [True, False])
def test_student_learns_from_teacher(distilled):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 4))
    task = Distillation(teacher, alpha=1.0).train()
    student = timm.create_model("groupmamba_atto", num_classes=4, distilled=distilled).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    images, labels = torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)
    losses = []
    for _ in range(12):
        loss = task(student, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training and task.training
    if distilled:
        assert (student.head.weight.grad == 0).all()  # alpha = 1 leaves the labels out
        outputs = student(images)[1]
    else:
        outputs = student(images)
    assert (outputs.argmax(1) == teacher(images).argmax(1)).float().mean() > 0.7


def test_bad_arguments():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kind is 'warm'"):
        distillation_loss(x, x, x, torch.zeros(2, dtype=torch.long), kind="warm")
    with pytest.raises(ValueError, match=r"teacher's logits have shape \(2, 4\)"):
        distillation_loss(x, x, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="kind is 'warm'"):
        Distillation(nn.Identity(), kind="warm")
