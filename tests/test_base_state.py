"""Optimizer state by shape: what rests at zero, what is fresh, and what a mask change resets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from runs import OPTIMIZERS, SmallNet, shaped_state, train, weights
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparsetrain as st
from sparsetrain.base_state import (
    Resting,
    carry_state,
    find_resting,
    forget_history,
    total_numel,
    zero_inactive_state,
)
from sparsetrain.storage.masked import MaskedTarget
from sparsetrain.targets import Exchanged

# Muon turns whole rows; the others hold something other than 0 for a weight at rest.
MOVE_ZEROS = {"adamax", "adagrad", "rprop", "lbfgs", "muon"}
FRESH = {"adamax": {"exp_inf": 1e-8}, "adagrad": {"sum": 0.1}, "rprop": {"step_size": 0.01}}
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Drifting(torch.optim.SGD):
    """Adds the learning rate to every weight at every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(group["lr"])
        return loss


class Noisy(torch.optim.SGD):
    """Langevin dynamics: noise from torch's global generator on every weight."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(torch.randn_like(param), alpha=0.01)
        return loss


class Factored(torch.optim.Optimizer):
    """Row and column means of squared gradients, a full moment, a scalar and a step count."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["row"] = param.grad.square().mean(1, keepdim=True) + 1
                state["col"] = param.grad.square().mean(0, keepdim=True) + 1
                state["flat"] = param.grad.flatten() + 1
                state["full"] = param.grad + 1
                state["scale"] = torch.tensor(3.0)
                state["steps"] = state.get("steps", 0) + 1
                param.add_(param.grad / (state["row"] * state["col"]).sqrt(), alpha=-group["lr"])


def resting(base: torch.optim.Optimizer, like: Tensor | None = None) -> Resting:
    group = base.param_groups[0]
    return find_resting(base, group, group["params"][0] if like is None else like)


