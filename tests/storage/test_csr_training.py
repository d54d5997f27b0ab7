"""Training by non-zeros is the same training as with masks, and allocates nothing dense."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from runs import OPTIMIZERS, POLICIES, SmallNet, same, weights
from sparse_twins import (
    WEIGHTWISE,
    agree,
    backward,
    dense_weight,
    held,
    loss_of,
    policies,
    record,
    spread,
    train,
    twins,
    why,
    worth_it_from,
    wrap,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.storage.csr import growth
from sparsetrain.storage.csr.layers import SparseConv2d, SparseLayer, SparseLinear
from sparsetrain.storage.csr.target import CsrTarget

LONG = 210
DYNAMIC: dict[str, Any] = {"total_steps": 12, "update": {"every": 2}}
EVERY_POLICY = sorted(policies(1))
# Each optimizer with one policy, each policy with the two that are used most.
COMBINATIONS = sorted(
    {(EVERY_POLICY[n % 7], name) for n, name in enumerate(WEIGHTWISE)}
    | {(policy, name) for policy in EVERY_POLICY for name in ("momentum", "adamw_amsgrad")}
)


def step_of(model: nn.Module, optimizer: Any, step: int) -> float:
    loss = backward(model, step)
    optimizer.step()
    return float(loss)


@pytest.mark.parametrize(("policy", "optimizer"), COMBINATIONS)
def test_masks_are_identical_and_losses_equal(policy: str, optimizer: str) -> None:
    masked, csr = twins(policies(LONG)[policy], optimizer, step_of, LONG)
    assert masked.step_count == csr.step_count == LONG
    assert masked.sparsity() == csr.sparsity() == pytest.approx(0.8, abs=1e-3)
    for name, target in csr.targets.items():
        other = masked.targets[name]
        for key, state in csr.state[target.param].items():
            mine = masked.state[other.param][key]
            if isinstance(state, Tensor) and state.dim():
                assert state.shape == (target.active,)
                wanted = torch.where(other.mask, mine, 0.0)
                assert torch.allclose(spread(target, state), wanted, rtol=1e-6, atol=1e-9), key
            else:
                assert float(state) == float(mine), key


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_the_same_in_float32(policy: str) -> None:
    chosen, losses = policies(100, 10)[policy], []
    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, chosen, "momentum", dtype=torch.float32)
        losses.append(train(model, optimizer, 0, 100))
        assert set(held(optimizer).values()) == {storage}
        if policy in ("static", "set", "set_grow_std"):
            assert losses[0][-10:] == pytest.approx(losses[-1][-10:], rel=0.02, abs=0.01)
    assert losses[0][:20] == pytest.approx(losses[1][:20], rel=1e-3, abs=1e-4)


# What training loops do between the lines.


def two_micro_batches(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    losses = [loss_of(model, 2 * step + k) / 2 for k in range(2)]
    for loss in losses:
        loss.backward()
    optimizer.step()
    return float(sum(losses).detach())


def one_pass_of_two_batches(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    loss = (loss_of(model, 2 * step) + loss_of(model, 2 * step + 1)) / 2
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def zero_by(how: str) -> Callable[[nn.Module, Any, int], float]:
    def run(model: nn.Module, optimizer: Any, step: int) -> float:
        if how == "after the step":
            pass
        elif how == "model":
            model.zero_grad()
        elif how == "model to zeros":
            model.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad(set_to_none=how == "to none")
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        if how == "after the step":
            optimizer.zero_grad()
        return float(loss.detach())

    return run


def closure(model: nn.Module, optimizer: Any, step: int) -> float:
    def again() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss.detach()

    return float(optimizer.step(again))


def skipping(model: nn.Module, optimizer: Any, step: int) -> float:
    """As a gradient scaler does: some steps are left out, with zeroed gradients before the next."""
    optimizer.zero_grad(set_to_none=step % 2 == 0)
    loss = loss_of(model, step)
    loss.backward()
    if step % 3 != 1:
        optimizer.step()
    return float(loss.detach())


def twice_backward(model: nn.Module, optimizer: Any, step: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def clipped(model: nn.Module, optimizer: Any, step: int) -> float:
    loss = backward(model, step)
    optimizer.mask_gradients()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return float(loss)


def adversarial(model: nn.Module, optimizer: Any, step: int) -> float:
    """Gradients of inputs, taken aside between the micro-batches."""
    optimizer.zero_grad()
    total = 0.0
    for k in range(2):
        x = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(step)).double()
        x.requires_grad_()
        (direction,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
        loss = F.cross_entropy(model(x.detach() + direction.sign()), torch.tensor([0, 1, 2, k]))
        loss.backward()
        torch.autograd.grad(model(x).square().sum(), x)
        total += float(loss.detach())
    optimizer.step()
    return total


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Any, int], float]:
    """Two micro-batches whose activations are computed again in the backward pass."""

    def run(model: Any, optimizer: Any, step: int) -> float:
        optimizer.zero_grad()
        total = 0.0
        for k in range(2):
            generator = torch.Generator().manual_seed(2 * step + k)
            x = torch.randn(6, 4, 4, 4, generator=generator).double().requires_grad_()
            h = checkpoint(model.conv, x, use_reentrant=reentrant)
            h = checkpoint(lambda h: F.relu(model.hidden(h)), h.flatten(1), use_reentrant=reentrant)
            loss = F.cross_entropy(model.head(h), torch.arange(6) % 3)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return run


LOOPS = {
    "two micro-batches": two_micro_batches,
    "one pass of two batches": one_pass_of_two_batches,
    "zero_grad to none": zero_by("to none"),
    "zero_grad to zeros": zero_by("to zeros"),
    "model.zero_grad": zero_by("model"),
    "model.zero_grad to zeros": zero_by("model to zeros"),
    "zero_grad after the step": zero_by("after the step"),
    "closure": closure,
    "skipped steps": skipping,
    "backward twice": twice_backward,
    "checkpointed, reentrant": checkpointed(True),
    "checkpointed": checkpointed(False),
    "adversarial": adversarial,
}


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set_grow_std"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_same_in_every_training_loop(loop: str, policy: str) -> None:
    steps = 30
    masked, csr = twins(policies(steps, 3)[policy], "momentum", LOOPS[loop], steps)
    assert masked.step_count == csr.step_count == (20 if loop == "skipped steps" else steps)


@pytest.mark.parametrize("policy", ["rigl", "set", "gradual"])
def test_the_same_with_clipped_gradients(policy: str) -> None:
    twins(policies(20, 5)[policy], "momentum", clipped, 20)


def test_the_same_with_gradients_that_were_scaled_and_unscaled() -> None:
    """SNFS follows the gradient as `step()` finds it: unscaled, by a factor that changes."""

    def run(model: nn.Module, optimizer: Any, step: int) -> float:
        optimizer.zero_grad()
        loss, scale = loss_of(model, step), 10.0 ** (step % 4)
        (loss * scale).backward()
        for param in model.parameters():
            param.grad.div_(scale)
        optimizer.step()
        return float(loss.detach())

    twins(policies(20, 4)["snfs"], "sgd", run, 20)


@pytest.mark.parametrize("policy", ["rigl", "set"])
def test_the_same_with_learning_rate_schedules(policy: str) -> None:
    made = [wrap(storage, policy, "momentum", steps=30) for storage in ("masked", "csr")]
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25),
            ],
            milestones=[5],
        )
        for _, optimizer in made
    ]
    for step in range(30):
        losses = []
        for (model, optimizer), schedule in zip(made, schedules, strict=True):
            losses.append(step_of(model, optimizer, step))
            schedule.step()
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        agree(made[0][1], made[1][1])
    assert made[0][1].param_groups[0]["lr"] == made[1][1].param_groups[0]["lr"] < 0.05


def test_a_gradient_scaler_works_on_what_is_held() -> None:
    made = [wrap(storage, "rigl", "momentum") for storage in ("masked", "csr")]
    for model, optimizer in made:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for step in range(14):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(model, step))
            loss.backward()
            if step in (4, 6):
                optimizer.targets["hidden.weight"].param.grad.view(-1)[-1] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 1024.0
    assert made[0][1].step_count == made[1][1].step_count == 12
    agree(made[0][1], made[1][1], within=1e-8)


class Recurrent(nn.Module):
    """One layer under two names, called three times a pass."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.again(h) + self.first(2 * h)))


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set"])
def test_a_layer_that_is_called_several_times(policy: str) -> None:
    made: list[Any] = []
    for storage in ("masked", "csr"):
        model = Recurrent().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(base, model, policies(30, 3)[policy], storage=storage)
        assert held(optimizer)["first.weight"] == storage
        made.append((model, optimizer))
    for step in range(30):
        losses = []
        for model, optimizer in made:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).double()
            loss = F.cross_entropy(model(x), torch.arange(8) % 3)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        agree(made[0][1], made[1][1])


