"""What fraction of a copy's speed a norm can reach on a GPU, by the instructions it issues.

    python benchmarks/predictions.py      # the table of docs/benchmarks.md

While a copy moves the bytes of a pack, a GPU has so many issue slots; a kernel that needs more of
them is slower than the copy.  gpu.py keeps the predictions before it measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cases import HEADLINES, Case

from normkit._bench import NORMKIT

# Issued by a warp for each of its packs, of 16 bytes of x in each thread; packs that padding adds
# to a row count as instructions of the others.  Counted in the machine code for sm_90, bfloat16.
INSTRUCTIONS = {
    "rms_norm 512": 146,
    "rms_norm 1024": 107,
    "rms_norm 2560": 108,
    "rms_norm 2880": 138,
    "rms_norm 4096": 111,
    "rms_norm 5120": 109,
    "rms_norm 8192": 88,
    "rms_norm 8192 float32 weight": 119,
    "rms_norm 16384": 90,
    "add_rms_norm 4096": 148,
    "add_rms_norm 8192": 125,
    "add_rms_norm 16384": 126,
    "layer_norm 8192": 142,
    "head_norm 128": 136,
    "head_norm 64": 135,
}
WARP_BYTES = 32 * 16
SCHEDULERS, UTILISATION = 4, 0.8  # of a processor; of the issue slots, assumed


class Card(NamedTuple):
    """Of the SXM boards; the rate counts bytes read and bytes written."""

    processors: int
    hertz: float
    copy_bytes_per_s: float


CARDS = {
    "H100": Card(132, 1.98e9, 3.0e12),
    "H200": Card(132, 1.98e9, 4.3e12),
    "B200": Card(148, 1.85e9, 7.0e12),
}


def name_of(case: Case) -> str:
    """What INSTRUCTIONS calls it."""
    return " ".join([case.op, str(case.shape[-1]), *[f"{case.weight} weight"] * bool(case.weight)])


def fraction(case: Case, gpu: str) -> float | None:
    """Of a copy's speed; None where nobody has counted, or the GPU is not known."""
    card = next((card for name, card in CARDS.items() if name in gpu), None)
    instructions = INSTRUCTIONS.get(name_of(case))
    usual = (case.dtype, case.layout) == ("bfloat16", "contiguous")
    if card is None or instructions is None or not usual:
        return None
    moved = WARP_BYTES * (4 if case.like.adds else 2)
    slots = SCHEDULERS * card.processors * card.hertz * moved / card.copy_bytes_per_s
    return min(1.0, UTILISATION * slots / instructions)


def table(*rows: Iterable[str]) -> str:
    first, *others = map(list, rows)
    lines = [first, ["---", *["--:"] * (len(first) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def forecast() -> str:
    """The predictions for each card, as docs/benchmarks.md has them."""
    cases = {name_of(case): case for case in HEADLINES if name_of(case) in INSTRUCTIONS}
    rows = [
        [name, str(INSTRUCTIONS[name]), *(f"{fraction(case, gpu):.2f}" for gpu in CARDS)]
        for name, case in cases.items()
    ]
    return table(["case", "instructions a pack", *CARDS], *rows)


def outcome(results: Iterable[Mapping[str, Any]]) -> str:
    """Prediction and outcome of each result that has both, as fractions of a copy's speed."""
    rows = [["case", "predicted", "measured", "SM MHz under load"]]
    for r in results:
        if r.get("predicted") is not None:
            measured, clock = 1 / r["candidates"][NORMKIT]["copies"], r["device"].get("sm_mhz")
            case = f"{r['op']} {r['label']}"
            rows.append([case, f"{r['predicted']:.2f}", f"{measured:.2f}", str(clock)])
    return table(*rows) if len(rows) > 1 else ""


if __name__ == "__main__":
    print(forecast())
