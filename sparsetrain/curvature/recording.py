"""A forward pass that remembers what went into layers, and backward passes that make use of it.

Parameters are frozen meanwhile, so that a backward pass computes gradients of activations alone.
Each layer's own gradient is then made of its input and the gradient on its output (`layers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sparsetrain.batches import Batch
from sparsetrain.curvature import layers

#: Parameter -> tensor of its shape.
Sums = dict[Parameter, Tensor]


@dataclass
class Use:
    """One call of a layer."""

    name: str
    module: nn.Module
    given: Tensor
    version: int
    size: int  # of dimension 0 of the output
    back: Tensor | None = None  # gradient of a pass, waiting for other uses of the parameters
    squares: Tensor | None = None  # of the gradients of all passes, where those are enough

    def release(self) -> None:
        """Let go of what went in, which no later pass needs."""
        self.given = self.given.new_empty(0)

    def has_samples(self, size: int) -> bool:
        """Whether samples are along dimension 0 of what went in and out."""
        return len(self.given) == self.size == size

    def parameters(self) -> dict[str, Parameter]:
        """Those of the layer that its rule knows, without tensors made by a parametrization."""
        leaves = {leaf: self.module._parameters.get(leaf) for leaf in ("weight", "bias")}
        return {leaf: parameter for leaf, parameter in leaves.items() if parameter is not None}


class Recording:
    """What a forward pass of a batch leaves behind.

    Args:
        model: in evaluation mode, its parameters frozen.
        modules: name -> layer to record.
        budget: numbers that per-sample gradients may take at a time.
        sums: squares of earlier batches, to which those of this one are added.
        left_out: parameters to add nothing for.

    Attributes:
        without_samples: parameters of layers whose input or output has no dimension 0 of samples;
            they are left out, too.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        budget: int,
        sums: Sums,
        left_out: Iterable[Parameter] = (),
    ) -> None:
        self.size = batch.size
        self.budget = budget
        self.uses: list[Use] = []
        self._is_last = False  # of the passes
        self._start = torch.zeros((), requires_grad=True)
        self._sums = sums
        names = {id(module): name for name, module in modules.items()}
        handles = [
            module.register_forward_hook(partial(self._called, names[id(module)]))
            for module in modules.values()
        ]
        try:
            self.outputs = batch.forward(model)
        finally:
            for handle in handles:
                handle.remove()
        self._alone = self._uses_alone()
        self.without_samples = [
            parameter
            for use in self.uses
            if not use.has_samples(self.size)
            for parameter in use.parameters().values()
        ]
        self._left_out = {id(parameter) for parameter in (*left_out, *self.without_samples)}

    def _called(self, name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        given: Tensor = args[0]
        begun: Tensor | None = None
        if not output.requires_grad:
            output = begun = _Begin.apply(output, self._start)  # type: ignore[no-untyped-call]
        use = Use(name, module, given.detach(), given._version, len(output))
        output.register_hook(partial(self._came_back, use))
        self.uses.append(use)
        return begun

    def _uses_alone(self) -> set[int]:
        """Uses of parameters that no other use has."""
        users: dict[int, list[Use]] = {}
        for use in self.uses:
            for parameter in use.parameters().values():
                users.setdefault(id(parameter), []).append(use)
        shared = {id(use) for found in users.values() if len(found) > 1 for use in found}
        return {id(use) for use in self.uses} - shared

    def go_back(self, total: Tensor, *, again: bool = False) -> None:
        """A backward pass. Squares of per-sample gradients are added to the sums over samples.

        A parameter that several layers or calls share is there once, with the square of the sum.
        Layers that were not called are missing.

        Args:
            total: a sum over samples of a function of each one's outputs.
            again: whether there will be another pass.
        """
        self._is_last = not again
        for use in self.uses:
            use.back = None
        torch.autograd.grad(total, self._start, retain_graph=again, allow_unused=True)
        self._add_shared()
        for use in () if again else self.uses:
            if use.squares is not None:  # this pass has not come to it
                self._add_outer(use)

    def _came_back(self, use: Use, back: Tensor) -> None:
        if use.given._version != use.version:
            raise RuntimeError(
                f"the input of {use.name} was changed in place after the layer had used it: "
                "curvature needs it as it was"
            )
        use.back = back.detach()
        if id(use) not in self._alone or not use.has_samples(self.size):
            return
        if layers.has_outer_products(use.module, use.given):
            square = use.back.square()
            use.squares = square if use.squares is None else use.squares.add_(square)
            if self._is_last:
                self._add_outer(use)
        else:
            found = layers.sums_of_squares(use.module, use.given, use.back, self.budget)
            self._add(use, found)
        use.back = None
        if self._is_last:
            use.release()

    def _add_outer(self, use: Use) -> None:
        """The squares of all passes, in one matrix product: the input was the same."""
        assert use.squares is not None
        weight = use.parameters().get("weight")
        before = None if weight is None else self._sums.get(weight)
        found = layers.sums_of_outer_squares(use.module, use.given, use.squares, before)
        self._add(use, found)
        use.squares = None

    def _add(self, use: Use, found: layers.Gradients) -> None:
        for leaf, parameter in use.parameters().items():
            self._add_to(parameter, found[leaf])

    def _add_to(self, parameter: Parameter, square: Tensor) -> None:
        known = self._sums.get(parameter)
        # A weight's outer squares are added to its sum in place already.
        if id(parameter) not in self._left_out and known is not square:
            self._sums[parameter] = square if known is None else known.add_(square)

    def _add_shared(self) -> None:
        """Parameters with several uses: their gradients are added up before squaring."""
        waiting = [u for u in self.uses if u.back is not None and u.has_samples(self.size)]
        largest = max(
            (layers.numbers_of_a_sample(u.module, u.back) for u in waiting if u.back is not None),
            default=1,
        )
        size = max(self.budget // largest, 1)
        for start in range(0, self.size if waiting else 0, size):
            part = slice(start, start + size)
            totals: Sums = {}
            for use in waiting:
                assert use.back is not None
                found = layers.per_sample(use.module, use.given[part], use.back[part])
                for leaf, parameter in use.parameters().items():
                    known = totals.get(parameter)
                    gradient = found[leaf]
                    totals[parameter] = gradient if known is None else known.add_(gradient)
            for parameter, total in totals.items():
                self._add_to(parameter, total.square_().sum(0))


class _Begin(torch.autograd.Function):
    """The identity, from which on gradients are wanted although no parameter wants one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, start: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None
