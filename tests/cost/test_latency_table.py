"""Latency tables, on machines whose times are known functions."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from latency_machines import SPARSITIES, FakeMachine, X, curved, first, network, table_of
from torch import nn

import sparsetrain as st
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.lookup.layers import Case, Shape, axis
from sparsetrain.cost.lookup.uses import InNetwork, Measured, ShapeLatency
from sparsetrain.storage.csr.layers import SparseLinear


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(network(), X, curved).install(monkeypatch)


# Between the points


def test_grid_points_are_exact(machine: FakeMachine) -> None:
    table = table_of(machine)
    for inputs in (8, 16, 20):
        for outputs in (8, 16, 24, 28):
            expected = 1e-6 * (100 + inputs**2 * outputs)
            assert table.layer_seconds(first(inputs, outputs)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "inputs, outputs, expected",
    [
        (12, 8, (64 * 8 + 256 * 8) / 2),
        (18, 8, (256 * 8 + 400 * 8) / 2),
        (16, 26, 256 * 26),
        (12, 12, (64 * 12 + 256 * 12) / 2),
        (10, 20, (3 * 64 * 20 + 256 * 20) / 4),
        (3, 2, 64 * 8),  # below the smallest point
    ],
)
def test_between_points_it_is_bilinear(machine, inputs: int, outputs: int, expected: float) -> None:
    seconds = table_of(machine).layer_seconds(first(inputs, outputs), "dense")
    assert seconds == pytest.approx(1e-6 * (100 + expected), rel=1e-9)


def test_more_channels_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(network(200), X, lambda u, c: 1e-6 * c.inputs * c.outputs**0.5)
    table = table_of(machine.install(monkeypatch), storages=("dense",))

    @settings(max_examples=50, deadline=None)
    @given(some.integers(1, 200), some.integers(1, 200))
    def check(one: int, other: int) -> None:
        less, more = sorted((one, other))
        narrow, wide = (table.seconds([first(20, 20 + 180 * n // 200)]) for n in (less, more))
        assert narrow <= wide

    check()


def test_axes_are_multiples_and_the_full_width() -> None:
    assert axis(20, 8) == [8, 16, 20] and axis(16, 8) == [8, 16] and axis(5, 8) == [5]
    assert axis(30, 8, of=6) == [24, 30]
    wide = axis(1024, 8)
    assert wide[0] == 8 and wide[-1] == 1024 and len(wide) <= 12
    assert all(points % 8 == 0 for points in wide) and max(b / a for a, b in pairwise(wide)) <= 2


# Whole networks


def test_a_network_is_the_sum_of_its_layers_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(
        network(),
        X,
        lambda u, c: 1e-6 * c.inputs * c.outputs,
        colder=1.5,
        rest=lambda n, s: 1e-5 * n,
        before=4e-4,
    ).install(monkeypatch)
    table = table_of(machine, storages=("dense",))
    for width in (8, 12, 21, 28):
        model = network(width)
        by_hand = 1.5e-6 * (20 * width + width * 10) + 1e-5 * (width + 10) + 4e-4
        assert machine.seconds(model) == pytest.approx(by_hand)
        assert table.predict(model, X) == pytest.approx(by_hand, rel=1e-9)


def test_a_machine_that_slows_down_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(network(), X, curved, speeds=(1.0, 3.0)).install(monkeypatch)
    table = table_of(machine)
    assert machine.parts == 2
    for layers in (layers_used(network(), X), layers_used(network(16), X)):
        assert table.seconds(layers, ["dense"] * 2) == pytest.approx(
            sum(curved(u, Case("dense", False, u.inputs, u.outputs)) for u in layers), rel=1e-9
        )


def test_every_width_is_seen_in_a_network(machine: FakeMachine) -> None:
    table_of(machine, storages=("dense",))
    assert {sized.uses[0].outputs for sized in machine.networks} == {8, 16, 24, 28}


def test_without_torch_pruning_the_rest_goes_with_the_outputs(monkeypatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError

    monkeypatch.setattr("sparsetrain.channels.couplings", missing)
    machine = FakeMachine(network(), X, curved, rest=lambda n, s: 1e-3 * n)
    table = table_of(machine.install(monkeypatch), storages=("dense",))
    assert len(machine.networks) == 1
    expected = machine.seconds(network(16))
    assert table.predict(network(16), X) == pytest.approx(expected, rel=1e-9)


def test_a_weight_that_runs_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(20, 20)
    machine = FakeMachine(nn.Sequential(layer, nn.ReLU(), layer), X, curved, before=1e-3)
    table = table_of(machine.install(monkeypatch))
    assert len(table.measured) == 1  # equal shapes are measured once
    both = layers_used(machine.model, X)
    assert table.seconds(both) == pytest.approx(1e-3 + 2 * 1e-6 * (100 + 20**3), rel=1e-9)


def test_a_layer_costs_a_constant_more_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(network(), X, lambda u, c: 1e-6 * c.inputs * c.outputs, 1.5, extra=1e-4)
    table = table_of(machine.install(monkeypatch), storages=("dense",))
    for width in (8, 16, 28):
        expected = machine.seconds(network(width))
        assert table.predict(network(width), X) == pytest.approx(expected, rel=0.1)
        alone = 1e-6 * 20 * width
        assert table.layer_seconds(first(20, width)) == pytest.approx(1.5 * alone + 1e-4, rel=0.2)


def test_in_a_network_layers_take_as_much_longer_as_others_of_their_size() -> None:
    assert InNetwork()(3.0) == 3.0
    assert InNetwork([(1.0, 2.0)])(5.0) == pytest.approx(10.0)
    far_apart = InNetwork([(1.0, 2.0), (100.0, 100.0)])
    for alone, expected in ((1.0, 2.0), (1e-6, 2e-6), (100.0, 100.0), (1e6, 1e6), (10.0, 15.0)):
        assert far_apart(alone) == pytest.approx(expected)
    assert InNetwork([(1e-9, 2e-9), (1e9, 2e9)])(1.1) == pytest.approx(2.2)
    near = InNetwork([(1.0, 2.0), (1.0, 3.0), (1.01, 4.03)])
    assert near(1.0) == pytest.approx(3.0, rel=0.01)


def test_what_is_before_a_layer_matters_in_a_network_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself a layer takes as long after a dense one as after a sparse one."""
    machine = FakeMachine(
        network(), X, lambda u, c: curved(u, c._replace(after_csr=False)), colder_after_csr=4.0
    )
    table = table_of(machine.install(monkeypatch))
    layers = layers_used(sparse_network(0.9, 0.9), X)
    csr, dense = (curved(layers[1], Case(held, False, 28, 10, 0.9)) for held in ("csr", "dense"))
    for before, factor in (("dense", 1), ("csr", 4)):
        difference = table.seconds(layers, [before, "csr"]) - table.seconds(
            layers, [before, "dense"]
        )
        assert difference == pytest.approx(factor * (csr - dense))