@pytest.mark.parametrize("policy", ["rigl", "snfs", "set"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_some_steps_do_not_use(policy: str, set_to_none: bool) -> None:
    """A model with a branch: at every third step the hidden layer is passed by."""
    made = [wrap(storage, policies(24, 2)[policy], "sgd") for storage in ("masked", "csr")]
    for step in range(24):
        for model, optimizer in made:
            optimizer.zero_grad(set_to_none=set_to_none)
            if step % 3 == 2:
                x = torch.ones(5, 4, 4, 4, dtype=torch.float64)
                model.conv(x).square().mean().backward()
            else:
                loss_of(model, step).backward()
            optimizer.step()
        agree(made[0][1], made[1][1])


@pytest.mark.filterwarnings("ignore")  # of what Dynamo does on its way
def test_a_compiled_model_trains_alike() -> None:
    plain, optimizer = wrap("csr", "rigl")
    train(plain, optimizer, 0, 6)
    model, other = wrap("csr", "rigl")
    train(torch.compile(model, backend="eager"), other, 0, 6)
    assert same(weights(plain), weights(model))


def test_a_transformer_trains_and_takes_its_fast_path_in_evaluation() -> None:
    outputs = []
    for storage in ("masked", "csr"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        policy = st.RigL(sparsity=0.9, **DYNAMIC)
        optimizer = st.SparseOptimizer(base, model, policy, storage=storage)
        for step in range(12):
            optimizer.zero_grad()
            x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step)).double()
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
        wanted = {"masked": "masked", "csr": "csr"}[storage]
        assert held(optimizer)["linear1.weight"] == held(optimizer)["linear2.weight"] == wanted
        assert held(optimizer)["self_attn.out_proj.weight"] == "masked"
        model.eval()
        with torch.no_grad():
            outputs.append(model(x))
    assert torch.allclose(*outputs, atol=1e-9)


def test_inplace_activations_and_views_behind_layers() -> None:
    """As VGG has them: Conv2d, ReLU(inplace=True), view."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.features = nn.Sequential(
                    nn.Conv2d(4, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)
                )
                self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.features(x)
            return self.head(h.view(h.size(0), -1))

    losses = []
    for storage in ("masked", "csr"):
        model = Net().double()
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1),
                model,
                st.RigL(sparsity=0.7, **DYNAMIC),
                storage=storage,
            )
        assert set(held(optimizer).values()) == {storage}
        losses.append(train(model, optimizer, 0, 12))
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


# Around an update.


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


# Wrapping.


def snapshot(model: nn.Module, base: torch.optim.Optimizer) -> Any:
    return (
        [type(m) for m in model.modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
        [[id(p) for p in group["params"]] for group in base.param_groups],
        {name: value.clone() for name, value in model.state_dict().items()},
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        (len(base._optimizer_step_pre_hooks), len(base._optimizer_step_post_hooks)),
    )


def is_as_it_was(before: Any, model: nn.Module, base: torch.optim.Optimizer) -> bool:
    after = snapshot(model, base)
    return before[:3] == after[:3] and same(before[3], after[3]) and before[4:] == after[4:]


@pytest.mark.parametrize("storage", ["csr", "auto"])
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "static", "sparsity": 0.9999}, "at most"),
        (
            {
                "policy": {"kind": "static", "sparsity": 0.9},
                "rules": [{"match": "n", "dense": True}],
            },
            "n",
        ),
        (
            {"kind": "static", "sparsity": 0.75, "structure": {"kind": "n_m", "n": 1, "m": 4}},
            "not divisible by m=4",
        ),
        (
            {
                "policy": {"kind": "static", "sparsity": 0.8},
                "rules": [
                    {
                        "match": "head.weight",
                        "policy": {"kind": "nm_sparse", "n": 3, "m": 5},
                    }
                ],
            },
            r"head\.weight",
        ),
        ({"kind": "statics", "sparsity": 0.9}, "statics"),
    ],
)
def test_a_failed_wrapping_leaves_everything_as_it_was(
    storage: str, policy: Any, message: str
) -> None:
    model = SmallNet()
    if "m=4" in message:
        model.hidden = nn.Linear(30, 16)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = snapshot(model, base)
    with worth_it_from(1.0), pytest.raises(ValueError, match=message):
        st.SparseOptimizer(base, model, policy, storage=storage)
    assert is_as_it_was(before, model, base)


@pytest.mark.parametrize("storage", ["CSR", "coo", "", "mask"])
def test_an_unknown_storage_is_refused(storage: str) -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=f"storage '{storage}' is not one of masked, csr, auto"):
        st.SparseOptimizer(base, model, st.Static(sparsity=0.9), storage=storage)
    assert is_as_it_was(before, model, base)


def test_an_optimizer_of_another_model_leaves_both_as_they_were() -> None:
    model, other = SmallNet(), SmallNet(1)
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    before = snapshot(model, base), snapshot(other, base)
    with worth_it_from(1.0), pytest.raises(ValueError, match="holds none of the tensors"):
        st.SparseOptimizer(base, model, st.Static(sparsity=0.9), storage="csr")
    assert is_as_it_was(before[0], model, base) and is_as_it_was(before[1], other, base)


def test_a_group_that_does_not_fit_is_not_added() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 1))
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.95), storage="csr")
        with pytest.raises(ValueError, match=r"at most"):
            optimizer.add_param_group({"params": list(model[1].parameters())})
        assert type(model[1]) is not SparseLinear and held(optimizer) == {"0.weight": "csr"}
        assert len(base.param_groups) == 1


def test_a_group_that_is_added_later_is_held_sparse_too() -> None:
    model = SmallNet().double()
    base = torch.optim.SGD(model.hidden.parameters(), lr=0.1, momentum=0.9)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, st.RigL(sparsity=0.8, **DYNAMIC), storage="csr")
        assert isinstance(model.hidden, SparseLinear)
        assert not isinstance(model.head, SparseLayer)
        train(model, optimizer, 0, 3)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.01})
    assert held(optimizer) == {"hidden.weight": "csr", "head.weight": "csr"}
    assert [p.shape for p in base.param_groups[1]["params"]] == [(10,), (3,)]
    train(model, optimizer, 3, 12)


class Odd(nn.Module):
    """Layers that csr storage cannot hold, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(8, 8, 1)
        self.tied = nn.Linear(32, 32)
        self.also = nn.Linear(32, 32)
        self.also.weight = self.tied.weight
        self.plain = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.circular(F.relu(self.grouped(x))))
        h = self.line(h.flatten(2)).flatten(1)
        return self.plain(self.also(F.relu(self.tied(h))))


