"""Changing how a weight is held, with everything that the wrapped optimizer keeps for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.base_state import replace_parameter
from sparsetrain.candidates import Candidate
from sparsetrain.policies.base import DynamicPolicy, Policy
from sparsetrain.policies.engine import is_unstructured
from sparsetrain.policies.gradual import Gradual
from sparsetrain.policies.learned import LearnedPolicy
from sparsetrain.storage.csr.convert import densify, sparsify, why_not
from sparsetrain.storage.csr.target import CsrTarget
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.targets import ExchangeTarget

#: At this density and below a sparse training step is faster than a dense one
#: (reference_runs/speed, the table of layers).
_WORTH_OF_LINEAR = 0.25
_WORTH_OF_POINTWISE_CONV = 0.1


def only_owner(candidate: Candidate) -> nn.Module | None:
    """The one module that a weight belongs to, or None when several share it."""
    owners = {id(module): module for module in candidate.owners}
    return next(iter(owners.values())) if len(owners) == 1 else None


def policy_needs_masked(policy: Policy) -> str:
    """Why a policy cannot do without dense weights; empty when it can."""
    if isinstance(policy, LearnedPolicy):
        return "masks are learned on dense weights"
    if isinstance(policy, Gradual) and policy.score.accumulates:
        return "its score is a sum over steps of dense gradients"
    if policy.latent:
        return "the policy trains latent dense weights"
    if isinstance(policy, DynamicPolicy) and not is_unstructured(policy.structure):
        return "the policy moves whole units of weights"
    return ""


def why_masked(policy: Policy, owner: nn.Module | None) -> str:
    """Why csr storage cannot hold a weight at any density; empty when it can."""
    if reason := policy_needs_masked(policy):
        return reason
    if owner is None:
        return "several modules share it"
    return why_not(owner)


def worth(owner: nn.Module) -> float:
    """The density at which a layer of this type begins to gain; 0 for one that never does.

    The patches of larger convolutions have to be unfolded, which took longer than their whole dense
    product at every density and up to 512 channels.
    """
    if not isinstance(owner, nn.Conv2d):
        return _WORTH_OF_LINEAR
    return _WORTH_OF_POINTWISE_CONV if owner.kernel_size == (1, 1) else 0.0


@torch.no_grad()
def to_csr(base: Optimizer, target: ExchangeTarget, owner: nn.Module) -> CsrTarget:
    """Hold the weight by its non-zeros from now on; gradient and optimizer state come along."""
    dense = target.param
    active = target.active_indices()
    layer = sparsify(owner, target.mask)
    if dense.grad is not None:
        layer.values.grad = dense.grad.reshape(-1)[active]
    replace_parameter(base, dense, layer.values, lambda key, state: state.reshape(-1)[active])
    return CsrTarget(target.name, layer)


@torch.no_grad()
def to_masked(base: Optimizer, target: CsrTarget, fresh: dict[str, float]) -> MaskedTarget:
    """Hold the weight densely again, with exact zeros.

    Args:
        fresh: state key -> what the optimizer holds for a weight that has always been 0.
    """
    layer, active, mask = target.layer, target.active_indices(), target.mask
    values = layer.values

    def spread(key: str, state: Tensor) -> Tensor:
        dense = torch.full((target.numel,), fresh.get(key, 0.0), dtype=state.dtype)
        dense[active] = state
        return dense.view(target.shape)

    weight = densify(layer)
    if values.grad is not None:
        weight.grad = spread("", values.grad)
    replace_parameter(base, values, weight, spread)
    held = MaskedTarget(target.name, weight)
    held.replace_mask(mask)
    return held
