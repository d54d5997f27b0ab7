"""The least loss within a budget: dynamic programming, and descent on a Lagrangian."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsetrain.search.knobs import CostOf

if TYPE_CHECKING:
    from sparsetrain.search.sensitivity import Sensitivity

_LEVELS = 24  # choices of a knob, beside the measured ratios
_BINS = 20_000  # of the budget
_PRICES = 16  # bisections of the price
_PASSES = 50  # of a descent, which ends far earlier but for rounding errors
_REACH = 3  # steps that a knob goes while another one makes up for it


def dynamic_program(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    bins: int = _BINS,
) -> list[int]:
    """One choice of each row, so that the sum of losses is least and costs fit the budget.

    What a choice costs more than the cheapest of its row is rounded up to a bin, so that the budget
    always holds; the result is the best for a budget that is smaller by a bin for each row.

    Frantar & Alistarh 2022, "SPDY: accurate pruning with speedup guarantees", section 3.2.

    Args:
        losses: [rows][choices].
        costs: [rows][choices]; negative ones are savings.
        budget: of all rows together.

    Returns:
        The number of the choice in each row.

    Raises:
        ValueError: not even the cheapest choices fit, or only some of infinite loss.
    """
    left = budget - sum(min(row) for row in costs)
    if left < -1e-9 * abs(budget):
        raise ValueError(f"even the cheapest choices cost more than {budget:,.6g}")
    width = max(left, 1e-30) / bins
    extras = [np.asarray(row) - min(row) for row in costs]
    steps = [np.minimum(np.ceil(row / width - 1e-9), bins + 1).astype(np.int64) for row in extras]
    least: NDArray[np.float64] = np.zeros(bins + 1)
    taken = []
    for row, needed in zip(losses, steps, strict=True):
        options = np.full((len(row), bins + 1), np.inf)
        for number, (loss, step) in enumerate(zip(row, needed, strict=True)):
            if step <= bins:
                options[number, step:] = least[: bins + 1 - step] + loss
        taken.append(options.argmin(axis=0))
        least = options.min(axis=0)
    if not np.isfinite(least[-1]):
        raise ValueError("no choices of finite loss fit the budget")
    place, chosen = bins, []
    for choices, needed in zip(reversed(taken), reversed(steps), strict=True):
        number = int(choices[place])
        chosen.append(number)
        place -= int(needed[number])
    return chosen[::-1]


def best_ratios(sensitivity: Sensitivity, cost: CostOf) -> dict[str, float]:
    """The ratios with the lowest sum of drops that meet a target.

    Raises:
        ValueError: the target cannot be met with the ratios that were measured.
    """
    menu = _Menu(sensitivity, cost)
    cheapest = menu.cheapest
    if not menu.holds(cheapest):
        reason = cost.budget.out_of_reach("with the largest ratios", menu.price(cheapest))
        raise ValueError(f"{reason}: measure the sensitivity to larger ratios, or ask for more")
    found = _by_program(menu) if cost.knobs.adds_up else _by_prices(menu)
    return menu.ratios(_polished(menu, found))


Choice = dict[str, int]


class _Menu:
    """The ratios that each knob can choose from, ascending, and their losses."""

    def __init__(self, sensitivity: Sensitivity, cost: CostOf) -> None:
        self.cost, knobs = cost, cost.knobs
        largest = sensitivity.ratios[-1]
        asked = sorted({*np.linspace(0, largest, _LEVELS + 1).tolist(), *sensitivity.ratios})
        self.options: dict[str, list[float]] = {}
        for name in knobs.names:
            real = {round(knobs.rounded({name: ratio})[name], 12): ratio for ratio in asked[::-1]}
            self.options[name] = sorted(real.values())
        self.losses = {
            name: [sensitivity.drop(name, ratio) for ratio in options]
            for name, options in self.options.items()
        }
        self.layers = {knob.name: set(knob.layers) for knob in knobs.knobs}
        self._known: dict[tuple[int, ...], float] = {}

    @property
    def cheapest(self) -> Choice:
        """The largest ratios."""
        return {name: len(options) - 1 for name, options in self.options.items()}

    def ratios(self, choice: Choice) -> dict[str, float]:
        """As knobs take them."""
        return {name: self.options[name][number] for name, number in choice.items()}

    def loss(self, choice: Choice) -> float:
        """Sum of the drops."""
        return sum(self.losses[name][number] for name, number in choice.items())

    def costs(self, choice: Choice, name: str) -> list[float]:
        """Cost for each choice of one knob, all others staying."""
        numbers = range(len(self.options[name]))
        return [self.price({**choice, name: number}) for number in numbers]

    def price(self, choice: Choice) -> float:
        """Cost of the network, worked out once."""
        key = tuple(choice[name] for name in self.options)
        if key not in self._known:
            self._known[key] = self.cost(self.ratios(choice))
        return self._known[key]

    def holds(self, choice: Choice) -> bool:
        """Whether the network meets the target."""
        return self.cost.budget.holds(self.price(choice))


def _by_program(menu: _Menu) -> Choice:
    """Costs add up, or nearly so: then the budget is tightened until the real cost fits."""
    names = list(menu.options)
    start = dict.fromkeys(names, 0)
    base = menu.price(start)
    savings = [[cost - base for cost in menu.costs(start, name)] for name in names]
    losses = [menu.losses[name] for name in names]
    least = sum(min(row) for row in savings)
    budget = menu.cost.allowed - base
    while budget > least:
        choice = dict(zip(names, dynamic_program(losses, savings, budget), strict=True))
        if menu.holds(choice):
            return choice
        excess = menu.price(choice) - menu.cost.allowed
        budget -= max(excess, 1e-6 * abs(budget))
    return menu.cheapest


def _by_prices(menu: _Menu) -> Choice:
    """The lowest loss plus price times cost, at the lowest price whose result meets the target."""
    best = menu.cheapest
    scale = max(menu.loss(best), 1e-12) / menu.cost.whole
    low, high = -12.0, 12.0  # powers of 2
    for _ in range(_PRICES):
        middle = (low + high) / 2
        choice = _at_price(menu, scale * 2**middle)
        if menu.holds(choice):
            high = middle
            best = choice if menu.loss(choice) <= menu.loss(best) else best
        else:
            low = middle
    return best


def _at_price(menu: _Menu, price: float) -> Choice:
    """Descent, one knob at a time, until none moves."""
    choice = dict.fromkeys(menu.options, 0)
    for _ in range(_PASSES):
        before = dict(choice)
        for name, losses in menu.losses.items():
            costs = menu.costs(choice, name)
            totals = [loss + price * cost for loss, cost in zip(losses, costs, strict=True)]
            choice[name] = int(np.argmin(totals))
        if choice == before:
            break
    return choice


def _polished(menu: _Menu, choice: Choice) -> Choice:
    """As long as it lowers the loss and the target holds: one knob loses less, another one more."""
    while (better := _neighbour(menu, choice)) is not None:
        choice = better
    return choice


def _neighbour(menu: _Menu, choice: Choice) -> Choice | None:
    """The choice with the lowest loss, lower than now, that meets the target; None if none does.

    What knobs without a layer in common change of the cost adds up, so that pairs of them are
    looked at only if that is little enough.
    """
    moves = [_Move.of(menu, choice, name, step) for name, step in _steps(menu, choice)]
    spare = menu.cost.allowed * (1 + 1e-6) - menu.price(choice)
    found = []
    for less in (move for move in moves if move.step < 0):
        found += [(less.loss, {less.name: less.step})]
        for more in (move for move in moves if move.step > 0 and move.name != less.name):
            apart = not menu.layers[less.name] & menu.layers[more.name]
            if not (apart and less.cost + more.cost > spare):
                found.append((less.loss + more.loss, {less.name: less.step, more.name: more.step}))
    found.sort(key=lambda entry: entry[0])
    for loss, steps in found:
        if loss >= -1e-12:
            return None
        near = {name: number + steps.get(name, 0) for name, number in choice.items()}
        if menu.holds(near):
            return near
    return None


def _steps(menu: _Menu, choice: Choice) -> Iterator[tuple[str, int]]:
    for name, step in itertools.product(menu.options, range(-_REACH, _REACH + 1)):
        if step and 0 <= choice[name] + step < len(menu.options[name]):
            yield name, step


class _Move(NamedTuple):
    """What one knob changes by a step."""

    name: str
    step: int
    loss: float
    cost: float

    @classmethod
    def of(cls, menu: _Menu, choice: Choice, name: str, step: int) -> _Move:
        losses, number = menu.losses[name], choice[name]
        cost = menu.price({**choice, name: number + step}) - menu.price(choice)
        return cls(name, step, losses[number + step] - losses[number], cost)
