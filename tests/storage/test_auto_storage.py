"""storage="auto": each layer is measured once it has seen an input, and held as is faster."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from runs import SmallNet, same, weights
from sparse_twins import agree, backward, held, measuring, policies, train, why, wrap
from torch import nn

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseLayer, SparseLinear
from sparsetrain.storage.csr.measure import Timing, measure

NAMES = {"conv.weight", "hidden.weight", "head.weight"}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def always(layer: nn.Module, density: float) -> bool:
    return True


def never(layer: nn.Module, density: float) -> bool:
    return False


@pytest.mark.parametrize("policy", ["static", "set", "rigl", "snfs"])
def test_where_the_measurement_says_so_layers_become_sparse_after_a_step(policy: str) -> None:
    with measuring(always) as measured:
        model, optimizer = wrap("auto", policy)
        assert set(held(optimizer).values()) == {"masked"}
        assert set(why(optimizer).values()) == {"measured after the first step"}
        assert not measured.asked and hooks_of(model) == 3
        train(model, optimizer, 0, 1)
        assert set(held(optimizer).values()) == {"csr"}
        assert set(why(optimizer).values()) == {"measured: 2.00 ms dense, 1.00 ms csr"}
        assert "2.00 ms dense" in " ".join(str(optimizer.summary()).split())
        train(model, optimizer, 1, 14)
        twin_model, twin = wrap("masked", policy)
        train(twin_model, twin, 0, 14)
        agree(optimizer, twin, within=1e-9)
    assert len(measured.asked) == 3  # once a layer
    assert [shape for _, _, shape in measured.asked] == [(8, 4, 4, 4), (8, 32), (8, 16)]
    assert {id(layer) for layer, _, _ in measured.asked} == {
        id(m) for m in (model.conv, model.hidden, model.head)
    }
    densities = [density for _, density, _ in measured.asked]
    if policy != "snfs":
        assert densities == [target.density for target in optimizer.targets.values()]


@pytest.mark.parametrize("policy", ["static", "set", "rigl", "snfs"])
def test_where_dense_is_faster_layers_stay_masked(policy: str) -> None:
    with measuring(never) as measured:
        model, optimizer = wrap("auto", policy)
        train(model, optimizer, 0, 14)
    assert set(held(optimizer).values()) == {"masked"}
    assert set(why(optimizer).values()) == {"measured: 1.00 ms dense, 2.00 ms csr"}
    assert not any(isinstance(m, SparseLayer) for m in model.modules())
    if policy != "snfs":  # whose layers change their densities
        assert len(measured.asked) == 3
    twin_model, twin = wrap("masked", policy)
    train(twin_model, twin, 0, 14)
    assert same(weights(model), weights(twin_model))


def test_each_layer_is_measured_for_itself() -> None:
    with measuring(lambda layer, density: isinstance(layer, nn.Linear)):
        model, optimizer = wrap("auto", "rigl")
        train(model, optimizer, 0, 14)
    assert held(optimizer) == {
        "conv.weight": "masked",
        "hidden.weight": "csr",
        "head.weight": "csr",
    }


def test_equal_times_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain import storage_choice

    monkeypatch.setattr(storage_choice, "measure", lambda *args: Timing(1.0, 1.0))
    model, optimizer = wrap("auto", "static")
    train(model, optimizer, 0, 2)
    assert set(held(optimizer).values()) == {"masked"}


def test_layers_that_grow_much_sparser_are_measured_again() -> None:
    """Gradual pruning starts dense; csr becomes faster on its way."""
    with measuring(lambda layer, density: density < 0.5) as measured:
        model, optimizer = wrap("auto", "gradual")
        switched: dict[str, int] = {}
        for step in range(14):
            train(model, optimizer, step, step + 1)
            for name, how in held(optimizer).items():
                if how == "csr":
                    switched.setdefault(name, step)
        twin_model, twin = wrap("masked", "gradual")
        train(twin_model, twin, 0, 14)
        agree(optimizer, twin, within=1e-9)
    assert switched.keys() >= {"conv.weight", "hidden.weight"}
    assert min(switched.values()) > 0
    for module in (model.conv, model.hidden):
        asked = [density for layer, density, _ in measured.asked if layer is module]
        assert len(asked) >= 2 and asked[0] == 1.0
        assert all(b <= 0.7 * a for a, b in itertools.pairwise(asked))
        assert all(density >= 0.5 for density in asked[:-1])


def test_a_layer_that_was_not_used_yet_waits() -> None:
    with measuring(always) as measured:
        model, optimizer = wrap("auto", "static")
        for _ in range(2):
            optimizer.zero_grad()
            model.conv(torch.ones(2, 4, 4, 4).double()).sum().backward()
            optimizer.step()
        assert held(optimizer)["conv.weight"] == "csr" and len(measured.asked) == 1
        assert held(optimizer)["hidden.weight"] == "masked"
        assert why(optimizer)["hidden.weight"] == "measured after the first step"
        train(model, optimizer, 2, 4)
        assert set(held(optimizer).values()) == {"csr"}


def test_inputs_of_an_evaluation_do_not_count() -> None:
    with measuring(always) as measured:
        model, optimizer = wrap("auto", "static")
        backward(model, 0)
        model.eval()
        model(torch.ones(1, 4, 4, 4).double())
        optimizer.step()
    assert [shape[0] for _, _, shape in measured.asked] == [8, 8, 8]


def test_a_replaced_step_comes_first_in_rigl_and_measures_too() -> None:
    """RigL's first step may be an update, after which weights are held as measured."""
    policy = st.RigL(sparsity=0.8, total_steps=14, update={"every": 3, "start": 0})
    with measuring(always):
        model, optimizer = wrap("auto", policy)
        train(model, optimizer, 0, 1)
        assert set(held(optimizer).values()) == {"csr"}
        train(model, optimizer, 1, 14)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("sparse_is_faster", [always, never])
