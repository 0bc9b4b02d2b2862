"""Which jobs the workflow `gpu` has for the runners that are registered."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
jobs = runpy.run_path(str(ROOT / ".ci" / "gpu_runners.py"))["jobs"]
RUNNER = {"name": "h100-580", "labels": ["self-hosted", "h100"]}


@pytest.mark.parametrize("text", ["", "[]"])
def test_without_runners_there_are_no_jobs(text: str) -> None:
    assert jobs(text) == []


def test_a_runner_gets_the_oldest_the_pinned_and_the_newest_torch() -> None:
    found = jobs(json.dumps([RUNNER]))
    assert [job["torch"] for job in found] == ["torch==2.10.*", "torch==2.13.0", "torch"]
    assert {job["name"] for job in found} == {"h100-580"}
    assert {job["index"] for job in found} == {""}
    assert all(job["labels"] == RUNNER["labels"] for job in found)


def test_a_runner_with_an_old_driver_names_its_torches_and_where_they_are() -> None:
    old = {"name": "a100-550", "labels": ["a100"], "torch": ["torch==2.10.*"], "index": "https://x"}
    found = jobs(json.dumps([RUNNER, old]))
    assert len(found) == 4
    assert found[-1] == {
        "name": "a100-550",
        "labels": ["a100"],
        "torch": "torch==2.10.*",
        "index": "https://x",
        "results": "gpu-a100-550-torch-2.10",
    }
    assert len({job["results"] for job in found}) == 4


@pytest.mark.parametrize(
    ("runners", "told"),
    [
        ("{}", "expected a list"),
        ("h100", "Expecting value"),
        ('["h100"]', "expected name, labels"),
        ('[{"name": "x"}]', "expected name, labels"),
        ('[{"name": "x", "labels": ["y"], "torches": []}]', "torch and index at most"),
        ('[{"name": "x", "labels": "y"}]', "labels: expected strings in a list, got 'y'"),
        ('[{"name": "x", "labels": []}]', "labels: expected strings in a list"),
        ('[{"name": "x", "labels": ["y"], "torch": [2]}]', "torch: expected strings in a list"),
        ('[{"name": "x", "labels": ["y"], "index": null}]', "index: expected a string, got None"),
        ('[{"name": "a b", "labels": ["y"]}]', "names that differ"),
        ('[{"name": "x", "labels": ["y"]}, {"name": "x", "labels": ["z"]}]', "names that differ"),
    ],
)
def test_what_no_workflow_could_use_is_an_error_that_says_so(runners: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        jobs(runners)


def test_the_runners_of_the_documentation_have_jobs() -> None:
    page = (ROOT / "docs" / "developing.md").read_text()
    (text,) = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [job["name"] for job in jobs(text)] == ["h100-580"] * 3 + ["a100-550"]
