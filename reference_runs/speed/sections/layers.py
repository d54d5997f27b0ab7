"""One layer's forward and backward pass by density: where sparse begins to win."""

from __future__ import annotations

from itertools import product

from torch import nn

from reference_runs import _common as common
from reference_runs.speed.sections.base import Effort, Record, Section, per_cent
from sparsetrain.storage.csr.measure import measure as measure_layer
from sparsetrain.switching import worth

DENSITIES = (0.5, 0.3, 0.25, 0.2, 0.1, 0.05, 0.02, 0.01)
#: (channels, pixels a side): what residual networks have, on small images.
PLANES = ((64, 8), (64, 32), (128, 16), (128, 32), (256, 8), (256, 16), (512, 8))
IMAGES = 64


def cases(quick: bool) -> list[Record]:
    """Linear layers, and convolutions of 3 x 3 and 1 x 1, at each density."""
    if quick:
        shapes, densities = [_linear(256, 32), _convolution(3, 64, 8)], (0.25, 0.02)
    else:
        shapes = [_linear(n, b) for b, n in product((128, 32), (256, 512, 1024, 2048, 4096))]
        shapes += [_convolution(size, *plane) for size, plane in product((3, 1), PLANES)]
        densities = DENSITIES
    return [{**shape, "density": density} for shape, density in product(shapes, densities)]


def _linear(width: int, batch: int) -> Record:
    return {"kind": "Linear", "width": width, "kernel": 1, "input": [batch, width]}


def _convolution(kernel: int, channels: int, side: int) -> Record:
    return {
        "kind": "Conv2d",
        "width": channels,
        "kernel": kernel,
        "input": [IMAGES, channels, side, side],
    }


def measure(case: Record, effort: Effort) -> Record:
    """Milliseconds of the layer held densely and by its non-zeros, as `storage="auto"` does."""
    timing = measure_layer(_build(case), case["density"], tuple(case["input"]))
    return {
        "dense_ms": round(timing.dense, 4),
        "csr_ms": round(timing.sparse, 4),
        "speedup": round(timing.dense / timing.sparse, 3),
    }


def _build(case: Record) -> nn.Module:
    width, kernel = case["width"], case["kernel"]
    if case["kind"] == "Linear":
        return nn.Linear(width, width)
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)


def _label(row: Record) -> str:
    width, kernel, shape = row["width"], row["kernel"], row["input"]
    if row["kind"] == "Linear":
        return f"Linear {width} x {width}, batch {shape[0]}"
    return f"Conv2d {width} x {width}, {kernel} x {kernel}, {shape[2]} x {shape[3]} pixels"


def wins_from(speedups: dict[float, float]) -> float | None:
    """The highest density from which on, downwards, sparse is faster throughout."""
    found = None
    for density in sorted(speedups):
        if speedups[density] <= 1:
            break
        found = density
    return found


def table(rows: list[Record]) -> str:
    """One row a layer: times faster than dense at each density, and where csr begins to win."""
    densities = sorted({row["density"] for row in rows}, reverse=True)
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        lines.setdefault(_label(row), {})[row["density"]] = row["speedup"]
    head = ["layer, times faster than dense at", *map(per_cent, densities), "wins from"]
    shown = []
    for label, speedups in lines.items():
        begin = wins_from(speedups)
        cells = [f"{speedups[d]:.2f}" if d in speedups else "" for d in densities]
        shown.append([label, *cells, "never" if begin is None else per_cent(begin)])
    return common.markdown_table(head, shown) + "\n\n" + _worth()


def _worth() -> str:
    """What `storage="csr"` goes by today."""
    layers = {"Linear": nn.Linear(1, 1), "Conv2d of 1 x 1": nn.Conv2d(1, 1, 1)}
    said = ", ".join(f"{kind} from {per_cent(worth(layer))}" for kind, layer in layers.items())
    return f'`storage="csr"` holds a weight sparse where that pays: {said}; other layers never.'


SECTION = Section(cases, measure, table)
