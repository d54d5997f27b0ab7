"""Masters in float32: what half precision would round away adds up, for every optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st_
from runs import OPTIMIZERS, POLICIES, STEPS, SmallNet, batch, same, weights
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.base_state import find_resting
from sparsetrain.master_weights import MasterWeights

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ASKED: dict[str, Any] = {"sparsity": 0.7, "total_steps": STEPS, "update": {"every": 3}}
LEARNED: dict[str, st.Policy] = {
    "soft_threshold": st.SoftThreshold(**ASKED),
    "hard_concrete": st.HardConcrete(**ASKED),
    "gumbel_softmax": st.GumbelSoftmax(**ASKED),
    "variational_dropout": st.VariationalDropout(strength=1e-3, total_steps=STEPS, warm_up=0.2),
    "movement": st.Movement(**ASKED),
}
ALL = POLICIES | LEARNED


def half(dtype: torch.dtype = torch.bfloat16) -> SmallNet:
    return SmallNet().to(dtype)


def wrap(
    policy: str, optimizer: str = "adamw_amsgrad", dtype: torch.dtype = torch.bfloat16
) -> tuple[SmallNet, st.SparseOptimizer]:
    model = half(dtype)
    base = MasterWeights(OPTIMIZERS[optimizer](model.parameters()))
    return model, st.SparseOptimizer(base, model, ALL[policy], seed=3)


def backward(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    torch.manual_seed(step)  # what learned masks draw
    model.zero_grad()
    loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        backward(model, step)
        optimizer.step()


def masters(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    return {p: state["master"] for p, state in optimizer.state.items() if "master" in state}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = weights(model)
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{k} of {number}": v.clone() for k, v in state.items() if torch.is_tensor(v)}
    return found


# One step after another is what it would be in float32.


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_masters_are_the_weights_of_a_float32_run(name: str, dtype: str) -> None:
    model, optimizer = wrap("static", name, LOW[dtype])
    twin = SmallNet()
    twin.load_state_dict(model.state_dict())
    other = st.SparseOptimizer(OPTIMIZERS[name](twin.parameters()), twin, ALL["static"], seed=3)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for step in range(6):
        backward(model, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if p not in trained:
                continue
            assert torch.equal(p, optimizer.state[p]["master"].to(p.dtype))
            assert optimizer.state[p]["master"].grad is None
            if name == "adagrad":  # begins with 0.1, which the model's precision has rounded
                torch.testing.assert_close(optimizer.state[p]["master"], q, rtol=1e-3, atol=1e-4)
            else:
                assert torch.equal(optimizer.state[p]["master"], q)
                kept = {k: v for k, v in optimizer.state[p].items() if k != "master"}
                assert kept.keys() == other.state[q].keys()
                assert all(torch.equal(v, other.state[q][k]) for k, v in kept.items())


def test_lbfgs_moves_masters_within_a_step() -> None:
    model, optimizer = wrap("static", "lbfgs")
    model.norm.eval()
    losses = [float(optimizer.step(lambda: backward(model, 0)).detach()) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.base.state[model.conv.weight]["func_evals"] > 8
    for param, master in masters(optimizer).items():
        assert torch.equal(param, master.bfloat16())
        assert not torch.equal(param.float(), master)


@pytest.mark.parametrize("name", ["momentum", "adamw_fused"])
def test_a_step_with_a_closure_is_the_same_step(name: str) -> None:
    model, optimizer = wrap("set", name)
    other_model, other = wrap("set", name)
    seen = []

    def closure(step: int) -> Tensor:
        seen.append([p.dtype for g in other.param_groups for p in g["params"]])
        other.zero_grad()
        return backward(other_model, step)

    for step in range(STEPS):
        backward(model, step)
        assert optimizer.step() is None
        assert other.step(lambda step=step: closure(step)).isfinite()
    assert same(everything(model, optimizer), everything(other_model, other))
    assert {dtype for dtypes in seen for dtype in dtypes} == {torch.bfloat16}


def test_parameters_in_float32_are_trained_as_they_are() -> None:
    model, plain = half(), half()
    for net in (model, plain):
        net.norm.float()
        net.norm.eval()
    optimizer = MasterWeights(OPTIMIZERS["adam"](model.parameters()))
    other = OPTIMIZERS["adam"](plain.norm.parameters())
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        hidden = model.norm(model.conv(x.bfloat16()).float()).relu().bfloat16()
        out = model.head(model.hidden(hidden.flatten(1)).relu())
        F.cross_entropy(out.float(), y).backward()
        plain.norm.weight.grad = model.norm.weight.grad.clone()
        plain.norm.bias.grad = model.norm.bias.grad.clone()
        optimizer.step()
        other.step()
    assert "master" not in optimizer.state[model.norm.weight]
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert model.conv.weight in masters(optimizer)


# Sparse training.


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_what_keeps_zeros_is_found_out_through_the_masters(name: str) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(torch.ones(3, 5, dtype=dtype))
        base = OPTIMIZERS[name]([param])
        optimizer = MasterWeights(base) if dtype == torch.bfloat16 else base
        group = dict(optimizer.param_groups[0])
        found.append(find_resting(optimizer, optimizer.param_groups[0], param))
        assert optimizer.param_groups[0] == group  # nothing of the trial is left
        assert base.param_groups is optimizer.param_groups
    assert found[0].keeps_zeros == found[1].keeps_zeros
    assert found[0].fresh == found[1].fresh | {"master": 0.0}


@pytest.mark.parametrize("policy", ALL)
def test_zeros_and_counts_are_exact(policy: str) -> None:
    for name in ("momentum", "rmsprop"):
        model, optimizer = wrap(policy, name)
        plain = SmallNet()
        other = st.SparseOptimizer(OPTIMIZERS[name](plain.parameters()), plain, ALL[policy], seed=3)
        for step in range(STEPS):
            train(model, optimizer, step, step + 1)
            train(plain, other, step, step + 1)
            if policy in LEARNED:
                continue
            for target in optimizer.targets.values():
                assert (target.param.detach()[~target.mask] == 0).all()
            active = [sum(t.active for t in o.targets.values()) for o in (optimizer, other)]
            assert active[0] == active[1]
        if policy in ("static", "set", "rigl", "snfs", "gradual"):
            for target in optimizer.targets.values():
                for value in optimizer.state[target.param].values():
                    assert value.shape != target.shape or (value[~target.mask] == 0).all()
        elif policy in LEARNED and policy != "variational_dropout":
            assert optimizer.sparsity() == pytest.approx(0.7, abs=0.02)
        masks = optimizer.masks()
        optimizer.finalize()
        for name_, mask in masks.items():
            weight = dict(model.named_parameters())[name_].detach()
            assert (weight[~mask] == 0).all() and weight.dtype == torch.bfloat16


@pytest.mark.parametrize("policy", ["set", "rigl"])
def test_a_weight_that_grows_again_has_forgotten_its_master(policy: str) -> None:
    model, optimizer = wrap(policy, "momentum")
    grown = 0
    for step in range(STEPS):
        before = optimizer.masks()
        train(model, optimizer, step, step + 1)
        for name, target in optimizer.targets.items():
            new = target.mask & ~before[name]
            if step and new.any():
                grown += int(new.sum())
                assert (optimizer.state[target.param]["master"][new] == 0).all()
    assert grown


def test_latent_weights_are_masters_too() -> None:
    """Pruned weights of SR-STE decay by less than their precision shows, and it adds up."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 0.5] * 4).expand(4, 8))
    base = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.01))
    optimizer = st.SparseOptimizer(base, model, st.NMSparse(n=1, m=2, decay=0.01))
    pruned = ~optimizer.masks()["0.weight"]
    for _ in range(50):
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        optimizer.step()
    expected = 0.5 * (1 - 1e-4) ** 50
    latent = optimizer.targets["0.weight"].latent_weight()
    assert base.state[model[0].weight]["master"][pruned].numpy() == pytest.approx(expected, 1e-3)
    assert latent[pruned].float().numpy() == pytest.approx(expected, 4e-3)
    assert (latent[pruned] < 0.5).all()
    assert (model[0].weight.detach()[pruned] == 0).all()


