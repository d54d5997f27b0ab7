"""Which channels matter: one number for each channel of a coupling, larger for those to keep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from sparsetrain.calibration import Calibration
from sparsetrain.candidates import find_candidates
from sparsetrain.channels.coupling import Coupling
from sparsetrain.channels.folding import fold, norms
from sparsetrain.channels.sides import Side
from sparsetrain.config import Kinded
from sparsetrain.scores import Score
from sparsetrain.scores.base import ScoreField
from sparsetrain.scoring import measured

#: Whether a layer's channels compete with each other or with those of all layers.
Scope = Literal["layer", "global"]


class ChannelMethod(Kinded):
    """Base of all methods. There are two kinds: `Scoring` and `LayerByLayer`."""

    family: ClassVar[str] = "channel method"
    #: What competes, unless told.
    scope: ClassVar[Scope] = "layer"
    #: Whether numbers of channels mean the same in every layer.
    comparable: ClassVar[bool] = False


class Networks(NamedTuple):
    """A network that is being pruned and the one it was, with their couplings."""

    pruned: nn.Module
    couplings: list[Coupling]
    original: nn.Module
    original_couplings: list[Coupling]


class LayerByLayer(ChannelMethod):
    """Base of methods that take layers in their order, and may change what is left of them."""

    @abstractmethod
    def prune_layers(
        self, networks: Networks, counts: Mapping[str, int], calibration: Calibration
    ) -> dict[str, list[int]]:
        """Choose channels and change weights of the pruned network, in place.

        What is to be removed may be silenced; nothing changes its shape.

        Args:
            counts: name of a coupling -> how many channels to keep.

        Returns:
            Name of a coupling -> channels to remove.
        """


class Scoring(ChannelMethod):
    """Base of methods that remove the channels with the lowest numbers.

    A coupling's channel may be several outputs of several layers; their numbers are added up.
    """

    @abstractmethod
    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Name of each coupling -> [channels]; one that is left out keeps its channels.

        The model is as it was afterwards.
        """

    def make_up(
        self,
        model: nn.Module,
        couplings: Sequence[Coupling],
        removed: Mapping[str, Sequence[int]],
        example_inputs: Any,
    ) -> None:
        """Change what is left so that it does for what will be removed, in place."""


class Norm(Scoring):
    """Norm of the weights that make a channel.

    Li et al. 2017, "Pruning filters for efficient convnets", section 3 (p = 1).
    """

    kind: Literal["norm"] = "norm"
    p: Annotated[float, Field(gt=0)] = 1.0

    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels] each."""
        return _of_filters(couplings, lambda rows: rows.norm(self.p, dim=1))


class GeometricMedian(Scoring):
    """Sum of the distances to all other filters of the layer: those in the middle can be replaced.

    He et al. 2019, "Filter pruning via geometric median", eq. 4.
    """

    kind: Literal["geometric_median"] = "geometric_median"

    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels] each."""
        return _of_filters(couplings, lambda rows: torch.cdist(rows, rows).sum(1))


class RandomChannels(Scoring):
    """Uniform random numbers, the control."""

    kind: Literal["random"] = "random"

    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels] each."""
        generator = torch.Generator().manual_seed(calibration.seed)
        return {c.name: torch.rand(c.channels, generator=generator) for c in couplings}


class NetworkSlimming(Scoring):
    """Channels of all layers compete by |gamma| of the batch normalisations that they pass.

    Liu et al. 2017, "Learning efficient convolutional networks through network slimming", section
    3. Meant for networks that were trained with the policy `Slimming`. Where channels pass several
    normalisations, |gamma| is the mean; channels that pass none stay.
    """

    kind: Literal["slimming"] = "slimming"
    scope: ClassVar[Scope] = "global"
    comparable: ClassVar[bool] = True

    fold: Annotated[
        bool, Field(description="add what a removed channel gives at gamma = 0 to the next biases")
    ] = False

    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels] each.

        Raises:
            ValueError: no channels pass a batch normalisation.
        """
        found = {}
        for coupling in couplings:
            sizes = [_of_places(s, s.module.weight.detach().abs()) for s in norms(coupling)]
            if sizes:
                found[coupling.name] = torch.stack(sizes).mean(0)
        if not found:
            raise ValueError("slimming looks at batch normalisations, and no channels pass one")
        return found

    def make_up(
        self,
        model: nn.Module,
        couplings: Sequence[Coupling],
        removed: Mapping[str, Sequence[int]],
        example_inputs: Any,
    ) -> None:
        """Fold shifts, if asked to."""
        if self.fold:
            fold(model, couplings, removed, example_inputs)


class ByScore(Scoring):
    """Any score: those of weights are added up over a channel, those of channels are taken."""

    kind: Literal["score"] = "score"
    score: ScoreField

    def scores(
        self, model: nn.Module, couplings: Sequence[Coupling], calibration: Calibration
    ) -> dict[str, Tensor]:
        """[channels] each.

        Raises:
            ValueError: data are missing, or a layer has no such score.
        """
        weights = [c for c in find_candidates(model) if c.is_product]
        candidates = {id(owner): c for c in weights for owner in c.owners}
        sides = {c.name: c.by_role("out") for c in couplings}
        chosen = {id(s.module): candidates[id(s.module)] for found in sides.values() for s in found}
        found = measured(model, self.score, list(chosen.values()), calibration)
        scores = {}
        for coupling in couplings:
            known = [s for s in sides[coupling.name] if chosen[id(s.module)].name in found]
            if not known:
                raise ValueError(
                    f"{self.score.title} says nothing of the channels of {coupling.name}"
                )
            numbers = [_of_outputs(side, found[chosen[id(side.module)].name]) for side in known]
            scores[coupling.name] = _added(known, numbers)
        return scores


_SHORT = {"l1": Norm(p=1.0), "l2": Norm(p=2.0)}


def method_of(value: Any) -> Scoring | LayerByLayer:
    """A method, its name or a dict; "l1", "l2"; or a score or its name.

    Raises:
        TypeError: it is none of these.
        ValueError: there is none of that name.
    """
    if isinstance(value, str) and value in _SHORT:
        return _SHORT[value]
    if isinstance(value, Score):
        return ByScore(score=value)
    if isinstance(value, str) and value not in ChannelMethod.members and value in Score.members:
        return ByScore(score=Score.build(value))
    method = ChannelMethod.build(value)
    if not isinstance(method, Scoring | LayerByLayer):
        raise TypeError(f"method must be a channel method or a score, not {value!r}")
    return method


def _of_filters(
    couplings: Sequence[Coupling], number: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Numbers of the weights that make each output, [outputs, others] -> [outputs]."""
    sides = {c.name: c.by_role("out") for c in couplings}
    return {
        name: _added(found, [number(_rows(s, s.module.weight.detach())) for s in found])
        for name, found in sides.items()
    }


def _added(sides: Sequence[Side], numbers: Sequence[Tensor]) -> Tensor:
    """[channels]: numbers of outputs, added up over the layers that channels come out of."""
    each = [_of_places(side, values) for side, values in zip(sides, numbers, strict=True)]
    return torch.stack(each).sum(0)


def _of_places(side: Side, values: Tensor) -> Tensor:
    """[positions] -> [channels], added up."""
    return torch.stack([values[list(places)].sum() for places in side.places])


def _of_outputs(side: Side, values: Tensor) -> Tensor:
    return values if values.dim() == 1 else _rows(side, values).sum(1)


def _rows(side: Side, weight: Tensor) -> Tensor:
    dim = next(dim for leaf, dim in side.slices() if leaf == "weight")
    return weight.movedim(dim, 0).flatten(1)