def test_layers_without_a_sparse_form_stay_masked_with_a_reason() -> None:
    for storage in ("csr", "auto"):
        model = Odd().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(
                base, model, st.SET(sparsity=0.8, **DYNAMIC), storage=storage
            )
        train(model, optimizer, 0, 1)
        reasons = why(optimizer)
        assert "grouped" in reasons["grouped.weight"]
        assert "padding" in reasons["circular.weight"]
        assert "Conv1d has no sparse form" in reasons["line.weight"]
        assert "several modules share it" in reasons["tied.weight"]
        expected = dict.fromkeys(reasons, "masked")
        if storage == "csr":
            expected["plain.weight"] = "csr"
            assert reasons["plain.weight"] == ""
        assert {k: v for k, v in held(optimizer).items() if k in expected} == expected
        train(model, optimizer, 1, 12)
        optimizer.finalize()
        assert model.also.weight is model.tied.weight


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (POLICIES["dynamic_network_surgery"], "latent"),
        (POLICIES["nm_sparse"], "latent"),
        (st.RigL(sparsity=0.75, structure="constant_fan_in", **DYNAMIC), "whole units"),
        (st.SET(structure={"kind": "n_m", "n": 1, "m": 4}, **DYNAMIC), "whole units"),
        (st.Gradual(sparsity=0.75, structure="constant_fan_in", **DYNAMIC), "whole units"),
    ],
)
def test_policies_that_need_dense_weights_keep_them_with_a_reason(
    policy: st.Policy, reason: str
) -> None:
    for storage in ("csr", "auto"):
        model, optimizer = wrap(storage, policy)
        train(model, optimizer, 0, 12)
        assert set(held(optimizer).values()) == {"masked"}
        assert all(reason in text for text in why(optimizer).values())
        assert reason in " ".join(str(optimizer.summary()).split())
        assert not any(isinstance(m, SparseLayer) for m in model.modules())


