"""What a module computes, measured: it is run on rows that tell one norm from another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import nn

from normkit.recognition._forms import measured_form
from normkit.recognition._gating import Gating, measured_gating
from normkit.recognition._identity import identity
from normkit.recognition._layout import measured_layout
from normkit.recognition._probe import (
    Probe,
    Unknown,
    measured_dtypes,
    measured_eps,
    measured_function,
)
from normkit.recognition._result import Form, Function, Recognition
from normkit.recognition._screen import refusal, widths

__all__ = ["Form", "Function", "Recognition", "recognise"]

# Modules of one class with the same numbers, shapes and code compute the same: of the 500 norms of
# a model some five are measured.
_KNOWN: WeakKeyDictionary[type, dict[Hashable, Recognition]] = WeakKeyDictionary()
_LOCK = threading.RLock()


def recognise(module: nn.Module) -> Recognition:
    """Measure what a module computes: which norm, for each dtype of x, or why that is not known.

    A copy without hooks, with random parameters and buffers, is run on the CPU on rows that tell
    the candidates apart.  In float32 the error against float64 decides what it computes, with eps
    measured where nothing else is left; in 16 bits the share of equal elements decides where it
    rounds.  The module itself is not called and not changed, and may be on any device, meta too.

    Args:
        module: a module without children that takes x (..., n), or x (batch, n, ...), and perhaps a
            gate.

    Returns:
        A `Recognition`; its `reason` is "" if the module is a norm that normkit computes.

    Raises:
        TypeError: module is no torch.nn.Module.

    The weights that the module has make no difference: a result holds for all weights of these
    shapes and dtypes.  Of float64 nothing is said, which most models compute in float32.

    Example:
        >>> import torch
        >>> from normkit import recognise
        >>> spec = recognise(torch.nn.LayerNorm(64, eps=1e-6)).specs[torch.float32]
        >>> spec.kind, spec.eps, spec.has_bias
        ('layer', 1e-06, True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    why = refusal(module)
    if why is not None:
        return Recognition(reason=why)
    key = identity(module)
    with _undisturbed():
        if type(torch.empty(0)) is not torch.Tensor:
            return Recognition(reason="nothing is computed here, as in torch's FakeTensorMode")
        if key is None:
            return _measured(module)
        known = _KNOWN.setdefault(type(module), {})
        if key not in known:
            known[key] = _measured(module)
        return known[key]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Measure the same whatever the caller has set, and leave it as it is.

    One thread at a time, since Python's warning filters, which a probe sets, are the process's.
    """
    cpu = torch.device("cpu")
    # as a context it would double the time, since every call of torch then goes through Python
    on_cpu = contextlib.nullcontext() if torch.get_default_device() == cpu else cpu
    with (
        _LOCK,
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        on_cpu,
        torch.random.fork_rng(devices=[]),
    ):
        yield


def _measured(module: nn.Module) -> Recognition:
    """Every width that a module takes must give the same answer.

    A norm without a weight takes any, and at one width an L2 norm is an rms norm with other
    numbers.
    """
    first, *others = (_measured_at(module, n) for n in widths(module))
    if any(not first.computes_as(other) for other in others):
        return Recognition(reason="what it computes depends on the width of x")
    return first


def _measured_at(module: nn.Module, n: int) -> Recognition:
    try:
        form = measured_form(module, n)
        probe = Probe(module, n, form, torch.float32)
        function = measured_function(probe, measured_eps(probe))
        return _over_dtypes(module, n, form, function)
    except Unknown as why:
        return Recognition(reason=str(why))


def _over_dtypes(module: nn.Module, n: int, form: Form, function: Function) -> Recognition:
    probe = Probe(module, n, form)
    specs, shares, reasons = measured_dtypes(probe, function)
    own = probe.dtype or torch.float32
    reason = "" if own in specs else reasons.get(own, f"it does not compute in {own}")
    gating = measured_gating(probe, function, specs) if form.gate else Gating()
    if not reason:
        reason = gating.reasons.get((own, own), "")
    shares |= {dtype: s for (dtype, other), s in gating.shares.items() if dtype == other}
    if module.training and not reason and probe.differs_in_eval():
        reason = "differs between training and evaluation"
    return Recognition(
        specs=specs,
        equal_shares=shares,
        reasons=reasons,
        reason=reason,
        function=function,
        form=form,
        layout="" if reason else measured_layout(probe),
        writes_x=not reason and probe.writes_x(),
        round_each=gating.round_each,
        gateless=frozenset(gating.gateless),
    )
