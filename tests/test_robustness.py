"""What users do to an optimizer beyond the manual, and what must hold all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runs import POLICIES, STEPS, SmallNet, backward, same, train, weights, wrap
from torch import nn

import sparsetrain as st


def all_masked(optimizer: st.SparseOptimizer) -> bool:
    return all((t.param.detach()[~t.mask] == 0).all() for t in optimizer.targets.values())


# Writes to the weights that torch does not count.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_through_data_are_masked_again(dtype: torch.dtype) -> None:
    model = nn.Linear(16, 8).to(dtype)
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, st.Static(sparsity=0.5)
    )
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    model.weight.data.copy_(torch.randn(8, 16))
    optimizer.step()
    assert all_masked(optimizer)
    nn.utils.vector_to_parameters(torch.ones(136, dtype=dtype), model.parameters())
    optimizer.finalize()
    assert int((model.weight == 0).sum()) == 64


def test_loading_keeps_weights_that_came_through_data() -> None:
    model, optimizer = wrap("momentum", "static")
    saved = optimizer.state_dict()
    model.hidden.weight.data.fill_(7.0)
    optimizer.load_state_dict(saved)
    mask = optimizer.masks()["hidden.weight"]
    assert (model.hidden.weight.detach()[mask] == 7).all()
    assert all_masked(optimizer)


# Optimizers of their own kind.


@pytest.mark.parametrize("policy", ["set", "snfs", "nm_sparse"])
def test_a_subclass_that_steps_through_super_takes_one_step(policy: str) -> None:
    class Mine(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    plain_model, plain = wrap("sgd", policy)  # from now on torch hooks both steps
    model = SmallNet()
    optimizer = st.SparseOptimizer(Mine(model.parameters(), lr=0.1), model, POLICIES[policy])
    train(plain_model, plain, 0, STEPS)
    train(model, optimizer, 0, STEPS)
    assert optimizer.step_count == STEPS
    assert same(weights(model), weights(plain_model))


class WithLists(torch.optim.SGD):
    """Keeps a list of small matrices and a count in the state of each weight, as Shampoo does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("factors", [torch.eye(2), torch.eye(3)])
                param.add_(param.grad, alpha=-group["lr"])


def test_mask_changes_do_not_wipe_the_state_of_optimizers_that_keep_lists() -> None:
    model = SmallNet()
    base = WithLists(model.parameters(), lr=0.01)
    optimizer = st.SparseOptimizer(base, model, POLICIES["set"])
    train(model, optimizer, 0, STEPS)
    assert {state["count"] for state in base.state.values()} == {STEPS}


def test_a_failing_step_leaves_masked_weights() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError("on the way")

    model = SmallNet()
    base = Fails(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, POLICIES["nm_sparse"])
    backward(model, 0)
    with pytest.raises(RuntimeError, match="on the way"):
        optimizer.step()
    assert all_masked(optimizer)
    assert optimizer.step_count == 0


@pytest.mark.parametrize("policy", ["set", "rigl"])
def test_a_listener_that_fails_does_not_stop_the_clock(policy: str) -> None:
    model, optimizer = wrap("momentum", policy)

    def fail(event: st.UpdateEvent) -> None:
        raise RuntimeError("from the listener")

    handle = optimizer.register_update_hook(fail)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="listener"):
        optimizer.step()
    assert optimizer.step_count == 1
    handle.remove()
    train(model, optimizer, 1, STEPS)
    twin_model, twin = wrap("momentum", policy)
    train(twin_model, twin, 0, STEPS)
    assert same(dict(model.named_parameters()), dict(twin_model.named_parameters()))


def test_closures_see_masked_weights_after_outside_writes() -> None:
    for policy in ("static", "rigl"):
        model, optimizer = wrap("momentum", policy)
        model.load_state_dict(SmallNet(3).state_dict())
        seen = []

        def closure(model: SmallNet = model, optimizer: Any = optimizer, seen: Any = seen) -> Any:
            seen.append(all_masked(optimizer))
            return backward(model, 0)

        optimizer.step(closure)
        assert seen == [True]


# Layers that do not take part.


@pytest.mark.parametrize("policy", ["static", "rigl", "snfs", "gradual"])
def test_frozen_weights_are_left_alone(policy: str) -> None:
    model = SmallNet()
    model.hidden.weight.requires_grad_(False)
    before = model.hidden.weight.clone()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = st.SparseOptimizer(base, model, POLICIES[policy])
    train(model, optimizer, 0, STEPS)
    assert "hidden.weight" not in optimizer.targets
    assert torch.equal(model.hidden.weight, before)


@pytest.mark.parametrize("policy", ["rigl", "snfs"])
def test_a_layer_that_a_step_does_not_use_keeps_its_mask(policy: str) -> None:
    model, optimizer = wrap("momentum", policy)
    mask = optimizer.masks()["hidden.weight"]
    for step in range(STEPS):
        backward(model, step)
        model.hidden.weight.grad = None
        optimizer.step()
    assert optimizer.step_count == STEPS
    assert torch.equal(optimizer.masks()["hidden.weight"], mask)


def test_sparse_layout_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    for policy in ("rigl", "set", "nm_sparse"):
        rule = {"match": "0.weight", "policy": POLICIES[policy].model_dump()}
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = st.SparseOptimizer(base, model, {"rules": [rule]})
        model(torch.tensor([[1, 2]])).sum().backward()
        with pytest.raises(ValueError, match=r"0\.weight has a sparse-layout gradient"):
            optimizer.step()
        optimizer.finalize()


# Wrappers around the model.


