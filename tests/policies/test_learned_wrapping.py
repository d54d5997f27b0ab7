"""Putting learned masks into a model and an optimizer, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from learned_runs import ALL, NATIVE, STEERED, STEPS, answers, train, wrap
from runs import SmallNet, same, weights
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import sparsetrain as st

STRONG = st.HardConcrete(strength=1e-3)


def traces(model: nn.Module) -> list[str]:
    """Parametrizations and hooks that are left."""
    found = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) or module._forward_hooks:
            found.append(name)
    return found


Make = Callable[[nn.Module], torch.optim.Optimizer]
REFUSED: dict[str, tuple[Make, Any, str]] = {
    "one group only": (
        lambda m: torch.optim.LBFGS(m.parameters()),
        STRONG,
        "LBFGS cannot train the gates of policy 'hard_concrete'",
    ),
    "no weight decay": (
        lambda m: torch.optim.Rprop(m.parameters()),
        st.SoftThreshold(strength=0.1),
        "'strength' is the weight decay of its thresholds",
    ),
    "too sparse": (
        lambda m: torch.optim.Adam(m.parameters()),
        st.HardConcrete(sparsity=0.9999, total_steps=10),
        "leaves layers such as 'conv.weight' empty",
    ),
    "no whole groups": (
        lambda m: torch.optim.Adam(m.parameters()),
        st.GumbelSoftmax(structure="2:5"),
        "not divisible by m=5",
    ),
    "a second policy that does not fit": (
        lambda m: torch.optim.Adam(m.parameters()),
        {
            "policy": {"kind": "hard_concrete", "strength": 1e-3},
            "rules": [{"match": "head.*", "policy": {"kind": "nm_sparse", "n": 2, "m": 5}}],
        },
        "not divisible by m=5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_wrap_leaves_no_trace(name: str) -> None:
    make, policy, message = REFUSED[name]
    model = SmallNet()
    base, before = make(model), weights(model)
    groups = [list(group["params"]) for group in base.param_groups]
    with pytest.raises(ValueError, match=message):
        st.SparseOptimizer(base, model, policy)
    assert same(weights(model), before)
    assert not traces(model)
    assert [list(map(id, g["params"])) for g in base.param_groups] == [
        list(map(id, group)) for group in groups
    ]
    again = st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, STRONG)
    train(model, again, 0, 2)


def test_weights_behind_a_parametrization_are_refused() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    recipe = {"rules": [{"match": "0.parametrizations.weight.original1", "policy": STRONG}]}
    with pytest.raises(ValueError, match="behind a parametrization already"):
        st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, recipe)
    assert not parametrize.is_parametrized(model[1])


def test_grouped_convolutions_have_no_input_gates() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"0\.weight: its convolution has groups"):
        policy = st.HardConcrete(strength=0.1, per="input")
        st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, policy)


@pytest.mark.parametrize("per", ["input", "output"])
def test_units_of_a_transposed_convolution(per: Any) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    policy = st.HardConcrete(strength=0.1, per=per)
    optimizer = st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, policy)
    gate = model[0].parametrizations.weight[0].log_alpha
    assert gate.shape == ((3, 1, 1, 1) if per == "input" else (1, 5, 1, 1))
    gate.data.view(-1)[1] = -5.0
    mask = optimizer.masks()["0.weight"]
    assert not (mask[1] if per == "input" else mask[:, 1]).any()
    assert mask.sum() == mask.numel() - mask.numel() // gate.numel()


def test_csr_storage_leaves_learned_weights_dense() -> None:
    model = SmallNet()
    base = torch.optim.Adam(model.parameters())
    optimizer = st.SparseOptimizer(base, model, STRONG, storage="csr")
    assert {row.storage for row in optimizer.summary().rows} == {"learned"}
    assert optimizer.summary().rows[0].why == "masks are learned on dense weights"
    built = nn.Sequential(st.storage.SparseLinear(8, 8, density=0.5))
    with pytest.raises(ValueError, match="masks are learned on dense weights"):
        st.SparseOptimizer(torch.optim.Adam(built.parameters()), built, STRONG)


def test_groups_that_come_later() -> None:
    model = SmallNet()
    base = torch.optim.Adam(model.head.parameters(), lr=0.01)
    optimizer = st.SparseOptimizer(base, model, STRONG)
    assert set(optimizer.targets) == {"head.weight"}
    optimizer.add_param_group({"params": [model.conv.weight, model.hidden.weight], "lr": 0.02})
    assert set(optimizer.targets) == {"head.weight", "conv.weight", "hidden.weight"}
    assert len(base.param_groups) == 4
    train(model, optimizer, 0, 3)
    before = answers(model)
    optimizer.finalize()
    assert len(base.param_groups) == 2 and not traces(model)
    torch.testing.assert_close(answers(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda base: torch.optim.lr_scheduler.OneCycleLR(base, 0.01, total_steps=STEPS),
        lambda base: torch.optim.lr_scheduler.CosineAnnealingLR(base, STEPS),
        lambda base: torch.optim.lr_scheduler.ExponentialLR(base, 0.9),
    ],
)
def test_schedulers_that_were_there_before(make: Any) -> None:
    model = SmallNet()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = make(base)
    optimizer = st.SparseOptimizer(base, model, STEERED["hard_concrete"])
    ratio = base.param_groups[1]["lr"] / base.param_groups[0]["lr"]
    for step in range(5):
        train(model, optimizer, step, step + 1)
        scheduler.step()
        now = [group["lr"] for group in base.param_groups]
        assert now[1] / now[0] == pytest.approx(ratio)


def test_a_skipped_step_moves_nothing() -> None:
    model, optimizer = wrap(STEERED["hard_concrete"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    before = weights(model)
    F.cross_entropy(model(torch.full((8, 4, 4, 4), torch.inf)), torch.zeros(8).long())
    loss = model.head.weight.sum() * torch.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    gates = [name for name in before if name.endswith(("log_alpha", "original"))]
    assert all(torch.equal(weights(model)[name], before[name]) for name in gates)
    assert optimizer.step_count == 0


@pytest.mark.parametrize("name", ALL)
def test_half_precision_weights_have_gates_of_full_precision(name: str) -> None:
    model = SmallNet().bfloat16()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = st.SparseOptimizer(base, model, ALL[name])
    for _ in range(8):
        optimizer.zero_grad()
        x = torch.randn(8, 4, 4, 4, dtype=torch.bfloat16)
        F.cross_entropy(model(x), torch.randint(3, (8,))).backward()
        optimizer.step()
    gates = [p for group in base.param_groups[1:] for p in group["params"]]
    assert {gate.dtype for gate in gates} == {torch.float32}
    model.eval()
    x = torch.randn(8, 4, 4, 4, dtype=torch.bfloat16)
    before = model(x)
    optimizer.finalize()
    assert torch.equal(model(x), before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.first(x)))
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("name", ALL)
def test_tied_weights_and_attention(name: str) -> None:
    policy = ALL[name]
    model = Tied()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    if getattr(policy, "sampling", "") == "example":
        with pytest.raises(ValueError, match=r"attention\.\w+.*plain Linear"):
            st.SparseOptimizer(base, model, policy)
        return
    optimizer = st.SparseOptimizer(base, model, policy)
    assert set(optimizer.targets) == {
        "first.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8)).square().mean().backward()
        optimizer.step()
    model.eval()
    x = torch.randn(4, 3, 8)
    before = model(x)
    optimizer.finalize()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize("name", ["variational_dropout", "weight_noise"])
def test_noise_reaches_attention(name: str) -> None:
    model = Tied()
    st.SparseOptimizer(torch.optim.AdamW(model.parameters()), model, NATIVE[name])
    x = torch.randn(4, 3, 8)
    for part in (model.attention.out_proj, model.attention):
        learned = part.parametrizations.values().__iter__().__next__()[0]
        learned.log_sigma2.data.fill_(0.0)
        assert not torch.allclose(model(x), model(x), atol=1e-3)
        learned.log_sigma2.data.fill_(-30.0)
