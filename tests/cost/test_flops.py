"""FLOPs against numbers worked out by hand (Evci et al. 2020, appendix H)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import STEPS, SmallNet, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.workbench.networks import build

# 2 multiply-adds x outputs x inputs of one output; the convolution has 2 x 2 positions.
SMALL = {
    "conv.weight": 2 * (8 * 2 * 2) * (4 * 3 * 3),
    "hidden.weight": 2 * 16 * 32,
    "head.weight": 2 * 3 * 16,
}
DENSE = sum(SMALL.values())
INPUTS = torch.zeros(2, 4, 4, 4)


def trained(
    policy: Any, steps: int = 12
) -> tuple[SmallNet, st.SparseOptimizer, list[dict[str, float]]]:
    """A network after so many steps, and the density of each layer during each of them."""
    model = SmallNet()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = st.SparseOptimizer(base, model, policy)
    densities = []
    for step in range(steps):
        masks = optimizer.masks()
        densities.append({n: masks[n].float().mean().item() if n in masks else 1.0 for n in SMALL})
        train(model, optimizer, step, step + 1)
    return model, optimizer, densities


def cost(densities: dict[str, float]) -> float:
    """Forward FLOPs of the small network at these densities."""
    return sum(SMALL[name] * density for name, density in densities.items())


def multiple(optimizer: st.SparseOptimizer, model: nn.Module) -> float:
    return st.cost.training_flops(optimizer, model, INPUTS).training_multiple


def test_lenet_300_100() -> None:
    model = build("lenet_300_100", in_shape=(1, 28, 28), classes=10)
    report = st.cost.flops(model, torch.zeros(3, 1, 28, 28))
    assert report.layers == {
        "fc1.weight": 470_400,  # 2 x 784 x 300
        "fc2.weight": 60_000,  # 2 x 300 x 100
        "fc3.weight": 2_000,  # 2 x 100 x 10
    }
    assert report.total == 532_400


def test_lenet_5() -> None:
    model = build("lenet_5", in_shape=(1, 28, 28), classes=10)
    assert st.cost.flops(model, torch.zeros(2, 1, 28, 28)).layers == {
        "conv1.weight": 576_000,  # 2 x (20 x 24 x 24) x (1 x 5 x 5)
        "conv2.weight": 3_200_000,  # 2 x (50 x 8 x 8) x (20 x 5 x 5)
        "fc1.weight": 800_000,  # 2 x 800 x 500
        "fc2.weight": 10_000,  # 2 x 500 x 10
    }


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 5), (3, 6), 2 * 5 * 6),
        (nn.Linear(6, 5), (3, 7, 6), 7 * 2 * 5 * 6),
        (nn.Conv1d(2, 4, 3), (3, 2, 10), 2 * (4 * 8) * (2 * 3)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), (3, 2, 9, 9), 2 * (4 * 5 * 5) * (2 * 9)),
        (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 6, 6), 2 * (4 * 4 * 4) * 9),
        (nn.Conv2d(2, 4, 3, dilation=2), (3, 2, 6, 6), 2 * (4 * 2 * 2) * (2 * 9)),
        (nn.Conv3d(2, 4, 3), (3, 2, 5, 5, 5), 2 * (4 * 27) * (2 * 27)),
        (nn.ConvTranspose1d(2, 4, 3), (3, 2, 10), 2 * (2 * 10) * (4 * 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (3, 4, 5, 5), 2 * (4 * 25) * (3 * 9)),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert st.cost.flops(layer, torch.zeros(shape)).layers == {"weight": expected}


def test_attention_counts_its_four_projections() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    query, context = torch.zeros(3, 5, 8), torch.zeros(3, 7, 8)
    report = st.cost.flops(model, (query, context, context))
    assert report.layers == {
        "in_proj_weight": 2 * 8 * 8 * (5 + 7 + 7),
        "out_proj.weight": 2 * 8 * 8 * 5,
    }
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    report = st.cost.flops(model, (query, torch.zeros(3, 7, 6), torch.zeros(3, 7, 4)))
    assert report.layers == {
        "q_proj_weight": 2 * 8 * 8 * 5,
        "k_proj_weight": 2 * 8 * 6 * 7,
        "v_proj_weight": 2 * 8 * 4 * 7,
        "out_proj.weight": 2 * 8 * 8 * 5,
    }


def test_a_transformer_layer_in_its_fast_path_is_counted_whole() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layers = st.cost.flops(model, torch.zeros(3, 5, 8)).layers
    assert sum(layers.values()) == 2 * 5 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)


class Twice(nn.Module):
    """Uses one layer twice, and the same weight again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.fc.weight
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.fc(self.fc(x)))


