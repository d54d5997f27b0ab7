"""Which channels of which layers have to go together.

The graph of layers is traced by the `torch-pruning` package (Fang et al. 2023, "DepGraph"). What is
made of it here: couplings, whose channels are removed from all their layers at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetrain.batches import called
from sparsetrain.channels.heads import Heads, tried
from sparsetrain.channels.sides import Role, Side, can_lose_channels, is_grouped, is_known, role_of
from sparsetrain.evaluating import evaluating, wanting


class _Found(NamedTuple):
    """A layer of a group, with its positions and the channels of the root layer they are of."""

    module: Any
    role: Role
    places: list[int]
    roots: list[int]


@dataclass(frozen=True)
class Coupling:
    """Layers whose channels are the same ones.

    Attributes:
        name: of the first layer that they come out of.
        sides: every layer that has them.
        heads: what counts them, where a channel is an attention head.
    """

    name: str
    sides: tuple[Side, ...]
    heads: Heads | None = None

    @property
    def channels(self) -> int:
        """How many can be removed one by one."""
        return len(self.sides[0].places)

    def removable(self, order: Iterable[int], count: int) -> list[int]:
        """The first `count` channels of an order, but for the last one of any layer; ascending."""
        if self._is_everywhere:
            return sorted(itertools.islice(order, min(count, self.channels - 1)))
        left = [{c for c, places in enumerate(side.places) if places} for side in self.sides]
        taken: list[int] = []
        for channel in order:
            if len(taken) == count:
                break
            if all(channels != {channel} for channels in left):
                taken.append(channel)
                for channels in left:
                    channels.discard(channel)
        return sorted(taken)

    @cached_property
    def _is_everywhere(self) -> bool:
        """Whether every layer has every channel."""
        return all(all(side.places) for side in self.sides)

    def by_role(self, role: str) -> list[Side]:
        """The layers that they come out of ("out"), go into ("in") or pass "through"."""
        return [side for side in self.sides if side.role == role]


def couplings(model: nn.Module, example_inputs: Any) -> list[Coupling]:
    """Every coupling of a model whose channels can be removed, in the order of its layers.

    Left out are channels that the model gives out, that no layer takes in, or that pass through a
    layer which cannot lose them. Where several Linear layers meet, a trial says whether channels
    can go one by one, by whole attention heads, or not at all.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, for one
            call of the model.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: nothing in the model's output depends on a parameter.
    """
    graph, outputs = _traced(model, example_inputs)
    names = {module: name for name, module in model.named_modules()}
    order = {name: number for number, name in enumerate(names.values())}
    found = []
    for group in graph.get_all_groups(root_module_types=(nn.modules.conv._ConvNd, nn.Linear)):
        sides = _sides(graph, group, names)
        if sides is None or any(s.role != "in" and s.module in outputs for s in sides):
            continue
        first = min((s.layer for s in sides if s.role == "out"), key=order.__getitem__)
        coupling = Coupling(first, sides)
        if coupling.by_role("in") and coupling.channels > 1:
            found.append(coupling)
    found = tried(model, example_inputs, found)
    return sorted(found, key=lambda coupling: order[coupling.name])


def _traced(model: nn.Module, example_inputs: Any) -> tuple[Any, set[nn.Module]]:
    """The graph of layers, and the modules whose output the model gives out."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "removing channels needs torch-pruning: pip install 'sparsetrain[channels]'"
        ) from error
    made: dict[int, nn.Module] = {}
    given_out: set[nn.Module] = set()

    def forward(model: nn.Module, inputs: Any) -> Any:
        outputs = called(model, inputs)
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
        leaves = [leaf for leaf in leaves if leaf.grad_fn is not None]
        if not leaves:
            raise ValueError("no output of the model depends on its parameters")
        given_out.update(made[id(leaf)] for leaf in leaves if id(leaf) in made)
        kept.extend(leaves)
        return leaves

    kept: list[Any] = []  # so that no id is used twice

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output)
        made[id(output)] = module

    with evaluating(model), wanting(model, model.parameters()):
        handles = [m.register_forward_hook(remember) for m in model.modules() if is_known(m)]
        try:
            graph = torch_pruning.DependencyGraph()
            # It guesses the width of a concatenation by what comes after, wrongly before a
            # flattening, although it knows the widths of the parts.
            graph.REGISTERED_PRUNERS[graph.ops.OPTYPE.CONCAT].get_in_channels = _width_of_parts
            graph.build_dependency(model, example_inputs, forward_fn=forward, verbose=False)
            for node in graph.module2node.values():
                if node.type == graph.ops.OPTYPE.CONCAT and _is_rotation(node.grad_fn):
                    _leave_in_place(node)
        finally:
            for handle in handles:
                handle.remove()
    return graph, given_out


