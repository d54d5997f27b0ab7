"""Lightning: a callback for modules whose `configure_optimizers` returns a `SparseOptimizer`.

`Trainer(callbacks=[SparsityCallback()])`. It works with `lightning.pytorch` and with
`pytorch_lightning`, which have classes of their own; so those of a `Trainer` are told by name.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.recipe import Recipe
from sparsetrain.report.logging import log_updates

__all__ = ["SparsityCallback"]

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
#: With these a `Trainer` does not know how many steps it makes.
_UNCOUNTED = ("GradientAccumulationScheduler", "StochasticWeightAveraging")
_FLATTENING = ("DeepSpeedStrategy", "FSDPStrategy")


class SparsityCallback(Callback):
    """Watches over sparse training in a `Trainer`: checks, resumes, logs, and finalizes if asked.

    What mask updates do goes to all loggers of the `Trainer`, at the step of the optimizer's clock.
    Runs with learned masks or csr storage need the callback to be resumed from a checkpoint, and
    learned masks need it in data-parallel training: Lightning loads weights and sets up
    `DistributedDataParallel` before it calls `configure_optimizers`.

    Args:
        finalize: whether the model is finalized when training ends: plain modules, exact zeros.
            The checkpoints that were saved until then are those of training.
        layers: whether the sparsity of each layer is logged too.
        check_total_steps: whether a policy for another number of steps than the `Trainer` makes is
            an error. With manual optimization the number is not known, and nothing is checked.

    Raises:
        ValueError: when training starts and `configure_optimizers` gave no `SparseOptimizer`, a
            policy is for another number of steps, or the `Trainer` does something to weights that
            masks cannot follow. The message says what to do.
    """

    def __init__(
        self, *, finalize: bool = False, layers: bool = False, check_total_steps: bool = True
    ) -> None:
        self.finalize = finalize
        self.layers = layers
        self.check_total_steps = check_total_steps
        self._optimizers: list[SparseOptimizer] = []
        self._weights = _LateWeights()
        self._hooks: list[RemovableHandle] = []
        self._is_finished = False

    # Events of the Trainer, in their order.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look out for a checkpoint whose weights do not fit the module yet."""
        if stage != "fit":
            return
        if _is_any_of(trainer.strategy, _FLATTENING):
            raise ValueError(
                f"{type(trainer.strategy).__name__} trains flattened copies of the weights, on "
                "which no mask can be held: train with DDPStrategy, or in one process"
            )
        self._is_finished = False
        self._weights.watch(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizers, which are there from now on."""
        self._optimizers = _sparse_among(trainer, pl_module)
        self._check_averaging(trainer)
        if any(_has_gates(optimizer) for optimizer in self._optimizers):
            _average_gates(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load weights that had to wait, check the number of steps, and log from now on."""
        self._weights.load(pl_module)
        steps = _steps(trainer) if pl_module.automatic_optimization else None
        if self.check_total_steps and steps is not None:
            for optimizer in self._optimizers:
                _check_total_steps(optimizer.recipe, steps)
        for number, optimizer in enumerate(self._optimizers):
            prefix = "sparsity/" if len(self._optimizers) == 1 else f"sparsity/{number}/"
            self._hooks += [
                log_updates(optimizer, logger, prefix=prefix, layers=self.layers)
                for logger in trainer.loggers
            ]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave exact zeros, whatever was averaged; finalize if asked to."""
        self._finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a checkpoint of finished training, with which there is nothing to train."""
        if not self._is_finished:
            self._weights.load(pl_module)
            self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off module and optimizers."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The same where `Tuner` stops before training starts."""
        self._stop()

    # What they are made of.

    def _finish(self) -> None:
        self._stop()
        self._is_finished = True
        for optimizer in self._optimizers:
            for target in optimizer.targets.values():
                target.check_outside_writes()  # after training the model leaves its device
            if self.finalize:
                optimizer.finalize()
            else:
                optimizer.apply_masks()

    def _stop(self) -> None:
        self._weights.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_averaging(self, trainer: Trainer) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for averaging in (c for c in callbacks if _is_any_of(c, _AVERAGING)):
            kind = type(averaging).__name__
            for optimizer in self._optimizers:
                held = {target.storage for target in optimizer.targets.values()}
                held.add(optimizer._keeper.holder.choice.storage)  # "auto" is yet to choose
                if held != {"masked"}:
                    raise ValueError(
                        f"{kind} averages tensors that keep their places, and weights are held as "
                        f"{' and '.join(sorted(held - {'masked'}))} here: train without {kind}, or "
                        "with a policy that holds masks and storage='masked'"
                    )
            if callbacks.index(self) < callbacks.index(averaging):
                raise ValueError(
                    f"{kind} writes averages of weights under different masks when training ends: "
                    f"list SparsityCallback after it, callbacks=[{kind}(...), SparsityCallback()], "
                    "so that they are masked"
                )


class _LateWeights:
    """Weights of a checkpoint that fit the module only once its optimizer is there.

    Lightning loads weights before it calls `configure_optimizers`. Learned masks and csr storage
    then give them other names, so theirs wait until all else is loaded.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, Any] | None = None
        self._hook: RemovableHandle | None = None

    def watch(self, trainer: Trainer, module: LightningModule) -> None:
        """From now on keep what a checkpoint has for the module, if it does not fit."""
        self.stop()

        # A function, which is not copied with the module when callbacks copy that.
        def before_loading(loading: nn.Module, state: OrderedDict[str, Any], *_: Any) -> None:
            if loading is not module or trainer.ckpt_path is None:
                return
            own = module.state_dict()
            self._waiting = None
            if state.keys() != own.keys():
                self._waiting = copy.copy(state)  # with the versions of its modules
                state.clear()
                state.update(own)

        hooked: Any = module
        self._hook = hooked.register_load_state_dict_pre_hook(before_loading)

    def load(self, module: LightningModule) -> None:
        """Load what had to wait.

        Raises:
            RuntimeError: it does not fit now either; torch's message lists what is amiss.
        """
        waiting = self._waiting
        self.stop()
        if waiting is not None:
            module.load_state_dict(waiting, strict=module.strict_loading)

    def stop(self) -> None:
        """Forget what waits, and let the module load as ever."""
        self._waiting = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _is_any_of(thing: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def _sparse_among(trainer: Trainer, module: LightningModule) -> list[SparseOptimizer]:
    found = [opt for opt in trainer.optimizers if isinstance(opt, SparseOptimizer)]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers)
        raise ValueError(
            f"configure_optimizers of {type(module).__name__} gave {kinds or 'nothing'}, and no "
            "SparseOptimizer: return sparsetrain.SparseOptimizer(optimizer, self, policy)"
        )
    return found


def _has_gates(optimizer: SparseOptimizer) -> bool:
    return any(target.storage == "learned" for target in optimizer.targets.values())


def _average_gates(trainer: Trainer, module: LightningModule) -> None:
    """Let DistributedDataParallel be set up again, for it does not know the gates."""
    strategy: Any = trainer.strategy
    if hasattr(strategy, "configure_ddp"):
        strategy.model = module
        strategy.configure_ddp()


def _steps(trainer: Any) -> int | None:
    """How many optimizer steps the `Trainer` makes, if that can be known."""
    if trainer.fast_dev_run or any(_is_any_of(c, _UNCOUNTED) for c in trainer.callbacks):
        return None
    steps = trainer.estimated_stepping_batches  # infinite, or -1, without an end
    return int(steps) if 0 < steps < float("inf") else None


def _check_total_steps(recipe: Recipe, steps: int) -> None:
    for policy in (recipe.policy, *(rule.policy for rule in recipe.rules)):
        planned = getattr(policy, "total_steps", None)
        if policy is not None and planned not in (None, steps):
            raise ValueError(
                f"the policy {policy.kind!r} is for total_steps={planned} and the Trainer makes "
                f"{steps}: in configure_optimizers, self.trainer.estimated_stepping_batches says "
                "how many; SparsityCallback(check_total_steps=False) if it is meant"
            )
