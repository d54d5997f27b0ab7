"""Data-parallel training with Lightning: two processes train as one does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning_runs import LEARNED, Early, Net, data, sparse_of, trainer_of
from runs import same, weights
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from sparsetrain.integrations.lightning import SparsityCallback

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Newer Pythons warn of any fork beside threads, of which pytest has one.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
RANKS = 2


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Lightning leaves the port of its ranks behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class OnRanks:
    """Half of each batch on each rank, and what they ended with in a file."""

    trainer: Any
    net: nn.Module

    def train_dataloader(self) -> DataLoader[Any]:
        ranks = self.trainer.world_size
        dataset = data().dataset
        sampler = DistributedSampler(dataset, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, 8 // ranks, sampler=sampler)

    def on_train_end(self) -> None:
        result = {"weights": weights(self.net), "masks": sparse_of(self.trainer).masks()}
        folder = Path(self.trainer.default_root_dir)
        torch.save(result, folder / f"{self.trainer.world_size}-{self.trainer.global_rank}.pt")


class NetOnRanks(OnRanks, Net):
    pass


class EarlyOnRanks(OnRanks, Early):
    pass


def fit(module: Any, folder: Path, ranks: int, **watch: Any) -> None:
    module.net.norm = nn.Identity()  # whose statistics would be a rank's own
    strategy = DDPStrategy(
        process_group_backend="gloo", start_method="fork", timeout=timedelta(seconds=60)
    )
    trainer = trainer_of(
        folder,
        SparsityCallback(**watch),
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        use_distributed_sampler=False,
    )
    trainer.fit(module)


@pytest.mark.parametrize(
    "kind, policy",
    [
        *((NetOnRanks, policy) for policy in ("set", "rigl", "snfs", "nm_sparse")),
        *((NetOnRanks, policy) for policy in ("hard_concrete", "movement")),
        (EarlyOnRanks, "hard_concrete"),
    ],
)
def test_two_processes_train_as_one(kind: Any, policy: str, tmp_path: Path) -> None:
    fit(kind(policy), tmp_path, RANKS)
    fit(kind(policy), tmp_path, 1)
    names = "2-0.pt", "2-1.pt", "1-0.pt"
    first, second, alone = (torch.load(tmp_path / name) for name in names)
    assert same(first["masks"], second["masks"])
    assert same(first["weights"], second["weights"])
    assert same(first["masks"], alone["masks"])
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-4)
        assert policy in LEARNED or not torch.equal(weight, kind(policy).net.state_dict()[name])


@pytest.mark.parametrize("policy", ["rigl", "hard_concrete"])
def test_the_process_that_began_gets_a_finalized_model(policy: str, tmp_path: Path) -> None:
    module, alone = NetOnRanks(policy), NetOnRanks(policy)
    fit(module, tmp_path, RANKS, finalize=True)
    fit(alone, tmp_path, 1, finalize=True)
    for name, weight in weights(alone.net).items():
        torch.testing.assert_close(module.net.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(module.net.state_dict()[name] != 0, weight != 0)