def test_a_storage_that_is_slower_alone_gains_nothing_from_not_being_tried(monkeypatch) -> None:
    def alone(use: LayerUse, case: Case) -> float:
        return 6e-6 if case.storage == "csr" else 5e-6

    machine = FakeMachine(network(), X, alone, colder=3.0).install(monkeypatch)
    table = table_of(machine)
    assert all(sized.storages == ["dense", "dense"] for sized in machine.networks)
    assert table.storage_of(first(20, 28, 0.1)) == "dense"
    assert table.layer_seconds(first(20, 28, 0.1), "csr") == pytest.approx(18e-6)


def test_layers_count_in_seconds_of_the_whole_network() -> None:
    """A shape that was measured while the machine was twice as slow."""
    use = dataclasses.replace(first(4, 4), name="", layer="")
    measured = Measured(Shape(use), (Case("dense", False, 4, 4),), 2.0, (0.5,))
    assert ShapeLatency(measured, reference=1.0).dense(use) == 0.25


def test_a_weight_that_runs_twice_has_one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(use: LayerUse, case: Case) -> float:  # a sparse layer after another one is slow
        return 1e-6 * (30 if case.after_csr else 1) if case.storage == "csr" else 9e-6

    layer = nn.Linear(20, 20)
    machine = FakeMachine(nn.Sequential(layer, nn.ReLU(), layer), X, alone).install(monkeypatch)
    table = table_of(machine)
    sparse = [dataclasses.replace(use, density=0.1) for use in layers_used(machine.model, X)]
    assert table.storages(sparse) == ["csr", "csr"]
    assert table.seconds(sparse) == pytest.approx(31e-6)


# Storages