DIGITS = tuple(torch.tensor(part) for part in load_digits(return_X_y=True))
LONG: dict[str, Any] = {"sparsity": 0.7, "total_steps": 60, "update": {"every": 10}}
LONG_RUNS: dict[str, st.Policy] = {
    "static": st.Static(sparsity=0.7),
    "set": st.SET(**LONG),
    "rigl": st.RigL(**LONG),
    "snfs": st.SNFS(**LONG),
    "gradual": st.Gradual(**LONG),
    "dynamic_network_surgery": st.DynamicNetworkSurgery(sparsity=0.7, total_steps=60),
    "nm_sparse": st.NMSparse(n=1, m=4),
    "soft_threshold": st.SoftThreshold(**LONG),
    "hard_concrete": st.HardConcrete(**LONG),
    "gumbel_softmax": st.GumbelSoftmax(**LONG),
    "variational_dropout": st.VariationalDropout(strength=1e-3, total_steps=60),
    "movement": st.Movement(**LONG),
}


def mean_movement(policy: st.Policy, kind: str) -> float:
    """How far weights have moved that are active in the end, on average; digits, AdamW."""
    pixels, digits = DIGITS
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).bfloat16()
    if kind == "float32":
        model.float()
    base: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    if kind == "masters":
        base = MasterWeights(base)
    optimizer = st.SparseOptimizer(base, model, policy)
    start = {n: (t.param.detach().clone(), t.mask) for n, t in optimizer.targets.items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        some = torch.randint(len(digits), (64,), generator=generator)
        optimizer.zero_grad()
        x = (pixels[some] / 16 - 0.3).to(model[0].weight.dtype)
        F.cross_entropy(model(x).float(), digits[some]).backward()
        optimizer.step()
    moved = []
    for name, target in optimizer.targets.items():
        before, mask = start[name]
        moved.append((target.param.detach() - before)[mask & target.mask].float().abs())
    return float(torch.cat(moved).mean())


@pytest.mark.parametrize("policy", LONG_RUNS)
def test_masters_follow_float32_where_half_precision_stalls(policy: str) -> None:
    moved = {
        kind: mean_movement(LONG_RUNS[policy], kind) for kind in ("float32", "bfloat16", "masters")
    }
    assert moved["masters"] == pytest.approx(moved["float32"], rel=0.2)
    assert moved["bfloat16"] < 0.75 * moved["float32"]


@pytest.mark.parametrize("policy", [*LEARNED, "steered_variational_dropout"])
def test_masks_that_were_learned_are_those_of_the_layer(policy: str) -> None:
    steered = st.VariationalDropout(**ASKED, exact=True)
    model = half()
    base = MasterWeights(OPTIMIZERS["adam"](model.parameters()))
    optimizer = st.SparseOptimizer(base, model, LEARNED.get(policy, steered))
    train(model, optimizer, 0, STEPS)
    model.eval()
    for name, mask in optimizer.masks().items():
        layer, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(layer), leaf) != 0, mask)
    x = batch(STEPS)[0].bfloat16()
    before = model(x)
    optimizer.finalize()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("threshold", [0.1501, 0.1499, 0.1637, 0.2003])