def _is_rotation(concatenation: Any) -> bool:
    """Whether parts of heads [samples, heads, tokens, positions] change places (Su et al. 2021)."""
    shape, dim = concatenation._input_metadata[0].shape, concatenation._saved_dim
    parts = [function for function, _ in concatenation.next_functions]
    slices = [part for part in parts if part is not None and "Slice" in part.name()]
    is_last = len(shape) == 4 and dim not in range(3)  # -1 is a large number here
    return is_last and any(part._saved_dim not in range(3) for part in slices)


def _leave_in_place(concatenation: Any) -> None:
    """Channels keep their numbers; the graph would shift them on and on."""
    concatenation.enable_index_mapping = False
    around = [concatenation, *concatenation.inputs]
    for dependency in itertools.chain.from_iterable(node.dependencies for node in around):
        if concatenation in (dependency.source, dependency.target):
            dependency.index_mapping[1] = None


def _width_of_parts(concatenation: Any) -> int | None:
    sizes = concatenation.concat_sizes
    return sum(sizes) if sizes and None not in sizes else None


def _sides(graph: Any, group: Any, names: dict[nn.Module, str]) -> tuple[Side, ...] | None:
    """The layers of a group; None where one of them cannot lose channels."""
    found: list[_Found] = []
    for item in group.items:
        module = item.dep.target.module
        if type(module).__module__.startswith("torch_pruning"):
            if type(module).__name__ == "_OutputOp":
                return None
            continue
        if isinstance(module, nn.Parameter) or not can_lose_channels(module):
            return None
        if None in item.root_idxs:
            return None  # the graph has lost which channels of the first layer these are
        if is_grouped(module) and module.groups == module.out_channels:
            return None  # the graph takes it for a depthwise one, whose inputs are its outputs
        role = role_of(module, graph.is_out_channel_pruning_fn(item.dep.handler))
        if _has_groups(module) and len(set(item.idxs)) < _width(module, role):
            return None  # after a concatenation: its groups have channels of other couplings, too
        found.append(_Found(module, role, item.idxs, item.root_idxs))
    members = _together(found)
    return tuple(
        Side(names[module], module, role, _places(members, idxs, roots))
        for module, role, idxs, roots in found
    )


def _has_groups(module: Any) -> bool:
    return is_grouped(module) or isinstance(module, nn.GroupNorm)


def _width(module: Any, role: Role) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    width: int = module.in_channels if role == "in" else module.out_channels
    return width


def _places(
    members: Sequence[Sequence[int]], idxs: Iterable[int], roots: Iterable[int]
) -> tuple[tuple[int, ...], ...]:
    """Positions in a layer of each channel, which is a set of channels of the root layer."""
    at: dict[int, list[int]] = {}
    for place, root in zip(idxs, roots, strict=True):
        at.setdefault(root, []).append(place)
    return tuple(tuple(sorted(p for r in roots for p in at.get(r, ()))) for roots in members)


def _together(found: Sequence[_Found]) -> list[list[int]]:
    """Channels of the root layer that can go by themselves only together.

    Groups of a convolution or of GroupNorm all lose the same number: their first channels go
    together, and so on.
    """
    leader = {root: root for root in found[0].roots}

    def lead(root: int) -> int:
        while leader[root] != root:
            root = leader[root]
        return root

    for module, _, idxs, roots in found:
        if not _has_groups(module):
            continue
        groups = module.groups if is_grouped(module) else module.num_groups
        size = len(set(idxs)) // groups
        first: dict[int, int] = {}
        for place, root in zip(idxs, roots, strict=True):
            one, other = lead(first.setdefault(place % size, root)), lead(root)
            leader[max(one, other)] = min(one, other)
    members: dict[int, list[int]] = {}
    for root in leader:
        members.setdefault(lead(root), []).append(root)
    return [sorted(roots) for roots in members.values()]
