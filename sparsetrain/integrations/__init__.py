"""Other people's training loops, each in a module of its own that needs its library.

`st.integrations.transformers` imports `transformers` when it is first asked for, and so on;
without the library that raises an ImportError which says how to install it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

#: Module of this package -> the extra that brings what it needs.
_EXTRAS = {"transformers": "transformers", "lightning": "lightning"}

__all__ = sorted(_EXTRAS)


def __getattr__(name: str) -> ModuleType:
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        raise ImportError(
            f"sparsetrain.integrations.{name} needs {error.name}: "
            f"pip install 'sparsetrain[{_EXTRAS[name]}]'"
        ) from error


def __dir__() -> list[str]:
    return __all__
