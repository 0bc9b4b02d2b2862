"""What the workflows name exists, and is named the same everywhere; linters see the rest."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = {path.stem: path.read_text() for path in WORKFLOWS}
SCRIPTS = [ROOT / ".ci" / name for name in ("run", "test-wheel", "test-gpu")]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

of_each_workflow = pytest.mark.parametrize("name", TEXTS)


def jobs(text: str) -> dict[str, str]:
    """By their names; a job begins with the only lines that are indented by two spaces."""
    parts = re.split(r"^  ([\w-]+):\n", text.partition("\njobs:\n")[2], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_workflows_are_found() -> None:
    assert set(TEXTS) == {"ci", "gpu", "release", "wheels"}
    assert {"wheel", "sdist", "check", "test"} <= jobs(TEXTS["wheels"]).keys()


def test_every_action_is_pinned_to_one_commit_and_says_its_version() -> None:
    used = re.findall(r"\buses: (.*)$", "\n".join(TEXTS.values()), re.MULTILINE)
    pinned = {u for u in used if not u.startswith("./")}
    assert len(pinned) >= 5
    form = re.compile(r"([\w-]+/[\w-]+)@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [u for u in pinned if not form.fullmatch(u)] == []
    assert len({u.partition("@")[0] for u in pinned}) == len(pinned)


@of_each_workflow
def test_nothing_is_permitted_and_nothing_runs_for_hours_unless_a_job_says_so(name: str) -> None:
    assert "\npermissions: {}\n" in TEXTS[name]
    assert "\nconcurrency:\n" in TEXTS[name]
    for job, text in jobs(TEXTS[name]).items():
        called = re.search(r"^    uses: ", text, re.MULTILINE)
        assert called or re.search(r"^    timeout-minutes: \d+$", text, re.MULTILINE), job
        assert re.search(r"^    permissions:$", text, re.MULTILINE), job


def test_every_variable_that_they_read_is_documented_and_no_other() -> None:
    read = set(re.findall(r"\bvars\.(\w+)", "\n".join(TEXTS.values())))
    page = (ROOT / "docs/developing.md").read_text().partition("\n## Workflows\n")[2]
    table = page.partition("| variable |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == read
    assert not re.search(r"\bsecrets\.", "\n".join(TEXTS.values()))  # nor do they need any


@pytest.mark.parametrize("name", ["wheels", "gpu"])
def test_what_another_workflow_calls_can_be_called(name: str) -> None:
    assert f"uses: ./.github/workflows/{name}.yml" in TEXTS["release"]
    assert "\n  workflow_call:\n" in TEXTS[name]


def test_every_script_and_target_that_they_run_exists() -> None:
    steps = "\n".join(TEXTS.values())
    named = set(re.findall(r"(?<![\w/])(\.ci/[\w-]+(?:\.\w+)*)", steps))
    assert {".ci/run", ".ci/test-wheel", ".ci/test-gpu", ".ci/release.py"} <= named
    assert [path for path in named if not (ROOT / path).is_file()] == []
    assert [path.name for path in SCRIPTS if not os.access(path, os.X_OK)] == []
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    targets = {target for line in targets for target in line.split()}
    called = set(re.findall(r"\brun: make ([\w-]+)", steps))
    called |= set(re.findall(r"[\w-]+", re.search(r"\btarget: \[(.*)\]", steps)[1]))
    assert {"lint", "test", "emu", "codegen", "check-dist"} <= called
    assert called - targets == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_test_that_a_script_names_exists(path: Path) -> None:
    named = re.findall(r"\btests/[\w/.]+", path.read_text())
    assert named
    assert [name for name in named if not (ROOT / name.rstrip("/")).exists()] == []


def test_every_python_that_is_promised_is_tested_and_the_ends_with_every_wheel() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT
    listed = re.search(r"^        python: \[(.*)\]$", TEXTS["ci"], re.MULTILINE)
    assert re.findall(r"3\.\d+", listed[1]) == promised
    of_wheels = re.findall(r'python: "(3\.\d+)", torch', jobs(TEXTS["wheels"])["test"])
    assert of_wheels == [promised[0], promised[-1]]


@pytest.mark.parametrize("name", ["ci", "wheels"])
def test_the_oldest_torch_that_is_promised_and_the_newest_are_tested(name: str) -> None:
    oldest = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    tested = set(re.findall(r'torch: "(.*?)"', jobs(TEXTS[name])["test"]))
    assert {f"torch=={oldest}.*", "torch"} <= tested


def test_the_torch_that_is_pinned_is_tested_with_every_python() -> None:
    pinned = (ROOT / "constraints.txt").read_text().strip()
    listed = re.search(r'^        torch: \["(.*)\.\*"\]$', TEXTS["ci"], re.MULTILINE)
    assert pinned.startswith(f"{listed[1]}.")


def test_commits_are_formatted_by_the_versions_that_lint_uses() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    versions = set(re.findall(r"\b([\w-]+==[\d.]+)", hooks))
    assert {version.partition("==")[0] for version in versions} == {"ruff", "clang-format"}
    assert [version for version in versions if f'"{version}"' not in PYPROJECT] == []
