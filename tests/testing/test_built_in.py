"""Every policy and every score of the library keeps to every invariant of the kit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import POLICIES
from torch import nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain import testing
from sparsetrain.policies import LearnedPolicy

FEW: dict[str, Any] = {"total_steps": 8, "update": {"every": 2}}
DYNAMIC: dict[str, Any] = {"sparsity": 0.7, **FEW}
BLOCKS = {"kind": "block", "size": (1, 4)}
OTHERS: dict[str, st.Policy] = {
    "static_two_of_four": st.Static(structure="2:4", score=st.Magnitude()),
    "static_global": st.Static(sparsity=0.7, allocation="global", score=st.Magnitude()),
    "set_constant_fan_in": st.SET(**DYNAMIC, structure="constant_fan_in"),
    "set_with_values": st.SET(**DYNAMIC, drop="magnitude_by_sign", grow_std=0.1),
    "set_by_epsilon": st.SET(allocation={"kind": "erdos_renyi", "epsilon": 3.0}, **FEW),
    "rigl_blocks": st.RigL(**DYNAMIC, structure=BLOCKS),
    "rigl_explicit": st.RigL(
        allocation={"kind": "explicit", "densities": {"conv*": 0.5, "*": 0.2}}, **FEW
    ),
    "gradual_constant_fan_in": st.Gradual(**DYNAMIC, structure="constant_fan_in"),
    "gradual_movement_global": st.Gradual(**DYNAMIC, allocation="global", score="movement"),
    "gradual_random_first_dense": st.Gradual(
        **DYNAMIC, allocation="uniform_first_dense", score="random", shape="cosine"
    ),
    "surgery_by_threshold": st.DynamicNetworkSurgery(c_rate=0.5, total_steps=8),
    "slimming": st.Slimming(strength=0.01),
}
SHORT: dict[str, Any] = {"sparsity": 0.6, "total_steps": 10, "update": {"every": 2}}
LEARNED: dict[str, LearnedPolicy] = {
    "soft_threshold": st.SoftThreshold(**SHORT, per="output"),
    "soft_threshold_strength": st.SoftThreshold(strength=0.5, initial=-4.0),
    "hard_concrete": st.HardConcrete(**SHORT, exact=True),
    "hard_concrete_inputs": st.HardConcrete(**SHORT, per="input"),
    "gumbel_softmax": st.GumbelSoftmax(**SHORT, allocation="uniform"),
    "gumbel_two_of_four": st.GumbelSoftmax(structure="2:4", total_steps=8),
    "variational_dropout": st.VariationalDropout(**SHORT),
    "movement": st.Movement(**SHORT, structure=BLOCKS),
    "soft_movement": st.Movement(strength=1e-3, mode="threshold", total_steps=8),
}
#: Of invariants that say nothing, because there are no such things in the policy.
SILENT = {
    "static": {"structures_hold", "events_tell_what_changed", "grown_weights_start_fresh"},
    "set": {"structures_hold"},
    "rigl": {"structures_hold"},
    "snfs": {"structures_hold"},
    "gradual": {"structures_hold", "grown_weights_start_fresh"},
    "dynamic_network_surgery": {
        "structures_hold",
        "inactive_state_is_zero",
        "grown_weights_start_fresh",
        "gradients_outside_the_mask_do_not_leak",
    },
    "set_constant_fan_in": set(),
    "rigl_blocks": set(),
    "hard_concrete": {
        "structures_hold",
        "inactive_state_is_zero",
        "masks_change_at_updates_only",
        "grown_weights_start_fresh",
        "gradients_outside_the_mask_do_not_leak",
        "state_dict_names_stay",
    },
}
SILENT["nm_sparse"] = SILENT["dynamic_network_surgery"]
SILENT["gumbel_two_of_four"] = SILENT["hard_concrete"] - {"structures_hold"}
CASES: dict[str, st.Policy] = {**POLICIES, **OTHERS, **LEARNED}
TURNS = ("momentum", "adamw", "sgd")


@pytest.mark.parametrize("name", CASES)
def test_policies_keep_to_every_invariant(name: str) -> None:
    policy, turn = CASES[name], TURNS[list(CASES).index(name) % len(TURNS)]
    steps = None if "total_steps" in policy.model_dump(exclude_none=True) else 8
    optimizer = "adamw" if name in LEARNED else turn
    report = testing.check_policy(policy, optimizer=optimizer, steps=steps)
    checked = [outcome.invariant for outcome in report.outcomes]
    assert checked == [invariant.__name__ for invariant in testing.INVARIANTS]
    assert set(report.held) | set(report.left_out) == set(checked)
    if name in SILENT:
        assert set(report.left_out) == SILENT[name]


def test_every_kind_of_the_library_is_among_them() -> None:
    kinds = {
        kind
        for kind, policy in st.Policy.members.items()
        if policy.__module__.startswith("sparsetrain.policies.")
    }
    assert kinds == {policy.kind for policy in CASES.values()}


@pytest.mark.parametrize("policy", ["set", "rigl", "gradual"])
def test_csr_storage(policy: str) -> None:
    report = testing.check_policy(POLICIES[policy], optimizer="momentum", storage="csr")
    assert "state_dict_names_stay" in report.left_out
    assert "grown_weights_start_fresh" in report.held or policy == "gradual"


def test_the_optimizers_that_are_taken_by_default() -> None:
    few = ["counts_are_exact", "recipes_round_trip"]
    report = testing.check_policy(POLICIES["set"], only=few)
    assert [(o.invariant, o.optimizer) for o in report.outcomes] == [
        (invariant, optimizer)
        for optimizer in ("sgd", "momentum", "adamw")
        for invariant in ("recipes_round_trip", "counts_are_exact")
    ]
    report = testing.check_policy(LEARNED["movement"], only=few)
    assert {outcome.optimizer for outcome in report.outcomes} == {"adamw"}


def test_a_recipe_of_several_policies() -> None:
    recipe = {
        "policy": POLICIES["rigl"].model_dump(),
        "rules": [
            {"match": "head", "sparsity": 0.5},
            {"module_type": "Conv2d", "policy": {"kind": "nm_sparse", "n": 2, "m": 4}},
        ],
    }
    report = testing.check_policy(recipe, optimizer="momentum")
    assert report.subject == "rigl, nm_sparse over 14 steps with momentum"
    assert set(report.left_out) == {"structures_hold"}


class Attention(nn.Module):
    """Takes tokens and a scale as keywords; dropout draws from torch's own random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.layer(self.embedding(tokens)).mean(1)) * scale}


