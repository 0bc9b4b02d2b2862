"""What the GPU benchmarks measure: cases, the buffers of a call, and who is timed on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from normkit._bench import DTYPES, NORMKIT, TORCH

COMPILED = "torch.compile"
RIVALS = ("liger", "quack", "flashinfer", "vllm")
EPS = 1e-6
ADDING = ("add_rms_norm", "add_layer_norm")

TOKENS = (1, 8, 64, 512, 4096, 32768)
HEAD_DIMS = (64, 96, 128, 192, 256)
HEADS = (9, 40, 72)  # queries and keys of 8 + 1, 32 + 8 and 64 + 8 heads, in one call
SIZES = (512, 1024, 2048, 3072, 4096, 5120, 7168, 8192, 12288, 16384)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384, 32768)
LONG_SIZES = (32768, 65536, 131072, 262144)
LONG_ROWS = (1, 8, 64, 1024, 8192)


# ------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One op on one shape: (rows, n), or (tokens, heads, head_dim)."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # "strided": a slice of rows with more in them; "offset": 2 bytes on
    rivals: bool = False  # time everything that is installed, and torch.compile

    @property
    def adds(self) -> bool:
        return self.op in ADDING

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def moved(self) -> int:
        """Bytes that have to be read and written; the weights, read once, are not counted."""
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return self.elements * width * (4 if self.adds else 2)

    @property
    def held(self) -> int:
        """Bytes of one set of buffers."""
        return self.moved * 2 if self.layout == "strided" else self.moved

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"{self.op} {self.dtype} {self.label}{layout}"


def headline_cases() -> Iterator[Case]:
    """What the headline figures are made of; they come first, whatever the time allows after."""
    for shape in ((16384, 8192), (32768, 4096), (16384, 16384), (8192, 65536)):
        yield Case("rms_norm", "bfloat16", shape, rivals=shape[1] <= 16384)
        yield Case("add_rms_norm", "bfloat16", shape, rivals=shape == (16384, 8192))
    for head_dim in (64, 128):
        yield Case("head_norm", "bfloat16", (32768, 40, head_dim), rivals=True)
    yield Case("layer_norm", "bfloat16", (16384, 8192), rivals=True)


def rival_cases() -> Iterator[Case]:
    """Shapes between decoding and prefill on which everyone is timed."""
    shapes = itertools.product((1, 16, 64, 1024, 4096), (4096, 8192))
    for (rows, n), op in itertools.product(shapes, ("rms_norm", "add_rms_norm")):
        yield Case(op, "bfloat16", (rows, n), rivals=True)
    for shape in ((4096, 1024), (32768, 1024), (1024, 5120), (1024, 65536), (1024, 262144)):
        yield Case("rms_norm", "bfloat16", shape, rivals=True)
    for shape in ((64, 4096), (4096, 4096), (1024, 65536)):
        yield Case("layer_norm", "bfloat16", shape, rivals=True)
    for tokens in (1, 64, 4096):
        yield Case("head_norm", "bfloat16", (tokens, 40, 128), rivals=True)


def spot_cases() -> Iterator[Case]:
    """Other dtypes, layouts, odd sizes, and the fused add of a LayerNorm."""
    for dtype, op in itertools.product(("float16", "float32"), ("rms_norm", "add_rms_norm")):
        for shape in ((64, 4096), (16384, 8192), (1024, 65536)):
            yield Case(op, dtype, shape)
    for shape in ((64, 4096), (4096, 8192), (16384, 8192)):
        yield Case("add_layer_norm", "bfloat16", shape)
    for shape in ((64, 4095), (16384, 4095), (64, 5000), (16384, 5000), (16384, 4097)):
        yield Case("rms_norm", "bfloat16", shape)
    for layout in ("strided", "offset"):
        yield Case("rms_norm", "bfloat16", (16384, 4096), layout)
        yield Case("head_norm", "bfloat16", (4096, 40, 128), layout)
    yield Case("add_rms_norm", "bfloat16", (16384, 4096), "strided")
    yield Case("head_norm", "float16", (4096, 40, 128))


def grid_cases() -> Iterator[Case]:
    """The whole grid in bfloat16, large and small mixed, so that a cut takes some of each."""
    shapes = [*itertools.product(ROWS, SIZES), *itertools.product(LONG_ROWS, LONG_SIZES)]
    spread = sorted(range(len(shapes)), key=lambda i: (i * 7) % len(shapes))
    for i in spread:
        for op in ("rms_norm", "add_rms_norm"):
            yield Case(op, "bfloat16", shapes[i])
        if shapes[i][0] in (1, 64, 1024, 16384):
            yield Case("layer_norm", "bfloat16", shapes[i])
    for shape in itertools.product(TOKENS, HEADS, HEAD_DIMS):
        yield Case("head_norm", "bfloat16", shape)


def cases(quick: bool) -> list[Case]:
    """In the order in which they matter; each once, with rivals if it has them anywhere."""
    wanted: Iterable[Case]
    if quick:
        few = [c for c in rival_cases() if c.shape in ((64, 4096), (4096, 8192), (64, 40, 128))]
        strided = [c for c in spot_cases() if c.layout == "strided" and not c.adds]
        odd = Case("rms_norm", "bfloat16", (16384, 4095))
        wanted = itertools.chain(headline_cases(), few, strided, [odd])
    else:
        wanted = itertools.chain(headline_cases(), rival_cases(), spot_cases(), grid_cases())
    unique: dict[Case, Case] = {}
    for case in wanted:
        unique.setdefault(replace(case, rivals=True), case)
    return list(unique.values())


def latency_cases(quick: bool) -> list[Case]:
    shapes = list(itertools.product((1, 8, 64), (4096, 8192)))
    found = [Case("rms_norm", "bfloat16", shape) for shape in shapes]
    adding = shapes[:1] + shapes[-1:] if quick else shapes
    found += [Case("add_rms_norm", "bfloat16", shape) for shape in adding]
    if not quick:
        found += [Case("rms_norm", "bfloat16", shape) for shape in ((16, 512), (1, 65536))]
        found += [Case("layer_norm", "bfloat16", shape) for shape in ((1, 4096), (64, 8192))]
    found += [Case("head_norm", "bfloat16", (tokens, 40, 128)) for tokens in (1, 64)]
    return found


# ----------------------------------------------------------------------------------------- buffers


class Buffers(NamedTuple):
    """What one call reads and writes."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor
    residual_out: Tensor

    def next(self) -> Buffers:
        """Reads what these write, and writes where these read from."""
        return self._replace(
            x=self.y, y=self.x, residual=self.residual_out, residual_out=self.residual
        )


