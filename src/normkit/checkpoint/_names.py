"""How the norms of checkpoints are called, and what they look like."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from typing import Literal

# A module that has several of these has its norm's weight under the first: the others are a scale
# of its output or of a quantised tensor.  The endings of biases are tried in the order given.
BIASES_OF = {
    ".weight": (".bias", ".beta"),
    ".scale": (".bias", ".beta"),  # JAX, FLUX, gpt-oss
    ".gamma": (".beta", ".bias"),  # TensorFlow
}
_NORM_WORDS = frozenset(
    (
        "norm",
        "norms",
        "layernorm",
        "layernorms",
        "rmsnorm",
        "rms",
        "ln",
        "layrnorm",
        "normalization",
    )
) | {"enorm", "hnorm"}
_HAS_NORM_WORD = re.compile("norm|rms|ln", re.IGNORECASE)  # one is in each of them
_OTHER_WORDS = frozenset(("batch", "group", "instance", "spectral", "weight"))
_OTHER_LAST_WORDS = frozenset(("linear", "proj"))  # a proj_norm is a norm, a norm_proj is none
_HEAD_WORDS = frozenset(("q", "k", "v", "qk", "query", "key", "value", "b", "c"))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# What wraps a module adds to the names of its tensors.
_UNTRAINED = frozenset(("base_layer", "original_module"))  # PEFT's names of what it replaces
_WRAPPERS = _UNTRAINED | {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS_OF_ADAPTERS = frozenset(("modules_to_save", "ln_tuning_layers"))
_OUTERMOST = (["base_model", "model"], ["module"])
_WRAPPED = re.compile(
    "|".join(sorted(_WRAPPERS | _WRAPPERS_OF_ADAPTERS)) + r"|^base_model\.|^module\."
)

Layout = Literal["hf", "gguf", "mlx"]
"""What a file tells of who wrote it, where a family adds 1 to the weights of its norms.

- "gguf": names as llama.cpp's converter gives them. It has added the 1 for every family.
- "mlx": written by MLX, whose models decide by family: those of Gemma 1 to 3 add the 1 themselves
  and store what Hugging Face does; to the weights of Qwen3-Next the 1 was added.
- "hf": nothing of that, so nothing speaks against the layout of Hugging Face.

That the 1 was added by hand to weights that keep their names cannot be known.
"""
_GGUF_NAME = re.compile(r"(?:(?:enc|dec|v|a)\.)?blk\.\d+\.")

IsKnown = Callable[[str], "bool | None"]
"""What a model's own code says of the module of a canonical name: that it is a norm, or none."""


def split(name: str) -> tuple[str, str]:
    """The norm's name and the ending of its weight's; "" as ending where it is not a weight's."""
    prefix, dot, last = name.rpartition(".")
    return (prefix, dot + last) if dot + last in BIASES_OF else (name, "")


def biases_of(weight: str) -> list[str]:
    """The names that the bias of a norm may have, likeliest first."""
    prefix, ending = split(weight)
    return [prefix + bias for bias in BIASES_OF[ending]]


def canonical(prefix: str) -> str:
    """The name of a module in the plain model: without what wraps it or the model.

    PEFT, torch.compile, DDP, FSDP and activation checkpointing add to names.  After PEFT's
    modules_to_save comes the name of an adapter.
    """
    if not _WRAPPED.search(prefix):
        return prefix
    kept = []
    parts = iter(prefix.split("."))
    for part in parts:
        if part in _WRAPPERS_OF_ADAPTERS:
            next(parts, None)
        elif part not in _WRAPPERS:
            kept.append(part)
    while outer := next((o for o in _OUTERMOST if kept[: len(o)] == o != kept), None):
        del kept[: len(outer)]
    return ".".join(kept)


def canonical_name(name: str) -> str:
    """The name of a weight in the plain model."""
    prefix, ending = split(name)
    return canonical(prefix) + ending


