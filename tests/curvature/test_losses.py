"""Losses of single samples against the loss of batches of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.curvature.losses import LossFunction, sample_losses

_WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64)
LOSSES: dict[str, LossFunction] = {
    "function": F.cross_entropy,
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "weighted": nn.CrossEntropyLoss(weight=_WEIGHT),
    "ignoring": nn.CrossEntropyLoss(ignore_index=2),
    "ignoring sum": nn.CrossEntropyLoss(ignore_index=2, reduction="sum"),
}


def one_by_one(loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    pairs = zip(outputs.split(1), targets.split(1), strict=True)
    return torch.stack([loss(o, t) for o, t in pairs])


def compare(loss: LossFunction, outputs: Tensor, targets: Tensor) -> None:
    outputs.requires_grad_(True)
    found, expected = sample_losses(loss, outputs, targets, 5), one_by_one(loss, outputs, targets)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(values.sum(), outputs)[0] for values in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("positions", [(), (6,), (2, 3)])
def test_each_sample_has_its_own(loss: str, positions: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 4, *positions, dtype=torch.float64, generator=generator)
    targets = torch.randint(4, (5, *positions), generator=generator)
    if loss == "ignoring" and not positions:
        targets.clamp_(max=1)  # a sample all of whose labels are ignored has no mean
    compare(LOSSES[loss], outputs, targets)


@pytest.mark.parametrize("loss", ["function", "sum", "smoothed", "weighted"])
def test_targets_may_be_probabilities(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
    targets = torch.rand(5, 4, 3, dtype=torch.float64, generator=generator).softmax(1)
    compare(LOSSES[loss], outputs, targets)


def test_a_sample_without_labels_has_no_mean() -> None:
    outputs, targets = torch.randn(3, 4), torch.tensor([1, -100, 2])
    with pytest.raises(ValueError, match="loss of sample 1 of a batch of 3 is nan"):
        sample_losses(F.cross_entropy, outputs, targets, 3)
    assert sample_losses(nn.CrossEntropyLoss(reduction="sum"), outputs, targets, 3)[1] == 0


def test_a_loss_that_is_no_scalar_is_named() -> None:
    loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match=r"must return one number.*of shape \(3, 1\)"):
        sample_losses(loss, torch.randn(3, 4), torch.tensor([1, 0, 2]), 3)


def test_a_subclass_may_compute_something_else() -> None:
    class Doubled(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return 2 * super().forward(outputs, targets)

    outputs, targets = torch.randn(3, 4), torch.tensor([1, 0, 2])
    found = sample_losses(Doubled(), outputs, targets, 3)
    torch.testing.assert_close(found, 2 * F.cross_entropy(outputs, targets, reduction="none"))
