"""Imports and includes point downwards: docs/developing.md has the picture."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import normkit
from starting import loaded

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "normkit"

# A module imports from the layers before its own, never from its own; a new file needs a place.
LAYERS = [
    {"_C", "_serving", "_spec", "_version", "reference"},
    {
        "_scripting",
        "_serving.refusal",
        "reference.rotation",
        "_serving.triton_kernels",
        "checkpoint._names",
    },
    {"recognition._identity", "recognition._result"},
    {"recognition._screen"},
    {"_serving.checks", "_serving.formula", "_serving.nested", "_serving.triton", "testing"},
    {"_serving.backends", "checkpoint._families"},
    {"_serving.dispatch", "_serving.native", "checkpoint._files", "checkpoint._meaning"},
    {
        "_serving.autograd",
        "_serving.definition",
        "_serving.modulation",
        "_serving.post_norm",
        "checkpoint",
    },
    {"_serving.gating", "_serving.rotation"},
    {"_serving.operators"},
    {"_serving.inline"},
    {"_serving.serve"},
    {"_serving.several"},
    {"functional", "fusions", "lengths", "modules", "post_norm", "rotary", "several"},
    {"_bench", "fused_modules", "loading", "recognition._probe"},
    {"recognition._forms", "recognition._gating", "recognition._layout"},
    {"recognition"},
    {"_originals", "conversion._plan", "conversion._rewriting"},
    {"conversion._classes"},
    {"conversion._report"},
    {"conversion._layers"},
    {"conversion"},
    {"__init__"},
    {"_check"},
    {"parallel._gather", "parallel._reference", "parallel.context"},
    {"parallel._split_rows"},
    {"parallel._dtensor", "parallel.devices", "parallel.shards"},
    {"parallel.styles"},
    {"parallel"},
    {"compat", "compat._errors", "compat._dropout_add"},
    {"compat.dropout_layer_norm", "compat.exllamav2_module", "compat.exllamav2_tp"},
    {"compat.exllamav2", "compat.exllamav2_ext", "compat.lorax"},
    {"integrations._sglang_layers", "integrations._torch", "integrations._vllm_layers"},
    {"integrations", "integrations.hf_kernels", "integrations.megatron", "integrations.torchtitan"},
    {"integrations.comfy_kitchen"},
    {"integrations.sglang", "integrations.vllm"},
    {"cli"},
    {"__main__"},
]
# Of these, a folder as one.
MOST_LEVELS = 8
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What others than the standard library and torch may be imported, and by whom.
THIRD_PARTY = {
    "safetensors": {"checkpoint._files", "cli", "compat.exllamav2_module"},
    # For the type checker only.
    "typing_extensions": {
        *("compat.lorax", "integrations._torch", "modules", "parallel.devices", "parallel.shards"),
        "several",
    },
    "triton": {"_serving.triton_kernels"},  # comes with torch where it is used
    "comfy_kitchen": {"integrations.comfy_kitchen"},
    "kernels": {"integrations.hf_kernels"},
    "megatron": {"integrations.megatron"},
    "sglang": {"integrations._sglang_layers", "integrations.sglang"},
    "torchtitan": {"integrations.torchtitan"},
    "vllm": {"integrations._vllm_layers", "integrations.vllm"},
    "rich": {"_bench", "cli"},
    "typer": {"cli"},
    "matplotlib": {"_bench"},
}


def module_of(path: Path) -> str:
    """The name after `normkit.`; a folder's __init__ has the folder's, but for the outermost."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = list(FILES)


def imported(node: ast.AST, *, at_load: bool) -> Iterator[str]:
    """Dotted names; with at_load only of what runs when the module is imported."""
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide the direction"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    elif at_load and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children = iter(node.orelse)
    for child in children:
        yield from imported(child, at_load=at_load)


def own_modules(name: str, *, at_load: bool) -> set[str]:
    found = set()
    for dotted in imported(ast.parse(FILES[name].read_text()), at_load=at_load):
        first, *rest = dotted.split(".")
        if first == "normkit":
            names = [".".join(rest[:length]) for length in range(len(rest), 0, -1)]
            found.add(next((n for n in names if n in LEVEL), "__init__"))
    return found