def test_a_threshold_is_not_rounded_to_the_precision_of_the_weights(threshold: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(0.1, 0.25, 4096).view(64, 64))
    base = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
    initial = float(torch.logit(torch.tensor(threshold)))
    policy = st.SoftThreshold(strength=0.1, initial=initial)
    optimizer = st.SparseOptimizer(base, model, policy)
    kept = model[0].weight.detach() != 0
    assert torch.equal(optimizer.masks()["0.weight"], kept)
    optimizer.finalize()
    assert torch.equal(model[0].weight != 0, kept)


def test_gates_need_an_optimizer_that_takes_more_than_one_group() -> None:
    model = half()
    base = MasterWeights(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="doesn't support per-parameter options"):
        st.SparseOptimizer(base, model, LEARNED["hard_concrete"])
    assert len(base.param_groups) == 1


def test_channels_are_cut_out_of_masters() -> None:
    model, optimizer = wrap("static", "momentum")
    train(model, optimizer, 0, 3)
    x, _ = batch(0)
    st.channels.prune(model, x.bfloat16(), ratio=0.5, optimizer=optimizer, in_place=True)
    assert model.hidden.weight.shape[0] < 16
    for param, master in masters(optimizer).items():
        assert master.shape == param.shape
        assert torch.equal(param, master.bfloat16())
    train(model, optimizer, 3, 6)


