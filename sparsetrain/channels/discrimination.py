"""Discrimination-aware channel pruning: channels that the loss asks for are taken one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import find_candidates
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.methods import LayerByLayer, Networks
from sparsetrain.channels.sides import require_plain
from sparsetrain.channels.watching import outputs_of, up_to
from sparsetrain.evaluating import evaluating, wanting

_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4


class DiscriminationAware(LayerByLayer):
    """Inputs of the next layer by the gradient of a loss, each set fitted before the next joins.

    Zhuang et al. 2018, "Discrimination-aware channel pruning", algorithms 1 and 2. Classifiers at
    some layers in between are trained with the network first, all together as in the authors' code.
    Then each layer begins without the inputs that may go; those come back for which the gradient of
    (reconstruction error + loss of the next classifier, or of the model behind the last) is
    largest. Needs batches with targets, a loss of class scores, and next layers without groups.
    """

    kind: Literal["dcp"] = "dcp"

    losses: Annotated[int, Field(ge=0, description="classifiers in between, spread evenly")] = 3
    passes: Annotated[int, Field(ge=0, description="over the data, to train them at first")] = 1
    rounds: Annotated[
        int, Field(ge=1, description="selections a layer; each takes as many channels")
    ] = 8
    loss_weight: Annotated[
        float, Field(ge=0, description="of the loss, beside the reconstruction error")
    ] = 1.0
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    tolerance: Annotated[
        float | None,
        Field(
            gt=0,
            description="stop earlier, once a selection changes the loss by no more than this "
            "share of what it was at first (DCP-Adapt)",
        ),
    ] = None

    def prune_layers(
        self, networks: Networks, counts: Mapping[str, int], calibration: Calibration
    ) -> dict[str, list[int]]:
        """Choose and fit, each layer on what the pruned ones before it give.

        Raises:
            ValueError: data, targets or a loss are missing, the model gives no class scores, or a
                next layer has groups.
        """
        who = f"channel method {self.kind!r}"
        calibration.require(who)
        calibration.require_rereadable(who)
        losing = [c for c in networks.couplings if counts.get(c.name, c.channels) < c.channels]
        for coupling in losing:
            require_plain(coupling.by_role("in"), who)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(calibration.seed)
            order, classes = _order(networks.pruned, calibration, who)
            helpers = self._helpers(networks.pruned, order, classes, calibration)
            reference = copy.deepcopy(networks.pruned)
            stage = _Stage(networks.pruned, reference, order, helpers, calibration)
            return {c.name: self._prune(stage, c, counts[c.name]) for c in losing}

    def _helpers(
        self, model: nn.Module, order: Sequence[str], classes: int, calibration: Calibration
    ) -> dict[str, nn.Module]:
        """Name of a layer -> classifier of its output, trained together with the network."""
        who = f"channel method {self.kind!r}"
        loss_fn = calibration.given(who)[1]
        chosen = [order[len(order) * n // (self.losses + 1)] for n in range(1, self.losses + 1)]
        helpers = {name: _classifier(model.get_submodule(name), classes) for name in chosen}
        parts = nn.ModuleList([model, *helpers.values()])
        trained = [p for p in parts.parameters() if p.requires_grad]
        if not trained:
            return helpers
        optimizer = _sgd(trained, self.learning_rate)
        modes = [(module, module.training) for module in model.modules()]
        parts.train()
        for _ in range(self.passes):
            for batch in calibration.read(model, who):
                with outputs_of(model, chosen) as found:
                    guesses = [batch.forward(model)]
                guesses += [helper(found[name]) for name, helper in helpers.items()]
                losses = [loss_fn(guess, batch.targets) for guess in guesses]
                optimizer.zero_grad()
                torch.autograd.backward(torch.stack(losses).sum())
                optimizer.step()
        optimizer.zero_grad()
        parts.eval()
        for module, mode in modes:
            module.training = mode
        return helpers

    def _prune(self, stage: _Stage, coupling: Coupling, count: int) -> list[int]:
        """The channels to remove, ascending; the next layers do without them afterwards."""
        inputs = _Inputs(coupling)
        inputs.empty()
        taken: list[int] = []
        first = before = stage.loss(self, inputs)
        step = -(-count // self.rounds)
        while len(taken) < count:
            sizes = stage.gradient_sizes(self, inputs)
            sizes[taken] = -1.0
            new = sizes.argsort(descending=True, stable=True)[: min(step, count - len(taken))]
            taken += new.tolist()
            inputs.bring_back(new.tolist())
            stage.fit(self, inputs, taken)
            if self.tolerance is None:
                continue
            now = stage.loss(self, inputs)
            if abs(before - now) <= self.tolerance * first:
                break
            before = now
        order = sorted(set(range(coupling.channels)) - set(taken))
        return coupling.removable(order, len(order))


class _Inputs:
    """The next layers of a coupling, and their weights as they were."""

    def __init__(self, coupling: Coupling) -> None:
        self.sides = coupling.by_role("in")
        self.channels = coupling.channels
        self.whole = [side.module.weight.detach().clone() for side in self.sides]

    @property
    def layers(self) -> list[str]:
        """Their names."""
        return [side.layer for side in self.sides]

    @property
    def weights(self) -> list[Parameter]:
        """Of each, [outputs, inputs, ...]."""
        return [side.module.weight for side in self.sides]

    @torch.no_grad()
    def empty(self) -> None:
        """All weights of the channels are 0."""
        for side in self.sides:
            side.module.weight[:, side.positions(range(self.channels))] = 0.0

    @torch.no_grad()
    def bring_back(self, channels: Sequence[int]) -> None:
        """Weights as they were at first."""
        for side, whole in zip(self.sides, self.whole, strict=True):
            places = side.positions(channels)
            side.module.weight[:, places] = whole[:, places]


class _Stage(NamedTuple):
    """What channels are chosen with."""

    model: nn.Module
    reference: nn.Module
    order: list[str]
    helpers: dict[str, nn.Module]
    calibration: Calibration

    def loss(self, method: DiscriminationAware, inputs: _Inputs) -> float:
        """Mean over the batches."""
        with evaluating(self.model), torch.no_grad():
            losses = [float(loss) for loss in self._losses(method, inputs)]
        return sum(losses) / len(losses)

    def gradient_sizes(self, method: DiscriminationAware, inputs: _Inputs) -> Tensor:
        """[channels]: Frobenius norm of the gradient of each channel's weights, absent or not."""
        sums = [torch.zeros_like(weight) for weight in inputs.weights]
        with evaluating(self.model), wanting(self.model, inputs.weights):
            for loss in self._losses(method, inputs):
                for total, gradient in zip(
                    sums, torch.autograd.grad(loss, inputs.weights), strict=True
                ):
                    total += gradient
        squares = torch.zeros(inputs.channels)
        for side, total in zip(inputs.sides, sums, strict=True):
            by_input = total.square().movedim(1, 0).flatten(1).sum(1)
            squares += torch.stack([by_input[list(places)].sum() for places in side.places]).cpu()
        return squares.sqrt()

    def fit(self, method: DiscriminationAware, inputs: _Inputs, taken: Sequence[int]) -> None:
        """A pass of gradient descent on the weights of taken channels, and the biases."""
        biases = [s.module.bias for s in inputs.sides if s.module.bias is not None]
        trained = [*inputs.weights, *biases]
        away = sorted(set(range(inputs.channels)) - set(taken))
        optimizer = _sgd(trained, method.learning_rate)
        with evaluating(self.model), wanting(self.model, trained):
            for loss in self._losses(method, inputs):
                gradients = torch.autograd.grad(loss, trained)
                for side, gradient in zip(inputs.sides, gradients, strict=False):
                    gradient[:, side.positions(away)] = 0.0
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        optimizer.zero_grad()

    def _losses(self, method: DiscriminationAware, inputs: _Inputs) -> Iterator[Tensor]:
        who, last = f"channel method {method.kind!r}", self._helper_after(inputs.layers)
        loss_fn = self.calibration.given(who)[1]
        for batch in self.calibration.read(self.model, who):
            with torch.no_grad(), evaluating(self.reference):
                wanted, _ = up_to(self.reference, batch, inputs.layers, inputs.layers)
            seen = inputs.layers if last is None else [*inputs.layers, last]
            found, guess = up_to(self.model, batch, seen, [] if last is None else [last])
            if last is not None:
                guess = self.helpers[last](found[last])
            errors = [F.mse_loss(found[layer], wanted[layer]) for layer in inputs.layers]
            yield torch.stack(errors).sum() + method.loss_weight * loss_fn(guess, batch.targets)

    def _helper_after(self, layers: Sequence[str]) -> str | None:
        """The first classifier that sees what all these layers give."""
        last = max(self.order.index(layer) for layer in layers)
        return next((name for name in self.helpers if self.order.index(name) >= last), None)


