"""Channels go while a SparseOptimizer holds masks: all that is left is carried, and training goes
on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from channels_networks import Residual, images, stacks
from hypothesis import given, settings
from hypothesis import strategies as some
from runs import OPTIMIZERS, SmallNet, batch
from runs import train as train_small
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.removal import remove
from sparsetrain.report.ages import MaskAges
from sparsetrain.storage.bits import unpack_mask

UPDATES: dict[str, Any] = {"total_steps": 40, "update": {"every": 2}}
POLICIES: dict[str, st.Policy] = {
    "static": st.Static(sparsity=0.5),
    "set": st.SET(sparsity=0.5, **UPDATES),
    "rigl": st.RigL(sparsity=0.5, **UPDATES),
    "snfs": st.SNFS(sparsity=0.5, **UPDATES),
    "gradual": st.Gradual(sparsity=0.5, **UPDATES),
    "gradual_global": st.Gradual(sparsity=0.5, allocation="global", **UPDATES),
    "gradual_movement": st.Gradual(sparsity=0.5, score="movement", **UPDATES),
    "surgery": st.DynamicNetworkSurgery(sparsity=0.5, total_steps=40),
    "surgery_by_threshold": st.DynamicNetworkSurgery(c_rate=-0.5, total_steps=40),
}
LATENT = ("surgery", "surgery_by_threshold", "nm_sparse")
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.003),
}
each_policy = pytest.mark.parametrize("policy", POLICIES)


def check(optimizer: st.SparseOptimizer) -> None:
    """What holds between any two steps."""
    assert optimizer.masks().keys() == optimizer.targets.keys()
    zeros, numel = 0, 0
    for policy, group in optimizer._keeper.groups:
        for target in group.targets:
            weight, mask = target.param.detach(), optimizer.masks()[target.name]
            assert target.shape == tuple(weight.shape) == tuple(mask.shape)
            assert target.numel == weight.numel() and target.active == int(mask.sum())
            assert (weight[~mask] == 0).all()
            if not policy.latent:
                for value in state_of(optimizer, target.param).values():
                    assert (value[~mask] == 0).all()
            zeros, numel = zeros + int((~mask).sum()), numel + mask.numel()
    assert optimizer.sparsity() == pytest.approx(zeros / numel)
    for row in optimizer.summary().rows:
        target = optimizer.targets[row.name]
        assert (row.shape, row.active) == (target.shape, target.active)


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    found = optimizer.state.get(parameter, {}).items()
    return {k: v for k, v in found if isinstance(v, Tensor) and v.dim()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
        if isinstance(optimizer, st.SparseOptimizer):
            check(optimizer)


def wrapped(
    model: nn.Module, policy: st.Policy | st.Recipe, base: str = "momentum"
) -> st.SparseOptimizer:
    return st.SparseOptimizer(BASES[base](model.parameters()), model, policy)


def kept(
    model: nn.Module, found: Sequence[Coupling], chosen: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Tensor, ...]]:
    """Name of each parameter -> for each dimension, the positions that stay."""
    gone: dict[int, dict[int, set[int]]] = {}
    for coupling in found:
        for side in coupling.sides:
            for leaf, dim in side.slices():
                places = gone.setdefault(id(getattr(side.module, leaf)), {}).setdefault(dim, set())
                places.update(side.positions(chosen.get(coupling.name, ())))
    return {
        name: tuple(
            torch.tensor([i for i in range(n) if i not in gone.get(id(p), {}).get(dim, ())])
            for dim, n in enumerate(p.shape)
        )
        for name, p in model.named_parameters()
    }


def everything(model: nn.Module, optimizer: st.SparseOptimizer) -> dict[str, dict[str, Tensor]]:
    """Name of each parameter -> what there is of its shape: values, gradient, state, mask, latent
    weight, and what the policy remembers."""
    saved = copy.deepcopy(optimizer.state_dict()["sparsetrain"])
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        of_it = {"value": parameter.detach().clone()}
        if parameter.grad is not None:
            of_it["gradient"] = parameter.grad.clone()
        of_it |= {key: value.clone() for key, value in state_of(optimizer, parameter).items()}
        if name in optimizer.targets:
            of_it["mask"] = optimizer.masks()[name]
            of_it |= {k: v for k, v in saved["targets"][name].items() if k == "latent"}
            for memory in saved["memories"]:
                of_it |= {
                    key: value
                    for key, value in memory.items()
                    if key.startswith(name) and isinstance(value, Tensor)
                }
        found[name] = of_it
    return found


def frozen(model: nn.Module, optimizer: st.SparseOptimizer) -> Any:
    gradients = [p.grad for p in model.parameters()]
    shapes = [(t.name, t.shape, t.numel, t.active) for t in optimizer.targets.values()]
    attributes = [m.extra_repr() for m in model.modules()]
    return copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), gradients, shapes, attributes)
    )


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def prune(model: nn.Module, x: Tensor, optimizer: Any, **arguments: Any) -> Any:
    return st.channels.prune(
        model, x, optimizer=optimizer, in_place=True, measure_latency=False, **arguments
    )


@settings(max_examples=40, deadline=None)
@given(
    model=stacks,
    policy=some.sampled_from(sorted(POLICIES)),
    base=some.sampled_from(sorted(BASES)),
    steps=some.integers(0, 5),
    data=some.data(),
)
def test_each_slice_that_is_left_is_as_it_was(
    model: nn.Module, policy: str, base: str, steps: int, data: Any
) -> None:
    x = images()
    optimizer = wrapped(model, POLICIES[policy], base)
    train(model, optimizer, x, steps)
    found = st.channels.couplings(model, x)
    chosen = {
        c.name: c.removable(
            data.draw(some.permutations(range(c.channels)), label=c.name),
            data.draw(some.integers(0, c.channels)),
        )
        for c in found
    }
    before, left = everything(model, optimizer), kept(model, found, chosen)
    remove(chosen, found, optimizer)
    after = everything(model, optimizer)
    assert after.keys() == before.keys()
    for name, of_it in before.items():
        assert after[name].keys() == of_it.keys()
        for what, value in of_it.items():
            assert after[name][what].equal(value[torch.meshgrid(*left[name], indexing="ij")]), what
    check(optimizer)
    survivors = {name: target.active for name, target in optimizer.targets.items()}
    train(model, optimizer, x, 6)
    now = {name: target.active for name, target in optimizer.targets.items()}
    if policy in ("static", "set", "rigl"):
        assert now == survivors
    if policy == "snfs":
        assert sum(now.values()) == sum(survivors.values())


def test_what_a_policy_asks_of_the_smaller_weights() -> None:
    x = images()
    for policy in ("gradual", "surgery"):
        torch.manual_seed(0)
        model = Residual()
        optimizer = wrapped(model, POLICIES[policy])
        train(model, optimizer, x, 6)
        prune(model, x, optimizer)
        train(model, optimizer, x, 40)
        # The counts that the same policy would give the smaller network from its beginning.
        fresh = copy.deepcopy(model)
        static = wrapped(fresh, st.Static(sparsity=0.5))
        expected = {name: target.active for name, target in static.targets.items()}
        assert {name: target.active for name, target in optimizer.targets.items()} == expected


@each_policy
def test_a_checkpoint_of_the_smaller_network(policy: str) -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES[policy], "adam")
    train(model, optimizer, x, 5)
    result = prune(model, x, optimizer)
    fresh = result.architecture.shape(Residual())
    weights, states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fresh.load_state_dict(weights)
    resumed = st.SparseOptimizer(BASES["adam"](fresh.parameters()), fresh, POLICIES[policy], seed=5)
    resumed.load_state_dict(states)
    assert equal(frozen(model, optimizer)[:2], frozen(fresh, resumed)[:2])
    train(model, optimizer, x, 7)
    train(fresh, resumed, x, 7)
    assert equal(frozen(model, optimizer), frozen(fresh, resumed))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@each_policy
def test_copies_of_the_smaller_network(policy: str, way: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES[policy])
    train(model, optimizer, x, 5)
    prune(model, x, optimizer, ratio=0.3)
    other, copied = way((model, optimizer))
    train(model, optimizer, x, 5)
    train(other, copied, x, 5)
    assert equal(frozen(model, optimizer)[:2], frozen(other, copied)[:2])


def test_training_goes_on_as_of_a_small_network_made_by_hand() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, st.Static(sparsity=0.6))
    train(model, optimizer, x, 4)
    result = prune(model, x, optimizer, ratio=0.5)
    small = result.architecture.shape(Residual())
    small.load_state_dict(model.state_dict())
    by_hand = wrapped(small, st.Static(masks=optimizer.masks()))
    ours = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        by_hand.state[parameter]["momentum_buffer"] = optimizer.state[ours[name]][
            "momentum_buffer"
        ].clone()
    train(model, optimizer, x, 6)
    train(small, by_hand, x, 6)
    assert equal(model.state_dict(), small.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name: str) -> None:
    model, (x, _) = SmallNet(), batch(0)
    policy = st.RigL(sparsity=0.5, total_steps=20, update={"every": 3})
    optimizer = st.SparseOptimizer(OPTIMIZERS[name](model.parameters()), model, policy)
    train_small(model, optimizer, 0, 5)
    check_weights(optimizer)
    prune(model, x, optimizer, ratio=0.4)
    for parameter in model.parameters():
        for key, value in state_of(optimizer, parameter).items():
            assert value.shape == parameter.shape, key
    train_small(model, optimizer, 5, 12)
    check_weights(optimizer)


def check_weights(optimizer: st.SparseOptimizer) -> None:
    for target in optimizer.targets.values():
        assert (target.param.detach()[~target.mask] == 0).all()
        assert target.active == int(target.mask.sum())


@pytest.mark.parametrize("name", ["adafactor", "lbfgs"])
def test_plain_optimizers_whose_state_is_not_of_the_weights_shape(name: str) -> None:
    model, (x, _) = SmallNet(), batch(0)
    optimizer = OPTIMIZERS[name](model.parameters())
    train_small(model, optimizer, 0, 3)
    prune(model, x, optimizer, ratio=0.4)
    losses = train_small(model, optimizer, 3, 8)
    assert all(loss < 10 for loss in losses)


# Bookkeeping


def test_densities_so_far_stay() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES["snfs"])
    train(model, optimizer, x, 5)
    before = {name: optimizer.density_history(name) for name in optimizer.targets}
    prune(model, x, optimizer)
    for name, target in optimizer.targets.items():
        density, mean, idle_with_gradient = optimizer.density_history(name)
        assert density == target.active / target.numel
        assert (mean, idle_with_gradient) == pytest.approx(before[name][1:], abs=0.01)
    train(model, optimizer, x, 5)
    for name in optimizer.targets:
        assert 0 < optimizer.density_history(name)[1] <= 1


def test_explored_weights_are_those_that_are_left() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    optimizer = wrapped(model, st.SET(sparsity=0.7, **UPDATES))
    events: list[st.UpdateEvent] = []
    optimizer.register_update_hook(events.append)
    seen = optimizer.masks()
    for _ in range(7):
        train(model, optimizer, x, 1)
        seen = {name: seen[name] | mask for name, mask in optimizer.masks().items()}
    found = st.channels.couplings(model, x)
    left = kept(model, found, {"0": [1, 4, 5]})
    remove({"0": [1, 4, 5]}, found, optimizer)
    seen = {n: seen[n][torch.meshgrid(*left[n], indexing="ij")] for n in seen}
    events.clear()
    optimizer.update_masks()
    seen = {name: seen[name] | mask for name, mask in optimizer.masks().items()}
    share = sum(int(s.sum()) for s in seen.values()) / sum(s.numel() for s in seen.values())
    assert [event.exploration_rate for event in events] == [pytest.approx(share)]
    assert 0.3 < share < 1


def test_a_write_between_removal_and_step_is_masked() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES["static"])
    train(model, optimizer, x, 2)
    prune(model, x, optimizer)
    model.inner.weight.data.add_(1.0)
    train(model, optimizer, x, 1)


def test_a_write_between_step_and_removal_is_masked() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES["static"])
    train(model, optimizer, x, 2)
    model.inner.weight.data.add_(1.0)
    prune(model, x, optimizer)
    check(optimizer)


def test_masks_of_the_wrapping_cost_no_weights_of_a_resumed_run() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, POLICIES["static"])
    train(model, optimizer, x, 2)
    again = copy.deepcopy(model)
    prune(model, x, optimizer, method="random")
    other = st.SparseOptimizer(
        BASES["momentum"](again.parameters()), again, POLICIES["static"], seed=5
    )
    prune(again, x, other, method="random")
    assert not equal(again.state_dict(), model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.startswith("surgery")])
def test_a_layer_that_is_left_without_active_weights(policy: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 3))
    optimizer = wrapped(model, POLICIES[policy])
    first, middle = (torch.ones_like(optimizer.masks()[f"{i}.weight"]) for i in (0, 2))
    middle[3:] = False
    for name, mask in (("0.weight", first), ("2.weight", middle)):
        optimizer.targets[name].replace_mask(mask)
    train(model, optimizer, x, 1)
    where = optimizer.masks()["2.weight"].any(1).nonzero().view(-1).tolist()
    remove({"2": where}, st.channels.couplings(model, x), optimizer)
    assert optimizer.targets["2.weight"].active == 0
    train(model, optimizer, x, 9)
    optimizer.update_masks()
    check(optimizer)
    assert (optimizer.targets["2.weight"].active > 0) == (policy == "snfs")


# Masks that are given, and structures


def test_given_masks_are_sliced_in_the_recipe() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    masks = {n: torch.rand_like(p) < 0.4 for n, p in model.named_parameters() if p.dim() > 1}
    elsewhere = st.Static(masks=masks)
    recipe = st.Recipe(
        policy=elsewhere, rules=[st.Rule(match="inner", policy=st.Static(masks=masks))]
    )
    optimizer = wrapped(model, recipe)
    train(model, optimizer, x, 2)
    found = st.channels.couplings(model, x)
    left = kept(model, found, {"inner": [1], "stem": [0, 7]})
    remove({"inner": [1], "stem": [0, 7]}, found, optimizer)
    for name, mask in optimizer.masks().items():
        assert mask.equal(masks[name][torch.meshgrid(*left[name], indexing="ij")])
    assert elsewhere == st.Static(masks=masks) and optimizer.recipe != recipe
    train(model, optimizer, x, 3)
    again = wrapped(model, optimizer.recipe)
    again.load_state_dict(optimizer.state_dict())
    assert equal(again.masks(), optimizer.masks())


def test_weights_that_wait_for_the_optimizer_find_their_masks() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    masks = {n: torch.rand_like(p) < 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    base = torch.optim.SGD(model[0].parameters(), lr=0.01, momentum=0.9)
    optimizer = st.SparseOptimizer(base, model, st.Static(masks=masks))
    remove({"0": [2, 3]}, st.channels.couplings(model, x), optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert optimizer.masks()["2.weight"].equal(masks["2.weight"][:, [0, 1, *range(4, 10)]])
    train(model, optimizer, x, 3)


def chain() -> tuple[nn.Module, Tensor]:
    """Widths 8, 16 and 4: groups of four inputs fit everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)


