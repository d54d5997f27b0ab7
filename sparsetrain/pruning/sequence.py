"""Pruning a network from front to back, each part on what the pruned parts before it give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from sparsetrain.candidates import Candidate
from sparsetrain.config import did_you_mean


def stages(
    model: nn.Module, candidates: Sequence[Candidate], blocks: str | Sequence[str]
) -> list[list[Candidate]]:
    """Candidates in the groups that are pruned together, in the order of the model.

    Candidates in no block form groups of their own between the blocks.

    Args:
        blocks: globs on names of modules; "auto" takes the members of the ModuleList or Sequential
            that holds most of the candidates' weights.

    Raises:
        ValueError: a glob matches no module.
    """
    names = _blocks(model, candidates) if blocks == "auto" else _named(model, blocks)
    found: list[tuple[str | None, list[Candidate]]] = []
    for candidate in candidates:
        block = next((n for n in names if candidate.name.startswith(f"{n}.")), None)
        if not found or found[-1][0] != block:
            found.append((block, []))
        found[-1][1].append(candidate)
    return [group for _, group in found]


def _named(model: nn.Module, globs: str | Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for glob in [globs] if isinstance(globs, str) else globs:
        matching = [name for name in names if fnmatchcase(name, glob)]
        if not matching:
            raise ValueError(f"blocks={glob!r} names no module{did_you_mean(glob, names)}")
        found += matching
    return found


def _blocks(model: nn.Module, candidates: Sequence[Candidate]) -> list[str]:
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            prefix = f"{name}." if name else ""
            inside = sum(c.param.numel() for c in candidates if c.name.startswith(prefix))
            if inside > most:
                best, most = prefix, inside
    if not most:
        return []
    members = {c.name[len(best) :].split(".")[0] for c in candidates if c.name.startswith(best)}
    return [best + member for member in members]


@contextmanager
def weights_back(candidates: Sequence[Candidate]) -> Iterator[None]:
    """Weights are what they were at the end, whatever happens."""
    before = [candidate.param.detach().clone() for candidate in candidates]
    try:
        yield
    finally:
        with torch.no_grad():
            for candidate, weight in zip(candidates, before, strict=True):
                candidate.param.copy_(weight)
