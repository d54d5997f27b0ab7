"""Attention heads: channels that can go by whole heads only, and how we know.

The graph of layers sees that query, key, value and output projection have one width in common, not
that attention mixes the positions of a head. Where heads are is guessed from names of attributes,
and every guess is tried out on the layer itself: what is left without some heads must be what the
layer gives when nothing listens to them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetrain.batches import called
from sparsetrain.channels.removal import remove
from sparsetrain.channels.sides import Side
from sparsetrain.evaluating import evaluating

if TYPE_CHECKING:
    from sparsetrain.channels.coupling import Coupling

_COUNTS = (
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "n_heads",
    "n_head",
    "nhead",
    "num_head",
    "heads",
    "h",
)
_SIZES = ("attention_head_size", "head_dim", "head_size", "dim_head", "d_head", "d_k")
_WIDTHS = ("all_head_size", "inner_dim")
#: Mean the width of the heads or that of the model, which are the same in a whole network.
_EITHER = ("embed_dim", "d_model", "hidden_size", "dim", "n_embd")

_TOLERANCE = 1e-6  # some attention takes its softmax in float32


@dataclass(frozen=True)
class Heads:
    """Where the number of heads is written down.

    Attributes:
        owner: the module that has the projections.
        size: positions of a head.
        counts: attributes of the owner that are the number of heads.
        widths: attributes of the owner that are the positions of all heads.
    """

    owner: Any
    size: int
    counts: tuple[str, ...]
    widths: tuple[str, ...]

    def recount(self, width: int) -> None:
        """Write down how many heads there are in so many positions."""
        for name in self.counts:
            setattr(self.owner, name, width // self.size)
        for name in self.widths:
            setattr(self.owner, name, width)


def head_counts(module: nn.Module) -> dict[str, Any]:
    """Attribute -> value, of those of a module with heads that removal may change."""
    if not _integers(module, (*_COUNTS, *_SIZES)):
        return {}
    return _integers(module, (*_COUNTS, *_WIDTHS, *_EITHER))


def tried(model: nn.Module, example_inputs: Any, found: Sequence[Coupling]) -> list[Coupling]:
    """Couplings whose channels can go: as they are, by heads, or none.

    Those where several Linear layers meet are tried out, each in the innermost module around it.

    Args:
        example_inputs: of a call of the model.
        found: what the graph of layers takes for couplings.
    """
    blocks = {c.name: _around(c.sides) for c in found if _needs_trial(c.sides)}
    calls = _calls(model, example_inputs, blocks.values())
    modules = dict(model.named_modules())
    held: list[Coupling | None] = []
    for coupling in found:
        if coupling.name not in blocks:
            held.append(coupling)
            continue
        block = next(name for name in _upwards(blocks[coupling.name]) if name in calls)
        # The heads are counted in the block, as near to the projections as can be.
        near = [n for n in _upwards(_around(coupling.by_role("out"))) if n.startswith(block)]
        ways = [way for name in near for way in by_heads(coupling, modules[name])]
        with evaluating(model):
            tries = (w for w in (*ways, coupling) if goes_alone(w, modules[block], calls[block]))
            held.append(next(tries, None))
    return [coupling for coupling in held if coupling is not None]


def _needs_trial(sides: Sequence[Side]) -> bool:
    """Whether channels of several Linear layers meet, as in attention, or those of one part."""
    linear = [side for side in sides if isinstance(side.module, nn.Linear)]
    outs = [side.size for side in linear if side.role == "out"]
    ins = [side.size for side in linear if side.role == "in"]
    return len(outs) > 1 or (bool(outs) and bool(ins) and max(outs) > min(ins))


def _calls(
    model: nn.Module, example_inputs: Any, names: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """Positional and keyword arguments of the first call of modules, and of those around them.

    Modules whose forward is not called (lists of layers) have none.
    """
    calls: dict[str, tuple[Any, Any]] = {}
    wanted = {above for name in names for above in _upwards(name)}
    names_of = {module: name for name, module in model.named_modules() if name in wanted}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        if names_of[module] not in calls:
            calls[names_of[module]] = copy.deepcopy((args, kwargs))  # caches fill up

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in names_of]
    try:
        if handles:
            with evaluating(model), torch.no_grad():
                called(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _around(sides: Iterable[Side]) -> str:
    """The innermost module that has all these layers."""
    paths = [side.layer.split(".")[:-1] for side in sides]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


def _upwards(name: str) -> list[str]:
    """A module and those around it, the model last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def by_heads(coupling: Coupling, owner: nn.Module) -> Iterator[Coupling]:
    """The coupling with heads for channels, in every way that the owner's attributes speak of.

    Query, key and value may be layers of their own or parts of one, in this order. All three have
    the width of the output projection: heads that share keys and values (grouped-query attention)
    stay.

    Args:
        owner: a module around the layers that the channels come out of.
    """
    outs, ins = coupling.by_role("out"), coupling.by_role("in")
    width = ins[0].size
    if any(side.size != width for side in ins) or any(side.size % width for side in outs):
        return
    if sum(side.size // width for side in outs) != 3:
        return
    # What has another size is no part of it: a norm over the positions of each head, say.
    sides = [side for side in coupling.sides if side.role != "through" or side.size == width]
    for count in _possible_counts(owner, width):
        size = width // count
        counts = tuple(_integers(owner, _COUNTS, count))
        placed = tuple(replace(s, places=_places(s.size // width, count, size)) for s in sides)
        own, either = (tuple(_integers(owner, names, width)) for names in (_WIDTHS, _EITHER))
        for widths in (own, own + either) if either else (own,):
            heads = Heads(owner, size, counts, widths)
            yield replace(coupling, sides=placed, heads=heads)


def _integers(module: nn.Module, names: Sequence[str], value: int | None = None) -> dict[str, int]:
    """Attributes of these names, if they are integers (and have this value)."""
    own = {name: vars(module).get(name) for name in names}
    return {n: v for n, v in own.items() if type(v) is int and value in (None, v)}


def _possible_counts(owner: nn.Module, width: int) -> list[int]:
    sizes = [width // size for size in _integers(owner, _SIZES).values() if 0 < size <= width]
    counts = [*_integers(owner, _COUNTS).values(), *sizes]
    return [n for n in dict.fromkeys(counts) if n > 1 and width % n == 0]


def _places(parts: int, count: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Positions of each head in a layer that has `parts` times all heads."""
    return tuple(
        tuple((part * count + head) * size + i for part in range(parts) for i in range(size))
        for head in range(count)
    )


def goes_alone(coupling: Coupling, block: nn.Module, inputs: tuple[Any, Any]) -> bool:
    """Whether channels of a coupling can go without what is left giving anything else.

    A copy of the block on the CPU, with weights drawn anew so that none is too small to matter,
    loses half of the channels. It has to give what it gives when the next layers do not listen to
    them. Layer and group norms do not count: a function of each number alone replaces them.

    Args:
        block: a module in evaluation mode that has all layers of the coupling.
        inputs: positional and keyword arguments of a call of the block.

    Returns:
        False also where this cannot be seen: the smaller block does not run, or the outputs do not
        depend on one of the layers (attention to a single token does not depend on queries).
    """
    trial, coupling = copy.deepcopy((block, coupling))
    _draw_anew(trial.to("cpu", torch.float64).requires_grad_(True))
    for side in coupling.by_role("through"):
        if isinstance(side.module, nn.LayerNorm | nn.GroupNorm):
            side.module.register_forward_hook(lambda _module, args, _output: torch.tanh(args[0]))
    order = torch.randperm(coupling.channels, generator=torch.Generator().manual_seed(0))
    gone = coupling.removable(order.tolist(), coupling.channels // 2)
    try:
        if not _all_matter(trial, coupling, inputs):
            return False
        with torch.no_grad():
            full = _outputs(trial, inputs)
            smaller, copied = copy.deepcopy((trial, coupling))
            remove({coupling.name: gone}, [copied], None)
            found = _outputs(smaller, inputs)
            _ignore(coupling, gone)
            expected = _outputs(trial, inputs)
        return _same(full, expected, found)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return False  # what a forward raises whose tensors do not fit


def _draw_anew(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        shape = parameter.shape
        if len(shape) > 1:
            drawn = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        else:  # scales among them, whose sign or zero may matter
            drawn = torch.rand(shape, generator=generator) + 0.5
        parameter.data.copy_(drawn)


def _outputs(block: nn.Module, inputs: tuple[Any, Any]) -> list[Tensor]:
    def double(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to("cpu", torch.float64 if leaf.is_floating_point() else None)

    args, kwargs = copy.deepcopy(pytree.tree_map(double, inputs))  # a block may write to them
    leaves = pytree.tree_leaves(block(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _all_matter(block: nn.Module, coupling: Coupling, inputs: tuple[Any, Any]) -> bool:
    """Whether the outputs depend on each layer that the channels come out of."""
    weights = [side.module.weight for side in coupling.by_role("out")]
    outputs = [leaf for leaf in _outputs(block, inputs) if leaf.requires_grad]
    size = torch.stack([leaf.square().sum() for leaf in outputs]).sum()
    gradients = torch.autograd.grad(size, weights, allow_unused=True)
    least = 1e-9 * float(size.detach())
    return all(
        gradient is not None and float((gradient * weight.detach()).abs().sum()) > least
        for gradient, weight in zip(gradients, weights, strict=True)
    )


def _ignore(coupling: Coupling, channels: Sequence[int]) -> None:
    """Set to 0 what the next layers make of channels."""
    for side in coupling.by_role("in"):
        for leaf, dim in side.slices():
            weight = getattr(side.module, leaf)
            weight.index_fill_(dim, torch.tensor(side.positions(channels), device=weight.device), 0)


def _same(full: list[Tensor], expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether outputs agree and the channels matter to them; maps of each head are left out."""
    matters = False
    for whole, right, output in zip(full, expected, found, strict=True):
        if right.shape != output.shape or not right.numel():
            continue
        least = _TOLERANCE * float(right.abs().max())
        if not float((right - output).abs().max()) <= least:
            return False
        matters = matters or float((whole - right).abs().max()) > 100 * least
    return matters
