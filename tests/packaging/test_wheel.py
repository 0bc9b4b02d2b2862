"""What an installed normkit is, wheel or editable. Also run on its own, away from the sources."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import normkit
import normkit._C

PACKAGE = Path(normkit.__file__).parent
EXTENSION = Path(str(normkit._C.__file__))

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def run(code: str) -> str:
    """What a fresh interpreter prints; fails with it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readelf(option: str) -> str:
    program = shutil.which("readelf")
    assert program, "readelf is missing; it comes with the compiler (binutils)"
    return subprocess.check_output([program, option, "--wide", str(EXTENSION)], text=True)


@pytest.mark.parametrize("name", ["py.typed", "_C.pyi"])
def test_types_are_shipped(name: str) -> None:
    assert (PACKAGE / name).is_file()


def test_stub_names_what_the_extension_has() -> None:
    stub = (PACKAGE / "_C.pyi").read_text()
    stubbed = set(re.findall(r"^(?:def )?([a-z]\w*)[(:]", stub, re.MULTILINE))
    assert stubbed == {name for name in dir(normkit._C) if not name.startswith("_")}


def test_version_is_the_one_of_the_package() -> None:
    assert normkit.__version__ == metadata.version("normkit")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    if pyproject.is_file():  # not where this file was copied to
        assert f'\nversion = "{normkit.__version__}"\n' in pyproject.read_text()


def test_every_public_name_exists() -> None:
    assert [name for name in normkit.__all__ if not hasattr(normkit, name)] == []


def test_runtime_dependencies_are_three() -> None:
    required = metadata.requires("normkit") or []
    names = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert names == {"nanobind-backend", "safetensors", "torch"}


def test_extension_is_stable_abi() -> None:
    assert re.search(r"\.abi3t?\.", EXTENSION.name) or sys.platform == "win32"


@on_linux
def test_extension_needs_only_the_c_and_cpp_libraries() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf("--dynamic")))
    system = re.compile(r"^(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so")
    assert needed
    assert {name for name in needed if not system.match(name)} == set()


@on_linux
def test_extension_leaves_no_symbols_to_torch_cuda_or_openmp() -> None:
    undefined = re.findall(r"\bUND (\S+)", readelf("--dyn-syms"))
    foreign = re.compile(r"torch|c10|2at\d|aoti|^cu[a-z]*[A-Z]|GOMP|omp_|__kmpc")
    assert len(undefined) > 10
    assert [name for name in undefined if foreign.search(name)] == []


@on_linux
def test_extension_keeps_its_symbols_and_cudas_to_itself() -> None:
    lines = readelf("--dyn-syms").splitlines()
    defined = [line.split() for line in lines if re.search(r"\b(GLOBAL|WEAK)\b", line)]
    exported = {f[7] for f in defined if f[6] != "UND" and f[5] == "DEFAULT" and len(f) > 7}
    ours = {name for name in exported if re.search(r"normkit|cuda", name)}
    assert "PyInit__C" in exported
    assert ours == set()


def test_import_loads_nothing_that_is_not_needed() -> None:
    code = """
        import sys, torch
        before = set(sys.modules)
        import normkit
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        heavy = {"matplotlib", "rich", "typer", "torch._dynamo", "torch._inductor", "transformers"}
        print(*(heavy & set(sys.modules)))
    """
    loaded, heavy = run(code).split("\n")[:2]
    assert heavy == ""
    assert "normkit" in loaded.split()
    assert {"matplotlib", "rich", "typer", "hypothesis", "pytest"} & set(loaded.split()) == set()


def test_command_line_imports_nothing_that_windows_lacks() -> None:
    pytest.importorskip("typer", reason="the extra cli is not installed")
    run("""
        import sys
        sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"])
        import normkit.cli
    """)


def test_runs_on_the_torch_path_without_the_extension() -> None:
    code = """
        import sys
        sys.modules["normkit._C"] = None  # as if it could not be imported
        import normkit, torch
        x = torch.tensor([[3.0, 4.0]])
        y = normkit.rms_norm(x, eps=0.0)
        torch.testing.assert_close(y, x / 12.5**0.5)
        print(normkit.explain("rms_norm", x).backend)
        for backend in normkit.backends().values():
            print(backend.name, backend.usable, backend.reason)
        try:
            with normkit.use_backend("cpu"):
                normkit.rms_norm(x)
        except ValueError as error:
            print(error)
    """
    served_by, cpu, cuda, triton, reference, error = run(code).splitlines()
    assert served_by == "reference"
    assert cpu.startswith("cpu False the extension could not be loaded")
    assert cuda.startswith("cuda False the extension could not be loaded")
    assert triton.startswith("triton False")
    assert reference.startswith("reference True")
    assert "the extension could not be loaded" in error


def test_command_line_starts_or_names_what_it_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", "-m", "normkit", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        assert "pip install 'normkit[cli]'" in done.stderr
    else:
        assert "check" in done.stdout