def test_csr_is_linear_in_the_density(machine: FakeMachine) -> None:
    table = table_of(machine)
    for density in (0.1, 0.3, 0.5):
        expected = 2e-6 * (300 + 20 * density * 20 * 28)
        assert table.layer_seconds(first(20, 28, density), "csr") == pytest.approx(expected)
    # Sparser than measured: as at the highest sparsity.
    assert table.layer_seconds(first(20, 28, 0.01), "csr") == pytest.approx(2e-6 * 1420)


def test_csr_of_fewer_channels_goes_with_the_weights(machine: FakeMachine) -> None:
    seconds = table_of(machine).layer_seconds(first(10, 14, 0.1), "csr")
    assert seconds == pytest.approx(2e-6 * (300 + 20 * 0.1 * 20 * 28) / 4)


def test_the_quicker_storage_is_chosen(machine: FakeMachine) -> None:
    table = table_of(machine)
    # dense takes 11300 us, csr 600 + 22400 density
    assert [table.storage_of(first(20, 28, d)) for d in (0.1, 0.47, 0.48, 0.5, 1.0)] == [
        *["csr"] * 2,
        *["dense"] * 3,
    ]
    assert table.layer_seconds(first(20, 28, 0.1)) == pytest.approx(2840e-6)
    assert table.layer_seconds(first(20, 28, 0.1), "dense") == pytest.approx(11300e-6)


def test_denser_than_measured_there_is_no_csr(machine: FakeMachine) -> None:
    table = table_of(machine, sparsities=(0.8, 0.9))
    assert table.storage_of(first(20, 28, 0.21)) == "dense"
    with pytest.raises(
        ValueError, match=r"0\.weight was not measured in csr storage at a density of 0.21"
    ):
        table.layer_seconds(first(20, 28, 0.21), "csr")


def test_a_layer_after_a_sparse_one_takes_its_layout(machine: FakeMachine) -> None:
    table = table_of(machine)
    layers = [
        dataclasses.replace(u, density=d)
        for u, d in zip(layers_used(network(), X), (0.1, 0.5), strict=True)
    ]
    dense_first = table.seconds(layers, ["dense", "csr"]) - table.seconds(
        layers, ["dense", "dense"]
    )
    sparse_first = table.seconds(layers, ["csr", "csr"]) - table.seconds(layers, ["csr", "dense"])
    alone = 300 + 20 * 0.5 * 280
    dense = 100 + 28**2 * 10
    assert dense_first == pytest.approx(1e-6 * (2 * alone - dense))
    assert sparse_first == pytest.approx(1e-6 * (alone - 3 * dense))


def sparse_network(*sparsities: float) -> nn.Sequential:
    model = network()
    for layer, sparsity in zip((model[0], model[2]), sparsities, strict=True):
        with torch.no_grad():
            layer.weight.view(-1)[: round(sparsity * layer.weight.numel())] = 0
    return model


@pytest.mark.parametrize(
    "sparsities, held", [((0.9, 0.0), [0]), ((0.0, 0.9), [2]), ((0.9, 0.6), [0, 2]), ((0, 0), [])]
)
def test_compress_holds_sparse_what_is_quicker_so(machine, sparsities, held: list[int]) -> None:
    table, model = table_of(machine), sparse_network(*sparsities)
    fast = table.compress(model)
    assert [n for n in (0, 2) if isinstance(fast[n], SparseLinear)] == held
    torch.testing.assert_close(fast(X), model(X))
    assert not any(isinstance(module, SparseLinear) for module in model)
    assert table.predict(model, X) == table.predict(fast, X) == pytest.approx(machine.seconds(fast))
    assert type(table.compress(fast)[0]) is type(fast[0])


def test_what_follows_a_sparse_layer_takes_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(
        network(), X, curved, rest=lambda n, storage: 1e-5 * n * (7 if storage == "csr" else 1)
    )
    table, model = table_of(machine.install(monkeypatch)), sparse_network(0.9, 0.0)
    fast = table.compress(model)
    assert isinstance(fast[0], SparseLinear)
    assert table.predict(model, X) == pytest.approx(machine.seconds(fast))


def test_a_shared_weight_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    model[2].weight = model[0].weight
    machine = FakeMachine(model, X, curved).install(monkeypatch)
    with pytest.warns(UserWarning, match="no narrower copies of the network could be timed"):
        table = table_of(machine)
    assert {case.storage for case in machine.measured} == {"dense"}
    with torch.no_grad():
        model[0].weight[:19] = 0
    assert not any(isinstance(module, SparseLinear) for module in table.compress(model))


