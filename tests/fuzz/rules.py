"""What of a call must be refused, and under which names: from its arguments alone.

The rules are those of the docstrings and of docs/numerics.md, written down once more.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fuzz.memory import element_bytes, packed, span
from fuzz.model import AFFINE, FLAGS, INDICES, INPUTS, NUMBERS, Call, Norm, has_memory, is_dense
from normkit._spec import MODULATORS

Kinds = tuple[type[Exception], ...]
TYPE: Kinds = (TypeError,)
VALUE: Kinds = (ValueError,)
RUNTIME: Kinds = (RuntimeError,)
EITHER: Kinds = (TypeError, ValueError)

STORED = (torch.float32, torch.float16, torch.bfloat16)


class Fault(NamedTuple):
    """One thing that is wrong: the names that the error may begin with, and its types."""

    names: frozenset[str]
    kinds: Kinds
    why: str


class Verdict:
    """What must be refused, and what may be."""

    def __init__(self) -> None:
        self.must: list[Fault] = []
        self.may: list[Fault] = []

    def refuse(self, names: str | set[str], kinds: Kinds, why: str, *, surely: bool = True) -> None:
        fault = Fault(frozenset({names} if isinstance(names, str) else names), kinds, why)
        (self.must if surely else self.may).append(fault)


def judge(call: Call) -> Verdict:
    verdict = Verdict()
    for name, kinds in call.wrong:
        verdict.refuse(name, kinds, "made wrong")
    for norm in call.norms:
        _judge_norm(call, norm, verdict)
    if call.form == "parallel":
        _judge_lists(call, verdict)
    return verdict


def _judge_norm(call: Call, norm: Norm, verdict: Verdict) -> None:
    _types(norm, verdict)
    needs_gradient = call.grad_enabled() and any(t.requires_grad for t in norm.tensors.values())
    _options(norm, verdict, needs_gradient)
    if not isinstance(norm.x, Tensor):
        return
    _kinds_of_tensors(norm, verdict)
    _shapes(norm, verdict)
    _written(call, norm, verdict)
    _memory(norm, verdict)
    if call.backend == "cpu" and (norm.x.dtype == torch.float64 or norm.x.is_meta):
        verdict.refuse("use_backend", VALUE, "the kernels take no such x")
    elif call.backend == "cpu" and may_have_no_kernel(norm):
        verdict.refuse("use_backend", VALUE, "roundings that no kernel has", surely=False)


def may_have_no_kernel(norm: Norm) -> bool:
    """Whether docs/fusions.md leaves some of such calls to torch."""
    given = [t for name, t in norm.tensors.items() if name in (*MODULATORS, "cos")]
    if not all(is_dense(t) for t in given):
        return True
    if norm.op.rotated:
        rounds = norm.round_norm is True or norm.round_each is True
        return rounds and any(t.shape[-1:] == (0,) for t in given)
    of_rows = [t for t in given if t.ndim > 1 and math.prod(t.shape[:-1]) != 1]
    alike = len({tuple(t.shape) for t in of_rows}) < 2
    tangled = any(t.stride() != packed(tuple(t.shape)) for t in of_rows)
    return norm.round_each is True or tangled or not alike


def _types(norm: Norm, verdict: Verdict) -> None:
    double = isinstance(norm.x, Tensor) and norm.x.dtype == torch.float64
    allowed = (*STORED, torch.float64)
    for name, t in norm.given.items():
        if not isinstance(t, Tensor):
            verdict.refuse(norm.name(name), TYPE, "no tensor")
        elif name in INDICES:
            if t.dtype not in (torch.int32, torch.int64):
                verdict.refuse(name, TYPE, f"is {t.dtype}")
        elif t.dtype not in (allowed if double or name == "x" else STORED):
            verdict.refuse(norm.name(name), TYPE, f"is {t.dtype}")
    tensors = norm.tensors
    of_sum = "out" if norm.is_sum else "residual_out"
    for one, two in ((of_sum, "residual"), ("sin", "cos")):
        if {one, two} <= tensors.keys() and tensors[one].dtype != tensors[two].dtype:
            verdict.refuse(norm.name(one), TYPE, f"is not of {two}'s dtype")
    if norm.out_dtype is not None:
        if norm.out_dtype not in (allowed if double else STORED):
            verdict.refuse("out_dtype", TYPE, "wrong")
        elif "out" in tensors and not norm.in_place and tensors["out"].dtype != norm.out_dtype:
            verdict.refuse({norm.name("out"), "out_dtype"}, TYPE, "two dtypes")


def _options(norm: Norm, verdict: Verdict, needs_gradient: bool) -> None:
    double = isinstance(norm.x, Tensor) and norm.x.dtype == torch.float64
    largest = torch.finfo(torch.float64 if double else torch.float32).max
    for name in NUMBERS:
        value = getattr(norm, name)
        if value is None and name.endswith("eps"):
            continue
        if isinstance(value, (bool, str, bytes, Tensor)) or not hasattr(value, "__float__"):
            verdict.refuse(name, TYPE, "no number")
            continue
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not abs(number) <= largest or (name.endswith("eps") and number < 0):
            verdict.refuse(name, VALUE, "not in range")
    for name in FLAGS:
        if not isinstance(getattr(norm, name), bool):
            # What is not looked at without a gradient may be wrong unnoticed.
            surely = name != "memory_efficient" or needs_gradient
            verdict.refuse(name, TYPE, "no bool", surely=surely)
    if norm.ending is not None and math.prod(norm.ending or (0,)) == 0:
        sizes = {"normalized_shape", "num_heads", "head_dim"}
        verdict.refuse(sizes, VALUE, "a size of nothing")  # by the constructor


def _kinds_of_tensors(norm: Norm, verdict: Verdict) -> None:
    for name, t in norm.tensors.items():
        shown = norm.name(name)
        if t.is_nested:
            verdict.refuse(shown, EITHER, "nested")
        elif t.layout != torch.strided:
            verdict.refuse(shown, EITHER, "sparse")
        elif t.device != norm.x.device:
            verdict.refuse({shown, norm.name("x")}, VALUE, "on another device")
        elif not t.is_meta and t.numel() and t.data_ptr() == 0:
            verdict.refuse(shown, VALUE, "freed")


def _shapes(norm: Norm, verdict: Verdict) -> None:
    if norm.x.is_nested:
        return
    shape = tuple(norm.x.shape)
    if len(shape) < 1 + norm.per_head:
        by_groups = {"group_size"} if norm.group_size is not None else set()
        verdict.refuse({norm.name("x")} | by_groups, VALUE, "too few dimensions")
        return
    if norm.ending is not None:
        _ending(norm, shape, verdict)
    elif shape[-1] == 0:
        verdict.refuse(norm.name("x"), VALUE, "rows of no elements")
    size = norm.group_size
    if type(size) is int and size > 0 and shape[-1] % size:
        verdict.refuse("group_size", VALUE, "does not divide x's last dimension")
    for name, t in norm.tensors.items():
        if t.is_nested:
            continue
        found = tuple(t.shape)
        if name in ("residual", "out", "residual_out", "z") and found != shape:
            verdict.refuse(norm.name(name), VALUE, "not of x's shape")
        if name in AFFINE and norm.ending is None:
            has_heads = norm.op.per_head and norm.group_size is None
            fits = found == shape[-1:] or (has_heads and found == shape[-2:])
            if not fits:
                verdict.refuse(norm.name(name), VALUE, "not of n elements")
        if name in MODULATORS and not _is_per_row(found, shape):
            verdict.refuse(name, VALUE, "no row for each of x's")
    if {"cos", "sin"} <= norm.tensors.keys():
        _shapes_of_rotation(norm, shape, verdict)


def _is_per_row(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    fits = all(size in (1, wanted) for size, wanted in zip(found[:-1], shape, strict=False))
    return 1 <= len(found) <= len(shape) and found[-1] == shape[-1] and fits


def _shapes_of_rotation(norm: Norm, shape: tuple[int, ...], verdict: Verdict) -> None:
    if norm.cos.is_nested or norm.sin.is_nested:
        return
    cos, sin, tokens = tuple(norm.cos.shape), tuple(norm.sin.shape), shape[:-2]
    if cos != sin:
        verdict.refuse({"cos", "sin"}, VALUE, "not of one shape")
    for name, of in (("cos", cos), ("sin", sin)):
        if not of or 2 * of[-1] > shape[-1]:
            verdict.refuse({name, "cos"}, VALUE, "too many columns")
    if not isinstance(norm.positions, Tensor):
        if not _is_per_token(cos[:-1], tokens):
            verdict.refuse("cos", VALUE, "no row for each token")
        return
    if len(cos) != 2:
        verdict.refuse("cos", VALUE, "no table")
    if not norm.positions.is_nested and not _is_per_token(tuple(norm.positions.shape), tokens):
        verdict.refuse("positions", VALUE, "none for each token")


def _is_per_token(found: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    last = tokens[len(tokens) - len(found) :]
    fits = all(size in (1, wanted) for size, wanted in zip(found, last, strict=False))
    return len(found) <= len(tokens) and fits


def _ending(norm: Norm, shape: tuple[int, ...], verdict: Verdict) -> None:
    assert norm.ending is not None
    affine = {"x", "weight", "bias"}
    if norm.ending and shape[-len(norm.ending) :] != norm.ending:
        verdict.refuse(affine, VALUE, "x ends in another shape")


def _written(call: Call, norm: Norm, verdict: Verdict) -> None:
    written = norm.written
    for name, t in written.items():
        shown = norm.name(name)
        if not is_dense(t):
            continue
        if t.is_neg():
            surely = norm.group_size is None or t.numel() > 0
            verdict.refuse(shown, VALUE, "written, and negated lazily", surely=surely)
        takes_strides = not (norm.op.fused or norm.op.adds)
        if not takes_strides and t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
            # As a row, a group of one column has no stride, and one of no tensor's has that of any.
            is_row = norm.group_size is None or (norm.group_size != 1 and t.numel() > 0)
            why = "written, and its last stride is not 1"
            verdict.refuse(shown, VALUE, why, surely=is_row)
        if t.is_inference() and call.mode != "inference":
            verdict.refuse(shown, RUNTIME, "an inference tensor")
    if written and call.grad_enabled():
        needing = {norm.name(name) for name, t in norm.tensors.items() if t.requires_grad}
        if needing:
            verdict.refuse(needing, RUNTIME, "written where a gradient is needed")


# ---------------------------------------------------------------- memory


def _memory(norm: Norm, verdict: Verdict) -> None:
    tensors = {name: t for name, t in norm.tensors.items() if has_memory(t)}
    written = {name: t for name, t in norm.written.items() if has_memory(t)}
    for name, t in written.items():
        if not _nests(t):
            shares = len(np.unique(element_bytes(t))) < t.numel()
            why = "written, and its elements share memory" if shares else "rows in a tangle"
            verdict.refuse(norm.name(name), VALUE, why, surely=shares)
        for other_name, other in tensors.items():
            if other_name in INPUTS and other_name not in written:
                names = {norm.name(name), norm.name(other_name)}
                _apart(names, t, other, verdict, may_be_same=_may_be_same(norm, name, other_name))
    for one, two in itertools.combinations(written, 2):
        names = {norm.name(one), norm.name(two)}
        _apart(names, written[one], written[two], verdict, may_be_same=False)


def _may_be_same(norm: Norm, written: str, other: str) -> bool:
    if other in (*MODULATORS, "cos", "sin"):  # which rows share
        return False
    # A sum is written before the weights are read.
    early = norm.op.post or (norm.op.adds and written == norm.sum_out)
    return not (early and other in AFFINE)


def _judge_lists(call: Call, verdict: Verdict) -> None:
    """What one device writes, no other may read or write."""
    for one, two in itertools.permutations(call.norms, 2):
        for name, t in one.written.items():
            for other_name, other in two.tensors.items():
                if has_memory(t) and has_memory(other):
                    names = {one.name(name), two.name(other_name)}
                    _apart(names, t, other, verdict, may_be_same=False)


def _apart(
    names: set[str], written: Tensor, other: Tensor, verdict: Verdict, *, may_be_same: bool
) -> None:
    begin, end = _range(written)
    other_begin, other_end = _range(other)
    if end <= other_begin or other_end <= begin:
        return
    same_layout = written.dtype == other.dtype and _layout(written) == _layout(other)
    if may_be_same and begin == other_begin and same_layout and _longer(written) == _longer(other):
        # The same memory in another shape: neither promised nor ruled out.
        if written.shape != other.shape:
            verdict.refuse(names, VALUE, "the same memory, another shape", surely=False)
    elif _share_bytes(written, other):
        verdict.refuse(names, VALUE, "memory that overlaps")
    elif not same_layout:
        verdict.refuse(names, VALUE, "rows of one between rows of the other", surely=False)


def _range(t: Tensor) -> tuple[int, int]:
    if t.numel() == 0:
        return 0, 0
    return t.data_ptr(), t.data_ptr() + span(tuple(t.shape), t.stride()) * t.element_size()


def _longer(t: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes of a tensor's dimensions longer than 1."""
    return [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _layout(t: Tensor) -> list[tuple[int, int]]:
    """The same, but for their order outside."""
    dims = _longer(t)
    if t.ndim and t.shape[-1] > 1:
        return [*sorted(dims[:-1]), dims[-1]]
    return [*sorted(dims), (1, 1)]


def _share_bytes(one: Tensor, two: Tensor) -> bool:
    item = math.gcd(one.element_size(), two.element_size())
    bytes_of = [
        (element_bytes(t)[:, None] + np.arange(0, t.element_size(), item)).ravel()
        for t in (one, two)
    ]
    return len(np.intersect1d(*bytes_of)) > 0


def _nests(t: Tensor) -> bool:
    """Whether each dimension's stride is beyond all that lies inside it."""
    inside = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < inside:
                return False
            inside += (size - 1) * stride
    return True
