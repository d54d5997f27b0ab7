"""Hardware profiles: the papers' constants, and files."""

import json
from pathlib import Path

import pytest

import sparsetrain as st


def test_eyeriss_has_the_ratios_of_the_paper() -> None:
    found = st.cost.Hardware.eyeriss(mac_pj=2.0)
    accesses = [found.register_pj, found.array_pj, found.buffer_pj, found.dram_pj]
    assert [2 * access / found.mac_pj for access in accesses] == [1, 2, 6, 200]
    assert (found.rows * found.columns, found.buffer_bytes) == (168, 110_592)


def test_horowitz_has_the_numbers_of_the_paper() -> None:
    macs = {bits: st.cost.Hardware.horowitz_45nm(bits).mac_pj for bits in (32, 16, 8)}
    assert macs == pytest.approx({32: 4.6, 16: 1.5, 8: 0.3})
    found = st.cost.Hardware.horowitz_45nm(8)
    assert 8 * found.buffer_pj == 20 and 1300 < 8 * found.dram_pj < 2600
    assert (found.weight_bits, found.activation_bits, found.sum_bits) == (8, 8, 32)


@pytest.mark.parametrize("name", ["profile.yaml", "profile.json"])
def test_profiles_are_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    mine = st.cost.Hardware.horowitz_45nm(16, zeros="compressed", dram_pj=1e-3)
    assert (mine.dram_pj, mine.zeros, mine.weight_bits) == (1e-3, "compressed", 16)
    mine.dump(path)
    assert st.cost.Hardware.load(path) == mine
    if path.suffix == ".json":
        assert json.loads(path.read_text())["zeros"] == "compressed"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    with pytest.raises(ValueError, match="cannot read hardware profile"):
        st.cost.Hardware.load(path)
    path.write_text("mac_pj: [")
    with pytest.raises(ValueError, match="not valid YAML or JSON"):
        st.cost.Hardware.load(path)
    path.write_text("mac_pj: -1\n")
    with pytest.raises(ValueError, match=r"profile\.yaml is no hardware profile(.|\n)*mac_pj"):
        st.cost.Hardware.load(path)
    with pytest.raises(ValueError, match="columns"):
        st.cost.Hardware.eyeriss(columns=0)
    with pytest.raises(ValueError, match="32, 16 and 8, not 4"):
        st.cost.Hardware.horowitz_45nm(4)  # type: ignore[arg-type]
