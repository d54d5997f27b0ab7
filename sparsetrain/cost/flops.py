"""Floating-point operations, counted as the appendix of RigL does (Evci et al. 2020, App. H).

A layer's forward pass costs its dense FLOPs times its density; the backward pass costs twice that
(one product for the input gradient, one for the weight gradient). Only products with weights are
counted; biases, norms and activations are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsetrain.candidates import find_candidates, plain_name
from sparsetrain.cost.layers import layers_used

if TYPE_CHECKING:
    from sparsetrain.optimizer import SparseOptimizer


@dataclass(frozen=True)
class FlopsReport:
    """Dense FLOPs of one sample's forward pass (a multiply-add counts 2)."""

    layers: dict[str, float]

    @property
    def total(self) -> float:
        """Over all layers."""
        return sum(self.layers.values())


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the training so far, and of the network as it is now.

    Attributes:
        dense_inference: FLOPs of one sample's forward pass if every weight were active.
        inference_multiple: the sparse forward pass as a multiple of that.
        training_multiple: training so far as a multiple of dense training for as many steps.
    """

    dense_inference: float
    inference_multiple: float
    training_multiple: float


def flops(model: nn.Module, example_inputs: Any) -> FlopsReport:
    """Count the dense forward FLOPs of each weight, per sample.

    Args:
        example_inputs: a batch, [N, ...], or a tuple of positional or a mapping of keyword
            arguments, the first tensor of which is one.

    Returns:
        FLOPs by parameter name; a weight used several times counts each use.

    Raises:
        ValueError: the model uses no Linear, Conv or attention layer on these inputs.
    """
    counts: dict[str, float] = {}
    for use in layers_used(model, example_inputs):
        counts[use.name] = counts.get(use.name, 0.0) + 2 * use.macs
    names = (plain_name(c.name) for c in find_candidates(model))
    return FlopsReport({name: counts[name] for name in names if name in counts})


def training_flops(optimizer: SparseOptimizer, model: nn.Module, inputs: Any) -> TrainingFlops:
    """FLOPs of the training that `optimizer` has done, relative to dense training.

    Per step a layer of density d and dense forward FLOPs f costs f d forward and 2 f d backward.
    Where a policy reads the dense gradient (RigL at updates, SNFS, surgery and SR-STE always) the
    weight-gradient half of the backward pass costs f.

    Args:
        model: the model that the optimizer trains.
        inputs: as for `flops`.
    """
    report = flops(model, inputs)
    now, done = 0.0, 0.0
    for name, dense in report.layers.items():
        density, mean, idle_with_gradient = optimizer.density_history(name)
        now += dense * density
        done += dense * (3 * mean + idle_with_gradient)
    return TrainingFlops(
        dense_inference=report.total,
        inference_multiple=now / report.total,
        training_multiple=done / (3 * report.total),
    )
