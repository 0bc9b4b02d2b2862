"""Runs a call, and compares what comes of it with what the rules and the oracle say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import normkit
from fuzz import rules
from fuzz.memory import Arena, packed
from fuzz.model import Call, Norm, has_memory
from fuzz.numbers import widened
from fuzz.oracle import Values
from fuzz.oracle_fused import FusedValues
from fuzz.oracle_gradients import Gradients
from fuzz.rules import Verdict
from normkit import parallel
from normkit._spec import PLAIN_OPTIONS

_NAMED = re.compile(r"^(\w+(\[\d+\])?)[:(]")
_OUTPUTS = {"out", "residual_out", "outs"}


class Failure(NamedTuple):
    """What is wrong with a call."""

    kind: str
    detail: str


def check(call: Call, arena: Arena) -> list[Failure]:
    """Run a call, and tell what is wrong with what it does."""
    with np.errstate(all="ignore"):
        verdict = rules.judge(call)
        return list(_Run(call, arena, verdict).failures())


@contextmanager
def surroundings(call: Call) -> Iterator[None]:
    modes = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }
    with ExitStack() as stack:
        if call.backend:
            stack.enter_context(normkit.use_backend(call.backend))
        stack.enter_context(modes[call.mode]())
        yield


def invoke(call: Call) -> Any:
    """Call what the call calls."""
    arguments = dict(call.arguments)
    if call.form == "module":
        return _module(call)(*_positional(call, arguments), **arguments)
    if call.form == "operator":
        return getattr(torch.ops.normkit, call.name)(**arguments)
    if call.form == "parallel":
        arguments.setdefault("context", _CONTEXT)
        return getattr(parallel, call.name)(*_positional(call, arguments), **arguments)
    if call.explains:
        return normkit.explain(call.name, *_positional(call, arguments), **arguments)
    return getattr(normkit, call.name)(*_positional(call, arguments), **arguments)


_CONTEXT = parallel.TPContext(["cpu", "cpu"])


def _positional(call: Call, arguments: dict[str, Any]) -> list[Any]:
    return [arguments.pop(name) for name in list(arguments)[: call.positional]]


def _module(call: Call) -> torch.nn.Module:
    module: torch.nn.Module = getattr(normkit, call.name)(**call.module["arguments"])
    for name, parameter in call.module["parameters"].items():
        if parameter is not None:
            setattr(module, name, parameter)
    return module


def names_of(call: Call) -> set[str]:
    """The arguments that the called function has."""
    if call.form == "module":
        of_class = inspect.signature(getattr(normkit, call.name)).parameters
        return {"x", "residual", "out_dtype", "weight", *of_class}
    if call.form == "operator":
        schema = getattr(torch.ops.normkit, call.name).default._schema
        return {argument.name for argument in schema.arguments}
    where = parallel if call.form == "parallel" else normkit
    if not hasattr(where, call.name):
        return {"op"}
    has = set(inspect.signature(getattr(where, call.name)).parameters)
    return has | {"op"} | (set(PLAIN_OPTIONS) if "options" in has else set())


def oracle_of(call: Call, norm: Norm) -> Values:
    """What knows what a norm must give."""
    values = FusedValues if norm.op.fused else Values
    # A call whose kernel may be missing runs there without being told to.
    by_reference = call.backend == "reference" or rules.may_have_no_kernel(norm)
    return values(norm, by_reference=by_reference)


class _Run:
    def __init__(self, call: Call, arena: Arena, verdict: Verdict) -> None:
        self.call, self.arena, self.verdict = call, arena, verdict
        self.values: list[Values] = []
        if not verdict.must and not call.explains and not call.norms[0].x.is_meta:
            self.values = [oracle_of(call, norm) for norm in call.norms]
        self.versions = {
            name: t._version
            for name, t in call.tensors().items()
            if not t.is_inference() and not t.is_meta
        }
        self.before = arena.snapshot()

    def failures(self) -> Iterator[Failure]:
        call, must = self.call, self.verdict.must
        try:
            with surroundings(call):
                result = invoke(call)
        except Exception as error:
            yield from self._refused(error)
            return
        if must:
            yield Failure("accepted", f"what is to be refused: {_words(must)}")
            return
        if call.explains:
            yield from self._explained(result)
        else:
            yield from self._accepted(result)

    # ---------------------------------------------------------------- refusals

    def _refused(self, error: Exception) -> Iterator[Failure]:
        changed = self.arena.changed(self.before)
        said = f"{type(error).__name__}: {error}"
        if changed.size:
            where = self.arena.whose(int(changed[0]), self.call.tensors())
            yield Failure("written by a refused call", f"{where}; {said}")
        yield from self._versions({})
        expected = self.verdict.must + self.verdict.may
        if not expected:
            yield Failure("refused", said)
        elif problem := self._problem(error, expected):
            yield Failure(problem, f"{said}; expected {_words(expected)}")

    def _problem(self, error: Exception, expected: list[rules.Fault]) -> str:
        text = str(error)
        named = _NAMED.match(text)
        if not named:
            return f"unnamed {type(error).__name__}"
        name = named[1]
        fits = [fault for fault in expected if name in fault.names]
        has = names_of(self.call)
        if name != "use_backend" and name.split("[")[0] not in has:
            return "an argument that the function does not have"
        if not fits:
            return "an error about something else"
        # torch's dispatcher makes a RuntimeError of a TypeError that comes out of a kernel.
        by_torch = self.call.form == "operator" and type(error) is RuntimeError
        kinds = [(*fault.kinds, RuntimeError) if by_torch and TypeError in fault.kinds
                 else fault.kinds for fault in fits]  # fmt: skip
        if not any(isinstance(error, kind) for kind in kinds):
            return f"{type(error).__name__} for another type"
        if not isinstance(error, RuntimeError) and name != "use_backend":
            if "expected" not in text:
                return "an error that says not what was expected"
            speaks_of = set(re.findall(r"\w+", text)) & _OUTPUTS
            if self.call.form == "function" and not speaks_of <= has:
                return "an argument that the function does not have"
        return ""

    # ---------------------------------------------------------------- results

    def _explained(self, result: Any) -> Iterator[Failure]:
        norm = self.call.norms[0]
        expected = {"cpu", "reference"} if rules.may_have_no_kernel(norm) else {"cpu"}
        if norm.x.dtype == torch.float64 or norm.x.is_meta or self.call.backend == "reference":
            expected = {"reference"}
        if getattr(result, "backend", None) not in expected or not result.reason:
            yield Failure("explain", f"expected {expected}, got {result}")
        yield from self._memory([])
        yield from self._versions({})

    def _accepted(self, result: Any) -> Iterator[Failure]:
        call = self.call
        outputs = self._outputs(result)
        if isinstance(outputs, Failure):
            yield outputs
            return
        wrong = [
            failure
            for norm, made in zip(call.norms, outputs, strict=True)
            for failure in self._form(norm, made)
        ]
        yield from wrong
        yield from self._memory([t for t in call.written().values() if has_memory(t)])
        yield from self._versions(call.written())
        if {"shape", "dtype"} & {failure.kind for failure in wrong}:
            return
        for values, made in zip(self.values, outputs, strict=False):
            yield from self._numbers(values, made)
            if call.grads:
                yield from self._gradients(values, made)
                yield from self._memory([])

    def _outputs(self, result: Any) -> list[dict[str, Tensor]] | Failure:
        """y and residual_out of each norm."""
        call = self.call
        results = result if call.form == "parallel" else [result]
        if type(results) is not list or len(results) != len(call.norms):
            return Failure("result", f"expected a list of {len(call.norms)}, got {type(result)}")
        made = []
        for norm, of in zip(call.norms, results, strict=True):
            if call.form == "operator":
                of = self._of_operator(norm, of)
            listed = of if norm.returns_both else (of,)
            count = 1 + norm.returns_both
            if type(listed) is not tuple or len(listed) != count:
                return Failure("result", f"expected {count} tensors, got {type(of).__name__}")
            if not all(isinstance(t, Tensor) for t in listed):
                return Failure("result", f"expected tensors, got {[type(t) for t in listed]}")
            made.append(dict(zip(("y", "residual_out"), listed, strict=False)))
        return made

    def _of_operator(self, norm: Norm, of: Any) -> Any:
        """The operators return rstd as well, those of a sum alone nothing else, or nothing."""
        if self.call.name.endswith("_"):
            written = tuple(norm.written.values())
            return written if norm.returns_both else written[0]
        if self.call.name.endswith("_out"):
            return (norm.out, norm.residual_out) if norm.returns_both else norm.out
        if isinstance(of, Tensor):
            return of
        return of[:2] if norm.returns_both else of[0]

    def _form(self, norm: Norm, made: dict[str, Tensor]) -> Iterator[Failure]:
        given = {"y": norm.out, "residual_out": norm.residual_out}
        if norm.in_place:
            given = {"y": getattr(norm, norm.op.written["out"]), "residual_out": norm.residual}
        dtypes = {"y": norm.y_dtype}
        if norm.returns_both:
            dtypes["residual_out"] = norm.residual.dtype
        shape = tuple(norm.x.shape)
        for name, t in made.items():
            if given[name] is not None:
                if t is not given[name]:
                    yield Failure("result", f"{name} is not the tensor that was given")
                continue
            if tuple(t.shape) != shape:
                yield Failure("shape", f"{name}: expected {shape}, got {tuple(t.shape)}")
            if t.dtype != dtypes[name]:
                yield Failure("dtype", f"{name}: expected {dtypes[name]}, got {t.dtype}")
            if t.stride() != packed(shape):
                yield Failure("not packed", f"{name} {shape}: got strides {t.stride()}")
            if t.device != norm.x.device:
                yield Failure("device", f"{name} is on {t.device}")
            if has_memory(t) and t.numel() and self.arena.holds(t):
                yield Failure("alias", f"{name} lies in memory that was given")
            yield from self._needs_gradient(norm, name, t)
        addresses = [t.data_ptr() for t in made.values() if has_memory(t) and t.numel()]
        if len(set(addresses)) < len(addresses):
            yield Failure("alias", "y and residual_out are one memory")

    def _needs_gradient(self, norm: Norm, name: str, t: Tensor) -> Iterator[Failure]:
        inputs = norm.tensors
        if name == "residual_out":
            of_next = ("next_weight", "next_bias") if norm.op.post else ()
            later = ("weight", "bias", "scale", "shift") if not norm.op.post else of_next
            inputs = {name: t for name, t in inputs.items() if name not in later}
        needs = self.call.grad_enabled() and any(t.requires_grad for t in inputs.values())
        if t.requires_grad != needs:
            yield Failure("requires_grad", f"{name}: expected {needs}, got {t.requires_grad}")

    def _memory(self, written: list[Tensor]) -> Iterator[Failure]:
        changed = self.arena.changed(self.before)
        if not changed.size:
            return
        outside = self.arena.outside(changed, written)
        if outside.size:
            where = self.arena.whose(int(outside[0]), self.call.tensors())
            yield Failure("memory", f"{outside.size} bytes that are no output's: {where}")

    def _versions(self, written: dict[str, Tensor]) -> Iterator[Failure]:
        """Autograd finds what is written by its version."""
        writes = {id(t) for t in written.values() if t.numel()}
        for name, t in self.call.tensors().items():
            if name in self.versions and t.numel():
                counted = t._version != self.versions[name]
                if counted != (id(t) in writes):
                    yield Failure("version", f"{name}: {'was' if counted else 'was not'} counted")

    def _numbers(self, values: Values, made: dict[str, Tensor]) -> Iterator[Failure]:
        total = None
        if "residual_out" in made:
            total = widened(made["residual_out"])
            if wrong := values.wrong_sum(total):
                yield Failure("sum", wrong)
        values.normalise(total)
        y = made["y"]
        if wrong := values.wrong(widened(y), y.dtype):
            yield Failure("values", wrong)

    # ---------------------------------------------------------------- gradients

    def _gradients(self, values: Values, made: dict[str, Tensor]) -> Iterator[Failure]:
        assert self.call.grads is not None
        of = {name.removeprefix("grad of "): t for name, t in self.call.grads.items()}
        outputs = {name: t for name, t in made.items() if name in of and t.requires_grad}
        leaves = {name: t for name, t in self.call.norms[0].tensors.items() if t.requires_grad}
        if not outputs:
            return
        try:
            with surroundings(self.call):
                gradients = torch.autograd.grad(
                    list(outputs.values()),
                    list(leaves.values()),
                    [of[name] for name in outputs],
                    allow_unused=True,
                )
        except Exception as error:
            yield Failure("backward pass", f"{type(error).__name__}: {error}")
            return
        expected = Gradients(
            values,
            made["y"],
            of["y"] if "y" in outputs else None,
            of["residual_out"] if "residual_out" in outputs else None,
        )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is None:
                if name in ("x", "residual", "gate") or "y" in outputs:
                    yield Failure("no gradient", name)
                continue
            if gradient.shape != leaf.shape or gradient.dtype != leaf.dtype:
                yield Failure("form of a gradient", f"{name}: {gradient.shape} {gradient.dtype}")
            elif self.call.norms[0].op.fused:
                continue  # whose values tests/conformance has
            elif wrong := expected.wrong(name, gradient):
                yield Failure(f"gradient of {name}", wrong)


def _words(faults: list[rules.Fault]) -> str:
    return ", or ".join(
        f"{'/'.join(kind.__name__ for kind in fault.kinds)} of {'/'.join(sorted(fault.names))}"
        f" ({fault.why})"
        for fault in faults
    )
