"""What a sparse `Trainer` is built from, and what it refuses to begin with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st_
from runs import same
from torch import nn
from torch.utils.data import BatchSampler, IterableDataset
from trainer_runs import MASKED, STEPS, arguments, bert, digits, quiet, trainer_of
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from sparsetrain.integrations import transformers as hf
from sparsetrain.integrations.transformers import sparse_optimizer

# The optimizer that Trainer would build.


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_the_base_optimizer_is_the_trainers_own(optim: str, tmp_path: Path) -> None:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    args = arguments(tmp_path, optim=optim, weight_decay=0.07, adam_beta2=0.98)
    expected = Trainer(model=model, args=args).create_optimizer()
    optimizer, scheduler = hf.optimizers(model, args, MASKED["static"])
    assert scheduler is None
    assert type(optimizer.base) is type(expected)
    assert expected.defaults.items() <= optimizer.base.defaults.items()
    for mine, usual in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in mine.pop("params")] == [id(p) for p in usual.pop("params")]
        assert mine == usual
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.07, 0.0}


def test_masks_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    def masks(seed: int | None, of_run: int) -> dict[str, torch.Tensor]:
        args = arguments(tmp_path, seed=of_run)
        return hf.optimizers(bert(), args, MASKED["static"], seed=seed)[0].masks()

    assert same(masks(None, 5), masks(5, 6))
    assert not same(masks(None, 5), masks(None, 6))


def test_optimizers_that_choose_their_parameters_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_galore(args: TrainingArguments, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        return torch.optim.AdamW, {"params": [{"params": list(model.parameters()), "rank": 8}]}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(as_galore))
    with pytest.raises(ValueError, match="optim='sgd' chooses its parameters itself"):
        hf.optimizers(bert(), arguments(tmp_path, optim="sgd"), MASKED["static"])


# How many steps there will be.


class Sized:
    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("nobody needs to look at the data")


class PlannedError(Exception):
    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.steps = steps


class Planned(TrainerCallback):
    """Stops a run before it begins, and says how many steps it would have."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        raise PlannedError(state.max_steps)


@settings(max_examples=40)
@given(
    examples=st_.integers(1, 300),
    batch_size=st_.integers(1, 40),
    accumulation=st_.integers(1, 5),
    epochs=st_.floats(0.1, 4),
    drop_last=st_.booleans(),
)
def test_total_steps_are_the_trainers(
    examples: int, batch_size: int, accumulation: int, epochs: float, drop_last: bool
) -> None:
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        dataloader_drop_last=drop_last,
    )
    assume(not drop_last or examples >= batch_size)  # Trainer has no answer to an empty epoch
    trainer = Trainer(
        model=nn.Linear(1, 1), args=args, train_dataset=Sized(examples), callbacks=[Planned()]
    )
    with pytest.raises(PlannedError) as planned:
        trainer.train()
    assert hf.total_steps(args, Sized(examples)) == planned.value.steps


@given(
    examples=st_.integers(0, 300),
    batch_size=st_.integers(1, 40),
    processes=st_.integers(1, 8),
    drop_last=st_.booleans(),
)
def test_batches_of_each_process(
    examples: int, batch_size: int, processes: int, drop_last: bool
) -> None:
    sampler = BatchSampler(range(examples), batch_size, drop_last)
    shard = BatchSamplerShard(sampler, num_processes=processes)
    found = hf._batches(examples, batch_size, processes=processes, drop_last=drop_last)
    assert found == len(shard)


def test_data_without_a_batch_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=-1, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="15 examples make no batch of 16: give more"):
        hf.total_steps(args, Sized(15))


def test_max_steps_are_taken_as_they_are(tmp_path: Path) -> None:
    class Endless(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            raise AssertionError("nobody needs to look at the data")

    assert hf.total_steps(arguments(tmp_path, max_steps=77), Endless()) == 77  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no length: set max_steps"):
        hf.total_steps(arguments(tmp_path, max_steps=-1), Endless())  # type: ignore[arg-type]


def test_a_policy_for_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, MASKED["rigl"], max_steps=STEPS + 1)
    with pytest.raises(ValueError, match=r"'rigl' is for total_steps=12 and the Trainer makes 13"):
        trainer.train()
    assert sparse_optimizer(trainer).step_count == 0
    rule = {"match": "bert.*", "policy": MASKED["gradual"].model_dump()}
    trainer = trainer_of(tmp_path, {"rules": [rule]}, max_steps=STEPS - 1)
    with pytest.raises(ValueError, match="'gradual' is for total_steps=12"):
        trainer.train()
    meant = {"check_total_steps": False}
    trainer = trainer_of(tmp_path, MASKED["rigl"], max_steps=STEPS + 1, watch=meant)
    trainer.train()
    assert sparse_optimizer(trainer).step_count == STEPS + 1


# Optimizers that would hold no masks.


def test_a_trainer_with_a_plain_optimizer_is_refused(tmp_path: Path) -> None:
    trainer = quiet(Trainer(model=bert(), args=arguments(tmp_path), train_dataset=digits()))
    trainer.add_callback(hf.SparsityCallback(trainer))
    with pytest.raises(ValueError, match="is of type AdamW, and no SparseOptimizer: give it"):
        trainer.train()


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    args, data = arguments(tmp_path), digits()
    others = hf.optimizers(bert(), args, MASKED["set"])
    trainer = quiet(Trainer(model=bert(), args=args, train_dataset=data, optimizers=others))
    trainer.add_callback(hf.SparsityCallback(trainer))
    with pytest.raises(ValueError, match=r"holds a bert\.encoder.*weight that is no parameter of"):
        trainer.train()
