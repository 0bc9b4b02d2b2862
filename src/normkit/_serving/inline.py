"""Compiled calls as plain torch, which a compiler fuses with what is around them.

The other form of a compiled call is an operator of `operators.py`: a kernel, which nothing is fused
with.  `compile_mode` says which of the two it is.

What Dynamo traces is one operator, `torch.ops.normkit.inlined`, which torch takes apart when it
makes gradients.  If it traced the formula, it would look at each call whether 220 things more of
this package are as they were: a quarter of the time of such a call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import cast

import torch
from torch import Tensor

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.autograd import Inputs, NormContext, gradients, inputs_of, result_of
from normkit._serving.backends import falls_back, wanted_backend
from normkit._serving.checks import check
from normkit._serving.definition import define_formula
from normkit._serving.formula import Formula, values_of
from normkit._serving.operators import call_operator, is_sharded
from normkit._spec import FIELDS, Call, Gradients, Result
from normkit._version import VERSION

MODES = ("auto", "op", "inline")

# On the CPU the call of an operator costs more than its kernel saves up to about so many elements.
FEW_ELEMENTS = 1 << 17
# Of so many columns Inductor's CUDA kernels keep a row in registers; a longer one is read twice.
KEPT_BY_INDUCTOR = 1024

# A global, and not a thread's: Dynamo guards it, so that another mode compiles another graph.
_mode = "auto"


def compile_mode(mode: str) -> AbstractContextManager[None]:
    """Say what a norm is inside torch.compile: an operator of normkit, or plain torch.

    It holds for the whole process from the call on, or inside a `with` until its end, also one that
    is compiled itself.  A compiled function looks at each call which mode holds, and is compiled
    again for another.

    Args:
        mode: "op": an operator of `torch.ops.normkit`, with the kernels and the bits of eager
            calls.  "inline": plain torch with the same rounding points, which the compiler fuses
            with its neighbours.  "auto" (the default): the one that was measured to be faster;
            docs/torch.md has the figures.

    Raises:
        ValueError: mode is none of these.

    Example:
        >>> import normkit
        >>> with normkit.compile_mode("op"):
        ...     pass  # call what torch.compile returned
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    restored = _Restored(_mode)
    _set_mode(mode)
    return restored


class _Restored(AbstractContextManager[None]):
    """Sets at the end of a `with` what held before."""

    def __init__(self, before: str) -> None:
        self.before = before

    def __exit__(self, *_: object) -> None:
        _set_mode(self.before)


def _set_mode(mode: str) -> None:
    global _mode
    _mode = mode


def run_compiled(call: Call) -> Result:
    """Run a call that is being compiled or exported: plain torch, or an operator with a kernel."""
    # DTensor has rules for the operators, and a backend that was named has to run or to raise.
    if _mode == "op" or is_sharded(call.x) or not falls_back(wanted_backend()):
        return call_operator(call)  # whose fakes check it
    # Its own gradients, not those of torch's operators, for which Inductor would leave out casts.
    if call.fused and call.requires_grad():
        return call_operator(call)
    return _run(call) if _mode == "inline" or _is_better_fused(call) else call_operator(call)


def _is_better_fused(call: Call) -> bool:
    """What "auto" takes: docs/torch.md has the figures for the CPU, and the reasons for CUDA."""
    if torch.compiler.is_exporting():  # for programs that fuse, and for others that do not
        return False
    # Loads sympy, as whoever compiles has done.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    # A size that only data decide is taken for a small one.
    if call.x.is_cpu:
        return not guard_or_false(call.x.numel() > FEW_ELEMENTS)
    has_cuda_kernels = call.x.is_cuda and torch.version.hip is None
    return not (has_cuda_kernels and guard_or_false(call.x.shape[-1] > KEPT_BY_INDUCTOR))


def _run(call: Call) -> Result:
    """Check and run a call in plain torch, with the gradients that the kernels make."""
    # Whoever runs or differentiates an exported program does it by torch's operators.
    if torch.compiler.is_exporting():
        return dispatch.run_by_reference(check(call))
    made = _INLINED(*[getattr(call, name) for name in _TAKEN.split()])
    y = made[0] if call.out is None else call.out.copy_(made[0])
    if not call.adds:
        return y
    return y, made[1] if call.residual_out is None else call.residual_out.copy_(made[1])


def _formula(*values: object) -> list[Tensor]:
    """What `normkit::inlined` is: the outputs of a call, none of which is written."""
    call = Call(*values)  # type: ignore[arg-type]
    with reference.compiled():
        check(call)
        if call.out is not None:
            call = replace(call, out=None, out_dtype=call.out.dtype)
        made = _made(replace(call, residual_out=None, in_place=False))
    return list(made) if isinstance(made, tuple) else [made]


def _made(call: Call) -> Result:
    if not call.requires_grad():
        return dispatch.run_by_reference(call)
    made: Result = _Inline.apply(call, *inputs_of(call))  # type: ignore[no-untyped-call]
    return made


class _Inline(torch.autograd.Function):
    """Saves what the kernels save, and rounds the gradients where they do."""

    @staticmethod
    def forward(ctx: NormContext, call: Call, *inputs: Tensor | None) -> Result:
        saved = dispatch.save_by_reference(call)
        return result_of(ctx, values_of(call), cast(Inputs, inputs), saved)

    @staticmethod
    def backward(
        ctx: NormContext, grad_y: Tensor, grad_residual_out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with reference.compiled():
            grads_out = grad_y, grad_residual_out
            return None, *gradients(ctx, needed, *grads_out, ctx.saved_tensors, _by_reference)


def _by_reference(
    formula: Formula, wanted: dispatch.Wanted, _backend: str, *kept: Tensor | None
) -> Gradients:
    return dispatch.backward_by_reference(formula, wanted, *kept[:-1])  # type: ignore[arg-type]


# All of a call but for a cache, which only several norms in one launch have.  Dynamo makes one
# guard of a text.
_NAMES = tuple(field.name for field in fields(Call) if field.name not in ("cache", "slots"))
_TAKEN = " ".join(_NAMES)


def _type_of(name: str) -> str:
    if name in ("kind", "in_place"):
        return "int" if name == "kind" else "bool"
    declared = FIELDS[name].type
    return "Tensor?" if declared == "Tensor" and name != "x" else declared


# Under the version's name: torch keeps on disk what it made of a graph, and would take the formula
# of another version for this one.
_INLINED = define_formula(
    "inlined",
    "v" + "".join(c if c.isalnum() else "_" for c in VERSION),
    ", ".join(f"{_type_of(name)} {name}" for name in _NAMES),
    "Tensor[]",
    _formula,
)
