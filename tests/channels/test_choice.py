"""Which channels are chosen: methods against hand-made examples, counts, and errors."""

from __future__ import annotations

import copy
import sys
from typing import Any, Literal

import pytest
import torch
from channels_networks import Residual, images
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st


def chain() -> nn.Module:
    """Four channels between two convolutions, with known weights."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, -1.0, 2.0, 2.5]).view(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([0.1, 0.7, -0.9, 0.3]))
    return model


X = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.randint(2, (6, 3, 3), generator=torch.Generator().manual_seed(1)))]


@pytest.mark.parametrize(
    ("method", "removed"),
    [
        ("l1", [1, 2]),
        ("l2", [1, 2]),
        ({"kind": "norm", "p": 4}, [1, 2]),
        ("geometric_median", [2, 3]),  # 2 and 2.5 are in the middle of -1, 2, 2.5 and 3
        ("batch_norm_scale", [0, 3]),
        (st.BatchNormScale(), [0, 3]),
        ("magnitude", [1, 2]),
    ],
)
def test_methods_by_hand(method: Any, removed: list[int]) -> None:
    assert st.channels.prune(chain(), X, method, 0.5).removed == {"0": removed}


@pytest.mark.parametrize("name", ["taylor", "fisher", "activation_variance", "gate_fisher"])
def test_scores_that_need_data(name: str) -> None:
    model = chain()
    result = st.channels.prune(model, X, name, 0.5, calibration=DATA, loss_fn=F.cross_entropy)
    found = st.score(model, name, DATA, F.cross_entropy)["0.weight"]
    order = found.reshape(4, -1).sum(1).argsort(stable=True)
    assert result.removed == {"0": sorted(order[:2].tolist())}
    with pytest.raises(ValueError, match=f"score '{name}'"):
        st.channels.prune(model, X, name, 0.5)


def test_random_channels_depend_on_the_seed_alone() -> None:
    found = [
        st.channels.prune(Residual(), images(), "random", 0.5, seed=s).removed for s in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


def test_layers_that_share_channels_add_up() -> None:
    model = Residual()
    with torch.no_grad():
        model.stem.weight.fill_(0.1)
        model.last.weight.zero_()
        model.stem.weight[5] = 0.2
        model.last.weight[2] = 5.0
    removed = st.channels.prune(model, images(), "l1", {"stem": 0.75}).removed
    assert removed == {"stem": [0, 1, 3, 4, 6, 7]}


@pytest.mark.parametrize(
    ("ratio", "round_to", "kept"),
    [(0.5, 1, 4), (0.6, 1, 4), (0.99, 1, 1), (0.6, 3, 6), (0.1, 5, 8)],
)
def test_counts(ratio: float, round_to: int, kept: int) -> None:
    result = st.channels.prune(Residual(), images(), "l1", {"stem": ratio}, round_to=round_to)
    assert result.layers["stem"] == (8, kept)
    assert result.layers["inner"] == (12, 12)
    assert result.model.stem.out_channels == kept


def test_the_first_glob_counts() -> None:
    result = st.channels.prune(Residual(), images(), "l1", {"st*": 0.25, "*": 0.5})
    assert result.layers == {"stem": (8, 6), "inner": (12, 6), "grouped": (12, 6)}


def test_all_layers_compete_and_each_keeps_a_channel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2)
    )
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.fill_(1.0)
        model[2].weight[0] = 500.0  # its mean is far above its other channels
    result = st.channels.prune(model, torch.randn(2, 3), "l1", 0.45, scope="global")
    assert result.layers == {"0": (10, 10), "2": (10, 1)}
    assert result.model[2].weight[0, 0] == 500.0


def test_numbers_below_zero_compete_by_their_size() -> None:
    class Signed(st.channels.Scoring):
        kind: Literal["signed"] = "signed"

        def scores(self, model: Any, couplings: Any, calibration: Any) -> dict[str, Tensor]:
            scores = {"0": [-9.0, -1.0, 1.0, 1.0], "2": [10.0, -10.0, 20.0, 30.0]}
            return {name: torch.tensor(values) for name, values in scores.items()}

    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)]
    method = Signed()
    st.channels.ChannelMethod.members.pop("signed")
    model = nn.Sequential(*layers)
    result = st.channels.prune(model, torch.randn(2, 3), method, 0.3, scope="global")
    assert result.removed == {"0": [0], "2": [1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"ratio 1.0 of '\*' must be in \[0, 1\)"),
        ({"ratio": {"stam": 0.5}}, r"'stam': no layer of that name .*did you mean 'stem'"),
        ({"ratio": {"head": 0.5}}, "'head': no layer of that name can lose channels"),
        ({"ratio": {"stem": 0.5, "*": 0.1}, "scope": "global"}, "has one ratio"),
        ({"round_to": 0}, "round_to=0"),
        ({"method": "l3"}, "no channel method of kind 'l3'"),
        ({"optimizer": True}, "give in_place=True"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = Residual()
    state = copy.deepcopy(model.state_dict())
    if "optimizer" in arguments:
        arguments = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match=message):
        st.channels.prune(model, images(), **arguments)
    torch.testing.assert_close(model.state_dict(), state)


def test_a_method_that_is_none() -> None:
    with pytest.raises(TypeError, match="a channel method or a score, not 3"):
        st.channels.prune(Residual(), images(), 3)  # type: ignore[arg-type]


def test_a_sparse_optimizer_whose_masks_cannot_follow_is_refused() -> None:
    model = Residual()
    policy = st.Static(sparsity=0.9, allocation="uniform")
    optimizer = st.SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, policy, storage="csr"
    )
    with pytest.raises(ValueError, match=r"head\.weight is held as csr: finalize"):
        st.channels.prune(model, images(), optimizer=optimizer, in_place=True)
    learned = Residual()
    st.SparseOptimizer(
        torch.optim.SGD(learned.parameters(), lr=0.1),
        learned,
        st.SoftThreshold(sparsity=0.5, total_steps=9),
    )
    with pytest.raises(ValueError, match="behind a parametrization"):
        st.channels.prune(learned, images())


def test_torch_pruning_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"sparsetrain\[channels\]"):
        st.channels.prune(Residual(), images())


def test_the_report() -> None:
    result = st.channels.prune(Residual(), images(), "l1", 0.5)
    text = str(result)
    assert "stem" in text and f"{result.after.parameters:,}" in text
    assert result.to_dict()["layers"]["inner"] == [12, 6]
