"""Export to ONNX: onnxruntime computes what torch computes, or there is no file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from channels_networks import NETWORKS, images
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain import exporting


def outputs(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in found]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of the small model, from a single sample."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    st.export_onnx(small(), torch.randn(1, 4), path)
    return path.read_bytes()


@pytest.fixture
def quick(exported: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model's file in no time, for tests of what follows."""
    monkeypatch.setattr(exporting, "_exported", lambda model, call, dynamic: exported)


class Named(nn.Module):
    """Arguments of every kind, and outputs in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, pair: dict[str, Tensor], power: int = 1, *, shift: Tensor
    ) -> dict[str, Any]:
        y = self.layer(x) ** power - 2 * pair["left"] + pair["right"]
        return {"y": y, "rest": (y.argmax(1), None, (y + shift).log())}


class Padded(nn.Module):
    """Attention that leaves padded tokens out, for which torch has a shortcut in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("name", ["residual", "concatenated", "tokens"])
def test_a_network_computes_the_same_for_any_number_of_samples(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    model, example = build(), inputs()
    path = tmp_path / "new" / "model.onnx"
    result = st.export_onnx(model, example, path)

    assert result == st.OnnxResult(path, path.stat().st_size, result.difference)
    assert result.difference < 1e-5
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    model.eval()
    [given] = onnx.load(path).graph.input
    for samples in (1, 2, 7):
        x = example[torch.arange(samples) % 3].flip(0)
        [found] = outputs(path, {given.name: x})
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_a_network_that_lost_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3)
    )
    model(images(8))  # so that the norm has statistics other than 0 and 1
    smaller = st.channels.prune(model, images(), "l1", 0.5, measure_latency=False).model
    smaller.train()
    smaller[1].eval()
    path = tmp_path / "model.onnx"
    result = st.export_onnx(smaller, images(), path)

    modes = [module.training for module in smaller.modules()]
    assert modes == [True, True, False, True, True, True]
    assert result.bytes < 4 * sum(p.numel() for p in smaller.parameters()) + 3000
    smaller.eval()
    [found] = outputs(path, {"input": images(5)})
    torch.testing.assert_close(found, smaller(images(5)), rtol=1e-4, atol=1e-5)


def test_arguments_of_every_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, left, right = Named(), *(torch.randn(3, 4) for _ in range(3))
    given = {"shift": torch.rand(3, 4), "pair": {"right": right, "left": left}, "x": x, "power": 2}
    path = tmp_path / "model.onnx"
    result = st.export_onnx(model, given, path)  # logarithms of negative numbers are NaN in both

    assert result.difference < 1e-5
    named = {"x": x, "pair_right": right, "pair_left": left, "shift": given["shift"]}
    y, best, logarithm = outputs(path, named)
    expected = model(**given)
    torch.testing.assert_close(y, expected["y"], rtol=1e-4, atol=1e-5)
    assert best.equal(expected["rest"][0])
    assert logarithm.isnan().any()
    torch.testing.assert_close(logarithm, expected["rest"][2], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_padded_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    model = Padded().requires_grad_(False)
    st.export_onnx(model, (torch.randn(2, 5, 8), padding), tmp_path / "model.onnx")


def test_attention_goes_its_ordinary_way(quick: None, tmp_path: Path) -> None:
    model, seen = small(), set()
    model.register_forward_hook(lambda *_: seen.add(torch.backends.mha.get_fastpath_enabled()))
    st.export_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx")
    assert seen == {False}
    assert torch.backends.mha.get_fastpath_enabled()


class Joined(nn.Module):
    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["left"] - 2 * parts["right"]


def test_a_dictionary_as_the_last_argument(tmp_path: Path) -> None:
    """torch's exporter would take it for keyword arguments."""
    parts = {"right": torch.randn(2, 3), "left": torch.randn(2, 3)}
    st.export_onnx(Joined(), (parts,), tmp_path / "model.onnx")


def test_a_single_sample_as_example(exported: bytes, tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(5, 4)
    path.write_bytes(exported)
    torch.testing.assert_close(outputs(path, {"input": x})[0], small().eval()(x))


def test_the_file_says_nothing_of_this_machine(exported: bytes) -> None:
    assert b".py" not in exported


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3, 4)


def test_a_model_of_one_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="cannot be exported"):
        st.export_onnx(Fixed(), torch.randn(3, 4), path)
    assert not any(tmp_path.iterdir())
    st.export_onnx(Fixed(), torch.randn(3, 4), path, dynamic_batch=False)
    size = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in size.dim] == [3, 4]