def test_a_structured_mask_that_never_moves_is_held_sparse() -> None:
    model, optimizer = wrap(
        "csr", st.Static(sparsity=0.75, structure={"kind": "n_m", "n": 1, "m": 4})
    )
    assert set(held(optimizer).values()) == {"csr"}
    train(model, optimizer, 0, 5)
    assert (model.hidden.weight.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 1


def test_dense_layers_stay_masked_and_say_from_where_csr_pays() -> None:
    model, optimizer = wrap("csr", st.Static(sparsity=0.5, allocation="uniform"), worth=0.4)
    assert set(held(optimizer).values()) == {"masked"}
    assert set(why(optimizer).values()) == {"worth it from a density of 40%"}
    train(model, optimizer, 0, 3)
    model, optimizer = wrap("csr", st.Static(sparsity=0.7, allocation="uniform"), worth=0.4)
    assert held(optimizer)["hidden.weight"] == "csr" and why(optimizer)["hidden.weight"] == ""


def test_by_default_it_pays_for_linear_layers_earlier_than_for_convolutions() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = st.Static(sparsity=0.9, allocation="uniform")
    optimizer = st.SparseOptimizer(base, model, policy, storage="csr")
    assert held(optimizer) == {
        "conv.weight": "masked",
        "hidden.weight": "csr",
        "head.weight": "csr",
    }
    assert "2%" in why(optimizer)["conv.weight"]


@pytest.mark.parametrize("policy", ["static", "set", "rigl"])
def test_an_optimizer_for_matrices_trains_or_says_why_it_keeps_them(policy: str) -> None:
    """Muon cannot train a vector of non-zeros."""
    if "muon" not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    for storage in ("csr", "auto"):
        model, optimizer = wrap(storage, policy, "muon")
        train(model, optimizer, 0, 14)
        assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
        for name, how in held(optimizer).items():
            assert how == "masked" and why(optimizer)[name], name
        agree(optimizer, _trained("masked", policy, "muon"), within=1e-9)


def _trained(storage: str, policy: str, optimizer: str) -> st.SparseOptimizer:
    model, wrapped = wrap(storage, policy, optimizer)
    train(model, wrapped, 0, 14)
    return wrapped


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("optimizer", ["lbfgs", "adafactor"])
def test_optimizers_that_look_at_all_weights_together_train(optimizer: str, policy: str) -> None:
    model, wrapped = wrap("csr", policy, optimizer)
    losses = train(model, wrapped, 0, 14)
    assert all(math.isfinite(loss) for loss in losses)
    wrapped.finalize()
    if optimizer == "lbfgs":
        wrapped.base.step(lambda: backward(model, 14))
    else:
        backward(model, 14)
        wrapped.base.step()


# The end.


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adagrad"])
def test_finalize_leaves_the_dense_model_of_the_masked_run(policy: str, optimizer: str) -> None:
    made = [wrap(storage, policy, optimizer) for storage in ("masked", "csr")]
    original = SmallNet()
    for model, wrapped in made:
        train(model, wrapped, 0, 14)
    expected, masks = made[1][0].eval()(torch.ones(1, 4, 4, 4).double()), made[1][1].masks()
    for model, wrapped in made:
        model.train()
        wrapped.finalize()
    (masked, _), (model, wrapped) = made
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    for name, value in masked.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-9)
    for name, mask in masks.items():
        assert (model.get_parameter(name).detach()[~mask] == 0).all()
    assert torch.allclose(model.eval()(torch.ones(1, 4, 4, 4).double()), expected)
    held_now = [id(p) for group in wrapped.base.param_groups for p in group["params"]]
    assert held_now == [id(p) for p in model.parameters()]
    assert set(wrapped.base.state) <= set(model.parameters())
    assert not wrapped.base._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match="finalized"):
        wrapped.step()
    model.train()
    backward(model, 14)
    before = weights(model)
    wrapped.base.step()  # the plain optimizer goes on
    assert not same(before, weights(model))
    for param in model.parameters():
        for state in wrapped.base.state[param].values():
            assert not isinstance(state, Tensor) or state.shape in (param.shape, ())