def one_weight(make: Make, *shape: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return param, make([param])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_kept_and_fresh_values(name: str, dtype: torch.dtype) -> None:
    _, base = one_weight(OPTIMIZERS[name], 3, 5)
    found = resting(base, torch.zeros(3, 5, dtype=dtype))
    assert found.keeps_zeros == (name not in MOVE_ZEROS)
    assert {k: v for k, v in found.fresh.items() if v} == pytest.approx(FRESH.get(name, {}), 1e-2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_is_what_the_optimizer_holds_for_a_weight_at_rest(name: str) -> None:
    if name == "lbfgs":
        pytest.skip("cannot be tried without a closure")
    param, base = one_weight(OPTIMIZERS[name], 6, 7)
    rests = torch.zeros(6, 7, dtype=torch.bool)
    rests[2, 3] = True
    param.data[rests] = 0
    found = resting(base)
    for seed in range(3):
        noise = torch.randn(6, 7, generator=torch.Generator().manual_seed(seed))
        param.grad = noise.masked_fill(rests, 0)
        base.step()
    state = shaped_state(base, param)
    assert found.fresh.keys() == state.keys()
    for key, value in state.items():
        assert value[rests].item() == pytest.approx(found.fresh[key], abs=1e-9)
    assert bool(param.data[rests] == 0) or not found.keeps_zeros


@pytest.mark.parametrize("make", [Drifting, Noisy, Factored])
def test_optimizers_not_in_torch(make: Make) -> None:
    _, base = one_weight(lambda p: make(p, lr=0.1), 3, 5)
    assert not resting(base).keeps_zeros
    assert resting(base).fresh == ({"full": 1.0} if make is Factored else {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trying_out_leaves_the_real_optimizer_alone(name: str) -> None:
    model = SmallNet()
    base = OPTIMIZERS[name](model.parameters())
    called: list[str] = []
    base.register_step_pre_hook(lambda *_: called.append("pre"))
    base.register_step_post_hook(lambda *_: called.append("post"))
    train(model, base, 0, 2)
    called.clear()
    state, values = copy.deepcopy(base.state_dict()), weights(model)
    gradients = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    resting(base, model.hidden.weight)
    assert not called
    assert len(base._optimizer_step_pre_hooks) == len(base._optimizer_step_post_hooks) == 1
    torch.testing.assert_close(base.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(weights(model), values, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_trying_out_a_noisy_optimizer_draws_no_global_random_numbers() -> None:
    _, base = one_weight(lambda p: Noisy(p, lr=0.1), 3, 5)
    before = torch.get_rng_state()
    resting(base)
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_on_all_optimizers_do_not_see_the_trial() -> None:
    seen: list[Any] = []
    _, base = one_weight(OPTIMIZERS["adam"], 3, 5)
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    try:
        resting(base)
    finally:
        handle.remove()
    assert not seen


@pytest.mark.parametrize("name", ["drifting", "noisy", "rprop", "muon"])
def test_zeros_hold_when_the_learning_rate_warms_up_from_0(name: str) -> None:
    make = {"drifting": Drifting, "noisy": Noisy, **OPTIMIZERS}.get(name)
    if make is None:
        pytest.skip("this torch has no Muon")
    model = SmallNet()
    base = make(model.parameters())
    base.param_groups[0]["lr"] = 0.1
    warm_up = torch.optim.lr_scheduler.LambdaLR(base, lambda step: step / 4)
    optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.5))
    for step in range(5):
        train(model, optimizer, step, step + 1)
        warm_up.step()
        for target in optimizer.targets.values():
            assert (target.param.detach()[~target.mask] == 0).all(), f"step {step}"


def test_each_parameter_group_is_tried_with_its_own_options() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    base = torch.optim.SGD([{"params": [first]}, {"params": [second], "momentum": 0.9}], lr=0.1)
    plain, moving = (find_resting(base, group, first) for group in base.param_groups)
    assert plain == Resting(True, {})
    assert moving == Resting(True, {"momentum_buffer": 0.0})


def filled() -> tuple[nn.Parameter, torch.optim.Optimizer, dict[str, Any]]:
    param, base = one_weight(Factored, 3, 5)
    param.grad = torch.ones(3, 5)
    base.step()
    return param, base, copy.deepcopy(base.state[param])


def reset_state(
    base: torch.optim.Optimizer,
    param: nn.Parameter,
    gone: torch.Tensor,
    new: torch.Tensor,
    fresh: dict[str, float],
) -> None:
    done = Exchanged(gone, new, gone.numel(), new.numel())
    carry_state(base, MaskedTarget("weight", param), lambda: done, fresh)


def zero_inactive(base: torch.optim.Optimizer, param: nn.Parameter, mask: torch.Tensor) -> None:
    target = MaskedTarget("weight", param)
    target.replace_mask(mask)
    zero_inactive_state(base, target)


def test_resetting_writes_only_state_of_the_weights_shape() -> None:
    param, base, before = filled()
    gone, new = torch.tensor([0, 7]), torch.tensor([14])
    reset_state(base, param, gone, new, {"full": 0.25, "row": 9.0})
    state = base.state[param]
    expected = before["full"].flatten()
    expected[gone], expected[new] = 0.0, 0.25
    assert torch.equal(state.pop("full").flatten(), expected)
    assert all(bool(torch.as_tensor(value == before[key]).all()) for key, value in state.items())
    assert set(state) == {"row", "col", "flat", "scale", "steps"}


def test_zeroing_inactive_state_writes_only_state_of_the_weights_shape() -> None:
    param, base, before = filled()
    base.state[param]["full"][0, 0] = float("nan")
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    zero_inactive(base, param, mask)
    state = base.state[param]
    assert torch.equal(state.pop("full"), before["full"] * mask)
    assert all(bool(torch.as_tensor(value == before[key]).all()) for key, value in state.items())


def test_a_weight_without_state_needs_no_reset() -> None:
    param, base = one_weight(OPTIMIZERS["adam"], 3, 5)
    reset_state(base, param, torch.tensor([0]), torch.tensor([1]), {"exp_avg": 1.0})
    zero_inactive(base, param, torch.zeros(3, 5, dtype=torch.bool))
    assert len(base.state) == 0


def test_reset_of_channels_last_state_counts_in_rows() -> None:
    param, base = one_weight(OPTIMIZERS["momentum"], 2, 3, 2, 2)
    buffer = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    base.state[param]["momentum_buffer"] = buffer
    reset_state(base, param, torch.tensor([5]), torch.tensor([6]), {"momentum_buffer": 2.0})
    assert buffer[0, 1, 0, 1] == 0 and buffer[0, 1, 1, 0] == 2
    assert int((buffer == 1).sum()) == 22


@pytest.mark.parametrize("name", ["lbfgs", "adam", "rprop"])
def test_only_histories_of_whole_updates_are_forgotten(name: str) -> None:
    model = SmallNet()
    base = OPTIMIZERS[name](model.parameters())
    train(model, base, 0, 2)
    before = copy.deepcopy(base.state_dict()["state"])
    forget_history(base, total_numel(base))
    if name == "lbfgs":
        assert any(isinstance(value, list) for value in before[0].values())
        assert not any(base.state.values())
        train(model, base, 2, 3)  # and it goes on
    else:
        torch.testing.assert_close(base.state_dict()["state"], before, rtol=0, atol=0)
