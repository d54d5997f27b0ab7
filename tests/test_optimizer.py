"""SparseOptimizer as a torch optimizer, and the faults that others ship."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from runs import (
    POLICIES,
    STEPS,
    SmallNet,
    backward,
    batch,
    same,
    shaped_state,
    train,
    weights,
    wrap,
)
from torch import nn
from torch.nn import functional as F

import sparsetrain as st


def test_two_lines() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, st.Static(sparsity=0.9)
    )
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set(optimizer.masks()) == {"0.weight", "2.weight"}
    assert optimizer.sparsity() == pytest.approx(0.9, abs=1 / 160)
    assert optimizer.penalty().item() == 0 and optimizer.penalty().dim() == 0


def test_a_subclass_of_sgd_works() -> None:
    class Mine(torch.optim.SGD):
        pass

    model = SmallNet()
    optimizer = st.SparseOptimizer(
        Mine(model.parameters(), lr=0.1, momentum=0.9), model, POLICIES["rigl"]
    )
    train(model, optimizer, 0, STEPS)
    assert optimizer.step_count == STEPS


@pytest.mark.parametrize("built_on", ["base before", "base after", "wrapper"])
@pytest.mark.parametrize("policy", ["static", "rigl"])
def test_lr_schedulers(built_on: str, policy: str) -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    make = torch.optim.lr_scheduler.StepLR
    scheduler = make(base, 2) if built_on == "base before" else None
    optimizer = st.SparseOptimizer(base, model, POLICIES[policy])
    if scheduler is None:
        scheduler = make(base if built_on == "base after" else optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            train(model, optimizer, step, step + 1)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == base.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_one_cycle_and_plateau_schedulers() -> None:
    model, optimizer = wrap("momentum", "set")
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    train(model, optimizer, 0, 1)
    cycle.step()
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.base.param_groups[0]["lr"] > 0


def test_closures_return_the_loss_and_see_masked_weights() -> None:
    for policy in POLICIES:
        model, optimizer = wrap("momentum", policy)
        reference_model, reference = wrap("momentum", policy)

        def closure(step: int, model: nn.Module = model, optimizer=optimizer) -> torch.Tensor:
            for target in optimizer.targets.values():
                assert (target.param.detach()[~target.mask] == 0).all()
            return backward(model, step)

        losses = []
        for step in range(STEPS):
            losses.append(optimizer.step(lambda step=step, c=closure: c(step)).item())
        assert losses == train(reference_model, reference, 0, STEPS)
        assert same(weights(model), weights(reference_model))


def test_gradients_can_be_accumulated() -> None:
    whole_model, whole = wrap("momentum", "rigl")
    split_model, split = wrap("momentum", "rigl")
    whole_model.eval(), split_model.eval()
    for step in range(STEPS):
        x, y = batch(step)
        whole.zero_grad()
        F.cross_entropy(whole_model(x), y).backward()
        whole.step()
        split.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(split_model(x[half]), y[half]) / 2).backward()
        split.step()
    for a, b in zip(whole_model.parameters(), split_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(m, split.masks()[n]) for n, m in whole.masks().items())


def test_skipped_amp_steps_do_not_move_the_clock() -> None:
    model, optimizer = wrap("momentum", "rigl")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(model, optimizer, 0, 1)
    for step in range(1, 6):
        before = weights(model)
        masks = optimizer.masks()
        optimizer.zero_grad()
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * float("inf") if step == 3 else loss).backward()
        clock = optimizer.step_count
        stepped = weights(model)
        scaler.step(optimizer)
        scaler.update()
        skipped = step == 3
        assert optimizer.step_count == clock + (not skipped)
        if skipped:
            assert same(weights(model), stepped)
            assert all(torch.equal(m, masks[n]) for n, m in optimizer.masks().items())
        else:
            assert not same(weights(model), before)


def test_fused_optimizer_under_a_gradient_scaler() -> None:
    model, optimizer = wrap("adamw_fused", "set")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain_model, plain = wrap("adamw_fused", "set")
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain_model, plain, 0, STEPS)
    for a, b in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_deepcopy_and_pickle_go_on_identically(policy: str) -> None:
    model, optimizer = wrap("adamw_amsgrad", policy)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    train(model, optimizer, 0, 5)
    scheduler.step()
    copied = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    pickle.dump((model, optimizer), file)
    file.seek(0)
    loaded = pickle.load(file)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    train(model, optimizer, 5, STEPS)
    for other_model, other in (copied, loaded, saved):
        assert other.targets["hidden.weight"].param is other_model.hidden.weight
        train(other_model, other, 5, STEPS)
        assert same(weights(other_model), weights(model))
        assert other.step_count == optimizer.step_count


def test_hooks_of_the_user_see_masked_weights_and_may_change_gradients() -> None:
    model, optimizer = wrap("momentum", "static")
    seen = []

    def masked(*_: object) -> None:
        seen.append(all((t.param.detach()[~t.mask] == 0).all() for t in optimizer.targets.values()))

    def disturb(*_: object) -> None:
        for param in model.parameters():
            param.grad.add_(1.0)

    optimizer.base.register_step_post_hook(masked)
    optimizer.register_step_post_hook(masked)
    optimizer.base.register_step_pre_hook(disturb)
    optimizer.register_step_pre_hook(disturb)
    train(model, optimizer, 0, 3)
    assert seen == [True] * 6


def test_momentum_does_not_revive_pruned_weights() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, base, 0, 3)
    optimizer = st.SparseOptimizer(base, model, POLICIES["static"])
    for target in optimizer.targets.values():
        for value in shaped_state(base, target.param).values():
            assert (value[~target.mask] == 0).all()
    model.zero_grad()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for target in optimizer.targets.values():
        assert (target.param.detach()[~target.mask] == 0).all()


def test_a_failed_construction_changes_nothing() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before, hooks = weights(model), len(base._optimizer_step_pre_hooks)
    for bad in (
        {"policy": POLICIES["rigl"], "rules": [{"match": "nothing*", "dense": True}]},
        st.NMSparse(n=1, m=3),
        st.Static(sparsity=0.5, structure={"kind": "block", "size": [5, 5]}),
        st.Static(sparsity=0.5, score=st.Gradient()),
        {"kind": "rigl"},
        "no/such/recipe.yaml",
    ):
        with pytest.raises(ValueError):
            st.SparseOptimizer(base, model, bad)
    assert same(weights(model), before)
    assert len(base._optimizer_step_pre_hooks) == hooks
    st.SparseOptimizer(base, model, POLICIES["rigl"])


def test_wrong_arguments_are_named() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer"):
        st.SparseOptimizer(model, model, POLICIES["rigl"])
    with pytest.raises(TypeError, match="model"):
        st.SparseOptimizer(base, base, POLICIES["rigl"])
    with pytest.raises(TypeError, match="policy"):
        st.SparseOptimizer(base, model, 0.9)
    with pytest.raises(ValueError, match="storage"):
        st.SparseOptimizer(base, model, POLICIES["rigl"], storage="cloud")
    other = SmallNet()
    with pytest.raises(ValueError, match="holds none"):
        st.SparseOptimizer(base, other, POLICIES["rigl"])
    wrapped = st.SparseOptimizer(base, model, POLICIES["rigl"])
    for again in (wrapped, base):
        with pytest.raises(ValueError, match="wrapped already"):
            st.SparseOptimizer(again, model, POLICIES["rigl"])
    with pytest.raises(RuntimeError, match="SparseOptimizer"):
        base.step()


def test_tied_weights_are_one_target() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, st.Static(sparsity=0.5)
    )
    assert list(optimizer.targets) == ["0.weight"]


def test_parameter_groups_are_shared_and_can_be_added() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.hidden.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, POLICIES["rigl"])
    assert set(optimizer.targets) == {"hidden.weight"}
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.5})
    assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
    assert len(base.param_groups) == 2 and optimizer.param_groups is base.param_groups
    assert optimizer.targets["head.weight"].density == pytest.approx(0.2, abs=0.02)
    train(model, optimizer, 0, 3)
    assert (model.head.weight.detach()[~optimizer.masks()["head.weight"]] == 0).all()


def test_loading_a_foreign_checkpoint_is_refused_and_changes_nothing() -> None:
    _, optimizer = wrap("momentum", "rigl")
    before = copy.deepcopy(optimizer.state_dict())
    _, other_policy = wrap("momentum", "set")
    with pytest.raises(ValueError, match="another policy"):
        optimizer.load_state_dict(other_policy.state_dict())
    _, other_sparsity = wrap("momentum", st.RigL(sparsity=0.5, total_steps=14))
    with pytest.raises(ValueError, match="another policy"):
        optimizer.load_state_dict(other_sparsity.state_dict())
    with pytest.raises(ValueError, match="plain optimizer"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    fewer = optimizer.state_dict()
    fewer["sparsetrain"]["targets"]["hiden.weight"] = fewer["sparsetrain"]["targets"].pop(
        "hidden.weight"
    )
    with pytest.raises(ValueError, match=r"hidden\.weight.*hiden\.weight"):
        optimizer.load_state_dict(fewer)
    reshaped = optimizer.state_dict()
    reshaped["sparsetrain"]["targets"]["hidden.weight"]["shape"] = [16, 33]
    with pytest.raises(ValueError, match=r"hidden\.weight.*33"):
        optimizer.load_state_dict(reshaped)
    after = optimizer.state_dict()
    assert torch.equal(after["sparsetrain"]["generator"], before["sparsetrain"]["generator"])
    assert after["sparsetrain"]["step_count"] == before["sparsetrain"]["step_count"]


def test_masks_take_one_bit_a_weight_in_the_checkpoint() -> None:
    _, optimizer = wrap("momentum", "rigl")
    saved = optimizer.state_dict()["sparsetrain"]["targets"]["hidden.weight"]
    assert saved["mask"].dtype == torch.uint8
    assert saved["mask"].numel() == optimizer.targets["hidden.weight"].numel // 8


def test_weights_written_from_outside_are_masked_again() -> None:
    model, optimizer = wrap("momentum", "static")
    train(model, optimizer, 0, 2)
    model.load_state_dict(SmallNet(3).state_dict())
    assert (model.hidden.weight.detach()[~optimizer.masks()["hidden.weight"]] != 0).any()
    optimizer.apply_masks()
    assert (model.hidden.weight.detach()[~optimizer.masks()["hidden.weight"]] == 0).all()
    model.load_state_dict(SmallNet(4).state_dict())
    train(model, optimizer, 2, 3)
    assert (model.hidden.weight.detach()[~optimizer.masks()["hidden.weight"]] == 0).all()


@pytest.mark.parametrize("policy", ["rigl", "snfs", "static", "gradual"])
def test_clipping_can_see_the_sparse_norm(policy: str) -> None:
    model, optimizer = wrap("momentum", policy)
    train(model, optimizer, 0, 1)
    backward(model, 1)
    dense = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.mask_gradients()
    sparse = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    if policy in ("gradual", "snfs"):  # dense at first; needs the dense gradient throughout
        assert sparse == dense
    else:
        assert sparse < dense
    other_model, other = wrap("momentum", policy)
    train(other_model, other, 0, 1)
    optimizer.step()
    backward(other_model, 1)
    other.step()
    for step in range(2, STEPS):
        backward(model, step)
        optimizer.mask_gradients()
        optimizer.step()
        train(other_model, other, step, step + 1)
    assert same(weights(model), weights(other_model))


def test_clipping_under_a_scaler_that_skips_a_step() -> None:
    """What a skipped step showed must not reach a policy's memory."""
    models = []
    for skipped in (None, 4):
        model, optimizer = wrap("momentum", "snfs")
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
        scaler.set_backoff_factor(1.0)
        for step in (0, 1, 2, 3, 4, 4, 5, 6) if skipped else range(7):
            infinite, skipped = step == skipped, None if step == skipped else skipped
            optimizer.zero_grad()
            x, y = batch(step)
            model.eval()  # running statistics would see the skipped batch
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * float("inf") if infinite else loss).backward()
            scaler.unscale_(optimizer)
            optimizer.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.step_count == 7
        models.append(weights(model))
    assert same(*models)