def test_names_are_those_of_the_model_within_a_wrapper() -> None:
    recipe = {"policy": POLICIES["rigl"].model_dump(), "rules": [{"match": "head", "dense": True}]}
    plain = SmallNet()
    for wrapped in (torch.compile(SmallNet(), backend="eager"), nn.DataParallel(SmallNet())):
        base = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
        optimizer = st.SparseOptimizer(base, wrapped, recipe)
        assert set(optimizer.targets) == {"conv.weight", "hidden.weight"}
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    again = st.SparseOptimizer(base, plain, recipe)
    again.load_state_dict(optimizer.state_dict())


def test_a_compiled_model_trains_alike() -> None:
    plain, optimizer = wrap("momentum", "rigl")
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    compiled = torch.compile(model, backend="eager")
    other = st.SparseOptimizer(base, compiled, POLICIES["rigl"])
    train(plain, optimizer, 0, STEPS)
    train(compiled, other, 0, STEPS)
    assert same(weights(plain), weights(model))


# Refusals that change nothing.


def test_a_group_that_the_recipe_does_not_fit_is_not_added() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(7, 4))
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, st.NMSparse(n=1, m=4))
    with pytest.raises(ValueError, match=r"1\.weight"):
        optimizer.add_param_group({"params": list(model[1].parameters())})
    assert len(base.param_groups) == 1
    assert set(optimizer.targets) == {"0.weight"}


@pytest.mark.parametrize("part", ["generator", "memories", "tracker", "recipe", "step_count"])
def test_a_checkpoint_without_a_part_is_refused(part: str) -> None:
    _, optimizer = wrap("momentum", "snfs")
    saved = optimizer.state_dict()
    del saved["sparsetrain"][part]
    with pytest.raises(ValueError, match=f"damaged: its '{part}'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("part", ["generator", "tracker", "step_count"])
def test_a_checkpoint_with_a_damaged_part_is_refused_before_anything_changes(part: str) -> None:
    model, optimizer = wrap("momentum", "rigl")
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    damaged = {"generator": torch.zeros(7, dtype=torch.uint8), "tracker": {}, "step_count": -1}
    saved["sparsetrain"][part] = damaged[part]
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=f"damaged: .*{part}"):
        optimizer.load_state_dict(saved)
    assert optimizer.base.param_groups[0]["lr"] != 7.0
    assert optimizer.step_count == 4


@pytest.mark.parametrize("key, damage", [("mask", lambda t: t[:-1]), ("latent", lambda t: t[1:])])
def test_a_checkpoint_that_was_cut_is_refused(key: str, damage: Any) -> None:
    _, optimizer = wrap("momentum", "nm_sparse")
    saved = copy.deepcopy(optimizer.state_dict())
    entry = saved["sparsetrain"]["targets"]["hidden.weight"]
    entry[key] = damage(entry[key])
    before = optimizer.masks()
    with pytest.raises(ValueError, match=rf"damaged: the {key}.* of hidden\.weight"):
        optimizer.load_state_dict(saved)
    assert same(optimizer.masks(), before)


def test_a_shallow_copy_is_refused() -> None:
    model, optimizer = wrap("momentum", "rigl")
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)
    train(model, optimizer, 0, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_after_finalize_the_state_is_a_plain_optimizers(policy: str) -> None:
    model, optimizer = wrap("momentum", policy)
    train(model, optimizer, 0, 2)
    optimizer.finalize()
    assert optimizer.state_dict().keys() == optimizer.base.state_dict().keys()
    with pytest.raises(RuntimeError, match="finalized"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


@pytest.mark.parametrize("policy", ["static", "set", "gradual", "dynamic_network_surgery"])
def test_a_sparsity_that_empties_layers_is_refused_at_the_start(policy: str) -> None:
    model = SmallNet()
    before = weights(model)
    high = POLICIES[policy].with_sparsity(0.9999)
    with pytest.raises(ValueError, match=r"sparsity=0\.9999 .*at most 0\.99"):
        st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, high)
    assert same(weights(model), before)


def test_gradual_pruning_with_a_constant_fan_in_reaches_the_end() -> None:
    model = nn.Sequential(
        nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5)
    )
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    policy = st.Gradual(
        sparsity=0.7, total_steps=40, structure="constant_fan_in", update={"every": 1}
    )
    optimizer = st.SparseOptimizer(base, model, policy)
    for step in range(40):
        optimizer.zero_grad()
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        assert all(mask.sum(1).unique().numel() == 1 for mask in optimizer.masks().values())
    assert optimizer.sparsity() == pytest.approx(0.7, abs=0.02)


def test_exploration_goes_on_after_a_resume() -> None:
    model, optimizer = wrap("momentum", "set")
    train(model, optimizer, 0, 5)
    saved = optimizer.state_dict()  # nobody listened, so nothing was explored
    other_model, other = wrap("momentum", "set")
    rates: list[float] = []
    other.register_update_hook(lambda event: rates.append(event.exploration_rate))
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    train(other_model, other, 5, STEPS)
    assert rates and all(0.2 <= rate <= 1 for rate in rates)


def test_dtype_changes_in_the_middle_of_training() -> None:
    for policy in ("snfs", "rigl", "gradual"):
        model, optimizer = wrap("sgd", policy)
        train(model, optimizer, 0, 5)
        model.double()
        for _ in range(5, STEPS):
            optimizer.zero_grad()
            x = torch.randn(8, 4, 4, 4, dtype=torch.float64)
            model(x).square().mean().backward()
            optimizer.step()
        assert all_masked(optimizer)
