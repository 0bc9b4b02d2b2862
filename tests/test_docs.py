"""The pages are about this version. Examples with prompts are run by pytest; the rest is here."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import normkit
from normkit import checkpoint, parallel, testing

ROOT = Path(__file__).parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("the docs are not part of this tree", allow_module_level=True)

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
def test_links_lead_to_files_and_headings(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), f"{target}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in found}


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 10


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_api_pages(name: str) -> None:
    assert any(hasattr(module, name) for module in (normkit, testing, checkpoint, parallel))
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("api*.md"))
    assert len(re.findall(rf"^::: normkit\.(?:[a-z]+\.)?{name}$", pages, re.MULTILINE)) == 1


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"\b(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


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


# ------------------------------------------------------------------------------------------ blocks


class Block(NamedTuple):
    """A fenced block, and the text that stands right behind it: what it prints."""

    page: str
    line: int
    language: str
    code: str
    prints: str | None


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = []
    for match in FENCED.finditer(text):
        shown = re.match(
            r"[^`#]*?\n```text\n(.*?)^```$", text[match.end() :], re.DOTALL | re.MULTILINE
        )
        line = text.count("\n", 0, match.start()) + 2
        page = str(path.relative_to(ROOT))
        found.append(Block(page, line, match[1], match[2], shown and shown[1]))
    return found


BLOCKS = [block for path in PAGES if path.name != "CONTRIBUTING.md" for block in blocks(path)]
SCRIPTS = [b for b in BLOCKS if b.language == "python" and ">>>" not in b.code]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_says_what_it_is(path: Path) -> None:
    if path.name == "CONTRIBUTING.md":
        pytest.skip("its commands are indented")
    allowed = {"python", "sh", "text", "diff", "json"}
    assert [b for b in blocks(path) if b.language not in allowed] == []
    prose = FENCED.sub("", path.read_text())
    assert re.findall(r"^\n {4,}\S.*$", prose, re.MULTILINE) == []


def test_commands_in_blocks_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(
        re.findall(r"@app\.command\(.*?\)\ndef (\w+)", (ROOT / "src/normkit/cli.py").read_text())
    )
    for block in (b for b in BLOCKS if b.language == "sh"):
        for target in re.findall(r"^make ([a-z-]+)", block.code, re.MULTILINE):
            assert f"\n{target}:" in makefile or f" {target}:" in makefile, target
        for file in re.findall(r"\b((?:benchmarks|tests|website)/[\w/]+\.py)", block.code):
            assert (ROOT / file).is_file(), file
        for command in re.findall(r"^normkit (\w+)", block.code, re.MULTILINE):
            assert command in commands, command


@pytest.fixture(scope="session")
def a_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which path/to/model is a Llama with a tokenizer, of the smallest."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("pages")
    words = {"<unk>": 0, "The": 1, "quick": 2, "brown": 3, "fox": 4}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(words), bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "path/to/model")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "path/to/model")
    return folder


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """ExLlamaV2's extension is compiled when it is imported, which takes nvcc."""
    package, module = ModuleType("exllamav2"), ModuleType("exllamav2.ext")
    package.ext, module.exllamav2_ext = module, ModuleType("exllamav2_ext")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exllamav2", package)
    monkeypatch.setitem(sys.modules, "exllamav2.ext", module)


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("block", SCRIPTS, ids=lambda b: f"{b.page}:{b.line}")
@pytest.mark.usefixtures("stand_ins")
def test_scripts_run_and_print_what_is_shown(
    block: Block, a_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in re.findall(r"^(?:from|import) (\w+)", block.code, re.MULTILINE):
        if name not in sys.modules:
            pytest.importorskip(name, reason=f"{name} is not installed")
    if "set_use_kernels" in block.code:
        from transformers.utils import is_kernels_available

        if not is_kernels_available():
            pytest.skip("transformers wants another version of kernels than is installed")
    monkeypatch.chdir(a_model)
    capsys.readouterr()
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
    exec(code, {"__name__": "a_page"})
    if block.prints is not None:
        assert capsys.readouterr().out == block.prints


def test_scripts_are_found() -> None:
    assert {b.page for b in SCRIPTS} >= {"README.md", "docs/huggingface.md", "docs/training.md"}
    assert sum(b.prints is not None for b in SCRIPTS) >= 3


# ------------------------------------------------------------------------------------------- links


def links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", ROOT / "website" / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_a_readme_that_leaves_the_repository_are_absolute(
    tmp_path: Path, monkeypatch: Any
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(sys, "argv", ["links", str(readme), "https://example.org/o/normkit/", "v1"])
    links().main()
    targets = re.findall(
        r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)
    )
    assert len(targets) > 10
    assert [t for t in targets if not t.startswith("https://example.org/o/normkit/")] == []
    assert "https://example.org/o/normkit/raw/v1/docs/images/speed.svg" in targets
    assert "https://example.org/o/normkit/blob/v1/docs/engines.md" in targets


def test_links_out_of_the_pages_are_text_where_the_repository_has_no_address() -> None:
    page = (
        "[the tests](../tests/gpu), [here](api.md#tensors), [there](https://example.org), `a[i](b)`"
    )
    made = links().absolute(page, "docs", "", "HEAD", outside="docs")
    assert made.startswith("the tests, [here](api.md#tensors), [there](https://example.org)")
    made = links().absolute(page, "docs", "https://example.org/o/n", "HEAD", outside="docs")
    assert "[the tests](https://example.org/o/n/blob/HEAD/tests/gpu)" in made
