"""Deciding how each weight is held: densely with a mask, or by its non-zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsetrain.candidates import Candidate
from sparsetrain.policies import LearnedPolicy, Policy
from sparsetrain.storage.csr.convert import follow_layout
from sparsetrain.storage.csr.layers import SparseLayer
from sparsetrain.storage.csr.measure import measure
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.storage.latent import LatentTarget
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.switching import only_owner, policy_needs_masked, why_masked, worth
from sparsetrain.targets import SparseTarget

Storage = Literal["masked", "csr", "auto"]

#: A layer whose density fell to this share of the one it was measured at is measured again.
_MEASURE_AGAIN = 0.7


class _Meter:
    """A forward hook that remembers the shape of a layer's input."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and module.training:
            self.shape = tuple(args[0].shape)


class StorageChoice:
    """What `storage=` asks for, and why each weight is held as it is.

    Attributes:
        why: name of a weight -> reason, where there is something to say.
    """

    def __init__(self, model: nn.Module, storage: Storage) -> None:
        self.storage = storage
        ranks = nn.parallel.DistributedDataParallel
        self._has_ranks = any(isinstance(module, ranks) for module in model.modules())
        self._dense_layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self._follows = False
        self.why: dict[str, str] = {}
        self._owners: dict[str, nn.Module | None] = {}
        self._meters: dict[str, _Meter] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._measured_at: dict[str, float] = {}

    def target_of(
        self, policy: Policy, candidate: Candidate, generator: torch.Generator
    ) -> SparseTarget:
        """The target that a candidate begins as.

        Args:
            generator: CPU random source of learned masks.

        Raises:
            ValueError: the policy cannot train the weight as it was built.
        """
        owner = only_owner(candidate)
        if isinstance(owner, SparseLayer):
            if reason := policy_needs_masked(policy):
                raise ValueError(
                    f"policy {policy.kind!r} cannot train {candidate.name}, which is built "
                    f"sparse: {reason}"
                )
            self.why[candidate.name] = "built sparse"
            return CsrTarget(candidate.name, owner, built=True)
        self._owners[candidate.name] = owner
        if isinstance(policy, LearnedPolicy):
            if self._has_ranks:
                raise ValueError(
                    f"policy {policy.kind!r} adds parameters that DistributedDataParallel does not "
                    "average: build the SparseOptimizer over the bare model first, and "
                    "wrap the model in DistributedDataParallel after it"
                )
            if hasattr(candidate.param, "placements"):
                raise ValueError(
                    f"policy {policy.kind!r} adds parameters, which have to be sharded with "
                    f"{candidate.name}: build the SparseOptimizer first and call fully_shard after "
                    "it; the optimizer goes on with the sharded parameters"
                )
            if self.storage != "masked":
                self.why[candidate.name] = policy_needs_masked(policy)
            learned = policy.learned_mask(candidate, generator)
            return LearnedTarget(candidate.name, candidate.param, candidate.places, learned)
        kind = LatentTarget if policy.latent else MaskedTarget
        return kind(candidate.name, candidate.param)

    def forbid(self, target: SparseTarget, reason: str) -> None:
        """Hold this weight densely for good."""
        self._owners[target.name] = None
        self.why[target.name] = reason

    def owner_of(self, target: SparseTarget) -> nn.Module:
        """The module of a weight that `wants_csr` said yes to."""
        owner = self._owners[target.name]
        assert owner is not None
        return owner

    @property
    def is_waiting(self) -> bool:
        """Whether a layer is still to be measured for the first time."""
        return self._meters.keys() > self._measured_at.keys()

    def can_switch(self, policy: Policy, target: SparseTarget) -> bool:
        """Whether a weight can be held either way."""
        if target.built or self.storage == "masked":
            return False
        return isinstance(target, CsrTarget) or not why_masked(policy, self._owners[target.name])

    def begin(self, policy: Policy, target: SparseTarget) -> None:
        """With `auto`, look out for the size of the layer's input."""
        if self.storage != "auto" or not self.can_switch(policy, target):
            return
        meter = self._meters[target.name] = _Meter()
        owner = self.owner_of(target)
        self._handles[target.name] = owner.register_forward_pre_hook(meter)
        self.why[target.name] = "measured after the first step"

    def wants_csr(self, policy: Policy, target: SparseTarget) -> bool:
        """Whether a weight that is held densely should be held by its non-zeros from now on."""
        if self.storage == "masked":
            return False
        if reason := why_masked(policy, self._owners[target.name]):
            self.why.setdefault(target.name, reason)
            return False
        if self.storage == "auto":
            return self._measures_faster(target)
        highest = worth(self.owner_of(target))
        wanted = target.density <= highest
        if wanted:
            self.why[target.name] = ""
        elif highest:
            self.why[target.name] = f"worth it from a density of {highest:.0%}"
        else:
            self.why[target.name] = "unfolding its patches takes longer than the product"
        return wanted

    def _measures_faster(self, target: SparseTarget) -> bool:
        name, shape = target.name, self._meters[target.name].shape
        if shape is None or target.density > _MEASURE_AGAIN * self._measured_at.get(name, 2.0):
            return False
        self._measured_at[name] = target.density
        times = measure(self.owner_of(target), target.density, shape)
        self.why[name] = f"measured: {times.dense:.2f} ms dense, {times.sparse:.2f} ms csr"
        return times.sparse < times.dense

    def measured(self) -> dict[str, Any]:
        """What a resumed run has to know to measure at the same steps."""
        shapes = {name: list(meter.shape or ()) for name, meter in self._meters.items()}
        return {"densities": dict(self._measured_at), "shapes": shapes}

    def remember(self, measured: Mapping[str, Any]) -> None:
        """Inverse of `measured`."""
        self._measured_at.update(measured.get("densities", {}))
        for name, shape in measured.get("shapes", {}).items():
            if name in self._meters and shape:
                self._meters[name].shape = tuple(shape)

    def follow_layout(self, targets: Iterable[SparseTarget]) -> None:
        """With sparse layers in the model, its dense ones take over their layout."""
        if not self._follows and any(isinstance(target, CsrTarget) for target in targets):
            follow_layout(self._dense_layers, on=True)
            self._follows = True

    def release(self) -> None:
        """Take the hooks out of the model, and let dense layers be what they were."""
        if self._follows:
            follow_layout(self._dense_layers, on=False)
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
