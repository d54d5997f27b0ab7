"""The contract of a target: one weight tensor that is held sparse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sparsetrain.part import part_of
from sparsetrain.selection import bottom_k_indices


class Exchanged(NamedTuple):
    """What an exchange of connections did.

    Attributes:
        gone, new: flat indices, among what is held here, of weights that went inactive and of
            those that are new.
        dropped, grown: their numbers in the whole weight.
    """

    gone: Tensor
    new: Tensor
    dropped: int
    grown: int


class SparseTarget(ABC):
    """One weight tensor that is held sparse. How it is held is the storage's business.

    Attributes:
        name: of the weight in the model, whatever parameter stands for it.
        param: the parameter that the optimizer trains for it.
        part: what of the weight is held here; all of it, unless it is sharded over ranks.
        shape: of the whole weight.
        numel: weights in all, active or not.
    """

    #: How the weight is held: the word for it in `storage=` and in the summary.
    storage: ClassVar[str]
    #: Whether inactive weights have a place in `param`, which has to be kept at 0.
    holds_zeros: ClassVar[bool] = False
    #: Whether the weight came sparse, so that no policy chooses its first mask.
    built: bool = False

    def __init__(self, name: str, param: Parameter) -> None:
        self.name = name
        self.param = param
        self.part = part_of(name, param)
        self.shape = tuple(param.shape)
        self.numel = param.numel()

    @property
    @abstractmethod
    def active(self) -> int:
        """Number of active weights."""

    @property
    def density(self) -> float:
        """Share of weights that are active, in [0, 1]."""
        return self.active / self.numel

    # What policies ask.

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True where active; laid out as the weight is."""

    @property
    def held_mask(self) -> Tensor:
        """The mask of the weights that are held here."""
        return self.mask

    def active_indices(self) -> Tensor:
        """Flat indices of the active weights that are held here, int64, ascending."""
        return self.held_mask.view(-1).nonzero().view(-1)

    @property
    def resting(self) -> int:
        """Weights that the forward and backward passes of training could leave out."""
        return self.numel - self.active

    def follow(self, param: Parameter) -> None:
        """Go on with a parameter that has taken the place of the whole one and is sharded."""
        self.param = param
        self.part = part_of(self.name, param)

    def begin(self, mask: Tensor) -> None:
        """Install the first mask of what is here, for a target whose mask is chosen."""

    def release(self) -> None:
        """Forget everything but the weight itself."""

    # Losing slices.

    def why_not_narrowed(self) -> str:
        """Why slices cannot be taken out, as in "the weight is ..."; empty when they can."""
        return f"held as {self.storage}"

    def take(self, dim: int, keep: Tensor) -> None:
        """Follow the parameter, of which nothing but `keep` is left along `dim`.

        Where it has lost slices of several dimensions, this is called for each of them, and
        `mask_weight` after the last one. What it holds is replaced, never written to.

        Args:
            keep: positions, int64, ascending.

        Raises:
            NotImplementedError: there is a reason in `why_not_narrowed`.
        """
        raise NotImplementedError(f"{self.name} is {self.why_not_narrowed()}")

    # Around a step. A storage that holds nothing but active weights has nothing to do here.

    def watch_gradient(self, wanted: bool) -> None:
        """Be told whether the next step needs the gradient of inactive weights."""

    def check_gradient(self) -> None:
        """Refuse a gradient that the storage cannot work with."""

    def check_outside_writes(self) -> None:
        """Repair what somebody else wrote to the weight."""

    def mask_gradient(self) -> None:
        """Set the gradient to 0 where inactive."""

    def mask_weight(self) -> None:
        """Set the weight to 0 where inactive."""

    def mask_state(self, tensor: Tensor) -> None:
        """Set optimizer state, shaped like `param`, to 0 where inactive."""

    def before_step(self) -> None:
        """Get ready for the base optimizer."""

    def after_step(self, keeps_zeros: bool) -> None:
        """Leave exact zeros behind the base optimizer."""

    def conceal(self) -> None:
        """Show the forward pass the masked weight."""

    # Checkpoints.

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a checkpoint holds of the target beside its shape."""

    @abstractmethod
    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Refuse what a checkpoint says of the target, with the reason, before anything changes."""

    @abstractmethod
    def restore_entry(self, entry: Mapping[str, Any]) -> None:
        """Take what a checkpoint says, which `check_entry` has accepted."""


