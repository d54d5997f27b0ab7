"""st.prune: exact counts in every scope, nothing changed before it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from runs import SmallNet, backward, batch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

BATCHES = [batch(0), batch(1)]
SCORES: list[Any] = [
    st.Magnitude(),
    st.Random(),
    st.Gradient(),
    st.Taylor(),
    st.Taylor(per="sample"),
    st.MovementScore(),
    st.Fisher(),
    st.OptimalBrainDamage(),
    st.OptimalBrainSurgeon(),
    st.SNIP(),
    st.GraSP(),
    st.SynFlow(rounds=4),
    st.Wanda(),
]


def prune(model: nn.Module, score: Any, sparsity: Any, **options: Any) -> st.PruneResult:
    return st.prune(model, score, sparsity, calibration=BATCHES, loss_fn=F.cross_entropy, **options)


def counts(result: st.PruneResult) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in result.masks.items()}


@given(sparsity=some.floats(0.0, 0.9), seed=some.integers(0, 20))
def test_every_scope_has_exact_counts(sparsity: float, seed: int) -> None:
    model = SmallNet(seed)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    layer = counts(prune(model, "magnitude", sparsity))
    whole = counts(prune(model, "magnitude", sparsity, scope="global"))
    total = round((1 - sparsity) * sum(sizes.values()))
    assert sum(layer.values()) == sum(whole.values()) == total
    for name, size in sizes.items():
        assert abs(layer[name] - (1 - sparsity) * size) < len(sizes)
    rows = prune(model, "magnitude", sparsity, scope="row").masks
    for mask in rows.values():
        in_row = mask.flatten(1).sum(1)
        assert (in_row == in_row[0]).all()


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.kind)
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_every_score_prunes_in_every_scope(score: Any, scope: Any) -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = prune(model, score, 0.5, scope=scope)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if score.pruning_rounds == 1:
        scores = st.score(model, score, BATCHES, F.cross_entropy)
        if scope == "global":
            kept = torch.cat([scores[n][m] for n, m in result.masks.items()])
            lost = torch.cat([scores[n][~m] for n, m in result.masks.items()])
            assert kept.min() >= lost.max()
        elif scope == "layer":
            for name, mask in result.masks.items():
                assert scores[name][mask].min() >= scores[name][~mask].max()


def test_a_score_has_the_scope_of_its_paper() -> None:
    model = SmallNet()
    assert same(prune(model, "wanda", 0.5), prune(model, "wanda", 0.5, scope="row"))
    assert same(prune(model, "snip", 0.5), prune(model, "snip", 0.5, scope="global"))
    assert same(prune(model, "taylor", 0.5), prune(model, "taylor", 0.5, scope="layer"))
    assert not same(prune(model, "wanda", 0.5), prune(model, "wanda", 0.5, scope="layer"))


def same(a: st.PruneResult, b: st.PruneResult) -> bool:
    return all(torch.equal(mask, b.masks[name]) for name, mask in a.masks.items())


def test_synflow_goes_in_rounds() -> None:
    model = SmallNet()
    one = prune(model, st.SynFlow(rounds=1), 0.9)
    many = prune(model, st.SynFlow(rounds=50), 0.9)
    assert not same(one, many)
    # By hand: a copy that is pruned a little at a time.
    twin = SmallNet()
    for number in range(1, 51):
        part = prune(twin, st.SynFlow(rounds=1), 1 - 0.1 ** (number / 50))
        part.apply()
    assert same(part, many)


def test_structures_and_allocations_are_those_of_policies() -> None:
    model = SmallNet()
    n_m = prune(model, "wanda", None, structure="2:4", scope="layer", match=["hidden", "conv"])
    for mask in n_m.masks.values():
        assert (mask.flatten(1).view(len(mask), -1, 4).sum(2) == 2).all() or mask.dim() == 4
    assert n_m.sparsity == 0.5
    explicit = {"kind": "explicit", "densities": {"conv.*": 1.0, "*": 0.25}}
    found = prune(model, "magnitude", None, allocation=explicit)
    assert counts(found)["conv.weight"] == 288
    assert counts(found)["hidden.weight"] == 128


def test_zeros_stay_zeros_and_count() -> None:
    model = SmallNet()
    prune(model, "random", 0.5, scope="global").apply()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    result = prune(model, "grasp", 0.75)
    assert result.sparsity == pytest.approx(0.75, abs=1e-3)
    for name, mask in result.masks.items():
        assert not (mask & zeros[name]).any()
    result = prune(model, "magnitude", 0.25)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)  # no zero comes back


def test_apply_sets_zeros_and_nothing_else() -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = prune(model, "magnitude", 0.8)
    assert result.apply() is model
    for name, value in model.state_dict().items():
        expected = before[name]
        if name in result.masks:
            expected = torch.where(result.masks[name], expected, 0.0)
        assert torch.equal(value, expected)


@pytest.mark.parametrize("storage", ["masked", "csr"])
def test_hold_keeps_the_zeros_while_training(storage: str) -> None:
    model = SmallNet()
    result = prune(model, "magnitude", 0.9, match=["hidden", "head"])
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = result.hold(base, storage=storage)
    assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
    for step in range(3):
        backward(model, step)
        optimizer.step()
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, result.masks[name])
    optimizer.finalize()
    for name, mask in result.masks.items():
        assert not (model.get_parameter(name)[~mask]).any()
        assert model.get_parameter(name)[mask].all()


def test_masks_travel_through_recipes() -> None:
    model = SmallNet()
    recipe = prune(model, "magnitude", 0.9).recipe()
    back = st.Recipe.from_text(recipe.to_yaml())
    assert back == recipe
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, back)
    assert all(
        torch.equal(mask, optimizer.masks()[name])
        for name, mask in prune(SmallNet(), "magnitude", 0.9).masks.items()
    )


def mask_for(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (mask_for("hidden.weight", (16, 32)), "Static has no mask for conv.weight"),
        (
            mask_for("conv.weight", (8, 4, 3)) | mask_for("hidden.weight", (16, 32)),
            r"the mask of conv.weight has shape \(8, 4, 3\), not \(8, 4, 3, 3\)",
        ),
    ],
)
def test_masks_have_to_fit(masks: dict[str, Tensor], message: str) -> None:
    model = SmallNet()
    with pytest.raises(ValueError, match=message):
        st.SparseOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, st.Static(masks=masks)
        )


def test_masks_replace_a_sparsity() -> None:
    masks = mask_for("a", (2,))
    with pytest.raises(ValueError, match="leave 'sparsity' out"):
        st.Static(masks=masks, sparsity=0.5)
    with pytest.raises(ValueError, match="leave 'score' out"):
        st.Static(masks=masks, score="magnitude")
    with pytest.raises(ValueError, match=r"a bool tensor, not one of torch\.float32"):
        st.Static(masks={"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"not those of a mask of shape \(20,\)"):
        st.Static(masks={"a": {"shape": [20], "bits": "AA=="}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "activation_variance"}, "is of channels"),
        ({"scope": "column"}, "scope='column' is not one of"),
        ({"scope": "global", "allocation": "uniform"}, "no 'allocation'"),
        ({"scope": "row", "structure": {"kind": "block", "size": [2, 2]}}, "leave 'structure' out"),
        ({"structure": "2:4", "match": "hidden"}, r"2:4 has sparsity 0.5, not 0.9"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": None}, "sparsity=None"),
        ({"score": "synflow", "sparsity": None}, "prunes in 100 rounds: give a sparsity"),
        ({"match": "nothing"}, "match='nothing' names nothing"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    model = SmallNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given: dict[str, Any] = {"score": "magnitude", "sparsity": 0.9, **options}
    with pytest.raises(ValueError, match=message):
        prune(model, given.pop("score"), given.pop("sparsity"), **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_result_can_be_read() -> None:
    result = prune(SmallNet(), "magnitude", 0.5)
    assert "hidden.weight" in str(result)
    assert result.to_dict()["layers"][1] == {
        "name": "hidden.weight",
        "shape": [16, 32],
        "kept": 256,
    }


class Blocks(nn.Module):
    """Three blocks of one layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", ["auto", "blocks.*", ["blocks.0", "blocks.1", "blocks.2"]])
