"""One policy with one optimizer on one network, and its training runs as they can be compared."""

from __future__ import annotations

import hashlib
import inspect
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsetrain.batches import called
from sparsetrain.candidates import plain_name
from sparsetrain.optimizer import SparseOptimizer
from sparsetrain.policies import Policy
from sparsetrain.policies.group import TargetGroup
from sparsetrain.recipe import Recipe
from sparsetrain.targets import SparseTarget
from sparsetrain.testing.broken import BrokenInvariant
from sparsetrain.testing.problem import MakeOptimizer

#: Gives (inputs, targets) of a step, always the same.
BatchOf = Callable[[int], tuple[Any, Any]]
#: (outputs, targets) -> scalar.
Loss = Callable[[Any, Any], Tensor]
#: What a run looks like after a step: (what, of which layer) -> a fingerprint of its bits.
Mark = dict[tuple[str, str], bytes]


@dataclass(frozen=True)
class Case:
    """What an invariant looks at. It may start as many runs as it likes; all begin alike.

    Attributes:
        recipe: holds the policy.
        new_model: makes the network, with the same weights each time.
        new_optimizer: makes the optimizer of a model's parameters.
        batch: of a step.
        loss: of outputs and targets.
        steps: of a run.
        optimizer: what errors call the optimizer.
        seed: of the policies.
        storage: as for `SparseOptimizer`.
    """

    recipe: Recipe
    new_model: Callable[[], nn.Module]
    new_optimizer: MakeOptimizer
    batch: BatchOf
    loss: Loss
    steps: int
    optimizer: str
    seed: int = 0
    storage: str = "masked"

    def batch_for(self, model: nn.Module, step: int) -> tuple[Any, Any]:
        """Inputs and targets of a step, where the model is."""
        device = next(model.parameters()).device

        def moved(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        inputs, targets = pytree.tree_map(moved, self.batch(step))
        return inputs, targets

    def backward(self, model: nn.Module, step: int) -> Tensor:
        """Gradients of the batch of a step, and its loss."""
        inputs, targets = self.batch_for(model, step)
        model.zero_grad()
        seed_torch(step)  # dropout and the like depend on the number of the step alone
        loss = self.loss(called(model, inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def start(self, *, seed: int | None = None) -> Run:
        """A fresh network and its wrapped optimizer."""
        model = self.new_model().train()
        base = self.new_optimizer(model.parameters())
        return Run(self, model, self.wrap(base, model, seed=seed))

    def wrap(
        self, base: Optimizer, model: nn.Module, *, seed: int | None = None
    ) -> SparseOptimizer:
        """The optimizer with the case's policy around it."""
        chosen = self.seed if seed is None else seed
        return SparseOptimizer(base, model, self.recipe, seed=chosen, storage=self.storage)


class Run:
    """A network in training.

    Attributes:
        disturb: called between the backward pass and the step, with the number of the step.
    """

    def __init__(self, case: Case, model: nn.Module, optimizer: SparseOptimizer) -> None:
        self.case = case
        self.model = model
        self.optimizer = optimizer
        self.disturb: Callable[[int], None] = lambda step: None
        self.needs_closure = needs_closure(optimizer.base)

    # Training.

    def backward(self, step: int) -> Tensor:
        """Gradients of the batch of a step, and its loss."""
        loss = self.case.backward(self.model, step)
        self.disturb(step)
        return loss

    def step(self, step: int, *, closure: bool = False) -> float:
        """One training step; returns the loss."""
        if closure or self.needs_closure:
            loss = self.optimizer.step(partial(self.backward, step))
        else:
            loss = self.backward(step)
            self.optimizer.step()
        return float(loss.detach())

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[int]:
        """Train from step `first` to `last` - 1, to the end of the case by default.

        Yields:
            The number of each step, after it.
        """
        for step in range(first, self.case.steps if last is None else last):
            self.step(step)
            yield step

    def advance(self, first: int = 0, last: int | None = None) -> None:
        """Train as `steps` does, to the end."""
        for _ in self.steps(first, last):
            pass

    def train(
        self, first: int = 0, last: int | None = None, *, closure: bool = False
    ) -> dict[int, Mark]:
        """Train as `steps` does; returns step -> mark after it."""
        stop = self.case.steps if last is None else last
        return {step: self.mark(self.step(step, closure=closure)) for step in range(first, stop)}

    # What there is to look at.

    @property
    def groups(self) -> list[tuple[Policy, TargetGroup]]:
        """The policies with what they hold."""
        return self.optimizer._keeper.groups

    @property
    def held(self) -> list[tuple[Policy, SparseTarget]]:
        """Every target with the policy that holds it."""
        return [(policy, target) for policy, group in self.groups for target in group.targets]

    def is_due(self, step: int) -> bool:
        """Whether any policy changes its masks at this step."""
        return any(policy.update_is_due(step) for policy, _ in self.groups)

    def mark(self, loss: float = 0.0) -> Mark:
        """Fingerprints of loss, clock, weights, masks and buffers as they are now."""
        found = mark_of(self.model, loss)
        found["the step count", ""] = str(self.optimizer.step_count).encode()
        for name, target in self.optimizer.targets.items():
            found["the mask", name] = fingerprint(target.mask)
        return found


def mark_of(model: nn.Module, loss: float) -> Mark:
    """Fingerprints of a loss and of everything that a model holds."""
    found = {("the loss", ""): struct.pack("d", loss)}
    for name, tensor in tensors_of(model).items():
        found["the value", plain_name(name)] = fingerprint(tensor)
    return found


def policies_of(recipe: Recipe) -> list[Policy]:
    """The policies of a recipe, those of its rules too."""
    found = [] if recipe.policy is None else [recipe.policy]
    return found + [rule.policy for rule in recipe.rules if rule.policy is not None]


def seed_torch(seed: int) -> None:
    """Seed torch's global random numbers.

    `torch.manual_seed` also asks every kind of device that is not there, which takes longer than a
    step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if has_cuda_started():
        torch.cuda.manual_seed_all(seed)


def has_cuda_started() -> bool:
    """Whether there are random numbers on CUDA devices, which a mere look would bring there."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def needs_closure(base: Optimizer) -> bool:
    """Whether an optimizer cannot step without a closure (as LBFGS)."""
    parameters = inspect.signature(type(base).step).parameters
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty


def step_plainly(base: Any, again: Callable[[], Tensor]) -> None:
    """A step without a policy, gradients being there; `again` is for optimizers with closures."""
    if needs_closure(base):
        base.step(again)
    else:
        base.step()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a state dict."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def fingerprint(tensor: Tensor) -> bytes:
    """A number that tells other bits; 0 and -0 are alike."""
    values = tensor.detach().cpu().contiguous()
    if values.is_floating_point() and values.element_size() > 1:
        values = values + 0.0
    data = values.view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def require_alike(expected: dict[int, Mark], found: dict[int, Mark], why: str) -> None:
    """Raise `BrokenInvariant` where two runs part, naming the first step and layer.

    Args:
        why: they should not, as in "a resumed run differs".
    """
    for step, mark in found.items():
        require_same(expected[step], mark, why, step)


def require_same(expected: Mark, found: Mark, why: str, step: int | None = None) -> None:
    """Raise `BrokenInvariant` where two marks differ."""
    for key in expected.keys() | found.keys():
        if expected.get(key) != found.get(key):
            raise _difference(expected, found, why, step)


def _difference(expected: Mark, found: Mark, why: str, step: int | None) -> BrokenInvariant:
    keys = [*expected, *(key for key in found if key not in expected)]
    differing = [key for key in keys if expected.get(key) != found.get(key)]
    # A mask says more than the weights that follow from it, and those more than the loss.
    order = ["the mask", "the value", "the step count", "the loss"]
    what, layer = min(differing, key=lambda key: order.index(key[0]))
    return BrokenInvariant(f"{why} in {what}", step=step, layer=layer or None)
