"""How well the next layer's outputs come out with fewer inputs, by method, layer and count.

    python -m reference_runs.channels_fashion_mnist.reconstruction

after `run` has trained the VGG-style network. Writes reconstruction.json and its table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.channels_fashion_mnist.methods import METHODS
from reference_runs.channels_fashion_mnist.networks import HERE, data, trained
from reference_runs.channels_fashion_mnist.run import calibration

NETWORK = "vgg"
#: In the order that is expected, from the least error to the largest.
NAMES = ("thinet", "lasso", "thinet_discard", "l1", "random")
RATIOS = (0.3, 0.5, 0.7)
TEST_IMAGES = 1000  # none of which a method has seen


def outputs_of(model: nn.Module, layer: str) -> Tensor:
    """What a layer gives for the test images."""
    found: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    model.eval()
    with torch.no_grad():
        model(data().test_x[:TEST_IMAGES])
    handle.remove()
    return found[0]


def measure(seed: int) -> list[common.Record]:
    """Relative squared error of the layer after each that loses channels, alone."""
    model, rows = trained(NETWORK, seed), []
    example = data().test_x[:1]
    for coupling in st.channels.couplings(model, example):
        (after,) = coupling.by_role("in")
        expected = outputs_of(model, after.layer)
        for ratio in RATIOS:
            for name in NAMES:
                result = st.channels.prune(
                    model,
                    example,
                    METHODS[name].method,
                    {coupling.name: ratio},
                    calibration=calibration(),
                    measure_latency=False,
                    seed=seed,
                )
                error = outputs_of(result.model, after.layer) - expected
                size = (expected - expected.mean()).square().sum()
                rows.append(
                    {
                        "seed": seed,
                        "layer": after.layer,
                        "ratio": ratio,
                        "method": name,
                        "error": float(error.square().sum() / size),
                    }
                )
    return rows


def table_of(rows: Sequence[common.Record], ratio: float) -> str:
    """A row a method, a column a layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = []
    for name in NAMES:
        cells = []
        for layer in layers:
            key = (layer, ratio, name)
            errors = [r["error"] for r in rows if (r["layer"], r["ratio"], r["method"]) == key]
            cells.append(f"{common.mean(errors):.4f}")
        lines.append([METHODS[name].label, *cells])
    return common.markdown_table(["next layer", *layers], lines)


def violations(rows: Sequence[common.Record]) -> tuple[int, list[str]]:
    """How many neighbours in the expected order were compared, and which are the other way round.

    Means over the seeds.
    """
    places = list(dict.fromkeys((row["layer"], row["ratio"]) for row in rows))
    compared, found = 0, []
    for layer, ratio in places:
        means = {
            name: common.mean(
                [
                    row["error"]
                    for row in rows
                    if (row["layer"], row["ratio"], row["method"]) == (layer, ratio, name)
                ]
            )
            for name in NAMES
        }
        for better, worse in pairwise(NAMES):
            compared += 1
            if means[better] > means[worse]:
                labels = f"{METHODS[better].label} > {METHODS[worse].label}"
                found.append(f"{layer}, {100 * ratio:g} %: {labels}")
    return compared, found


def main() -> None:
    """Measure, then write reconstruction.json and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = [row for seed in range(arguments.seeds) for row in measure(seed)]
    compared, wrong = violations(rows)
    result = {"machine": common.machine(), "compared": compared, "other_way": wrong, "rows": rows}
    common.write_json(HERE / "reconstruction.json", result)
    parts = []
    for ratio in RATIOS:
        parts += [f"{100 * ratio:g} % of the channels gone:", table_of(rows, ratio)]
    parts.append(
        f"Of {compared} neighbours in the expected order {len(wrong)} are the other way round:"
    )
    parts += ["\n".join(f"- {line}" for line in wrong)]
    common.put_into(HERE / "README.md", "\n\n".join(parts), section="reconstruction")


if __name__ == "__main__":
    main()
