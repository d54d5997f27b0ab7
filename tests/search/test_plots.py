"""Plots of searches are written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from searches import by_zeros, inputs, net, zeros

import sparsetrain as st


def is_picture(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.mark.parametrize("sign", [1, -1, 0], ids=["falls", "rises", "stays"])
def test_sensitivity(tmp_path: Path, sign: int) -> None:
    """Also where pruning helps, or changes nothing."""
    found = st.search.sensitivity(net(), lambda model: sign * by_zeros(model), [0.25, 0.75])
    found.plot(tmp_path / "drops.png")
    assert is_picture(tmp_path / "drops.png")


@pytest.mark.parametrize("target", [None, st.Flops(0.5)])
def test_front(tmp_path: Path, target: Any) -> None:
    def metric(model: Any) -> float:
        return -zeros(model)["4.weight"]

    found = st.search.ratios(net(), metric, example_inputs=inputs(), target=target, trials=6)
    found.plot(tmp_path / "front.png")
    assert is_picture(tmp_path / "front.png")
