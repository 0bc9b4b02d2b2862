"""What the norms of a model compute, by its config.json: from the models' own code, or assumed.

`_families.json` is made by `make families`: the modules of every architecture of transformers and
diffusers were measured by `normkit.recognise`, in models where each eps has a value of its own.
This file only looks up; what it does not find there is assumed, and said to be.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from normkit._serving.checks import check_number
from normkit._spec import Kind

Rounding = Literal["once", "first", "weight", "elsewhere"]
Json = Mapping[str, object]

_ROUNDINGS: Mapping[str, Rounding] = {word: word for word in get_args(Rounding)}

_DATA = Path(__file__).parents[1] / "_families.json"


@dataclass(frozen=True)
class Rule:
    """What a norm of a family computes.

    Attributes:
        kind: "rms" or "layer".
        eps: a number that the model's code fixes, or the path of an entry of its config.
        weight_offset: what is added to the weight.
        has_bias: whether the family's module has a bias.
        rounding: whether 16-bit values are rounded "once", at the end; also "first", before the
            weight multiplies; "weight", once, but with its offset the weight too, to its own dtype;
            or "elsewhere", which normkit does not do.
        groups: parts of a row, each with a statistic of its own; a number, or an entry's path.
        gate: "", or where a gate multiplies and through what.
        channels_first: whether x is (batch, n, ...).
        none: why this is no norm of rows; "" if it is one.
    """

    kind: Kind = "rms"
    eps: float | str = 0.0
    weight_offset: float = 0.0
    rounding: Rounding = "once"
    has_bias: bool = False
    groups: int | str = 1
    gate: str = ""
    channels_first: bool = False
    none: str = ""

    def __str__(self) -> str:
        if self.none:
            return f"none: {self.none}"
        words = [self.kind, self.rounding, f"{self.weight_offset:+g}", str(self.eps)]
        words += ["bias"] * self.has_bias
        words += [f"groups={self.groups}"] * (self.groups != 1)
        words += [f"gate={self.gate}"] * bool(self.gate)
        words += ["channels-first"] * self.channels_first
        return " ".join(words)

    @staticmethod
    def parsed(text: str) -> Rule:
        """Read what `str` writes."""
        if text.startswith("none: "):
            return Rule(none=text.removeprefix("none: "))
        kind, rounding, offset, eps, *others = text.split()
        rest = {key: value for key, _, value in (word.partition("=") for word in others)}
        groups = rest.get("groups", "1")
        return Rule(
            "layer" if kind == "layer" else "rms",
            float(eps) if eps[0].isdigit() else eps,
            float(offset),
            _ROUNDINGS[rounding],
            "bias" in rest,
            int(groups) if groups.isdecimal() else groups,
            rest.get("gate", ""),
            "channels-first" in rest,
        )


@dataclass(frozen=True)
class Family:
    """The norms of one model_type.

    Attributes:
        rules: by the shortest ending of names, numbers as *, that no norm of the family with
            another rule has.
        entries: for each entry of the config that rules name, its default and the other entries
            that set it.
        sections: for each section of the config, its model_type by default and the names of the
            parts of the model that it describes.
        unnamed: endings of norms whose names do not say that they are norms.
        switches: entries of the config, values of them, and the rules that hold instead.
    """

    rules: Mapping[str, Rule]
    entries: Mapping[str, tuple[float | None, tuple[str, ...]]]
    sections: Mapping[str, tuple[str, tuple[str, ...]]]
    unnamed: frozenset[str] = frozenset()
    switches: tuple[tuple[str, object, Mapping[str, Rule]], ...] = ()

    def rule(self, pattern: str, config: Json) -> Rule | None:
        """The rule of the longest ending of a pattern."""
        chosen = (r for key, value, r in self.switches if config.get(key) == value)
        rules = next(chosen, self.rules)
        return next((rules[e] for e in endings(pattern) if e in rules), None)

    def has_unnamed(self, pattern: str) -> bool:
        """Whether it is a norm though its name does not say so."""
        return any(ending in self.unnamed for ending in endings(pattern))


def pattern_of(name: str) -> str:
    """A norm's name with every number a *."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def endings(pattern: str) -> Iterator[str]:
    """All endings of a pattern at a dot, the longest first; the last is ""."""
    parts = pattern.split(".")
    return (".".join(parts[first:]) for first in range(len(parts) + 1))


