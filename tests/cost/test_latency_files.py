"""What latency tables refuse, and their files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from latency_machines import FakeMachine, X, curved, first, network, table_of
from torch import nn

import sparsetrain as st
from sparsetrain.cost.layers import LayerUse, layers_used


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(network(), X, curved).install(monkeypatch)


# Errors


@pytest.mark.parametrize(
    "use, message",
    [
        (
            dataclasses.replace(first(20, 28), name="0.wight"),
            r"does not know the layer 0\.wight.*0\.weight",
        ),
        (first(21, 28), r"0\.weight is not as the latency table knows it"),
        (first(20, 29), r"0\.weight is not as the latency table knows it"),
        (dataclasses.replace(first(20, 28), repeats=2.0), "is not as the latency table"),
        (dataclasses.replace(first(20, 28), kernel=(3,)), "is not as the latency table"),
        (dataclasses.replace(first(20, 28), groups=2), "is not as the latency table"),
    ],
)
def test_unknown_layers_are_named(machine: FakeMachine, use: LayerUse, message: str) -> None:
    table = table_of(machine)
    for ask in (table.layer_seconds, table.storage_of, lambda u: table.seconds([u])):
        with pytest.raises(ValueError, match=message):
            ask(use)


def test_other_inputs_and_models_are_refused(machine: FakeMachine) -> None:
    table = table_of(machine)
    with pytest.raises(ValueError, match=r"inputs of \(\(3, 20\),\), not \(\(4, 20\),\)"):
        table.predict(network(), torch.randn(4, 20))
    with pytest.raises(ValueError, match="the model has no layer 2"):
        table.compress(nn.Sequential(nn.Linear(20, 28)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step": 0}, "step=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"threads": 0}, "threads=0"),
        ({"sparsities": (0.5, 1.0)}, "sparsities="),
        ({"sparsities": ()}, "give sparsities"),
        ({"storages": ("csr",)}, "storages="),
        ({"storages": ("dense", "coo")}, "storages="),
    ],
)
def test_arguments_are_checked(machine: FakeMachine, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(machine, **options)


# Files


def test_a_file_gives_the_table_back(machine: FakeMachine, tmp_path: Path) -> None:
    table, path = table_of(machine), tmp_path / "table.json"
    table.save(path)
    again = st.cost.LatencyTable.load(path, check=True)
    assert again == table
    layers = layers_used(network(16), X)
    assert again.seconds(layers) == table.seconds(layers)
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def changed(path: Path, change) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_another_machine_is_said(machine: FakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table_of(machine).save(path)
    changed(path, lambda content: content["plan"]["machine"].update(processor="Z80"))
    with pytest.warns(
        UserWarning, match=r"table\.json was measured on another machine: processor Z80, not"
    ):
        st.cost.LatencyTable.load(path)
    with pytest.raises(ValueError, match="processor Z80"):
        st.cost.LatencyTable.load(path, check=True)
    with pytest.raises(ValueError, match=r"table of another machine \(processor Z80"):
        table_of(machine, path=path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda c: c.pop("format"), "not of format 1"),
        (lambda c: c.update(format=2), "not of format 1"),
        (lambda c: c.pop("plan"), "plan"),
        (lambda c: c["measured"][0]["seconds"].pop(), "times for"),
        (lambda c: c["measured"][0]["cases"].pop(), "otherwise than planned"),
        (lambda c: c["measured"][0].update(reference=-1.0), "must be positive"),
        (lambda c: c["measured"][0]["seconds"].__setitem__(0, "fast"), "seconds"),
        (lambda c: c["networks"][0]["widths"].pop(), "other layers than planned"),
        (lambda c: c["networks"][0]["rests"].pop(), "other layers than planned"),
        (lambda c: c["plan"].update(shape_of=[0, 7]), "shape_of"),
    ],
)
def test_a_damaged_file_is_refused(machine, tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "table.json"
    table_of(machine).save(path)
    changed(path, damage)
    with pytest.raises(ValueError, match=r"(?s)table\.json holds no latency table.*" + message):
        st.cost.LatencyTable.load(path)


def test_a_file_that_was_cut_short_is_refused(machine: FakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table_of(machine).save(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"table\.json holds no latency table"):
        st.cost.LatencyTable.load(path)


def test_interrupted_measuring_goes_on(machine: FakeMachine, tmp_path: Path) -> None:
    path, whole = tmp_path / "table.json", table_of(machine)
    asked = list(machine.measured)
    machine.measured.clear()
    for parts in (0, 1, 2):
        machine.parts, machine.stop_after = 0, 1 if parts < 2 else 0
        with pytest.raises(KeyboardInterrupt):
            table_of(machine, path=path)
        with pytest.raises(
            ValueError, match=r"table\.json is a table whose measuring was interrupted"
        ):
            st.cost.LatencyTable.load(path)
    machine.stop_after = 1000
    assert table_of(machine, path=path) == whole == st.cost.LatencyTable.load(path)
    assert machine.measured == asked  # nothing twice
    machine.networks.clear()
    assert table_of(machine, path=path) == whole
    assert machine.measured == asked and not machine.networks


def test_a_file_of_another_network_is_left_alone(machine: FakeMachine, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table_of(machine, path=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"table\.json is a table of another network or setting"):
        table_of(machine, path=path, step=4)
    assert path.read_text() == before
