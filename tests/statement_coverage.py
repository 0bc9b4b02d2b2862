"""Which statements of some files run: for scripts that must not wait for a GPU to be run once."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class Lines:
    """Which lines of some files run, in every thread."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.ran: dict[str, set[int]] = {str(path): set() for path in files}

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)
        threading.settrace(self.before)  # type: ignore[arg-type]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        ran = self.ran.get(frame.f_code.co_filename)
        if ran is None:
            return None
        ran.add(frame.f_lineno)
        return self._trace


def statements(path: Path) -> Iterator[range]:
    """The lines of each statement in a function; of one that holds others, those before them."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for function in (node for node in ast.walk(tree) if isinstance(node, functions)):
        for node in (n for statement in function.body for n in ast.walk(statement)):
            if not isinstance(node, ast.stmt) or isinstance(node, (ast.Try, *functions)):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            last = node.end_lineno or node.lineno
            yield range(node.lineno, min((i.lineno for i in inner), default=last + 1))


def missed(lines: Lines) -> list[str]:
    found = []
    for path in map(Path, lines.ran):
        text = path.read_text().splitlines()
        for numbers in statements(path):
            if not lines.ran[str(path)].intersection(numbers):
                found.append(f"{path.name}:{numbers[0]}: {text[numbers[0] - 1].strip()}")
    return sorted(set(found))