@pytest.mark.parametrize("policy", ["rigl", "snfs", "gradual"])
def test_finalize_may_leave_the_layers_sparse(policy: str) -> None:
    model, wrapped = wrap("csr", policy)
    train(model, wrapped, 0, 13)
    x = torch.ones(1, 4, 4, 4).double()
    expected = model.eval()(x)
    values = [p.shape for p in model.parameters()]
    wrapped.finalize(dense=False)
    assert type(model.conv) is SparseConv2d
    assert type(model.hidden) is type(model.head) is SparseLinear
    assert torch.equal(model(x), expected)
    assert all(m.tape is None for m in model.modules() if isinstance(m, SparseLayer))
    model.train()
    backward(model, 14)
    wrapped.base.step()
    assert [p.shape for p in model.parameters()] == values
    assert not any(m._forward_pre_hooks for m in model.modules())
    pickle.loads(pickle.dumps(model))(x)


def test_a_finalized_sparse_model_is_wrapped_again_as_it_was_built() -> None:
    model, wrapped = wrap("csr", "rigl")
    train(model, wrapped, 0, 13)
    counts = {name: t.active for name, t in wrapped.targets.items()}
    wrapped.finalize(dense=False)
    policy = st.SET(allocation="as_built", **DYNAMIC)
    again = st.SparseOptimizer(wrapped.base, model, policy)
    assert {name: t.active for name, t in again.targets.items()} == counts
    train(model, again, 0, 12)
    again.finalize()
    assert type(model.hidden) is SparseLinear


