"""Scores of whole models, against sums written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curvature_cases import case, largest_error, slow_fisher, slow_hessian
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
Y = torch.tensor([[1.0], [0.0], [-1.0]])


def line() -> nn.Linear:
    """y = w x with w = (0.5, -2), no bias."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, -2.0]])
    return layer


def halves(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, so that a sample's gradient is (output - target) x."""
    return 0.5 * (outputs - targets).square().sum()


#: Errors of `line` are -4.5, 3.5, -1; gradients of the samples:
GRADIENTS = torch.tensor([[-4.5, -9.0], [10.5, -3.5], [0.0, -1.0]])
W = torch.tensor([0.5, -2.0])
BATCHES = [(X[:2], Y[:2]), (X[2:], Y[2:])]


def of_line(score: Any, batches: Any = BATCHES, loss: Any = halves) -> Tensor:
    return st.score(line(), score, batches, loss)["weight"][0]


def test_gradients_of_the_line_are_as_written_down() -> None:
    found = st.curvature.per_sample_gradients(line(), BATCHES, halves)["weight"]
    torch.testing.assert_close(found[:, 0], GRADIENTS)


def test_scores_of_one_weight_each_are_as_written_down() -> None:
    mean = GRADIENTS.mean(0)
    of_batches = torch.stack([GRADIENTS[:2].mean(0), GRADIENTS[2]])
    expected: dict[Any, Tensor] = {
        st.Magnitude(): W.abs(),
        st.Gradient(): mean.abs(),
        st.Taylor(): (W * of_batches).abs().mean(0),
        st.Taylor(squared=True): (W * of_batches).square().mean(0),
        st.Taylor(per="sample"): (W * GRADIENTS).abs().mean(0),
        st.Taylor(per="sample", squared=True): (W * GRADIENTS).square().mean(0),
        st.MovementScore(): -W * mean,
        st.SNIP(): (W * mean).abs() / (W * mean).abs().sum(),
        st.Fisher(): 0.5 * W**2 * GRADIENTS.square().mean(0),
        st.OptimalBrainDamage(): 0.5 * W**2 * X.square().mean(0),
        st.OptimalBrainDamage(curvature="hessian"): 0.5 * W**2 * X.square().mean(0),
        st.Wanda(): W.abs() * X.square().mean(0).sqrt(),
        st.SynFlow(): W.abs(),
    }
    for score, values in expected.items():
        found = of_line(score).float()
        torch.testing.assert_close(found, values, msg=lambda m, s=score: f"{s!r}: {m}")


def test_grasp_is_w_times_h_g_of_the_cooled_loss() -> None:
    temperature = 2.0
    errors = (X @ W) / temperature - Y[:, 0]
    gradient = (errors.unsqueeze(1) * X / temperature).mean(0)
    hessian = X.T @ X / len(X) / temperature**2
    torch.testing.assert_close(of_line(st.GraSP(temperature=temperature)), W * (hessian @ gradient))


def test_removing_what_grasp_ranks_lowest_costs_the_least_gradient_flow() -> None:
    made = case("mlp")
    temperature = 5.0
    scores = st.score(made.model, st.GraSP(temperature=temperature), made.batches, F.cross_entropy)

    def flow(model: nn.Module) -> Tensor:
        grads = torch.autograd.grad(
            F.cross_entropy(model(made.x) / temperature, made.y),
            [p for p in model.parameters() if p.dim() == 2],
        )
        return sum(g.square().sum() for g in grads)

    made.model.eval()
    before, step = float(flow(made.model).detach()), 1e-6
    weight = made.model[0].weight
    for index in range(0, weight.numel(), 7):
        value = float(weight.data.view(-1)[index])
        weight.data.view(-1)[index] = value * (1 - step)
        lost = (before - float(flow(made.model).detach())) / step
        weight.data.view(-1)[index] = value
        assert lost == pytest.approx(2 * float(scores["0.weight"].view(-1)[index]), abs=1e-4)


def test_fisher_and_damage_are_half_the_curvature_times_the_square() -> None:
    made = case("relu")
    weights = {k: p.detach() for k, p in made.model.named_parameters() if p.dim() > 1}

    def half(curvature: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: 0.5 * curvature[k] * w**2 for k, w in weights.items()}

    given = (made.batches, F.cross_entropy)
    fisher = st.score(made.model, st.Fisher(), *given)
    assert largest_error(fisher, half(slow_fisher(made, F.cross_entropy))) < 1e-12
    for curvature in ("ggn", "hessian"):
        damage = st.score(made.model, st.OptimalBrainDamage(curvature=curvature), *given)
        assert largest_error(damage, half(slow_hessian(made, F.cross_entropy))) < 1e-12
    probes = st.OptimalBrainDamage(curvature="hutchinson", probes=2)
    noisy = st.curvature.hessian_diagonal(
        made.model, *given, estimate="hutchinson", probes=2, parameters=weights
    )
    assert any((noisy[k] < 0).any() for k in weights)
    sizes = half({k: h.abs() for k, h in noisy.items()})
    assert largest_error(st.score(made.model, probes, *given), sizes) < 1e-12
    many = st.OptimalBrainDamage(curvature="monte_carlo", probes=400)
    assert largest_error(st.score(made.model, many, *given), damage) < 0.1


def test_synflow_is_the_sum_over_paths_of_magnitudes() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[2].weight.data = torch.tensor([[-5.0, 6.0]])
    found = st.score(model, st.SynFlow(), [X])
    assert found["0.weight"].tolist() == [[5.0, 10.0], [18.0, 24.0]]
    assert found["2.weight"].tolist() == [[15.0, 42.0]]
    assert model[0].weight[0, 1] == -2  # the model keeps its signs


def test_synflow_of_a_deep_net_does_not_overflow() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    for layer in model:
        nn.init.constant_(layer.weight, 10.0)
    found = st.score(model, st.SynFlow(), [torch.zeros(1, 64)])
    assert all(values.isfinite().all() and (values > 0).all() for values in found.values())


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"groups": 2, "dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
)
def test_wanda_of_a_convolution_is_that_of_the_linear_layer_it_is(options: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options)
    x = torch.randn(5, 4, 7, 7)
    found = st.score(conv, st.Wanda(), [x[:2], x[2:]])["weight"]
    # What a weight is multiplied with, by the gradient of the output on it, one place at a time.
    squares = torch.zeros_like(conv.weight)
    outputs = conv(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in outputs.shape)):
        if place[1] % 3 == 0:  # every input of a group is in one of its outputs
            one = torch.autograd.grad(outputs[tuple(place)], conv.weight, retain_graph=True)[0]
            squares += one**2
    for output in range(6):
        squares[output] = squares[output - output % 3]
    torch.testing.assert_close(found, conv.weight.abs() * (squares / 5).sqrt())


