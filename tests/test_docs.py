"""The pages are about this version. Their examples are run by pytest; the rest is here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import normkit
from normkit import checkpoint, parallel, testing

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
PUBLIC = sorted({*normkit.__all__, *testing.__all__, *parallel.__all__, "find_norms", "NormEntry"})


def names_of_tests() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 10


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_api_page(name: str) -> None:
    assert any(hasattr(module, name) for module in (normkit, testing, checkpoint, parallel))
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert any(f"`{name}`" in heading for heading in headings)


def named_tests(page: str) -> set[str]:
    text = (ROOT / "docs" / page).read_text()
    return {name for name in re.findall(r"`(test_\w+)`", text) if not name.endswith("_")}


def test_tests_that_hold_the_promises_exist() -> None:
    named = named_tests("numerics.md")
    assert {f"test_promise_{n}" for n in range(1, 7)} <= {name[:14] for name in named}
    assert named - names_of_tests() == set()


def test_tests_that_keep_defects_away_exist() -> None:
    named = named_tests("migrating.md")
    assert len(named) > 20
    assert named - names_of_tests() == set()
    files = re.findall(r"\b(tests/[\w/]+\.py)", (ROOT / "docs" / "migrating.md").read_text())
    assert [file for file in files if not (ROOT / file).is_file()] == []
