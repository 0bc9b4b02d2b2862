"""How what a module gives lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.recognition._probe import BIG_GATE, Probe, Unknown
from normkit.recognition._result import Layout


def measured_layout(probe: Probe) -> Layout:
    """How y lies where x is not contiguous."""
    rows = probe.rows(probe.dtype or torch.float32, 1e-6)
    if probe.form.channels_first:
        return _of_images(probe, probe.in_x(rows[:12], (2, 2, 3)))
    return _of_rows(probe, probe.in_x(rows))


def _of_rows(probe: Probe, x: Tensor) -> Layout:
    """Where the first two dimensions of x are transposed."""
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    if not probe.call(x, BIG_GATE).is_contiguous():
        return ""
    try:
        strides = probe.call(transposed, BIG_GATE).stride()
    except Unknown:  # as of a view that cannot be
        return ""
    if strides == transposed.stride():
        return "as x"
    return "packed" if strides == x.stride() else ""


def _of_images(probe: Probe, x: Tensor) -> Layout:
    """Where x is channels-last, or a part of the channels of another."""
    last = x.contiguous(memory_format=torch.channels_last)
    part = torch.cat([x, x], 1)[:, : probe.n]
    try:
        of_each = [probe.call(t, BIG_GATE).stride() for t in (x.clone(), last.clone(), part)]
    except Unknown:
        return ""
    if of_each[:2] == [x.stride(), last.stride()]:
        return "as x"
    return "packed" if of_each == [last.stride()] * 3 else ""