def test_a_dense_rest_of_the_model_is_what_it_was() -> None:
    recipe = {
        "policy": policies(14, 3)["rigl"].model_dump(),
        "rules": [{"match": "head", "dense": True}],
    }
    model = SmallNet().double()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, recipe, storage="csr")
    train(model, optimizer, 0, 14)
    assert isinstance(model.head, nn.Linear)
    assert not isinstance(model.head, SparseLayer)
    copy.deepcopy(model)(torch.ones(1, 4, 4, 4).double())
    pickle.loads(pickle.dumps(model))(torch.ones(1, 4, 4, 4).double())
    optimizer.finalize()
    assert type(model.head) is type(model.hidden) is nn.Linear


# Layers that were built sparse.


def built(density: float = 0.2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(),
            SparseLinear(64, 32, density, generator=generator, dtype=dtype),
            nn.ReLU(),
            SparseLinear(32, 16, 2 * density, generator=generator, dtype=dtype),
            nn.ReLU(),
            nn.Linear(16, 3, dtype=dtype),
        )


@pytest.mark.parametrize("storage", ["masked", "csr", "auto"])
@pytest.mark.parametrize("kind", ["set", "rigl", "snfs", "static"])
def test_networks_that_were_built_sparse_train(kind: str, storage: str) -> None:
    model = built()
    data: dict[str, Any] = {"kind": kind, "allocation": "as_built"}
    if kind != "static":
        data |= {"total_steps": 14, "update": {"every": 2}}
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = weights(model)
    optimizer = st.SparseOptimizer(base, model, data, storage=storage)
    assert same(weights(model), before)
    counts = {name: t.active for name, t in optimizer.targets.items()}
    assert counts == {"1.weight": 410, "3.weight": 205, "5.weight": 48}
    assert why(optimizer)["1.weight"] == why(optimizer)["3.weight"] == "built sparse"
    masks = optimizer.masks()
    for step in range(14):
        train(model, optimizer, step, step + 1)
        now = {name: t.active for name, t in optimizer.targets.items()}
        if kind == "snfs":
            assert sum(now.values()) == sum(counts.values())
        else:
            assert now == counts
    assert same(optimizer.masks(), masks) == (kind == "static")
    optimizer.finalize()
    assert type(model[1]) is type(model[3]) is SparseLinear


