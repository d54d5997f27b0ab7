"""Positions come back from their bytes, and other bytes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from sparsetrain.storage.positions import Coding, bits_size, decode, encode


@given(
    numel=some.integers(0, 3000),
    density=some.floats(0, 1),
    seed=some.integers(0, 2**31),
)
def test_positions_come_back_from_each_coding(numel: int, density: float, seed: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density
    flat = mask.nonzero().view(-1)
    coding, code = encode(flat, numel)
    assert torch.equal(decode(coding, code, flat.numel(), numel), flat)
    assert code.numel() <= bits_size(numel) == -(-numel // 8)


@pytest.mark.parametrize("at", [253, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 200_000])
def test_gaps_at_the_limits_of_a_number(at: int) -> None:
    # Among many small gaps the large one does not change the coding.
    small, numel = torch.arange(0, 4000, 20), 10_000_000
    far = torch.tensor([4000 + at, 4000 + 2 * at, numel - 1])
    flat = torch.cat([small, far])
    for positions in (flat, flat * 3, torch.tensor([at]), torch.tensor([at, numel - 1])):
        inside = positions[positions < numel]
        coding, code = encode(inside, numel)
        assert torch.equal(decode(coding, code, inside.numel(), numel), inside)


@pytest.mark.parametrize(
    ("every", "coding", "size"),
    [(2, "bits", 10_000 // 8), (20, "gaps8", 500), (1000, "gaps16", 20)],
)
def test_the_shortest_coding_is_taken(every: int, coding: str, size: int) -> None:
    found, code = encode(torch.arange(0, 10_000, every), 10_000)
    assert (found, code.numel()) == (coding, size)


@pytest.mark.parametrize(
    ("coding", "code", "count", "message"),
    [
        ("bits", [0b11100000, 0], 3, "2 bytes of bits for 5 entries"),
        ("bits", [], 0, "0 bytes of bits for 5 entries"),
        ("bits", [0b11000000], 3, "positions for 2 values and holds 3"),
        ("bits", [0b00000100], 1, "position 5 of 5"),
        ("gaps8", [0, 0], 3, "positions for 2 values and holds 3"),
        ("gaps8", [0, 0, 0, 0], 3, "positions for 4 values and holds 3"),
        ("gaps8", [0, 4], 2, "position 5 of 5"),
        ("gaps8", [0, 255], 1, "within a gap"),
        ("gaps16", [0, 0, 0], 1, "3 bytes of positions"),
        ("gaps16", [5, 0], 1, "position 5 of 5"),
        ("gaps16", [0, 1], 1, "position 256 of 5"),
    ],
)
def test_positions_that_are_none(coding: Coding, code: list[int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(coding, torch.tensor(code, dtype=torch.uint8), count, 5)
