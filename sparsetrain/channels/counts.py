"""How many channels each coupling keeps: by shares, by rules, or as many as a target leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from sparsetrain.candidates import Candidate, find_candidates
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.cutting import cut_to
from sparsetrain.channels.resizing import Orders, resized
from sparsetrain.config import did_you_mean
from sparsetrain.cost.budget import Budget
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.targets import CostTarget
from sparsetrain.recipe import Rule

#: Share of channels to remove: of every layer, or by glob on the names of layers.
Ratio = float | Mapping[str, float]
#: Name of a coupling -> how many channels it keeps.
Counts = dict[str, int]

_BISECTIONS = 20  # shares are told apart to a millionth
_NOISE = 1e-9  # a share of a count is a float: 0.2 of 5 channels may be a little less than 1


def check_rounding(floor: float, round_to: int) -> None:
    """Raise ValueError unless a share and a multiple of channels can be kept."""
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor} must be the share of channels to keep, in [0, 1)")
    if round_to < 1:
        raise ValueError(f"round_to={round_to} must be 1 or more")


def shares(
    ratio: Ratio | None,
    rules: Sequence[Rule | Mapping[str, Any]],
    model: nn.Module,
    found: Sequence[Coupling],
) -> dict[str, float | None]:
    """Name of a coupling -> share to remove; couplings that stay are left out.

    Args:
        ratio: None leaves the share open.

    Raises:
        ValueError: a share is not in [0, 1), a glob or rule fits no layer, or a rule has a policy.
    """
    asked: dict[str, float | None] = dict.fromkeys(c.name for c in found)
    if ratio is not None:
        asked = {**_by_glob(ratio, found)}
    for name, share in _by_rule(rules, model, found).items():
        if share is None:
            asked.pop(name, None)
        else:
            asked[name] = share
    return asked


def _by_glob(ratio: Ratio, found: Sequence[Coupling]) -> dict[str, float]:
    by_glob = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    layers = {side.layer: coupling.name for coupling in found for side in coupling.by_role("out")}
    asked: dict[str, float] = {}
    for glob, share in by_glob.items():
        if not 0 <= share < 1:
            raise ValueError(f"ratio {share} of {glob!r} must be in [0, 1)")
        named = {layers[layer] for layer in layers if fnmatchcase(layer, glob)}
        if not named:
            near = did_you_mean(glob, layers)
            raise ValueError(f"ratio of {glob!r}: no layer of that name can lose channels{near}")
        for name in named:
            asked.setdefault(name, share)
    return asked


def _by_rule(
    rules: Sequence[Rule | Mapping[str, Any]], model: nn.Module, found: Sequence[Coupling]
) -> dict[str, float | None]:
    """The share of the first rule that speaks of any layer of a coupling; None for `dense`."""
    weights = _weights_of(model, found)
    claimed: dict[str, float | None] = {}
    for number, given in enumerate(rules):
        rule = given if isinstance(given, Rule) else Rule.model_validate(given)
        if rule.policy is not None:
            raise ValueError(f"rule {number} ({rule}): channels have no policy; give a sparsity")
        named = [n for n, mine in weights.items() if any(map(rule.selector.matches, mine))]
        if not named:
            raise ValueError(f"rule {number} ({rule}) speaks of no layer that can lose channels")
        for name in named:
            claimed.setdefault(name, rule.sparsity)
    return claimed


def _weights_of(model: nn.Module, found: Sequence[Coupling]) -> dict[str, list[Candidate]]:
    """The weights of the layers that the channels come out of."""
    candidates = find_candidates(model)
    owners = {c.name: {id(s.module) for s in c.by_role("out")} for c in found}
    return {
        name: [c for c in candidates if any(id(owner) in modules for owner in c.owners)]
        for name, modules in owners.items()
    }


@dataclass(frozen=True)
class Plan:
    """Who competes with whom, and what no layer goes below.

    Attributes:
        wanted: the couplings that lose channels.
        asked: share that each loses; None for the share that is asked of `at`.
        scores: name of a coupling -> [channels], if the channels of all compete.
        comparable: whether those mean the same in every layer; otherwise each is divided by the
            mean size in its layer.
        floor: share that each keeps at least.
        round_to: counts are rounded up to a multiple of this.
    """

    wanted: Sequence[Coupling]
    asked: Mapping[str, float | None]
    scores: Mapping[str, Tensor] | None
    comparable: bool
    floor: float
    round_to: int

    def __post_init__(self) -> None:
        if self.scores is not None and len(set(self.asked.values())) > 1:
            raise ValueError("scope='global' has one ratio: give a number, and no other by rules")

    def at(self, share: float) -> Counts:
        """Counts where this share goes of what no other share was asked of."""
        lost = {name: share if own is None else own for name, own in self.asked.items()}
        counts = self._by_layer(lost) if self.scores is None else self._across(lost)
        return {c.name: self._rounded(counts[c.name], c.channels) for c in self.wanted}

    def _by_layer(self, lost: Mapping[str, float]) -> Counts:
        return {
            c.name: c.channels - math.floor(lost[c.name] * c.channels + _NOISE) for c in self.wanted
        }

    def _across(self, lost: Mapping[str, float]) -> Counts:
        """The lowest of all go, but for the best of each coupling, its floor."""
        assert self.scores is not None
        ranked, counts = [], {name: len(values) for name, values in self.scores.items()}
        for name, values in self.scores.items():
            size = 1.0 if self.comparable else float(values.abs().mean().clamp_min(1e-30))
            free = len(values) - self._least(len(values))
            ranked += [(number / size, name) for number in values.sort().values[:free].tolist()]
        ranked.sort(key=lambda entry: entry[0])
        share = next(iter(lost.values()), 0.0)
        for _, name in ranked[: math.floor(share * sum(counts.values()) + _NOISE)]:
            counts[name] -= 1
        return counts

    def _rounded(self, count: int, channels: int) -> int:
        count = max(count, self._least(channels))
        return min(math.ceil(count / self.round_to) * self.round_to, channels)

    def _least(self, channels: int) -> int:
        return max(math.ceil(self.floor * channels - _NOISE), 1)


def within(
    targets: Sequence[CostTarget],
    plan: Plan,
    model: nn.Module,
    found: Sequence[Coupling],
    example_inputs: Any,
    orders: Orders | None = None,
) -> Counts:
    """The most channels whose network costs no more than its targets.

    The share is found by bisection. Where several couplings lose a channel (or a multiple) at the
    same share, the first ones keep it as long as the targets hold.

    Args:
        targets: what the network may cost.
        plan: counts for a share to remove.
        orders: in which the channels of couplings go, where that is known.

    Raises:
        ValueError: not even the largest share is enough; says how far it goes.
    """
    bounds = [Bound.of(target, model, found, example_inputs, orders or {}) for target in targets]

    def fits(counts: Counts) -> bool:
        return all(bound.holds(counts) for bound in bounds)

    low, high = 0.0, 1.0 - 2.0**-_BISECTIONS
    best = plan.at(high)
    if not fits(best):
        left = ", ".join(bound.described(best) for bound in bounds)
        raise ValueError(
            f"without all channels that may go there is still {left}: ask for more than that, or "
            "let more channels go ('floor', 'round_to', 'rules')"
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        counts = plan.at(middle)
        if counts == best or fits(counts):
            high, best = middle, counts
        else:
            low = middle
    more = plan.at(low)
    for name, count in more.items():
        candidate = {**best, name: count}
        if candidate != best and fits(candidate):
            best = candidate
    return best


@dataclass(frozen=True)
class Bound:
    """A target for one network, whatever channels it has."""

    budget: Budget
    model: nn.Module
    couplings: Sequence[Coupling]
    orders: Orders
    layers: Sequence[LayerUse]

    @classmethod
    def of(
        cls,
        target: CostTarget,
        model: nn.Module,
        found: Sequence[Coupling],
        example_inputs: Any,
        orders: Orders,
    ) -> Bound:
        """Look at the network as it is."""
        budget = Budget.of(target, model, example_inputs)
        return cls(budget, model, found, orders, layers_used(model, example_inputs))

    def cost(self, counts: Counts) -> float:
        """What the network costs with as many channels."""
        cost = self.budget.of_layers(
            lambda: resized(self.layers, self.couplings, counts, self.orders)
        )
        if cost is None:
            cost = self.budget.of_model(cut_to(self.model, self.couplings, counts, self.orders))
        return cost

    def holds(self, counts: Counts) -> bool:
        """Whether it may cost that."""
        return self.budget.holds(self.cost(counts))

    def described(self, counts: Counts) -> str:
        """The cost in words, as a share of the whole network's and in its unit."""
        cost, target = self.cost(counts), self.budget.target
        return f"{target.kind}={cost / self.budget.whole:.3f} ({cost:,.6g} {target.unit})"
