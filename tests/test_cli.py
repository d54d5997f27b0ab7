from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import sparsetrain as st
from sparsetrain import cli
from sparsetrain.commands import app
from sparsetrain.demo import SPARSITIES, draw, mean_and_error, run_demo

RIGL = "policy: {kind: rigl, sparsity: 0.9, total_steps: 24, update: {every: 4}}\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failed(*arguments: object) -> str:
    """What a command that must fail says, as one line."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "rigl.yaml"
    path.write_text(RIGL)
    return path


@pytest.mark.parametrize("command", ["demo", "train", "validate", "inspect", "report"])
def test_help_teaches_by_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"sparsetrain {command}" in result.output


def test_version() -> None:
    assert run("--version").output.strip() == st.__version__


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_validate_prints_the_whole_recipe(flag: list[str], recipe: Path) -> None:
    result = run("validate", recipe, *flag)
    assert result.exit_code == 0
    assert "erdos_renyi_kernel" in result.output
    printed = st.Recipe.from_text(result.output)
    assert printed == st.Recipe.load(recipe)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("policy: {kind: rigll, sparsity: 0.9}", "did you mean 'rigl'"),
        ("policy: {kind: static, sparsity: 1.5}", "policy.sparsity: Input should be less than 1"),
        ("policy: {kind: static, sparsty: 0.5}", "sparsty"),
        ("- a list", "must hold a mapping"),
        ("policy: [", "not valid YAML"),
    ],
)
def test_validate_says_what_is_wrong(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = failed("validate", tmp_path / "bad.yaml")
    assert problem in message
    assert "bad.yaml" in message
    assert "errors.pydantic.dev" not in message


def test_validate_of_a_missing_file(tmp_path: Path) -> None:
    assert "none.yaml" in failed("validate", tmp_path / "none.yaml")


def test_inspect_shows_layers(tmp_path: Path) -> None:
    weight = torch.ones(4, 5)
    weight[0] = 0
    torch.save({"fc.weight": weight}, tmp_path / "a.pt")
    result = run("inspect", tmp_path / "a.pt")
    assert result.exit_code == 0
    for text in ("fc.weight", "4 x 5", "15", "25.00 %"):
        assert text in result.output
    listed = json.loads(run("inspect", tmp_path / "a.pt", "--json").output)
    assert listed["tensors"][0]["nonzeros"] == 15


def test_inspect_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("hello")
    assert "not a torch checkpoint" in failed("inspect", tmp_path / "a.pt")


def test_train_then_inspect_resume_and_report(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--data", "digits", "--network", "lenet_300_100", "--epochs", 2, "--out", folder]
    result = run("train", recipe, *options)
    assert result.exit_code == 0, result.output
    assert "90.00 % zeros" in result.output
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "summary.json").read_text())["sparsity"] == pytest.approx(0.9)
    assert "45,180" not in run("inspect", folder / "model.pt").output
    assert "holds a run already" in failed("train", recipe, *options)
    assert "has lr 0.1, not 0.2" in failed("train", recipe, *options, "--resume", "--lr", 0.2)
    assert run("train", recipe, *options, "--resume").exit_code == 0
    (folder / "report.html").unlink()
    assert run("report", folder).exit_code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "lenet_300_100 on digits" in page
    assert "kind: rigl" in page


def test_interrupted_train_says_how_to_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsetrain.workbench.runs.train", interrupt)
    result = run("train", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "--resume" in result.output


def test_train_wants_matching_steps(recipe: Path, tmp_path: Path) -> None:
    message = failed("train", recipe, "--epochs", 3, "--out", tmp_path / "run")
    assert "write total_steps: 36 there" in message
    assert not (tmp_path / "run").exists()


def test_train_dense(tmp_path: Path) -> None:
    result = run("train", "dense", "--epochs", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "zeros" not in result.output


def test_report_of_a_folder_without_a_run(tmp_path: Path) -> None:
    assert "holds no run" in failed("report", tmp_path)


def test_demo_command_writes_picture_and_page(tmp_path: Path) -> None:
    result = run("demo", "--epochs", 1, "--seeds", 1, "--seed", 5, "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    for text in ("dense", "static", "RigL", "98 %", "test accuracy", "1,004"):
        assert text in result.output
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "<dt>seeds</dt><dd>5</dd>" in page


def test_demo_orders_the_methods() -> None:
    threads = torch.get_num_threads()
    demo = run_demo(seeds=1, epochs=15)
    assert torch.get_num_threads() == threads
    accuracy = {(r.method, r.sparsity): r.accuracy for r in demo.runs}
    assert accuracy["dense", 0.0] > 0.95
    assert accuracy["rigl", 0.98] > accuracy["static", 0.98]
    for run_ in demo.runs:
        assert run_.kept == round((1 - run_.sparsity) * 50_200)
        assert run_.inference_multiple == pytest.approx(1 - run_.sparsity, abs=1e-4)
    for sparsity in SPARSITIES:
        (rigl,), (static,) = demo.of("rigl", sparsity), demo.of("static", sparsity)
        assert rigl.training_multiple > static.training_multiple
    assert len(draw(demo).axes) == 3


def test_errors_of_one_and_of_several_seeds() -> None:
    assert mean_and_error([0.9]) == "90.0 %"
    assert mean_and_error([0.9, 0.92]) == "91.0 ± 1.0 %"


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda package: None if package == "typer" else object())
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'sparsetrain\[demo\]'"):
        cli.main()
