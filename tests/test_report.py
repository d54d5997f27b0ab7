from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsetrain as st
from sparsetrain.report import html, plots, run_page
from sparsetrain.report.ages import AgeRecord, MaskAges
from sparsetrain.report.events import LayerChange, UpdateEvent

EVENTS = [
    UpdateEvent(
        step=step,
        sparsity=0.9,
        exploration_rate=0.1 + step / 1000,
        layers=(LayerChange("fc1", 30, 30, 100, 1000), LayerChange("fc2", 10, 10, 100, 1000)),
    )
    for step in range(0, 300, 100)
]


class Parser(HTMLParser):
    """Notes tags that are opened and not closed, and everything that is loaded from elsewhere."""

    void = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert not parser.open
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    return parser


def test_accuracy_lines_are_means_with_standard_errors() -> None:
    values = [0.90, 0.92, 0.97]
    figure = plots.accuracy_against_sparsity(
        {"RigL": {0.99: [0.8], 0.9: values}, "SET": {0.9: [0.5, 0.7]}}, dense=[0.98, 0.96]
    )
    ax = figure.axes[0]
    rigl = ax.containers[0]
    assert rigl.get_label() == "RigL"
    assert list(rigl.lines[0].get_ydata()) == pytest.approx([100 * statistics.mean(values), 80])
    bar = rigl.lines[2][0].get_segments()[0]
    error = 100 * statistics.stdev(values) / math.sqrt(3)
    assert (bar[1, 1] - bar[0, 1]) / 2 == pytest.approx(error)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["90", "99"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["dense", "RigL", "SET"]


def test_sparsity_of_one_has_no_place() -> None:
    with pytest.raises(ValueError, match=r"sparsity 1\.0 is outside"):
        plots.accuracy_against_sparsity({"RigL": {1.0: [0.1]}})


def test_density_bars_are_grouped_by_layer() -> None:
    figure = plots.density_per_layer(
        {"90 %": {"fc1": 0.05, "fc2": 0.4}, "98 %": {"fc2": 0.1, "fc3": 1.0}}
    )
    first, second = figure.axes[0].containers
    assert [bar.get_height() for bar in first] == pytest.approx([5, 40])
    assert [bar.get_height() for bar in second] == pytest.approx([10, 100])
    centres = [bar.get_x() + bar.get_width() / 2 for bar in (*first, *second)]
    assert [round(centre) for centre in centres] == [0, 1, 1, 2]


def test_turnover_is_one_line_when_as_many_grow_as_drop() -> None:
    (line,) = plots.mask_turnover(EVENTS).axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([20, 20, 20])
    pruning = [UpdateEvent(0, 0.9, 0.1, (LayerChange("fc1", 30, 0, 100, 1000),))]
    dropped, grown = plots.mask_turnover(pruning).axes[0].lines
    assert (dropped.get_ydata()[0], grown.get_ydata()[0]) == (30, 0)


@pytest.mark.parametrize(
    ("figure", "unit"),
    [
        (plots.exploration_rate({"RigL": EVENTS, "SET": EVENTS}), "%"),
        (plots.mask_age([AgeRecord(0, 0.0, 1.0), AgeRecord(5, 4.5, 0.9)]), "steps"),
        (plots.learning_curve({"RigL": [0.5, 0.9], "dense": [0.6, 0.9]}), "%"),
        (plots.mask_turnover([]), "%"),
    ],
)
def test_plots_have_titles_and_units_and_can_be_saved(
    figure: object, unit: str, tmp_path: Path
) -> None:
    ax = figure.axes[0]
    assert ax.get_title(loc="left")
    assert f"[{unit}]" in ax.get_ylabel()
    assert ax.get_xlabel()
    assert plots.to_png(figure).startswith(b"\x89PNG")
    assert plots.save(figure, tmp_path / "new" / "a.svg").exists()


def test_plots_go_on_given_axes() -> None:
    figure = plots.new_figure()
    left, right = figure.subplots(1, 2)
    assert plots.mask_turnover(EVENTS, ax=right) is figure
    assert not left.lines


def test_page_is_whole_escaped_and_alone() -> None:
    page = html.Page(
        "a < b & c",
        'says "<script>"',
        (
            html.Section("Table", html.Table(("x", "y"), [("<b>", "1"), ("é", "2")]), "text <i>"),
            html.Section("Picture", html.Picture(b"\x89PNG", 'with "quotes"')),
            html.Section("Facts", html.Facts({"seed": "1 & 2"})),
            html.Section("Code", html.Code("a: <b>")),
        ),
    )
    parser = parse(page.render())
    assert "script" not in parser.tags
    assert "b" not in parser.tags
    assert len(parser.links) == 1
    for text in ("a < b & c", 'says "<script>"', "text <i>", "<b>", "é", "1 & 2", "a: <b>"):
        assert text in parser.text


def slow_ages(
    history: list[dict[str, torch.Tensor]], steps: list[int]
) -> list[tuple[float, float]]:
    """Mean age and original share by walking over every weight (history[0] is the beginning)."""
    results = []
    for now in range(1, len(history)):
        ages = []
        for name, mask in history[now].items():
            for index in mask.flatten().nonzero().flatten().tolist():
                since = now
                while since > 0 and history[since - 1][name].flatten()[index]:
                    since -= 1
                ages.append(steps[now] - (steps[since] if since else 0))
        original = sum(age == steps[now] for age in ages)
        results.append((sum(ages) / len(ages), original / len(ages)))
    return results


def test_ages_match_a_walk_over_every_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = st.SET(sparsity=0.6, total_steps=40, update=st.UpdateSchedule(every=3, start=2))
    optimizer = st.SparseOptimizer(base, model, policy)
    history, steps = [optimizer.masks()], [0]

    def note(event: UpdateEvent) -> None:
        history.append(optimizer.masks())
        steps.append(event.step)

    optimizer.register_update_hook(note)
    ages = MaskAges(optimizer)
    for step in range(40):
        if step == 20:
            saved = ages.state_dict()
            ages.close()
            ages = MaskAges(optimizer)
            ages.load_state_dict(saved)
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    expected = slow_ages(history, steps)
    assert len(ages.records) == len(expected) > 10
    assert [record.step for record in ages.records] == steps[1:]
    assert [r.mean_age for r in ages.records] == pytest.approx([age for age, _ in expected])
    assert [r.original for r in ages.records] == pytest.approx([share for _, share in expected])


def test_page_of_an_interrupted_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        run_page.write_run_page(tmp_path)
    config = {"recipe": None, "network": "mlp", "data": "digits", "epochs": 9, "seed": 3}
    settings = {"config": config, "environment": {"torch": "2"}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="a run without an epoch"):
        run_page.write_run_page(tmp_path)
    record = {"epoch": 1, "step": 5, "loss": 0.5, "test_accuracy": 0.75, "seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**record, "sparsity": None}) + "\n")
    parser = parse(run_page.write_run_page(tmp_path).read_text(encoding="utf-8"))
    assert "75.00 % test accuracy after epoch 1 of 9." in parser.text
    assert "not finished" in parser.text


def test_core_does_not_import_what_the_demo_needs() -> None:
    code = (
        "import sys, sparsetrain, sparsetrain.workbench, sparsetrain.inspect, sparsetrain.cli\n"
        "import sparsetrain.report.plots, sparsetrain.report.html, sparsetrain.demo\n"
        "print([m for m in ('typer', 'matplotlib', 'sklearn', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
