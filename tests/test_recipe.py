"""Recipes as data: nothing is lost on the way to a file and back, and mistakes are named."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as some
from pydantic import ValidationError

import sparsetrain as st
from sparsetrain.policies import DynamicPolicy, LearnedPolicy

POLICIES = {
    kind: policy
    for kind, policy in st.Policy.members.items()
    if policy.__module__.startswith("sparsetrain.policies.")
}
STATIC: dict[str, Any] = {"kind": "static", "sparsity": 0.5}
RIGL: dict[str, Any] = {"kind": "rigl", "sparsity": 0.5, "total_steps": 10}

# What a user may write, field by field.

fields = some.fixed_dictionaries
words = some.text(max_size=30)
shares = some.floats(0, 1)
sparsities = some.floats(0, 1, exclude_max=True)
amounts = some.floats(0, 1e6)
small = some.integers(1, 8)
shapes = ["constant", "linear", "cosine", "cubic", "cyclic"]
curves = shares | fields({"shape": some.sampled_from(shapes), "initial": shares, "final": shares})
scores = some.sampled_from(["magnitude", "gradient", "momentum", "movement", "random", "taylor"])
between = some.floats(0.01, 0.99)
pers = some.sampled_from(["weight", "input", "output"])
blocks = fields({"kind": some.just("block"), "size": some.tuples(small, small)})
structures = some.sampled_from(["unstructured", "constant_fan_in"]) | blocks
named_allocations = ["uniform", "uniform_first_dense", "erdos_renyi", "erk"]
by_sparsity = fields({"sparsity": sparsities, "allocation": some.sampled_from(named_allocations)})
densities = some.dictionaries(words, some.floats(1e-9, 1), min_size=1, max_size=3)
by_density = some.one_of(
    fields({"kind": some.just("explicit"), "densities": densities}),
    fields({"kind": some.just("erdos_renyi"), "epsilon": some.floats(1e-6, 100)}),
).map(lambda allocation: {"allocation": allocation})
either = by_sparsity | by_density
ranked = fields({"sparsity": sparsities, "allocation": some.just("global"), "score": scores})
OWN_FIELDS: dict[str, some.SearchStrategy[dict[str, Any]]] = {
    "static": fields({"score": scores, "structure": structures}) | ranked,
    "set": fields({"drop_fraction": curves, "grow_std": amounts})
    | fields({"drop_fraction": curves, "structure": structures}),
    "rigl": fields({"drop_fraction": curves, "structure": structures}),
    "snfs": fields({"drop_fraction": curves, "momentum": sparsities}),
    "gradual": fields({"score": scores, "shape": some.sampled_from(shapes[1:4])}) | ranked,
    "dynamic_network_surgery": fields({"margin": sparsities, "gamma": amounts, "power": amounts}),
    "soft_threshold": fields({"per": some.sampled_from(["layer", "output"]), "initial": amounts}),
    "hard_concrete": fields({"per": pers, "drop_rate": between, "l2": amounts}),
    "gumbel_softmax": fields({"per": pers, "hard": some.booleans(), "keep_rate": between})
    | fields({"structure": blocks}),
    "variational_dropout": fields({"threshold": shares, "local": some.booleans()}),
    "movement": fields({"mode": some.sampled_from(["top_k", "threshold"]), "structure": blocks}),
    "slimming": fields({"strength": between}),
    "nm_sparse": fields({"n": small, "m": some.integers(8, 16), "decay": amounts}),
}


@some.composite
def policies(draw: some.DrawFn, kind: str) -> dict[str, Any]:
    """A valid policy of a kind, as a user would write it in a dict."""
    policy = POLICIES[kind]
    data = {"kind": kind}
    if issubclass(policy, LearnedPolicy) and kind != "movement":
        data |= draw(either | fields({"strength": amounts}))
    elif kind not in ("nm_sparse", "slimming"):
        data |= draw(by_sparsity if kind == "gradual" else either)
    data |= draw(OWN_FIELDS.get(kind, some.just({})))
    if kind == "gradual":
        data["initial_sparsity"] = data["sparsity"] * draw(shares)
    if issubclass(policy, DynamicPolicy | LearnedPolicy):
        total = draw(some.integers(1, 10**7))
        stop = draw(some.none() | some.integers(1, total) | some.floats(1 / total, 1))
        last = st.UpdateSchedule(stop=stop).stop_step(total, policy.default_stop)
        update = {"every": draw(small), "start": draw(some.integers(0, last - 1)), "stop": stop}
        data |= {"total_steps": total, "update": update}
    return data


selectors = some.one_of(
    fields({"match": words}),
    fields({"regex": words.map(re.escape)}),
    fields({"module_type": words}),
)
actions = some.one_of(
    some.just({"dense": True}),
    fields({"sparsity": sparsities}),
    fields({"policy": some.sampled_from(sorted(POLICIES)).flatmap(policies)}),
)
rules = some.lists(some.builds(lambda a, b: a | b, selectors, actions), max_size=3)

WAYS: dict[str, Callable[[st.Recipe, Path], st.Recipe]] = {
    "dict": lambda recipe, folder: st.Recipe.from_dict(recipe.to_dict()),
    "yaml": lambda recipe, folder: st.Recipe.from_text(recipe.to_yaml()),
    "json": lambda recipe, folder: st.Recipe.from_text(recipe.to_json()),
    "yaml file": lambda recipe, folder: through_file(recipe, folder / "recipe.yaml"),
    "json file": lambda recipe, folder: through_file(recipe, folder / "recipe.json"),
}


def through_file(recipe: st.Recipe, path: Path) -> st.Recipe:
    recipe.dump(path)
    return st.Recipe.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def suits(rule: dict[str, Any], policy: dict[str, Any]) -> bool:
    """Whether the policy can be had at the sparsity that the rule asks for, if any."""
    if "sparsity" not in rule:
        return True
    try:
        st.Policy.build(policy).with_sparsity(rule["sparsity"])
    except ValueError:
        return False
    return True


# Without shrinking: it would take minutes, and the first failure is readable as it is.
@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=15, phases=[Phase.generate])
@given(data=some.data())
def test_a_round_trip_changes_nothing(kind: str, folder: Path, data: some.DataObject) -> None:
    policy = data.draw(policies(kind))
    further = [rule for rule in data.draw(rules) if suits(rule, policy)]
    recipe = st.Recipe.from_dict({"policy": policy, "rules": further})
    assert type(recipe.policy) is POLICIES[kind]
    assert len(recipe.rules) == len(further)
    for way, there_and_back in WAYS.items():
        again = there_and_back(recipe, folder)
        assert again == recipe, way
        assert again.to_json() == recipe.to_json(), way  # tells the step 1 from the fraction 1.0


@pytest.mark.parametrize("stop", [1, 1.0, 0.25, 1e-5])
def test_json_text_keeps_numbers(stop: float) -> None:
    policy = st.RigL(sparsity=0.5, total_steps=10**6, update={"stop": stop})
    again = st.Recipe.from_text(st.Recipe(policy=policy).to_json()).policy
    assert again == policy
    assert type(again.update.stop) is type(stop)


@pytest.mark.parametrize(
    "name", ["encoder.*", "größe", "层", "🙂", "a: b # c", "\t\x00", "yes", "1e3"]
)
def test_text_keeps_names(name: str) -> None:
    recipe = st.Recipe.from_dict({"policy": STATIC, "rules": [{"match": name, "dense": True}]})
    assert st.Recipe.from_text(recipe.to_yaml()) == recipe
    assert st.Recipe.from_text(recipe.to_json()) == recipe


@pytest.mark.parametrize("number", ["0.3", "3.0e-1", "3e-1"])
def test_numbers_in_yaml_text(number: str) -> None:
    text = f"{{kind: rigl, sparsity: {number}, total_steps: 9, drop_fraction: {number}}}"
    expected = st.RigL(sparsity=0.3, total_steps=9, drop_fraction=0.3)
    assert st.Recipe.from_text(text).policy == expected


def test_recipes_are_frozen() -> None:
    recipe = st.Recipe.from_dict({"policy": RIGL, "rules": [{"match": "a", "dense": True}]})
    for part in (recipe, recipe.rules[0], recipe.policy, recipe.policy.update):
        for name in type(part).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, name, getattr(part, name))
    assert isinstance(recipe.rules, tuple)


def with_rule(**rule: Any) -> dict[str, Any]:
    return {"policy": STATIC, "rules": [rule]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (RIGL | {"kind": "rigll"}, "'rigl'"),
        (RIGL | {"allocation": "unifrom"}, "allocation.*'uniform'"),
        (RIGL | {"allocation": {"kind": "erdos_reny"}}, "allocation.*'erdos_renyi'"),
        (RIGL | {"structure": "blok"}, "structure.*'block'"),
        (STATIC | {"score": "magntude"}, "score.*'magnitude'"),
        ({"policy": {"sparsity": 0.5}}, "'kind'.*rigl"),
        (RIGL | {"sparsty": 0.5}, "policy.sparsty"),
        ({"polcy": STATIC}, "polcy"),
        (with_rule(mach="a", dense=True), "rules.0.mach"),
        (RIGL | {"sparsity": 1.0}, "policy.sparsity.*less than 1"),
        (RIGL | {"sparsity": -0.1}, "policy.sparsity.*greater than or equal to 0"),
        ({"kind": "static"}, "'sparsity' is missing"),
        (with_rule(match="a", sparsity=1.0), "rules.0.sparsity.*less than 1"),
        ({"kind": "rigl", "sparsity": 0.5}, "total_steps"),
        (RIGL | {"update": {"stop": 20}}, "stop=20.*total_steps=10"),
        (RIGL | {"update": {"start": 9}}, "start.* 9 .*stop.* 8"),
        (RIGL | {"update": {"stop": 1.5}}, r"stop=1.5.*\(0, 1\]"),
        (STATIC | {"allocation": {"kind": "explicit", "densities": {"*": 0.1}}}, "'sparsity'"),
        (STATIC | {"allocation": {"kind": "erdos_renyi", "epsilon": 11}}, "'sparsity'"),
        ({"kind": "nm_sparse", "n": 2, "m": 4, "sparsity": 0.75}, "sparsity=0.75.*2:4"),
        ({"kind": "nm_sparse", "sparsity": 0.7}, "sparsity=0.7.*0.75"),
        ({"kind": "nm_sparse", "n": 5, "m": 4}, "n=5.*m=4"),
        (STATIC | {"structure": "2:4", "sparsity": 0.9}, "2:4.*sparsity.*0.9"),
        (with_rule(match="a", regex="b", dense=True), "exactly one of 'match', 'regex'"),
        (with_rule(match="a"), "exactly one of 'dense: true', 'sparsity' and 'policy'"),
        (with_rule(match="a", dense=True, sparsity=0.1), "exactly one of 'dense: true'"),
        (with_rule(regex="(", dense=True), "rules.0.regex.*not a regular expression"),
        ({}, "needs a 'policy'"),
        ({"rules": [{"match": "a", "dense": True}]}, "needs a 'policy'"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        st.Recipe.from_dict(data)


@pytest.mark.parametrize("kind", ["set", "rigl", "snfs"])
@pytest.mark.parametrize("fraction", [1.5, -0.1])
def test_a_drop_fraction_outside_0_1_is_refused(kind: str, fraction: float) -> None:
    with pytest.raises(ValueError, match="drop_fraction"):
        st.Recipe.from_dict(RIGL | {"kind": kind, "drop_fraction": fraction})


@pytest.mark.parametrize(
    "fields", [{"total_steps": 10, "update": {"stop": 20}}, {"update": {"stop": 0.5}}]
)
def test_n_m_checks_its_stop_before_training(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stop.*total_steps"):
        st.Recipe.from_dict({"kind": "nm_sparse"} | fields)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (("[", "not valid YAML"), ("- 1", "mapping"), ("polcy: 1", "polcy")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"(?s)mine.yaml.*{message}"):
            st.Recipe.load(path)
    with pytest.raises(ValueError, match=r"none\.yaml"):
        st.Recipe.load(tmp_path / "none.yaml")


SCHEMA = st.Recipe.json_schema()


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object with fields."""
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield schema
    parts = schema.values() if isinstance(schema, dict) else schema
    for part in parts:
        if isinstance(part, (dict, list)):
            yield from objects(part)


