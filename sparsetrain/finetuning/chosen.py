"""Which terms a distillation loss has, between which layers, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from sparsetrain.config import Config

#: A layer's name, or its number in `outputs.attentions`.
Place = str | int
Places = Place | Sequence[Place] | Mapping[Place, Place]
Layers = str | Sequence[str] | Mapping[str, str]


class Terms(Config):
    """What a distillation loss is made of."""

    temperature: float = Field(gt=0, description="T, by which logits are divided.")
    weight: float = Field(ge=0, le=1, description="Of the teacher's logits; the task has the rest.")
    hidden: dict[str, str] = Field(description="Layer of the student -> layer of the teacher.")
    hidden_weight: float = Field(ge=0, description="Of the errors of hidden states.")
    attention: dict[Place, Place] = Field(description="As hidden; numbers are of attentions.")
    attention_weight: float = Field(ge=0, description="Of the distances of attention.")
    class_dim: int | None = Field(description="Dimension of the logits that counts classes.")

    @model_validator(mode="after")
    def _something_is_taught(self) -> Terms:
        if not (self.weight or self.hidden or self.attention):
            raise ValueError("weight=0 teaches nothing: raise it, or give hidden or attention")
        for student, teacher in self.attention.items():
            if type(student) is not type(teacher):
                raise ValueError(
                    f"attention={{{student!r}: {teacher!r}}}: name layers on both sides (maps of "
                    "activations), or give numbers on both (outputs.attentions)"
                )
        return self

    @property
    def maps(self) -> dict[str, str]:
        """Pairs of layers whose activation maps are compared."""
        pairs = self.attention.items()
        return {a: b for a, b in pairs if isinstance(a, str) and isinstance(b, str)}

    @property
    def probabilities(self) -> dict[int, int]:
        """Pairs of places in `outputs.attentions`."""
        pairs = self.attention.items()
        return {a: b for a, b in pairs if isinstance(a, int) and isinstance(b, int)}


def pairs_of(places: Any) -> dict[Any, Any]:
    """Student's -> teacher's."""
    if places is None:
        return {}
    if isinstance(places, str | int):
        places = [places]
    return dict(places) if isinstance(places, Mapping) else {place: place for place in places}
