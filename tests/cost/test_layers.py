"""The list of layers that costs are computed from."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparsetrain as st
from sparsetrain.cost.layers import layers_used
from sparsetrain.workbench.networks import build


class Branched(nn.Module):
    """Groups, strides, dilation, a transposed convolution, tokens and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.depthwise(self.first(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0])


def test_sizes_are_those_of_the_tensors() -> None:
    used = {use.layer: use for use in layers_used(Branched(), torch.randn(2, 3, 10, 12))}
    first, depthwise, grouped, up = (used[n] for n in ("first", "depthwise", "grouped", "up"))
    assert (first.inputs, first.outputs, first.kernel) == (3, 8, (3, 3))
    assert first.padding == (2, 2) and first.in_size == first.out_size == (10, 12)
    assert (depthwise.groups, depthwise.out_size, depthwise.has_bias) == (8, (5, 6), False)
    assert depthwise.weights == 8 * 9 and depthwise.macs == 8 * 9 * 30
    assert grouped.weights == 12 * 2
    assert up.in_size == (5, 6) and up.out_size == (10, 12) and up.macs == 12 * 6 * 4 * 30
    assert used["head"].repeats == 120 and used["attention.out_proj"].weights == 36


def test_products_agree_with_torch() -> None:
    x = torch.randn(1, 3, 10, 12)
    model = Branched().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.first(x), model.depthwise(model.first(x))
    ours = {use.layer: use.flops for use in layers_used(model, x)}
    assert counter.get_total_flops() == 2 * ours["first"] + ours["depthwise"]


def test_torch_and_we_count_a_whole_network_alike() -> None:
    x = torch.randn(1, 1, 28, 28)
    model = build("resnet_small", in_shape=(1, 28, 28), classes=10).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert sum(use.flops for use in layers_used(model, x)) == counter.get_total_flops()


def test_density_is_that_of_the_weight_as_it_is_used() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    st.prune(model, "magnitude", 0.75).apply()
    assert [use.density for use in layers_used(model, torch.randn(1, 8))] == [0.25, 0.25]
    assert layers_used(st.compress(model), torch.randn(1, 8))[0].density == 0.25
    learned = nn.Sequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
    st.SparseOptimizer(optimizer, learned, st.SoftThreshold(strength=1e-4, initial=-1.5))
    with torch.no_grad():
        kept = int(learned.eval()[0].weight.count_nonzero())
    (use,) = layers_used(learned, torch.randn(1, 8))
    assert use.name == "0.weight" and 0 < kept < 32 and use.density == kept / 32


def test_a_shared_weight_is_noted_at_each_use() -> None:
    layer = nn.Linear(4, 4)
    used = layers_used(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 4))
    assert [use.layer for use in used] == ["0", "0"]
    assert st.cost.flops(nn.Sequential(layer, layer), torch.randn(3, 4)).total == 2 * 2 * 16


def test_a_layer_without_values_counts_as_dense() -> None:
    model = nn.Linear(4, 2, device="meta")
    (use,) = layers_used(model, torch.randn(1, 4, device="meta"))
    assert use.density == 1.0 and use.flops == 16


def test_modes_and_hooks_are_as_before() -> None:
    model = Branched().train()
    layers_used(model, torch.randn(1, 3, 10, 12))
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_numbers_that_move() -> None:
    use = layers_used(nn.Conv2d(2, 4, 3), torch.randn(5, 2, 8, 8))[0]
    assert use.input_numbers == 2 * 64 and use.output_numbers == 4 * math.prod((6, 6))


def test_a_model_without_products_is_refused() -> None:
    with pytest.raises(ValueError, match="no Linear, Conv or attention layer"):
        layers_used(nn.ReLU(), torch.randn(1, 4))
