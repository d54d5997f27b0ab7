"""Ratios made to meet a budget, and no more than that."""

from __future__ import annotations

from collections.abc import Callable

from sparsetrain.search.knobs import CostOf, Ratios

_BISECTIONS = 24
_FINE = 0.002  # steps of rounding that are not worth filling


def fitted(ratios: Ratios, cost: CostOf, most: float = 0.95) -> dict[str, float]:
    """The ratios times one factor (those near `most` grow less), so that a target just holds.

    Args:
        most: the largest ratio of any knob, in (0, 1).

    Raises:
        ValueError: the target does not even hold with every knob at `most`.
    """
    asked = {name: min(ratio, most) for name, ratio in cost.knobs.checked(ratios).items()}
    return least_that_holds(lambda share: _scaled(asked, share, most), cost)


def least_that_holds(at: Callable[[float], dict[str, float]], cost: CostOf) -> dict[str, float]:
    """The ratios at the lowest place of a path where a target holds.

    Where ratios are coarse, single knobs keep more than there, as long as the target holds.

    Args:
        at: ratios for a place in [0, 1]; the cost falls along the path.

    Raises:
        ValueError: the target does not hold at the end of the path.
    """
    if cost.holds(at(0.0)):
        return at(0.0)
    low, high = 0.0, 1.0
    best = at(high)
    if not cost.holds(best):
        reason = cost.budget.out_of_reach("with all that may go", cost(best))
        raise ValueError(f"{reason}: ask for more than that, or let more go")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        ratios = at(middle)
        if cost.holds(ratios):
            high, best = middle, ratios
        else:
            low = middle
    return _filled(best, cost)


def _filled(ratios: dict[str, float], cost: CostOf) -> dict[str, float]:
    """Knobs lose one step of rounding less, in turns and those that lose most first."""
    steps = {knob.name: knob.step for knob in cost.knobs.knobs if knob.step > _FINE}
    waiting = set(steps)
    while waiting:
        name = max(sorted(waiting), key=ratios.__getitem__)
        real = cost.knobs.rounded(ratios)[name]
        more = {**ratios, name: max(real - steps[name], 0.0)}
        # Zeros that were there stay, and so may channels: then a step changes nothing.
        if cost.knobs.rounded(more)[name] < real and cost.holds(more):
            ratios = more
        else:
            waiting.discard(name)
    return ratios


def _scaled(ratios: dict[str, float], share: float, most: float) -> dict[str, float]:
    """From 0 over the ratios, half-way, to `most` everywhere."""
    if share <= 0.5:
        return {name: ratio * 2 * share for name, ratio in ratios.items()}
    return {name: ratio + (most - ratio) * (2 * share - 1) for name, ratio in ratios.items()}
