"""Iterative pruning with a preset of learning rates: which rounds have it, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SmallNet, batch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

import sparsetrain as st

STEPS = 9
Run = st.TrainingRun


def original(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return MultiStepLR(optimizer, [4, 7], gamma=0.1)


class Training:
    """A training function that remembers steps and rates of its runs."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, float]]] = {}
        self.fails_in: int | None = None

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.number == self.fails_in:
            raise KeyboardInterrupt
        optimizer = run.hold(torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9))
        scheduler = run.schedule(optimizer, original, STEPS)
        mine = self.seen.setdefault(run.number, [])
        for step in run.steps(STEPS, optimizer, scheduler):
            mine.append((step, optimizer.param_groups[0]["lr"]))
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
            optimizer.step()
            scheduler.step()
        optimizer.finalize()
        return {"steps": len(mine)}


ORIGINAL = [0.1] * 4 + [0.01] * 3 + [0.001] * 2
#: finetune -> numbers of the steps and rates of later rounds.
PRESETS: list[tuple[Any, range, list[float]]] = [
    (None, range(9), ORIGINAL),
    (st.Finetune(), range(9), [0.01] * 9),
    (st.Finetune(factor=0.01, steps=12), range(12), [0.001] * 12),
    (st.Finetune(rule="last", steps=3), range(3), [0.001] * 3),
    (st.Finetune(rule="rewind", steps=4), range(5, 9), [0.01] * 2 + [0.001] * 2),
    (st.Finetune(rule="rewind"), range(9), ORIGINAL),
]


@pytest.mark.parametrize(("finetune", "span", "rates"), PRESETS)
def test_later_rounds_have_the_preset(finetune: Any, span: range, rates: list[float]) -> None:
    training = Training()
    result = st.prune_iteratively(training, SmallNet(), rounds=2, rate=0.5, finetune=finetune)
    assert [step for step, _ in training.seen[0]] == list(range(9))
    assert [rate for _, rate in training.seen[0]] == pytest.approx(ORIGINAL)
    for number in (1, 2):
        assert [step for step, _ in training.seen[number]] == list(span)
        assert [rate for _, rate in training.seen[number]] == pytest.approx(rates)
    assert [round(done.sparsity, 2) for done in result.rounds] == [0, 0.5, 0.75]


def test_a_trained_model_begins_with_the_preset() -> None:
    training = Training()
    st.prune_iteratively(
        training, SmallNet(), rounds=1, trained=True, finetune=st.Finetune(rule="last", steps=2)
    )
    assert list(training.seen) == [1]
    assert [rate for _, rate in training.seen[1]] == pytest.approx([0.001] * 2)


@pytest.mark.parametrize("fails_in", [0, 1, 2])
def test_the_same_call_goes_on(fails_in: int, tmp_path: Path) -> None:
    finetune = st.Finetune(rule="rewind", steps=4)
    options: dict[str, Any] = {"rounds": 2, "rate": 0.5, "finetune": finetune}
    whole_training, whole = Training(), SmallNet()
    expected = st.prune_iteratively(whole_training, whole, **options)
    broken = Training()
    broken.fails_in = fails_in
    with pytest.raises(KeyboardInterrupt):
        st.prune_iteratively(broken, SmallNet(), folder=tmp_path, **options)
    rest, model = Training(), SmallNet()
    assert (
        st.prune_iteratively(rest, model, folder=tmp_path, **options).to_list()
        == expected.to_list()
    )
    assert {**broken.seen, **rest.seen} == whole_training.seen
    assert list(rest.seen) == list(range(fails_in, 3))
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_folder_is_of_one_preset(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 1, "folder": tmp_path}
    st.prune_iteratively(Training(), SmallNet(), finetune=st.Finetune(), **options)
    assert json.loads((tmp_path / "settings.json").read_text())["finetune"]["rule"] == "scaled"
    for other in (None, st.Finetune(factor=0.01)):
        with pytest.raises(ValueError, match="has rounds with finetune="):
            st.prune_iteratively(Training(), SmallNet(), finetune=other, **options)


def test_folders_from_before_there_were_presets(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 1, "folder": tmp_path}
    st.prune_iteratively(Training(), SmallNet(), **options)
    path = tmp_path / "settings.json"
    known = json.loads(path.read_text())
    del known["finetune"]
    path.write_text(json.dumps(known))
    training = Training()
    st.prune_iteratively(training, SmallNet(), **options)
    assert not training.seen


def test_presets_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="rewind_to=3 puts the schedule back"):
        st.prune_iteratively(Training(), SmallNet(), rounds=1, rewind_to=3, finetune=st.Finetune())

    trained: list[int] = []

    def without_schedule(run: Run) -> None:
        trained.extend(run.steps(STEPS))

    def by_hand(run: Run) -> int:
        return run.number

    for train in (without_schedule, by_hand):
        with pytest.raises(ValueError, match=r"did not ask run\.schedule"):
            st.prune_iteratively(train, SmallNet(), rounds=1, finetune=st.Finetune())
    assert len(trained) == STEPS  # of the first round: the second did not train for nothing
    # Rewinding needs as many steps as there were.
    with pytest.raises(ValueError, match="steps=10 cannot be rewound"):
        st.prune_iteratively(
            Training(), SmallNet(), rounds=1, finetune=st.Finetune(rule="rewind", steps=10)
        )
