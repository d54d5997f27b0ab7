"""What is held by its non-zeros when an optimizer is wrapped, and what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from csr_training import DYNAMIC, EVERY_POLICY, is_as_it_was, snapshot
from runs import OPTIMIZERS, POLICIES, SmallNet
from sparse_twins import (
    agree,
    backward,
    held,
    train,
    why,
    worth_it_from,
    wrap,
)
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.storage.csr.layers import SparseLayer, SparseLinear


@pytest.mark.parametrize("storage", ["csr", "auto"])
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "static", "sparsity": 0.9999}, "at most"),
        (
            {
                "policy": {"kind": "static", "sparsity": 0.9},
                "rules": [{"match": "n", "dense": True}],
            },
            "n",
        ),
        (
            {"kind": "static", "sparsity": 0.75, "structure": {"kind": "n_m", "n": 1, "m": 4}},
            "not divisible by m=4",
        ),
        (
            {
                "policy": {"kind": "static", "sparsity": 0.8},
                "rules": [
                    {
                        "match": "head.weight",
                        "policy": {"kind": "nm_sparse", "n": 3, "m": 5},
                    }
                ],
            },
            r"head\.weight",
        ),
        ({"kind": "statics", "sparsity": 0.9}, "statics"),
    ],
)
def test_a_failed_wrapping_leaves_everything_as_it_was(
    storage: str, policy: Any, message: str
) -> None:
    model = SmallNet()
    if "m=4" in message:
        model.hidden = nn.Linear(30, 16)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = snapshot(model, base)
    with worth_it_from(1.0), pytest.raises(ValueError, match=message):
        st.SparseOptimizer(base, model, policy, storage=storage)
    assert is_as_it_was(before, model, base)


@pytest.mark.parametrize("storage", ["CSR", "coo", "", "mask"])
def test_an_unknown_storage_is_refused(storage: str) -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, base)
    with pytest.raises(ValueError, match=f"storage '{storage}' is not one of masked, csr, auto"):
        st.SparseOptimizer(base, model, st.Static(sparsity=0.9), storage=storage)
    assert is_as_it_was(before, model, base)


def test_an_optimizer_of_another_model_leaves_both_as_they_were() -> None:
    model, other = SmallNet(), SmallNet(1)
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    before = snapshot(model, base), snapshot(other, base)
    with worth_it_from(1.0), pytest.raises(ValueError, match="holds none of the tensors"):
        st.SparseOptimizer(base, model, st.Static(sparsity=0.9), storage="csr")
    assert is_as_it_was(before[0], model, base) and is_as_it_was(before[1], other, base)


def test_a_group_that_does_not_fit_is_not_added() -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 1))
    base = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.95), storage="csr")
        with pytest.raises(ValueError, match=r"at most"):
            optimizer.add_param_group({"params": list(model[1].parameters())})
        assert type(model[1]) is not SparseLinear and held(optimizer) == {"0.weight": "csr"}
        assert len(base.param_groups) == 1


def test_a_group_that_is_added_later_is_held_sparse_too() -> None:
    model = SmallNet().double()
    base = torch.optim.SGD(model.hidden.parameters(), lr=0.1, momentum=0.9)
    with worth_it_from(1.0):
        optimizer = st.SparseOptimizer(base, model, st.RigL(sparsity=0.8, **DYNAMIC), storage="csr")
        assert isinstance(model.hidden, SparseLinear)
        assert not isinstance(model.head, SparseLayer)
        train(model, optimizer, 0, 3)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.01})
    assert held(optimizer) == {"hidden.weight": "csr", "head.weight": "csr"}
    assert [p.shape for p in base.param_groups[1]["params"]] == [(10,), (3,)]
    train(model, optimizer, 3, 12)


class Odd(nn.Module):
    """Layers that csr storage cannot hold, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(8, 8, 1)
        self.tied = nn.Linear(32, 32)
        self.also = nn.Linear(32, 32)
        self.also.weight = self.tied.weight
        self.plain = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.circular(F.relu(self.grouped(x))))
        h = self.line(h.flatten(2)).flatten(1)
        return self.plain(self.also(F.relu(self.tied(h))))


