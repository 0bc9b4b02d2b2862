"""Why a backend does not run a call."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """An answer of a backend's entries in the place of a result.

    kind is "strides" where copies of the inputs that are contiguous, with their signs in memory,
    would be run; else "dtype", "device", "shape", "option", "memory", "recorder" or "backend".
    """

    argument: str
    problem: str
    kind: str

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}".strip()