def test_every_field_says_what_it_is() -> None:
    described = {
        f"{part['title']}.{name}": field.get("description", "").strip()
        for part in objects(SCHEMA)
        for name, field in part["properties"].items()
        if "const" not in field  # `kind`: its value says it
    }
    assert {"Rule.match", "RigL.drop_fraction", "UpdateSchedule.stop", "NM.n"} <= set(described)
    assert not [name for name, text in described.items() if not text]


@pytest.mark.parametrize(
    "data",
    [
        {"policy": RIGL | {"allocation": "erk", "structure": "2:4", "update": {"stop": 5}}},
        {"policy": RIGL | {"drop_fraction": 0.3}},
        {"policy": STATIC | {"score": "magnitude"}, "rules": [{"match": "a", "dense": True}]},
        {"rules": [{"module_type": "Linear", "policy": {"kind": "nm_sparse", "n": 1}}]},
    ],
)
def test_the_json_schema_judges_like_the_loader(data: dict[str, Any]) -> None:
    st.Recipe.from_dict(data)
    if importlib.util.find_spec("jsonschema") is None:
        kinds = {p["properties"].get("kind", {}).get("const") for p in objects(SCHEMA)}
        assert kinds >= {*POLICIES, "taylor", "n_m", "erdos_renyi_kernel"}
        return
    import jsonschema

    jsonschema.validate(data, SCHEMA)
    jsonschema.validate(st.Recipe.from_dict(data).to_dict(), SCHEMA)
    for wrong in ({"policy": {"kind": "rigll"}}, data | {"polcy": 1}, {"rules": [{"mach": "a"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)