# Whatever else writes to parameters.


@pytest.mark.parametrize("write", ["load_state_dict", "data", "vector"])
def test_writes_to_parameters_reach_their_masters(write: str) -> None:
    model, optimizer = wrap("nm_sparse", "momentum")
    base = optimizer.base
    optimizer.finalize()
    train(model, base, 0, 2)
    before = {p: m.clone() for p, m in masters(base).items()}
    kept = model.head.bias
    if write == "load_state_dict":
        others = {k: v for k, v in SmallNet(1).state_dict().items() if k != "head.bias"}
        model.load_state_dict(others, strict=False)
    elif write == "data":
        for param in model.parameters():
            if param is not kept:
                param.data = torch.full_like(param, 0.3)
    else:
        others_ = [p for p in model.parameters() if p is not kept]
        numel = sum(p.numel() for p in others_)
        nn.utils.vector_to_parameters(torch.linspace(-1, 1, numel).bfloat16(), others_)
    written = {p: p.detach().float().clone() for p in model.parameters()}
    for group in base.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    train(model, base, 2, 3)
    for param, master in masters(base).items():
        # A value that its master is rounded to anyway is no change.
        is_same = before[param].bfloat16() == written[param]
        assert torch.equal(master, torch.where(is_same, before[param], written[param]))
    moved = masters(base)
    assert torch.equal(moved[kept], before[kept])
    assert not torch.equal(moved[model.hidden.weight], before[model.hidden.weight])
    assert not torch.equal(before[kept], written[kept])  # its lowest bits have stayed


values = st_.floats(-1e3, 1e3, width=32).map(lambda x: x + 0.0)


@pytest.mark.parametrize("dtype", LOW)
@settings(max_examples=40)
@given(held=st_.lists(values, min_size=1, max_size=8), data=st_.data())
def test_a_master_is_taken_anew_only_where_it_was_overwritten(
    dtype: str, held: list[float], data: st_.DataObject
) -> None:
    param = nn.Parameter(torch.tensor(held).to(LOW[dtype]))
    optimizer = MasterWeights(torch.optim.SGD([param], lr=1.0))
    param.grad = torch.tensor(
        [data.draw(st_.floats(-(2**-10), 2**-10, width=32)) for _ in held], dtype=LOW[dtype]
    )
    optimizer.step()
    before = optimizer.state[param]["master"].clone()
    others = [data.draw(st_.one_of(st_.none(), values, st_.just(float("nan")))) for _ in held]
    with torch.no_grad():
        for i, value in enumerate(others):
            if value is not None:
                param[i] = value
    written = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    master = optimizer.state[param]["master"]
    own = torch.tensor([v is None for v in others]) | (before.to(LOW[dtype]) == written)
    expected = torch.where(own, before, written.float())
    assert torch.equal(master.nan_to_num(7e7), expected.nan_to_num(7e7))
    assert torch.equal(param.detach().nan_to_num(7.0), written.nan_to_num(7.0))


