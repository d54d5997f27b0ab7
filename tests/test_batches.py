"""Batches of any iterable, and what curvature says about those that it cannot use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsetrain.curvature import fisher_diagonal, per_sample_gradients

X, Y = torch.randn(6, 4), torch.randint(3, (6,))


class Keyworded(nn.Module):
    """A model that takes its inputs by name, one of them optional."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        outputs = self.layer(values)
        return outputs if scale is None else outputs * scale.unsqueeze(1)


def fisher(batches: Any, model: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return fisher_diagonal(model or Keyworded(), batches, F.cross_entropy, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name]) for name in a | b)


def test_every_form_of_a_batch_is_the_same() -> None:
    right = fisher([(X, Y)])
    ones = torch.ones(6)
    forms: list[Any] = [
        DataLoader(TensorDataset(X, Y), batch_size=4),
        iter([(X[:1], Y[:1]), (X[1:], Y[1:])]),
        [[X, Y]],
        [((X,), Y)],
        [((X, ones), Y)],
        [({"values": X}, Y)],
        [({"values": X, "scale": ones}, Y)],
    ]
    for form in forms:
        assert same(fisher(form), right)
    halves = fisher([({"values": X, "scale": ones / 2}, Y)])
    assert not same(halves, right)


def test_an_adapter_takes_a_batch_apart() -> None:
    batches = [{"values": X, "labels": Y, "text": ["six"] * 6}]
    found = fisher(batches, adapter=lambda b: ({"values": b["values"]}, b["labels"]))
    assert same(found, fisher([(X, Y)]))
    with pytest.raises(ValueError, match=r"mapping of values, labels, text: give an adapter"):
        fisher(batches)


def test_a_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    fisher([(X, Y)])
    assert not capsys.readouterr().out
    fisher([(X, Y)] * 3, progress=True)
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got no batch: the iterable is empty"),
        ([X], r"expects batches of \(inputs, targets\), not Tensor"),
        ([(X, Y, Y)], "not a tuple of 3"),
        ([((X, torch.ones(5)), Y)], r"samples along dimension 0.*\(6, 4\), \(5,\)"),
        ([("text", Y)], "the batch has no tensor"),
        ([(X[:0], Y[:0])], r"\(0, 4\)"),
    ],
)
def test_what_cannot_be_understood_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"fisher_diagonal.*{message}"):
        fisher(batches)


def test_an_iterator_that_was_used_up_is_told() -> None:
    batches = iter([(X, Y)])
    fisher(batches)
    with pytest.raises(ValueError, match="an iterator that was used up before"):
        fisher(batches)


def test_a_loss_has_to_be_a_finite_number() -> None:
    model = Keyworded()
    with pytest.raises(ValueError, match="one number for a batch of one sample"):
        fisher_diagonal(model, [(X, Y)], lambda o, t: o)
    bad = X.clone()
    bad[4, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss of sample 4 of a batch of 6 is nan"):
        fisher([(bad, Y)])


def test_batch_statistics_have_no_per_sample_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="1 normalises by the statistics of the batch"):
        fisher([(X, Y)], model)


class Random(nn.Module):
    """Dropout that does not stop in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.9)


def test_random_numbers_in_evaluation_mode_are_refused() -> None:
    with pytest.raises(RuntimeError, match="draws random numbers in evaluation mode"):
        per_sample_gradients(Random(), [(X, Y)], F.cross_entropy)


class Branching(nn.Module):
    """A model that torch.func cannot vectorise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if float(x.sum()) > 0 else 2 * x, self.scale)


def test_a_model_that_branches_on_values_can_be_looped() -> None:
    with pytest.raises(RuntimeError, match="use method='loop'"):
        per_sample_gradients(Branching(), [(X, Y)], F.cross_entropy)
    found = per_sample_gradients(Branching(), [(X, Y)], F.cross_entropy, method="loop")
    assert found["scale"].shape == (6, 3, 4)


class Overwriting(nn.Module):
    """The input of a layer is changed in place after the layer had it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        outputs = self.second(hidden)
        hidden += 1
        return outputs


def test_an_input_that_is_overwritten_is_told() -> None:
    with pytest.raises(RuntimeError, match="the input of second was changed in place"):
        fisher([(X, Y)], Overwriting())