def test_n_m_is_chosen_anew_among_what_is_left() -> None:
    model, x = chain()
    optimizer = wrapped(model, st.NMSparse(n=2, m=4, update={"every": 50}))
    optimizer.register_update_hook(lambda event: None)
    train(model, optimizer, x, 4)
    before = everything(model, optimizer)["2.weight"]["latent"]
    result = prune(model, x, optimizer, ratio=0.25, method="l2")
    left = [c for c in range(16) if c not in result.removed["0"]]
    groups = before[:, left].view(4, 3, 4).abs()
    expected = (groups >= groups.topk(2, dim=2).values[..., -1:]).view(4, 12)
    assert optimizer.masks()["2.weight"].equal(expected)
    after = everything(model, optimizer)["2.weight"]
    assert after["latent"].equal(before[:, left])
    assert after["value"].equal(torch.where(expected, before[:, left], 0.0))
    explored = optimizer.state_dict()["sparsetrain"]["tracker"]["explored"]["2.weight"]
    assert unpack_mask(explored, (4, 12))[expected].all()
    train(model, optimizer, x, 4)


@pytest.mark.parametrize(
    ("structure", "channels"),
    [
        ("2:4", [4, 5, 6, 7]),
        ({"kind": "block", "size": (2, 2)}, [0, 1, 8, 9]),
        ({"kind": "block", "size": (4, 1)}, [12, 13, 14, 15]),
    ],
)
def test_whole_units_can_go(structure: Any, channels: list[int]) -> None:
    model, x = chain()
    sparsity = None if structure == "2:4" else 0.5
    optimizer = wrapped(model, st.RigL(sparsity=sparsity, structure=structure, **UPDATES))
    train(model, optimizer, x, 3)
    remove({"0": channels}, st.channels.couplings(model, x), optimizer)
    left = {name: target.active for name, target in optimizer.targets.items()}
    train(model, optimizer, x, 5)
    assert {name: target.active for name, target in optimizer.targets.items()} == left


