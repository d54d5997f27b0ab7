"""The training loops that `learned_masks` times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

import sparsetrain as st
from reference_runs.speed import naive_masks
from reference_runs.speed.contenders import batches
from sparsetrain.storage.learned import LearnedTarget
from sparsetrain.workbench import Dataset, build, load

SPARSITY, BATCH = 0.95, 100
NETWORKS = {"lenet_300_100": "LeNet-300-100", "lenet_5": "LeNet-5"}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


@dataclass(frozen=True)
class Case:
    """A method: ours for a number of steps, and the naive one.

    Attributes:
        gates_differ: ours changes the gradients of gates beyond what the method says.
        checked: policy under which the two are compared, if not the one that is timed.
    """

    label: str
    policy: Callable[[int], st.Policy]
    naive: type[naive_masks.NaiveMask]
    under_sgd: bool = True
    gates_differ: bool = False
    checked: st.Policy | None = None


def _movement(steps: int, **options: Any) -> st.Policy:
    return st.Movement(sparsity=SPARSITY, total_steps=steps, allocation="global", **options)


# The last step's count is exact, so that nothing is left to steer while steps are timed.
CASES: dict[str, Case] = {
    "soft_threshold": Case(
        "Soft threshold (STR)",
        lambda steps: st.SoftThreshold(sparsity=SPARSITY, total_steps=steps),
        naive_masks.NaiveSoftThreshold,
        gates_differ=True,
    ),
    "hard_concrete": Case(
        "Hard concrete (L0)",
        lambda steps: st.HardConcrete(sparsity=SPARSITY, total_steps=steps, exact=True),
        naive_masks.NaiveHardConcrete,
    ),
    "gumbel_softmax": Case(
        "Gumbel-softmax",
        lambda steps: st.GumbelSoftmax(sparsity=SPARSITY, total_steps=steps, exact=True),
        naive_masks.NaiveGumbelSoftmax,
    ),
    "variational_dropout": Case(
        "Variational dropout",
        lambda steps: st.VariationalDropout(sparsity=SPARSITY, total_steps=steps, exact=True),
        naive_masks.NaiveVariationalDropout,
        under_sgd=False,
        # The naive one adds 1e-8 to w^2, which matters for the tiny weights that it ends with.
        checked=st.VariationalDropout(strength=1e-4, warm_up=0.0, log_sigma2=-8.0),
    ),
    "movement": Case("Movement, top-k", _movement, naive_masks.NaiveTopScores),
    "soft_movement": Case(
        "Movement, threshold",
        lambda steps: _movement(steps, mode="threshold"),
        naive_masks.NaiveSoftScores,
        gates_differ=True,  # by the regulariser's weight, which ours measures anew
    ),
}


@cache
def data() -> Dataset:
    """Fashion-MNIST."""
    return load("fashion_mnist")


class Loop:
    """A network in training over the same batches, again and again."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    last_loss: Tensor  # without a regulariser

    def __init__(self, network: str) -> None:
        self.model = build(network, in_shape=(1, 28, 28), classes=10, seed=0)
        self.stream = batches(data(), BATCH)

    def loss(self) -> Tensor:
        """Loss of the next batch."""
        x, y = next(self.stream)
        loss = F.cross_entropy(self.model(x), y)
        self.last_loss = loss.detach()
        return loss

    def train_step(self) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def settle(self, steps: int) -> None:
        """Train, then stand still: steps take as long as any other but change no weight."""
        torch.manual_seed(0)
        for _ in range(steps):
            self.train_step()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0


class Dense(Loop):
    """Plain training."""

    def __init__(self, network: str, optimizer: str) -> None:
        super().__init__(network)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())


class Ours(Loop):
    """Training with a learned policy."""

    optimizer: st.SparseOptimizer

    def __init__(self, network: str, optimizer: str, policy: st.Policy) -> None:
        super().__init__(network)
        base = OPTIMIZERS[optimizer](self.model.parameters())
        self.optimizer = st.SparseOptimizer(base, self.model, policy)
        self.policy = policy

    @property
    def targets(self) -> dict[str, LearnedTarget]:
        """Name -> masked weight."""
        return {n: t for n, t in self.optimizer.targets.items() if isinstance(t, LearnedTarget)}

    def require_sparsity(self, method: str) -> None:
        """Raise RuntimeError unless the sparsity is the one asked for."""
        reached = self.optimizer.sparsity()
        if abs(reached - SPARSITY) > 1e-3:
            raise RuntimeError(f"{method} is at a sparsity of {reached:.4f} after settling")


class Naive(Loop):
    """The naive version, in the state that ours is in: weights, gates and optimizer."""

    def __init__(self, network: str, optimizer: str, case: Case, ours: Ours) -> None:
        super().__init__(network)
        targets = ours.targets
        gates = {n: t.learned.gates()[0].detach() for n, t in targets.items()}
        self.masks = naive_masks.wrap(self.model, case.naive, gates)
        self.pairs = self._pairs(ours)
        groups = []
        for group in ours.optimizer.param_groups:
            options = {key: group[key] for key in ("lr", "weight_decay")}
            groups.append({"params": [self.pairs[p] for p in group["params"]], **options})
        self.optimizer = OPTIMIZERS[optimizer](groups)
        with torch.no_grad():
            for source, copied in self.pairs.items():
                copied.copy_(source)
                if source in ours.optimizer.state:
                    self.optimizer.state[copied] = copy.deepcopy(ours.optimizer.state[source])
        for target, mask in zip(targets.values(), self.masks, strict=True):
            if isinstance(mask, naive_masks.NaiveTopScores):
                mask.chosen.copy_(target.mask)
            if isinstance(mask, naive_masks.NaiveGumbelSoftmax):
                mask.temperature = float(target.learned.temperature)  # type: ignore[arg-type]
                mask.scale = float(target.learned.scale)  # type: ignore[arg-type]
        self.clock, self.update = ours.optimizer.step_count, ours.policy.update  # type: ignore[attr-defined]
        self.keep = round((1 - SPARSITY) * sum(t.numel for t in targets.values()))
        self.is_ranked = issubclass(case.naive, naive_masks.NaiveTopScores)
        penalty = self.penalty()
        self.strength = 0.0
        if penalty is not None:
            self.strength = float(ours.optimizer.penalty() / penalty.detach())

    def _pairs(self, ours: Ours) -> dict[Tensor, Parameter]:
        """Our parameter -> the one here that stands for it."""
        pairs: dict[Tensor, Parameter] = {}
        here = dict(self.model.named_parameters())
        for (name, target), mask in zip(ours.targets.items(), self.masks, strict=True):
            inner = name.replace(".weight", ".parametrizations.weight.original")
            pairs[target.param] = here[inner if inner in here else name]
            pairs[target.learned.gates()[0]] = mask.gates
        for name, parameter in ours.model.named_parameters():
            if name.endswith("bias"):
                pairs[parameter] = here[name]
        return pairs

    def penalty(self) -> Tensor | None:
        """The regulariser of all layers, for a strength of 1."""
        parts = [part for mask in self.masks if (part := mask.penalty()) is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def loss(self) -> Tensor:
        """With the regulariser."""
        loss = super().loss()
        penalty = self.penalty()
        return loss if penalty is None else loss + self.strength * penalty

    def train_step(self) -> None:
        """One step; scores are ranked as often as ours are."""
        super().train_step()
        for mask in self.masks:
            mask.constrain()
        start, every = self.update.start, self.update.every
        if self.is_ranked and self.clock >= start and (self.clock - start) % every == 0:
            naive_masks.choose(self.masks, self.keep)
        self.clock += 1
