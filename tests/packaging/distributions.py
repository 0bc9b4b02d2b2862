"""What sdist and wheels hold, and no more: of those in NORMKIT_DIST, for `make check-dist`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = Path(os.environ.get("NORMKIT_DIST", ROOT / "dist"))
WHEELS = sorted(DIST.glob("*.whl"))
EXTENSION = r"normkit/_C(\.abi3t?\.so|\.pyd)"
MEGABYTES = 8  # with the kernels of every GPU; without any, less than one

of_each_wheel = pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.name)


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """What git has; a file that nobody has added is in no distribution."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return set(listed.split("\0")) - {""}


def test_there_are_wheels() -> None:
    assert WHEELS, f"no wheels in {DIST}"


@of_each_wheel
def test_a_wheel_holds_the_package_and_one_extension(wheel: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info/"
    expected = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    expected |= {info + n for n in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    expected.add(f"{info}licenses/LICENSE")
    inside = {n for n in names if not n.endswith("/") and not n.startswith(f"{info}sboms/")}
    extensions = {name for name in inside if re.fullmatch(EXTENSION, name)}
    assert len(extensions) == 1
    assert inside - extensions == expected
    assert len(set(names)) == len(names)


@of_each_wheel
def test_a_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MEGABYTES * 1_000_000


@of_each_wheel
def test_a_wheel_is_for_every_python_from_3_10_on(wheel: Path) -> None:
    assert re.fullmatch(r"normkit-[\w.]+-(cp310-abi3|cp315-abi3\.abi3t)-[\w.]+\.whl", wheel.name)


@of_each_wheel
def test_a_wheel_says_what_it_needs_and_who_may_have_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head, _, description = archive.read(name).decode().partition("\n\n")
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", head, re.MULTILINE)
    assert sorted(required) == ["nanobind-backend", "safetensors", "torch"]
    assert "\nRequires-Python: >=3.10\n" in head
    assert "\nLicense-Expression: MIT\n" in head
    assert description.startswith("# normkit\n")
    for minor in range(10, 15):
        assert f"\nClassifier: Programming Language :: Python :: 3.{minor}\n" in head


@pytest.mark.parametrize("wheel", [w for w in WHEELS if "linux" in w.name], ids=lambda w: w.name)
def test_a_wheel_for_linux_needs_no_more_than_a_manylinux_has(wheel: Path) -> None:
    """One that was built here has the glibc of this machine; in cibuildwheel's image, an older."""
    command = [sys.executable, "-m", "auditwheel", "show", wheel]
    shown = " ".join(subprocess.check_output(command, text=True).split())
    assert re.search(r'platform tag: "manylinux_2_\d+_', shown), shown


def test_the_sdist_holds_all_that_git_has(tracked: set[str]) -> None:
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        folders = {m.name.split("/")[0] for m in archive.getmembers()}
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert folders == {sdist.name.removesuffix(".tar.gz")}
    assert names == tracked | {"PKG-INFO"}
