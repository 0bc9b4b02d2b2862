"""What a stored norm computes, and for each option where that was said."""

from __future__ import annotations

import functools
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from normkit._serving.checks import check_number
from normkit._spec import DEFAULT_EPS, Kind, NormSpec
from normkit.checkpoint._families import (
    Found,
    Json,
    Rule,
    families,
    family_of,
    find,
    part_of,
    pattern_of,
    rules_of,
)
from normkit.checkpoint._names import Layout, canonical

Value = TypeVar("Value")
Source = Literal["given", "config", "family", "layout", "assumed"]


@dataclass(frozen=True)
class Origin:
    """Where the value of an option came from.

    Attributes:
        source: "given" by the caller; "config": an entry of config.json; "family": the code of the
            models of this family; "layout": the file itself; "assumed": nobody said it.
        detail: the entry of config.json, the family, or why it is assumed.
    """

    source: Source
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.detail}" if self.detail else self.source


GIVEN = Origin("given")


def assumed(origins: Mapping[str, Origin]) -> list[str]:
    """The options that nobody stated."""
    return [name for name, origin in origins.items() if origin.source == "assumed"]


@dataclass(frozen=True)
class Given:
    """The options that a caller states; None where he does not."""

    kind: Kind | None = None
    eps: float | None = None
    weight_offset: float | None = None
    round_before_weight: bool | None = None


NOTHING_GIVEN = Given()


@dataclass(frozen=True)
class Meaning:
    """What a stored norm computes.

    Attributes:
        spec: its options.
        origins: where each came from, by name.
        note: what a caller must know beside: a gate that is not part of the norm, a rounding that
            normkit lacks, x that has its channels first.
        no_row: why it is no norm of rows; "" if it is one.
    """

    spec: NormSpec
    origins: Mapping[str, Origin] = field(default_factory=dict)
    note: str = ""
    no_row: str = ""


def is_known(pattern: str, config: Json) -> bool | None:
    """Whether the family says of a canonical name that it is a norm of rows, or none, or nothing.

    Of what has the name of a norm, it may say that it is none; of the rest, which norms it has.
    """
    found = find(config, pattern)
    if found is None:
        return None
    if _no_row(found):
        return False
    return True if found.family.has_unnamed(pattern) else None