def make_buffers(case: Case, sets: int, device: torch.device | str = "cuda") -> list[Buffers]:
    """`sets` sets; weights of their own too, since those of a model's next layer are as cold."""
    dtype = DTYPES[case.dtype]

    def values() -> Tensor:
        if case.layout == "contiguous":
            return torch.empty(case.shape, dtype=dtype, device=device).normal_(0.5, 1.5)
        if case.layout == "offset":
            flat = torch.empty(case.elements + 1, dtype=dtype, device=device).normal_(0.5, 1.5)
            return flat[1:].view(case.shape)
        *outer, rows, n = case.shape
        wide = (*outer, 2 * rows, n) if outer else (rows, 2 * n)
        packed = torch.empty(wide, dtype=dtype, device=device).normal_(0.5, 1.5)
        return packed[..., :rows, :] if outer else packed[:, :n]

    def affine(mean: float) -> Tensor:
        return torch.empty(case.shape[-1], dtype=dtype, device=device).normal_(mean, 0.1)

    made = []
    for _ in range(sets):
        x = values()
        y = torch.empty(case.shape, dtype=dtype, device=device)
        residual, residual_out = (values(), torch.empty_like(y)) if case.adds else (x, y)
        made.append(Buffers(x, residual, affine(1.0), affine(0.0), y, residual_out))
    return made


# -------------------------------------------------------------------------------------- candidates

Call = Callable[[Buffers], Any]


def _normkit(b: Buffers, op: str) -> Any:
    if op == "rms_norm":
        return normkit.rms_norm(b.x, b.weight, out=b.y)
    if op == "layer_norm":
        return normkit.layer_norm(b.x, b.weight, b.bias, out=b.y)
    if op == "head_norm":
        return normkit.head_norm(b.x, b.weight, out=b.y)
    outs: dict[str, Any] = {"out": b.y, "residual_out": b.residual_out}
    if op == "add_rms_norm":
        return normkit.add_rms_norm(b.x, b.residual, b.weight, **outs)
    return normkit.add_layer_norm(b.x, b.residual, b.weight, b.bias, **outs)


def _torch(b: Buffers, op: str) -> Any:
    x = b.x
    if op in ADDING:
        x = torch.add(b.x, b.residual, out=b.residual_out)
    if op in ("layer_norm", "add_layer_norm"):
        return F.layer_norm(x, x.shape[-1:], b.weight, b.bias)
    return F.rms_norm(x, x.shape[-1:], b.weight, EPS)


