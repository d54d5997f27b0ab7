"""What every part of a recipe has in common: frozen, checked data with a `kind`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue


class Config(BaseModel):
    """Data that cannot change after it was checked, and that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


KindedT = TypeVar("KindedT", bound="Kinded")


class Kinded(Config):
    """A family of configurations told apart by `kind`, e.g. all policies or all scores.

    A direct subclass opens a family (and names it in `family`); a further subclass that sets
    `kind` joins it, and recipes can then use it by that name.
    """

    family: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Kinded]]] = {}

    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if Kinded in cls.__bases__:
            cls.members = {}
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            cls.members[kind] = cls

    @classmethod
    def build(cls: type[KindedT], value: Any) -> Any:
        """Turn a name, a dict with `kind`, or an instance into a member of this family."""
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            return value
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in cls.members:
            known = ", ".join(sorted(cls.members))
            if kind is None:
                raise ValueError(f"a {cls.family} needs a field 'kind', one of: {known}")
            raise ValueError(
                f"no {cls.family} of kind {kind!r}{did_you_mean(str(kind), cls.members)}; "
                f"known kinds: {known}"
            )
        return cls.members[kind].model_validate(value)


class AnyKind:
    """Annotation that gives a field the JSON schema of a whole family."""

    def __init__(self, family: type[Kinded]) -> None:
        self.family = family

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        members: Any = Union[tuple(self.family.members.values())]  # noqa: UP007
        union: Any = Annotated[members, Field(discriminator="kind")]
        return handler(TypeAdapter(union).core_schema)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the names nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(repr(n) for n in near)}?)" if near else ""
