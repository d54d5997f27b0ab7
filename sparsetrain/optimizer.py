"""SparseOptimizer: wraps a torch optimizer and keeps chosen weights sparse while it trains."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain import base_state, checkpoint
from sparsetrain.base_state import Resting
from sparsetrain.policies import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Assignment, Recipe, assign
from sparsetrain.report.events import UpdateEvent
from sparsetrain.report.summary import Summary, summarise
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.tracking import Tracker
from sparsetrain.wiring import check_arguments, copy_to_device_of, held_by

Closure = Callable[[], Any]
Listener = Callable[[UpdateEvent], None]


class SparseOptimizer(Optimizer):
    """A torch optimizer that holds masks on a model's weights and changes them as it steps.

    Args:
        optimizer: any torch optimizer over (some of) the model's parameters.
        model: the model whose weights are made sparse; its structure is left alone.
        policy: a policy, a `Recipe`, a dict of either, or the path of a recipe file.
        seed: of the one random source that all mask decisions use.
        storage: how sparse weights are held; "masked" keeps dense tensors with exact zeros.

    Raises:
        ValueError: the recipe does not fit the model; the message names the rule or layer.
            Model and optimizer are then as they were.
        TypeError: an argument is not what it should be.
    """

    base: Optimizer
    recipe: Recipe
    targets: dict[str, MaskedTarget]

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        policy: Policy | Recipe | Mapping[str, Any] | str | Path,
        *,
        seed: int = 0,
        storage: str = "masked",
    ) -> None:
        check_arguments(optimizer, model, storage)
        recipe = Recipe.coerce(policy)
        held, waiting = held_by(optimizer, assign(model, recipe))
        if not held:
            raise ValueError(
                "the optimizer holds none of the tensors that the recipe makes sparse: build it "
                "over the same model's parameters"
            )
        generator = torch.Generator().manual_seed(seed)
        # Optimizer.__init__ would make param groups of our own; __setstate__ does the rest of it.
        super().__setstate__(
            {
                "base": optimizer,
                "recipe": recipe,
                "targets": {},
                "step_count": 0,
                "_waiting": waiting,
                "_groups": [],
                "_generator": generator,
                "_tracker": Tracker(),
                "_listeners": OrderedDict(),
                "_resting": {},
                "_group_index": {},
                "_observed": False,
                "_stepping": False,
                "_finalized": False,
            }
        )
        self._adopt(held)
        self._attach()

    # What makes this a torch optimizer: parameters and state are those of the wrapped one.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups, shared."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state, shared."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults, shared."""
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients, as the wrapped optimizer does."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; weights the recipe speaks of become sparse.

        The policy allocates its density among the new weights alone.
        """
        self.base.add_param_group(param_group)
        self._group_index.clear()
        held, self._waiting = held_by(self.base, self._waiting)
        if held:
            self._adopt(held)

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One training step: gradient step and mask update, as the policies ask.

        Returns:
            What the closure returned, or None.
        """
        self._require_live()
        if any(p.replaces_step and p.update_is_due(self.step_count) for p, _ in self._groups):
            return self._update_instead(closure)
        # Gradients are masked after every other pre-hook, weights before every other post-hook.
        self.base._optimizer_step_pre_hooks.move_to_end(self._pre.id)
        self.base._optimizer_step_post_hooks.move_to_end(self._post.id, last=False)
        self._stepping = True
        try:
            return self.base.step() if closure is None else self.base.step(closure)
        finally:
            self._stepping = False

    # What a user asks of it.

    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor of the weight's shape, True where active (copies)."""
        return {name: target.mask.clone() for name, target in self.targets.items()}

    def sparsity(self) -> float:
        """Share of zeros over all targets together, in [0, 1]."""
        return 1.0 - sum(t.active for t in self.targets.values()) / self._total()

    def penalty(self) -> Tensor:
        """What the policies add to the loss (0 for policies without a regulariser)."""
        return torch.zeros(())

    def summary(self) -> Summary:
        """Table of targets: shape, density asked for and reached, active weights."""
        return summarise(self._groups, self.step_count)

    def density_history(self, name: str) -> tuple[float, float, float]:
        """How dense a weight is and was, for FLOPs.

        Returns:
            Density now, mean density over the steps so far, and the share of steps on which its
            dense gradient was needed. A weight that is no target is dense throughout.
        """
        if name not in self.targets:
            return 1.0, 1.0, 0.0
        target = self.targets[name]
        return target.density, *self._tracker.history(target, self.step_count)

    def register_update_hook(self, listener: Listener) -> RemovableHandle:
        """Call `listener` with an `UpdateEvent` after every mask update.

        The exploration rate counts from the first registration on (one bit a weight).
        """
        if self._tracker.explored is None:
            self._tracker.explore(self.targets.values())
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    @torch.no_grad()
    def update_masks(self) -> None:
        """Update the masks of every policy now, with the gradients that are there."""
        self._require_live()
        self._update(lambda policy: True)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero inactive weights now, after something else wrote dense ones into the model."""
        for target in self.targets.values():
            target.mask_weight()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero gradients of inactive weights now, so that clipping sees the sparse norm.

        Call it between `backward()` and clipping. It leaves gradients alone that are still
        needed dense: those of latent weights, and on steps where RigL replaces the gradient step.
        """
        self._require_live()
        self._observe()
        for policy, group in self._groups:
            if policy.replaces_step and policy.update_is_due(self.step_count):
                continue
            for target in group.targets:
                target.mask_gradient()

    @torch.no_grad()
    def finalize(self) -> None:
        """Leave a plain model with exact zeros and a plain base optimizer; no step after this."""
        self._require_live()
        for target in self.targets.values():
            target.release()
        self._pre.remove()
        self._post.remove()
        for _, group in self._groups:
            group.memory.clear()
        self._finalized = True

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's state dict plus the key "sparsetrain"; loads with weights_only."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = dict(self.base.state_dict())
        state[checkpoint.KEY] = {
            "version": checkpoint.VERSION,
            "recipe": json.dumps(self.recipe.to_dict()),
            "step_count": self.step_count,
            "generator": self._generator.get_state(),
            "targets": {n: checkpoint.describe_target(t) for n, t in self.targets.items()},
            "memories": [dict(group.memory) for _, group in self._groups],
            "tracker": self._tracker.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore base optimizer, masks, clock, generator and policies from `state_dict`.

        Load the model's own state dict too: weights live there. The caller's dict is not changed.

        Raises:
            ValueError: the checkpoint is of another policy, layer set or shape; nothing changed.
        """
        self._require_live()
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else changed
        saved = state.pop(checkpoint.KEY, None)
        checkpoint.check(saved, self.recipe, self.targets)
        self.base.load_state_dict(state)
        self.step_count = int(saved["step_count"])
        self._generator.set_state(saved["generator"].cpu())
        for name, entry in saved["targets"].items():
            target = self.targets[name]
            target.restore(checkpoint.unpack_mask(entry["mask"], target.shape), entry)
        for (_, group), memory in zip(self._groups, saved["memories"], strict=True):
            group.memory.clear()
            group.memory.update({k: copy_to_device_of(v, group) for k, v in memory.items()})
        self._tracker.load_state_dict(saved["tracker"])
        self._observed = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Copying and pickling: hooks are left out, as torch does, and ours are put back.

    def __getstate__(self) -> dict[str, Any]:
        """Everything but hooks, listeners and the generator object (its state is kept)."""
        hooks = ("_pre", "_post", "_listeners", "step")
        state = {
            key: value
            for key, value in self.__dict__.items()
            if key not in hooks and not key.startswith("_optimizer_")
        }
        groups = [(policy, group.targets, group.memory) for policy, group in self._groups]
        return state | {"_groups": groups, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of `__getstate__`."""
        generator = torch.Generator()
        generator.set_state(state["_generator"])
        groups = state["_groups"]
        super().__setstate__(state
            | {
                "_listeners": OrderedDict(),
                "_groups": [],
                "_generator": generator,
                "_group_index": {},
            }
        )
        self._groups = [(p, self._new_group(targets, memory)) for p, targets, memory in groups]
        if not self._finalized:
            self._attach()

    # Inside a step.

    def _attach(self) -> None:
        self._pre = self.base.register_step_pre_hook(self._before_base_step)
        self._post = self.base.register_step_post_hook(self._after_base_step)

    def _before_base_step(self, base: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._stepping:
            raise RuntimeError(
                "call step() of the SparseOptimizer, not of the optimizer that it wraps"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._prepare()
            return None
        return (args[0], self._guard(closure)), {}

    def _guard(self, closure: Closure) -> Closure:
        """The closure with masked weights before it and masked gradients after it."""

        def guarded() -> Any:
            with torch.no_grad():
                for target in self.targets.values():
                    target.conceal()
            loss = closure()
            self._observed = False
            self._prepare()
            return loss

        return guarded

    @torch.no_grad()
    def _observe(self) -> None:
        if not self._observed:
            for policy, group in self._groups:
                policy.observe(group, self.step_count)
            self._observed = True

    @torch.no_grad()
    def _prepare(self) -> None:
        self._observe()
        for target in self.targets.values():
            target.before_step()

    @torch.no_grad()
    def _after_base_step(self, base: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        for target in self.targets.values():
            resting = self._resting_of(target)
            target.after_step(resting.keeps_zeros)
            if not resting.keeps_zeros and not isinstance(target, LatentTarget):
                base_state.rest_inactive_state(base, target.param, target.mask, resting)
        step = self.step_count
        if any(policy.update_is_due(step) for policy, _ in self._groups):
            self._update(lambda policy: policy.update_is_due(step))
        self._tick()

    def _update_instead(self, closure: Closure | None) -> Any:
        """A step on which masks change in place of the gradient step (RigL, Algorithm 1)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._observe()
            for target in self.targets.values():
                target.check_outside_writes()
            step = self.step_count
            self._update(lambda policy: policy.update_is_due(step))
        # Schedulers built on the base optimizer would warn that it never stepped.
        self.base._opt_called = True  # type: ignore[attr-defined]
        self._tick()
        return loss

    def _update(self, chosen: Callable[[Policy], bool]) -> None:
        changes = []
        for policy, group in self._groups:
            if not chosen(policy):
                continue
            group.changes.clear()
            policy.update_masks(group, self.step_count)
            changes += group.changes
        if any(change.dropped or change.grown for change in changes):
            base_state.forget_history(self.base)
        if self._tracker.explored is not None:
            self._tracker.explore(self.targets.values())
        if self._listeners:
            event = UpdateEvent(
                self.step_count,
                self.sparsity(),
                self._tracker.exploration_rate(self._total()),
                tuple(changes),
            )
            for listener in list(self._listeners.values()):
                listener(event)

    def _tick(self) -> None:
        for policy, group in self._groups:
            dense = policy.needs_dense_gradient(self.step_count)
            self._tracker.count_step(group.targets, dense)
        self._observed = False
        self.step_count += 1

    # Taking tensors into care.

    def _new_group(self, targets: list[MaskedTarget], memory: dict[str, Any]) -> TargetGroup:
        return TargetGroup(
            targets=targets,
            generator=self._generator,
            state_of=lambda param: self.base.state.get(param, {}),
            reset_state=self._reset_state,
            memory=memory,
        )

    @torch.no_grad()
    def _adopt(self, assignments: Iterable[Assignment]) -> None:
        """Make targets: first every decision, then every change, so that errors change nothing."""
        rng_state = self._generator.get_state()
        planned = []
        try:
            for policy, candidates in ((a.policy, a.candidates) for a in assignments):
                storage = LatentTarget if policy.latent else MaskedTarget
                group = self._new_group([storage(c.name, c.param) for c in candidates], {})
                planned.append((policy, group, policy.initial_masks(group)))
        except Exception:
            self._generator.set_state(rng_state)
            raise
        for policy, group, masks in planned:
            self._groups.append((policy, group))
            for target in group.targets:
                self.targets[target.name] = target
                target.begin(masks[target.name])
                if not policy.latent:
                    resting = self._resting_of(target)
                    base_state.rest_inactive_state(
                        self.base, target.param, target.mask, resting
                    )

    def _reset_state(self, param: Tensor, indices: Tensor) -> None:
        base_state.reset_state(self.base, param, indices, self._resting[self._group_of(param)])

    def _resting_of(self, target: MaskedTarget) -> Resting:
        index = self._group_of(target.param)
        if index not in self._resting:
            group = self.base.param_groups[index]
            self._resting[index] = base_state.find_resting(self.base, group, target.param)
        return self._resting[index]

    def _group_of(self, param: Tensor) -> int:
        if id(param) not in self._group_index:
            for index, group in enumerate(self.base.param_groups):
                self._group_index.update(dict.fromkeys(map(id, group["params"]), index))
        return self._group_index[id(param)]

    def _total(self) -> int:
        return sum(target.numel for target in self.targets.values())

    def _require_live(self) -> None:
        if self._finalized:
            raise RuntimeError(
                "this SparseOptimizer was finalized; train on with a new one (Static keeps "
                "the zeros), or densely with its `base`"
            )
