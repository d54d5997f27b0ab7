"""docs/migration.md: what it says is equal is equal, and where libraries differ, they differ so."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsetrain as st

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migration.md"

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
HELD = ("0.weight", "2.weight")


def network() -> nn.Sequential:
    """Takes [N, 16], gives [N, 3]; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # No ReLU: units that are never on leave weights at exactly 0, and ties.
        return nn.Sequential(
            nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3)
        )


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator)
    y = torch.randint(3, (8,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        backward(model, step)
        optimizer.step()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def distinct(outputs: int, inputs: int, seed: int) -> Tensor:
    """[outputs, inputs], no two of the same size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randperm(outputs * inputs, generator=generator) + 1.0
    signs = torch.randint(2, (outputs * inputs,), generator=generator) * 2 - 1
    return (sizes * signs).view(outputs, inputs)


# torch.nn.utils.prune


@given(
    outputs=some.integers(1, 9),
    inputs=some.integers(1, 9),
    amount=some.floats(0, 0.99),
    seed=some.integers(0, 9),
)
@settings(max_examples=60)
def test_one_layer_has_their_mask_but_for_a_half(
    outputs: int, inputs: int, amount: float, seed: int
) -> None:
    numel = outputs * inputs
    if round((1 - amount) * numel) < 1:
        return  # a layer keeps a weight here
    theirs = layer(distinct(outputs, inputs, seed))
    prune.l1_unstructured(theirs, "weight", amount=amount)
    (ours,) = st.prune(layer(distinct(outputs, inputs, seed)), "magnitude", amount).masks.values()
    if abs(amount * numel % 1 - 0.5) > 1e-9:
        assert torch.equal(ours, theirs.weight_mask.bool())
    else:
        assert int((ours != theirs.weight_mask.bool()).sum()) <= 1


def test_half_a_weight_is_kept_by_one_and_pruned_by_the_other() -> None:
    theirs = layer(distinct(1, 5, 0))
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    ours = st.prune(layer(distinct(1, 5, 0)), "magnitude", 0.5)
    assert int(theirs.weight_mask.sum()) == 3
    assert int(ours.masks["weight"].sum()) == 2


def test_pruning_again_is_of_what_is_left() -> None:
    theirs = layer(distinct(10, 10, 0))
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    prune.l1_unstructured(theirs, "weight", amount=0.2)
    ours = st.prune(layer(distinct(10, 10, 0)), "magnitude", 1 - 0.8 * (1 - 0.5))
    assert torch.equal(ours.masks["weight"], theirs.weight_mask.bool())


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_a_global_ranking_is_theirs(sparsity: float) -> None:
    theirs = network()
    layers = [(theirs[place], "weight") for place in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=sparsity)
    ours = st.prune(network(), "magnitude", sparsity, scope="global")
    for name, mask in ours.masks.items():
        assert torch.equal(mask, theirs.get_buffer(f"{name}_mask").bool())


def test_a_global_ranking_empties_a_layer_there_and_not_here() -> None:
    models = network(), network()
    for model in models:
        with torch.no_grad():
            model[4].weight.mul_(1e-3)
    theirs, ours = models
    layers = [(theirs[place], "weight") for place in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.8)
    assert int(theirs[4].weight_mask.sum()) == 0
    kept = st.prune(ours, "magnitude", 0.8, scope="global").masks
    assert int(kept["4.weight"].sum()) == 1
    assert sum(int(mask.sum()) for mask in kept.values()) == sum(
        int(module.weight_mask.sum()) for module, _ in layers
    )


@pytest.mark.parametrize("dim, size", [(0, [1, 32]), (1, [24, 1])], ids=["outputs", "inputs"])
def test_whole_outputs_and_inputs(dim: int, size: list[int]) -> None:
    theirs = network()
    prune.ln_structured(theirs[2], "weight", amount=0.5, n=1, dim=dim)
    block = {"kind": "block", "size": size}
    ours = st.prune(network(), "magnitude", 0.5, match="2", structure=block)
    assert torch.equal(ours.masks["2.weight"], theirs[2].weight_mask.bool())


@pytest.mark.parametrize("n", [1, 2])
def test_channels_are_the_same_but_gone(n: int) -> None:
    theirs = network()
    prune.ln_structured(theirs[0], "weight", amount=0.5, n=n, dim=0)
    kept = theirs[0].weight_mask.any(dim=1)
    model = network()
    smaller = st.channels.prune(model, torch.zeros(1, 16), f"l{n}", {"0": 0.5}).model
    assert torch.equal(smaller[0].weight, model[0].weight[kept])
    assert torch.equal(smaller[2].weight, model[2].weight[:, kept])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_alike(optimizer: str) -> None:
    theirs, ours = network(), network()
    base_theirs = OPTIMIZERS[optimizer](theirs.parameters())
    base_ours = OPTIMIZERS[optimizer](ours.parameters())
    train(theirs, base_theirs, 0, 5)  # so that there is momentum before anything is pruned
    train(ours, base_ours, 0, 5)
    for place in (0, 2):
        prune.l1_unstructured(theirs[place], "weight", amount=0.75)
    held = st.prune(ours, "magnitude", 0.75, match=["0", "2"]).hold(base_ours)
    train(theirs, base_theirs, 5, 40)
    train(ours, held, 5, 40)
    for place in (0, 2):
        prune.remove(theirs[place], "weight")
    held.finalize()
    assert_same(ours, theirs)


def test_given_masks() -> None:
    theirs, ours = network(), network()
    mask = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    prune.custom_from_mask(theirs[0], "weight", mask)
    recipe = {"rules": [{"match": "0", "policy": st.Static(masks={"0.weight": mask})}]}
    base = torch.optim.SGD(ours.parameters(), lr=0.1)
    st.SparseOptimizer(base, ours, recipe).finalize()
    prune.remove(theirs[0], "weight")
    assert_same(ours, theirs)


# torch.ao.pruning


@pytest.fixture(scope="module")
def ao() -> Any:
    return pytest.importorskip("torch.ao.pruning", reason="this torch has none")


@pytest.mark.parametrize(
    "settings, ours",
    [
        ({"sparsity_level": 0.6, "sparse_block_shape": (1, 1)}, {"sparsity": 0.6}),
        (
            {"sparsity_level": 1.0, "sparse_block_shape": (1, 4), "zeros_per_block": 2},
            {"structure": "2:4"},
        ),
        (
            {"sparsity_level": 0.5, "sparse_block_shape": (1, 4), "norm": 1},
            {"sparsity": 0.5, "structure": {"kind": "block", "size": [1, 4]}},
        ),
        (
            {"sparsity_level": 0.5, "sparse_block_shape": (4, 2), "norm": 1},
            {"sparsity": 0.5, "structure": {"kind": "block", "size": [4, 2]}},
        ),
    ],
    ids=["weights", "two_of_four", "blocks", "tall_blocks"],
)
def test_one_step_of_their_sparsifier(
    ao: Any, settings: dict[str, Any], ours: dict[str, Any]
) -> None:
    theirs = network()
    sparsifier = ao.WeightNormSparsifier(**settings)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    masks = st.prune(network(), "magnitude", match="0", **ours).masks
    assert torch.equal(masks["0.weight"], theirs[0].weight != 0)


def test_blocks_by_squares_are_not_ours(ao: Any) -> None:
    theirs = layer(torch.tensor([[3.0, 3.0, 5.0, 0.5]]))
    sparsifier = ao.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 2))
    sparsifier.prepare(theirs, [{"tensor_fqn": "weight"}])
    sparsifier.step()
    block = {"kind": "block", "size": [1, 2]}
    masks = st.prune(layer(torch.tensor([[3.0, 3.0, 5.0, 0.5]])), "magnitude", 0.5, structure=block)
    assert theirs.parametrizations.weight[0].mask.tolist() == [[0, 0, 1, 1]]
    assert masks.masks["weight"].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_their_cubic_schedule_gives_the_masks_of_gradual_at_every_step(
    ao: Any, optimizer: str
) -> None:
    theirs, ours = network(), network()
    sparsifier = ao.WeightNormSparsifier(0.75, (1, 1), 1)
    sparsifier.prepare(theirs, [{"tensor_fqn": name} for name in HELD])
    base = OPTIMIZERS[optimizer](theirs.parameters())
    scheduler = ao.CubicSL(sparsifier, init_t=2, delta_t=5, total_t=6)
    update = st.UpdateSchedule(every=1, start=2, stop=2 + 5 * 6 + 1)
    policy = st.Gradual(sparsity=0.75, total_steps=50, update=update)
    recipe = st.Recipe(rules=[st.Rule(match=name, policy=policy) for name in HELD])
    held = st.SparseOptimizer(OPTIMIZERS[optimizer](ours.parameters()), ours, recipe)
    for step in range(50):
        train(theirs, base, step, step + 1)
        sparsifier.step()
        scheduler.step()
        train(ours, held, step, step + 1)
        for place, name in zip((0, 2), HELD, strict=True):
            mask = theirs[place].parametrizations.weight[0].mask
            assert torch.equal(held.masks()[name], mask.bool()), (step, name)
    sparsifier.squash_mask()
    held.finalize()
    assert_same(ours, theirs)
    assert int((ours[0].weight == 0).sum()) == 0.75 * 16 * 32


# sparseml: it cannot be a dependency, so here are the zeros that its recipe of the page left in
# each layer after the updates at steps 20, 30, ..., 160 (sparseml 1.8.0, torch 2.13, 20 steps an
# epoch, a network of Linear(16, 32) and Linear(32, 4)).

SPARSEML = [(26, 6), (102, 26), (168, 42), (223, 56), (270, 67), (308, 77), (338, 84), (362, 90)]
SPARSEML += [(379, 95), (392, 98), (401, 100), (406, 101), (408, 102), (409, 102), (410, 102)]


def test_the_recipe_of_the_page_prunes_as_sparseml_did() -> None:
    fences = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (recipe,) = (st.Recipe.from_text(fence) for fence in fences)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = st.SparseOptimizer(base, model, recipe)
    places = [model[0], model[2]]
    zeros: dict[int, tuple[int, ...]] = {}

    def count(event: st.UpdateEvent) -> None:
        zeros[event.step] = tuple(int((place.weight == 0).sum()) for place in places)

    optimizer.register_update_hook(count)
    for step in range(200):
        if step == 20:  # sparse from the beginning, while sparseml waits for its first epoch
            assert all((place.weight == 0).any() for place in places)
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    assert list(zeros) == list(range(20, 161, 10))
    for ours, theirs in zip(zeros.values(), SPARSEML, strict=True):
        assert all(abs(mine - other) <= 1 for mine, other in zip(ours, theirs, strict=True))
    assert tuple(int((place.weight == 0).sum()) for place in places) == SPARSEML[-1]


def test_what_is_zero_stays_zero() -> None:
    """ConstantPruningModifier."""
    model = network()
    with torch.no_grad():
        model[2].weight[torch.rand(24, 32, generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    zeros = model[2].weight == 0
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = st.prune(model, "magnitude", 0.0).hold(base)
    train(model, optimizer, 0, 10)
    assert torch.equal(model[2].weight == 0, zeros)
    assert not (model[0].weight == 0).any()


# rigl-torch


@pytest.fixture(scope="module")
def rigl_scheduler() -> Iterator[Any]:
    """It imports torchvision for two class names."""
    pytest.importorskip("rigl_torch", reason="pip install rigl-torch==0.5.2")
    stand_in: Any = types.ModuleType("torchvision")
    resnet = types.SimpleNamespace(Bottleneck=type(None), BasicBlock=type(None))
    stand_in.models = types.SimpleNamespace(resnet=resnet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", stand_in)
        from rigl_torch.RigL import RigLScheduler
    yield RigLScheduler


EVERY, STOP = 5, 60


def rigl_beside_rigl_torch(
    rigl_scheduler: Any, optimizer: str
) -> tuple[nn.Module, st.SparseOptimizer, nn.Module, Any]:
    """Both after our update at step 0, with equal weights and masks."""
    ours, theirs = network(), network()
    policy = st.RigL(
        sparsity=0.8,
        allocation="uniform_first_dense",
        total_steps=100,
        update=st.UpdateSchedule(every=EVERY, stop=STOP),
        drop_fraction=0.3,
    )
    held = st.SparseOptimizer(OPTIMIZERS[optimizer](ours.parameters()), ours, policy)
    train(ours, held, 0, 1)
    pruner = rigl_scheduler(
        theirs,
        OPTIMIZERS[optimizer](theirs.parameters()),
        dense_allocation=0.2,
        T_end=STOP,
        delta=EVERY,
        alpha=0.3,
        ignore_linear_layers=False,
    )
    theirs.load_state_dict(ours.state_dict())
    masks = held.masks()
    assert pruner.backward_masks[0] is None and masks["0.weight"].all()
    pruner.backward_masks[1:] = [masks[name].clone() for name in ("2.weight", "4.weight")]
    return ours, held, theirs, pruner


def one_step_of_rigl_torch(model: nn.Module, pruner: Any, step: int) -> None:
    backward(model, step)
    if pruner():
        pruner.optimizer.step()


def test_rigl_is_theirs_bit_for_bit(rigl_scheduler: Any) -> None:
    ours, held, theirs, pruner = rigl_beside_rigl_torch(rigl_scheduler, "momentum")
    updates: list[int] = []
    held.register_update_hook(lambda event: updates.append(event.step))
    for step in range(1, 100):
        train(ours, held, step, step + 1)
        one_step_of_rigl_torch(theirs, pruner, step)
        assert_same(ours, theirs)
        for name, mask in zip(("2.weight", "4.weight"), pruner.backward_masks[1:], strict=True):
            assert torch.equal(held.masks()[name], mask), (step, name)
    assert updates == list(range(EVERY, STOP, EVERY))
    assert pruner.rigl_steps == len(updates)


def test_adam_keeps_moments_of_dropped_weights_there_and_not_here(rigl_scheduler: Any) -> None:
    ours, held, theirs, pruner = rigl_beside_rigl_torch(rigl_scheduler, "adam")
    for step in range(1, EVERY + 1):
        train(ours, held, step, step + 1)
        one_step_of_rigl_torch(theirs, pruner, step)
    dropped = ~held.masks()["2.weight"]
    assert torch.equal(dropped, ~pruner.backward_masks[1])
    assert pruner.optimizer.state[theirs[2].weight]["exp_avg"][dropped].any()
    assert not held.state[ours[2].weight]["exp_avg"][dropped].any()


def test_layer_norms_are_made_sparse_there_and_not_here(rigl_scheduler: Any) -> None:
    theirs, ours = (
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)) for _ in range(2)
    )
    base = torch.optim.SGD(theirs.parameters(), lr=0.1)
    rigl_scheduler(theirs, base, dense_allocation=0.5, T_end=75, ignore_linear_layers=False)
    assert int((theirs[1].weight == 0).sum()) == 4
    base = torch.optim.SGD(ours.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, ours, st.RigL(sparsity=0.5, total_steps=100))
    assert set(optimizer.targets) == {"0.weight", "2.weight"}