def test_wanda_counts_sequences_not_tokens() -> None:
    layer = nn.Linear(2, 1, bias=False)
    x = torch.randn(3, 7, 2)
    found = st.score(layer, st.Wanda(), [x])["weight"]
    norms = x.square().sum((0, 1)).div(3).sqrt()
    torch.testing.assert_close(found, layer.weight.abs() * norms)


class Channels(nn.Module):
    """A convolution with a norm, and a Linear layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 5)
        self.norm.weight.data = torch.tensor([1.0, -2.0, 0.0, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.conv(x)))
        return self.mix(x.flatten(2).transpose(1, 2)).mean(1)


def test_scores_of_channels_are_over_samples_and_positions() -> None:
    torch.manual_seed(0)
    model, x, y = Channels().eval(), torch.randn(6, 1, 5, 5), torch.randint(5, (6,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    outputs = {
        "conv.weight": model.conv(x),
        "mix.weight": model.mix(
            torch.relu(model.norm(model.conv(x))).flatten(2).transpose(1, 2)
        ).transpose(1, 2),
    }
    for name, output in outputs.items():
        values = output.detach().double().transpose(0, 1).flatten(1)
        magnitude = st.score(model, st.ActivationMagnitude(), batches)[name]
        variance = st.score(model, st.ActivationVariance(), batches)[name]
        torch.testing.assert_close(magnitude, values.abs().mean(1))
        torch.testing.assert_close(variance, values.var(1, correction=0))
    scales = st.score(model, st.BatchNormScale())
    assert {k: v.tolist() for k, v in scales.items()} == {"conv.weight": [1.0, 2.0, 0.0, 0.5]}


def test_gate_fisher_is_the_fisher_matrix_of_gates() -> None:
    torch.manual_seed(0)
    model, x, y = Channels().eval(), torch.randn(6, 1, 5, 5), torch.randint(5, (6,))
    found = st.score(model, st.GateFisher(), [(x[:4], y[:4]), (x[4:], y[4:])], F.cross_entropy)
    gates = {"conv.weight": torch.ones(4), "mix.weight": torch.ones(5)}
    expected = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    for i in range(6):
        conv_gate, mix_gate = (gate.clone().requires_grad_() for gate in gates.values())
        hidden = model.conv(x[i : i + 1]) * conv_gate.view(1, -1, 1, 1)
        hidden = torch.relu(model.norm(hidden)).flatten(2).transpose(1, 2)
        loss = F.cross_entropy((model.mix(hidden) * mix_gate).mean(1), y[i : i + 1])
        for name, grad in zip(gates, torch.autograd.grad(loss, [conv_gate, mix_gate]), strict=True):
            expected[name] += grad**2 / 12
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


NEED_LOSS = (
    "gradient",
    "movement",
    "taylor",
    "fisher",
    "optimal_brain_damage",
    "snip",
    "grasp",
    "gate_fisher",
)
NEED_INPUTS = ("wanda", "synflow", "activation_magnitude", "activation_variance")


@pytest.mark.parametrize("kind", [*NEED_LOSS, *NEED_INPUTS])
def test_missing_data_is_told(kind: str) -> None:
    with pytest.raises(ValueError, match=f"score '{kind}' needs data"):
        st.score(line(), kind)
    with pytest.raises(ValueError, match="got no batch"):
        st.score(line(), kind, [], halves)


@pytest.mark.parametrize("kind", NEED_LOSS)
def test_a_missing_loss_is_told(kind: str) -> None:
    with pytest.raises(ValueError, match=f"score '{kind}' needs a loss"):
        st.score(line(), kind, BATCHES)


class Half(nn.Module):
    """One of two layers is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    "kind", [k for k in (*NEED_LOSS, *NEED_INPUTS) if k not in ("grasp", "synflow")]
)
def test_a_weight_that_the_data_do_not_reach_is_named(kind: str) -> None:
    model = Half()
    with pytest.raises(ValueError, match=f"'{kind}' saw nothing of spare.weight"):
        st.score(model, kind, BATCHES, halves)
    assert set(st.score(model, kind, BATCHES, halves, match="used")) == {"used.weight"}