def test_outputs_can_go_under_a_constant_fan_in() -> None:
    model, x = chain()
    policy = st.SET(sparsity=0.5, structure="constant_fan_in", **UPDATES)
    recipe = st.Recipe(policy=policy, rules=[st.Rule(match="2", dense=True)])
    optimizer = wrapped(model, recipe)
    train(model, optimizer, x, 3)
    remove({"0": [0, 5, 6]}, st.channels.couplings(model, x), optimizer)
    train(model, optimizer, x, 5)
    assert (optimizer.masks()["0.weight"].sum(1) == 4).all()


def test_slimming_goes_on() -> None:
    torch.manual_seed(0)
    x, model = images(), Residual()
    optimizer = wrapped(model, st.Slimming(strength=0.1))
    train(model, optimizer, x, 2)
    prune(model, x, optimizer, ratio=0.5)
    assert optimizer.targets["norm.weight"].shape == tuple(model.norm.weight.shape)
    train(model, optimizer, x, 2)


def test_factors_of_the_next_layer_keep_zeros() -> None:
    model, x = chain()
    optimizer = wrapped(model, POLICIES["static"])
    train(model, optimizer, x, 2)
    before = optimizer.masks()["2.weight"]
    result = prune(model, x, optimizer, method="thinet", calibration=[x])
    left = [c for c in range(16) if c not in result.removed["0"]]
    assert optimizer.masks()["2.weight"].equal(before[:, left])
    train(model, optimizer, x, 3)