def test_another_number_of_connections_is_refused_by_name_and_changes_nothing() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    before = snapshot(model, base)
    for allocation in ("uniform", "erdos_renyi_kernel"):
        policy = st.SET(sparsity=0.9, allocation=allocation, **DYNAMIC)
        with (
            worth_it_from(1.0),
            pytest.raises(
                ValueError, match=r"1\.weight is built with 410 of 2,048 connections.*as_built"
            ),
        ):
            st.SparseOptimizer(base, model, policy, storage="csr")
        assert is_as_it_was(before, model, base)


def test_the_number_of_connections_that_is_allocated_is_accepted() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    recipe = {
        "rules": [
            {"match": "5", "dense": True},
            {
                "match": "*",
                "policy": {
                    "kind": "set",
                    "allocation": {
                        "kind": "explicit",
                        "densities": {"1.weight": 410 / 2048, "3.weight": 205 / 512},
                    },
                    **DYNAMIC,
                },
            },
        ]
    }
    optimizer = st.SparseOptimizer(base, model, recipe)
    assert {n: t.active for n, t in optimizer.targets.items()} == {"1.weight": 410, "3.weight": 205}
    train(model, optimizer, 0, 12)


def test_gradual_pruning_goes_on_from_what_was_built() -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = st.Gradual(sparsity=0.95, total_steps=14, update={"every": 1})
    optimizer = st.SparseOptimizer(base, model, policy)
    falling = [optimizer.sparsity()]
    for step in range(14):
        train(model, optimizer, step, step + 1)
        assert optimizer.sparsity() >= falling[-1]
        falling.append(optimizer.sparsity())
    assert falling[-1] == pytest.approx(0.95, abs=1e-3) and len(set(falling)) > 3
    assert optimizer.targets["1.weight"].active < 410


