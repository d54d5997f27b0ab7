"""FSDP2: sharded weights get the masks that one process gives them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_runs import (
    CHOSEN,
    LEARNED,
    assert_same,
    build,
    cases,
    on_ranks,
    once,
    outcome,
    shard,
    train,
)
from runs import OPTIMIZERS, STEPS, SmallNet, batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional as F

import sparsetrain as st

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


def run_all(rank: int, net: str, names: list[str]) -> dict[str, Any]:
    ranks, found = dist.get_world_size(), {}
    for name in names:
        model, optimizer = build(net, name)
        train(model, optimizer, range(STEPS), rank, ranks)
        st.distributed.check_masks(optimizer)
        found[name] = outcome(model, optimizer)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ranks, net) -> what each rank found, run when first asked for."""

    @cache
    def run(ranks: int, net: str) -> list[Any]:
        key = f"fully_shard {net} {ranks}"
        return once(tmp_path_factory, key, run_all, ranks, net, cases(net))

    return run


@cache
def alone(net: str, name: str) -> dict[str, Any]:
    model, optimizer = build(net, name, sharded=False)
    train(model, optimizer, range(STEPS), 0, 1)
    return outcome(model, optimizer)


@pytest.mark.parametrize("name", cases("even"))
def test_two_ranks_are_one_process(runs: Any, name: str) -> None:
    for found in runs(2, "even"):
        assert_same(found[name], alone("even", name))


@pytest.mark.parametrize("name", cases("uneven"))
def test_four_ranks_with_uneven_and_empty_shards_are_one_process(runs: Any, name: str) -> None:
    for found in runs(4, "uneven"):
        assert_same(found[name], alone("uneven", name))


def sharded_late(rank: int) -> dict[str, Any]:
    found = {}
    for name in ("rigl", "gradual movement", "dynamic_network_surgery"):
        for when in (0, 5):
            model, optimizer = build("even", name, sharded=False)
            train(model, optimizer, range(when), 0, 1)
            shard(model)
            train(model, optimizer, range(when, STEPS), rank, dist.get_world_size())
            found[name, when] = outcome(model, optimizer)
    return found


def test_weights_may_be_sharded_after_wrapping_and_after_some_steps(tmp_path: Path) -> None:
    for found in on_ranks(sharded_late, 2, tmp_path):
        for (name, _), run in found.items():
            assert_same(run, alone("even", name))


def hybrid(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name in ("rigl", "gradual global", "hard concrete"):
        model, optimizer = build("even", name, mesh=mesh)
        train(model, optimizer, range(STEPS), rank, 4)
        st.distributed.check_masks(optimizer)
        found[name] = outcome(model, optimizer)
    return found


def test_hybrid_sharding_is_one_process(tmp_path: Path) -> None:
    for found in on_ranks(hybrid, 4, tmp_path):
        for name, run in found.items():
            assert_same(run, alone("even", name))


def finished(rank: int) -> dict[str, Any]:
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("rigl", "nm_sparse", "hard concrete", "soft threshold", "movement"):
        model, optimizer = build("even", name)
        train(model, optimizer, range(STEPS), rank, dist.get_world_size())
        model.eval()
        before, sparsity = model(x).detach(), optimizer.sparsity()
        optimizer.finalize()
        after = model(x)
        after.square().sum().backward()
        names = list(model.state_dict())
        zeros = sum(int((p.full_tensor() == 0).sum()) for p in model.parameters() if p.dim() > 1)
        numel = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        reached = all(p.grad is not None for p in model.parameters())
        types = [type(layer).__name__ for layer in model.children()]
        found[name] = (before, after.detach(), names, sparsity, zeros / numel, reached, types)
    return found


def test_a_finalized_model_is_plain_and_computes_the_same(tmp_path: Path) -> None:
    plain, _ = build("even", "rigl", sharded=False)
    for found in on_ranks(finished, 2, tmp_path):
        for before, after, names, sparsity, zeros, reached, types in found.values():
            assert torch.equal(before, after)
            assert names == list(plain.state_dict())
            assert zeros == pytest.approx(sparsity)
            assert reached
            assert not any("Parametrized" in name for name in types)


def refusals(rank: int) -> list[str]:
    errors = []
    model = SmallNet().double()
    shard(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts: list[Any] = [
        lambda: st.SparseOptimizer(base, model, LEARNED["hard concrete"]),
        lambda: st.SparseOptimizer(base, model, CHOSEN["rigl"], storage="csr"),
    ]
    columns = nn.Linear(8, 8)
    fully_shard(columns, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    of_columns = torch.optim.SGD(columns.parameters(), lr=0.1)
    attempts.append(lambda: st.SparseOptimizer(of_columns, columns, CHOSEN["static"]))
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            errors.append(str(error))
    # A NaN in the shard of one rank is everybody's error, and nobody's masks change.
    model, optimizer = build("even", "rigl")
    train(model, optimizer, range(4), rank, 2)
    before = {name: mask.to_local().clone() for name, mask in optimizer.masks().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 1:
        model.hidden.weight.grad.to_local()[0, 0] = torch.nan
    try:
        optimizer.update_masks()
    except ValueError as error:
        errors.append(str(error))
    after = optimizer.masks()
    errors.append(str(all(torch.equal(after[n].to_local(), m) for n, m in before.items())))
    return errors


def test_what_cannot_be_done_is_refused_on_every_rank(tmp_path: Path) -> None:
    for errors in on_ranks(refusals, 2, tmp_path):
        learned, csr, columns, nan, unchanged = errors
        assert "call fully_shard after it" in learned
        assert "storage='masked' in a distributed run" in csr
        assert "weight is laid out over ranks as" in columns
        assert "hidden.weight" in nan and "NaN" in nan
        assert unchanged == "True"


def accumulated(rank: int) -> Any:
    model, optimizer = build("even", "rigl")
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            mine = slice(4 * micro + 2 * rank, 4 * micro + 2 * rank + 2)
            (F.cross_entropy(model(x[mine].double()), y[mine]) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
    return outcome(model, optimizer)


def test_gradients_may_be_accumulated_without_communication(tmp_path: Path) -> None:
    for found in on_ranks(accumulated, 2, tmp_path):
        assert_same(found, alone("even", "rigl"))


def in_bfloat16(rank: int) -> Any:
    model = SmallNet().eval()
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mp_policy=mixed)
    fully_shard(model)
    optimizer = st.SparseOptimizer(OPTIMIZERS["adam"](model.parameters()), model, CHOSEN["rigl"])
    seen = []
    optimizer.register_update_hook(lambda event: seen.append(event.sparsity))
    train(model, optimizer, range(STEPS), rank, 2)
    prints = st.distributed.check_masks(optimizer)
    weights = {name: w.full_tensor() for name, w in model.named_parameters()}
    masks = {name: mask.full_tensor() for name, mask in optimizer.masks().items()}
    zeros = all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
    return prints, zeros, optimizer.sparsity(), seen, weights["conv.weight"].dtype


def test_mixed_precision_keeps_counts_zeros_and_float32_shards(tmp_path: Path) -> None:
    results = on_ranks(in_bfloat16, 2, tmp_path)
    assert results[0][0] == results[1][0]
    for _, zeros, sparsity, seen, dtype in results:
        assert zeros and sparsity == pytest.approx(0.8, abs=1e-3)
        assert seen and set(seen) == {sparsity}
        assert dtype == torch.float32
