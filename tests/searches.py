"""Tiny networks for searches, and metrics that cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.search import Knobs, Pruning
from sparsetrain.search.weights import pruning_of

NAMES = ("0.weight", "2.weight", "4.weight")
SIZES = {"0.weight": 48, "2.weight": 48, "4.weight": 18}


def net(seed: int = 0) -> nn.Sequential:
    """Three Linear layers, 6 to 8 to 6 to 3, no weight of which is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
        )


def inputs() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def zeros(model: nn.Module) -> dict[str, float]:
    """Name of a weight -> share of zeros."""
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    return {n: 1 - int(p.count_nonzero()) / p.numel() for n, p in weights.items()}


#: How much the metric falls when a layer is gone.
PRICES = {"0.weight": 0.4, "2.weight": 0.1, "4.weight": 0.5}


def by_zeros(model: nn.Module) -> float:
    """1, and less the more zeros a layer has: by its price times the share squared."""
    return 1 - sum(PRICES[name] * share**2 for name, share in zeros(model).items())


def by_width(model: nn.Module) -> float:
    """1, and less the more channels the first two layers have lost."""
    lost = 1 - model[0].out_features / 8, 1 - model[2].out_features / 6
    return 1 - 0.8 * lost[0] ** 2 - 0.1 * lost[1]


def closeness(model: nn.Module) -> float:
    """How near the outputs are to those of the whole network."""
    with torch.no_grad():
        return -float((model(inputs()) - net()(inputs())).square().mean())


class Counting:
    """A metric that counts its calls, and may stop the search at one."""

    def __init__(self, metric: Callable[[nn.Module], float] = by_zeros) -> None:
        self.metric, self.calls = metric, 0
        self.stop_at: int | None = None

    def __call__(self, model: nn.Module) -> float:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.metric(model)


def set_zeros(model: nn.Module, ratios: Mapping[str, float]) -> None:
    """A user's own way to prune: the first weights of each layer go."""
    with torch.no_grad():
        for name, ratio in ratios.items():
            weight = model.get_parameter(name).view(-1)
            weight[: round(ratio * len(weight))] = 0.0


def own(*names: str) -> st.search.ByFunction:
    return st.search.ByFunction(set_zeros, names or NAMES)


def bound(prune: Pruning | str = "magnitude", seed: int = 0) -> Knobs:
    return pruning_of(prune).bind(net(seed), inputs())