def test_every_module_has_a_layer() -> None:
    assert {*MODULES, "_C"} == set(LEVEL)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    needed = own_modules(name, at_load=False) - {name}
    assert not {m for m in needed if LEVEL[m] >= LEVEL[name]}


def test_folders_are_layers_too() -> None:
    """No folder needs itself by way of another, and a reader passes few of them on the way down."""
    needed: dict[str, set[str]] = {}
    for name in MODULES:
        folder = name.split(".")[0]
        others = {m.split(".")[0] for m in own_modules(name, at_load=False)} - {folder}
        needed.setdefault(folder, set()).update(others)
    levels = 0
    done = {"_C"}
    while ready := {folder for folder in needed if folder not in done and needed[folder] <= done}:
        done |= ready
        levels += 1
    assert done - {"_C"} == set(needed), "these go round in a circle: " + str(set(needed) - done)
    assert levels <= MOST_LEVELS


def test_what_is_plugged_in_by_name_is_there() -> None:
    """An import that this file cannot see."""
    from normkit._serving.serve import PLUG_INS

    for name in PLUG_INS.values():
        plug_in = importlib.import_module(name)
        assert callable(plug_in.run)
        assert callable(plug_in.part_of_rank)
        assert name.removeprefix("normkit.") in MODULES


def test_no_module_needs_itself_to_load() -> None:
    needed = {name: own_modules(name, at_load=True) - {"_C"} for name in MODULES}
    while ready := {name for name, needs in needed.items() if not needs}:
        needed = {name: needs - ready for name, needs in needed.items() if name not in ready}
    assert needed == {}


@pytest.mark.parametrize("name", MODULES)
def test_third_party_imports_stay_where_they_are_needed(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    tops = {dotted.split(".")[0] for dotted in imported(tree, at_load=False)}
    foreign = tops - sys.stdlib_module_names - {"normkit", "torch"}
    assert foreign == {package for package in foreign if name in THIRD_PARTY.get(package, ())}


# ------------------------------------------------------------------------------------------- C++

KERNEL_FILES = sorted(
    path for folder in ("cpp/cpu", "cuda") for path in (ROOT / folder).rglob("*") if path.is_file()
)
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
FORBIDDEN = re.compile(r"^(Python|structmember|nanobind/|pybind11/|torch/|ATen/|c10/|dlpack)")


def includes(path: Path) -> Iterator[tuple[str, Path | None]]:
    """Each name, and the file where it is one of ours."""
    for bracket, name in INCLUDE.findall(path.read_text()):
        own = (path.parent / name).resolve()
        yield name, own if bracket == '"' and own.is_file() else None


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_of_python_and_torch(path: Path) -> None:
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for name, own in includes(file):
            assert not FORBIDDEN.match(name), f"{file.relative_to(ROOT)} includes {name}"
            if own is not None and own not in seen:
                waiting.append(own)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_include_only_each_other_and_plain_structs(path: Path) -> None:
    plain = {ROOT / "cpp" / "norm_args.h", ROOT / "cpp" / "plan.h"}
    for _, own in includes(path):
        assert own is None or own.parent == path.parent or own in plain


def test_only_the_extension_module_includes_nanobind() -> None:
    users = {
        path.name
        for path in (ROOT / "cpp").rglob("*")
        if path.is_file() and any(name.startswith("nanobind/") for name, _ in includes(path))
    }
    assert users == {"binding.h"}


def test_only_one_file_of_the_kernels_knows_the_cuda_runtime() -> None:
    """The emulation compiles the rest; a device is asked of its properties in one more."""
    knows = re.compile(r"cuda_runtime|__shared__|<<<|\basm\b|cooperative_groups|cudaLaunch")
    allowed = {"portable.cuh", "device.cu"}
    for path in (ROOT / "cuda").iterdir():
        assert path.name in allowed or not knows.search(path.read_text()), path.name


def test_importing_normkit_loads_nothing_that_few_calls_need() -> None:
    late = (
        "normkit.checkpoint",
        "normkit.conversion",
        "normkit.integrations",
        "normkit.loading",
        "normkit.parallel",
        "safetensors",
    )
    assert {m for m in loaded()[0] if m.startswith(late)} == set()
    assert normkit.load_norm is importlib.import_module("normkit.loading").load_norm
