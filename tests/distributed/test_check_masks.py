"""The cheap proof that ranks agree, and the few bytes that agreeing takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import CHOSEN, build, on_ranks, shard, train
from runs import OPTIMIZERS, SmallNet
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import sparsetrain as st


def answer(optimizer: st.SparseOptimizer) -> str:
    try:
        st.distributed.check_masks(optimizer)
    except RuntimeError as error:
        return str(error)
    return "agree"


def tampered(rank: int) -> dict[str, str]:
    found = {}
    for sharded in (False, True):
        model, optimizer = build("even", "set", sharded=sharded)
        train(model, optimizer, range(4), rank if sharded else 0, 2 if sharded else 1)
        found[f"untouched {sharded}"] = answer(optimizer)
        optimizer._keeper.generator.manual_seed(rank)
        found[f"generator {sharded}"] = answer(optimizer)
    model, optimizer = build("even", "set", sharded=False)
    target = optimizer.targets["hidden.weight"]
    active, free = target.active_indices(), (~target.held_mask).view(-1).nonzero().view(-1)
    if rank == 1:  # one connection moves
        target.exchange(active[:1], free[:1])
    found["mask"] = answer(optimizer)
    model, optimizer = build("even", "set", sharded=False)
    optimizer._keeper.step_count += rank
    found["clock"] = answer(optimizer)
    model = SmallNet()
    rules = [{"match": "head*", "dense": True}] if rank else []
    recipe = {"policy": CHOSEN["set"], "rules": rules}
    base = OPTIMIZERS["sgd"](model.parameters())
    found["recipe"] = answer(st.SparseOptimizer(base, model, recipe))
    for name in ("hard concrete", "movement"):
        model, optimizer = build("even", name)
        train(model, optimizer, range(4), rank, 2)
        found[name] = answer(optimizer)
    return found


def test_what_differs_is_named_on_every_rank(tmp_path: Path) -> None:
    for found in on_ranks(tampered, 2, tmp_path):
        assert found["untouched False"] == found["untouched True"] == "agree"
        assert "disagree on the random state" in found["generator False"]
        assert "disagree on the random state" in found["generator True"]
        assert "disagree on the mask of hidden.weight, at step 0" in found["mask"]
        assert "disagree on the number of steps" in found["clock"]
        assert "different numbers of sparse weights, from 2 to 3" in found["recipe"]
        assert found["hard concrete"] == found["movement"] == "agree"


def prints(rank: int) -> dict[str, int]:
    _, optimizer = build("uneven", "static")
    return st.distributed.check_masks(optimizer)


def test_a_fingerprint_is_that_of_the_whole_mask(tmp_path: Path) -> None:
    _, optimizer = build("uneven", "static", sharded=False)
    alone = st.distributed.check_masks(optimizer)
    assert on_ranks(prints, 4, tmp_path) == [alone] * 4
    for name, target in optimizer.targets.items():
        active = target.active_indices()
        for flat in range(0, target.numel, 7):  # any other place of a connection shows
            if not target.held_mask.view(-1)[flat]:
                target.exchange(active[:1], torch.tensor([flat]))
                assert st.distributed.check_masks(optimizer)[name] != alone[name]
                target.exchange(torch.tensor([flat]), active[:1])
        assert st.distributed.check_masks(optimizer) == alone


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that a rank gives to each all-reduce; there must be no other collective."""
    sent: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        with CommDebugMode() as seen:
            yield sent
    finally:
        dist.all_reduce = original
    calls = {str(kind): count for kind, count in seen.get_comm_counts().items() if count}
    assert sum(calls.values()) in (0, len(sent)), calls
    assert all("allreduce" in kind.replace("_", "") for kind in calls), calls


def communication(rank: int) -> dict[str, int]:
    found = {}
    for name in ("set", "rigl", "snfs", "gradual", "gradual global", "rigl fan-in"):
        model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
        shard(model)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = st.SparseOptimizer(base, model, CHOSEN[name])
        model(torch.randn(8, 256)).square().mean().backward()
        with counted() as sent:
            optimizer.update_masks()
        found[name] = sum(sent)
    return found


def test_an_update_sends_histograms_and_no_weights(tmp_path: Path) -> None:
    gathered = 2 * 256 * 1024 * 4
    for found in on_ranks(communication, 2, tmp_path):
        assert max(found.values()) < gathered / 100, found
        assert found["rigl fan-in"] < 1000  # rows decide for themselves
        assert found["set"] < found["rigl"]
