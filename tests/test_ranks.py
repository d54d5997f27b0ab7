"""Data-parallel training: ranks see different data and must hold the same masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import OPTIMIZERS, POLICIES, STEPS, SmallNet, batch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st

RANKS = 2
TRIED = ("set", "rigl", "snfs")
LEARNED = {
    "hard_concrete": st.HardConcrete(sparsity=0.6, total_steps=STEPS, update={"every": 2}),
    "variational_dropout": st.VariationalDropout(strength=0.01, total_steps=STEPS),
}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    results = {}
    for policy in TRIED:
        model = SmallNet().eval()  # running statistics are a rank's own
        parallel = DistributedDataParallel(model)
        base = OPTIMIZERS["momentum"](parallel.parameters())
        torch.manual_seed(rank)  # what ranks draw elsewhere must not matter
        optimizer = st.SparseOptimizer(base, parallel, POLICIES[policy], seed=3)
        for step in range(STEPS):
            x, y = batch(step)
            half = slice(4 * rank, 4 * rank + 4)
            optimizer.zero_grad()
            F.cross_entropy(parallel(x[half]), y[half]).backward()
            optimizer.step()
        results[policy] = {"masks": optimizer.masks(), "weights": model.state_dict()}
    for policy in LEARNED:
        results[policy] = learned_on(rank, LEARNED[policy])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def learned_on(rank: int, policy: st.Policy) -> dict[str, Any]:
    """The optimizer comes first: it adds gates, which DistributedDataParallel has to know."""
    model = SmallNet().eval()
    optimizer = st.SparseOptimizer(OPTIMIZERS["adam"](model.parameters()), model, policy, seed=3)
    parallel = DistributedDataParallel(model)
    torch.manual_seed(rank)  # each rank draws noise of its own
    for layer in (model.conv, model.hidden, model.head):
        layer.train()
    for step in range(STEPS):
        x, y = batch(step)
        half = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[half]), y[half]).backward()
        optimizer.step()
    return {"masks": optimizer.masks(), "weights": model.state_dict()}


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_ranks_agree_and_train_like_one_process(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for policy in LEARNED:
        for part in ("masks", "weights"):
            for name, mine in first[policy][part].items():
                assert torch.equal(mine, second[policy][part][name]), name
    for policy in TRIED:
        model = SmallNet().eval()
        optimizer = st.SparseOptimizer(
            OPTIMIZERS["momentum"](model.parameters()), model, POLICIES[policy], seed=3
        )
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        for name, mask in optimizer.masks().items():
            assert torch.equal(first[policy]["masks"][name], second[policy]["masks"][name])
            assert torch.equal(first[policy]["masks"][name], mask)
        for name, weight in model.state_dict().items():
            assert torch.equal(first[policy]["weights"][name], second[policy]["weights"][name])
            torch.testing.assert_close(first[policy]["weights"][name], weight)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_gates_that_would_not_be_averaged_are_refused(tmp_path: Path) -> None:
    store = dist.FileStore(f"{tmp_path}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(SmallNet())
        base = OPTIMIZERS["adam"](parallel.parameters())
        with pytest.raises(ValueError, match="wrap the model in DistributedDataParallel after it"):
            st.SparseOptimizer(base, parallel, LEARNED["hard_concrete"])
    finally:
        dist.destroy_process_group()