def test_only_dense_is_measured_if_asked(machine: FakeMachine) -> None:
    table = table_of(machine, storages=("dense",))
    assert {case.storage for case in machine.measured} == {"dense"}
    assert table.storage_of(first(20, 28, 0.01)) == "dense"


# Other layers


class Mixed(nn.Module):
    """Depthwise, grouped and transposed convolutions, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding="same")
        self.depthwise = nn.Conv2d(16, 32, 3, stride=2, groups=16, bias=False)
        self.grouped = nn.Conv2d(32, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.grouped(self.depthwise(self.stem(x))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_other_layers_run_as_they_do_in_the_network(monkeypatch, channels_last: bool) -> None:
    model, x = Mixed(), torch.randn(2, 3, 11, 9)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    seen = {}

    class Watching(st.cost.lookup.layers.LayerJob):
        def __call__(self) -> None:
            seen[self.shape, self.case] = (self.x, self.module(self.x))

    monkeypatch.setattr(st.cost.lookup.layers, "LayerJob", Watching)
    monkeypatch.setattr("latency_machines.LayerJob", Watching)
    machine = FakeMachine(model, x, lambda u, c: 1e-6 * c.inputs * c.outputs)
    table = table_of(machine.install(monkeypatch), sparsities=(0.9,))
    for shape, case in seen:
        given, out = seen[shape, case]
        use = shape.use
        assert out.shape[1:] == (case.outputs, *use.out_size)
        assert len(out) == round(2 * use.repeats)
        if use.kind != "linear":
            is_last = given.is_contiguous(memory_format=torch.channels_last)
            assert shape.channels_last == channels_last and (is_last or not channels_last)
    depthwise = {c.inputs: c.outputs for s, c in seen if s.use.groups == 16}
    assert depthwise == {8: 16, 16: 32}
    uses = layers_used(model, x)
    assert table.predict(model, x) == pytest.approx(sum(1e-6 * u.inputs * u.outputs for u in uses))
    half = dataclasses.replace(uses[1], inputs=12, outputs=24, groups=12)
    assert table.layer_seconds(half) == pytest.approx(1e-6 * (8 * 16 + 16 * 32) / 2)


def test_projections_of_attention_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no modules of their own, so their time is in the rest of the layer before."""
    machine = FakeMachine(
        Mixed(), torch.randn(2, 3, 11, 9), lambda u, c: 1e-6 * c.inputs * c.outputs, 1.5
    )
    table = table_of(machine.install(monkeypatch), storages=("dense",))
    folded = []
    for timed in table.networks:
        inside, rests = list(timed.layers), list(timed.rests)
        for number in (4, 5, 6, 7):
            seconds, inside[number] = inside[number], None
            rests[3] += seconds + 2e-6
        extra = dataclasses.replace(timed, layers=tuple(inside), rests=tuple(rests))
        folded.append(dataclasses.replace(extra, total=timed.total + 8e-6))
    reference = folded[0].total
    measured = tuple(dataclasses.replace(m, reference=reference) for m in table.measured)
    again = dataclasses.replace(table, measured=measured, networks=tuple(folded))
    uses = layers_used(machine.model, machine.x)
    assert again.seconds(uses) == pytest.approx(table.seconds(uses) + 8e-6)
    # By themselves 36 each; in the timed half as much again, which stays in the rest.
    assert again.layer_seconds(uses[4]) == pytest.approx(36e-6)
    rest = again._prepared.uses[3].rest(uses[3], "dense")
    assert rest == pytest.approx(4 * (0.5 * 36e-6 + 2e-6))


def test_everything_is_as_before(machine: FakeMachine) -> None:
    before = copy.deepcopy(machine.model.train().state_dict())
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    table = table_of(machine, threads=threads + 1)
    assert table.machine.threads == threads + 1 == torch.get_num_threads() + 1
    assert machine.model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in machine.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in machine.model.modules())
    assert not any("forward" in vars(module) for module in machine.model.modules())


def test_it_measures_for_real() -> None:
    """Whatever the times are."""
    table = st.cost.latency_table(network(), X, sparsities=SPARSITIES, rounds=1)
    assert 0 < table.predict(network(16), X) < 1
    assert all(0 < s < 1 for measured in table.measured for s in measured.seconds)
