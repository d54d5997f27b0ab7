"""What a dense gradient is made of, kept while a policy wants to look at it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


class Tape:
    """The two factors of a weight's dense gradient, kept while somebody wants it.

    The dense gradient is the sum of grad x^T over what has been accumulated into the values'
    gradient since `zero_grad`. It is asked for in blocks, so it never exists as a whole.

    Attributes:
        factors: (x [in, batch], grad [out, batch]) of each call of the layer.
    """

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor]] = []
        self._forget()

    def _forget(self) -> None:
        self._values: Parameter | None = None
        self._hook: RemovableHandle | None = None
        # Of the pass that runs; they count when autograd accumulates the gradient of the values.
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pass = -1
        # The gradient as the last accumulation left it.
        self._grad: Tensor | None = None
        self._version = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"factors": self.factors, "grad": self._grad, "untouched": self._is_untouched()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.factors, self._grad = state["factors"], state["grad"]
        if self._grad is not None and state["untouched"]:
            self._version = self._grad._version

    def attach(self, values: Parameter) -> None:
        """Follow what is accumulated into the gradient of `values`."""
        if self._values is not values:
            self.detach()
            self._values = values
            hook = values.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            self._hook = hook

    def detach(self) -> None:
        """Follow nothing any more."""
        if self._hook is not None:
            self._hook.remove()
        self._values = self._hook = None

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Take the factors of one call of the layer in a backward pass."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass != self._pass:
            # What is pending was taken aside (`torch.autograd.grad`) and accumulated nowhere.
            self._pending.clear()
            self._pass = this_pass
            if self._values is not None:
                self.settle(self._values.grad)
        # Copies, because both may be somebody's buffer that is written to after the pass.
        self._pending.append((x.clone(), grad.clone()))

    def _accumulated(self, values: Tensor) -> None:
        self.factors += self._pending
        self._pending = []
        self._grad = values.grad
        self._version = -1 if values.grad is None else values.grad._version

    def settle(self, grad: Tensor | None) -> None:
        """Forget the factors if `zero_grad` was called since they were taken.

        Args:
            grad: the values' gradient now. Zeros that autograd left there are no sign of it.
        """
        is_same = grad is not None and grad is self._grad and self._is_untouched()
        if not is_same and (grad is None or not grad.any()):
            self.factors.clear()

    def _is_untouched(self) -> bool:
        return self._grad is not None and self._grad._version == self._version

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dense gradient: [stop - start, in]."""
        x, grad = self.factors[0]
        total = grad[start:stop] @ x.t()
        for x, grad in self.factors[1:]:
            total.addmm_(grad[start:stop], x.t())
        return total
