from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError

from sparsetrain.schedules import Schedule, UpdateSchedule, as_schedule

SHAPES = ["constant", "linear", "cosine", "cubic", "cyclic"]
values = some.floats(-1e6, 1e6)
progresses = some.floats(0, 1)


def due_steps(update: UpdateSchedule, total_steps: int, **default: Any) -> list[int]:
    return [step for step in range(total_steps + 10) if update.is_due(step, total_steps, **default)]


@given(
    every=some.integers(1, 20),
    start=some.integers(0, 40),
    length=some.integers(1, 60),
    after=some.integers(0, 30),
)
def test_updates_are_a_range(every: int, start: int, length: int, after: int) -> None:
    stop = start + length
    update = UpdateSchedule(every=every, start=start, stop=stop)
    assert due_steps(update, stop + after) == list(range(start, stop, every))


@given(every=some.integers(1, 20), start=some.integers(0, 19), total=some.integers(40, 150))
def test_a_float_stop_is_a_fraction_of_training(every: int, start: int, total: int) -> None:
    update = UpdateSchedule(every=every, start=start, stop=0.5)
    assert due_steps(update, total) == list(range(start, round(0.5 * total), every))


def test_one_step_and_the_whole_training_differ() -> None:
    assert due_steps(UpdateSchedule(every=10, stop=1), 40) == [0]
    assert due_steps(UpdateSchedule(every=10, stop=1.0), 40) == [0, 10, 20, 30]


def test_default_stop_stands_in_for_a_missing_one() -> None:
    update = UpdateSchedule(every=10)
    assert due_steps(update, 40) == [0, 10, 20]
    assert due_steps(update, 40, default=11) == [0, 10]
    assert due_steps(update, 40, default=None) == [0, 10, 20, 30, 40]
    assert update.stop_step(None) is None
    assert update.stop_step(None, default=30) == 30
    assert update.is_due(10**9, None)
    assert due_steps(UpdateSchedule(every=10, stop=21), 40, default=11) == [0, 10, 20]


def test_a_step_stop_needs_no_total() -> None:
    update = UpdateSchedule(every=5, stop=11)
    assert [step for step in range(30) if update.is_due(step, None)] == [0, 5, 10]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"start": 10, "stop": 9}, "stop=9 lies before start=10"),
        ({"stop": -1}, "stop=-1 lies before start=0"),
        ({"stop": 0.0}, r"must lie in \(0, 1\]; write an integer"),
        ({"stop": 1.5}, r"must lie in \(0, 1\]"),
        ({"stop": math.nan}, r"must lie in \(0, 1\]"),
        ({"stop": True}, "valid integer"),
        ({"stop": "10"}, "valid integer"),
        ({"every": 0}, "every"),
        ({"start": -1}, "start"),
        ({"until": 5}, "until"),
    ],
)
def test_bad_update_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UpdateSchedule(**fields)


def test_a_stop_at_the_start_means_no_update() -> None:
    assert due_steps(UpdateSchedule(every=5, start=10, stop=10), 40) == []


def test_stops_that_do_not_fit_the_training() -> None:
    with pytest.raises(ValueError, match="stop=101 lies beyond total_steps=100"):
        UpdateSchedule(stop=101).is_due(0, 100)
    with pytest.raises(ValueError, match="stop=50 lies beyond total_steps=20"):
        UpdateSchedule().stop_step(20, default=50)
    with pytest.raises(ValueError, match="start at step 80 but stop before step 75"):
        UpdateSchedule(start=80).stop_step(100)
    with pytest.raises(ValueError, match=r"stop=0\.5 is a fraction .* give total_steps"):
        UpdateSchedule(stop=0.5).stop_step(None)
    assert UpdateSchedule(stop=100).stop_step(100) == 100
    with pytest.raises(ValueError, match="start at step 75 but stop before step 75"):
        UpdateSchedule(start=75).stop_step(100)


@given(initial=values, final=values, p=progresses)
def test_curves_are_the_published_formulas(initial: float, final: float, p: float) -> None:
    straight = initial + (final - initial) * p
    zhu_gupta = final + (initial - final) * (1 - p) ** 3
    half_cosine = final + (initial - final) / 2 * (1 + math.cos(math.pi * p))
    for shape, expected in [
        ("linear", straight),
        ("cubic", zhu_gupta),
        ("cosine", half_cosine),
        ("constant", initial),
    ]:
        value = Schedule(shape=shape, initial=initial, final=final).at(p)
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-8), shape


