"""Which tensors are made sparse: candidates in a model, rules on them, and the target itself."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from sparsetrain.storage.csr.layers import SparseLayer

_DENSE_PRODUCTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class SparseTarget(ABC):
    """One weight tensor that is held sparse. How it is held is the storage's business.

    Policies speak to a target in index sets (flat, row-major, int64) and never assume that a
    dense mask or a dense weight exists.

    Attributes:
        name: of the weight in the model, whatever parameter stands for it.
        param: the parameter that the optimizer trains for it.
        shape: of the weight.
        numel: weights, active or not.
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
        """Bool tensor of the weight's shape, True where active."""

    @abstractmethod
    def active_indices(self) -> Tensor:
        """Flat indices of the active weights, ascending."""

    @abstractmethod
    def at_active(self, tensor: Tensor) -> Tensor:
        """Of a tensor shaped like `param`, the entries of active weights, as `active_indices`."""

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
    def exchange(
        self, dropped: Tensor, grown: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Drop and grow connections; those in both sets stay as they are.

        Args:
            dropped: flat indices that are active now, int64.
            grown: flat indices to be active, none of them a kept connection, int64.
            values: start values of `grown`, 0 when None; used only where really new.

        Returns:
            The net index sets: weights that went inactive, and weights that are new.
        """

    @abstractmethod
    def renewed(self, tensor: Tensor, gone: Tensor, new: Tensor, fresh: float) -> Tensor:
        """Optimizer state after the last exchange: survivors keep theirs, `new` gets `fresh`.

        Args:
            tensor: as `param` was shaped before the exchange.
        """

    def begin(self, mask: Tensor) -> None:
        """Install the first mask."""

    def release(self) -> None:
        """Forget everything but the weight itself."""

    @abstractmethod
    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a whole new mask; returns how many weights were (dropped, grown)."""

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


@dataclass
class Candidate:
    """A parameter of a model with every name and module it is reachable by (tied weights).

    The weight of a `SparseLinear` goes by the name `weight`, as if it were dense, so that rules and
    checkpoints say the same of a layer however it is held.
    """

    name: str
    param: Parameter
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)
    module_types: set[str] = field(default_factory=set)
    is_product: bool = False
    is_embedding: bool = False

    @property
    def can_be_sparse(self) -> bool:
        """Whether masks can be held on it at all: two dimensions or more, real, not a bias."""
        leaf = self.name.rpartition(".")[2]
        # Floats of one byte have no arithmetic: they are stored, not trained.
        trains = self.param.is_floating_point() and self.param.element_size() > 1
        is_matrix = self.param.dim() >= 2 or self.is_built
        return trains and is_matrix and not leaf.startswith("bias")

    @property
    def is_built(self) -> bool:
        """Whether it is the vector of non-zeros of a sparse layer."""
        return any(isinstance(m, SparseLayer) and m.values is self.param for m in self.owners)

    @property
    def is_weight(self) -> bool:
        """Whether the field makes such a tensor sparse: Linear and Conv weights, nothing else."""
        return self.is_product and not self.is_embedding and self.can_be_sparse

    @property
    def is_default(self) -> bool:
        """Whether it is made sparse without being asked for: weights that are not frozen."""
        return self.is_weight and self.param.requires_grad


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within `torch.compile` and data-parallel wrappers, whose names are the user's."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_candidates(model: nn.Module) -> list[Candidate]:
    """List every parameter of `model` once, in model order, with all its names.

    Raises:
        ValueError: a parameter is not initialised yet (lazy modules).
    """
    model = unwrapped(model)
    found: dict[int, Candidate] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module._parameters.items():
            if param is None:
                continue
            name = f"{module_name}.{leaf}" if module_name else leaf
            if isinstance(param, UninitializedParameter):
                raise ValueError(
                    f"{name} is not initialised yet: run the model on one batch before wrapping"
                )
            if isinstance(module, SparseLayer) and leaf == "values":
                leaf = "weight"
                name = f"{module_name}.{leaf}" if module_name else leaf
            candidate = found.setdefault(id(param), Candidate(name, param))
            candidate.names.append(name)
            candidate.owners.append(module)
            candidate.module_types.update(base.__name__ for base in type(module).__mro__)
            candidate.is_product |= _is_product_weight(module, leaf)
            candidate.is_embedding |= isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return list(found.values())


def _is_product_weight(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return leaf in _ATTENTION_WEIGHTS
    return isinstance(module, _DENSE_PRODUCTS) and leaf == "weight"


@dataclass(frozen=True)
class Selector:
    """Says which candidates a rule speaks of: by glob, regular expression or module type."""

    glob: str | None = None
    regex: str | None = None
    module_type: str | None = None

    def matches(self, candidate: Candidate) -> bool:
        """Whether any of the candidate's names (parameter or module) or types fits."""
        if self.module_type is not None:
            return self.module_type in candidate.module_types
        return any(self._fits(name) for name in names_of(candidate))

    def _fits(self, name: str) -> bool:
        if self.glob is not None:
            return fnmatch.fnmatchcase(name, self.glob)
        return re.search(self.regex or "", name) is not None


def names_of(candidate: Candidate) -> list[str]:
    """Every name that a rule can use: of the parameter and of the module that owns it."""
    modules = [name.rpartition(".")[0] for name in candidate.names]
    return candidate.names + [name for name in modules if name]


def known_names(candidates: list[Candidate]) -> list[str]:
    """All names and module types, for suggestions in error messages."""
    names: dict[str, Any] = {}
    for candidate in candidates:
        names.update(dict.fromkeys(names_of(candidate)))
        names.update(dict.fromkeys(sorted(candidate.module_types)))
    return list(names)