# What is refused


def refused(
    model: nn.Module, x: Tensor, optimizer: Any, message: str, given: Any = None, **arguments: Any
) -> None:
    before = frozen(model, optimizer)
    with pytest.raises(ValueError, match=message):
        prune(model, x, optimizer if given is None else given, **arguments)
    assert equal(frozen(model, optimizer), before)


@pytest.mark.parametrize(
    ("policy", "channels", "message"),
    [
        (st.NMSparse(n=2, m=4), 13, "'2.weight'.*13 inputs are not divisible.*finalize"),
        (st.Static(structure="2:4"), 13, "'2.weight'.*13 inputs are not divisible.*finalize"),
        (
            st.RigL(sparsity=0.5, structure={"kind": "block", "size": (2, 2)}, **UPDATES),
            13,
            "'0.weight'.*not divisible into blocks.*finalize",
        ),
        (
            st.RigL(sparsity=0.5, structure="constant_fan_in", **UPDATES),
            12,
            "left of 2.weight.*constant_fan_in.*finalize",
        ),
        (st.RigL(sparsity=0.97, **UPDATES), 1, "leaves layers such as.*finalize"),
        (
            st.Static(
                allocation={"kind": "explicit", "densities": {"*": 0.5}},
                structure={"kind": "block", "size": (1, 4)},
            ),
            12,
            "left of 2.weight, .*block.*finalize",
        ),
    ],
)
def test_shapes_and_structures_that_do_not_fit(
    policy: st.Policy, channels: int, message: str
) -> None:
    model, x = chain()
    optimizer = wrapped(model, policy)
    train(model, optimizer, x, 2)
    refused(model, x, optimizer, message, method="random", ratio=1 - channels / 16)
    before = frozen(model, optimizer)
    with pytest.raises(ValueError, match="finalize"):
        remove({"0": range(1, 17 - channels)}, st.channels.couplings(model, x), optimizer)
    assert equal(frozen(model, optimizer), before)
    train(model, optimizer, x, 3)