def test_parameters_without_a_gradient_get_no_master_and_do_not_move() -> None:
    model = half()
    model.head.weight.requires_grad_(False)
    optimizer = MasterWeights(OPTIMIZERS["momentum"](model.parameters()))
    before = weights(model)
    for step in range(3):
        backward(model, step)
        model.hidden.weight.grad = None
        optimizer.step()
    for name in ("head.weight", "hidden.weight"):
        assert dict(model.named_parameters())[name] not in optimizer.state
        assert torch.equal(model.state_dict()[name], before[name])
    assert len(masters(optimizer)) == 6


def test_a_model_that_changes_its_precision() -> None:
    model, optimizer = wrap("static", "adam")
    train(model, optimizer, 0, 3)
    model.float()
    train(model, optimizer, 3, 6)
    assert not masters(optimizer)
    assert model.head.weight.dtype == torch.float32
    model.bfloat16()
    train(model, optimizer, 6, 9)
    assert len(masters(optimizer)) == 8
    assert {v.dtype for k, v in everything(model, optimizer).items() if "exp_avg" in k} == {
        torch.float32
    }


# What makes it a torch optimizer.


@pytest.mark.parametrize("policy", ALL)
def test_a_resumed_run_is_the_uninterrupted_one(policy: str) -> None:
    model, optimizer = wrap(policy, "adam")
    train(model, optimizer, 0, 7)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 7, STEPS)
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    before = copy.deepcopy(of_optimizer["state"])
    other_model, other = wrap(policy, "adam")
    other_model.load_state_dict(of_model)
    other.load_state_dict(of_optimizer)
    train(other_model, other, 7, STEPS)
    assert same(everything(model, optimizer), everything(other_model, other))
    assert same(optimizer.masks(), other.masks())
    for number, state in before.items():  # what was loaded still is what it was
        if "master" in state:
            assert torch.equal(state["master"], of_optimizer["state"][number]["master"])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_checkpoint_without_masters_is_taken(kind: str) -> None:
    saved_model = half()
    if kind == "float32":
        saved_model.float()
    saved = OPTIMIZERS["adam"](saved_model.parameters())
    train(saved_model, saved, 0, 4)
    model = half()
    model.load_state_dict(saved_model.state_dict())
    optimizer = MasterWeights(OPTIMIZERS["adam"](model.parameters()))
    optimizer.load_state_dict(saved.state_dict())
    for p, q in zip(model.parameters(), saved_model.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], saved.state[q]["exp_avg"].float())
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    train(model, optimizer, 4, 5)
    assert len(masters(optimizer)) == 8


def test_an_optimizer_in_use_goes_on() -> None:
    model, other = half(), half()
    used = OPTIMIZERS["adam"](model.parameters())
    train(model, used, 0, 3)
    expected = {p: s["exp_avg"].float() for p, s in used.state.items()}
    optimizer = MasterWeights(used)
    assert not used.state
    for param, average in expected.items():
        assert torch.equal(optimizer.state[param]["exp_avg"], average)
    train(model, optimizer, 3, 4)
    assert float(optimizer.state[model.head.bias]["step"]) == 4
    del other


def test_load_hooks_see_what_is_loaded_and_what_comes_of_it() -> None:
    model = half()
    optimizer = MasterWeights(OPTIMIZERS["momentum"](model.parameters()))
    train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    kept = saved["state"][0]["master"] + 0.25
    seen = []

    def change(o: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        first = {**loaded["state"][0], "master": kept}
        return {**loaded, "state": {**loaded["state"], 0: first}}

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model.conv.weight]["master"].clone())
    )
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert [torch.equal(master, kept) for master in seen] == [True, True]


@pytest.mark.parametrize("policy", ["rigl", "nm_sparse"])
def test_copies_go_on_alike_and_apart(policy: str) -> None:
    model, optimizer = wrap(policy, "adamw_amsgrad")
    train(model, optimizer, 0, 5)
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for other_model, other in (copied, pickled):
        train(other_model, other, 5, 9)
    before = everything(model, optimizer)
    train(model, optimizer, 5, 9)
    assert not same(before, everything(model, optimizer))
    for other in (copied, pickled):
        assert same(everything(model, optimizer), everything(*other))


