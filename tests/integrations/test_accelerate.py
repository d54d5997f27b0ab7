"""Accelerate takes a wrapped optimizer as it takes any other: the same runs, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learned_runs
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from runs import LATENT, OPTIMIZERS, POLICIES, STEPS, SmallNet, batch, same, weights
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

ACCUMULATED = 2
RANKS = 2
LEARNED = {
    name: learned_runs.STEERED[name]
    for name in ("soft_threshold", "hard_concrete", "gumbel_softmax", "movement", "soft_movement")
} | {"variational_dropout": learned_runs.STEERED["variational_dropout"]}
ALL = {**POLICIES, **LEARNED}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate remembers how the first `Accelerator` of a process was set up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def cpu(**options: Any) -> Accelerator:
    return Accelerator(cpu=True, **options)


def wrapped(policy: st.Policy, model: nn.Module | None = None) -> tuple[Any, st.SparseOptimizer]:
    model = SmallNet() if model is None else model
    base = OPTIMIZERS["adam"](model.parameters())
    return model, st.SparseOptimizer(base, model, policy, seed=3)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def plain_loop(model: nn.Module, optimizer: st.SparseOptimizer, updates: int) -> None:
    """What is to be computed: the mean gradient of the micro-batches, then a step."""
    scheduler = schedule(optimizer)
    for update in range(updates):
        optimizer.zero_grad()
        for micro in range(ACCUMULATED):
            step = update * ACCUMULATED + micro
            x, y = batch(step)
            torch.manual_seed(step)
            (F.cross_entropy(model(x), y) / ACCUMULATED).backward()
        optimizer.step()
        scheduler.step()


def accelerated_loop(
    accelerator: Accelerator, parts: tuple[Any, Any, Any], first: int, last: int
) -> None:
    model, optimizer, scheduler = parts
    for step in range(first * ACCUMULATED, last * ACCUMULATED):
        x, y = batch(step)
        torch.manual_seed(step)
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def prepared(policy: st.Policy) -> tuple[Accelerator, tuple[Any, Any, Any], st.SparseOptimizer]:
    accelerator = cpu(gradient_accumulation_steps=ACCUMULATED)
    model, optimizer = wrapped(policy)
    return accelerator, accelerator.prepare(model, optimizer, schedule(optimizer)), optimizer


@pytest.mark.parametrize("policy", ALL)
def test_the_same_run_as_without(policy: str) -> None:
    model, optimizer = wrapped(ALL[policy])
    plain_loop(model, optimizer, STEPS)
    accelerator, parts, sparse = prepared(ALL[policy])
    assert isinstance(parts[1], AcceleratedOptimizer) and parts[1].optimizer is sparse
    accelerated_loop(accelerator, parts, 0, STEPS)
    assert same(weights(accelerator.unwrap_model(parts[0])), weights(model))
    assert same(sparse.masks(), optimizer.masks())
    assert sparse.step_count == STEPS  # updates, not micro-batches
    assert parts[2].get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("policy", ALL)
def test_a_resumed_run_equals_the_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    accelerator, through, uninterrupted = prepared(ALL[policy])
    accelerated_loop(accelerator, through, 0, 5)
    accelerator.save_state(str(tmp_path))
    accelerated_loop(accelerator, through, 5, STEPS)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, parts, resumed = prepared(ALL[policy])
    accelerated_loop(accelerator, parts, 0, 2)  # what is loaded must not depend on what was there
    accelerator.load_state(str(tmp_path))
    assert resumed.step_count == 5
    accelerated_loop(accelerator, parts, 5, STEPS)
    assert same(weights(parts[0]), weights(through[0]))
    assert same(resumed.masks(), uninterrupted.masks())
    assert parts[2].get_last_lr() == through[2].get_last_lr()


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_were_loaded_before_prepare_survive_it(policy: str) -> None:
    """`prepare` gives the optimizer its own state back, with masks that the weights do not have."""
    model, optimizer = wrapped(POLICIES[policy])
    plain_loop(model, optimizer, 7)
    saved = weights(model), optimizer.state_dict()

    accelerator = cpu()
    other_model, other = wrapped(POLICIES[policy])
    other_model.load_state_dict(saved[0])
    other_model, prepared_optimizer = accelerator.prepare(other_model, other)
    prepared_optimizer.load_state_dict(saved[1])
    assert same(weights(other_model), saved[0])
    assert same(other.masks(), optimizer.masks())
    if policy in LATENT:
        again = other.state_dict()["sparsetrain"]["targets"]
        for name, entry in saved[1]["sparsetrain"]["targets"].items():
            assert torch.equal(again[name]["latent"], entry["latent"])


def test_clipping_sees_active_gradients_when_they_are_masked_first() -> None:
    accelerator, (model, optimizer, _), sparse = prepared(st.Static(sparsity=0.9))
    x, y = batch(0)
    accelerator.backward(F.cross_entropy(model(x), y))
    active = {
        name: sparse.targets[name].mask * p.grad if name in sparse.targets else p.grad
        for name, p in model.named_parameters()
    }
    expected = nn.utils.get_total_norm(active.values())
    dense = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.optimizer.mask_gradients()
    found = accelerator.clip_grad_norm_(model.parameters(), max_norm=float(expected) / 2)
    torch.testing.assert_close(found, expected)
    assert found < 0.9 * dense
    clipped = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(clipped, expected / 2)


def test_a_step_that_the_scaler_skips_moves_no_mask() -> None:
    cpu()  # sets up what an AcceleratedOptimizer asks for
    model, sparse = wrapped(POLICIES["set"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(sparse, scaler=scaler)
    masks = sparse.masks()
    for broken in (True, False):
        x, y = batch(0)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if broken:
            model.head.weight.grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == broken
        assert sparse.step_count == (0 if broken else 1)
        assert same(masks, sparse.masks()) == broken


def test_after_finalize_the_model_is_plain_and_saved_whole(tmp_path: Path) -> None:
    accelerator, parts, sparse = prepared(LEARNED["hard_concrete"])
    accelerated_loop(accelerator, parts, 0, 3)
    sparse.finalize()
    model = accelerator.unwrap_model(parts[0])
    accelerator.save_model(model, str(tmp_path))
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "model.safetensors"), weights(model))
    assert weights(model).keys() == SmallNet().state_dict().keys()


# Two processes.


# In float64: ranks add gradients up in another order, and rounding must not decide about a mask.
TRIED = {name: ALL[name] for name in ("rigl", "hard_concrete")}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1"
    )
    os.environ["MASTER_PORT"] = (Path(folder) / "port").read_text()
    accelerator = cpu(gradient_accumulation_steps=ACCUMULATED)
    assert accelerator.num_processes == RANKS
    results = {}
    for name, policy in TRIED.items():
        # Running statistics are a rank's own.
        model, sparse = wrapped(policy, SmallNet().double().eval())
        if name in LEARNED:
            for layer in (model.conv, model.hidden, model.head):
                layer.train()
        parallel, optimizer = accelerator.prepare(model, sparse)
        assert isinstance(parallel, nn.parallel.DistributedDataParallel)
        for step in range(STEPS * ACCUMULATED):
            x, y = batch(step)
            torch.manual_seed(step + 1000 * rank)
            half = slice(4 * rank, 4 * rank + 4)
            with accelerator.accumulate(parallel):
                accelerator.backward(F.cross_entropy(parallel(x[half].double()), y[half]))
                optimizer.step()
                optimizer.zero_grad()
        assert sparse.step_count == STEPS
        results[name] = {"masks": sparse.masks(), "weights": model.state_dict()}
    torch.save(results, f"{folder}/{rank}.pt")
    accelerator.end_training()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_agree_and_train_like_one(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(str(free_port()))
    mp.spawn(one_rank, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for name, policy in TRIED.items():
        for part in ("masks", "weights"):
            assert same(first[name][part], second[name][part])
        if name in LEARNED:
            continue  # each rank draws noise of its own, and one process draws another
        model, sparse = wrapped(policy, SmallNet().double().eval())
        for update in range(STEPS):
            sparse.zero_grad()
            for micro in range(ACCUMULATED):
                x, y = batch(update * ACCUMULATED + micro)
                (F.cross_entropy(model(x.double()), y) / ACCUMULATED).backward()
            sparse.step()
        assert same(first[name]["masks"], sparse.masks())
        expected: dict[str, Tensor] = model.state_dict()
        for key, weight in first[name]["weights"].items():
            torch.testing.assert_close(weight, expected[key])
