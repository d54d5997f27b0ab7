"""The HTML page of a training run, made from the files in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsetrain.report import html, plots
from sparsetrain.report.ages import AgeRecord
from sparsetrain.report.events import LayerChange, UpdateEvent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_run_page(folder: Path) -> Path:
    """Draw `picture.png` and write `report.html` in the folder of a run; returns the page's path.

    Works for a run that was interrupted, too. Raises ValueError when the folder holds no run, or
    one in which no epoch has ended.
    """
    settings = _read_json(folder / "run.json")
    metrics = _read_lines(folder / "metrics.jsonl")
    if settings is None or not metrics:
        problem = "no run: run.json is missing" if settings is None else "a run without an epoch"
        raise ValueError(f"{folder} holds {problem}; `sparsetrain train --out` makes one")
    try:
        return _write(folder, settings, metrics)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the files in {folder} are not those of a run by this version: {error!r} is missing "
            "or of another kind"
        ) from error


def _write(folder: Path, settings: dict[str, Any], metrics: list[dict[str, Any]]) -> Path:
    summary = _read_json(folder / "summary.json")
    events = [event_from(line) for line in _read_lines(folder / "events.jsonl")]
    ages = [AgeRecord(**line) for line in _read_lines(folder / "ages.jsonl")]
    figure = _draw(metrics, summary, events, ages)
    plots.save(figure, folder / "picture.png")
    page = _page(settings, metrics, summary, plots.to_png(figure))
    return page.write(folder / "report.html")


def event_from(data: dict[str, Any]) -> UpdateEvent:
    """The event that `UpdateEvent.to_dict` turned into plain data."""
    layers = tuple(LayerChange(**layer) for layer in data["layers"])
    return UpdateEvent(**{**data, "layers": layers})


def _draw(
    metrics: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    events: list[UpdateEvent],
    ages: list[AgeRecord],
) -> Figure:
    layers = (summary or {}).get("layers", {})
    changing = len(events) > 1
    panels = 1 + bool(layers) + 2 * changing
    columns = 2 if panels > 1 else 1
    rows = -(-panels // columns)
    figure = plots.new_figure(5.5 * columns, 3.8 * rows)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    spaces = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    plots.learning_curve({"": [line["test_accuracy"] for line in metrics]}, ax=spaces.pop(0))
    if layers:
        densities = {
            name.removesuffix(".weight"): layer["active"] / layer["total"]
            for name, layer in layers.items()
        }
        plots.density_per_layer({"": densities}, ax=spaces.pop(0))
    if changing:
        plots.mask_turnover(events, ax=spaces.pop(0))
        plots.mask_age(ages, ax=spaces.pop(0))
    return figure


def _page(
    settings: dict[str, Any],
    metrics: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    picture: bytes,
) -> html.Page:
    config, last = settings["config"], metrics[-1]
    recipe = config["recipe"]
    sections = [
        html.Section("Result", html.Facts(_result(metrics, summary))),
        html.Section("Picture", html.Picture(picture, "Accuracy, densities and mask changes")),
    ]
    if summary is not None and "layers" in summary:
        sections.append(html.Section("Layers", _layers(summary["layers"])))
    if recipe is not None:
        text = yaml.safe_dump(recipe, sort_keys=False)
        sections.append(html.Section("Recipe", html.Code(text)))
    run = {name.replace("_", " "): str(config[name]) for name in config if name != "recipe"}
    sections.append(html.Section("What was run", html.Facts(run | settings["environment"])))
    sparse = "" if last["sparsity"] is None else f" with {100 * last['sparsity']:.2f} % zeros"
    lead = (
        f"{100 * last['test_accuracy']:.2f} % test accuracy after epoch {last['epoch']} of "
        f"{config['epochs']}{sparse}."
    )
    return html.Page(f"{config['network']} on {config['data']}", lead, sections)


def _result(metrics: list[dict[str, Any]], summary: dict[str, Any] | None) -> dict[str, str]:
    last = metrics[-1]
    result = {
        "test accuracy": f"{100 * last['test_accuracy']:.2f} %",
        "best test accuracy": f"{100 * max(line['test_accuracy'] for line in metrics):.2f} %",
        "training loss": f"{last['loss']:.4f} in the last epoch",
        "steps": f"{last['step']:,}",
        "time": f"{sum(line['seconds'] for line in metrics):.1f} s in training steps",
    }
    if summary is None:
        return result | {"state": "not finished"}
    if "training_multiple" in summary:
        result["training FLOPs"] = f"{summary['training_multiple']:.3f} x dense"
        result["inference FLOPs"] = f"{summary['inference_multiple']:.3f} x dense"
    return result


def _layers(layers: dict[str, dict[str, Any]]) -> html.Table:
    return html.Table(
        ("layer", "shape", "weights", "kept", "density"),
        [
            (
                name,
                " x ".join(map(str, layer["shape"])),
                f"{layer['total']:,}",
                f"{layer['active']:,}",
                f"{100 * layer['active'] / layer['total']:.2f} %",
            )
            for name, layer in layers.items()
        ],
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
