from __future__ import annotations

import gzip
import json
import struct
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain as st
from sparsetrain.workbench import Dataset, Trainer, build, data, evaluate, fit, load, runs
from sparsetrain.workbench.training import EpochRecord

NETWORKS = ["lenet_300_100", "lenet_5", "mlp", "resnet_small"]
STEMS = {
    "train-images-idx3-ubyte": (6, 28, 28),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (2, 28, 28),
    "t10k-labels-idx1-ubyte": (2,),
}


@pytest.fixture
def tiny() -> Dataset:
    return load("digits").subset(train=100, test=40)


@pytest.fixture
def no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any data files; returns its home folder."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("SPARSETRAIN_DATA", raising=False)
    home = data._IDX_HOMES["fashion_mnist"]
    monkeypatch.setitem(data._IDX_HOMES, "fashion_mnist", data._IdxHome(home.url, home.md5))
    return tmp_path


def idx(shape: tuple[int, ...]) -> bytes:
    count = int(torch.Size(shape).numel())
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + bytes(i % 10 for i in range(count))


def write_idx_files(folder: Path, *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, shape in STEMS.items():
        content = idx(shape)
        if zipped:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / stem).write_bytes(content)


def test_digits_are_split_once_and_for_all() -> None:
    dataset = load("digits")
    assert dataset.train_x.shape == (1437, 1, 8, 8)
    assert dataset.test_x.shape == (360, 1, 8, 8)
    assert dataset.train_x.dtype == torch.float32
    assert dataset.test_y.dtype == torch.int64
    assert dataset.in_shape == (1, 8, 8)
    assert dataset.test_y.bincount().min() >= 35
    assert torch.equal(dataset.test_x, load("digits").test_x)


def test_normalised_by_the_training_pixels_alone() -> None:
    raw, normal = load("digits", normalise=False), load("digits")
    assert raw.train_x.min() == 0
    assert raw.train_x.max() == 1
    assert normal.train_x.mean().abs() < 1e-5
    assert (normal.train_x.std() - 1).abs() < 1e-5
    expected = (raw.test_x - raw.train_x.mean()) / raw.train_x.std()
    torch.testing.assert_close(normal.test_x, expected)


def test_subset_takes_the_first_or_a_seeded_choice() -> None:
    dataset = load("digits")
    first = dataset.subset(train=10, test=5)
    assert torch.equal(first.train_x, dataset.train_x[:10])
    assert len(first.test_y) == 5
    chosen = dataset.subset(train=10, test=5, seed=1)
    assert torch.equal(chosen.train_y, dataset.subset(train=10, test=5, seed=1).train_y)
    assert not torch.equal(chosen.train_x, first.train_x)
    with pytest.raises(ValueError, match=r"train=1500 is outside 1\.\.1437"):
        dataset.subset(train=1500, test=5)


def test_unknown_data_set_suggests_a_name() -> None:
    with pytest.raises(ValueError, match=r"'fashion-mnist'.*did you mean.*'fashion_mnist'"):
        load("fashion-mnist")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["root", "root/mnist", "environment", "cache"])
