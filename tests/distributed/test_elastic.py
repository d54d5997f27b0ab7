"""A worker is killed in the middle, torchrun starts all of them anew, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_runs import assert_same, build, on_ranks, outcome, train
from runs import STEPS

WORKER = Path(__file__).with_name("elastic_worker.py")


def uninterrupted(rank: int, policy: str) -> dict[str, Any]:
    model, optimizer = build("even", policy, "adam")
    for step in range(STEPS):
        torch.manual_seed(100 + step)
        train(model, optimizer, [step], rank, dist.get_world_size())
    return outcome(model, optimizer)


@pytest.mark.parametrize("policy", ["rigl", pytest.param("hard concrete", marks=pytest.mark.slow)])
def test_a_killed_worker_changes_nothing(tmp_path: Path, policy: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path), policy],
        # With a store of its own each start finds its own addresses, and not those of the dead.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = on_ranks(uninterrupted, 2, tmp_path / "whole", policy)
    for rank in range(2):
        assert (tmp_path / f"restarts{rank}").read_text() == "1"  # it did die
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert_same(found, expected[rank])
        for name, weight in expected[rank]["weights"].items():
            assert torch.equal(found["weights"][name], weight), name