@pytest.mark.parametrize("steps", [0, 3])
def test_hooks_are_gone_after_finalize(sparse_is_faster: Any, steps: int, dense: bool) -> None:
    with measuring(sparse_is_faster):
        model, optimizer = wrap("auto", "set")
        mine = model.hidden.register_forward_pre_hook(lambda *args: None)
        train(model, optimizer, 0, steps)
        optimizer.finalize(dense=dense)
    assert hooks_of(model) == 1
    mine.remove()
    is_sparse = any(isinstance(m, SparseLayer) for m in model.modules())
    assert is_sparse == (not dense and steps > 0 and sparse_is_faster is always)
    if dense:
        assert [type(m) for m in model.modules()] == [type(m) for m in SmallNet().modules()]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_measure_for_themselves_and_lose_their_hooks_too(how: str, steps: int) -> None:
    with measuring(lambda layer, density: isinstance(layer, nn.Linear)) as measured:
        model, optimizer = wrap("auto", "rigl")
        train(model, optimizer, 0, steps)
        if how == "deepcopy":
            other, again = copy.deepcopy((model, optimizer))
        else:
            other, again = pickle.loads(pickle.dumps((model, optimizer)))
        assert hooks_of(other) == hooks_of(model) == 3
        train(model, optimizer, steps, 8)
        asked = len(measured.asked)
        train(other, again, steps, 8)
        assert len(measured.asked) == asked + (0 if steps else 3)
        assert held(again) == held(optimizer)
        assert same(weights(model), weights(other))
        again.finalize()
        assert hooks_of(other) == 0 and hooks_of(model) == 3
        assert type(other.hidden) is nn.Linear and type(model.hidden) is SparseLinear
        train(model, optimizer, 8, 14)


def test_a_failed_wrapping_leaves_no_hooks() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = {"match": "nothing.*", "dense": True}
    for recipe in (
        {"policy": {"kind": "static", "sparsity": 0.9999}},
        {"policy": {"kind": "static", "sparsity": 0.9}, "rules": [rule]},
    ):
        with pytest.raises(ValueError):
            st.SparseOptimizer(base, model, recipe, storage="auto")
        assert hooks_of(model) == 0


def test_layers_that_cannot_be_sparse_are_not_measured() -> None:
    with measuring(always) as measured:
        model, optimizer = wrap("auto", st.NMSparse(n=1, m=4))
        train(model, optimizer, 0, 2)
        assert hooks_of(model) == 0 and not measured.asked
        assert set(held(optimizer).values()) == {"masked"}


def test_a_closure_is_measured_after_its_step() -> None:
    with measuring(always) as measured:
        model, optimizer = wrap("auto", "set")
        optimizer.step(lambda: backward(model, 0))
        assert len(measured.asked) == 3 and set(held(optimizer).values()) == {"csr"}
        optimizer.step(lambda: backward(model, 1))


# The measurement itself.


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 16), (8, 24)),
        (nn.Linear(24, 16, bias=False, dtype=torch.float64), (2, 3, 24)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, bias=False), (2, 3, 9, 9)),
    ],
)
def test_measuring_touches_nothing(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetrain.storage.csr.measure._SECONDS", 1e-5)
    calls: list[Any] = []
    layer.register_forward_hook(lambda *args: calls.append(args))
    before, state = weights(layer), torch.get_rng_state()
    with torch.no_grad():  # as at the end of a step
        times = measure(layer, 0.2, shape)
        assert not torch.is_grad_enabled()
    assert 0 < times.dense < 1000 and 0 < times.sparse < 1000
    assert same(weights(layer), before) and torch.equal(torch.get_rng_state(), state)
    assert not calls and all(p.grad is None for p in layer.parameters())


def test_the_measured_copies_are_as_dense_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.storage.csr import measure as module

    seen: list[float] = []
    real = module.sparsify

    def sparsify(layer: nn.Module, mask: torch.Tensor) -> SparseLayer:
        seen.append(float(mask.float().mean()))
        return real(layer, mask)

    monkeypatch.setattr(module, "sparsify", sparsify)
    monkeypatch.setattr(module, "_SECONDS", 1e-5)
    measure(nn.Linear(200, 100), 0.1, (4, 200))
    measure(nn.Linear(20, 10), 1e-9, (4, 20))
    assert seen[0] == pytest.approx(0.1, abs=0.02) and 0 < seen[1] < 0.01


@pytest.mark.slow
def test_a_wide_and_very_sparse_layer_really_becomes_sparse() -> None:
    model = nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 3))
    policy = st.Static(sparsity=0.99, allocation="uniform")
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, policy, storage="auto"
    )
    model(torch.ones(64, 2000)).sum().backward()
    optimizer.step()
    assert held(optimizer)["0.weight"] == "csr"
    assert why(optimizer)["0.weight"].startswith("measured: ")


def test_auto_trains_with_the_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.storage.csr.measure._SECONDS", 1e-5)
    model, optimizer = wrap("auto", policies(14, 3)["rigl"])
    twin_model, twin = wrap("masked", "rigl")
    train(model, optimizer, 0, 14)
    train(twin_model, twin, 0, 14)
    assert all(reason.startswith("measured: ") for reason in why(optimizer).values())
    agree(optimizer, twin, within=1e-9)
