"""What the workflow `release` asks before it publishes anything."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "release.py"
release = runpy.run_path(str(SCRIPT))
PYPROJECT = (
    '[build-system]\nversion = "9.9.9"\n\n[project]\nname = "x"\nversion = "1.2.0"\n\n[tool.y]\n'
)
CHANGELOG = """# Changelog

Words.

## 1.2.0 (2026-01-31)

- This.

## 1.1.0 (2025-01-31)

- That.
"""


def test_a_tag_that_agrees_gets_the_words_of_its_version_alone() -> None:
    assert release["notes"](PYPROJECT, CHANGELOG, "v1.2.0") == "- This."
    assert release["notes"](PYPROJECT, CHANGELOG, None) == "- This."


def test_before_a_release_no_day_is_needed() -> None:
    changelog = CHANGELOG.replace("2026-01-31", "not released yet")
    assert release["notes"](PYPROJECT, changelog, None) == "- This."
    with pytest.raises(ValueError, match="such as 2026-01-31, got 'not released yet'"):
        release["notes"](PYPROJECT, changelog, "v1.2.0")


@pytest.mark.parametrize("tag", ["1.2.0", "v1.2", "v1.2.0rc1", "v1.2.0.post1", "v1.1.0", ""])
def test_another_tag_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=f"tag: expected v1.2.0, .* got {tag}"):
        release["notes"](PYPROJECT, CHANGELOG, tag)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("## 1.2.0 (", "## 1.3.0 (", "expected 1.2.0 at first, .* got 1.3.0"),
        ("(2026-01-31)", "(2026-02-30)", "such as 2026-01-31, got '2026-02-30'"),
        ("(2026-01-31)", "(soon)", "got 'soon'"),
        ("(2026-01-31)", "", "at first, got '1.2.0 '"),
        ("- This.", "", "expected what 1.2.0 changes, got nothing"),
        (CHANGELOG, "# Changelog\n", "at first, got ''"),
    ],
)
def test_a_changelog_that_says_something_else_is_refused(old: str, new: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        release["notes"](PYPROJECT, CHANGELOG.replace(old, new, 1), "v1.2.0")


@pytest.mark.parametrize("version", ["1.2", "01.2.0", "1.2.0-rc1", "v1.2.0", ""])
def test_a_version_that_would_be_published_under_another_name_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match=f"such as 1.2.3 or 1.2.3rc1, got '{version}'"):
        release["notes"](PYPROJECT.replace("1.2.0", version), CHANGELOG, None)


def test_version_and_changelog_of_this_tree_agree() -> None:
    def run(*tag: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *tag]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    agreed, refused = run(), run("v0.0.0")
    assert agreed.returncode == 0, agreed.stderr
    assert agreed.stdout.strip()
    assert refused.returncode == 1
    assert refused.stderr.startswith("tag: expected v")
    assert refused.stdout == ""
