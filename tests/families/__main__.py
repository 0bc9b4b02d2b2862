"""`make families`: writes src/normkit/_families.json."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from families import building, converting, tiny
from families.building import Family
from families.comparing import Comparison, compare
from families.table import entry

TARGET = Path(__file__).parents[2] / "src" / "normkit" / "_families.json"
MOST_SECONDS = 180  # for one family; the slowest that builds takes 40


def _late(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done in {MOST_SECONDS} s")


def main() -> None:
    """Measure the families that are named, or all, and write them."""
    parser = argparse.ArgumentParser(prog="families")
    parser.add_argument("names", nargs="*", help="a part of all families, to print")
    parser.add_argument("--compare", action="store_true", help="compare, and write nothing")
    parser.add_argument("--convert", action="store_true", help="convert tiny models and run them")
    arguments = parser.parse_args()
    names = set(arguments.names)
    if arguments.convert:
        with ProcessPoolExecutor(initializer=_start) as pool:
            results = []
            for made in pool.map(converting.outcomes, tiny.named(arguments.names)):
                results += made
                print(made[0].name, made[0].error, file=sys.stderr, flush=True)
            print(converting.summary(results))
        return
    known = building.transformers_families() + building.diffusers_families()
    asked = [family for family in known if not names or family.name in names]
    if arguments.compare:
        _print_comparison(asked)
        return
    entries = {}
    with ProcessPoolExecutor(initializer=_start) as pool:
        for family, (made, failures) in zip(asked, pool.map(_measured, asked), strict=True):
            if made is not None:
                entries[family.name] = made
            said = "measured" if made else "no norms" if not failures else "not built"
            print(f"{family.name}: {said}", *failures, sep="\n    ", file=sys.stderr, flush=True)
    text = written(entries)
    if names:
        print(text)
    else:
        TARGET.write_text(text, encoding="utf-8")


def _print_comparison(families: list[Family]) -> None:
    """Say of how many norms the family file says something else than the models' own modules."""
    total = Comparison()
    with ProcessPoolExecutor(initializer=_start) as pool:
        for one in pool.map(_compared, families):
            total.counts += one.counts
            for what, examples in one.examples.items():
                total.examples.setdefault(what, []).extend(examples)
    for what, examples in total.examples.items():
        print(f"{what}: {total.counts[what]}", *examples, sep="\n    ")
    print(dict(total.counts))


def _compared(family: Family) -> Comparison:
    result = Comparison()
    signal.alarm(MOST_SECONDS)
    try:
        compare(family, result)
    except (Exception, SystemExit) as error:
        result.count("failed", f"{family.name}: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    return result


def _start() -> None:
    building.quiet()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)


def _measured(family: Family) -> tuple[dict[str, Any] | None, list[str]]:
    signal.alarm(MOST_SECONDS)
    try:
        return entry(family)
    except (Exception, SystemExit) as error:
        return None, [f"{type(error).__name__}: {error}"]
    finally:
        signal.alarm(0)


def written(entries: dict[str, object]) -> str:
    """One line for each family, so that changes can be read."""
    made = {name: version(name) for name in ("diffusers", "transformers")}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(entries.items()))
    head = json.dumps({"made_from": made})[1:-1]
    return "{" + head + ',\n"families": {\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    main()