def weights_of(prefix: str, names: Collection[str]) -> list[str]:
    """The names of the weights of one module, under whatever wraps it.

    Where PEFT trains a copy of the module, only those of the copies.
    """
    module = canonical(prefix)
    last = module.rpartition(".")[2]
    stored = [name for name in names if last in name and _is_weight(name, names)]
    same = [name for name in stored if canonical(split(name)[0]) == module]
    trained = [name for name in same if _UNTRAINED.isdisjoint(name.split("."))]
    return trained or same


def is_norm(prefix: str) -> bool:
    """Whether a module is called as a norm is."""
    if not _HAS_NORM_WORD.search(prefix):  # as of nearly all tensors of a large model
        return False
    parent, words = _words(prefix)
    if _is_called_norm(words):
        return True
    # qk_norm.q; the parent alone would make a norm of whatever lies in one
    return (
        len(words) == 1 and words[0] in _HEAD_WORDS and "qk" in parent and _is_called_norm(parent)
    )


def is_head_norm(prefix: str, shape: tuple[int, ...]) -> bool:
    """Whether a norm of this name and shape of weight is one with a weight per head."""
    return len(shape) == 2 and is_norm(prefix) and not _HEAD_WORDS.isdisjoint(_words(prefix)[1])


def norm_shape(prefix: str, stored: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape (n,) or (heads, head_dim) of a norm's tensor; None if it is that of something else.

    JAX and ONNX store a row as (1, n), (n, 1) or (1, 1, n), what normalises images as (n, 1, 1).
    """
    sizes = tuple(size for size in stored if size != 1)
    if len(sizes) < 2:
        return sizes or stored[:1] or None
    return sizes if is_head_norm(prefix, sizes) else None


def is_norm_weight(name: str, names: Collection[str], is_known: IsKnown | None = None) -> bool:
    """Whether a tensor is called as a norm's weight is, among others of these names."""
    prefix, ending = split(name)
    if not ending:
        return False
    known = is_known(canonical(prefix)) if is_known else None
    if not (is_norm(prefix) if known is None else known):
        return False
    return _is_weight(name, names) and f"{prefix}.running_mean" not in names


def has_gguf_names(names: Collection[str]) -> bool:
    """Whether the tensors are called as in GGUF files: blk.0.attn_norm.weight."""
    return any(map(_GGUF_NAME.match, names))


def layout_of(is_gguf: bool, written_as: str | None) -> Layout:
    """The layout of a file with GGUF's names or not, whose metadata has that for "format"."""
    if is_gguf:
        return "gguf"
    return "mlx" if written_as == "mlx" else "hf"


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers as numbers: of two without leading zeros, the one with more digits is larger."""
    parts = re.split(r"([0-9]+)", name)
    numbers = (part.lstrip("0") for part in parts[1::2])
    texts = [(-1, part) for part in parts[::2]]
    digits = [(len(number), number) for number in numbers]
    return [part for pair in itertools.zip_longest(texts, digits) for part in pair if part]


def _is_weight(name: str, names: Collection[str]) -> bool:
    """Whether it is the first of the weights that its module has."""
    prefix, ending = split(name)
    return bool(ending) and next(e for e in BIASES_OF if prefix + e in names) == ending


def _words(prefix: str) -> tuple[list[str], list[str]]:
    """The words in the last two parts of a name that are not just a number."""
    named = (p for p in reversed(canonical(prefix).split(".")) if not p.isdecimal())
    last, parent = next(named, ""), next(named, "")
    return [w.lower() for w in _WORD.findall(parent)], [w.lower() for w in _WORD.findall(last)]


def _is_called_norm(words: list[str]) -> bool:
    last = max((i for i, word in enumerate(words) if word in _NORM_WORDS), default=None)
    return (
        last is not None
        and _OTHER_WORDS.isdisjoint(words)
        and _OTHER_LAST_WORDS.isdisjoint(words[last:])
    )
