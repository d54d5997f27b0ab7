"""What named layers of a model give, in the newest of its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsetrain.candidates import unwrapped
from sparsetrain.config import did_you_mean


class Taps:
    """Hooks on named layers, from now until `close`.

    What is seen belongs to one forward pass of the whole model: the next one replaces it, `take`
    takes it away, and what a recomputation in the backward pass gives is not looked at.

    Args:
        who: what the model is called in errors.
        names: of layers; none needs no hooks.

    Raises:
        ValueError: the model has no layer of a name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], who: str) -> None:
        model, self._who = unwrapped(model), who
        layers = {name: _layer(model, name, who) for name in names}
        self._names = list(layers)
        self._found: dict[str, Tensor] = {}
        self._odd: dict[str, str] = {}
        self._running = self._ran = False
        self._handles: list[Any] = []
        if not layers:
            return
        self._handles.append(model.register_forward_pre_hook(_Hook(self._begin)))
        for name, layer in layers.items():
            hook = _Hook(partial(self._see, name))
            self._handles.append(layer.register_forward_hook(hook))
        self._handles.append(model.register_forward_hook(_Hook(self._end), always_call=True))

    def take(self) -> dict[str, Tensor]:
        """Name -> output of the newest forward pass, which can be had once.

        Raises:
            ValueError: the model has not run since the last time, or a layer was not called once,
                or gave no tensor.
        """
        found, ran = self._found, self._ran
        self._found, self._ran = {}, False
        if self._names and not ran:
            raise ValueError(
                f"{self._who} was not called since the loss was computed last, so that its layers "
                "have given nothing new: call the model itself before each loss (and compile it "
                "after st.distill)"
            )
        for name in self._names:
            if name in self._odd or name not in found:
                why = self._odd.get(name, "was not called in the forward pass")
                raise ValueError(
                    f"layer {name!r} of {self._who} {why}: name one that is called once and gives "
                    "a tensor"
                )
        return found

    def close(self) -> None:
        """Remove the hooks, and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._found = [], {}

    def _begin(self, *_: Any) -> None:
        self._found, self._odd, self._running, self._ran = {}, {}, True, False

    def _end(self, *_: Any) -> None:
        self._running, self._ran = False, True

    def _see(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running:
            return
        if name in self._found:
            self._odd[name] = "was called more than once in a forward pass"
        if isinstance(output, list | tuple) and output:  # beside attention weights and the like
            output = output[0]
        if isinstance(output, Tensor):
            self._found[name] = output
        else:
            self._odd[name] = f"gave a {type(output).__name__}"


def _layer(model: nn.Module, name: str, who: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        near = did_you_mean(name, [known for known, _ in model.named_modules() if known])
        raise ValueError(f"{who} has no layer {name!r}{near}") from None


class _Hook:
    """A hook that copies of the model, and files with it, keep nothing of."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """What a copied hook does."""
