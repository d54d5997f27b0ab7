"""Slow, obvious training with masks, to compare the policies with.

One torch SGD with momentum on a plain network; masks are dicts of bool tensors, and everything is
done densely, with full sorts, in the order in which the papers tell it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from runs import OPTIMIZERS, SmallNet, backward
from torch import Tensor

import sparsetrain as st


@dataclass
class Twin:
    """A network and its masks, trained by hand."""

    model: SmallNet
    base: torch.optim.Optimizer
    masks: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    @classmethod
    def of(cls, optimizer: st.SparseOptimizer, seed: int = 0) -> Twin:
        """The twin of a wrapped optimizer that has not stepped yet."""
        model = SmallNet(seed)
        twin = cls(model, OPTIMIZERS["momentum"](model.parameters()), optimizer.masks())
        twin.apply_masks()
        return twin

    def weight(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()

    def momentum(self, name: str) -> Tensor | None:
        return self.base.state[self.model.get_parameter(name)].get("momentum_buffer")

    def backward(self) -> None:
        """Dense gradients of the step's batch, kept aside and then masked."""
        backward(self.model, self.step)
        for name, mask in self.masks.items():
            gradient = self.model.get_parameter(name).grad
            self.gradients[name] = gradient.clone()
            gradient[~mask] = 0.0

    def apply_masks(self) -> None:
        for name, mask in self.masks.items():
            self.weight(name)[~mask] = 0.0

    def install(self, name: str, mask: Tensor) -> None:
        """A new mask; weights and momenta of what was not active before are 0."""
        was, self.masks[name] = self.masks[name], mask
        for tensor in (self.weight(name), self.momentum(name)):
            if tensor is not None:
                tensor[~(was & mask)] = 0.0

    def train(
        self,
        steps: int,
        update: Callable[[Twin], None],
        *,
        at: Callable[[int], bool],
        instead: bool = False,
    ) -> None:
        """Train; `update` changes the masks at the steps `at` says, after or instead of a step."""
        for _ in range(steps):
            self.backward()
            due = at(self.step)
            if not (due and instead):
                self.base.step()
                self.apply_masks()
            if due:
                update(self)
            self.step += 1


def straight_through(latent: SmallNet, seen: SmallNet, masks: dict[str, Tensor], step: int) -> None:
    """Gradients for the latent weights: those at their masked copies in another network."""
    with torch.no_grad():
        for name, weight in latent.named_parameters():
            mask = masks.get(name)
            value = weight if mask is None else torch.where(mask, weight, 0.0)
            seen.get_parameter(name).copy_(value)
    backward(seen, step)
    for name, weight in latent.named_parameters():
        weight.grad = seen.get_parameter(name).grad.clone()


def ranks(scores: Tensor) -> Tensor:
    """0 for the largest score, of equal ones the lower index first; of the shape of `scores`."""
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores.view(-1)[i]), i))
    result = torch.empty(scores.numel(), dtype=torch.int64)
    result[torch.tensor(order)] = torch.arange(scores.numel())
    return result.view(scores.shape)


def top(scores: Tensor, k: int) -> Tensor:
    """Mask of the `k` largest, by a full sort."""
    return ranks(scores) < k


def without_smallest(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask less `count` active weights of least magnitude, of equal ones the lower index."""
    active = mask.view(-1).nonzero().view(-1).tolist()
    dropped = sorted(active, key=lambda i: (abs(float(weight.view(-1)[i])), i))[:count]
    kept = mask.clone()
    kept.view(-1)[dropped] = False
    return kept


def agree(model: SmallNet, optimizer: st.SparseOptimizer, twin: Twin) -> None:
    """Same masks, and the same weights to the last bit."""
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, twin.masks[name]), f"masks of {name} differ"
    for name, weight in model.named_parameters():
        assert torch.equal(weight, twin.model.get_parameter(name)), f"weights of {name} differ"