def test_a_wrong_export_leaves_the_file_that_was_there(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")
    model, x = small(), torch.randn(2, 4)
    monkeypatch.setattr(exporting, "_run", lambda session, inputs: [torch.ones(len(inputs[0]), 2)])
    with pytest.raises(ValueError, match=r"wrong: for inputs of shapes \[\(2, 4\)\] an output dif"):
        st.export_onnx(model, x, path)
    monkeypatch.setattr(exporting, "_run", lambda session, inputs: [torch.ones(2)])
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\] instead of \[\(2, 2\)\]"):
        st.export_onnx(model, x, path, tolerance=100.0)
    assert path.read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1
    assert model.training


def test_an_export_that_is_wrong_for_other_batch_sizes(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exporting._run

    def wrong_for_one(session: Any, inputs: list[Tensor]) -> list[Tensor]:
        return [output + (len(inputs[0]) == 1) for output in run(session, inputs)]

    monkeypatch.setattr(exporting, "_run", wrong_for_one)
    with pytest.raises(ValueError, match=r"inputs of shapes \[\(1, 4\)\]"):
        st.export_onnx(small(), torch.randn(2, 4), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_another_file_than_the_models(quick: None, tmp_path: Path) -> None:
    """The file's numbers are compared with the model's as it is, not with what torch exported."""
    model, path = small(), tmp_path / "model.onnx"
    assert st.export_onnx(model, torch.randn(2, 4), path).difference < 1e-6
    path.unlink()
    with torch.no_grad():
        model[2].bias[1] += 0.01
    with pytest.raises(ValueError, match="an output differs"):
        st.export_onnx(model, torch.randn(2, 4), path)
    assert not any(tmp_path.iterdir())


def test_what_onnxruntime_cannot_run_is_refused(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="onnxruntime cannot run the exported model"):
        st.export_onnx(small().double(), torch.randn(2, 4).double(), path)
    monkeypatch.setattr(exporting, "_exported", lambda model, call, dynamic: b"no model")
    with pytest.raises(ValueError, match="onnxruntime cannot load the exported model"):
        st.export_onnx(small(), torch.randn(2, 4), path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("expected", "found", "share"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], float("inf")),
        ([float("inf"), float("nan"), 2.0], [float("inf"), float("nan"), 1.0], 0.5),
        ([float("inf"), 2.0], [float("-inf"), 2.0], float("inf")),
        ([1.0, 2.0], [float("nan"), 2.0], float("inf")),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_differences(expected: list[float], found: list[float], share: float) -> None:
    assert exporting._share(torch.tensor(expected), torch.tensor(found)) == share
    both = [torch.tensor(numbers).half() for numbers in (expected, found)]
    if 1e-9 not in found:
        assert exporting._share(*both) == share


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "sparsetrain\[onnx\]"'):
        st.export_onnx(small(), torch.randn(2, 4), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("policy", "storage"),
    [
        (st.HardConcrete(sparsity=0.5, total_steps=10), "masked"),
        (st.Static(sparsity=0.9), "csr"),
    ],
)
def test_weights_in_another_form_are_refused(
    policy: st.Policy, storage: Any, tmp_path: Path
) -> None:
    model, x = small(), torch.randn(2, 4)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = st.SparseOptimizer(base, model, policy, storage=storage)
    with pytest.raises(ValueError, match=r"^0 is .*finalize\(\) the optimizer"):
        st.export_onnx(model, x, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())
    optimizer.finalize()
    exporting._check(model)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", torch.randn(2, 4)
    with pytest.raises(ValueError, match="tolerance=-1"):
        st.export_onnx(small(), x, path, tolerance=-1)
    with pytest.raises(ValueError, match="tolerance=nan"):
        st.export_onnx(small(), x, path, tolerance=float("nan"))
    with pytest.raises(ValueError, match=r"all as many; here are \(2, 4\), \(3, 4\)"):
        st.export_onnx(nn.Bilinear(4, 4, 2), (x, torch.randn(3, 4)), path)
    with pytest.raises(ValueError, match="here are no tensors"):
        st.export_onnx(small(), 1, path)
    with pytest.raises(TypeError, match="too many positional"):
        st.export_onnx(small(), (x, x), path)
    with pytest.raises(ValueError, match="less than 2 GiB"):
        st.export_onnx(nn.Linear(2**15, 2**14, device="meta"), x, path)
    assert not any(tmp_path.iterdir())