def test_layers_without_a_sparse_form_stay_masked_with_a_reason() -> None:
    for storage in ("csr", "auto"):
        model = Odd().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        with worth_it_from(1.0):
            optimizer = st.SparseOptimizer(
                base, model, st.SET(sparsity=0.8, **DYNAMIC), storage=storage
            )
        train(model, optimizer, 0, 1)
        reasons = why(optimizer)
        assert "grouped" in reasons["grouped.weight"]
        assert "padding" in reasons["circular.weight"]
        assert "Conv1d has no sparse form" in reasons["line.weight"]
        assert "several modules share it" in reasons["tied.weight"]
        expected = dict.fromkeys(reasons, "masked")
        if storage == "csr":
            expected["plain.weight"] = "csr"
            assert reasons["plain.weight"] == ""
        else:
            del expected["plain.weight"]  # the faster one, which depends on the machine's load
        assert {k: v for k, v in held(optimizer).items() if k in expected} == expected
        train(model, optimizer, 1, 12)
        optimizer.finalize()
        assert model.also.weight is model.tied.weight


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (POLICIES["dynamic_network_surgery"], "latent"),
        (POLICIES["nm_sparse"], "latent"),
        (st.RigL(sparsity=0.75, structure="constant_fan_in", **DYNAMIC), "whole units"),
        (st.SET(structure={"kind": "n_m", "n": 1, "m": 4}, **DYNAMIC), "whole units"),
        (st.Gradual(sparsity=0.75, structure="constant_fan_in", **DYNAMIC), "whole units"),
    ],
)
def test_policies_that_need_dense_weights_keep_them_with_a_reason(
    policy: st.Policy, reason: str
) -> None:
    for storage in ("csr", "auto"):
        model, optimizer = wrap(storage, policy)
        train(model, optimizer, 0, 12)
        assert set(held(optimizer).values()) == {"masked"}
        assert all(reason in text for text in why(optimizer).values())
        assert reason in " ".join(str(optimizer.summary()).split())
        assert not any(isinstance(m, SparseLayer) for m in model.modules())


def test_a_structured_mask_that_never_moves_is_held_sparse() -> None:
    model, optimizer = wrap(
        "csr", st.Static(sparsity=0.75, structure={"kind": "n_m", "n": 1, "m": 4})
    )
    assert set(held(optimizer).values()) == {"csr"}
    train(model, optimizer, 0, 5)
    assert (model.hidden.weight.unflatten(1, (-1, 4)) != 0).sum(2).max() <= 1


def test_dense_layers_stay_masked_and_say_from_where_csr_pays() -> None:
    model, optimizer = wrap("csr", st.Static(sparsity=0.5, allocation="uniform"), worth=0.4)
    assert set(held(optimizer).values()) == {"masked"}
    assert set(why(optimizer).values()) == {"worth it from a density of 40%"}
    train(model, optimizer, 0, 3)
    model, optimizer = wrap("csr", st.Static(sparsity=0.7, allocation="uniform"), worth=0.4)
    assert held(optimizer)["hidden.weight"] == "csr" and why(optimizer)["hidden.weight"] == ""


def test_by_default_it_pays_for_linear_layers_earlier_than_for_convolutions() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = st.Static(sparsity=0.9, allocation="uniform")
    optimizer = st.SparseOptimizer(base, model, policy, storage="csr")
    assert held(optimizer) == {
        "conv.weight": "masked",
        "hidden.weight": "csr",
        "head.weight": "csr",
    }
    assert "unfolding" in why(optimizer)["conv.weight"]


@pytest.mark.parametrize("policy", ["static", "set", "rigl"])
def test_an_optimizer_for_matrices_trains_or_says_why_it_keeps_them(policy: str) -> None:
    """Muon cannot train a vector of non-zeros."""
    if "muon" not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    for storage in ("csr", "auto"):
        model, optimizer = wrap(storage, policy, "muon")
        train(model, optimizer, 0, 14)
        assert set(optimizer.targets) == {"hidden.weight", "head.weight"}
        for name, how in held(optimizer).items():
            assert how == "masked" and why(optimizer)[name], name
        agree(optimizer, _trained("masked", policy, "muon"), within=1e-9)


def _trained(storage: str, policy: str, optimizer: str) -> st.SparseOptimizer:
    model, wrapped = wrap(storage, policy, optimizer)
    train(model, wrapped, 0, 14)
    return wrapped


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("optimizer", ["lbfgs", "adafactor"])
def test_optimizers_that_look_at_all_weights_together_train(optimizer: str, policy: str) -> None:
    model, wrapped = wrap("csr", policy, optimizer)
    losses = train(model, wrapped, 0, 14)
    assert all(math.isfinite(loss) for loss in losses)
    wrapped.finalize()
    if optimizer == "lbfgs":
        wrapped.base.step(lambda: backward(model, 14))
    else:
        backward(model, 14)
        wrapped.base.step()