@pytest.mark.parametrize("policy", ["dynamic_network_surgery", "nm_sparse"])
def test_policies_of_latent_weights_refuse_what_was_built_sparse(policy: str) -> None:
    model = built()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=r"cannot train 1\.weight, which is built sparse.*latent"):
        st.SparseOptimizer(base, model, POLICIES[policy])
    assert is_as_it_was(before, model, base)


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"module_type": "Linear"}, {"1.weight", "3.weight", "5.weight"}),
        ({"module_type": "SparseLinear"}, {"1.weight", "3.weight"}),
        ({"match": "3.weight"}, {"3.weight"}),
        ({"match": "3"}, {"3.weight"}),
        ({"regex": r"^[13]\.weight$"}, {"1.weight", "3.weight"}),
    ],
)
def test_rules_speak_of_them_as_of_dense_layers(selector: dict[str, str], names: set[str]) -> None:
    model = built()
    policy = {"kind": "set", "allocation": "as_built", **DYNAMIC}
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        {"rules": [selector | {"policy": policy}]},
    )
    assert set(optimizer.targets) == names
    with pytest.raises(ValueError, match=r"values"):
        st.SparseOptimizer(
            torch.optim.SGD(built().parameters(), lr=0.1),
            built(),
            {"rules": [{"match": "1.values", "policy": policy}]},
        )


def test_frozen_values_are_no_target() -> None:
    model = built()
    model[1].values.requires_grad_(False)
    policy = {"kind": "set", "allocation": "as_built", **DYNAMIC}
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    assert set(optimizer.targets) == {"3.weight", "5.weight"}
    before = model[1].weight
    train(model, optimizer, 0, 12)
    assert torch.equal(model[1].weight, before)


# What else is written to the model.


def other_state(sparsity: float) -> dict[str, Tensor]:
    model, _ = wrap("csr", st.Static(sparsity=sparsity), seed=3)
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("policy", ["rigl", "set", "snfs", "gradual", "static"])
@pytest.mark.parametrize("due", [True, False])
def test_a_state_of_the_model_with_another_number_of_values(policy: str, due: bool) -> None:
    """Loaded between two steps, just before an update or not: training goes on with it."""
    model, optimizer = wrap("csr", policy)
    first = 3 if due else 4
    train(model, optimizer, 0, first)
    state = other_state(0.7)
    model.load_state_dict(state)
    assert optimizer.state_dict()["sparsetrain"]["targets"]["hidden.weight"]["columns"].numel() == (
        state["hidden.values"].numel()
    )
    assert int(optimizer.masks()["hidden.weight"].sum()) == state["hidden.values"].numel()
    train(model, optimizer, first, 14)
    for target in optimizer.targets.values():
        assert isinstance(target, CsrTarget)
        assert target.param is target.layer.values
        assert target.param.numel() == target.active == target.layer.pattern.nnz
        for state in optimizer.state[target.param].values():
            assert state.shape in ((), (target.active,))
    here = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert here == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("policy", ["set", "rigl"])
def test_a_forced_update_after_a_state_with_another_number_of_values(policy: str) -> None:
    model, optimizer = wrap("csr", policy)
    train(model, optimizer, 0, 2)
    model.load_state_dict(other_state(0.7))
    optimizer.expect_update()
    backward(model, 2)
    optimizer.update_masks()
    train(model, optimizer, 2, 14)


def test_moving_the_model_to_another_dtype_in_the_middle() -> None:
    for policy in ("rigl", "set", "gradual", "snfs"):
        model, optimizer = wrap("csr", policy, "sgd", dtype=torch.float32)
        train(model, optimizer, 0, 5)
        model.double()
        train(model, optimizer, 5, 14)
        assert all(t.param.dtype == torch.float64 for t in optimizer.targets.values())


@contextmanager
def one_thread_more() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_does_not_change_a_run() -> None:
    model, optimizer = wrap("csr", "rigl", dtype=torch.float32)
    other, again = wrap("csr", "rigl", dtype=torch.float32)
    train(model, optimizer, 0, 14)
    with one_thread_more():
        train(other, again, 0, 14)
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), other.state_dict()[name].double(), atol=1e-4)


def test_masks_at_every_update_are_recorded_alike() -> None:
    seen = []
    for storage in ("masked", "csr"):
        model, optimizer = wrap(storage, "snfs")
        seen.append(record(optimizer))
        train(model, optimizer, 0, 14)
    assert len(seen[0]) == len(seen[1]) > 2
    assert all(same(a, b) for a, b in zip(*seen, strict=True))
