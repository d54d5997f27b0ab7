"""The `Trainer` trains sparse, from the first step to a saved model, and logs it."""

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
    arguments,
    bert,
    digits,
    logged,
    quiet,
    state_of,
    trainer_of,
)
from transformers import BertForSequenceClassification, Trainer, default_data_collator

import sparsetrain as st
from sparsetrain.integrations import transformers as hf
from sparsetrain.integrations.transformers import sparse_optimizer

DENSE = [{"match": "bert.pooler.*", "dense": True}, {"match": "classifier", "dense": True}]


def encoder_only(policy: st.Policy) -> dict[str, Any]:
    return {"policy": policy.model_dump(), "rules": DENSE}


def all_masked(optimizer: st.SparseOptimizer) -> bool:
    return all((t.param.detach()[~t.mask] == 0).all() for t in optimizer.targets.values())


# From the first step to a saved model.


@pytest.mark.parametrize(
    "policy, sparsity",
    [
        (st.RigL(sparsity=0.7, total_steps=80, update={"every": 10}), 0.7),
        (
            st.HardConcrete(
                sparsity=0.5, total_steps=150, update={"every": 5, "start": 40}, exact=True
            ),
            0.5,
        ),
    ],
    ids=["rigl", "hard_concrete"],
)
def test_trains_and_leaves_a_plain_model(policy: Any, sparsity: float, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        encoder_only(policy),
        max_steps=policy.total_steps,
        per_device_train_batch_size=32,
        logging_steps=policy.total_steps // 5,
        watch={"finalize": True},
    )
    optimizer = sparse_optimizer(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.sparsity() == pytest.approx(sparsity, abs=1e-4)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert state_of(trainer).keys() == bert().state_dict().keys()
    assert same(dict(loaded.state_dict()), state_of(trainer))
    for name, mask in optimizer.masks().items():
        assert torch.equal(loaded.get_parameter(name) != 0, mask)
    again = quiet(Trainer(model=loaded, args=trainer.args, eval_dataset=digits(0, 64)))
    assert again.evaluate()["eval_loss"] == pytest.approx(evaluated, abs=1e-6)


def test_no_training_after_finalize(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, MASKED["set"], watch={"finalize": True})
    trainer.train()
    with pytest.raises(RuntimeError, match="was finalized"):
        trainer.train()


def test_without_finalize_training_goes_on(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, MASKED["set"])
    trainer.train()
    optimizer = sparse_optimizer(trainer)
    optimizer.update_masks()  # by hand, between the two; not for the log
    masks = optimizer.masks()
    trainer.train()
    assert sparse_optimizer(trainer) is optimizer
    assert optimizer.step_count == 2 * STEPS
    assert same(optimizer.masks(), masks)  # its time of changes is over
    assert not logged(trainer, "sparsity/total")


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse", "hard_concrete"])
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.1, "optim": "sgd"},
    ],
    ids=["bf16", "accumulation", "clipping"],
)
def test_options_of_the_trainer(policy: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {**MASKED, **LEARNED}[policy], **options)
    trainer.train()
    optimizer = sparse_optimizer(trainer)
    assert optimizer.step_count == trainer.state.global_step == STEPS
    wanted = {"rigl": 0.7, "nm_sparse": 0.75}.get(policy, 0.5)
    assert optimizer.sparsity() == pytest.approx(wanted, abs=0.01)
    assert policy in LEARNED or all_masked(optimizer)
    optimizer.finalize()
    assert trainer.evaluate()["eval_loss"] < 3


@pytest.mark.slow  # compiling takes its time
# torch's own tracing does what it warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("policy", ["rigl", "hard_concrete"])
def test_compiled_models(policy: str, tmp_path: Path) -> None:
    chosen = {**MASKED, **LEARNED}[policy]
    plain = trainer_of(tmp_path, chosen)
    plain.train()
    compiled = trainer_of(tmp_path, chosen, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    sparse_optimizer(plain).finalize()
    sparse_optimizer(compiled).finalize()
    expected = plain.evaluate()["eval_loss"]
    assert compiled.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)