def test_scores_that_are_not_finite_are_named() -> None:
    model = line()
    model.weight.data[0, 1] = float("nan")
    with pytest.raises(ValueError, match="score 'magnitude' of weight is not finite"):
        st.score(model, "magnitude")


def test_names_that_match_nothing_are_told() -> None:
    with pytest.raises(ValueError, match=r"match='usd' names nothing.*did you mean 'used'"):
        st.score(Half(), "magnitude", match=["spare", "usd"])


@pytest.mark.parametrize(
    "kind", ["optimal_brain_damage", "grasp", "synflow", "wanda", "activation_magnitude"]
)
def test_what_needs_data_cannot_be_had_from_a_step(kind: str) -> None:
    model = line()
    score = st.Score.build(kind)
    with pytest.raises(ValueError, match=f"score '{kind}' cannot be computed from a training step"):
        score.of("weight", model.weight, {}, torch.Generator())


def test_fisher_in_training_sums_squared_gradients() -> None:
    torch.manual_seed(0)
    model = line()
    policy = st.Gradual(
        sparsity=0.5, total_steps=4, score=st.Fisher(), update={"every": 1, "start": 3, "stop": 4}
    )
    optimizer = st.SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, policy)
    for i in range(4):
        optimizer.zero_grad()
        halves(model(X[i % 3 : i % 3 + 1]), Y[i % 3 : i % 3 + 1]).backward()
        optimizer.step()
    sums = GRADIENTS[[0, 1, 2, 0]].square().sum(0) * W**2
    assert optimizer.masks()["weight"].tolist() == [
        [bool(sums[0] > sums[1]), bool(sums[1] > sums[0])]
    ]


def test_fisher_remembers_every_step_that_used_the_weight() -> None:
    model, score = line(), st.Fisher()
    model.weight.grad = GRADIENTS[:1].clone()
    first = score.observe("weight", model.weight, None)
    model.weight.grad = None
    assert score.observe("weight", model.weight, first) is first
    model.weight.grad = torch.tensor([[2.0, float("nan")]])
    both = score.observe("weight", model.weight, first)
    assert both is not None
    torch.testing.assert_close(
        both[0], torch.stack([GRADIENTS[0, 0] ** 2 + 4, GRADIENTS[0, 1] ** 2])
    )


def test_the_model_and_its_gradients_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, x, y = Channels().train(), torch.randn(6, 1, 5, 5), torch.randint(5, (6,))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for kind in st.Score.members:
        if kind == "momentum":
            with pytest.raises(ValueError, match="for policies alone"):
                st.score(model, kind)
            continue
        st.score(model, kind, [(x, y)], F.cross_entropy)
        assert model.training
        assert all(p.requires_grad and (p.grad == 1).all() for p in model.parameters())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())
