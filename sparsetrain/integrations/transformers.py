"""Hugging Face's `Trainer`: the optimizer that it would build, made sparse, and a callback.

`Trainer(model, args, ..., optimizers=optimizers(model, args, policy))`, and one line after it:
`trainer.add_callback(SparsityCallback(trainer))`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.policies import Policy
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.recipe import Recipe
from sparsetrain.report.events import UpdateEvent

__all__ = ["SparsityCallback", "optimizers", "sparse_optimizer", "total_steps"]

_OPTIMIZER_FILE = "optimizer.pt"  # of a checkpoint's folder


def total_steps(args: TrainingArguments, train_dataset: Sized) -> int:
    """Optimizer steps that a `Trainer` makes, for the `total_steps` of a policy.

    Args:
        args: with the batch size, the accumulation, the epochs or `max_steps`.
        train_dataset: the one that the `Trainer` gets.

    Raises:
        ValueError: neither `args.max_steps` nor the length of the data is known, or the data make
            no batch.
    """
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(train_dataset, "__len__"):
        raise ValueError("train_dataset has no length: set max_steps in the TrainingArguments")
    batches = _batches(
        len(train_dataset),
        args.train_batch_size,
        processes=1 if _splits_batches(args) else args.world_size,
        drop_last=args.dataloader_drop_last,
    )
    if not batches:
        raise ValueError(
            f"{len(train_dataset)} examples make no batch of {args.train_batch_size}: give more, "
            "lower per_device_train_batch_size, or set dataloader_drop_last=False"
        )
    updates = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * updates)


def _batches(examples: int, batch_size: int, *, processes: int, drop_last: bool) -> int:
    """Batches of an epoch on each process."""
    if drop_last:
        return examples // batch_size // processes
    return math.ceil(math.ceil(examples / batch_size) / processes)


def _splits_batches(args: TrainingArguments) -> bool:
    return bool(getattr(args.accelerator_config, "split_batches", False))


def optimizers(
    model: nn.Module,
    args: TrainingArguments,
    policy: Policy | Recipe | Mapping[str, Any] | str | Path,
    *,
    seed: int | None = None,
    storage: str = "masked",
) -> tuple[SparseOptimizer, None]:
    """What `Trainer(optimizers=...)` takes: its usual optimizer, made sparse.

    The optimizer is the one that `args` ask for, with weight decay on the parameters that
    `Trainer` gives it to. None stands for the scheduler, which `Trainer` then builds itself.

    Args:
        policy: as for `SparseOptimizer`.
        seed: of the mask decisions; `args.seed` if None.
        storage: as for `SparseOptimizer`.

    Raises:
        ValueError: the recipe does not fit the model, or `args.optim` names an optimizer that
            chooses its parameters itself (GaLore, APOLLO, LOMO and the like).
    """
    base = _usual_optimizer(model, args)
    seed = args.seed if seed is None else seed
    return SparseOptimizer(base, model, policy, seed=seed, storage=storage), None


def _usual_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """What `Trainer.create_optimizer` builds."""
    made, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    chooses = options.keys() & {"params", "model", "optimizer_dict"}
    if chooses or not (isinstance(made, type) and issubclass(made, Optimizer)):
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} chooses its parameters itself: build that "
            "optimizer, wrap it in a SparseOptimizer and give Trainer optimizers=(wrapped, None)"
        )
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decaying], "weight_decay": args.weight_decay},
        {"params": [p for n, p in trained if n not in decaying], "weight_decay": 0.0},
    ]
    optimizer: Optimizer = made(groups, **options)
    return optimizer


def sparse_optimizer(trainer: Trainer) -> SparseOptimizer:
    """The one that a `Trainer` steps, without what Accelerate puts around it.

    Raises:
        ValueError: the `Trainer` steps another kind of optimizer, or has none yet.
    """
    found: Any = trainer.optimizer
    while not isinstance(found, SparseOptimizer):
        if not hasattr(found, "optimizer"):
            raise ValueError(
                f"the Trainer's optimizer is {_described(found)}, and no SparseOptimizer: give it "
                "optimizers=sparsetrain.integrations.transformers.optimizers(model, args, policy)"
            )
        found = found.optimizer
    return found


class SparsityCallback(TrainerCallback):
    """Watches over sparse training in a `Trainer`: checks, logs, and finalizes if asked to.

    Before the first step it makes sure that the `Trainer` steps a `SparseOptimizer` of its own
    model, that the policy's `total_steps` are those of the run, and that masks were resumed where
    weights were. What mask updates do goes to the `Trainer`'s log, as often as the loss does.
    With `load_best_model_at_end` the best checkpoint's masks follow its weights.

    Args:
        trainer: the one that it is added to.
        finalize: whether the model is finalized when training ends: plain modules, exact zeros,
            ready for `trainer.save_model`. There is no training on after it.
        layers: whether the sparsity of each layer is logged too.
        check_total_steps: whether a policy for another number of steps is an error.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        finalize: bool = False,
        layers: bool = False,
        check_total_steps: bool = True,
    ) -> None:
        self.trainer = trainer
        self.finalize = finalize
        self.layers = layers
        self.check_total_steps = check_total_steps
        self._given = trainer.optimizer is not None
        self._events: list[UpdateEvent] = []
        self._reached = 0.0
        self._hook: RemovableHandle | None = None

    # Events of the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the run is what the policy was made for, and listen to mask updates."""
        optimizer = sparse_optimizer(self.trainer)
        self._check_model(optimizer)
        self._check_resumed(optimizer, state)
        if self.check_total_steps:
            _check_total_steps(optimizer.recipe, state.max_steps)
        if args.load_best_model_at_end and args.save_only_model:
            raise ValueError(
                "load_best_model_at_end needs the masks of the best checkpoint, which are in its "
                f"{_OPTIMIZER_FILE}: set save_only_model=False"
            )
        self._stop_listening()
        self._hook = optimizer.register_update_hook(self._events.append)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log when the Trainer does, and at the last step."""
        if control.should_log or (control.should_training_stop and args.logging_strategy != "no"):
            self._log(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log when the Trainer does."""
        if control.should_log:
            self._log(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the masks of the best checkpoint back if its weights were; finalize if asked to."""
        self._stop_listening()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._follow_best(Path(state.best_model_checkpoint))
        if self.finalize:
            sparse_optimizer(self.trainer).finalize()

    # What they are made of.

    def _check_model(self, optimizer: SparseOptimizer) -> None:
        if self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed trains flattened copies of the weights, on which no mask can be held: "
                "train without it"
            )
        model = self.trainer.model
        assert model is not None  # it trains
        trained = {id(parameter) for parameter in model.parameters()}
        for name, target in optimizer.targets.items():
            if id(target.param) not in trained:
                raise ValueError(
                    f"the SparseOptimizer holds a {name} that is no parameter of the Trainer's "
                    "model: wrap the optimizer of that very model"
                )

    def _check_resumed(self, optimizer: SparseOptimizer, state: TrainerState) -> None:
        if state.global_step == 0:
            return
        if optimizer.step_count == 0:
            raise ValueError(
                f"training resumes at step {state.global_step}, but the checkpoint has no "
                f"{_OPTIMIZER_FILE} with the masks; checkpoints need save_only_model=False"
            )
        learned = any(isinstance(policy, LearnedPolicy) for policy in _policies(optimizer.recipe))
        if learned and not self._given:
            raise ValueError(
                "the gates of learned masks are weights of the model, and this Trainer made its "
                "optimizer sparse after it had loaded the checkpoint, so they were not loaded: to "
                "resume, give it optimizers=... when it is built"
            )

    def _log(self, control: TrainerControl) -> None:
        if not self._events:
            return
        last = self._events[-1]
        scalars = last.scalars()
        for moved in ("dropped", "grown"):
            key = f"sparsity/{moved}"
            scalars[key] = sum(event.scalars()[key] for event in self._events)
        if not self.layers:
            for layer in last.layers:
                del scalars[f"sparsity/{layer.name}"]
        self._reached = last.sparsity
        self._events.clear()
        should_log = control.should_log
        self.trainer.log(scalars)
        control.should_log = should_log  # a log counts as done, but that of the loss is to come

    def _follow_best(self, folder: Path) -> None:
        optimizer = sparse_optimizer(self.trainer)
        saved = torch.load(folder / _OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved)
        if optimizer.sparsity() < self._reached - 0.01:
            warnings.warn(
                f"load_best_model_at_end brought back {folder.name}, whose sparsity is "
                f"{optimizer.sparsity():.3f}; at the end of training it was {self._reached:.3f}",
                stacklevel=2,
            )

    def _stop_listening(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _policies(recipe: Recipe) -> Iterator[Policy]:
    for policy in (recipe.policy, *(rule.policy for rule in recipe.rules)):
        if policy is not None:
            yield policy


def _check_total_steps(recipe: Recipe, steps: int) -> None:
    for policy in _policies(recipe):
        planned = getattr(policy, "total_steps", None)
        if planned not in (None, steps):
            raise ValueError(
                f"the policy {policy.kind!r} is for total_steps={planned} and the Trainer makes "
                f"{steps}: sparsetrain.integrations.transformers.total_steps(args, train_dataset) "
                "says how many; SparsityCallback(trainer, check_total_steps=False) if it is meant"
            )


def _described(optimizer: Optimizer | None) -> str:
    return "missing" if optimizer is None else f"of type {type(optimizer).__name__}"