def test_curves_in_known_places() -> None:
    drop_fraction = as_schedule(0.3)  # RigL: f = alpha / 2 * (1 + cos(pi t / T))
    assert drop_fraction.at(0.25) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert drop_fraction.at(0.5) == pytest.approx(0.15)
    sparsity = Schedule(shape="cubic", initial=0.0, final=0.8)
    assert sparsity.at(0.5) == pytest.approx(0.7)
    assert sparsity.at(0.75) == pytest.approx(0.7875)


@given(shape=some.sampled_from(SHAPES), initial=values, final=values)
def test_ends_are_exact_and_progress_is_clamped(shape: Any, initial: float, final: float) -> None:
    schedule = Schedule(shape=shape, initial=initial, final=final)
    end = initial if shape == "constant" else final
    assert [schedule.at(p) for p in (-math.inf, -0.1, 0.0)] == [initial] * 3
    assert [schedule.at(p) for p in (1.0, 1.1, math.inf)] == [end] * 3


@given(
    shape=some.sampled_from(SHAPES),
    initial=values,
    final=values,
    where=some.lists(progresses, min_size=2),
)
def test_curves_never_turn_back(
    shape: Any, initial: float, final: float, where: list[float]
) -> None:
    schedule = Schedule(shape=shape, initial=initial, final=final)
    path = [schedule.at(p) for p in sorted(where)]
    assert path == sorted(path, reverse=initial > final)
    assert all(min(initial, final) <= value <= max(initial, final) for value in path)


@given(cycles=some.integers(1, 8), inside=some.floats(0.01, 0.99), data=some.data())
def test_cyclic_repeats_the_cosine(cycles: int, inside: float, data: Any) -> None:
    cycle = data.draw(some.integers(0, cycles - 1))
    cyclic = Schedule(shape="cyclic", initial=1.0, final=0.2, cycles=cycles)
    cosine = Schedule(shape="cosine", initial=1.0, final=0.2)
    assert cyclic.at((cycle + inside) / cycles) == pytest.approx(cosine.at(inside))


def test_cyclic_restarts_at_the_initial_value() -> None:
    schedule = Schedule(shape="cyclic", initial=0.5, final=0.1, cycles=4)
    assert [schedule.at(p) for p in (0, 0.25, 0.5, 0.75)] == [0.5] * 4
    assert [schedule.at(p - 1e-9) for p in (0.25, 0.5, 0.75)] == [pytest.approx(0.1)] * 3
    assert schedule.at(1) == 0.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shape": "cosine", "cycles": 2}, "cycles=2 needs shape='cyclic'"),
        ({"shape": "cyclic", "cycles": 0}, "cycles"),
        ({"shape": "square"}, "shape"),
        ({"shape": "linear", "initial": math.nan}, "initial"),
        ({"shape": "linear", "final": math.inf}, "final"),
    ],
)
def test_bad_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule(**{"initial": 1.0, "final": 0.0, **fields})


@pytest.mark.parametrize("shape", SHAPES)
def test_nan_progress_is_an_error(shape: Any) -> None:
    with pytest.raises(ValueError, match="NaN"):
        Schedule(shape=shape, initial=1.0, final=0.0).at(math.nan)


def test_what_a_user_may_write_for_a_schedule() -> None:
    schedule = Schedule(shape="linear", initial=1.0, final=0.5)
    assert as_schedule(schedule) is schedule
    assert as_schedule(1) == Schedule(shape="cosine", initial=1.0, final=0.0)
    assert as_schedule(1.0, "linear", 0.5) == schedule
    assert as_schedule({"initial": 1.0, "final": 0.5}, "linear") == schedule
    assert as_schedule({"initial": 1.0, "shape": "linear"}, "cubic", 0.5) == schedule
    for bad in ("0.5", True, None):
        with pytest.raises(ValueError, match="is not a schedule"):
            as_schedule(bad)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="cycle"):
        as_schedule({"initial": 1.0, "cycle": 2})
