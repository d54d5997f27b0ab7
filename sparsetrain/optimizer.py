"""SparseOptimizer: wraps a torch optimizer and keeps chosen weights sparse while it trains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparsetrain import checkpoint, narrowing
from sparsetrain._untraced import untraced
from sparsetrain.distributed.fresh_state import makes_state_only
from sparsetrain.holding import Holder
from sparsetrain.keeper import Keeper, Listener
from sparsetrain.narrowing import Cut
from sparsetrain.policies import Policy
from sparsetrain.recipe import Recipe, assign
from sparsetrain.report.summary import Summary, summarise
from sparsetrain.storage_choice import Storage
from sparsetrain.targets import SparseTarget
from sparsetrain.wiring import check_arguments

Hooks = OrderedDict[int, Any]


class SparseOptimizer(Optimizer):
    """A torch optimizer that holds masks on a model's weights and changes them as it steps.

    Args:
        optimizer: any torch optimizer over (some of) the model's parameters.
        model: the model whose weights are made sparse. Its modules stay; with csr storage some of
            them change their class until `finalize`.
        policy: a policy, a `Recipe`, a dict of either, or the path of a recipe file.
        seed: of the one random source that all mask decisions use.
        storage: how sparse weights are held. "masked" keeps dense tensors with exact zeros; "csr"
            keeps the non-zeros alone, for Linear layers and 1 x 1 convolutions sparse enough to be
            faster so; "auto" measures that layer by layer after the first step.

    Raises:
        ValueError: the recipe does not fit the model; the message names the rule or layer.
            Model and optimizer are then as they were.
        TypeError: an argument is not what it should be.
    """

    base: Optimizer
    _keeper: Keeper
    _stepping: bool
    _depth: int  # of base.step() calls within one another, as a subclass makes through super()

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
        holder = Holder(optimizer, model, cast(Storage, storage))
        keeper = Keeper(optimizer, recipe, seed, holder)
        keeper.adopt(assign(model, recipe))
        if not keeper.targets:
            raise ValueError(
                "the optimizer holds none of the tensors that the recipe makes sparse: build it "
                "over the same model's parameters"
            )
        # Optimizer.__init__ would make param groups of our own; its __setstate__ does the rest.
        super().__setstate__(
            {
                "base": optimizer,
                "_keeper": keeper,
                "_stepping": False,
                "_depth": 0,
            }
        )
        self._attach()

    # What makes this a torch optimizer: parameters and state are those of the wrapped one.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups, shared."""
        self._keeper.follow_shards()
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
        self._keeper.follow_shards()
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; weights the recipe speaks of become sparse.

        The policy allocates its density among the new weights alone.

        Raises:
            ValueError: the recipe does not fit the new weights; the group is then not added.
        """
        self._require_live()
        self.base.add_param_group(param_group)
        try:
            self._keeper.adopt_waiting()
        except Exception:
            self.base.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One training step: gradient step and mask update, as the policies ask.

        Returns:
            What the closure returned, or None.
        """
        self._require_live()
        if closure is None and makes_state_only(self.base):
            return self._make_state()
        if self._keeper.replaces_step():
            return self._update_instead(closure)
        # Gradients are masked after every other pre-hook, weights before every other post-hook.
        cast(Hooks, self.base._optimizer_step_pre_hooks).move_to_end(self._pre.id)
        cast(Hooks, self.base._optimizer_step_post_hooks).move_to_end(self._post.id, last=False)
        self._stepping, self._depth = True, 0
        try:
            return self.base.step() if closure is None else self.base.step(closure)
        except BaseException:
            self._keeper.conceal()
            raise
        finally:
            self._stepping = False

    @property
    def _finalized(self) -> bool:
        # Not an attribute of its own: Lightning's wrapper shares ours but not their changes.
        return self._keeper.released

    # What a user asks of it.

    @property
    def recipe(self) -> Recipe:
        """The validated recipe."""
        return self._keeper.recipe

    @property
    def targets(self) -> dict[str, SparseTarget]:
        """Name -> the weight tensor that is held sparse."""
        return self._keeper.targets

    @property
    def step_count(self) -> int:
        """The clock: steps that really happened (a gradient scaler may skip some)."""
        return self._keeper.step_count

    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor of the weight's shape, True where active (copies)."""
        return {name: target.mask.clone() for name, target in self.targets.items()}

    def sparsity(self) -> float:
        """Share of zeros over all targets together, in [0, 1]."""
        return self._keeper.sparsity()

    def penalty(self) -> Tensor:
        """What the policies add to the loss at the next step, a scalar without a gradient.

        0 for policies without a regulariser. Its gradient is added inside `step()`; the loss of the
        training loop needs no term for it.
        """
        return self._keeper.penalty()

    def summary(self) -> Summary:
        """Table of targets: shape, density asked for and reached, storage and why."""
        keeper = self._keeper
        return summarise(keeper.groups, self.step_count, keeper.holder.choice.why)

    def density_history(self, name: str) -> tuple[float, float, float]:
        """How dense a weight is and was, for FLOPs.

        Returns:
            Density now; mean density over the steps so far; mean share, over the same steps, of
            weights that were inactive but took a gradient. What is no target is dense throughout.
        """
        if name not in self.targets:
            return 1.0, 1.0, 0.0
        target = self.targets[name]
        return target.density, *self._keeper.tracker.history(target, self.step_count)

    def register_update_hook(self, listener: Listener) -> RemovableHandle:
        """Call `listener` with an `UpdateEvent` after every mask update.

        The exploration rate counts from the first registration on (one bit a weight).
        """
        keeper = self._keeper
        if keeper.tracker.explored is None:
            keeper.tracker.explore(self.targets.values())
        handle = RemovableHandle(keeper.listeners)
        keeper.listeners[handle.id] = listener
        return handle

    def update_masks(self) -> None:
        """Update the masks of every policy now, with the gradients that are there."""
        self._require_live()
        self._keeper.update()

    def expect_update(self) -> None:
        """Announce a forced `update_masks` before the `backward` that it should look at.

        Needed for csr storage only, which keeps gradients of inactive weights (as RigL and SNFS
        read them) just for steps whose update is due.
        """
        self._require_live()
        self._keeper.watch_gradients(always=True)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero inactive weights now, after something else wrote dense ones into the model."""
        for target in self.targets.values():
            target.mask_weight()

    def mask_gradients(self) -> None:
        """Zero gradients of inactive weights now, so that clipping sees the sparse norm.

        Call it between `backward()` and clipping. It leaves gradients alone that the step still
        needs dense: those of latent weights, of RigL when an update is due, of SNFS until its
        last update.
        """
        self._require_live()
        self._keeper.mask_gradients()

    def check_narrowing(self, cuts: Sequence[Cut] = ()) -> None:
        """Refuse to let parameters lose slices where masks or policies cannot follow.

        Without `cuts`, what no slice can be taken out of is refused. Nothing changes.

        Raises:
            ValueError: a weight is held in csr or behind a learned mask, or the policy does not
                work with the shape or the mask that would be left; the message names the layer.
        """
        self._require_live()
        narrowing.check(self._keeper, cuts)

    def narrow(self, cuts: Sequence[Cut]) -> None:
        """Take slices out of parameters, and out of all that is kept for them, between two steps.

        `st.channels.prune` calls it when channels are removed. Parameters stay the same objects.
        What is left of a weight keeps its gradient, optimizer state and mask; what each policy
        asks of it from then on is told in `sparsetrain/narrowing.py`.

        Raises:
            ValueError: as `check_narrowing`; nothing changed.
        """
        self._require_live()
        narrowing.narrow(self._keeper, cuts)

    def finalize(self, *, dense: bool = True) -> None:
        """Leave a plain model with exact zeros and a plain base optimizer; no step after this.

        Args:
            dense: whether layers in csr storage become dense ones again. Otherwise they stay
                `SparseLinear` and `SparseConv2d`, as layers do that were built so.
        """
        self._require_live()
        self._keeper.release(dense=dense)
        self._pre.remove()
        self._post.remove()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict plus the key "sparsetrain"; loads with weights_only.

        The first parameter group holds the same in the form that `torch.distributed.checkpoint`
        carries. After `finalize` it is the base optimizer's alone.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.base.state_dict()
        if not self._finalized:
            state = checkpoint.joined(state, self._keeper.state_dict(), self._keeper.remembered())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore base optimizer, masks, clock, generator and policies from `state_dict`.

        Load the model's own state dict too: weights live there. With csr storage load this first:
        it makes the layers hold their weights as they did then. The caller's dict is not changed.

        Raises:
            ValueError: the checkpoint is of another policy, layer set or shape; nothing changed.
        """
        self._require_live()
        state = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = state if changed is None else changed
        state, saved = checkpoint.split(state)
        keeper = self._keeper
        checkpoint.check(saved, self.recipe, self.targets, len(keeper.groups), keeper.can_switch)
        checkpoint.check_groups(state, self.base)
        keeper.match_storage(saved)
        self.base.load_state_dict(state)
        self._keeper.load_state_dict(saved)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __copy__(self) -> SparseOptimizer:
        """Refused: two wrappers cannot share one optimizer."""
        raise TypeError(
            "a shallow copy would share the wrapped optimizer: use copy.deepcopy of both"
        )

    # Copying and pickling: hooks are left out, as torch does, and ours are put back.

    def __getstate__(self) -> dict[str, Any]:
        """The wrapped optimizer and the keeper."""
        return {"base": self.base, "_keeper": self._keeper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of `__getstate__`."""
        super().__setstate__(state | {"_stepping": False, "_depth": 0})
        if not self._finalized:
            self._attach()

    # Inside a step.

    def _attach(self) -> None:
        self._pre = self.base.register_step_pre_hook(self._before_base_step)
        self._post = self.base.register_step_post_hook(self._after_base_step)

    def _make_state(self) -> None:
        """A step of the base optimizer that is none of training: masks and clock stay."""
        self._stepping, self._depth = True, 1
        try:
            self.base.step()
        finally:
            self._stepping = False

    # The base optimizer's step may be compiled; masks and clock stay out of its graph.

    def _before_base_step(self, base: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        return untraced(self._begin_base_step)(args, kwargs)

    def _after_base_step(self, base: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        untraced(self._end_base_step)()

    def _begin_base_step(self, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._stepping:
            raise RuntimeError(
                "call step() of the SparseOptimizer, not of the optimizer that it wraps"
            )
        self._depth += 1
        if self._depth > 1:
            return None
        closure = args[1] if len(args) > 1 else None
        if closure is None:
            self._keeper.prepare()
            return None
        return (args[0], self._keeper.guard(closure)), kwargs

    def _end_base_step(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._keeper.after_step()

    def _update_instead(self, closure: Callable[[], Any] | None) -> Any:
        """A step on which masks change in place of the gradient step (RigL, Algorithm 1)."""
        loss = None
        if closure is not None:
            self._keeper.show_masked()
            with torch.enable_grad():
                loss = closure()
        untraced(self._keeper.update_instead)()
        # Schedulers built on the base optimizer would warn that it never stepped.
        cast(Any, self.base)._opt_called = True
        return loss

    def _require_live(self) -> None:
        if self._finalized:
            raise RuntimeError(
                "this SparseOptimizer was finalized; train on with a new one (Static keeps "
                "the zeros), or densely with its `base`"
            )
        self._keeper.follow_shards()
