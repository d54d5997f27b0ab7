"""Evaluated points: each network is evaluated once, and none is lost when a search is killed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparsetrain.keeping import append_line, first_difference, read_lines
from sparsetrain.search.knobs import Knobs, Ratios

#: Gives the metric of a network, larger for better ones. It may change the network, which is a
#: copy: calibrate its batch normalisation, say, or train it for a while.
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Evaluated:
    """One evaluated network.

    Attributes:
        ratios: name of a knob -> share that was really removed.
        metric: what `evaluate` returned.
        seconds: that pruning and evaluation took.
        repeat: number of this evaluation of the same network.
    """

    ratios: dict[str, float]
    metric: float
    seconds: float
    repeat: int = 0


class Evaluations:
    """Metrics of pruned networks, kept in a folder if there is one.

    Args:
        folder: for `settings.json` and `evaluations.jsonl`. Any searches of the same model and way
            of pruning may share it, and profit from each other's points.

    Raises:
        ValueError: the folder has evaluations of another model or another way of pruning.
    """

    def __init__(self, knobs: Knobs, evaluate: Evaluate, folder: Path | str | None = None) -> None:
        self.knobs, self.evaluate = knobs, evaluate
        self.path: Path | None = None
        self.known: dict[str, Evaluated] = {}
        self.new = 0  # evaluations that were made, not found
        if folder is not None:
            self.path = Path(folder) / "evaluations.jsonl"
            if difference := first_difference(Path(folder), knobs.fingerprint()):
                raise ValueError(
                    f"{folder} has evaluations of another {difference[0]}: give the same as then, "
                    "or another folder"
                )
            for record in read_lines(self.path):
                done = Evaluated(**record)
                self.known[_key(done.ratios, done.repeat)] = done

    def of(self, ratios: Ratios, repeat: int = 0) -> Evaluated:
        """A network's evaluation, known or made now.

        Args:
            repeat: another number asks for another evaluation of the same network.

        Raises:
            ValueError: the metric is not a finite number.
        """
        return self.known.get(self._key(ratios, repeat)) or self.with_network(ratios, repeat)[1]

    def with_network(self, ratios: Ratios, repeat: int = 0) -> tuple[nn.Module, Evaluated]:
        """Evaluate a network now, and return the very network, too."""
        started = time.perf_counter()
        network = self.knobs.network(ratios)
        metric = float(self.evaluate(network))
        if not math.isfinite(metric):
            raise ValueError(f"evaluate returned {metric}, and has to return a finite number")
        seconds = time.perf_counter() - started
        done = Evaluated(self.knobs.rounded(ratios), metric, seconds, repeat)
        self.known[self._key(ratios, repeat)] = done
        self.new += 1
        if self.path is not None:
            append_line(self.path, done.__dict__)
        return network, done

    def _key(self, ratios: Ratios, repeat: int) -> str:
        return _key(self.knobs.rounded(ratios), repeat)


def _key(rounded: Ratios, repeat: int) -> str:
    return json.dumps([{name: round(ratio, 9) for name, ratio in rounded.items()}, repeat])