def _formula(op: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    if op in ADDING:
        x = x + residual
    if op in ("layer_norm", "add_layer_norm"):
        y = F.layer_norm(x, x.shape[-1:], weight, bias)
    else:
        y = F.rms_norm(x, x.shape[-1:], weight, EPS)
    return (y, x) if op in ADDING else y


def _compiled(case: Case) -> Call:
    torch.compiler.reset()  # one static version per shape and dtype, never a dynamic one
    op = case.op

    def formula(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return _formula(op, x, residual, weight, bias)

    compiled = torch.compile(formula, dynamic=False, fullgraph=True)
    return lambda b: compiled(b.x, b.residual, b.weight, b.bias)


class NotOffered(Exception):
    """A competitor has no such op."""


def _liger(case: Case) -> Call:
    from liger_kernel.transformers import functional as liger

    # "gemma" computes in float32 and rounds once, as normkit does unless told otherwise.
    if case.op in ("rms_norm", "head_norm"):
        return lambda b: liger.liger_rms_norm(b.x, b.weight, EPS, 0.0, "gemma", False)
    if case.op == "layer_norm":
        return lambda b: liger.liger_layer_norm(b.x, b.weight, b.bias, 1e-5)
    if case.op == "add_rms_norm":
        add = liger.liger_fused_add_rms_norm
        return lambda b: add(b.x, b.residual, b.weight, EPS, 0.0, "gemma", False)
    raise NotOffered(case.op)


def _quack(case: Case) -> Call:
    import quack

    if case.op in ("rms_norm", "head_norm"):
        return lambda b: quack.rmsnorm(b.x, b.weight, eps=EPS)
    if case.op == "add_rms_norm":
        # It normalises the float32 sum and returns the rounded one.
        return lambda b: quack.rmsnorm(b.x, b.weight, residual=b.residual, eps=EPS, prenorm=True)
    raise NotOffered(f"{case.op} with weights of x's dtype")


def _flashinfer(case: Case) -> Call:
    from flashinfer import norm

    if case.op in ("rms_norm", "head_norm"):
        return lambda b: norm.rmsnorm(b.x, b.weight, EPS, out=b.y)
    if case.op == "add_rms_norm":  # in place, both
        return lambda b: norm.fused_add_rmsnorm(b.x, b.residual, b.weight, EPS)
    raise NotOffered(case.op)


def _vllm(case: Case) -> Call:
    from vllm import _custom_ops as ops

    if case.op in ("rms_norm", "head_norm"):
        return lambda b: ops.rms_norm(b.y, b.x, b.weight, EPS)
    if case.op == "add_rms_norm":  # in place, both
        return lambda b: ops.fused_add_rms_norm(b.x, b.residual, b.weight, EPS)
    raise NotOffered(case.op)


_MAKERS: dict[str, Callable[[Case], Call]] = {
    COMPILED: _compiled,
    "liger": _liger,
    "quack": _quack,
    "flashinfer": _flashinfer,
    "vllm": _vllm,
}
_IN_PLACE = ("flashinfer", "vllm")


def output_of(name: str, case: Case, result: Any, buffers: Buffers) -> Tensor:
    """Where a candidate has put the norm."""
    if name in _IN_PLACE:
        return buffers.x if case.adds else buffers.y
    y: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return y


def error_of(name: str, case: Case, call: Call) -> str:
    """Empty, or how far a candidate is from torch: a norm that is wrong is fast for nothing."""
    few = replace(case, shape=(min(case.shape[0], 64), *case.shape[1:]))
    buffers = make_buffers(few, 1)[0]
    wide = _formula(case.op, *(t.float().clone() for t in buffers[:4]))
    expected = wide[0] if case.adds else wide
    result = call(buffers)
    got = output_of(name, case, result, buffers).float().reshape(expected.shape)
    tolerance = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[case.dtype]
    error = ((got - expected).abs() / (1 + expected.abs())).max().item()
    return "" if error < tolerance else f"wrong by {error:.2g} relative to 1 + |y|"


def candidates(case: Case, missing: dict[str, str]) -> tuple[dict[str, Call], dict[str, str]]:
    """Who can be timed on a case, and why the others cannot.

    `missing` remembers who is not installed, so that each is looked for once.
    """
    op = case.op
    found: dict[str, Call] = {
        NORMKIT: lambda b: _normkit(b, op),
        TORCH: lambda b: _torch(b, op),
    }
    without: dict[str, str] = {}
    for name, maker in _MAKERS.items() if case.rivals else ():
        if name in missing:
            without[name] = missing[name]
            continue
        try:
            call = maker(case)
            # Compiled from the formula that the others are held to; twice is once too often.
            wrong = "" if name == COMPILED else error_of(name, case, call)
        except NotOffered as error:
            without[name] = f"has no {error}"
            continue
        except ImportError as error:
            without[name] = missing[name] = f"{type(error).__name__}: {error}"
            continue
        except Exception as error:
            without[name] = first_line(error)
            torch.cuda.synchronize()  # raises where the error was one of the device
            continue
        if wrong:
            without[name] = wrong
        else:
            found[name] = call
    return found, without


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
