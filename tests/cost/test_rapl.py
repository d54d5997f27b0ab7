"""Measured energy on a machine that is made up: its clock, its power and its counters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.cost import rapl

IDLE_WATTS = 2.0
X = torch.zeros(1)


class Machine(nn.Module):
    """A forward pass takes 0.125 seconds and 1 joule of each package beside the idle power."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, packages: int = 1) -> None:
        super().__init__()
        self.now, self.folder, self.passes, self.packages = 0.0, folder, 0, []
        monkeypatch.setattr(rapl.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(rapl.time, "sleep", self.wait)
        for number in range(packages):
            self.packages.append(self.zone(f"intel-rapl:{number}", f"package-{number}"))

    def zone(self, zone: str, name: str, start: int = 0, maximum: int = 10**12) -> Path:
        folder = self.folder / zone
        folder.mkdir()
        for file, value in (
            ("name", name),
            ("energy_uj", start),
            ("max_energy_range_uj", maximum),
        ):
            (folder / file).write_text(f"{value}\n")
        return folder

    def spend(self, zone: Path, joules: float) -> None:
        maximum = int((zone / "max_energy_range_uj").read_text())
        used = int((zone / "energy_uj").read_text()) + round(1e6 * joules)
        (zone / "energy_uj").write_text(f"{used % maximum}\n")

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for zone in self.packages:
            self.spend(zone, IDLE_WATTS * seconds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.passes += 1
        self.wait(0.125)
        for zone in self.packages:
            self.spend(zone, 1)
        return x


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_idle_power_is_taken_off(machine: Machine) -> None:
    found = st.cost.measured_energy(machine, X, seconds=2, rounds=4, folder=machine.folder)
    assert found.rounds == pytest.approx((1,) * 4) and found.joules == pytest.approx(1)
    assert found.idle_watts == pytest.approx(IDLE_WATTS) and found.domains == ("package-0",)
    assert found.passes == 16 and machine.passes == 17  # one before the measurement
    assert machine.now == 0.125 + 2 * 2  # pauses as long as the passes
    assert machine.training


def test_idle_power_may_stay(machine: Machine) -> None:
    found = st.cost.measured_energy(
        machine, X, seconds=1, rounds=2, subtract_idle=False, folder=machine.folder
    )
    assert found.joules == pytest.approx(1.25) and found.idle_watts is None


def test_a_long_pass_is_made_once(machine: Machine) -> None:
    found = st.cost.measured_energy(machine, X, seconds=0.003, rounds=3, folder=machine.folder)
    assert found.passes == 3 and found.joules == pytest.approx(1)


def test_the_median_of_the_rounds_counts(machine: Machine) -> None:
    plain = machine.forward

    def disturbed(x: torch.Tensor) -> torch.Tensor:
        if machine.passes == 1:  # another process, once
            machine.spend(machine.packages[0], 100)
        return plain(x)

    machine.forward = disturbed  # type: ignore[method-assign]
    found = st.cost.measured_energy(machine, X, seconds=0.3, rounds=3, folder=machine.folder)
    assert max(found.rounds) > 30 and found.joules == pytest.approx(1)


def test_counters_start_again_from_zero(machine: Machine) -> None:
    zone = machine.packages[0]
    (zone / "max_energy_range_uj").write_text("3000000\n")  # three joules: every round wraps once
    (zone / "energy_uj").write_text("2900000\n")
    found = st.cost.measured_energy(machine, X, seconds=1, rounds=4, folder=machine.folder)
    assert found.rounds == pytest.approx((1,) * 4)


def test_packages_and_memory_are_added_and_parts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, packages=2)
    machine.packages.append(machine.zone("intel-rapl:0:0", "dram"))
    for zone, name in (("intel-rapl:0:1", "core"), ("intel-rapl:2", "psys")):
        machine.packages.append(machine.zone(zone, name))
    # The same package once more, by another way.
    machine.packages.append(machine.zone("intel-rapl-mmio:0", "package-0"))
    (tmp_path / "intel-rapl").mkdir()  # the control type itself
    found = st.cost.measured_energy(machine, X, folder=tmp_path)
    assert found.domains == ("package-0", "dram", "package-1")
    assert found.joules == pytest.approx(3)
    assert found.idle_watts == pytest.approx(3 * IDLE_WATTS)


def test_a_machine_without_counters_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"no RAPL counters at .*st\.cost\.energy"):
            st.cost.measured_energy(nn.Linear(1, 1), X, folder=folder)
    (tmp_path / "intel-rapl:0").symlink_to(tmp_path / "hidden")  # as containers show it
    with pytest.raises(FileNotFoundError, match="no RAPL counters"):
        st.cost.measured_energy(nn.Linear(1, 1), X, folder=tmp_path)


def test_counters_for_root_alone_are_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def refused(path: Path, **kwargs: str) -> str:  # root may read everything, tests run as root
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(PermissionError, match=r"intel-rapl:0/energy_uj is not readable.*chmod"):
        st.cost.measured_energy(machine, X, folder=machine.folder)
    assert machine.passes == 0


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"rounds": 0}])
def test_lengths_must_be_positive(machine: Machine, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="seconds and rounds must be positive"):
        st.cost.measured_energy(machine, X, folder=machine.folder, **wrong)


def test_a_gpu_is_not_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    with pytest.raises(ValueError, match="GPU"):
        st.cost.measured_energy(nn.Linear(1, 1), X, folder=machine.folder)