@functools.cache
def families() -> Mapping[str, Family]:
    """The family file, read when it is first asked for."""
    content = json.loads(_DATA.read_text(encoding="utf-8"))
    return {name: _family(values) for name, values in content["families"].items()}


def _family(values: Mapping[str, Any]) -> Family:
    return Family(
        _rules(values["rules"]),
        {path: (default, tuple(others)) for path, (default, *others) in values["entries"].items()},
        {name: (kind, tuple(parts)) for name, (kind, *parts) in values.get("sections", {}).items()},
        frozenset(values.get("unnamed", ())),
        tuple((key, value, _rules(r)) for key, value, r in values.get("switches", ())),
    )


def _rules(by_text: Mapping[str, list[str]]) -> dict[str, Rule]:
    parsed = {Rule.parsed(text): found for text, found in by_text.items()}
    return {ending: rule for rule, found in parsed.items() for ending in found}


# ---------------------------------------------------------------------------------------- lookup


@dataclass(frozen=True)
class Found:
    """The rule of a norm, the family that has it, and the part of the config that it reads."""

    name: str
    family: Family
    rule: Rule
    config: Json

    def value(self, entry: float | str) -> tuple[float, str]:
        """A number of the rule, and the entry of config.json that said it; "" where none did.

        Raises:
            ValueError: the entry is no finite number from 0 on.
        """
        if not isinstance(entry, str):
            return entry, ""
        default, others = self.family.entries[entry]
        for path in (entry, *others):
            value = _at(self.config, path)
            if value is not None:
                return check_number(path, value, least=0), path
        if default is None:
            raise ValueError(f"{entry}: expected a number, got None")
        return default, ""


def _at(config: Json, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def family_of(config: Json) -> str | None:
    """The name of a config's family: transformers' model_type, or the class of diffusers."""
    name = config.get("model_type", config.get("_class_name"))
    return name if isinstance(name, str) else None


def part_of(config: Json, pattern: str) -> Json:
    """The section for a part of the model that its family does not have, as of a tower added to it.

    It is the one whose words are in the name of a part that the norm lies in, before any number:
    the attn of a layer is no tower, whatever attn_config holds.  Else it is the config itself.
    """
    parts = pattern.rpartition(".")[0].split(".")
    outer = list(itertools.takewhile(lambda part: part != "*", parts))
    family = families().get(family_of(config) or "")
    usual = () if family is None else family.sections
    for section, inner in config.items():
        if isinstance(inner, Mapping) and section not in usual and _is_of_a_model(inner):
            stem = section.removesuffix("_config")
            if stem and any(f"_{stem}_" in f"_{part}_" for part in outer):
                return inner
    return config


def _is_of_a_model(section: Json) -> bool:
    """Whether it describes layers, and not how attention or quantisation is done."""
    return any(re.search("model_type|hidden|layer|depth", str(key)) for key in section)


def find(config: Json, pattern: str) -> Found | None:
    """What the models' own code says of a norm; None where the family or the name is unknown."""
    config = part_of(config, pattern)
    name = family_of(config)
    family = families().get(name) if name is not None else None
    if name is None or family is None:
        return None
    for section, (usual, parts) in family.sections.items():
        inner = config.get(section)
        if isinstance(inner, Mapping) and family_of(inner) not in (None, usual):
            # a model of several parts, with another in the place of the usual one
            rests = (_after(part, pattern) for part in parts)
            rest = next((rest for rest in rests if rest is not None), None)
            if rest is not None:
                return find(inner, rest)
    rule = family.rule(pattern, config)
    return None if rule is None else Found(name, family, rule, config)


def rules_of(config: Json) -> list[Rule]:
    """The rules of all norms of a config's family, without those that are none."""
    family = families().get(family_of(config) or "")
    return [] if family is None else [r for r in set(family.rules.values()) if not r.none]


def _after(part: str, pattern: str) -> str | None:
    """What of a pattern follows the name of a part of the model."""
    _, found, rest = f".{pattern}".partition(f".{part}.")
    return rest if found else None
