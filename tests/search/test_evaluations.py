"""Evaluated points are kept: each network is evaluated once, and none is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from searches import NAMES, Counting, bound, by_zeros, net, own

import sparsetrain as st
from sparsetrain.search import Evaluations, Weights

GRID: dict[str, Any] = {"method": "grid", "choices": [0.0, 0.5], "cost": st.CompressionRate(1)}


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_network_is_evaluated_once(tmp_path: Path) -> None:
    metric = Counting()
    known = Evaluations(bound(), metric, tmp_path)
    first = known.of({"0.weight": 0.5})
    assert known.of({"0.weight": 0.5, "2.weight": 0.0}) is first  # the same network
    assert known.of({"0.weight": 0.501}) is first  # 24 of 48 weights, too
    assert known.of({"0.weight": 0.5}, repeat=1) is not first
    assert metric.calls == known.new == 2
    assert first.metric == by_zeros(bound().network({"0.weight": 0.5}))
    assert first.ratios == {"0.weight": 0.5, "2.weight": 0.0, "4.weight": 0.0}
    assert first.seconds > 0
    again = Evaluations(bound(), metric, tmp_path)
    assert again.of({"0.weight": 0.5}) == first and again.new == 0
    network, done = again.with_network({"0.weight": 0.5})  # the network itself is asked for
    assert metric(network) == done.metric and again.new == 1


@settings(max_examples=25)
@given(cut=some.integers(0, 400))
@example(cut=190)  # after a brace, but not the last one of the line
def test_a_line_that_was_cut_short(cut: int) -> None:
    """Killed in the middle of writing: the whole lines count, and the next one is readable."""
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        known = Evaluations(bound(), by_zeros, folder)
        done = [known.of({"0.weight": ratio}) for ratio in (0.25, 0.5, 0.75)]
        path = folder / "evaluations.jsonl"
        text = path.read_bytes()
        path.write_bytes(text[: min(cut, len(text))])
        whole = sum(line in text.splitlines() for line in text[:cut].splitlines())
        metric = Counting()
        again = Evaluations(bound(), metric, folder)
        assert [again.of({"0.weight": r}).metric for r in (0.25, 0.5, 0.75)] == [
            one.metric for one in done
        ]
        assert metric.calls == 3 - whole
        third = Counting()
        last = Evaluations(bound(), third, folder)
        assert all(last.of({"0.weight": r}) for r in (0.25, 0.5, 0.75)) and third.calls == 0


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_killed_in_the_middle_and_started_again(tmp_path: Path, stop: int) -> None:
    metric = Counting()
    metric.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        st.search.ratios(net(), metric, folder=tmp_path, **GRID)
    assert len(lines(tmp_path)) == stop
    metric.stop_at = None
    result = st.search.ratios(net(), metric, folder=tmp_path, **GRID)
    assert result.evaluations == 8 - stop
    assert metric.calls == len(lines(tmp_path)) == 8  # none lost, none twice
    assert result.points == tuple(st.search.ratios(net(), metric, folder=tmp_path, **GRID).points)


def test_searches_share_a_folder(tmp_path: Path) -> None:
    metric = Counting()
    options: dict[str, Any] = {"folder": tmp_path}
    st.search.ratios(net(), metric, **GRID, **options)
    before = metric.calls
    found = st.search.sensitivity(net(), metric, [0.5, 0.75], **options)
    assert found.evaluations == metric.calls - before == 3  # those of 0.5 were known
    result = st.search.max_sparsity(net(), metric, 0.2, **options, resolution=0.5)
    assert (0.5, by_zeros(bound().network(dict.fromkeys(NAMES, 0.5)))) in result.tried
    assert metric.calls == before + 3 + result.evaluations
    assert len(lines(tmp_path)) == metric.calls


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        (lambda: bound(seed=1), "model"),
        (lambda: bound("random"), "pruning"),
        (lambda: bound(Weights(match="2")), "knobs"),
        (lambda: own().bind(net(), None), "pruning"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, knobs: Any, what: str) -> None:
    Evaluations(bound(), by_zeros, tmp_path).of({})
    with pytest.raises(ValueError, match=f"has evaluations of another {what}: give the same"):
        Evaluations(knobs(), by_zeros, tmp_path)
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_has_to_be_a_number(tmp_path: Path, value: float) -> None:
    known = Evaluations(bound(), lambda model: value, tmp_path)
    with pytest.raises(ValueError, match=f"evaluate returned {value}"):
        known.of({})
    assert not known.known and not (tmp_path / "evaluations.jsonl").exists()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    st.search.ratios(net(), by_zeros, **GRID)
    assert not list(tmp_path.iterdir())
