"""Which tensors are made sparse: candidates in a model, rules on them, and the target itself."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

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
    """

    def __init__(self, name: str, param: Parameter) -> None:
        self.name = name
        self.param = param
        self.shape = tuple(param.shape)
        self.numel = param.numel()
        self.active = self.numel

    @property
    def density(self) -> float:
        """Share of weights that are active, in [0, 1]."""
        return self.active / self.numel

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True where active."""

    @abstractmethod
    def active_indices(self) -> Tensor:
        """Flat indices of the active weights, ascending."""

    @abstractmethod
    def active_values(self, indices: Tensor) -> Tensor:
        """Active weights at flat `indices`."""

    @abstractmethod
    def least_active(self, count: int) -> Tensor:
        """Flat indices, ascending, of the `count` active weights of least magnitude."""

    @abstractmethod
    def largest_free(self, scores: Tensor, count: int, freed: Tensor) -> Tensor:
        """Flat indices, ascending, of the `count` connections with the largest |score| among
        those that are inactive and those at `freed`, which are about to be dropped."""

    @abstractmethod
    def exchange(
        self, dropped: Tensor, grown: Tensor, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Drop and grow connections; returns the net (dropped, grown) index sets."""

    @abstractmethod
    def replace_mask(self, mask: Tensor) -> tuple[int, int]:
        """Install a whole new mask; returns how many weights were (dropped, grown)."""


@dataclass
class Candidate:
    """A parameter of a model with every name and module it is reachable by (tied weights)."""

    name: str
    param: Parameter
    names: list[str] = field(default_factory=list)
    module_types: set[str] = field(default_factory=set)
    is_product: bool = False
    is_embedding: bool = False

    @property
    def can_be_sparse(self) -> bool:
        """Whether masks can be held on it at all: two dimensions or more, real, not a bias."""
        leaf = self.name.rpartition(".")[2]
        # Floats of one byte have no arithmetic: they are stored, not trained.
        trains = self.param.is_floating_point() and self.param.element_size() > 1
        return trains and self.param.dim() >= 2 and not leaf.startswith("bias")

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
            candidate = found.setdefault(id(param), Candidate(name, param))
            candidate.names.append(name)
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
