"""Checkpoints of the `Trainer`: what is resumed, what `load_best_model_at_end` brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import same
from trainer_runs import (
    LEARNED,
    MASKED,
    STEPS,
    agree,
    arguments,
    bert,
    digits,
    quiet,
    state_of,
    trainer_of,
)
from transformers import EvalPrediction, Trainer

import sparsetrain as st
from sparsetrain.integrations import transformers as hf
from sparsetrain.integrations.transformers import sparse_optimizer

HALF = f"checkpoint-{STEPS // 2}"


def saves(folder: Path, policy: Any, **changes: Any) -> Trainer:
    return trainer_of(folder, policy, save_strategy="steps", **changes)


@pytest.mark.parametrize("policy", [*MASKED, *LEARNED])
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    chosen = {**MASKED, **LEARNED}[policy]
    through = saves(tmp_path, chosen)
    through.train()
    resumed = trainer_of(tmp_path / "resumed", chosen)
    resumed.train(resume_from_checkpoint=str(tmp_path / HALF))
    assert agree(through, resumed)
    assert sparse_optimizer(resumed).step_count == STEPS


def test_non_zeros_alone_are_resumed_too(tmp_path: Path) -> None:
    policy = st.SET(sparsity=0.9, total_steps=STEPS, update={"every": 2})
    through = saves(tmp_path, policy, storage="csr")
    through.train()
    assert {target.storage for target in sparse_optimizer(through).targets.values()} >= {"csr"}
    resumed = trainer_of(tmp_path / "resumed", policy, storage="csr")
    resumed.train(resume_from_checkpoint=str(tmp_path / HALF))
    assert agree(through, resumed)


def test_the_log_goes_on(tmp_path: Path) -> None:
    saves(tmp_path, MASKED["rigl"]).train()
    resumed = trainer_of(tmp_path / "resumed", MASKED["rigl"])
    resumed.train(resume_from_checkpoint=str(tmp_path / HALF))
    logged = [entry for entry in resumed.state.log_history if "sparsity/total" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    saves(tmp_path, MASKED["rigl"], save_only_model=True).train()
    resumed = trainer_of(tmp_path / "resumed", MASKED["rigl"])
    with pytest.raises(ValueError, match=r"at step 6, .* no optimizer\.pt.*save_only_model=False"):
        resumed.train(resume_from_checkpoint=str(tmp_path / HALF))
    assert sparse_optimizer(resumed).step_count == 0


def test_a_checkpoint_of_another_policy_is_refused(tmp_path: Path) -> None:
    saves(tmp_path, MASKED["rigl"]).train()
    other = trainer_of(tmp_path / "other", MASKED["set"])
    with pytest.raises(ValueError, match="'rigl' there and 'set' here"):
        other.train(resume_from_checkpoint=str(tmp_path / HALF))


class MadeSparseLater(Trainer):
    """Makes its own optimizer sparse when training begins, as one with `model_init` has to."""

    policy: Any

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            base = super().create_optimizer(*args)
            self.optimizer = st.SparseOptimizer(base, self.model, self.policy)
        return self.optimizer


def made_sparse_later(folder: Path, policy: Any, **changes: Any) -> Trainer:
    data, args = digits(), arguments(folder, **changes)
    trainer = MadeSparseLater(model_init=lambda: bert(), args=args, train_dataset=data)
    trainer.policy = policy
    trainer.add_callback(hf.SparsityCallback(trainer))
    return quiet(trainer)


def test_masks_may_be_made_when_training_begins(tmp_path: Path) -> None:
    through = made_sparse_later(tmp_path, MASKED["rigl"], save_strategy="steps")
    through.train()
    resumed = made_sparse_later(tmp_path / "resumed", MASKED["rigl"])
    resumed.train(resume_from_checkpoint=str(tmp_path / HALF))
    assert agree(through, resumed)


def test_gates_that_come_after_the_checkpoint_are_refused(tmp_path: Path) -> None:
    made_sparse_later(tmp_path, LEARNED["hard_concrete"], save_strategy="steps").train()
    resumed = made_sparse_later(tmp_path / "resumed", LEARNED["hard_concrete"])
    with pytest.raises(ValueError, match="give it optimizers="):
        resumed.train(resume_from_checkpoint=str(tmp_path / HALF))


# load_best_model_at_end


def falling(evaluated: EvalPrediction) -> dict[str, float]:
    """A metric that is best at the first evaluation."""
    falling.calls -= 1  # type: ignore[attr-defined]
    return {"made_up": float(falling.calls)}  # type: ignore[attr-defined]


def best_first(folder: Path, policy: Any, **changes: Any) -> Trainer:
    falling.calls = 0  # type: ignore[attr-defined]
    trainer = saves(
        folder,
        policy,
        save_steps=4,
        eval_steps=4,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="made_up",
        greater_is_better=True,
        **changes,
    )
    trainer.compute_metrics = falling
    return trainer


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse"])
def test_the_best_weights_come_with_their_masks(policy: str, tmp_path: Path) -> None:
    trainer = best_first(tmp_path, MASKED[policy])
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    through = trainer_of(tmp_path / "other", MASKED[policy], watch={"check_total_steps": False})
    through.args.max_steps = 4
    # The learning rate of a shorter run would be another one.
    through.create_scheduler(num_training_steps=STEPS)
    through._created_lr_scheduler = False
    through.train()
    assert agree(trainer, through)


def test_the_best_gates_are_those_that_are_baked_in(tmp_path: Path) -> None:
    trainer = best_first(tmp_path, LEARNED["movement"], watch={"finalize": True})
    with pytest.warns(UserWarning, match=r"checkpoint-4, whose sparsity is 0\.3.*it was 0\.500"):
        trainer.train()
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    twin = trainer_of(tmp_path / "twin", LEARNED["movement"])
    twin._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    sparse_optimizer(twin).load_state_dict(saved)
    sparse_optimizer(twin).finalize()
    assert same(state_of(trainer), state_of(twin))


def test_the_best_model_without_its_masks_is_refused_before_training(tmp_path: Path) -> None:
    trainer = best_first(tmp_path, MASKED["rigl"], save_only_model=True)
    with pytest.raises(ValueError, match="load_best_model_at_end needs the masks"):
        trainer.train()
    assert sparse_optimizer(trainer).step_count == 0