def _order(model: nn.Module, calibration: Calibration, who: str) -> tuple[list[str], int]:
    """Linear and Conv layers as a batch calls them, and the number of classes."""
    candidates = [c for c in find_candidates(model) if c.is_product and c.runs_forward]
    names = [c.name.rpartition(".")[0] for c in candidates]
    batch = next(iter(calibration.read(model, who)))
    with outputs_of(model, names) as found, evaluating(model), torch.no_grad():
        scores = batch.forward(model)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        raise ValueError(f"{who} needs a model that gives class scores, [samples, classes]")
    return list(found), scores.shape[1]


class _Pooled(nn.Module):
    """Means over all positions: [samples, channels, ...] -> [samples, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


def _classifier(layer: Any, classes: int) -> nn.Module:
    """Norm, ReLU, mean over positions, linear layer."""
    kinds = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv3d: nn.BatchNorm3d}
    norm = next((n for kind, n in kinds.items() if isinstance(layer, kind)), nn.BatchNorm2d)
    width, like = len(layer.weight), {"device": layer.weight.device, "dtype": layer.weight.dtype}
    return nn.Sequential(
        norm(width, **like), nn.ReLU(), _Pooled(), nn.Linear(width, classes, **like)
    )


def _sgd(parameters: Sequence[Tensor], rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY, nesterov=True
    )
