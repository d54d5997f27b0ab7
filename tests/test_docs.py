"""Every Python snippet of the README and the documentation runs, and every recipe in it is valid.

A fenced block marked `python` is a complete program of its own; one marked `yaml` is a recipe.
Blocks in other languages are only read.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import sparsetrain as st

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


class Snippet(NamedTuple):
    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(language: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[1] == language:
                found.append(Snippet(page, text[: match.start(2)].count("\n") + 1, match[2]))
    return found


# Importing inductor does what torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*script_method.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("snippet", snippets("python"), ids=str)
def test_snippet_runs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # Blank lines in front, so that a traceback points into the page.
    source = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(source, str(snippet), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_recipe_is_valid(snippet: Snippet) -> None:
    recipe = st.Recipe.from_text(snippet.code, source=str(snippet))
    assert st.Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_method_has_a_page() -> None:
    """A page a policy module; `set` is `st.SET`, and so on."""
    helpers = {"__init__", "base", "control", "engine", "group", "learned"}
    modules = {path.stem for path in (ROOT / "sparsetrain" / "policies").glob("*.py")} - helpers
    renamed = {"surgery": "dynamic_network_surgery"}
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert {renamed.get(module, module) for module in modules} <= pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and target[0] != "#"]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_readme_holds_the_set_up_commands(extra: str) -> None:
    then = {"demo": "sparsetrain demo", "test": "pytest"}[extra]
    command = f'pip install -c constraints.txt -e ".[{extra}]" && {then}'
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