def test_blocks_are_scored_on_what_pruned_ones_give(blocks: Any) -> None:
    model, x = Blocks(), torch.randn(64, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = st.prune(model, "wanda", 0.75, calibration=[x], blocks=blocks)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # By hand: mask a layer before the next is looked at.
    twin, hidden = Blocks(), x
    layers = [block[0] for block in twin.blocks] + [twin.head]  # type: ignore[index]
    for layer, (name, mask) in zip(layers, result.masks.items(), strict=True):
        with torch.no_grad():
            scores = layer.weight.abs() * hidden.norm(dim=0)  # type: ignore[union-attr,operator]
            kept = scores.topk(3, dim=1).indices
            expected = torch.zeros_like(mask).scatter_(1, kept, True)
            assert torch.equal(mask, expected), name
            layer.weight.masked_fill_(~mask, 0.0)  # type: ignore[union-attr,operator]
            hidden = hidden + layer(hidden).relu() if layer is not twin.head else hidden
    assert not same(result, st.prune(model, "wanda", 0.75, calibration=[x]))


def test_blocks_need_a_score_that_looks_at_data() -> None:
    model, x = Blocks(), torch.randn(8, 12)
    with pytest.raises(ValueError, match="'magnitude' does not look at what blocks get"):
        st.prune(model, "magnitude", 0.5, blocks="auto")
    with pytest.raises(ValueError, match="scope='global' compares the weights of all blocks"):
        st.prune(model, "wanda", 0.5, scope="global", calibration=[x], blocks="auto")
    with pytest.raises(ValueError, match="blocks='block' names no module"):
        st.prune(model, "wanda", 0.5, calibration=[x], blocks="block")
    with pytest.raises(ValueError, match="reads the batches several times"):
        st.prune(model, "wanda", 0.5, calibration=iter([x]), blocks="auto")