def test_the_same_run_as_with_a_loop_of_ones_own(tmp_path: Path) -> None:
    seen = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(default_data_collator(samples))
        return seen[-1]

    model, args = bert(dropout=0.0), arguments(tmp_path, max_grad_norm=0)
    optimizers = hf.optimizers(model, args, MASKED["rigl"])
    trainer = Trainer(model, args, collate, digits(), optimizers=optimizers)
    quiet(trainer).train()

    twin = bert(dropout=0.0).train()
    optimizer, _ = hf.optimizers(twin, args, MASKED["rigl"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for batch in seen[:STEPS]:
        optimizer.zero_grad()
        twin(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    assert same(dict(twin.state_dict()), state_of(trainer))


# The log.


@pytest.mark.parametrize("watch", [{}, {"layers": True}], ids=["totals", "layers"])
def test_updates_are_logged_as_often_as_the_loss(watch: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, MASKED["gradual"], watch=watch, logging_steps=5)
    events: list[st.UpdateEvent] = []
    sparse_optimizer(trainer).register_update_hook(events.append)
    trainer.train()
    assert [step for step, _ in logged(trainer, "loss")] == [5, 10]
    found = dict(logged(trainer, "sparsity/dropped"))
    assert list(found) == [5, 10]
    dropped = {e.step: sum(layer.dropped for layer in e.layers) for e in events}
    assert list(dropped) == [0, 2, 4, 6, 8]
    assert found == {5: dropped[0] + dropped[2] + dropped[4], 10: dropped[6] + dropped[8]}
    totals = dict(logged(trainer, "sparsity/total"))
    assert totals == {5: events[2].sparsity, 10: events[4].sparsity}
    of_layer = logged(trainer, "sparsity/bert.pooler.dense.weight")
    assert len(of_layer) == (2 if watch else 0)


def test_the_last_updates_are_logged_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LEARNED["movement"], logging_steps=5)
    trainer.train()
    assert [step for step, _ in logged(trainer, "sparsity/total")] == [5, 10, STEPS]
    trainer = trainer_of(tmp_path, LEARNED["movement"], logging_strategy="no")
    trainer.train()
    assert not logged(trainer, "sparsity/total")


def test_a_log_a_training_epoch(tmp_path: Path) -> None:
    policy = st.SET(sparsity=0.7, total_steps=6, update={"every": 1})
    options: Any = {"max_steps": 6, "logging_strategy": "epoch"}
    trainer = trainer_of(tmp_path, policy, per_device_train_batch_size=600, **options)
    trainer.train()
    assert [step for step, _ in logged(trainer, "sparsity/total")] == [3, 6]
    assert [step for step, _ in logged(trainer, "loss")] == [3, 6]


def test_the_trainers_loggers_get_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, MASKED["rigl"], report_to=["tensorboard"], save_strategy="no")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.*")
    read = EventAccumulator(str(file))
    read.Reload()
    written = [(event.step, event.value) for event in read.Scalars("train/sparsity/total")]
    expected = logged(trainer, "sparsity/total")
    assert [step for step, _ in written] == [step for step, _ in expected] == [3, 6, 9]
    assert written[0][1] == pytest.approx(expected[0][1])


# Clipping by the norm of the active part.


class ClipsActive(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            sparse_optimizer(self).mask_gradients()
        return loss


def test_clipping_sees_active_gradients_when_they_are_masked_first(tmp_path: Path) -> None:
    norms = {}
    for kind in (Trainer, ClipsActive):
        model, args = bert(), arguments(tmp_path, max_steps=1, logging_steps=1)
        chosen = hf.optimizers(model, args, st.Static(sparsity=0.9))
        trainer = kind(model=model, args=args, train_dataset=digits(), optimizers=chosen)
        quiet(trainer).train()
        norms[kind] = logged(trainer, "grad_norm")[0][1]
    assert 0 < norms[ClipsActive] < 0.9 * norms[Trainer]
