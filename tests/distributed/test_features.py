"""What loops do beside training, on two ranks: resume, mixed precision, accumulation, compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from distributed_runs import assert_same, build, once, outcome, train
from runs import STEPS, batch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st

RANKS = 2
#: One case of every policy.
KINDS = [
    *("static", "set", "rigl", "snfs", "gradual", "dynamic_network_surgery", "nm_sparse"),
    *("slimming", "hard concrete", "gumbel", "variational dropout", "soft threshold", "movement"),
]
LOOPS = ("ddp", "fsdp2")
Run = tuple[nn.Module, st.SparseOptimizer]


def make(loop: str, policy: str, dtype: torch.dtype = torch.float64) -> Run:
    if loop == "fsdp2":
        return build("even", policy, dtype=dtype)
    model, optimizer = build("even", policy, sharded=False, dtype=dtype)
    return DistributedDataParallel(model), optimizer


def plain(model: nn.Module) -> nn.Module:
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def trained(loop: str, policy: str, rank: int) -> Run:
    run = make(loop, policy)
    train(*run, range(STEPS), rank, RANKS)
    return run


def resumed(loop: str, policy: str, rank: int) -> Run:
    model, optimizer = make(loop, policy)
    train(model, optimizer, range(7), rank, RANKS)
    saved = plain(model).state_dict(), optimizer.state_dict()
    again, other = make(loop, policy)
    plain(again).load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(7, STEPS), rank, RANKS)
    return again, other


def accumulated(loop: str, policy: str, rank: int) -> Run:
    model, optimizer = make(loop, policy)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        state = torch.get_rng_state()
        for micro in range(2):
            torch.set_rng_state(state)  # the noise of one pass over the whole batch
            mine = slice(4 * micro + 2 * rank, 4 * micro + 2 * rank + 2)
            if loop == "fsdp2":
                model.set_requires_gradient_sync(micro == 1)
                (F.cross_entropy(model(x[mine].double()), y[mine]) / 2).backward()
            elif micro == 0:
                with model.no_sync():
                    (F.cross_entropy(model(x[mine].double()), y[mine]) / 2).backward()
            else:
                (F.cross_entropy(model(x[mine].double()), y[mine]) / 2).backward()
        optimizer.step()
    return model, optimizer


def compiled(loop: str, policy: str, rank: int) -> Run:
    torch._dynamo.reset()
    model, optimizer = make(loop, policy)
    train(torch.compile(model, backend="aot_eager"), optimizer, range(STEPS), rank, RANKS)
    return model, optimizer


def in_half_precision(loop: str, policy: str, rank: int) -> dict[str, Any]:
    model, optimizer = make(loop, policy, torch.float32)
    sparsities = []
    for step in range(STEPS):
        x, y = batch(step)
        mine = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x[mine]).float(), y[mine])
        loss.backward()
        optimizer.step()
        sparsities.append(optimizer.sparsity())
    found = outcome(plain(model), optimizer)
    st.distributed.check_masks(optimizer)
    optimizer.finalize()
    weights = {n: w for n, w in plain(model).named_parameters() if n in found["masks"]}
    whole = {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in weights.items()}
    zeros = all(bool((whole[n][~mask] == 0).all()) for n, mask in found["masks"].items())
    return {"zeros": zeros, "sparsity": sparsities, "finite": all_finite(whole.values())}


def all_finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


FEATURES: dict[str, Callable[[str, str, int], Run]] = {
    "train": trained,
    "resume": resumed,
    "accumulate": accumulated,
}
#: Compiling takes seconds, so that most policies are left to the slow tests.
COMPILED = ("rigl", "hard concrete")


def run_all(rank: int, loop: str, kind: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    if kind != "plain":
        for policy in COMPILED if kind == "some" else KINDS:
            model, optimizer = compiled(loop, policy, rank)
            found["compile", policy] = outcome(plain(model), optimizer)
        return found
    for policy in KINDS:
        for feature, work in FEATURES.items():
            model, optimizer = work(loop, policy, rank)
            found[feature, policy] = outcome(plain(model), optimizer)
        found["amp", policy] = in_half_precision(loop, policy, rank)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], list[Any]]]:
    """loop -> what each rank found, run when first asked for.

    With "plain" without compiling, with "some" or "all" compiled policies.
    """

    @cache
    def run(loop: str, kind: str = "plain") -> list[Any]:
        key = f"features {loop} {kind}"
        return once(tmp_path_factory, key, run_all, RANKS, loop, kind)

    yield run


@cache
def alone(policy: str) -> dict[str, Any]:
    model, optimizer = build("even", policy, sharded=False)
    train(model, optimizer, range(STEPS), 0, 1)
    return outcome(model, optimizer)


of_loops = pytest.mark.parametrize("loop", LOOPS)
of_policies = pytest.mark.parametrize("policy", KINDS)


@of_loops
@of_policies
def test_train(runs: Any, loop: str, policy: str) -> None:
    for found in runs(loop):
        assert_same(found["train", policy], alone(policy))


@of_loops
@of_policies
def test_resume(runs: Any, loop: str, policy: str) -> None:
    for found in runs(loop):
        before, after = found["train", policy], found["resume", policy]
        # The noise that was drawn before the second half is another one here.
        if policy in ("hard concrete", "gumbel", "variational dropout"):
            assert after["steps"] == before["steps"]
            assert after["masks"].keys() == before["masks"].keys()
        else:
            assert_same(after, before)


@of_loops
@of_policies
def test_accumulate(runs: Any, loop: str, policy: str) -> None:
    for found in runs(loop):
        assert_same(found["accumulate", policy], alone(policy))


@of_loops
@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=[] if p in COMPILED else pytest.mark.slow) for p in KINDS],
)
def test_compile(runs: Any, loop: str, policy: str) -> None:
    for found in runs(loop, "some" if policy in COMPILED else "all"):
        assert_same(found["compile", policy], alone(policy))


@of_loops
@of_policies
def test_amp(runs: Any, loop: str, policy: str) -> None:
    first, second = (found["amp", policy] for found in runs(loop))
    assert first == second
    assert first["zeros"] and first["finite"]
