"""What distillation sees of layers: hooks, their traces, and activations that are used once."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from distill_networks import Net, everything, hooks_of
from runs import batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st


def test_hooks_are_there_while_it_is_open() -> None:
    student, teacher = Net(seed=1), Net(seed=2)
    assert hooks_of(student) == hooks_of(teacher) == 0
    with everything(student, teacher):
        assert hooks_of(student) > 0
    assert hooks_of(student) == hooks_of(teacher) == 0
    distillation = everything(student, teacher)
    distillation.close()
    distillation.close()
    assert hooks_of(student) == hooks_of(teacher) == 0
    x, y = batch(0)
    with pytest.raises(ValueError, match="was closed"):
        distillation(student(x), x, y)
    st.distill(student, teacher)
    assert hooks_of(student) == hooks_of(teacher) == 0  # logits alone need none


@pytest.mark.parametrize(
    "wrong", [{"hidden": "boddy"}, {"hidden": {"conv": "nrm"}}, {"hidden": {"conv": "head"}}]
)
def test_an_error_leaves_no_hooks(wrong: dict[str, Any]) -> None:
    student, teacher = Net(seed=1), Net(seed=2)
    with pytest.raises(ValueError, match=r"did you mean|choose layers that differ"):
        everything(student, teacher, **wrong)
    assert hooks_of(student) == hooks_of(teacher) == 0


def test_copies_of_the_student_are_free_of_it() -> None:
    student, teacher = Net(seed=1), Net(seed=2)
    x, y = batch(0)
    with everything(student, teacher) as distillation:
        outputs = student(x)  # activations with a graph are kept now
        copied = copy.deepcopy(student)
        file = io.BytesIO()
        torch.save(student, file)
        size = file.tell()
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            other(torch.randn(2, 4, 4, 4))
        distillation(outputs, x, y)  # what the copies saw is not the student's
    plain = io.BytesIO()
    torch.save(Net(), plain)
    assert size < plain.tell() + 4000  # no teacher, no activations


def test_old_activations_are_not_used_again() -> None:
    student, teacher = Net(seed=1).eval(), Net(seed=2)
    distillation = everything(student, teacher)
    (x, y), (other, _) = batch(0), batch(1)
    with pytest.raises(ValueError, match="the student was not called since"):
        distillation(teacher(x), x, y)
    outputs = student(x)
    first = distillation(outputs, x, y)
    with pytest.raises(ValueError, match="the student was not called since"):
        distillation(outputs, x, y)
    # The newest pass counts.
    student(other)
    assert distillation(student(x), x, y) == first
    # Parts of the student called alone are not its forward pass.
    student.body(student.conv(x))
    with pytest.raises(ValueError, match="the student was not called since"):
        distillation(outputs, x, y)


def test_recomputation_in_the_backward_pass_is_not_looked_at() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            x = checkpoint(lambda x: F.relu(self.norm(self.conv(x))), x, use_reentrant=False)
            return self.head(self.drop(self.body(x)).flatten(1))

    student, twin, teacher = Checkpointed(seed=1).eval(), Net(seed=1).eval(), Net(seed=2)
    x, y = batch(0)
    for one in (student, twin):
        with everything(one, teacher) as distillation:
            distillation(one(x), x, y).backward()
            with pytest.raises(ValueError, match="the student was not called since"):
                distillation(torch.zeros(8, 3), x, y)
    for a, b in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layers_that_are_called_twice_or_never() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return self.head(self.body(self.conv(x)).flatten(1))

    student, teacher = Twice(seed=1), Net(seed=2)
    x, y = batch(0)
    with pytest.raises(ValueError, match="'conv' of the student was called more than once"):
        everything(student, teacher)
    student.spare = nn.Linear(2, 2)
    with (
        st.distill(student, teacher, hidden={"spare": "conv"}, weight=1) as distillation,
        pytest.raises(ValueError, match="'spare' of the student was not called"),
    ):
        distillation(student(x), x, y)


def test_layers_that_give_more_than_a_tensor() -> None:
    class Recurrent(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    student, teacher, x = Recurrent(1), Recurrent(2), torch.randn(4, 7, 5)
    with st.distill(student, teacher, weight=1, hidden="lstm") as distillation:
        distillation(student(x), x)
    expected = (student.lstm(x)[0] - teacher.lstm(x)[0]).square().mean().item()
    assert distillation.parts["hidden"].item() == pytest.approx(expected, rel=1e-5)
    odd = nn.Sequential(Named())
    with (
        st.distill(odd, nn.Sequential(nn.Linear(5, 5)), weight=1, hidden="0") as distillation,
        pytest.raises(ValueError, match="layer '0' of the student gave a dict"),
    ):
        distillation(odd(x), x)
