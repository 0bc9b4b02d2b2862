"""How the norms of checkpoints are called, and what they look like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection

BIAS_OF = {".weight": ".bias", ".gamma": ".beta"}  # the second as TensorFlow's BERT has them
_NORM_WORDS = frozenset(
    ("norm", "norms", "layernorm", "layernorms", "rmsnorm", "ln", "layrnorm", "enorm", "hnorm")
)
_OTHER_WORDS = frozenset(("batch", "group", "instance", "spectral", "weight", "linear", "proj"))
_HEAD_WORDS = frozenset(("q", "k", "query", "key"))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def split(name: str) -> tuple[str, str]:
    """The norm's name and the ending of its weight's; "" as ending where it is not a weight's."""
    ending = next((e for e in BIAS_OF if name.endswith(e)), "")
    return name.removesuffix(ending), ending


def _words(prefix: str) -> set[str]:
    """The words in the last part of a name that is not just a number."""
    named = next((p for p in reversed(prefix.split(".")) if not p.isdecimal()), "")
    return {word.lower() for word in _WORD.findall(named)}


def is_norm(prefix: str) -> bool:
    words = _words(prefix)
    return bool(words & _NORM_WORDS) and not words & _OTHER_WORDS


def is_head_norm(prefix: str, shape: tuple[int, ...]) -> bool:
    """Whether a norm of this name and shape of weight is one with a weight per head."""
    return len(shape) == 2 and is_norm(prefix) and bool(_words(prefix) & _HEAD_WORDS)


def is_norm_weight(name: str, names: Collection[str]) -> bool:
    prefix, ending = split(name)
    return bool(ending) and is_norm(prefix) and f"{prefix}.running_mean" not in names


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers as numbers: of two without leading zeros, the one with more digits is larger."""
    parts = re.split(r"([0-9]+)", name)
    numbers = (part.lstrip("0") for part in parts[1::2])
    texts = [(-1, part) for part in parts[::2]]
    digits = [(len(number), number) for number in numbers]
    return [part for pair in itertools.zip_longest(texts, digits) for part in pair if part]
