"""Whatever happens to a file, it is found, or the content is what it was."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_files import network, refuses, safetensors, same_state, stored
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.storage import container


class Small(nn.Module):
    """A tensor in each coding, in few bytes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, numel, density in (
            ("bits", 100, 0.5),
            ("gaps8", 400, 0.03),
            ("gaps16", 5000, 0.001),
            ("dense", 20, 1.0),
        ):
            tensor = torch.randn(2, numel // 2, generator=generator)
            drop = torch.randperm(numel, generator=generator)[round(density * numel) :]
            tensor.view(-1)[drop] = 0
            self.register_buffer(name, tensor)
        self.tied = self.dense


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("small") / "a"
    st.storage.save(Small(), path)
    assert {name: name for name in ("bits", "gaps8", "gaps16", "dense")} == stored(path)
    return path.read_bytes(), st.storage.load(path)


def found_or_harmless(content: bytes, expected: dict[str, Tensor], path: Path) -> bool:
    """True when the damage is reported, False when the content is what it was."""
    path.write_bytes(content)
    try:
        state = st.storage.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    assert same_state(state, expected)
    return False


@pytest.mark.parametrize("phase", [0, 1])
def test_any_byte_damaged(
    phase: int, small: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    content, expected = small
    (length,) = struct.unpack("<Q", content[:8])
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= (0x01, 0x20, 0x80)[(at + phase) % 3]
        found = found_or_harmless(bytes(damaged), expected, tmp_path / "a")
        assert found or at < 8 + length, f"byte {at} of the data"


def test_cut_and_longer_files(small: tuple[bytes, dict[str, Tensor]], tmp_path: Path) -> None:
    content, expected = small
    for length in range(0, len(content), 7):
        assert found_or_harmless(content[:length], expected, tmp_path / "a")
        assert found_or_harmless(content[length + 1 :], expected, tmp_path / "a")
    assert found_or_harmless(content[:-1], expected, tmp_path / "a")
    assert found_or_harmless(content + b"\0", expected, tmp_path / "a")


def test_a_damaged_file_changes_no_model(tmp_path: Path) -> None:
    path = tmp_path / "a"
    st.storage.save(network(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for model in (network(0.2), st.compress(network(0.6))):
        for storage in ("keep", "csr"):
            refuses(model, path, "is damaged: its checksum differs", storage=storage)


def forge(path: Path, change: Callable[[dict[str, Tensor], Any], None]) -> None:
    """Change parts and index of a file, and put the right checksums on it."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparsetrain"])
        parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    index = header["index"]
    change(parts, index)
    for name, entry in index.get("tensors", {}).items():
        own = {part: held for part, held in parts.items() if part.split(":")[0] == name}
        ordered = dict(sorted(own.items(), reverse=True))  # values, then positions
        entry["checksum"] = container._checksum(ordered)
    header["checksum"] = container._text_checksum(index)
    safetensors.save_file(parts, path, {"sparsetrain": json.dumps(header)})


def edit(name: str, field: str, value: Any) -> Callable[[dict[str, Tensor], Any], None]:
    return lambda parts, index: index["tensors"][name].__setitem__(field, value)


def swap(part: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], Any], None]:
    return lambda parts, index: parts.__setitem__(part, tensor(parts[part]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap("bits:values", lambda t: t[1:].clone()), "bits has positions for 50 values"),
        (swap("bits:positions", lambda t: t | 255), "bits has positions for 104 values"),
        (swap("gaps8:positions", lambda t: t * 0 + 254), "gaps8 has a value at position"),
        (swap("gaps8:positions", lambda t: t[:-1].clone()), "gaps8 has positions for 11 values"),
        (swap("gaps16:positions", lambda t: t[:-1].clone()), "gaps16 has 9 bytes of positions"),
        (swap("gaps8:positions", lambda t: t.view(2, -1)), "no vectors"),
        (swap("gaps8:positions", lambda t: t.int()), "no vectors"),
        (swap("gaps8:values", lambda t: t.view(torch.int32)), "gaps8 is torch.int32 in the file"),
        (swap("dense", lambda t: t.view(-1)), r"dense has shape \(20,\), in the index \(2, 10\)"),
        (edit("dense", "dtype", "int32"), "dense is torch.float32 in the file and int32"),
        (edit("dense", "dtype", "nothing"), "dense is torch.float32 in the file and nothing"),
        (edit("bits", "shape", [2, 60]), "bits has 13 bytes of bits for 120 entries"),
        (edit("gaps8", "shape", [1, 2]), "gaps8 has a value at position"),
        (edit("gaps8", "shape", [-1, -400]), r"damaged at tensors\.gaps8\.shape\.0"),
        (edit("gaps8", "stored", "gaps32"), r"damaged at tensors\.gaps8\.stored"),
        (edit("gaps8", "secret", 1), r"damaged at tensors\.gaps8\.secret"),
        (edit("gaps8", "stored", "dense"), "gaps8 is in the index or in the file, and not in both"),
        (lambda parts, index: index["tensors"].pop("dense"), "dense is in the index or in the"),
        (lambda parts, index: parts.pop("gaps8:positions"), "gaps8:positions is in the index"),
        (lambda parts, index: index["tied"].update(x="y"), "x is tied to y, which cannot be"),
        (lambda parts, index: index["tied"].update(bits="dense"), "bits is tied to dense"),
        (lambda parts, index: index.clear(), "damaged at tensors: Field required"),
    ],
)
def test_forged_files(
    change: Callable[[dict[str, Tensor], Any], None],
    message: str,
    small: tuple[bytes, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    path.write_bytes(small[0])
    forge(path, lambda parts, index: None)
    assert same_state(st.storage.load(path), small[1])
    forge(path, change)
    with pytest.raises(ValueError, match=message):
        st.storage.load(path)


def test_other_files(small: tuple[bytes, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"a\.safetensors does not exist"):
        st.storage.load(path)
    with pytest.raises(ValueError, match="is a folder"):
        st.storage.load(tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04 a zip file, perhaps", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            st.storage.load(path)
    safetensors.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"no compact file of sparsetrain.*load_file"):
        st.storage.load(path)
    for metadata in ("[1]", "7", '"a"', "{}", "{"):
        safetensors.save_file({"a": torch.ones(3)}, path, {"sparsetrain": metadata})
        with pytest.raises(ValueError, match=r"a\.safetensors: the index is damaged"):
            st.storage.load(path)
    path.write_bytes(small[0].replace(rb"{\"version\":1", rb"{\"version\":2"))
    with pytest.raises(ValueError, match="is of format 2; this version of sparsetrain reads 1"):
        st.storage.load(path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    st.storage.save(network(), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (
        lambda: st.storage.save(network(), tmp_path / "b"),
        lambda: st.storage.load(tmp_path / "a"),
        lambda: st.storage.sizes(network()),
    ):
        with pytest.raises(ValueError, match="pip install safetensors"):
            use()