def tokens(step: int) -> tuple[dict[str, Any], torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(11, (6, 4), generator=generator)
    return {"tokens": words, "scale": 0.5}, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("policy", [POLICIES["rigl"], LEARNED["hard_concrete"]], ids=["rigl", "l0"])
def test_a_model_of_ones_own(policy: st.Policy) -> None:
    torch.manual_seed(0)
    model = Attention()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    report = testing.check_model(
        model,
        policy,
        tokens,
        lambda outputs, targets: F.cross_entropy(outputs["logits"], targets),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    assert "finalize_leaves_a_plain_model" in report.held
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight.grad is None


def test_the_documentation_tells_of_every_invariant() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "testing.md"
    told = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert told == [invariant.__name__ for invariant in testing.INVARIANTS]
    for invariant in testing.INVARIANTS + testing.SCORE_INVARIANTS:
        assert invariant.__doc__


@pytest.mark.parametrize(
    "score",
    [kind for kind, s in st.Score.members.items() if s.__module__.startswith("sparsetrain.")],
)
def test_scores_keep_to_theirs(score: str) -> None:
    report = testing.check_score(score)
    assert len(report.outcomes) == len(testing.SCORE_INVARIANTS)
    assert "scores_round_trip" in report.held
    of_steps = "steps_are_scored" in report.held
    of_models = {"shapes_fit", "measuring_repeats", "measuring_changes_nothing"}
    assert of_steps or of_models <= set(report.held)
    assert (score == "momentum") == ("shapes_fit" in report.left_out)
