"""Removing channels: the smaller network is the silenced one, and nothing around it is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from channels_networks import NETWORKS, Residual, Stream, images, stacks
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.channels.removal import remove

each_network = pytest.mark.parametrize("name", list(NETWORKS))


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_()
                module.bias.normal_()
    return model.eval(), inputs()


def test_what_goes_together() -> None:
    model, x = made("residual")
    found = {
        c.name: (c.channels, sorted(s.layer for s in c.sides))
        for c in st.channels.couplings(model, x)
    }
    assert found == {
        "stem": (8, ["head", "inner", "last", "norm", "stem"]),
        "inner": (4, ["depthwise", "grouped", "inner", "inner_norm"]),
        "grouped": (4, ["grouped", "last"]),
    }


def test_a_transformer_loses_units_of_its_mlp_alone() -> None:
    model, x = made("tokens")
    assert [c.name for c in st.channels.couplings(model, x)] == ["block.linear1"]


def test_a_width_behind_a_layer_norm() -> None:
    torch.manual_seed(0)
    model, tokens = Stream(), torch.arange(15).view(3, 5) % 11
    (coupling,) = st.channels.couplings(model, tokens)
    assert sorted((s.layer, s.role) for s in coupling.sides) == [
        ("embed", "through"),
        ("head", "in"),
        ("inner", "in"),
        ("inner", "out"),
        ("norm", "through"),
    ]
    result = st.channels.prune(model, tokens, "l1", 0.25)
    kept = [c for c in range(8) if c not in result.removed["inner"]]
    # A norm over fewer channels has other statistics: against the formula, not the silenced one.
    x = model.embed.weight[:, kept][tokens]
    x = x + torch.relu(x @ model.inner.weight[kept][:, kept].T + model.inner.bias[kept])
    x = F.layer_norm(x, (6,), model.norm.weight[kept], model.norm.bias[kept])
    expected = x.mean(1) @ model.head.weight[:, kept].T + model.head.bias
    torch.testing.assert_close(result.model(tokens), expected)


def test_a_group_norm_loses_as_many_of_each_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
    result = st.channels.prune(model, images(), "l1", 0.34)
    gone = result.removed["0"][0]
    kept = [c for c in range(6) if c % 3 != gone]
    assert result.layers == {"0": (6, 4)} and result.model[1].num_channels == 4
    x = F.conv2d(images(), model[0].weight[kept], model[0].bias[kept])
    x = F.group_norm(x, 2, model[1].weight[kept], model[1].bias[kept])
    expected = F.conv2d(x, model[2].weight[:, kept], model[2].bias)
    torch.testing.assert_close(result.model(images()), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(6, 4, 1, groups=2),
        nn.Conv2d(6, 3, 1, groups=3),
        nn.Sequential(nn.LayerNorm((6, 8, 8)), nn.Conv2d(6, 4, 1)),
        nn.Sequential(nn.GroupNorm(2, 6, affine=False), nn.Conv2d(6, 4, 1)),
        nn.Sequential(nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 4, 1)),
    ],
)
def test_channels_before_a_layer_that_cannot_lose_them_stay(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), layer)
    assert st.channels.couplings(model, images()) == []


def test_inputs_may_be_a_mapping() -> None:
    class Named(Residual):
        def forward(self, *, pixels: Tensor) -> Tensor:
            return super().forward(pixels)

    torch.manual_seed(0)
    named = Named()
    plain = Residual()
    plain.load_state_dict(named.state_dict())
    found = st.channels.prune(named, {"pixels": images()}, "l1", 0.5)
    expected = st.channels.prune(plain, images(), "l1", 0.5)
    assert found.removed == expected.removed and found.after == expected.after


@each_network
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
def test_the_smaller_network_gives_what_the_silenced_one_gives(name: str, ratio: float) -> None:
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    result = st.channels.prune(model, x, "l1", ratio)
    silenced = copy.deepcopy(model)
    st.channels.silence(result.removed, st.channels.couplings(silenced, x))
    torch.testing.assert_close(result.model.eval()(x), silenced(x))
    assert not torch.allclose(result.model(x), model(x))
    assert result.removed
    torch.testing.assert_close(model.state_dict(), before)
    assert result.after.parameters == sum(p.numel() for p in result.model.parameters())
    assert result.after.parameters < result.before.parameters
    assert result.after.flops < result.before.flops


@settings(max_examples=25, deadline=None)
@given(model=stacks, data=some.data())
def test_any_channels_of_any_network(model: nn.Module, data: Any) -> None:
    model, x = model.eval(), images()
    found = st.channels.couplings(model, x)
    chosen = {
        c.name: c.removable(
            data.draw(some.permutations(range(c.channels)), label=c.name),
            data.draw(some.integers(0, c.channels)),
        )
        for c in found
    }
    silenced, smaller = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.Adam(smaller.parameters())
    smaller(x).square().sum().backward()
    optimizer.step()
    silenced.load_state_dict(smaller.state_dict())
    st.channels.silence(chosen, st.channels.couplings(silenced, x))
    remove(chosen, st.channels.couplings(smaller, x), optimizer)
    torch.testing.assert_close(smaller(x), silenced(x), rtol=1e-5, atol=1e-5)
    for parameter in smaller.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    rebuilt = st.channels.Architecture.of(smaller).shape(copy.deepcopy(model))
    rebuilt.load_state_dict(smaller.state_dict())
    assert rebuilt(x).equal(smaller(x))
    smaller(x).square().sum().backward()
    optimizer.step()


def test_each_slice_of_the_optimizer_s_state_stays_with_its_channel() -> None:
    model, x = made("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    model.zero_grad()
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    weight = model.inner.weight
    result = st.channels.prune(model, x, "l2", {"inner": 0.5}, optimizer=optimizer, in_place=True)
    assert result.model is model and model.inner.weight is weight
    assert weight.grad is None
    units = [c for c in range(4) if c not in result.removed["inner"]]
    kept = sorted(unit + 4 * group for group in range(3) for unit in units)
    assert model.inner.out_channels == len(kept) == 6
    assert optimizer.state[weight]["momentum_buffer"].equal(before["inner.weight"][kept])
    seen = optimizer.state[model.grouped.weight]["momentum_buffer"]
    assert seen.equal(before["grouped.weight"][:, units])
    model(x).sum().backward()
    optimizer.step()


@each_network
def test_saved_and_built_again(name: str, tmp_path: Any) -> None:
    model, x = made(name)
    result = st.channels.prune(model, x, "l1", 0.5)
    result.save(tmp_path / "architecture.json")
    torch.save(result.model.state_dict(), tmp_path / "weights.pt")
    fresh = NETWORKS[name][0]()
    st.channels.Architecture.load(tmp_path / "architecture.json").shape(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert fresh.eval()(x).equal(result.model.eval()(x))
    again = st.channels.prune(fresh, x, "l1", 0.5).model.eval()
    assert again(x).equal(st.channels.prune(result.model, x, "l1", 0.5).model.eval()(x))


def test_a_file_of_another_network_is_refused(tmp_path: Any) -> None:
    model, x = made("residual")
    architecture = st.channels.prune(model, x).architecture
    other, _ = made("concatenated")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="is the class the same"):
        architecture.shape(other)
    torch.testing.assert_close(other.state_dict(), before)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no architecture file"):
        st.channels.Architecture.load(tmp_path / "other.json")


def test_channels_that_the_model_gives_out_stay() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.first(x)
            return features, self.second(features)

    assert st.channels.couplings(Both(), torch.randn(2, 4)) == []
    with pytest.raises(ValueError, match="no channels that could be removed"):
        st.channels.prune(Both(), torch.randn(2, 4))


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = Residual().train()
    model.stem.weight.requires_grad_(False)
    model.norm.eval()
    state = copy.deepcopy(model.state_dict())
    st.channels.prune(model, images(), "l1", 0.5)
    assert [m.training for m in model.modules()].count(False) == 1 and not model.norm.training
    assert not model.stem.weight.requires_grad
    torch.testing.assert_close(model.state_dict(), state)
    assert all(not m._forward_hooks for m in model.modules())