@pytest.mark.parametrize("of", ["sparse", "masters", "inner"])
def test_schedulers_on_any_of_them_set_the_rate(of: str) -> None:
    model = half()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    base = MasterWeights(inner)
    optimizer = st.SparseOptimizer(base, model, POLICIES["set"])
    chosen = {"sparse": optimizer, "masters": base, "inner": inner}[of]
    scheduler = torch.optim.lr_scheduler.StepLR(chosen, 1, gamma=0.5)
    for step in range(3):
        train(model, optimizer, step, step + 1)
        scheduler.step()
    rates = [o.param_groups[0]["lr"] for o in (optimizer, base, inner)]
    assert rates == [0.0125] * 3
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert [o.param_groups[0]["lr"] for o in (optimizer, base, inner)] == [0.00625] * 3


def test_groups_that_are_added_get_masters_and_their_own_options() -> None:
    model = half()
    optimizer = MasterWeights(torch.optim.AdamW(model.conv.parameters(), lr=0.01))
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.param_groups[1]["weight_decay"] == 0.01
    before = weights(model)
    train(model, optimizer, 0, 2)
    assert torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.conv.weight, before["conv.weight"])
    assert len(masters(optimizer)) == 4


def test_hooks_and_unscaled_gradients() -> None:
    model = half()
    optimizer = MasterWeights(OPTIMIZERS["adamw_fused"](model.parameters()))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("before"))
    optimizer.register_step_post_hook(lambda *a: seen.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = half()
    other = MasterWeights(OPTIMIZERS["adamw_fused"](plain.parameters()))
    for infinite in (False, True):
        x, y = batch(0)
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss * torch.inf if infinite else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain, other, 0, 1)
    assert seen == ["before", "after"]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["master"], other.state[q]["master"])


def test_a_step_that_fails_leaves_parameters_in_their_places() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError("on the way")

    model = half()
    optimizer = MasterWeights(Fails(model.parameters(), lr=0.1, momentum=0.9))
    backward(model, 0)
    with pytest.raises(RuntimeError, match="on the way"):
        optimizer.step()
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(model.parameters())
    for param, master in masters(optimizer).items():
        assert torch.equal(param, master.bfloat16())
        assert "momentum_buffer" in optimizer.state[param]

    def fails() -> Any:
        raise ValueError("in the closure")

    fine = MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="in the closure"):
        fine.step(fails)
    assert [p for g in fine.param_groups for p in g["params"]] == list(model.parameters())


def test_wrong_arguments_are_refused() -> None:
    model = half()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="takes a torch optimizer, not generator"):
        MasterWeights(model.parameters())
    with pytest.raises(TypeError, match="leave the second MasterWeights out"):
        MasterWeights(MasterWeights(base))
    sparse = st.SparseOptimizer(base, model, POLICIES["static"])
    with pytest.raises(TypeError, match="put MasterWeights inside SparseOptimizer"):
        MasterWeights(sparse)
    assert not base.state


# Sharded parameters.


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    store = dist.FileStore(f"{tmp_path}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_sharded_parameters_have_sharded_masters(name: str, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    start = torch.linspace(-1, 1, 24).view(6, 4).bfloat16()
    plain = nn.Parameter(start.clone())
    sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = OPTIMIZERS[name]
    optimizers = [MasterWeights(make([param])) for param in (plain, sharded)]
    for step in range(4):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).bfloat16()
        plain.grad, sharded.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():  # as masks do
            plain[2] = 0
            sharded.to_local()[2] = 0
    saved = optimizers[1].state_dict()
    optimizers[1].load_state_dict(saved)
    master = optimizers[1].state[sharded]["master"]
    assert isinstance(master, DTensor) and master.dtype == torch.float32
    assert torch.equal(master.full_tensor(), optimizers[0].state[plain]["master"])
    assert torch.equal(sharded.full_tensor(), plain)
