"""The GPU benchmarks, tried out on the CPU: they run, results are whole, the README is true."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # reference_runs is no installed package

from reference_runs.gpu import measures, run  # noqa: E402
from reference_runs.gpu.models import GPT2, PARAMETERS, Decoder, LogitsAlone, Workload  # noqa: E402
from reference_runs.gpu.tables import tables  # noqa: E402
from reference_runs.gpu.training import interval_of_median, ratio  # noqa: E402

CPU = torch.device("cpu")
EFFORT = SimpleNamespace(rounds=3, calls=1, warm_up=1)
TINY = ["--device", "cpu", "--tiny", "--gpt2", "own", "--rounds", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a whole tiny run writes."""
    folder = tmp_path_factory.mktemp("gpu")
    run.main([*TINY, "--out", str(folder)])
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found | {"folder": folder}


def test_the_results_are_whole(results: dict[str, Any]) -> None:
    runs = results["runs"]
    sections = [record["section"] for record in runs]
    assert {name: sections.count(name) for name in sections} == {"steps": 8, "updates": 8, "2:4": 2}
    assert results["failed"] == []
    assert results["machine"]["device"] == "cpu"
    assert results["machine"]["torch"] == torch.__version__
    for record in runs:
        assert record["date"].startswith("20") and record["on"]["device"] == "cpu"
    for record in (r for r in runs if r["section"] == "steps"):
        assert record["sparsity"] == pytest.approx(0.9, abs=0.001)
        for name in ("dense_ms", "sparse_ms", "ratio"):
            low, high = record[name]["quartiles"]
            assert 0 < low <= record[name]["median"] <= high
        assert len(record["ratio"]["interval_95"]) == 2
    for record in (r for r in runs if r["section"] == "updates"):
        assert record["updates"] == 2
        names = {"dense_training_step_ms", "optimizer_step_ms", "optimizer_step_with_update_ms"}
        assert record.keys() >= names | {"update_ms", "update_in_training_steps", "amortised"}
    assert all("skipped" in record for record in runs if record["section"] == "2:4")


def test_the_tables_name_the_device_and_what_was_not_measured(results: dict[str, Any]) -> None:
    text = tables(results)
    assert text.startswith(f"Measured on cpu, torch {torch.__version__}, {results['date'][:10]}.")
    assert "Not measured: 2:4 products need a CUDA GPU." in text
    assert text.count("| gpt2 (tiny, own, batch 2) |") == 8


def test_the_goal_is_met_only_by_the_whole_interval(results: dict[str, Any]) -> None:
    for interval, verdict in (([0.9, 1.01], "yes"), ([1.0, 1.02], "open"), ([1.02, 1.03], "no")):
        changed = copy.deepcopy({k: v for k, v in results.items() if k != "folder"})
        steps = [record for record in changed["runs"] if record["section"] == "steps"][:1]
        steps[0]["ratio"]["interval_95"] = interval
        assert tables(changed | {"runs": steps}).rstrip().endswith(f"| {verdict} |")


def test_a_run_goes_on_where_it_was_stopped(
    results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = results["folder"] / "results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    log.write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    calls: list[str] = []

    def counted(workload: Workload, optimizer: str, precision: str, *rest: Any) -> dict[str, Any]:
        calls.append(f"{workload.network} {optimizer} {precision}")
        return {name: json.loads(lines[0])[name] for name in ("dense_ms", "sparse_ms", "ratio")}

    monkeypatch.setattr(measures, "steps", counted)
    run.main([*TINY, "--out", str(results["folder"])])
    assert calls == ["resnet50 SGD bfloat16"]


def test_results_of_another_device_are_not_mixed_in(
    results: dict[str, Any], tmp_path: Path
) -> None:
    record = copy.deepcopy(results["runs"][0])
    record["on"]["device"] = "some card"
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="some card"):
        run.main([*TINY, "--out", str(tmp_path)])


def test_a_measurement_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measures, "steps", fails)
    monkeypatch.setattr(measures, "updates", lambda *arguments: {"skipped": "not here"})
    with pytest.raises(SystemExit, match=r"8 of the measurements failed: .*out of memory"):
        run.main([*TINY, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(written["runs"]) == 10 and len(written["failed"]) == 8


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--device", "cpu", "--tiny"], "give a folder with --out"),
        (["--device", "cpu"], "give a folder with --out"),
        (["--rounds", "1"], "--rounds must be at least 2"),
    ],
    ids=["tiny", "cpu", "one_round"],
)
def test_what_is_no_measurement_is_not_kept_here(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.options_of(arguments)
    assert words in capsys.readouterr().err


def test_without_a_card_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main([])
    assert "torch finds no CUDA card, so nothing was measured" in capsys.readouterr().err


def test_the_readme_says_what_there_is() -> None:
    text = (run.HERE / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- results -->")[2].partition("<!-- /results -->")[0].strip()
    kept = run.HERE / "results.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        assert shown == tables(found).strip()
        assert "Nothing has been measured" not in text
    else:
        assert shown == "not run: no GPU was at hand"
        assert "Nothing has been measured" in text


# The networks.


@pytest.mark.parametrize("network", PARAMETERS)
def test_full_networks_have_the_parameters_of_the_papers(network: Any) -> None:
    with torch.device("meta"):
        model = Workload(network, "full", 1).model()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[network]


def test_the_decoder_written_out_is_that_of_transformers() -> None:
    pytest.importorskip("transformers")
    sizes = GPT2["tiny"]
    theirs, ours = LogitsAlone(sizes), Decoder(sizes)
    named = {n.removeprefix("inner."): p for n, p in theirs.named_parameters()}
    assert named.keys() == dict(ours.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            is_matrix = ".c_" in name and parameter.dim() == 2  # theirs are [inputs, outputs]
            parameter.copy_(named[name].T if is_matrix else named[name])
    tokens, _ = Workload("gpt2", "tiny", 3).batch(CPU)
    torch.testing.assert_close(ours(tokens), theirs(tokens))


# The numbers.


def test_interval_of_a_median() -> None:
    values = [float(v) for v in range(21)]
    assert interval_of_median(values[::-1]) == (5.0, 15.0)  # the tables of order statistics
    assert interval_of_median([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_ratios_are_taken_within_a_round() -> None:
    """A slow round hits both alike and changes no ratio."""
    found = ratio([1.1, 110.0, 2.2], [1.0, 100.0, 2.0])
    assert found["median"] == 1.1 and found["quartiles"] == [1.1, 1.1]


def test_products_are_checked_against_float64() -> None:
    def wrong(model: nn.Module) -> nn.Module:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.weight.mul_(1.5)
        return twin

    right = measures.two_of_four("tiny", "bfloat16", 16, CPU, EFFORT, copy.deepcopy)["layers"]
    assert [layer["inputs_outputs"] for layer in right] == [
        [64, 192],
        [64, 64],
        [64, 256],
        [256, 64],
    ]
    assert all(layer["is_accurate"] for layer in right)
    bad = measures.two_of_four("tiny", "bfloat16", 16, CPU, EFFORT, wrong)["layers"]
    assert not any(layer["is_accurate"] for layer in bad)
    record = {"section": "2:4", "dtype": "bfloat16", "tokens": 16, "layers": bad}
    results = {"machine": {"device": "d", "torch": "t"}, "date": "2026-01-01", "failed": []}
    assert tables({**results, "runs": [record]}).count("(too large)") == 4
