"""What learns from a teacher, what is left alone, and arguments that do not fit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from distill_networks import Net, Tokens, everything
from runs import batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st


def test_gradients_go_to_the_student_and_the_projections_alone() -> None:
    student, teacher = Net((3, 2), 1), Net(seed=2)
    teacher.body.eval()  # a mode of its own
    modes = {name: module.training for name, module in teacher.named_modules()}
    before = copy.deepcopy(teacher.state_dict())
    own_before = copy.deepcopy(student.state_dict())
    wanted = [p.requires_grad for p in teacher.parameters()]
    distillation = everything(student, teacher)
    assert all(torch.equal(v, own_before[k]) for k, v in student.state_dict().items())
    x, y = batch(1)
    distillation(student(x), x, y).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
    assert len([*distillation.parameters()]) == 4
    assert all(p.grad is not None for p in distillation.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert [p.requires_grad for p in teacher.parameters()] == wanted
    assert {name: module.training for name, module in teacher.named_modules()} == modes
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not torch.equal(student.norm.running_mean, own_before["norm.running_mean"])
    assert student.training


def test_the_teacher_sees_no_dropout_and_its_own_statistics() -> None:
    student, teacher = Net(seed=1), Net(seed=2)
    distillation = st.distill(student, teacher, weight=1)
    x, _ = batch(1)
    outputs = student(x)
    assert distillation(outputs, x) == distillation(outputs, x)
    teacher.eval()
    p, q = (v.div(4).softmax(1) for v in (teacher(x), outputs))
    assert distillation.parts["logits"].item() == pytest.approx(
        16 * (p * (p / q).log()).sum(1).mean().item(), rel=1e-4
    )


def test_modes_come_back_after_an_error_of_the_teacher() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("broken")

    student, teacher = Net(), Broken(seed=2)
    distillation = st.distill(student, teacher, weight=1)
    x, _ = batch(0)
    with pytest.raises(KeyError):
        distillation(student(x), x)
    assert all(module.training for module in teacher.modules())


def test_parameters_and_state_are_those_of_the_projections() -> None:
    student, teacher = Net((3, 2), 1), Net(seed=2)
    distillation = everything(student, teacher, loss_fn=nn.CrossEntropyLoss(torch.ones(3)))
    shapes = {name: tuple(value.shape) for name, value in distillation.state_dict().items()}
    assert shapes == {
        "projections.0.linear.weight": (8, 3),
        "projections.0.linear.bias": (8,),
        "projections.1.linear.weight": (6, 2),
        "projections.1.linear.bias": (6,),
    }
    distillation.eval()
    assert student.training
    assert teacher.training
    other = everything(student, teacher)
    other.load_state_dict(distillation.state_dict())
    x, y = batch(0)
    student.eval()
    outputs = student(x)
    assert distillation(outputs, x, y) == other(outputs, x, y)


def test_a_student_that_lost_channels_learns_from_what_it_was() -> None:
    dense = Net(seed=3)
    smaller = st.channels.prune(dense, batch(0)[0], "l1", 0.5).model
    distillation = everything(smaller, dense)
    parameters = [*smaller.parameters(), *distillation.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    x, y = batch(0)
    losses = []
    for _ in range(60):
        loss = distillation(smaller(x), x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(distillation.parts["hidden"].item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"weight": 1.1}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"hidden_weight": -1}, "hidden_weight"),
        ({"attention_weight": -1}, "attention_weight"),
        ({"weight": 0}, "weight=0 teaches nothing"),
        ({"hidden": 3}, "hidden"),
        ({"attention": {"conv": -1}}, "name layers on both sides"),
        ({"hidden": "boddy"}, r"the student has no layer 'boddy' \(did you mean 'body'"),
        ({"attention": {"body": "cnv"}}, r"the teacher has no layer 'cnv' \(did you mean 'conv'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        st.distill(Net(), Net(seed=1), loss_fn=F.cross_entropy, **options)


def test_networks_that_do_not_fit() -> None:
    x, y = batch(0)
    student, teacher = Net((3, 2), 1), Net(seed=2)
    with (
        st.distill(student, teacher, weight=1, hidden="conv") as distillation,
        pytest.raises(
            ValueError,
            match=r"hidden={'conv': 'conv'}: the student gives \(8, 3, 4, 4\) and the teacher "
            r"\(8, 8, 4, 4\); give example_inputs",
        ),
    ):
        distillation(student(x), x, y)
    with (
        st.distill(student, teacher, weight=1, attention={"conv": "body"}) as distillation,
        pytest.raises(ValueError, match=r"\(8, 16\) and the teacher \(8, 4\)"),
    ):
        distillation(student(x), x, y)
    with (
        st.distill(student, teacher, weight=1, attention="head") as distillation,
        pytest.raises(ValueError, match=r"'head' gives \(8, 3\), which has no positions"),
    ):
        distillation(student(x), x, y)
    teacher.head = nn.Linear(24, 5)
    with pytest.raises(ValueError, match=r"logits: the student gives \(8, 3\) and"):
        st.distill(student, teacher, weight=1)(student(x), x, y)
    with pytest.raises(ValueError, match="a tuple without logits"):
        st.distill(student, teacher, weight=1)((student(x),), x, y)
    tokens, sdpa = Tokens(seed=1), Tokens(seed=2, eager=False)
    inputs = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="attention=0: the teacher gave no attentions"):
        st.distill(tokens, sdpa, weight=1, attention=0)(tokens(inputs), inputs)
    with pytest.raises(ValueError, match="attention=3: the student gave attentions of 1 layers"):
        st.distill(tokens, Tokens(seed=2), weight=1, attention=3)(tokens(inputs), inputs)


def test_projections_of_a_student_that_changed() -> None:
    student, teacher = Net((3, 2), 1), Net(seed=2)
    distillation = everything(student, teacher)
    st.channels.prune(student, batch(0)[0], "l1", {"conv": 0.34}, in_place=True)
    x, y = batch(0)
    with pytest.raises(ValueError, match="for 3 channels and the student's layer gives 2 now"):
        distillation(student(x), x, y)


def test_a_teacher_that_would_be_trained() -> None:
    student = Net()
    with pytest.raises(ValueError, match=r"share conv.weight.*copy\.deepcopy"):
        st.distill(student, student)
    shared = Net(seed=1)
    shared.head = student.head
    with pytest.raises(ValueError, match=r"share head\.weight, head\.bias"):
        st.distill(student, shared)
    for parameter in student.head.parameters():
        parameter.requires_grad_(False)
    st.distill(student, shared)  # a frozen part may be shared
