"""Recipes: a default policy and rules for named layers, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, field_validator, model_validator
from torch import nn

from sparsetrain.candidates import Candidate, Selector, find_candidates, known_names
from sparsetrain.config import AnyKind, Config, did_you_mean
from sparsetrain.data_files import dump_data, parse_data, read_text, to_json, to_yaml
from sparsetrain.policies import Policy, PolicyField


class Rule(Config):
    """What happens to the tensors that a pattern names. Exactly one selector, one action.

    A rule that makes tensors sparse takes the Linear and Conv weights among its matches; only
    when there are none among them does it take the other tensors it names (say, an embedding).
    """

    match: str | None = Field(None, description="glob on parameter or module names")
    regex: str | None = Field(None, description="regular expression searched in those names")
    module_type: str | None = Field(None, description="class name of the owning module")
    dense: bool = Field(False, description="keep the matched tensors dense")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of zeros under the recipe's own policy, in [0, 1)"
    )
    policy: PolicyField | None = Field(None, description="another policy for these tensors")

    @field_validator("regex")
    @classmethod
    def _regex_compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_selector_one_action(self) -> Rule:
        selectors = [self.match, self.regex, self.module_type]
        if sum(s is not None for s in selectors) != 1:
            raise ValueError("a rule needs exactly one of 'match', 'regex' and 'module_type'")
        if self.dense + (self.sparsity is not None) + (self.policy is not None) != 1:
            raise ValueError("a rule needs exactly one of 'dense: true', 'sparsity' and 'policy'")
        return self

    @property
    def selector(self) -> Selector:
        """The rule's pattern."""
        return Selector(self.match, self.regex, self.module_type)

    def __str__(self) -> str:
        return next(f"{k}={v!r}" for k, v in self.model_dump(exclude_none=True).items())


