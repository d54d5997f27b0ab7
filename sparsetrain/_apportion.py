"""Whole counts from ideal shares: bounds, quanta and an exact total.

Used by :mod:`sparsetrain.allocation`; nothing here knows about layers or sparsity.
"""

import math
from collections.abc import Sequence
from fractions import Fraction


def apportion(
    weights: Sequence[Fraction], sizes: Sequence[int], quanta: Sequence[int], total: int
) -> list[int]:
    """Counts in proportion to ``weights``, each a multiple of its quantum and within its size.

    The sum is ``total``, or the largest reachable number below it. Each count is at least one
    quantum if the quanta together fit into ``total``.
    """
    highs = [size // quantum for size, quantum in zip(sizes, quanta, strict=True)]
    lows = [1 if sum(quanta) <= total else 0] * len(sizes)
    total = min(total, sum(high * quantum for high, quantum in zip(highs, quanta, strict=True)))
    kinds = sorted(set(quanta))
    members = {q: [i for i, quantum in enumerate(quanta) if quantum == q] for q in kinds}
    units = {kinds[0]: total // kinds[0]}
    if len(kinds) > 1:
        ideal = water_fill(
            weights,
            [low * q for low, q in zip(lows, quanta, strict=True)],
            [high * q for high, q in zip(highs, quanta, strict=True)],
            total,
        )
        start = [math.floor(sum(ideal[i] for i in members[q]) / q) for q in kinds]
        floor = [sum(lows[i] for i in members[q]) for q in kinds]
        ceiling = [sum(highs[i] for i in members[q]) for q in kinds]
        units = dict(zip(kinds, _fit(kinds, start, floor, ceiling, total), strict=True))
    counts = [0] * len(sizes)
    for quantum, indices in members.items():
        shares = _largest_remainder(
            [weights[i] for i in indices],
            [lows[i] for i in indices],
            [highs[i] for i in indices],
            units[quantum],
        )
        for i, share in zip(indices, shares, strict=True):
            counts[i] = share * quantum
    return counts


def water_fill(
    weights: Sequence[Fraction], lows: Sequence[int], highs: Sequence[int], total: int
) -> list[Fraction]:
    """``clip(x * weight, low, high)`` with the one ``x`` that makes the sum equal ``total``.

    ``total`` must lie between the sums of the bounds. Freezing only the side whose violations
    weigh more makes each round final for the values it freezes, so the result is exact.
    """
    values = [Fraction(0)] * len(weights)
    free = list(range(len(weights)))
    rest = Fraction(total)
    while free:
        scale = rest / sum(weights[i] for i in free)
        excess = Fraction(0)
        for i in free:
            values[i] = min(max(scale * weights[i], Fraction(lows[i])), Fraction(highs[i]))
            excess += values[i] - scale * weights[i]
        if excess == 0:
            break
        frozen = [
            i
            for i in free
            if (values[i] > scale * weights[i] if excess > 0 else values[i] < scale * weights[i])
        ]
        rest -= sum(values[i] for i in frozen)
        gone = set(frozen)
        free = [i for i in free if i not in gone]
    return values


def _largest_remainder(
    weights: Sequence[Fraction], lows: Sequence[int], highs: Sequence[int], total: int
) -> list[int]:
    ideal = water_fill(weights, lows, highs, total)
    counts = [math.floor(value) for value in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (counts[i] - ideal[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _fit(
    quanta: Sequence[int],
    start: Sequence[int],
    floor: Sequence[int],
    ceiling: Sequence[int],
    total: int,
) -> list[int]:
    """Numbers of units near ``start`` whose ``sum(quantum * units)`` is closest below ``total``.

    A subset-sum over the changes of each unit number. Changes beyond ``reach`` are never needed:
    units of one quantum against units of another could be exchanged back without moving the sum.
    Reachable sums are the bits of one integer, counted in the common divisor of the quanta.
    """
    divisor = math.gcd(*quanta)
    steps = [q // divisor for q in quanta]
    spans = []
    for i, step in enumerate(steps):
        reach = sum(steps) // step + sum(steps) - step + 1
        spans.append((max(floor[i] - start[i], -reach), min(ceiling[i] - start[i], reach)))
    reachable = [1]
    for step, (low, high) in zip(steps, spans, strict=True):
        reachable.append(_add_multiples(reachable[-1], step, high - low + 1))
    offset = -sum(step * low for step, (low, _) in zip(steps, spans, strict=True))
    spare = (total - sum(q * u for q, u in zip(quanta, start, strict=True))) // divisor
    goal = (reachable[-1] & ((1 << (spare + offset + 1)) - 1)).bit_length() - 1
    units = list(start)
    for i in reversed(range(len(steps))):
        low, high = spans[i]
        bits = reachable[i].to_bytes((reachable[i].bit_length() + 7) // 8, "little")
        for change in sorted(range(low, high + 1), key=abs):
            before = goal - steps[i] * (change - low)
            if 0 <= before < 8 * len(bits) and bits[before >> 3] >> (before & 7) & 1:
                units[i] += change
                goal = before
                break
    return units


def _add_multiples(bits: int, step: int, count: int) -> int:
    """Union of ``bits`` shifted by 0, step, ..., (count - 1) * step, by doubling."""
    done = 1
    while done < count:
        more = min(done, count - done)
        bits |= bits << (more * step)
        done += more
    return bits
