"""What the build makes of NORMKIT_CUDA and CUDAARCHS: CMake's choices, with nothing compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (*os.get_exec_path(), "/usr/local/bin", "/usr/local/cuda/bin")
OF_NVCC = ";".join(place for place in PLACES if Path(place, "nvcc").exists())
NAMES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAARCHS")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake where nothing is said about CUDA but what is given here."""
    here = os.environ.get("PATH", "")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{here}")
    assert cmake, "cmake is missing; the build needs it too"
    outside = {k: v for k, v in os.environ.items() if k not in NAMES}
    return subprocess.run(
        [cmake, *arguments],
        env=outside | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def configure(
    folder: Path, word: str, hidden: str = OF_NVCC, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Configure a project of no language that asks for CUDA as normkit does."""
    (folder / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.25)
        project(options NONE)
        include({ROOT}/cmake/Cuda.cmake)
        message(STATUS "with CUDA: ${{NORMKIT_HAS_CUDA}}")
    """)
    make = f"-DCMAKE_MAKE_PROGRAM={shutil.which('make')}"
    where = ("-S", folder, "-B", folder / "build", "-G", "Unix Makefiles", make)
    hiding = f"-DCMAKE_IGNORE_PATH={hidden}"
    return run(*where, hiding, f"-DNORMKIT_CUDA={word}", *options, **environment)


def joined(text: str) -> str:
    """CMake breaks lines wherever it likes."""
    return "".join(text.split())


def fake(program: Path, text: str) -> Path:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("word", ["cpu", "PYPI", "auto", "1", "TRUE", ""])
def test_an_unknown_word_is_an_error_that_lists_the_words(tmp_path: Path, word: str) -> None:
    done = configure(tmp_path, word)
    assert done.returncode != 0
    expected = f'NORMKIT_CUDA: expected AUTO, ON, OFF or pypi, got "{word}"'
    assert joined(expected) in joined(done.stdout)


def test_hip_is_an_error_as_long_as_nothing_launches_its_kernels(tmp_path: Path) -> None:
    done = configure(tmp_path, "OFF", OF_NVCC, "-DNORMKIT_HIP=ON")
    assert done.returncode != 0
    assert joined("NORMKIT_HIP: the kernels compile for gfx90a and newer") in joined(done.stdout)


@pytest.mark.parametrize("word", ["AUTO", "OFF", "ON", "pypi"])
def test_windows_is_built_without_cuda_and_who_asks_for_it_is_told(
    tmp_path: Path, word: str
) -> None:
    done = configure(tmp_path, word, "", "-DWIN32=ON")
    if word in ("AUTO", "OFF"):
        assert "with CUDA: OFF" in done.stdout
    else:
        assert done.returncode != 0
        assert joined(f"NORMKIT_CUDA={word}: the CUDA kernels are not built on Windows") in joined(
            done.stdout
        )


def test_off_does_not_look_for_a_compiler(tmp_path: Path) -> None:
    done = configure(tmp_path, "OFF", CUDACXX=str(fake(tmp_path / "nvcc", "exit 1")))
    assert done.returncode == 0
    assert "with CUDA: OFF" in done.stdout
    assert "CUDA compiler" not in done.stdout


def test_on_without_nvcc_points_to_pypi(tmp_path: Path) -> None:
    done = configure(tmp_path, "ON")
    assert done.returncode != 0
    assert joined("got none. NORMKIT_CUDA=pypi brings one") in joined(done.stdout)


def test_auto_without_nvcc_builds_for_the_cpu_and_points_to_pypi(tmp_path: Path) -> None:
    done = configure(tmp_path, "AUTO")
    assert done.returncode == 0
    assert "with CUDA: OFF" in done.stdout
    assert joined("NORMKIT_CUDA=pypi brings one") in joined(done.stdout)


@pytest.mark.parametrize("word", ["AUTO", "ON"])
@pytest.mark.parametrize("place", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "/usr/local/bin"])
def test_auto_and_on_find_nvcc_in_the_same_places(tmp_path: Path, word: str, place: str) -> None:
    nvcc = fake(tmp_path / "usr/local/bin/nvcc", "exit 1")
    if place == "/usr/local/bin":  # which no PATH names, and is moved
        root = f"-DCMAKE_FIND_ROOT_PATH={tmp_path}"
        done = configure(tmp_path, word, "", root, PATH=os.defpath)
    else:
        before = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
        said = {"CUDACXX": str(nvcc), "PATH": before}.get(place, str(nvcc.parents[1]))
        done = configure(tmp_path, word, **{place: said})
    assert f"-- nvcc: {nvcc}\n" in done.stdout
    # It does not work, which only AUTO may pass over.
    assert (done.returncode == 0) == (word == "AUTO")


def architectures(folder: Path, *options: str, **environment: str) -> tuple[str, str]:
    """The architectures of a build, and what is said about them; no program but fakes in PATH."""
    script = folder / "architectures.cmake"
    script.write_text(f"""
        include({ROOT}/cmake/CudaArchitectures.cmake)
        message(STATUS "chosen: ${{CMAKE_CUDA_ARCHITECTURES}}")
    """)
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    done = run(*options, "-P", script, **{"PATH": str(bin_folder)} | environment)
    assert done.returncode == 0, done.stdout
    said, chosen = re.fullmatch(r"(.*)-- chosen: (.*)\n", done.stdout, re.DOTALL).groups()
    return chosen, said


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 9.0", "90"),
        ("echo 8.6; echo 12.0; echo 8.6", "86;120"),
        ("echo 7.0; echo 7.5", "75"),  # what has no kernels cannot be built for
        ("echo 7.0", "80"),
        ("echo '[N/A]'", "80"),
        ("echo 'Failed to initialize NVML: library version 580.95'; exit 18", "80"),
        (None, "80"),
    ],
)
def test_a_build_is_for_the_gpus_that_answer_or_else_for_one_and_says_how_to_have_all(
    tmp_path: Path, answer: str | None, expected: str
) -> None:
    if answer is not None:
        fake(tmp_path / "bin/nvidia-smi", answer)
    chosen, said = architectures(tmp_path)
    assert chosen == expected
    assert f"CUDA architectures: {expected} (" in said
    assert ("no GPU answers" in said) == (expected == "80")
    assert "CUDAARCHS=all-major" in said


def test_who_names_architectures_gets_those(tmp_path: Path) -> None:
    fake(tmp_path / "bin/nvidia-smi", "echo 9.0")
    assert architectures(tmp_path, "-DCMAKE_CUDA_ARCHITECTURES=100;75") == ("100;75", "")
    # CMake reads the variable itself, once the language is enabled.
    assert architectures(tmp_path, CUDAARCHS="75") == ("", "")


def test_wheels_name_the_architectures_that_the_documentation_promises() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'^environment = .*CUDAARCHS = "(.*?)"', pyproject, re.MULTILINE)
    assert len(named) == 1
    real = [a.removesuffix("-real") for a in named[0].split(";") if a.endswith("-real")]
    virtual = [a for a in named[0].split(";") if a.endswith("-virtual")]
    page = (ROOT / "docs/backends.md").read_text()
    sentence = re.search(r"compute capabilities ([\d.,\s]+ and [\d.]+), and PTX", page)
    assert sentence
    assert [f"{a[:-1]}.{a[-1]}" for a in real] == re.findall(r"\d+\.\d", sentence[1])
    assert virtual == ["100-virtual"]  # of which the driver makes code for all that comes later
