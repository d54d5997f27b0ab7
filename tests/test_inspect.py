from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.inspect import inspect_checkpoint


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))
    with torch.no_grad():
        network[0].weight[:5] = 0
    return network


def test_bare_state_dict(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert [tensor.name for tensor in found.tensors] == ["0.weight", "2.weight"]
    assert [tensor.nonzeros for tensor in found.tensors] == [150, 100]
    assert found.tensors[0].sparsity == 0.25
    assert found.sparsity == pytest.approx(50 / 300)
    assert found.to_dict()["tensors"][0]["shape"] == [20, 10]


def test_old_file_format(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path / "a.pt").nonzeros == 250


def test_nested_dicts_without_the_optimizer(model: nn.Module, tmp_path: Path) -> None:
    base = torch.optim.AdamW(model.parameters())
    optimizer = st.SparseOptimizer(base, model, st.Static(sparsity=0.5))
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "nets": [{"model": model.state_dict()}],
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert [tensor.name for tensor in found.tensors] == [
        "nets.0.model.0.weight",
        "nets.0.model.2.weight",
    ]
    everything = inspect_checkpoint(tmp_path / "a.pt", everything=True)
    assert any(tensor.name == "optimizer.state.0.exp_avg" for tensor in everything.tensors)


def test_safetensors(model: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert inspect_checkpoint(tmp_path / "a.safetensors").nonzeros == 250


def test_unusual_tensors_are_counted(model: nn.Module, tmp_path: Path) -> None:
    weight = model[0].weight.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse layouts a beta
        tensors = {
            "csr": weight.to_sparse_csr(),
            "coo": weight.to_sparse(),
            "half": weight.bfloat16(),
            "byte": weight.to(torch.float8_e4m3fn),
            "complex": weight.to(torch.complex64),
            "empty": weight[:, :0],
        }
        torch.save(tensors, tmp_path / "a.pt")
        found = inspect_checkpoint(tmp_path / "a.pt")
    assert [tensor.nonzeros for tensor in found.tensors] == [150] * 5 + [0]
    assert found.tensors[-1].sparsity == 0


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pt does not exist"):
        inspect_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is a folder"):
        inspect_checkpoint(tmp_path)


def test_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "bias": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"no weight of two or more dimensions \(1 tensors"):
        inspect_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\x80\x04N."])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_other_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        inspect_checkpoint(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_files_are_refused(
    share: float, zipped: bool, model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged or cut short"):
        inspect_checkpoint(path)


def test_pickled_model_is_not_run(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"save model\.state_dict\(\) instead"):
        inspect_checkpoint(tmp_path / "a.pt")


def test_compact_files_show_the_weights_that_they_stand_for(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20))
    with torch.no_grad():
        model[0].weight[:, 3:] = 0
    st.storage.save(model, tmp_path / "small.safetensors")
    (weight,) = inspect_checkpoint(tmp_path / "small.safetensors").tensors
    assert (weight.name, weight.shape, weight.nonzeros) == ("0.weight", (20, 30), 60)


def test_weights_behind_learned_masks_count_as_evaluation_does(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    policy = st.HardConcrete(strength=0.1)
    optimizer = st.SparseOptimizer(torch.optim.Adam(model.parameters()), model, policy)
    model[0].parametrizations.weight[0].log_alpha.data[1:] = -5.0
    path = tmp_path / "run.pt"
    torch.save({"run": {"model": model.state_dict(), "opt": optimizer.state_dict()}}, path)
    info = inspect_checkpoint(path)
    assert [(t.name, t.nonzeros) for t in info.tensors] == [
        ("run.model.0.weight", 6),
        ("run.model.1.weight", 8),
    ]
    assert any("log_alpha" in t.name for t in inspect_checkpoint(path, everything=True).tensors)
