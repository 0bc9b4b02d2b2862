"""From what was measured of a family to its entry of the family file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from families import building
from families.building import Family
from families.measuring import Measured, measure, sections_of
from normkit.checkpoint import _names
from normkit.checkpoint._families import Rule, endings

VARIES = Rule(none="it is not the same in every layer or model of the family")


def entry(family: Family) -> tuple[dict[str, Any] | None, list[str]]:
    """Build every model of a family: what is to be written of it, and what could not be built."""
    found, failures = Measured(), []
    sections: dict[str, tuple[str, list[str]]] = {}
    for model_class in family.model_classes():
        try:
            built = building.build(family, model_class)
            found.add(measure(built))
        except Exception as error:  # whatever a model's code raises
            failures.append(
                f"{family.name}: {model_class.__name__}: {type(error).__name__}: {str(error)[:100]}"
            )
            continue
        for path, name, model_type in sections_of(built.model):
            sections.setdefault(name, (model_type, []))[1].append(path)
    if not found.rules and not sections:
        return None, failures
    switched = _switches(family, found)
    rules, unnamed = shortened(found)
    every = rules | {text: [] for _, _, others in switched for text in others}
    values: dict[str, Any] = {"rules": rules, "entries": _entries(family, every)}
    if sections:
        values["sections"] = {
            name: [kind, *_outermost(paths)] for name, (kind, paths) in sorted(sections.items())
        }
    if unnamed:
        values["unnamed"] = unnamed
    if switched:
        values["switches"] = switched
    return values, failures


def shortened(found: Measured) -> tuple[dict[str, list[str]], list[str]]:
    """Endings by rule, and those of norms that are not named as norms.

    Of every name the shortest ending is kept that no name with another rule has; where the name
    does not say that it is a norm, none that is something else either, and never a single part.
    """
    chosen = {
        pattern: next(iter(rules)) if len(rules) == 1 else VARIES
        for pattern, rules in found.rules.items()
    }
    by_ending: dict[str, set[Rule]] = {}
    for pattern, rule in chosen.items():
        for ending in endings(pattern):
            by_ending.setdefault(ending, set()).add(rule)
    taken = {ending for pattern in found.others for ending in endings(pattern)}
    kept: dict[Rule, set[str]] = {}
    unnamed = set()
    for pattern, rule in chosen.items():
        named = _names.is_norm(pattern)
        for ending in reversed(list(endings(pattern))):
            free = len(by_ending[ending]) == 1
            if not named:
                free = free and ending not in taken and "." in ending
            if free or ending == pattern:
                kept.setdefault(rule, set()).add(ending)
                if not named and not rule.none:
                    unnamed.add(ending)
                break
    texts = {str(rule): sorted(found) for rule, found in kept.items()}
    return dict(sorted(texts.items())), sorted(unnamed)


def _entries(family: Family, rules: Mapping[str, list[str]]) -> dict[str, list[object]]:
    """For every config entry that rules name: its default, and the other entries that set it."""
    parsed = [Rule.parsed(text) for text in rules]
    named = {
        entry for rule in parsed for entry in (rule.eps, rule.groups) if isinstance(entry, str)
    }
    defaults = building.defaults(family)
    known = family.config_class is not None
    return {
        path: [defaults.get(path), *(building.aliases(family, path) if known else ())]
        for path in sorted(named)
    }


def _outermost(paths: list[str]) -> list[str]:
    """Those that are in no other."""
    unique = sorted(set(paths), key=len)
    return [
        path
        for index, path in enumerate(unique)
        if not any(path.startswith(outer + ".") for outer in unique[:index])
    ]


def _switches(family: Family, found: Measured) -> list[list[object]]:
    """The entries of the config that change what a norm computes, with the rules that then hold.

    Those that only add norms have their rules among the others.
    """
    if family.config_class is None:
        return []
    changed: list[list[object]] = []
    for name, value in building.switches(family.config()):
        try:
            other = measure(building.build(family, next(family.model_classes()), (name, value)))
        except Exception:  # a value that the model does not know
            continue
        differs = any(
            found.rules.get(pattern, rules) != rules for pattern, rules in other.rules.items()
        )
        if differs:
            changed.append([name, value, shortened(other)[0]])
        else:
            found.add(other)
    return changed
