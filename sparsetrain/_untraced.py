"""What `torch.compile` does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def untraced(function: FunctionT) -> FunctionT:
    """The function, which while a caller is being traced is a break in the graph.

    Not a decorator: `torch.compiler.disable` imports the compiler, which takes seconds.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]
    return function