class Recipe(Config):
    """Which policy holds which tensors: the first rule that matches wins, else `policy`."""

    policy: PolicyField | None = Field(None, description="for every target that no rule claims")
    rules: tuple[Rule, ...] = Field((), description="ordered; the first match wins")

    @model_validator(mode="after")
    def _has_a_policy(self) -> Recipe:
        if self.policy is None and all(rule.policy is None for rule in self.rules):
            raise ValueError("a recipe needs a 'policy', or a rule with one")
        for number, rule in enumerate(self.rules):
            if rule.sparsity is None:
                continue
            if self.policy is None:
                raise ValueError(
                    f"rule {number} ({rule}): its 'sparsity' changes the recipe's 'policy', which "
                    "is empty"
                )
            try:
                self.policy.with_sparsity(rule.sparsity)
            except ValueError as error:
                raise ValueError(f"rule {number} ({rule}): {error}") from error
        return self

    @classmethod
    def coerce(cls, value: Any) -> Recipe:
        """Make a recipe of a policy, a recipe, a dict (of either) or a path to a file."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Policy):
            return cls(policy=value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, (str, Path)):
            return cls.load(value)
        raise TypeError(
            f"policy must be a policy, a Recipe, a dict or a path to a recipe, not "
            f"{type(value).__name__}"
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """Build from plain data; a dict with `kind` is taken as the policy itself."""
        data = dict(value)
        return cls.model_validate({"policy": data} if "kind" in data else data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dicts, lists, numbers, strings) that `from_dict` reads back."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a .yaml, .yml or .json file.

        Raises:
            ValueError: the file is missing, not a mapping, or not a valid recipe.
        """
        return cls.from_text(read_text(Path(path), "recipe"), source=str(path))

    @classmethod
    def from_text(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Parse YAML or JSON text; `source` names it in errors."""
        data = parse_data(text, source)
        if not isinstance(data, dict):
            raise ValueError(f"{source} must hold a mapping with 'policy' and 'rules'")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def dump(self, path: str | Path) -> None:
        """Write YAML, or JSON when the name ends in .json."""
        dump_data(self.to_dict(), Path(path))

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return to_yaml(self.to_dict())

    def to_json(self) -> str:
        """The recipe as JSON."""
        return to_json(self.to_dict())

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of a recipe file, or of a policy alone, for editors and validators."""
        either: Any = cls | Annotated[Policy, AnyKind(Policy)]
        return TypeAdapter(either).json_schema()


@dataclass
class Assignment:
    """One policy with the candidates it holds."""

    policy: Policy
    candidates: list[Candidate]


def assign(model: nn.Module, recipe: Recipe) -> list[Assignment]:
    """Resolve a recipe on a model, without touching either.

    Raises:
        ValueError: a rule matches nothing, or a rule or the policy gets nothing to make sparse.
    """
    candidates = find_candidates(model)
    matched = [_matches(number, rule, candidates) for number, rule in enumerate(recipe.rules)]
    claims: dict[int, int] = {}
    for number, found in enumerate(matched):
        for candidate in found:
            claims.setdefault(id(candidate.param), number)
    assignments = []
    if recipe.policy is not None:
        taken = [c for c in candidates if recipe.policy.takes(c)]
        free = [c for c in taken if c.param.requires_grad and id(c.param) not in claims]
        if not free and all(rule.sparsity is None for rule in recipe.rules):
            raise ValueError(_nothing_left(recipe.policy, taken))
        assignments.append(Assignment(recipe.policy, free))
    for number, rule in enumerate(recipe.rules):
        mine = [c for c in matched[number] if claims[id(c.param)] == number]
        if not mine:
            raise ValueError(
                f"rule {number} ({rule}) does nothing: earlier rules claim all that it matches; "
                "move it up or take it out"
            )
        policy = _policy_of(rule, recipe)
        if policy is not None:
            chosen = _sparse_among(number, rule, policy, matched[number], mine)
            assignments.append(Assignment(policy, chosen))
    assignments = [assignment for assignment in assignments if assignment.candidates]
    if not assignments:
        raise ValueError("the recipe makes nothing sparse: no rule has a 'sparsity' or 'policy'")
    return assignments


def _nothing_left(policy: Policy, taken: list[Candidate]) -> str:
    if not taken:
        why = f"the model has no {policy.of}"
    elif all(not c.param.requires_grad for c in taken):
        why = f"all {policy.of}s are frozen (requires_grad is False)"
    else:
        why = f"rules claim all {policy.of}s ({', '.join(c.name for c in taken[:3])}, ...)"
    return f"the recipe's policy {policy.kind!r} makes nothing sparse: {why}"


def _matches(number: int, rule: Rule, candidates: list[Candidate]) -> list[Candidate]:
    found = [c for c in candidates if rule.selector.matches(c)]
    if not found:
        pattern = rule.match or rule.regex or rule.module_type or ""
        names = known_names(candidates)
        hint = did_you_mean(pattern, names) or f" (its names are like {', '.join(names[:3])})"
        raise ValueError(f"rule {number} ({rule}) matches no tensor of the model{hint}")
    return found


def _policy_of(rule: Rule, recipe: Recipe) -> Policy | None:
    if rule.policy is not None:
        return rule.policy
    if rule.sparsity is not None and recipe.policy is not None:
        return recipe.policy.with_sparsity(rule.sparsity)
    return None


def _sparse_among(
    number: int, rule: Rule, policy: Policy, matched: list[Candidate], mine: list[Candidate]
) -> list[Candidate]:
    """The tensors that a rule makes sparse among those that it claims."""
    if any(policy.takes(c) for c in matched):
        chosen = [c for c in mine if policy.takes(c)]
        if not chosen:
            raise ValueError(
                f"rule {number} ({rule}) makes nothing sparse: earlier rules claim the "
                f"{policy.of}s that it matches; move it up or take it out"
            )
        return chosen
    chosen = [c for c in mine if policy.accepts(c)]
    if not chosen and policy.of != Policy.of:
        raise ValueError(f"rule {number} ({rule}) names no {policy.of}, as {mine[0].name} is none")
    if not chosen:
        raise ValueError(
            f"rule {number} ({rule}) names only tensors such as {mine[0].name}: biases and norm "
            "weights cannot be made sparse"
        )
    return chosen
