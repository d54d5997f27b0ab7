"""Measured lookup tables, and the latency of networks with fewer channels or weights from them.

As in ProxylessNAS (Cai et al. 2019, section 3.3 and appendix B) and NetAdapt (Yang et al. 2018,
section 3.4), a network's latency is a sum over its layers, each measured on the machine. Beside its
layers a network spends time on norms, activations, additions and calls; that is measured in whole
networks of several widths, with the time stopped at the borders of layers.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from sparsetrain._threads import torch_threads
from sparsetrain.cost.layers import LayerUse, layers_used
from sparsetrain.cost.lookup.layers import Storage
from sparsetrain.cost.lookup.measuring import measuring
from sparsetrain.cost.lookup.passes import NetworkTime
from sparsetrain.cost.lookup.plan import Plan, as_in, input_sizes, make_plan
from sparsetrain.cost.lookup.prediction import Prediction
from sparsetrain.cost.lookup.uses import Measured
from sparsetrain.cost.machine import Machine
from sparsetrain.keeping import whole_file
from sparsetrain.storage.csr.convert import sparsify
from sparsetrain.storage.csr.layers import SparseLayer

FORMAT = 1
#: Shares of zeros at which csr storage is measured.
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of layers and of whole networks, and predictions from them.

    Attributes:
        plan: what was measured, where and how.
        measured: seconds of single layers, a shape each.
        networks: seconds of whole networks; the first is the one that the table was made for.
    """

    plan: Plan
    measured: tuple[Measured, ...] = ()
    networks: tuple[NetworkTime, ...] = ()

    @property
    def machine(self) -> Machine:
        """Where it was measured."""
        return self.plan.machine

    def seconds(
        self, layers: Sequence[LayerUse], storages: Sequence[Storage] | None = None
    ) -> float:
        """Predicted seconds of a network's forward pass.

        Args:
            layers: as `layers_used` gives them for the table's network, in order; with fewer
                channels or a lower density.
            storages: of each; None for the quicker one.

        Raises:
            ValueError: the table does not know a layer, or it cannot be held as asked for.
        """
        return self._prepared.seconds(layers, storages)

    def predict(self, model: nn.Module, example_inputs: Any) -> float:
        """Predicted seconds of a forward pass of a smaller copy of the table's network.

        Each layer counts in the storage that is quicker at its density, as `compress` makes it.

        Raises:
            ValueError: other sizes of inputs than the table's, or a layer that it does not know.
        """
        if (given := input_sizes(example_inputs)) != self.plan.inputs:
            raise ValueError(
                f"the table was measured for inputs of {self.plan.inputs}, not {given}: make "
                "another for them"
            )
        return self.seconds(layers_used(model, example_inputs))

    def layer_seconds(self, use: LayerUse, storage: Storage | None = None) -> float:
        """Predicted seconds of one layer in its network, in a storage or the quicker one.

        Raises:
            ValueError: the table does not know the layer, or it cannot be held so.
        """
        return self._prepared.layer(use, storage)

    def storage_of(self, use: LayerUse) -> Storage:
        """The storage in which a layer is quicker at its density, after a dense one.

        Raises:
            ValueError: the table does not know the layer.
        """
        return self._prepared.storages([use])[0]

    def storages(self, layers: Sequence[LayerUse]) -> list[Storage]:
        """The quicker storage of each layer, those before it given.

        Raises:
            ValueError: the table does not know a layer.
        """
        return self._prepared.storages(layers)

    def compress(self, model: nn.Module) -> nn.Module:
        """A copy in which exactly the layers that are predicted quicker so are held sparse.

        Args:
            model: the table's network, perhaps with fewer channels, zeros in its weights.

        Raises:
            ValueError: the model is not the table's network.
        """
        uses = [as_in(model, layer) for layer in self.plan.layers]
        chosen = {u.layer for u, s in zip(uses, self.storages(uses), strict=True) if s == "csr"}
        copied = copy.deepcopy(model)
        for name in chosen:
            layer = copied.get_submodule(name)
            if not isinstance(layer, SparseLayer):
                weight = layer.weight
                assert isinstance(weight, Tensor)
                sparsify(layer, weight.detach() != 0)
        return copied

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, whole or not at all."""
        content = {"format": FORMAT, **_ADAPTER.dump_python(self, mode="json")}
        with whole_file(Path(path)) as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, check: bool = False) -> LatencyTable:
        """Read a table.

        Args:
            check: whether a table of another machine is an error; otherwise it is a warning.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no whole table, or with `check` one of another machine.
        """
        table = _read(Path(path))
        if not table.is_whole:
            raise ValueError(
                f"{path} is a table whose measuring was interrupted: go on with "
                "st.cost.latency_table(..., path=...)"
            )
        here = Machine.here(torch.device(table.plan.setting.device))
        if different := table.machine.differences(here):
            message = f"{path} was measured on another machine: {different}; measure again here"
            if check:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return table

    @property
    def is_whole(self) -> bool:
        """Whether everything has been measured."""
        return len(self.measured) == len(self.plan.shapes) and bool(self.networks)

    @cached_property
    def _prepared(self) -> Prediction:
        return Prediction(self.plan, self.measured, self.networks)


_ADAPTER = TypeAdapter(LatencyTable)


def latency_table(
    model: nn.Module,
    example_inputs: Any,
    *,
    step: int = 8,
    sparsities: Sequence[float] = SPARSITIES,
    storages: Sequence[Storage] = ("dense", "csr"),
    threads: int | None = None,
    rounds: int = 7,
    progress: bool = False,
    path: str | Path | None = None,
) -> LatencyTable:
    """Measure how long the layers of a network take, in every width and storage, on this machine.

    Evaluation mode without gradients, on the device of the model and for the batch of the example.
    Each layer is measured once a shape: dense over a grid of input and output channels, and in csr
    storage at each sparsity where it can be held so. Then whole networks are timed: the model, with
    fewer channels (where torch-pruning is installed and can follow it) and with sparse weights.

    Args:
        model: stays as it was.
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, the first tensor of which is one.
        step: of numbers of channels. Axes of more than 12 points are thinned.
        sparsities: of csr weights, in [0, 1).
        storages: "dense" always; "csr" if sparse weights are to be predicted as well.
        threads: of torch while it is measured; None for as many as it has.
        rounds: of which the median is taken; whole networks have three times as many.
        progress: whether to show a bar.
        path: a file that is written after each shape. If it holds a table of the same network and
            machine, only what is missing is measured.

    Raises:
        ValueError: arguments out of range, a model without layers, or a file of something else.
    """
    _check(step, sparsities, storages, threads, rounds)
    with torch_threads(threads or torch.get_num_threads()), torch.random.fork_rng(devices=[]):
        plan = make_plan(model, example_inputs, step, sparsities, storages)
        table = _begun(plan, None if path is None else Path(path))
        done = table.measured, table.networks
        for parts in measuring(plan, done, model, example_inputs, rounds, progress):
            table = LatencyTable(plan, *parts)
            if path is not None:
                table.save(path)
        return table


def _check(
    step: int,
    sparsities: Sequence[float],
    storages: Sequence[str],
    threads: int | None,
    rounds: int,
) -> None:
    if step < 1:
        raise ValueError(f"step={step} must be 1 or more channels")
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be 1 or more")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} must be 1 or more")
    if set(storages) - {"dense", "csr"} or "dense" not in storages:
        raise ValueError(f"storages={tuple(storages)} must be 'dense', or 'dense' and 'csr'")
    if not all(0 <= sparsity < 1 for sparsity in sparsities):
        raise ValueError(f"sparsities={tuple(sparsities)} must be shares of zeros, in [0, 1)")
    if "csr" in storages and not sparsities:
        raise ValueError("give sparsities for csr storage, or storages=('dense',)")


def _begun(plan: Plan, path: Path | None) -> LatencyTable:
    """The table in a file as far as it was measured, or an empty one."""
    if path is None or not path.exists():
        return LatencyTable(plan)
    table = _read(path)
    if table.plan != plan:
        different = table.machine.differences(plan.machine)
        reason = (
            f"of another machine ({different})" if different else "of another network or setting"
        )
        raise ValueError(f"{path} is a table {reason}: give another path, or delete it")
    return table


def _read(path: Path) -> LatencyTable:
    """A table, whole or not.

    Raises:
        ValueError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        table = _ADAPTER.validate_python(content)
        _check_whole(table)
    except (ValueError, ValidationError) as error:
        raise ValueError(f"{path} holds no latency table: {error}; measure again") from error
    return table


def _check_whole(table: LatencyTable) -> None:
    plan = table.plan
    for shape, measured in zip(plan.shapes, table.measured, strict=False):
        if measured.shape != shape or measured.cases != plan.cases(shape):
            raise ValueError(f"it was measured otherwise than planned: {measured.shape}")
        if len(measured.seconds) != len(measured.cases):
            raise ValueError(f"{len(measured.seconds)} times for {len(measured.cases)} cases")
        if not all(
            0 < seconds < float("inf") for seconds in (measured.reference, *measured.seconds)
        ):
            raise ValueError("times must be positive")
    if set(plan.shape_of) != set(range(len(plan.shapes))) or len(plan.shape_of) != len(plan.layers):
        raise ValueError("shape_of does not go with layers and shapes")
    for network in table.networks:
        if {len(network.widths), len(network.layers), len(network.rests)} != {len(plan.layers)}:
            raise ValueError("networks have other layers than planned")
