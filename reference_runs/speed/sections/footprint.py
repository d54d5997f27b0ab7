"""Memory of one process that trains the wide network at 98 %; run by `memory.py`.

    python -m reference_runs.speed.sections.footprint nothing|dense|masked|csr|built SGD|AdamW

`csr` is made from a dense network, `built` never was one, `nothing` builds no network. Prints JSON:
bytes of the live tensors by kind, and how far the resident size rose while the network was built
and while it trained.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import sparsetrain as st
from reference_runs.speed.contenders import OPTIMIZERS
from reference_runs.speed.sections.base import THREADS
from reference_runs.speed.sections.process_memory import reset_peak, risen
from reference_runs.speed.sections.training import (
    CLASSES,
    NETWORKS,
    Network,
    Training,
    make,
    step_of,
    uniform,
)
from sparsetrain.storage.csr.layers import SparseLayer, SparseLinear

SPARSITY, BATCH, STEPS = 0.98, 128, 6


def train(held: str, network: Network, optimizer: str) -> Training:
    """The network with its optimizer, ready for its first step."""
    if held != "built":
        policy = uniform(SPARSITY)
        return make(held, network, policy, optimizer, BATCH, batches=1)  # type: ignore[arg-type]
    model = _built(network)
    policy = st.Static(allocation="as_built")
    base = OPTIMIZERS[optimizer](model.parameters())
    wrapped = st.SparseOptimizer(base, model, network.recipe(policy), storage="csr")
    return Training(model, wrapped, step_of(model, wrapped, network.inputs, BATCH, 1))


def _built(network: Network) -> nn.Module:
    sizes = [network.inputs, *network.widths]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (fan_in, fan_out) in enumerate(zip(sizes, network.widths, strict=False), start=1):
        layers[f"fc{number}"] = SparseLinear(fan_in, fan_out, 1 - SPARSITY)
        layers[f"relu{number}"] = nn.ReLU()
    layers[network.last] = nn.Linear(network.widths[-1], CLASSES)
    return nn.Sequential(layers)


def live_bytes(training: Training) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state, and what says where the non-zeros are."""
    parameters = list(training.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [training.optimizer.state[p].values() for p in parameters]
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes(gradients),
        "state": _bytes(v for values in state for v in values if isinstance(v, Tensor)),
        "places": _places(training),
    }


def _places(training: Training) -> int:
    """Patterns, the transposed ones included, and masks."""
    layers = [m for m in training.model.modules() if isinstance(m, SparseLayer)]
    targets = getattr(training.optimizer, "targets", {}).values()
    masks = [target.mask for target in targets if target.holds_zeros]
    return sum(layer.pattern.memory() for layer in layers) + _bytes(masks)


def _bytes(tensors: Iterable[Tensor | Parameter]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def main(held: str, optimizer: str) -> None:
    """Train a small network that loads all kernels, then measure the large one."""
    torch.set_num_threads(THREADS)
    small = train("dense" if held == "nothing" else held, NETWORKS["tiny"], optimizer)
    for _ in range(2):
        small.step()
    result: dict[str, int] = {}
    start = reset_peak()
    if held != "nothing":
        training = train(held, NETWORKS["wide"], optimizer)
        result["peak_building"] = risen(start)
        reset_peak()
        for _ in range(STEPS):
            training.step()
        result |= live_bytes(training)
    result["peak_training"] = risen(start)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