def test_each_use_counts_and_a_layer_that_never_ran_does_not() -> None:
    assert st.cost.flops(Twice(), torch.zeros(2, 6)).layers == {"fc.weight": 3 * 72}
    with pytest.raises(ValueError, match="no Linear, Conv or attention layer"):
        st.cost.flops(nn.LayerNorm(6), torch.zeros(2, 6))


@pytest.mark.parametrize("batch", [1, 7])
def test_cost_is_per_sample_and_counting_leaves_the_model_alone(batch: int) -> None:
    model = SmallNet()
    model.hidden.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert st.cost.flops(model, torch.randn(batch, 4, 4, 4)).layers == SMALL
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.norm.training and not model.hidden.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "policy",
    [
        st.Static(sparsity=0.9, allocation="uniform"),
        st.Static(sparsity=0.9, allocation="erdos_renyi_kernel"),
        st.Gradual(sparsity=0.9, total_steps=12, update={"every": 2}),
    ],
)
def test_inference_costs_the_present_density_of_each_layer(policy: st.Policy) -> None:
    model, optimizer, densities = trained(policy)
    report = st.cost.training_flops(optimizer, model, INPUTS)
    assert report.dense_inference == DENSE
    assert report.inference_multiple == pytest.approx(cost(densities[-1]) / DENSE)


def test_before_the_first_step_training_is_priced_at_the_present_density() -> None:
    model, optimizer, _ = trained(st.Static(sparsity=0.9), steps=0)
    report = st.cost.training_flops(optimizer, model, INPUTS)
    assert report.training_multiple == pytest.approx(report.inference_multiple)


def test_layers_held_dense_cost_three_dense_passes() -> None:
    recipe = {
        "policy": {"kind": "static", "sparsity": 0.75, "allocation": "uniform"},
        "rules": [{"match": "conv", "dense": True}],
    }
    model, optimizer, _ = trained(recipe)
    expected = (SMALL["conv.weight"] + (SMALL["hidden.weight"] + SMALL["head.weight"]) / 4) / DENSE
    assert multiple(optimizer, model) == pytest.approx(expected)


UPDATES: dict[str, Any] = {"total_steps": 12, "update": {"every": 4, "stop": 1.0}}


@pytest.mark.parametrize("policy", [st.Static(sparsity=0.8), st.SET(sparsity=0.8, **UPDATES)])
def test_static_and_set_cost_three_sparse_passes(policy: st.Policy) -> None:
    model, optimizer, densities = trained(policy)
    assert multiple(optimizer, model) == pytest.approx(cost(densities[0]) / DENSE)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_rigl_costs_the_papers_mean(sparsity: float) -> None:
    model, optimizer, densities = trained(st.RigL(sparsity=sparsity, **UPDATES))
    sparse, between = cost(densities[0]), 3  # delta T gradient steps between two updates
    paper = (3 * sparse * between + 2 * sparse + DENSE) / (between + 1)
    assert multiple(optimizer, model) == pytest.approx(paper / (3 * DENSE))


def test_rigl_that_stops_early_costs_its_updates_only() -> None:
    policy = st.RigL(sparsity=0.8, total_steps=12, update={"every": 2, "start": 1, "stop": 6})
    model, optimizer, densities = trained(policy)
    sparse = cost(densities[0])
    expected = (9 * 3 * sparse + 3 * (2 * sparse + DENSE)) / (12 * 3 * DENSE)
    assert multiple(optimizer, model) == pytest.approx(expected)


