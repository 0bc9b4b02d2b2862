"""Random calls of everything public do what is promised; wrong norms are found."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import normkit
from conformance.support import needs_kernels
from fuzz import children, rules
from fuzz.making import FUNCTIONS, make
from fuzz.memory import FLOATS, Arena
from fuzz.model import Call, Norm
from fuzz.running import check
from fuzz.several import Several
from fuzz.spoiling import SPOILED, spoiled
from normkit._spec import OPS

pytestmark = needs_kernels

SEED = 0
CALLS = int(os.environ.get("NORMKIT_FUZZ_CALLS", "10000"))
FEW = 400


def test_random_calls_do_what_is_promised() -> None:
    failures = children.run(SEED, CALLS)
    assert not failures, "\n" + children.report(SEED, failures)


def test_gradients_from_the_output_of_equal_elements_are_right(arena: Arena) -> None:
    arena.clear()
    x = torch.full((3, 9), 0.7, requires_grad=True)
    weight = torch.linspace(0.5, 2.0, 9)
    options = {"weight": weight, "eps": 1e-12, "memory_efficient": True}
    norm = Norm(OPS["layer_norm"], True, False, x, **options)
    grads = {"grad of y": torch.linspace(-1.0, 1.0, 27).view(3, 9)}
    call = Call("function", "layer_norm", [norm], {"x": x, **options}, grads=grads)
    assert not list(check(call, arena))


def test_calls_of_every_kind_are_made(arena: Arena) -> None:
    seen: Counter[object] = Counter()
    for i in range(1000):
        call = make(SEED, i, arena)
        verdict = rules.judge(call)
        right = "refused" if verdict.must else "open" if verdict.may else "accepted"
        kinds = [call.name, call.form, call.backend, call.mode, call.explains, right]
        kinds += ["gradients"] * bool(call.grads) + [t.dtype for t in call.tensors().values()]
        seen.update(kinds)
    assert {*FUNCTIONS, *(f"{name}_" for name in FUNCTIONS)} <= seen.keys()
    assert {"RMSNorm", "LayerNorm", "HeadNorm", "rms_norm_tp", "head_norm_tp"} <= seen.keys()
    assert {"cpu", "reference", "auto", None, "inference", "no_grad", True, "open"} <= seen.keys()
    assert set(FLOATS) <= seen.keys()
    assert min(seen["accepted"], 2 * seen["refused"], 5 * seen["gradients"]) > 400


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena()


def found(arena: Arena, calls: range) -> set[tuple[int, str]]:
    return {(i, failure.kind) for i in calls for failure in check(make(SEED, i, arena), arena)}


@pytest.fixture(scope="module")
def found_without(arena: Arena) -> set[tuple[int, str]]:
    return found(arena, range(FEW))


@pytest.mark.parametrize("how", [how for how in SPOILED if how != "a crash"])
def test_a_wrong_norm_is_found(how: str, arena: Arena, found_without: set[tuple[int, str]]) -> None:
    kind, _ = SPOILED[how]
    with spoiled(how):
        kinds = [kind for _, kind in found(arena, range(FEW)) - found_without]
    assert kind in kinds


def test_wrong_values_of_every_op_are_found(arena: Arena) -> None:
    with spoiled("an element is two steps off"):
        wrong = {i for i, kind in found(arena, range(2 * FEW)) if kind == "values"}
    names = {make(SEED, i, arena).norms[0].op.name for i in wrong}
    assert names >= set(FUNCTIONS)


def test_a_crash_is_one_failure_and_the_calls_behind_it_run(arena: Arena) -> None:
    calls = [make(SEED, i, arena) for i in range(60)]
    called = [i for i, call in enumerate(calls) if call.form == "function" and not call.explains]
    crashing = [i for i in called if calls[i].arguments.get("round_sum") is False]
    failures = children.run(SEED, len(calls), spoiled="a crash")
    crashes = [failure for failure in failures if failure.kind == "crash"]
    assert crashing
    assert [crash.number for crash in crashes] == crashing
    assert all(f"signal {signal.SIGSEGV.value}" in crash.detail for crash in crashes)


def test_random_calls_of_several_norms_do_what_is_promised(arena: Arena) -> None:
    for i in range(CALLS // 20):
        with torch.no_grad(), np.errstate(all="ignore"):
            wrong = list(Several(SEED, i, arena).failures())
        assert not wrong, f"Several({SEED}, {i}): {wrong}"


@pytest.mark.parametrize("what", ["values of q", "values of k", "k_cache", "v", "memory"])
def test_wrong_norms_among_several_are_found(
    what: str, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = normkit.qk_norm_rope

    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> Any:
        made = right(q, k, *rest, **options)
        changed = {
            "k_cache": options.get("k_cache"),
            "v": options.get("v"),
            "memory": options.get("sin"),
        }
        changed |= {"values of q": made[0], "values of k": made[1]}
        t = changed[what]
        if t is not None:
            t.copy_(t * 1.5 + 1)
        return made

    monkeypatch.setattr(normkit, "qk_norm_rope", wrong)
    kinds = set()
    with torch.no_grad(), np.errstate(all="ignore"):
        for i in range(60):
            kinds |= {failure.kind for failure in Several(SEED, i, arena).failures()}
    assert what in kinds


def test_a_call_is_made_from_its_number_alone(arena: Arena) -> None:
    first = make(SEED, 7, arena)
    x = first.norms[0].x.clone()
    for number in (3, 7):
        again = make(SEED, number, arena)
    assert (again.name, list(again.arguments)) == (first.name, list(first.arguments))
    assert torch.equal(again.norms[0].x, x)
