"""Prove that the version, the changelog and, for a release, the tag agree; print what has changed.

python .ci/release.py            # the version of pyproject.toml leads CHANGELOG.md
python .ci/release.py v0.1.0     # and is what this tag names, with the day of the release
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of releases and their candidates; the parts of a version that PyPI would rewrite are refused.
VERSION = r"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*)){2}(?:(?:a|b|rc)(?:0|[1-9]\d*))?"
NOT_YET = "not released yet"


def version(pyproject: str) -> str:
    """The only place that says it; Python 3.10 cannot read TOML."""
    project = re.search(r"^\[project\]$(.*?)(?=^\[)", pyproject, re.MULTILINE | re.DOTALL)
    found = re.search(r'^version = "(.*)"$', project[1] if project else "", re.MULTILINE)
    if found is None or not re.fullmatch(VERSION, found[1]):
        got = repr(found[1]) if found else "none"
        raise ValueError(f"pyproject.toml: expected a version such as 1.2.3 or 1.2.3rc1, got {got}")
    return found[1]


def newest(changelog: str) -> tuple[str, str, str]:
    """The version at the top, what stands in brackets behind it, and the text."""
    first = re.split(r"^## ", changelog, maxsplit=2, flags=re.MULTILINE)
    heading, _, text = first[1].partition("\n") if len(first) > 1 else ("", "", "")
    found = re.fullmatch(r"(\S+) \((.+)\)", heading)
    if found is None:
        raise ValueError(f"CHANGELOG.md: expected '## VERSION (DAY)' at first, got {heading!r}")
    if not text.strip():
        raise ValueError(f"CHANGELOG.md: expected what {found[1]} changes, got nothing")
    return found[1], found[2], text.strip()


def notes(pyproject: str, changelog: str, tag: str | None) -> str:
    """What this version changes; raises ValueError where two of them do not agree."""
    named = version(pyproject)
    told, day, text = newest(changelog)
    if told != named:
        raise ValueError(
            f"CHANGELOG.md: expected {named} at first, as in pyproject.toml, got {told}"
        )
    if tag is not None and tag != f"v{named}":
        raise ValueError(f"tag: expected v{named}, as in pyproject.toml, got {tag}")
    if tag is not None or day != NOT_YET:
        try:
            date.fromisoformat(day)
        except ValueError:
            wanted = f"the day of the release of {named}, such as 2026-01-31"
            raise ValueError(f"CHANGELOG.md: expected {wanted}, got {day!r}") from None
    return text


def main() -> None:
    """Of this tree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tag", nargs="?")
    pyproject, changelog = ((ROOT / n).read_text() for n in ("pyproject.toml", "CHANGELOG.md"))
    try:
        print(notes(pyproject, changelog, parser.parse_args().tag))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