def meaning(
    name: str,
    config: Json,
    where: str,
    *,
    has_bias: bool,
    layout: Layout = "hf",
    given: Given = NOTHING_GIVEN,
) -> Meaning:
    """Find out what a stored norm computes.

    Args:
        name: the name of the norm as it is stored.
        config: what config.json holds; empty where there is none.
        where: the name of that file, for messages.
        has_bias: whether a bias is stored.
        layout: who wrote the file.
        given: what the caller states.

    Raises:
        ValueError: an entry of config.json is no finite number from 0 on.
    """
    config = part_of(config, pattern_of(canonical(name)))
    try:
        found = _found(name, config, has_bias)
        if found is None or found.rule.none:
            known = _as_its_text(name, config, has_bias) or _assumed(name, config, has_bias)
        else:
            known = _of_family(found)
        no_row = "" if found is None else _no_row(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    values, origins = known.values, dict(known.origins)
    if layout == "gguf":
        values["weight_offset"] = 0.0
        origins["weight_offset"] = Origin("layout", "converters to GGUF store 1 + w")
    elif layout == "mlx" and values["weight_offset"]:
        # mlx-lm stores w for Gemma, and 1 + w for some norms of Qwen3-Next
        origins["weight_offset"] = Origin("assumed", "MLX stores 1 + w for some families")
    for option, value in vars(given).items():
        if value is not None:
            values[option], origins[option] = value, GIVEN
    if found is None and given.kind is not None and given.eps is None:
        values["eps"] = _assumed_eps(given.kind, config)[0]
    if given.kind is not None:
        no_row = ""
    return Meaning(NormSpec(**values, has_bias=has_bias), origins, known.note, no_row)


def _found(name: str, config: Json, has_bias: bool) -> Found | None:
    """The rule of a norm; None where the family has none, or its norm has a bias and this has not.

    A bias may be switched off by the config; where all norms of the family have one, it is.
    """
    found = find(config, pattern_of(canonical(name)))
    if found is None or found.rule.none or found.rule.has_bias == has_bias:
        return found
    without = any(not r.none and not r.has_bias for r in found.family.rules.values())
    return None if has_bias or without else found


@dataclass(frozen=True)
class _Known:
    """The options of a norm before the caller's word."""

    values: dict[str, Any]
    origins: Mapping[str, Origin]
    note: str = ""


_OPTIONS = tuple(field.name for field in fields(Given))


def _of_family(found: Found) -> _Known:
    rule = found.rule
    family = Origin("family", found.name)
    eps, entry = found.value(rule.eps)
    values = {
        "kind": rule.kind,
        "eps": eps,
        "weight_offset": rule.weight_offset,
        "round_before_weight": rule.rounding == "first",
        "round_weight": rule.rounding == "weight",
    }
    origins = dict.fromkeys(_OPTIONS, family)
    if entry:
        origins["eps"] = Origin("config", entry)
    return _Known(values, origins, ", ".join(_notes(rule)))


def _no_row(found: Found) -> str:
    """Why the family computes no norm of a row there; "" if it does."""
    groups, _ = found.value(found.rule.groups)
    if groups > 1:
        return f"each of {groups:g} parts of a row has a statistic of its own"
    return found.rule.none


def _notes(rule: Rule) -> Iterator[str]:
    if rule.gate:
        yield f"gate {rule.gate}"
    if rule.channels_first:
        yield "channels first"
    if rule.rounding == "elsewhere":
        yield "16 bits are rounded elsewhere"


def _as_its_text(name: str, config: Json, has_bias: bool) -> _Known | None:
    """Of an unknown model made of parts: what the family of its language model says."""
    if family_of(config) in families():
        return None
    for section in _TEXTS:
        inner = config.get(section)
        found = _found(name, inner, has_bias) if isinstance(inner, dict) else None
        if found is not None and not found.rule.none:
            known = _of_family(found)
            why = f"{_why_assumed(config)}, as {found.name} in its {section}"
            return replace(known, origins=dict.fromkeys(_OPTIONS, Origin("assumed", why)))
    return None


def _assumed(name: str, config: Json, has_bias: bool) -> _Known:
    """What is likely where nobody says it: what all norms of the family agree on is known."""
    every = rules_of(config)
    rules = [rule for rule in every if rule.has_bias == has_bias]
    if not has_bias:  # the config may have switched it off
        rules = rules or every
    kind = _assumed_kind(name, config, has_bias)
    kinds = {rule.kind for rule in rules}
    if len(kinds) == 1:
        (kind,) = kinds
    alike = [rule for rule in rules if rule.kind == kind]
    eps, entry = _assumed_eps(kind, config)
    values: dict[str, Any] = {
        "kind": kind,
        "eps": eps,
        "weight_offset": _common([rule.weight_offset for rule in alike], 0.0),
        "round_before_weight": _common([rule.rounding == "first" for rule in alike], False),
    }
    why = _why_assumed(config)
    origins = dict.fromkeys(_OPTIONS, Origin("assumed", why))
    if entry:
        origins["eps"] = Origin("assumed", f"{entry}, {why}")
    if rules and len({rule.kind for rule in every}) == 1:
        said = Origin("family", f"every norm of {family_of(config)}")
        origins["kind"] = said
        for option, several in (
            ("weight_offset", {rule.weight_offset for rule in every}),
            ("round_before_weight", {rule.rounding for rule in every}),
        ):
            if len(several) == 1:
                origins[option] = said
    return _Known(values, origins)


def _common(values: Sequence[Value], otherwise: Value) -> Value:
    """What most of them are."""
    return Counter(values).most_common(1)[0][0] if values else otherwise


def _why_assumed(config: Json) -> str:
    family = family_of(config)
    if family in families():
        return f"{family} has no norm of this name"
    if family is not None:
        return f"the family {family} is unknown"
    return "no family in config.json" if config else "no config.json"


def _assumed_kind(name: str, config: Json, has_bias: bool) -> Kind:
    """The kind by the bias, by the name, or of most norms whose eps such an entry is."""
    if has_bias:
        return "layer"
    if "rms" in name.rpartition(".")[2].lower():
        return "rms"
    votes = Counter[Kind]()
    for entry in _eps_entries(config):
        votes += _kinds_by_entry(has_bias=False)[entry]
    return "layer" if votes["layer"] > votes["rms"] else "rms"


def _assumed_eps(kind: Kind, config: Json) -> tuple[float, str]:
    """The eps of the entry of config.json that most norms of the kind follow, and its name."""
    entries = _eps_entries(config)
    votes = _kinds_by_entry(has_bias=None)
    best = max(entries, key=lambda entry: votes[entry][kind], default=None)
    if best is None:
        return DEFAULT_EPS[kind], ""
    return check_number(best, entries[best], least=0), best


def _eps_entries(config: Json) -> dict[str, object]:
    """The entries of a config that are an eps in any family; of a model of parts, of its text."""
    texts = (config.get(section) for section in _TEXTS)
    flat = ChainMap(*[t for t in texts if isinstance(t, dict)], dict(config))
    return {k: flat[k] for k in _kinds_by_entry(has_bias=None) if flat.get(k) is not None}


_TEXTS = ("text_config", "llm_config", "language_config")


@functools.cache
def _kinds_by_entry(*, has_bias: bool | None) -> Mapping[str, Counter[Kind]]:
    """For every entry of a config that is an eps: of how many families' norms, by kind.

    Of those with a bias, or without, or of all.
    """
    votes: dict[str, Counter[Kind]] = {}
    for family in families().values():
        for rule in set(family.rules.values()):
            if isinstance(rule.eps, str):
                entry = votes.setdefault(rule.eps.rpartition(".")[2], Counter())
                entry[rule.kind] += has_bias in (None, rule.has_bias)
    return votes