def test_events_and_exploration() -> None:
    model, optimizer = wrap("momentum", "set")
    events: list[st.UpdateEvent] = []
    handle = optimizer.register_update_hook(events.append)
    train(model, optimizer, 0, 7)
    assert [event.step for event in events] == [0, 3, 6]
    rates = [event.exploration_rate for event in events]
    assert 0.2 < rates[0] <= rates[1] <= rates[2] <= 1
    ever = {n: m.clone() for n, m in wrap("momentum", "set")[1].masks().items()}
    handle.remove()
    train(model, optimizer, 7, STEPS)
    assert len(events) == 3
    assert events[0].scalars()["sparsity/total"] == events[0].sparsity
    assert events[0].to_dict()["layers"][0]["name"] == "conv.weight"
    assert set(ever) == {layer.name for layer in events[0].layers}


def test_exploration_rate_against_a_plain_count() -> None:
    model, optimizer = wrap("momentum", "rigl")
    ever = optimizer.masks()
    rates: list[tuple[float, float]] = []

    def count(event: st.UpdateEvent) -> None:
        for name, mask in optimizer.masks().items():
            ever[name] |= mask
        total = sum(m.numel() for m in ever.values())
        rates.append((event.exploration_rate, sum(int(m.sum()) for m in ever.values()) / total))

    optimizer.register_update_hook(count)
    train(model, optimizer, 0, STEPS)
    assert rates and all(ours == pytest.approx(plain) for ours, plain in rates)
    assert rates[-1][0] > rates[0][0]


