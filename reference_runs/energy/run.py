"""Estimated energy at equal products: a dense network, fewer channels, and zeros anywhere.

    python -m reference_runs.energy.run

from the repository's root; some seconds, no training: energy depends on shapes and counts alone.
Writes results.json, energy.png and the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.networks import NETWORKS
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.report import plots

HERE = Path(__file__).parent
EXAMPLE = torch.zeros(1, 1, 28, 28)
PROFILES = {
    "Eyeriss, 16 bits": st.cost.Hardware.eyeriss(),
    "45 nm, 16 bits": st.cost.Hardware.horowitz_45nm(16),
}
LEVELS = ("macs", "registers", "array", "buffer", "dram")
#: The layer of docs/energy.md: 64 channels, 3 x 3, 32 x 32 positions.
SAME = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
LAYER = LayerUse("conv", "conv", "convolution", 64, 64, in_size=(32, 32), out_size=(32, 32), **SAME)


def forms() -> dict[str, dict[str, Sequence[LayerUse]]]:
    """Label -> form -> layers; the sparse forms of a label have equally many products."""
    found: dict[str, dict[str, Sequence[LayerUse]]] = {
        "convolution, 64 channels": {
            "dense": [LAYER],
            "structured": [replace(LAYER, outputs=32)],
            "unstructured": [replace(LAYER, density=0.5)],
        }
    }
    for chosen in NETWORKS.values():
        model = chosen.build()
        dense = layers_used(model, EXAMPLE)
        smaller = st.channels.prune(model, EXAMPLE, "l1", flops=0.5, measure_latency=False)
        structured = layers_used(smaller.model, EXAMPLE)
        share = sum(use.flops for use in structured) / sum(use.flops for use in dense)
        unstructured = [replace(use, density=share) for use in dense]
        found[chosen.label] = {
            "dense": dense,
            "structured": structured,
            "unstructured": unstructured,
        }
    return found


def measure() -> list[common.Record]:
    """A row a network, form and profile; microjoules."""
    rows = []
    for label, by_form in forms().items():
        for profile, hardware in PROFILES.items():
            for form, layers in by_form.items():
                report = st.cost.energy_of(layers, hardware)
                levels = {name: round(1e6 * joules, 4) for name, joules in report.levels.items()}
                row = {"network": label, "profile": profile, "form": form, **levels}
                rows.append({**row, "all": round(1e6 * report.total, 4), "products": report.macs})
    return rows


def tables(rows: Sequence[common.Record]) -> str:
    """One a profile; a row a network and form."""
    parts = []
    for profile in PROFILES:
        mine = [row for row in rows if row["profile"] == profile]
        dense = {row["network"]: row["all"] for row in mine if row["form"] == "dense"}
        lines = [
            [
                f"{row['network']}, {row['form']}",
                *(f"{row[name]:.2f}" for name in (*LEVELS, "all")),
                f"{row['all'] / dense[row['network']]:.3f}",
            ]
            for row in mine
        ]
        head = ["microjoules a sample", *LEVELS, "all", "of dense"]
        parts += [f"### {profile}", common.markdown_table(head, lines)]
    return "\n\n".join(parts)


def draw(rows: Sequence[common.Record]) -> Figure:
    """Stacked levels, a panel a profile."""
    figure = plots.new_figure(11.0, 4.4)
    for ax, profile in zip(figure.subplots(1, 2), PROFILES, strict=True):
        mine = [row for row in rows if row["profile"] == profile]
        dense = {row["network"]: row["all"] for row in mine if row["form"] == "dense"}
        names = [f"{row['network'].split(',')[0]}\n{row['form']}" for row in mine]
        heights = [0.0] * len(mine)
        for number, level in enumerate(LEVELS):
            shares = [row[level] / dense[row["network"]] for row in mine]
            ax.bar(names, shares, bottom=heights, color=plots.COLOURS[number], label=level)
            heights = [h + s for h, s in zip(heights, shares, strict=True)]
        ax.tick_params(axis="x", labelsize=6, rotation=60)
        plots.finish(ax, profile, "", "Energy, of the dense network's")
    ax.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Work it out and write everything."""
    rows = measure()
    common.write_json(HERE / "results.json", {"table": rows})
    plots.save(draw(rows), HERE / "energy.png")
    common.put_into(HERE / "README.md", tables(rows))


if __name__ == "__main__":
    main()