def test_weights_held_in_csr() -> None:
    model, x = chain()
    optimizer = st.SparseOptimizer(
        BASES["momentum"](model.parameters()), model, st.Static(sparsity=0.8), storage="csr"
    )
    (optimizer.base.zero_grad(), model(x).sum().backward(), optimizer.step())
    refused(model, x, optimizer, r"0\.weight is held as csr: finalize")
    optimizer.finalize()
    assert prune(model, x, optimizer.base).layers == {"0": (16, 8)}


def test_methods_that_write_inactive_weights() -> None:
    pytest.importorskip("sklearn")
    model, x = chain()
    optimizer = wrapped(model, POLICIES["rigl"])
    train(model, optimizer, x, 2)
    refused(model, x, optimizer, r"2\.weight", method="lasso", calibration=[x])


def test_the_wrapped_optimizer_alone() -> None:
    model, x = chain()
    optimizer = wrapped(model, POLICIES["rigl"])
    train(model, optimizer, x, 2)
    refused(model, x, optimizer, "wrapped by a SparseOptimizer", given=optimizer.base)


def test_a_finalized_optimizer() -> None:
    model, x = chain()
    optimizer = wrapped(model, POLICIES["rigl"])
    optimizer.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        prune(model, x, optimizer)
    assert model[0].weight.shape == (16, 8)


def test_a_target_that_cannot_says_so() -> None:
    model, x = chain()
    optimizer = st.SparseOptimizer(
        BASES["momentum"](model.parameters()), model, st.SoftThreshold(sparsity=0.5, total_steps=9)
    )
    refused(model, x, optimizer, "finalize")
    with pytest.raises(ValueError, match=r"0\.weight is held as learned: finalize"):
        optimizer.check_narrowing()
    with pytest.raises(NotImplementedError, match=r"0\.weight is held as learned"):
        optimizer.targets["0.weight"].take(0, torch.arange(3))


def test_ages_begin_again_where_channels_went() -> None:
    torch.manual_seed(0)
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    policy = st.SET(sparsity=0.5, total_steps=20, update={"every": 2})
    optimizer = st.SparseOptimizer(base, model, policy)
    ages = MaskAges(optimizer)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()

    train(5)
    assert 0 < ages.records[-1].original < 1
    st.channels.prune(model, images(), "l1", 0.5, optimizer=optimizer, in_place=True)
    train(2)
    assert ages.records[-1].mean_age < ages.records[-2].mean_age
    assert ages.records[-1].original == 0  # every weight of this network lost channels
