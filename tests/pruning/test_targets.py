"""st.prune with a target instead of a sparsity: as many weights as it leaves, and no more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import SmallNet, backward, batch
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.storage import save

IMAGES = batch(0)[0]
NUMEL = 288 + 512 + 48  # weights of SmallNet
REST = 8 + 8 + 8 + 16 + 3  # its biases and its norm


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def kept(result: st.PruneResult) -> int:
    return sum(int(mask.sum()) for mask in result.masks.values())


def cost(result: st.PruneResult, target: st.CostTarget) -> float:
    """Of the network with its zeros, by building it."""
    copied = copy.deepcopy(result)
    return target.of_model(copied.apply(), IMAGES)


def next_more(result: st.PruneResult, score: Any, **options: Any) -> st.PruneResult:
    """As few weights more as the structure allows, by asking for one more and one more."""
    numel = sum(mask.numel() for mask in result.masks.values())
    for count in range(kept(result) + 1, numel + 1):
        more = st.prune(result.model, score, 1 - count / numel, **options)
        if kept(more) > kept(result):
            return more
    raise AssertionError("all weights are kept")


def test_a_compression_of_ten_counts_biases() -> None:
    model = lenet()
    total = 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    result = st.prune(model, "magnitude", target=st.CompressionRate(10))
    assert kept(result) + 410 == total // 10
    assert st.CompressionRate(10).of_model(result.apply(), None) == total // 10


@settings(max_examples=40)
@given(
    target=some.one_of(
        some.builds(st.Flops, some.floats(0.1, 0.95)),
        some.builds(st.Energy, some.floats(0.5, 0.95)),
        some.builds(st.CompressionRate, some.floats(1.1, 8.0)),
    ),
    scope=some.sampled_from(["layer", "global", "row"]),
    seed=some.integers(0, 20),
)
def test_one_weight_more_would_be_too_many(target: st.CostTarget, scope: Any, seed: int) -> None:
    model = SmallNet(seed)
    allowed = target.allowed(target.whole(model, IMAGES))
    result = st.prune(model, "magnitude", target=target, example_inputs=IMAGES, scope=scope)
    assert cost(result, target) <= allowed * (1 + 1e-9)
    assert cost(next_more(result, "magnitude", scope=scope), target) > allowed


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_flops_against_a_scan_of_all_counts(scope: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))
    target, numel = st.Flops(0.37), 48 + 81
    allowed = target.allowed(target.whole(model, IMAGES))
    every = [st.prune(model, "random", 1 - n / numel, scope=scope) for n in range(2, numel + 1)]
    best = max(kept(result) for result in every if cost(result, target) <= allowed)
    result = st.prune(model, "random", target=target, example_inputs=IMAGES, scope=scope)
    assert kept(result) == best


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "constant_fan_in"},
        {"structure": {"kind": "block", "size": [1, 2]}, "match": ["conv", "hidden"]},
        {"allocation": "erk"},
        {"allocation": "uniform_first_dense"},
        {"allocation": "uniform_first_dense", "match": ["hidden", "conv", "head"]},
        {"match": "hidden"},
    ],
    ids=str,
)
def test_every_structure_and_allocation(options: dict[str, Any]) -> None:
    model = SmallNet()
    target = st.Flops(0.8)
    allowed = target.allowed(target.whole(model, IMAGES))
    result = st.prune(model, "magnitude", target=target, example_inputs=IMAGES, **options)
    assert cost(result, target) <= allowed
    assert cost(next_more(result, "magnitude", **options), target) > allowed


def test_a_first_layer_that_is_nearly_all_weights() -> None:
    """It stays dense, so that the lowest sparsity of the others is not that of all weights."""
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 3), nn.ReLU())
    model.append(nn.Linear(3, 2))
    allocation = "uniform_first_dense"
    result = st.prune(model, "magnitude", target=st.CompressionRate(1.02), allocation=allocation)
    assert kept(result) + 55 == int(3411 / 1.02)
    with pytest.raises(ValueError, match="with 3202 weights left there are still"):
        st.prune(model, "magnitude", target=st.CompressionRate(2), allocation=allocation)


@pytest.mark.parametrize("size", ["20kB", 31_000])
def test_the_saved_file_is_as_large_as_asked(size: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))
    target = st.ModelBytes(size)
    result = st.prune(model, "magnitude", target=target, scope="global")
    more = cost(next_more(result, "magnitude", scope="global"), target)
    save(result.apply(), tmp_path / "model.st")
    written = (tmp_path / "model.st").stat().st_size
    assert target.size - 128 < written <= target.size < more


def test_shared_weights_are_kept_once() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4))
        net[2].weight = net[0].weight
        return net

    x = torch.randn(2, 12)
    result = st.prune(model(), "magnitude", target=st.CompressionRate(2))
    assert kept(result) + 28 == (144 + 48 + 28) // 2
    result = st.prune(model(), "magnitude", target=st.Flops(0.5), example_inputs=x, scope="global")
    used = {name: int(mask.sum()) for name, mask in result.masks.items()}
    assert list(used) == ["0.weight", "3.weight"]
    assert 0 <= (2 * 144 + 48) / 2 - (2 * used["0.weight"] + used["3.weight"]) < 2


def test_zeros_that_are_there_count() -> None:
    model = SmallNet()
    st.prune(model, "random", 0.5, scope="global").apply()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    loose = st.prune(model, "magnitude", target=st.CompressionRate(1.5))
    assert kept(loose) == NUMEL // 2  # none comes back, and none goes
    tight = st.prune(model, "magnitude", target=st.CompressionRate(4))
    assert kept(tight) + REST == (NUMEL + REST) // 4
    assert not any((mask & zeros[name]).any() for name, mask in tight.masks.items())


@pytest.mark.parametrize("score", [st.SynFlow(rounds=5), "snip", "wanda"])
def test_scores_that_need_data_or_rounds(score: Any) -> None:
    model = SmallNet()
    options: dict[str, Any] = {"calibration": [batch(0)], "loss_fn": F.cross_entropy}
    result = st.prune(model, score, target=st.CompressionRate(5), scope="global", **options)
    assert kept(result) + REST == (NUMEL + REST) // 5
    same = st.prune(model, score, 1 - kept(result) / NUMEL, scope="global", **options)
    assert all(mask.equal(same.masks[name]) for name, mask in result.masks.items())


def test_targets_of_recipes() -> None:
    model = SmallNet()
    for target in (st.CompressionRate(3), st.Flops(0.4)):
        as_data = target.model_dump(mode="json")
        result = st.prune(model, "magnitude", target=as_data, example_inputs=IMAGES)
        expected = st.prune(model, "magnitude", target=target, example_inputs=IMAGES)
        assert all(mask.equal(expected.masks[name]) for name, mask in result.masks.items())


@pytest.mark.parametrize("rate", [2.5, 7, 12.34])
def test_a_policy_takes_the_sparsity_of_a_target(rate: float) -> None:
    model = SmallNet()
    sparsity = st.prune(model, "random", target=st.CompressionRate(rate)).sparsity
    policy = st.RigL(sparsity=sparsity, total_steps=6, update={"every": 2})
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, policy)
    for step in range(6):
        backward(model, step)
        optimizer.step()
    active = sum(int(mask.sum()) for mask in optimizer.masks().values())
    assert active + REST == int((NUMEL + REST) / rate)


def test_a_target_that_holds_already_keeps_all() -> None:
    for target in (st.Flops(1.0), st.CompressionRate(1), st.ModelBytes("1MB"), st.Parameters(1)):
        result = st.prune(SmallNet(), "magnitude", target=target, example_inputs=IMAGES)
        assert kept(result) == NUMEL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": st.Flops(0.5), "sparsity": 0.5}, "either sparsity=0.5 or a target"),
        ({"target": st.Flops(0.5), "example_inputs": None}, "give example_inputs"),
        (
            {"target": st.Flops(1e-4)},
            "allows 0.3424 FLOPs a sample, and with 3 weights left there are still 12: ask for",
        ),
        (
            {"target": st.CompressionRate(100)},
            "allows 8.91 numbers, and with 3 weights left there are still 46",
        ),
        ({"target": st.Parameters(0.5)}, "with 3 weights left there are still 891"),
        ({"target": st.ModelBytes(10)}, "target 'model_bytes' allows 10 bytes"),
        ({"target": {"kind": "flops"}}, "share"),
        ({"target": {"kind": "speed"}}, "no target of kind 'speed'"),
        ({"target": st.Flops(0.5), "structure": "2:4", "match": "hidden"}, "leave 'target' out"),
        (
            {"target": st.Flops(0.5), "allocation": {"kind": "explicit", "densities": {"*": 0.5}}},
            "leave 'target' out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        st.prune(model, "magnitude", **{"example_inputs": IMAGES, **options})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("target", [st.ModelBytes("3kB"), st.CompressionRate(3), st.Flops(0.3)])
def test_looking_for_a_count_leaves_the_model_as_it_was(target: st.CostTarget) -> None:
    model = SmallNet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    st.prune(model, "magnitude", target=target, example_inputs=IMAGES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