def test_summary() -> None:
    _, optimizer = wrap("momentum", "rigl")
    summary = optimizer.summary()
    data = summary.to_dict()
    assert data["sparsity"] == pytest.approx(optimizer.sparsity())
    assert [layer["name"] for layer in data["layers"]] == list(optimizer.targets)
    assert all(layer["density"] == layer["target_density"] for layer in data["layers"])
    assert "conv.weight" in str(summary) and "rigl" in str(summary)


def test_forced_update_needs_what_the_policy_needs() -> None:
    model, optimizer = wrap("momentum", "rigl")
    model.zero_grad()
    with pytest.raises(ValueError, match=r"gradient of conv\.weight"):
        optimizer.update_masks()
    backward(model, 0)
    before = optimizer.masks()
    optimizer.update_masks()
    assert any((m != before[n]).any() for n, m in optimizer.masks().items())
    assert optimizer.step_count == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = SmallNet().to(dtype)
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, POLICIES["rigl"]
    )
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
    for target in optimizer.targets.values():
        assert (target.param.detach()[~target.mask] == 0).all()


def test_channels_last_weights() -> None:
    plain_model, plain = wrap("momentum", "rigl")
    model = SmallNet().to(memory_format=torch.channels_last)
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        model,
        POLICIES["rigl"],
    )
    assert not model.conv.weight.is_contiguous()
    train(plain_model, plain, 0, STEPS)
    train(model, optimizer, 0, STEPS)
    torch.testing.assert_close(model.conv.weight, plain_model.conv.weight, rtol=1e-4, atol=1e-5)
    for name, mask in optimizer.masks().items():
        assert (dict(model.named_parameters())[name].detach()[~mask] == 0).all()


def test_random_choices_repeat_with_the_seed_and_leave_torch_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, optimizer = wrap("momentum", "set", seed=3)
    train(model, optimizer, 0, STEPS)
    assert torch.equal(torch.rand(3), expected)
    other_model, other = wrap("momentum", "set", seed=3)
    train(other_model, other, 0, STEPS)
    assert same(weights(model), weights(other_model))
    third = wrap("momentum", "set", seed=4)[1]
    assert any((m != other.masks()[n]).any() for n, m in third.masks().items())


def test_mixed_recipe() -> None:
    model = SmallNet()
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        model,
        {
            "policy": {
                "kind": "rigl",
                "sparsity": 0.8,
                "total_steps": STEPS,
                "update": {"every": 3},
            },
            "rules": [
                {"match": "head", "dense": True},
                {"module_type": "Conv2d", "policy": {"kind": "nm_sparse", "n": 2, "m": 4}},
            ],
        },
    )
    train(model, optimizer, 0, STEPS)
    assert set(optimizer.targets) == {"hidden.weight", "conv.weight"}
    assert optimizer.targets["conv.weight"].density == 0.5
    assert optimizer.targets["hidden.weight"].density == pytest.approx(0.2, abs=0.002)
