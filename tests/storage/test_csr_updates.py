"""Around an update of masks in csr storage, which allocates nothing dense."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runs import same, weights
from sparse_twins import (
    agree,
    backward,
    dense_weight,
    held,
    train,
    wrap,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain as st
from sparsetrain.storage.csr import growth
from sparsetrain.storage.csr.layers import SparseLinear
from sparsetrain.storage.csr.target import CsrTarget


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "rprop", "adagrad", "adamax"])
@pytest.mark.parametrize("policy", ["set", "rigl", "snfs", "gradual"])
def test_newcomers_start_fresh(policy: str, optimizer: str) -> None:
    """Values, gradients and state have one number a non-zero, and those of newcomers are fresh."""
    fresh = {"rprop": {"step_size": 0.01}, "adagrad": {"sum": 0.1}, "adamax": {"exp_inf": 1e-8}}
    model, wrapped = wrap("csr", policy, optimizer)
    before = wrapped.masks()
    grown: list[int] = []

    def on_update(event: st.UpdateEvent) -> None:
        for change in event.layers:
            target = wrapped.targets[change.name]
            was, now = before[change.name], target.mask
            new = (now & ~was).view(-1)[target.active_indices()]
            assert (int(new.sum()), int((was & ~now).sum())) == (change.grown, change.dropped)
            grown.append(change.grown)
            assert target.param.shape == (change.active,) == (target.active,)
            assert (target.param.detach()[new] == 0).all()
            for key, state in wrapped.state[target.param].items():
                if isinstance(state, Tensor) and state.dim():
                    assert state.shape == (target.active,)
                    assert (state[new] == fresh.get(optimizer, {}).get(key, 0.0)).all(), key
                    assert state[~new].any()
            before[change.name] = now

    wrapped.register_update_hook(on_update)
    train(model, wrapped, 0, 14)
    assert sum(grown) > 0 or policy == "gradual"


def test_grown_weights_start_from_the_drawn_values() -> None:
    model, optimizer = wrap("csr", "set_grow_std", "sgd")
    before = {n: dense_weight(t) for n, t in optimizer.targets.items()}
    train(model, optimizer, 0, 1)
    optimizer.zero_grad()
    masks = optimizer.masks()
    optimizer.update_masks()
    for name, target in optimizer.targets.items():
        new = target.mask & ~masks[name]
        drawn = dense_weight(target)[new]
        assert drawn.all() and 0.01 < float(drawn.abs().mean()) < 0.5
    assert before.keys() == masks.keys()


def test_listeners_and_flops_see_what_masked_ones_see() -> None:
    events: list[list[Any]] = []
    numbers = []
    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, "rigl")
        seen: list[Any] = []
        optimizer.register_update_hook(seen.append)
        train(model, optimizer, 0, 14)
        events.append(seen)
        x = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
        flops = st.cost.training_flops(optimizer, model, x)
        histories = [optimizer.density_history(name) for name in optimizer.targets]
        numbers.append((histories, flops, st.cost.flops(model, x)))
    assert events[0] == events[1] and len(events[0]) > 2
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set"])
def test_forced_updates(policy: str) -> None:
    made = [wrap(storage, policy) for storage in ("masked", "csr")]
    for step in range(10):
        for model, optimizer in made:
            if step in (2, 5):
                optimizer.expect_update()
            backward(model, step)
            if step in (2, 5):
                masks = optimizer.masks()
                optimizer.update_masks()
                assert not same(masks, optimizer.masks())
                backward(model, step)
            optimizer.step()
        agree(made[0][1], made[1][1], within=1e-9)


def test_a_forced_update_that_was_not_expected_says_what_to_do() -> None:
    model, optimizer = wrap("csr", "rigl")
    twin_model, twin = wrap("csr", "rigl")
    train(model, optimizer, 0, 1)
    backward(model, 1)
    before, values = optimizer.masks(), weights(model)
    with pytest.raises(ValueError, match=r"conv\.weight.*call\s+optimizer\.expect_update\(\)"):
        optimizer.update_masks()
    assert same(optimizer.masks(), before) and same(weights(model), values)
    # A masked run needs no announcement and takes one all the same.
    _, masked = wrap("masked", "rigl")
    masked.expect_update()
    train(model, optimizer, 1, 14)
    train(twin_model, twin, 0, 14)
    assert same(dict(model.named_parameters()), dict(twin_model.named_parameters()))


def test_an_expected_update_that_does_not_come_is_forgotten() -> None:
    model, optimizer = wrap("csr", "rigl")
    train(model, optimizer, 0, 1)
    optimizer.expect_update()
    backward(model, 1)
    target: Any = optimizer.targets["hidden.weight"]
    assert target.layer.tape is not None
    optimizer.step()
    assert target.layer.tape is None


@pytest.mark.parametrize("policy", ["static", "set", "gradual"])
def test_nothing_is_kept_for_policies_that_do_not_ask(policy: str) -> None:
    model, optimizer = wrap("csr", policy)
    for step in range(14):
        train(model, optimizer, step, step + 1)
        assert all(t.layer.tape is None for t in optimizer.targets.values())


def test_factors_are_kept_for_due_steps_alone() -> None:
    model, optimizer = wrap("csr", "rigl")
    policy: Any = optimizer.recipe.policy
    for step in range(14):
        due = policy.update_is_due(step)
        assert all((t.layer.tape is not None) == due for t in optimizer.targets.values())
        train(model, optimizer, step, step + 1)


def test_a_nan_gradient_at_an_update_names_the_layer_and_changes_nothing() -> None:
    model, optimizer = wrap("csr", st.RigL(sparsity=0.8, total_steps=9, update={"every": 1}))
    masks, before = optimizer.masks(), weights(model)
    optimizer.zero_grad()
    x = torch.full((3, 4, 4, 4), float("nan"), dtype=torch.float64)
    model(x).sum().backward()
    with pytest.raises(ValueError, match=r"conv\.weight.*NaN or infinite"):
        optimizer.update_masks()
    assert same(optimizer.masks(), masks)
    now = weights(model)
    assert all(torch.equal(now[k], before[k]) for k in now if "norm" not in k)
    train(model, optimizer, 0, 3)


# No tensor of a dense weight's size.


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def living_tensors() -> Iterator[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance() wakes deprecated objects
            yield thing


def test_the_recorder_sees_a_dense_mask() -> None:
    layer = SparseLinear(512, 300, 0.01)
    with Sizes() as sizes:
        assert CsrTarget("a", layer).mask.numel() == 512 * 300
    assert sizes.largest >= 512 * 300


@pytest.mark.parametrize("policy", ["rigl", "set", "gradual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_dense_tensor_lives_during_an_update(
    policy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_BLOCK", 1 << 13)
    model = nn.Sequential(nn.Linear(512, 300), nn.ReLU(), nn.Linear(300, 3)).to(dtype)
    rule = {"match": "2", "dense": True}
    chosen: st.Policy = {
        "rigl": st.RigL(sparsity=0.98, total_steps=9, update={"every": 2}),
        "set": st.SET(sparsity=0.98, total_steps=9, update={"every": 2}),
        "gradual": st.Gradual(
            sparsity=0.98, initial_sparsity=0.9, total_steps=9, update={"every": 2}
        ),
    }[policy]
    optimizer = st.SparseOptimizer(
        torch.optim.Adam(model.parameters()),
        model,
        {"policy": chosen.model_dump(), "rules": [rule]},
        storage="csr",
    )
    dense = 512 * 300
    assert held(optimizer) == {"0.weight": "csr"}
    masks = 0
    with Sizes() as sizes:
        for step in range(9):
            optimizer.zero_grad()
            x = torch.randn(8, 512, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.state_dict()
            masks += 1
    assert sizes.largest < dense  # bytes: not even a mask of one byte a weight
    assert all(tensor.numel() < dense for tensor in living_tensors())
    assert optimizer.summary().rows[0].active <= round(0.1 * dense)


def test_a_huge_layer_trains() -> None:
    """Densely it would be 160 GB."""
    side, count = 200_000, 100_000
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(SparseLinear(side, side, count / side**2, generator=generator))
    policy = st.SET(allocation="as_built", total_steps=8, update={"every": 1})
    x = torch.zeros(2, side)
    x[0, ::2], x[1, 1::2] = 1.0, -1.0
    with Sizes() as sizes:
        optimizer = st.SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, policy
        )
        before = optimizer.targets["0.weight"].active_indices()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        state = optimizer.state_dict()
        optimizer.load_state_dict(copy.deepcopy(state))
        shown = optimizer.summary()
    now = optimizer.targets["0.weight"].active_indices()
    assert now.numel() == before.numel() == count
    assert int(torch.isin(now, before).sum()) < 0.8 * count
    assert int(now.max()) > 2**33 and now.unique().numel() == count
    assert sizes.largest < 8e6
    assert (shown.rows[0].storage, shown.rows[0].why) == ("csr", "built sparse") and str(shown)
    assert shown.rows[0].total == side**2 and shown.rows[0].active == count
