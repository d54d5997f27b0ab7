"""Autocast and gradient scalers: masks stay exact, and a skipped step has never been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runs import OPTIMIZERS, POLICIES, STEPS, SmallNet, batch, same, shaped_state, weights
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

ASKED: dict[str, Any] = {"sparsity": 0.7, "total_steps": STEPS, "update": {"every": 3}}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**ASKED),
    "hard_concrete": st.HardConcrete(**ASKED, exact=True),
    "gumbel_softmax": st.GumbelSoftmax(**ASKED, exact=True),
    "variational_dropout": st.VariationalDropout(**ASKED, exact=True),
    "movement": st.Movement(**ASKED),
}
ALL = POLICIES | LEARNED
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = 2.0**10  # a power of two, so that unscaling gives the very gradients


def network() -> SmallNet:
    model = SmallNet()
    model.norm = nn.BatchNorm2d(8, track_running_stats=False)  # those would see skipped steps
    return model


def wrap(policy: str, optimizer: str = "adamw_amsgrad") -> tuple[SmallNet, st.SparseOptimizer]:
    model = network()
    base = OPTIMIZERS[optimizer](model.parameters())
    return model, st.SparseOptimizer(base, model, ALL[policy], seed=3)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    torch.manual_seed(step)  # what learned masks draw
    return F.cross_entropy(model(x), y)


def everything(model: nn.Module, optimizer: st.SparseOptimizer) -> dict[str, Tensor]:
    """Weights, masks, optimizer state, what policies remember, the random source."""
    kept = optimizer.state_dict()
    found = weights(model) | {f"mask of {n}": m for n, m in optimizer.masks().items()}
    for number, state in kept["state"].items():
        found |= {f"{k} of {number}": v.clone() for k, v in state.items()}
    for number, memory in enumerate(kept["sparsetrain"]["memories"]):
        tensors = {k: v for k, v in memory.items() if isinstance(v, Tensor)}
        found |= {f"memory {k} of {number}": v.clone() for k, v in tensors.items()}
    return found | {"generator": kept["sparsetrain"]["generator"].clone()}


# Autocast.


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("policy", ALL)
def test_masks_are_exact_under_autocast(policy: str, dtype: str) -> None:
    counts = []
    for enabled in (True, False):
        model, optimizer = wrap(policy)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=LOW[dtype], enabled=enabled):
                loss = loss_of(model, step)
            loss.backward()
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {
                torch.float32
            }
            optimizer.step()
        counts.append(sum(target.active for target in optimizer.targets.values()))
        numel = sum(target.numel for target in optimizer.targets.values())
        asked = getattr(ALL[policy], "sparsity", None)
        assert optimizer.sparsity() == pytest.approx(
            0.75 if asked is None else asked, abs=1 / numel
        )
        masks = optimizer.masks()
        optimizer.finalize()
        for name, mask in masks.items():
            weight = dict(model.named_parameters())[name].detach()
            assert (weight[~mask] == 0).all()
            assert weight.dtype == torch.float32 and weight.isfinite().all()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", LOW)
def test_optimizer_state_is_zero_where_inactive_under_autocast(dtype: str) -> None:
    for policy in ("set", "rigl", "gradual"):
        model, optimizer = wrap(policy, "rmsprop")
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=LOW[dtype]):
                loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            for target in optimizer.targets.values():
                state = shaped_state(optimizer, target.param)
                assert state.keys() or step == 0
                assert all((value[~target.mask] == 0).all() for value in state.values())


# Gradient scalers.


def train_scaled(
    model: nn.Module,
    optimizer: st.SparseOptimizer,
    *,
    skip: tuple[int, ...] = (),
    clip: bool = False,
) -> None:
    """Scaled steps. Before each step of `skip` comes another one with infinite gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000, backoff_factor=0.5)
    for step in range(STEPS):
        for infinite in (True, False) if step in skip else (False,):
            before = everything(model, optimizer) if infinite else {}
            clock = optimizer.step_count
            optimizer.zero_grad()
            loss = loss_of(model, STEPS + step if infinite else step)
            scaler.scale(loss * torch.inf if infinite else loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                optimizer.mask_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.step_count == clock + (not infinite)
            if infinite:
                assert same(everything(model, optimizer), before)


def train_plainly(model: nn.Module, optimizer: st.SparseOptimizer, *, clip: bool = False) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if clip:
            optimizer.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize(
    "policy, optimizer",
    [(p, "momentum") for p in POLICIES] + [(p, "adamw_fused") for p in ALL],
)
def test_scaled_steps_are_the_plain_ones_bit_for_bit(policy: str, optimizer: str) -> None:
    """RigL's steps 0, 3 and 6 change masks by the gradient instead; 3 is also tried in vain."""
    model, scaled = wrap(policy, optimizer)
    other, plain = wrap(policy, optimizer)
    train_scaled(model, scaled, skip=(0, 3, 5, 13))
    train_plainly(other, plain)
    assert same(everything(model, scaled), everything(other, plain))


@pytest.mark.parametrize("policy", POLICIES)
def test_clipping_what_the_scaler_has_unscaled(policy: str) -> None:
    model, scaled = wrap(policy, "adamw_fused")
    other, plain = wrap(policy, "adamw_fused")
    train_scaled(model, scaled, skip=(3, 4), clip=True)
    train_plainly(other, plain, clip=True)
    assert same(everything(model, scaled), everything(other, plain))


def test_fused_and_unfused_optimizers_skip_alike() -> None:
    """A fused kernel would skip by itself, but then masks and clock would go on."""
    models = []
    for fused in (True, False):
        model = network()
        base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        optimizer = st.SparseOptimizer(base, model, POLICIES["rigl"])
        assert getattr(base, "_step_supports_amp_scaling", False) == fused
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        train_scaled(model, optimizer, skip=(3, 4))
        models.append((model, optimizer))
    masks = [optimizer.masks() for _, optimizer in models]
    assert same(*masks)
    for name, weight in models[0][0].named_parameters():
        if name != "conv.bias":  # no gradient in front of a norm, but rounding
            torch.testing.assert_close(weight, dict(models[1][0].named_parameters())[name])


@pytest.mark.parametrize("policy", ["rigl", "snfs", "nm_sparse"])
def test_growth_sees_unscaled_gradients(policy: str) -> None:
    """The largest scale that keeps gradients finite changes no choice."""
    masks = []
    for scale in (1.0, 2.0**60):
        model, optimizer = wrap(policy, "momentum")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == scale
        masks.append(optimizer.masks())
    assert same(*masks)


def test_infinite_gradients_of_inactive_weights_need_not_cost_a_step() -> None:
    model, optimizer = wrap("static", "momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    inactive = ~optimizer.masks()["hidden.weight"]
    for masked in (False, True):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 0)).backward()
        model.hidden.weight.grad[inactive] = torch.inf
        if masked:
            optimizer.mask_gradients()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.step_count == masked


def test_a_scaler_that_is_given_the_wrapped_optimizer_is_stopped() -> None:
    model, optimizer = wrap("static", "adamw_fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = weights(model)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) of the SparseOptimizer"):
        scaler.step(optimizer.base)
    assert same(weights(model), before)


def test_a_run_goes_on_with_scaler_and_optimizer_from_a_checkpoint() -> None:
    def train(
        model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, first: int, last: int
    ) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            scaler.scale(loss * torch.inf if step == 8 else loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def made() -> tuple[SmallNet, st.SparseOptimizer, torch.amp.GradScaler]:
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
        return *wrap("rigl", "adamw_fused"), scaler

    whole = made()
    train(*whole, 0, STEPS)
    first = made()
    train(*first, 0, 7)
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = made()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(*second, 7, STEPS)
    assert whole[1].step_count == second[1].step_count == STEPS - 1
    assert whole[2].get_scale() == second[2].get_scale() != SCALE
    assert same(everything(*whole[:2]), everything(*second[:2]))
