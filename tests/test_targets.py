"""Which tensors a recipe makes sparse, on a model that has one of everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.candidates import find_candidates
from sparsetrain.recipe import assign

STATIC: dict[str, Any] = {"kind": "static", "sparsity": 0.5}
SET: dict[str, Any] = {"kind": "set", "sparsity": 0.5, "total_steps": 10}


class Grouped(nn.Conv2d):
    """A user's own layer, derived from torch's, with one more matrix."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, groups=2)
        self.mix = nn.Parameter(torch.ones(2, 2))


class Zoo(nn.Module):
    """One module of each sort, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.bags = nn.EmbeddingBag(12, 8)
        self.place = nn.Parameter(torch.zeros(5, 8))
        self.encoder = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv3d(2, 4, 3), nn.ConvTranspose2d(2, 4, 3)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
        self.mixer = nn.MultiheadAttention(8, 2)
        self.wider = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True)
        self.own = Grouped()
        self.head = nn.Linear(8, 12)


class Tied(nn.Module):
    """A language model's embedding and head that share one weight, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight


def chosen(model: nn.Module, *rules: dict[str, Any], policy: Any = STATIC) -> dict[str, float]:
    """Name -> sparsity of its policy, of every weight the recipe makes sparse."""
    data = {"rules": list(rules)} | ({} if policy is None else {"policy": policy})
    return {
        candidate.name: assignment.policy.sparsity
        for assignment in assign(model, st.Recipe.from_dict(data))
        for candidate in assignment.candidates
    }


def dense(**selector: str) -> dict[str, Any]:
    return selector | {"dense": True}


def test_products_are_sparse_by_default_and_nothing_else() -> None:
    assert set(chosen(Zoo())) == {
        *(f"encoder.{i}.weight" for i in range(4)),
        *(f"mixer.{leaf}" for leaf in ("in_proj_weight", "out_proj.weight")),
        *(f"wider.{p}_proj_weight" for p in "qkv"),
        "wider.out_proj.weight",
        "own.weight",
        "head.weight",
    }


def test_every_parameter_is_found_once_in_model_order() -> None:
    model = Zoo()
    assert [c.name for c in find_candidates(model)] == [n for n, _ in model.named_parameters()]
    assert [c.param for c in find_candidates(model)] == list(model.parameters())


def test_the_first_rule_that_matches_wins() -> None:
    first, second = {"match": "encoder.1", "sparsity": 0.1}, {"match": "encoder.*", "sparsity": 0.9}
    found = chosen(Zoo(), first, second)
    assert found["encoder.1.weight"] == 0.1
    assert found["encoder.0.weight"] == found["encoder.2.weight"] == 0.9
    assert found["head.weight"] == 0.5
    found = chosen(Zoo(), {"match": "encoder.?.*", "sparsity": 0.9}, dense(match="own"))
    assert found["encoder.1.weight"] == 0.9
    assert "own.weight" not in found


@pytest.mark.parametrize(
    ("selector", "left"),
    [
        ({"match": "head.weight"}, {"head.weight"}),
        ({"match": "head"}, {"head.weight"}),
        ({"match": "hea?"}, {"head.weight"}),
        ({"match": "[ho]*d.weight"}, {"head.weight"}),
        ({"match": "mixer"}, {"mixer.in_proj_weight"}),
        ({"match": "mixer.*"}, {"mixer.in_proj_weight", "mixer.out_proj.weight"}),
        ({"regex": r"coder\.[01]\."}, {"encoder.0.weight", "encoder.1.weight"}),
        ({"regex": "^own$|^head$"}, {"own.weight", "head.weight"}),
        ({"module_type": "Grouped"}, {"own.weight"}),
        ({"module_type": "Conv2d"}, {"encoder.1.weight", "own.weight"}),
        (
            {"module_type": "Linear"},
            {"head.weight", "mixer.out_proj.weight", "wider.out_proj.weight"},
        ),
    ],
)
def test_selectors(selector: dict[str, str], left: set[str]) -> None:
    assert set(chosen(Zoo(), selector | {"policy": SET}, policy=None)) == left
    assert set(chosen(Zoo(), selector | {"dense": True})) == set(chosen(Zoo())) - left


@pytest.mark.parametrize("case", ["Head", "HEAD.weight"])
def test_globs_mind_upper_case(case: str) -> None:
    with pytest.raises(ValueError, match="matches no tensor"):
        chosen(Zoo(), dense(match=case))


def test_a_rule_takes_other_tensors_only_when_it_names_no_product() -> None:
    assert set(chosen(Zoo(), {"match": "embed", "policy": SET}, policy=None)) == {"embed.weight"}
    assert set(chosen(Zoo(), {"match": "place", "policy": SET}, policy=None)) == {"place"}
    everything = {"match": "*", "policy": SET}
    assert set(chosen(Zoo(), everything, policy=None)) == set(chosen(Zoo()))