class ExchangeTarget(SparseTarget):
    """A target whose policy says which connections go and which come.

    Policies speak to it in index sets (flat, row-major, int64) and never assume that a dense mask
    or a dense weight exists. Of a weight that is sharded over ranks an index set is what of it is
    here, counted from the first weight that is here; counts are of the whole weight, and a choice
    is that of one process that holds it all. So every rank has to ask the same questions.
    """

    @abstractmethod
    def at_active(self, tensor: Tensor) -> Tensor:
        """Of a tensor shaped like `param`, the entries of active weights, as `active_indices`."""

    def total(self, count: int) -> int:
        """A count of weights that are here, added up over the ranks that share the weight."""
        return self.part.totals(count)[0]

    def least(self, indices: Tensor, magnitudes: Tensor, count: int) -> Tensor:
        """Of some flat indices, ascending, the `count` with the least magnitudes."""
        return indices[bottom_k_indices(magnitudes, count, name=self.name, part=self.part)]

    @abstractmethod
    def random_free(self, count: int, freed: Tensor, generator: torch.Generator) -> Tensor:
        """Flat indices, ascending, of `count` connections at random among those that are inactive
        and those at `freed`, which are about to be dropped."""

    def drawn_for(self, indices: Tensor, drawn: Tensor) -> Tensor:
        """Of numbers drawn for connections of the whole weight, those of the connections here.

        Args:
            indices: flat, ascending.
            drawn: one number a connection, in the order of the connections.
        """
        before, _ = self.part.place(indices.numel())
        weight = self.param
        return drawn[before : before + indices.numel()].to(weight.device, weight.dtype)

    @abstractmethod
    def active_values(self, indices: Tensor) -> Tensor:
        """Active weights at flat `indices`."""

    @abstractmethod
    def least_active(self, count: int) -> Tensor:
        """Flat indices, ascending, of the `count` active weights of least magnitude."""

    @abstractmethod
    def largest_free(self, scores: Tensor, count: int, freed: Tensor) -> Tensor:
        """Flat indices, ascending, of the `count` connections with the largest |score| among
        those that are inactive and those at `freed`, which are about to be dropped.

        Args:
            scores: of the weight's shape.

        Raises:
            ValueError: naming the layer, when such a score is NaN or infinite.
        """

    @property
    @abstractmethod
    def has_gradient(self) -> bool:
        """Whether the last backward pass reached the weight."""

    @abstractmethod
    def whole_gradient(self) -> Tensor | None:
        """The dense gradient, of the weight's shape, or None."""

    @abstractmethod
    def steepest_free(self, count: int, freed: Tensor) -> Tensor:
        """As `largest_free`, by the dense gradient, which need not exist as a whole."""

    # How masks change.

    @abstractmethod
    def exchange(self, dropped: Tensor, grown: Tensor, values: Tensor | None = None) -> Exchanged:
        """Drop and grow connections; those in both sets stay as they are.

        Args:
            dropped: flat indices that are active now, int64.
            grown: flat indices to be active, none of them a kept connection, int64.
            values: start values of `grown`, 0 when None; used only where really new.
        """

    @abstractmethod
    def renewed(self, tensor: Tensor, gone: Tensor, new: Tensor, fresh: float) -> Tensor:
        """Optimizer state after the last exchange: survivors keep theirs, `new` gets `fresh`.

        Args:
            tensor: as `param` was shaped before the exchange.
        """

    @abstractmethod
    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a new mask of what is here; returns how many weights were (dropped, grown)."""
