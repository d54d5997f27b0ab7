"""Which tensors of a model could be made sparse, and how rules name them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from sparsetrain.config import did_you_mean
from sparsetrain.convolution import CONVOLUTIONS, TRANSPOSED
from sparsetrain.storage.csr.layers import SparseLayer

_DENSE_PRODUCTS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


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
    def places(self) -> list[tuple[nn.Module, str]]:
        """Every module that has the parameter, with the name that it has for it.

        Raises:
            ValueError: the parameter is behind a parametrization already.
        """
        for module in self.owners:
            if isinstance(module, parametrize.ParametrizationList):
                raise ValueError(
                    f"{self.name} is behind a parametrization already; remove that first, or "
                    "choose a policy that masks the parameter itself"
                )
        leaves = [name.rpartition(".")[2] for name in self.names]
        unique = {(id(m), leaf): (m, leaf) for m, leaf in zip(self.owners, leaves, strict=True)}
        return list(unique.values())

    @property
    def is_transposed(self) -> bool:
        """Whether dimension 0 counts inputs."""
        return any(isinstance(module, TRANSPOSED) for module in self.owners)

    @property
    def runs_forward(self) -> bool:
        """Whether every owner computes in the way of its class, so that hooks on it are called."""
        return all(_runs_forward(module) for module in self.owners)

    def require_forward(self, who: str) -> None:
        """Raise ValueError unless hooks on the layer are called."""
        if not self.runs_forward:
            raise ValueError(
                f"{who} acts on the inputs or outputs of {self.name}, whose layer is no plain "
                "Linear or Conv that is called by itself"
            )

    def require_one_group(self, who: str) -> None:
        """Raise ValueError when inputs are not dimension 1 of the weight (grouped convolutions)."""
        if any(getattr(module, "groups", 1) != 1 for module in self.owners):
            raise ValueError(
                f"{who} cannot gate the inputs of {self.name}: its convolution has groups; use "
                "per='output' there"
            )

    @property
    def is_weight(self) -> bool:
        """Whether the field makes such a tensor sparse: Linear and Conv weights, nothing else."""
        return self.is_product and not self.is_embedding and self.can_be_sparse

    @property
    def is_batch_norm_scale(self) -> bool:
        """Whether it is the scale of a batch normalisation, one number a channel."""
        is_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.owners)
        return is_norm and self.name.rpartition(".")[2] == "weight"

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


def plain_name(name: str) -> str:
    """The name of a weight without the parametrization that it is behind."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def _is_product_weight(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return leaf in _ATTENTION_WEIGHTS
    return isinstance(module, _DENSE_PRODUCTS) and leaf == "weight"


def _runs_forward(module: nn.Module) -> bool:
    known = next((kind for kind in _DENSE_PRODUCTS if isinstance(module, kind)), None)
    # Attention multiplies with this layer's weight itself and never calls it.
    if known is None or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return type(module).forward is known.forward


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


def choose(model: nn.Module, match: str | Sequence[str] | None) -> list[Candidate]:
    """The weights that one or several globs name; the Linear and Conv weights that train if None.

    Among what a glob names Linear and Conv weights are taken alone, if there are any.

    Raises:
        ValueError: a glob matches nothing, or the model has nothing to take.
    """
    candidates = find_candidates(model)
    if match is None:
        found = [candidate for candidate in candidates if candidate.is_default]
        if not found:
            raise ValueError("the model has no Linear or Conv weight that trains: give match")
        return found
    chosen: dict[int, Candidate] = {}
    for glob in [match] if isinstance(match, str) else match:
        named = [c for c in candidates if Selector(glob=glob).matches(c)]
        if not named:
            near = did_you_mean(glob, known_names(candidates))
            raise ValueError(f"match={glob!r} names nothing in the model{near}")
        for candidate in [c for c in named if c.is_weight] or named:
            chosen[id(candidate.param)] = candidate
    return [c for c in candidates if id(c.param) in chosen]


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