@pytest.mark.parametrize("stop", [12, 5])
def test_snfs_costs_a_dense_gradient_until_its_last_update(stop: int) -> None:
    policy = st.SNFS(sparsity=0.8, total_steps=12, update={"every": 2, "stop": stop})
    model, optimizer, densities = trained(policy)
    assert densities[0] != densities[-1], "no density moved between layers"
    spent = [2 * cost(d) + (DENSE if t < stop else cost(d)) for t, d in enumerate(densities)]
    assert multiple(optimizer, model) == pytest.approx(sum(spent) / (12 * 3 * DENSE))


@pytest.mark.parametrize("every", [1, 4])
def test_gradual_costs_the_mean_density_of_its_curve(every: int) -> None:
    policy = st.Gradual(
        sparsity=0.9,
        initial_sparsity=0.2,
        total_steps=12,
        allocation="uniform",
        update={"every": every, "stop": 1.0},
    )
    model, optimizer, _ = trained(policy)
    last = 11 // every * every
    updates = [t // every * every for t in range(12)]
    # The step of an update still runs at the sparsity before it.
    curve = [0.2, *(0.9 + (0.2 - 0.9) * (1 - t / last) ** 3 for t in updates[:-1])]
    paper = sum(3 * DENSE * (1 - s) for s in curve) / 12
    # Each layer's density is rounded to whole weights, at worst one of the head's 48.
    assert multiple(optimizer, model) == pytest.approx(paper / (3 * DENSE), abs=2e-3)


@pytest.mark.parametrize(
    "policy", [st.NMSparse(n=1, m=4), st.DynamicNetworkSurgery(sparsity=0.8, total_steps=12)]
)
def test_latent_weights_cost_a_dense_gradient_always(policy: st.Policy) -> None:
    model, optimizer, densities = trained(policy)
    spent = sum(2 * cost(d) + DENSE for d in densities)
    assert multiple(optimizer, model) == pytest.approx(spent / (12 * 3 * DENSE))


def test_a_resumed_run_is_counted_whole() -> None:
    policy = st.SNFS(sparsity=0.8, total_steps=STEPS, update={"every": 3})
    model, optimizer, _ = trained(policy, steps=STEPS)
    first_model, first, _ = trained(policy, steps=5)
    again, resumed, _ = trained(policy, steps=0)
    again.load_state_dict(first_model.state_dict())
    resumed.load_state_dict(first.state_dict())
    train(again, resumed, 5, STEPS)
    assert multiple(resumed, again) == pytest.approx(multiple(optimizer, model))


def test_a_layer_made_sparse_later_was_not_free_before() -> None:
    model = SmallNet()
    base = torch.optim.SGD(model.hidden.parameters(), lr=0.05)
    optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.5, allocation="uniform"))
    train(model, optimizer, 0, 3)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    train(model, optimizer, 3, 4)
    now, mean, _ = optimizer.density_history("head.weight")
    assert now == 0.5
    assert now <= mean <= 1


def test_behind_learned_masks() -> None:
    """Names are those of the plain model; training is dense, inference has what is kept."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    attention = nn.MultiheadAttention(8, 2)
    x, tokens = torch.randn(2, 1, 8, 8), torch.randn(3, 1, 8)
    dense = st.cost.flops(model, x).layers
    of_attention = st.cost.flops(attention, (tokens, tokens, tokens)).layers
    policy = st.HardConcrete(strength=0.1)
    st.SparseOptimizer(torch.optim.Adam(attention.parameters()), attention, policy)
    assert st.cost.flops(attention, (tokens, tokens, tokens)).layers == of_attention
    optimizer = st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, policy)
    assert st.cost.flops(model, x).layers == dense
    model[2].parametrizations.weight[0].log_alpha.data[:5] = -9.0
    model(x).sum().backward()
    optimizer.step()
    counted = st.cost.training_flops(optimizer, model, x)
    assert counted.training_multiple == 1.0
    share = (dense["0.weight"] + dense["2.weight"] / 2) / sum(dense.values())
    assert counted.inference_multiple == pytest.approx(share)