def test_idx_files_are_found(
    place: str, zipped: bool, no_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = None
    folder = no_files / ".cache" / "sparsetrain" / "mnist"
    if place == "environment":
        folder = no_files / "elsewhere" / "mnist"
        monkeypatch.setenv("SPARSETRAIN_DATA", str(folder.parent))
    elif place != "cache":
        folder = no_files / place
        root = no_files / "root"
    write_idx_files(folder, zipped=zipped)
    dataset = load("mnist", root=root, normalise=False)
    assert dataset.train_x.shape == (6, 1, 28, 28)
    assert dataset.train_x[0, 0, 0, 3] == pytest.approx(3 / 255)
    assert dataset.test_y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x1f\x8b broken", "cannot be read"),
        (gzip.compress(idx((6,)))[:-9], "cannot be read"),
        (gzip.compress(b"hello world"), "not an IDX file"),
        (gzip.compress(idx((6,))[:6]), "cut short"),
        (gzip.compress(idx((6,))[:-1]), "should hold 6 values"),
    ],
    # Compressed bytes hold the time, and every test worker must name the tests alike.
    ids=["not gzip", "broken gzip", "no header", "half a header", "a value missing"],
)
def test_damaged_idx_file_is_named(content: bytes, problem: str, no_files: Path) -> None:
    write_idx_files(no_files / "root", zipped=True)
    (no_files / "root" / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t10k-labels-idx1-ubyte\.gz.*{problem}"):
        load("mnist", root=no_files / "root")


def test_failed_download_says_how_to_get_the_files(
    no_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match=r"no network.*put the four files.*SPARSETRAIN_DATA"):
        load("fashion_mnist")


def test_download_of_another_file_is_refused(
    no_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = no_files / "server"
    write_idx_files(folder, zipped=True)
    monkeypatch.setattr(
        "urllib.request.urlopen",
        lambda url, timeout: (folder / url.rpartition("/")[2]).open("rb"),
    )
    with pytest.raises(ValueError, match=r"MD5 .* is published"):
        load("mnist")
    assert not (no_files / ".cache").exists()


@pytest.mark.parametrize("in_shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_images(name: str, in_shape: tuple[int, ...]) -> None:
    network = build(name, in_shape=in_shape, classes=7, seed=0)
    assert network(torch.randn(2, *in_shape)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_depend_on_their_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(name, in_shape=(1, 8, 8), classes=3, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = build(name, in_shape=(1, 8, 8), classes=3, seed=1).state_dict()
    other = build(name, in_shape=(1, 8, 8), classes=3, seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_well_known_sizes() -> None:
    def parameters(name: str) -> int:
        network = build(name, in_shape=(1, 28, 28), classes=10)
        return sum(parameter.numel() for parameter in network.parameters())

    assert parameters("lenet_300_100") == 266_610
    assert parameters("lenet_5") == 431_080


@pytest.mark.parametrize(
    ("name", "widths", "problem"),
    [
        ("lenet5", None, "did you mean 'lenet_5'"),
        ("lenet_5", (3,), "fixed widths"),
        ("mlp", (), "at least one width"),
        ("mlp", (3, 0), "each at least 1"),
    ],
)
def test_impossible_networks_are_refused(
    name: str, widths: tuple[int, ...] | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        build(name, in_shape=(1, 8, 8), classes=3, widths=widths)


def plain_loop(model: nn.Module, dataset: Dataset, epochs: int) -> list[float]:
    """The obvious twin of `fit`: one sample list an epoch, one Python loop over batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        order = torch.randperm(len(dataset.train_x), generator=generator).tolist()
        batches = [order[start : start + 32] for start in range(0, len(order), 32)]
        total = 0.0
        for batch in batches:
            inputs = torch.stack([dataset.train_x[i] for i in batch])
            labels = torch.stack([dataset.train_y[i] for i in batch])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(batches))
    return losses


def test_fit_is_the_plain_loop(tiny: Dataset) -> None:
    fast, slow = (build("mlp", widths=(20,), in_shape=(1, 8, 8), classes=10) for _ in range(2))
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    history = fit(fast, optimizer, tiny, epochs=3, batch_size=32, seed=3, progress=False)
    losses = plain_loop(slow, tiny, 3)
    assert [record.loss for record in history.records] == pytest.approx(losses)
    assert [record.step for record in history.records] == [4, 8, 12]
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        assert torch.equal(one, other)
    correct = sum(
        int(slow(x[None]).argmax() == y) for x, y in zip(tiny.test_x, tiny.test_y, strict=True)
    )
    assert history.last.test_accuracy == correct / 40


def test_fit_counts_steps_and_tells_epochs(tiny: Dataset) -> None:
    model = build("mlp", widths=(5,), in_shape=(1, 8, 8), classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    seen: list[EpochRecord] = []
    history = fit(
        model, optimizer, tiny, steps=9, batch_size=32, scheduler=scheduler, on_epoch=seen.append
    )
    assert [record.step for record in seen] == [4, 8]
    assert history.records == seen
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("amount", [{}, {"epochs": 1, "steps": 1}])
def test_fit_wants_epochs_or_steps(amount: dict[str, int], tiny: Dataset) -> None:
    model = build("mlp", widths=(5,), in_shape=(1, 8, 8), classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="exactly one of epochs and steps"):
        fit(model, optimizer, tiny, batch_size=32, **amount)


def test_divergence_is_an_error(tiny: Dataset) -> None:
    model = build("mlp", widths=(5,), in_shape=(1, 8, 8), classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(ValueError, match=r"in epoch 1: training diverged"):
        fit(model, optimizer, tiny, epochs=2, batch_size=32, progress=False)


def test_evaluate_leaves_the_modes_alone(tiny: Dataset) -> None:
    model = build("resnet_small", in_shape=(1, 8, 8), classes=10)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    statistics = frozen.running_mean.clone()
    evaluate(model, tiny.test_x, tiny.test_y, batch_size=7)
    assert model.training
    assert not frozen.training
    assert torch.equal(frozen.running_mean, statistics)


def rigl_trainer(dataset: Dataset) -> Trainer:
    model = build("resnet_small", widths=(4, 8, 8), in_shape=(1, 8, 8), classes=10, seed=1)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, 16)
    policy = {"kind": "rigl", "sparsity": 0.8, "total_steps": 16, "update": {"every": 3}}
    sparse = st.SparseOptimizer(base, model, policy, seed=2)
    return Trainer(model, sparse, dataset, batch_size=32, seed=3, scheduler=scheduler)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 15])
def test_resume_at_any_step_is_bit_for_bit(stop: int, tiny: Dataset, tmp_path: Path) -> None:
    whole = rigl_trainer(tiny)
    list(whole.run(16))
    first = rigl_trainer(tiny)
    list(first.run(stop))
    first.save(tmp_path / "run.pt")
    second = rigl_trainer(tiny)
    second.load(tmp_path / "run.pt")
    list(second.run(16))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    assert [r.loss for r in whole.history.records] == [r.loss for r in second.history.records]
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_resume_of_another_run_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    trainer = rigl_trainer(tiny)
    trainer.save(tmp_path / "run.pt")
    trainer.seed = 4
    with pytest.raises(ValueError, match=r"seed=3 but this run has seed=4"):
        trainer.load(tmp_path / "run.pt")
    trainer.seed, trainer.scheduler = 3, None
    with pytest.raises(ValueError, match="differ in having a scheduler"):
        trainer.load(tmp_path / "run.pt")


def run_config(**changes: object) -> runs.RunConfig:
    recipe = {"policy": {"kind": "set", "sparsity": 0.9, "total_steps": 36, "update": {"every": 5}}}
    values = {"recipe": recipe, "epochs": 3, "seed": 4, **changes}
    return runs.RunConfig.model_validate(values)


def lines_without_times(path: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("stop", [5, 12, 29])
def test_interrupted_run_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    def interrupt(done: int, steps: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    whole, halved = tmp_path / "whole", tmp_path / "halved"
    summary = runs.train(run_config(), whole)
    with pytest.raises(KeyboardInterrupt):
        runs.train(run_config(), halved, on_step=interrupt)
    resumed = runs.train(run_config(), halved, resume=True)
    expected = torch.load(whole / "model.pt", weights_only=True)
    found = torch.load(halved / "model.pt", weights_only=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for log in ("metrics.jsonl", "events.jsonl", "ages.jsonl"):
        assert lines_without_times(whole / log) == lines_without_times(halved / log)
    summary.pop("seconds")
    resumed.pop("seconds")
    assert summary == resumed
    assert sum(layer["active"] for layer in summary["layers"].values()) == 5_020
    # Weights that SET grew and no gradient has moved yet are active and zero.
    nonzeros = sum(int(torch.count_nonzero(found[name])) for name in summary["layers"])
    assert 0 < nonzeros <= 5_020


def test_dense_run_has_no_sparsity(tmp_path: Path) -> None:
    summary = runs.train(run_config(recipe=None, epochs=1, lr_schedule="constant"), tmp_path)
    assert summary["method"] == "dense"
    assert "sparsity" not in summary
    assert not (tmp_path / "events.jsonl").exists()


def test_runs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps 36, but 2 epochs of 12 steps are 24"):
        runs.train(run_config(epochs=2), tmp_path / "a")
    rule = {"match": "fc1*", "policy": {"kind": "snfs", "sparsity": 0.5, "total_steps": 99}}
    recipe = {"policy": {"kind": "static", "sparsity": 0.9}, "rules": [rule]}
    with pytest.raises(ValueError, match=r"rules\[0\]\.policy .* total_steps 99"):
        runs.train(run_config(recipe=recipe), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="holds no run to resume"):
        runs.train(run_config(), tmp_path / "a", resume=True)
    runs.train(run_config(recipe=None, epochs=1), tmp_path / "b")
    with pytest.raises(ValueError, match="holds a run already"):
        runs.train(run_config(recipe=None, epochs=1), tmp_path / "b")
    with pytest.raises(ValueError, match=r"has epochs 1, not 2"):
        runs.train(run_config(recipe=None, epochs=2), tmp_path / "b", resume=True)