def test_an_earlier_rule_does_not_make_a_later_one_take_an_embedding() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "fc": nn.Linear(8, 8)})
    later = {"regex": "embed|fc", "policy": SET}
    assert set(chosen(model, later, policy=None)) == {"fc.weight"}
    with pytest.raises(ValueError, match="rule 1"):
        chosen(model, dense(match="fc"), later, policy=None)


def test_rules_of_policy_and_of_sparsity() -> None:
    recipe = st.Recipe.from_dict(
        {
            "policy": SET | {"drop_fraction": 0.2},
            "rules": [{"match": "head", "sparsity": 0.9}, {"match": "own", "policy": STATIC}],
        }
    )
    own, head, static = assign(Zoo(), recipe)
    assert own.policy == recipe.policy
    assert head.policy == st.SET(sparsity=0.9, total_steps=10, drop_fraction=0.2)
    assert static.policy == st.Static(sparsity=0.5)
    assert [c.name for c in head.candidates + static.candidates] == ["head.weight", "own.weight"]


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ({"match": "haed.weight"}, "'head.weight'"),
        ({"match": "encodr.1"}, "'encoder.1'"),
        ({"match": "encodr.*"}, "'encoder."),
        ({"regex": r"^haed$"}, "'head'"),
        ({"module_type": "Conv2"}, "'Conv2d'"),
        ({"module_type": "conv2d"}, "'Conv2d'"),
    ],
)
@pytest.mark.parametrize("action", [{"dense": True}, {"sparsity": 0.1}, {"policy": SET}])
def test_a_rule_that_matches_nothing_is_an_error(
    selector: dict[str, str], near: str, action: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"rule 1 .*matches no tensor.*did you mean .*{near}"):
        chosen(Zoo(), dense(match="own"), selector | action)


@pytest.mark.parametrize("names", ["*.bias", "norms.*", "*.bias_k"])
def test_biases_and_norms_cannot_be_asked_for(names: str) -> None:
    with pytest.raises(ValueError, match="biases and norm weights cannot be made sparse"):
        chosen(Zoo(), {"match": names, "sparsity": 0.5})
    assert set(chosen(Zoo(), dense(match=names))) == set(chosen(Zoo()))


def test_a_policy_without_a_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing sparse"):
        chosen(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match="nothing sparse"):
        chosen(Zoo(), dense(match="*"))


def test_the_recipes_own_policy_without_a_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="policy"):
        chosen(Zoo(), {"match": "*", "policy": SET})


@pytest.mark.parametrize("later", [{"sparsity": 0.1}, {"policy": SET}])
def test_a_rule_that_earlier_rules_leave_nothing_is_an_error(later: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rule 1 .*'head.weight'"):
        chosen(Zoo(), dense(match="head"), {"match": "head.weight"} | later)


def test_tied_weights_are_listed_once_with_all_names() -> None:
    model = Tied()
    model.again = nn.Sequential(model.hidden)
    shared, hidden, bias = find_candidates(model)
    assert shared.names == ["embed.weight", "head.weight"]
    assert shared.param is model.embed.weight
    assert hidden.names == ["hidden.weight", "again.0.weight"]
    assert bias.names == ["hidden.bias", "again.0.bias"]
    for name in ("again", "again.0", "hidden.weight"):
        assert chosen(model, {"match": f"{name}*", "sparsity": 0.9}) == {"hidden.weight": 0.9}


@pytest.mark.parametrize("selector", [{"match": "head"}, {"match": "embed"}, {"regex": "^head"}])
def test_a_tied_head_is_dense_unless_asked_for(selector: dict[str, str]) -> None:
    assert set(chosen(Tied())) == {"hidden.weight"}
    assert set(chosen(Tied(), {"match": "*", "sparsity": 0.9})) == {"hidden.weight"}
    assert chosen(Tied(), selector | {"sparsity": 0.9}) == {
        "hidden.weight": 0.5,
        "embed.weight": 0.9,
    }
    model = Tied()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(
        base, model, {"policy": STATIC, "rules": [selector | {"sparsity": 0.75}]}
    )
    assert optimizer.targets["embed.weight"].param is model.head.weight
    assert int((model.head.weight != 0).sum()) == 24


def test_a_lazy_layer_is_an_error_until_it_has_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"1\.weight is not initialised.*one batch"):
        find_candidates(model)
    model(torch.zeros(2, 4))
    assert set(chosen(model)) == {"0.weight", "1.weight"}


def test_choosing_changes_nothing() -> None:
    model = Zoo()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen(model, {"match": "embed", "policy": SET})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
