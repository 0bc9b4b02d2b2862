"""What is measured on a GPU, in which buffers, and who is timed on them.

Candidates are statements over the names of `_bench.operands`, as on the CPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from normkit import _bench
from normkit._bench import DTYPES, NORMKIT, OPS, TORCH, Op

COMPILED, ROPE = "torch.compile", "norm_rope_"


class Case(NamedTuple):
    """One op on one shape: (rows, n), or (tokens, heads, head_dim)."""

    op: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # or "strided": a slice of rows with more in them
    weight: str = ""  # its dtype, where that is not x's
    rivals: bool = False  # time everything that is installed, and torch.compile

    @property
    def like(self) -> Op:
        """The op that other libraries have: heads with one weight for all are rows like others."""
        return OPS["rms_norm" if self.rotates else self.op.replace("head_norm", "rms_norm")]

    @property
    def rotates(self) -> bool:
        """Whether rotary embedding stands behind the norm of heads, in place."""
        return self.op == ROPE

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the function takes."""
        return ("x", "cos", "sin", "weight") if self.rotates else self.like.tensors

    @property
    def statements(self) -> dict[str, str]:
        """What normkit does, and what torch does instead."""
        if self.rotates:
            given = ", ".join(self.tensors)
            return {NORMKIT: f"{self.op}({given})", TORCH: f"x.copy_(roped({given}))"}
        return {NORMKIT: replace(self.like, function=self.op).normkit, TORCH: self.like.torch}

    @property
    def moved(self) -> int:
        """Bytes that have to be read and written; the weights, read once, are not counted."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize * (4 if self.like.adds else 2)

    @property
    def label(self) -> str:
        """The shape, and what is unusual about the case."""
        unusual = [self.layout] * (self.layout != "contiguous")
        unusual += [f"{self.weight} weight"] * bool(self.weight)
        return " ".join(["x".join(map(str, self.shape)), *unusual])


def _cases(ops: Iterable[str], *shapes: Any, dtype: str = "bfloat16", **more: Any) -> list[Case]:
    return [Case(op, dtype, shape, **more) for shape in shapes for op in ops]


ADD = ("rms_norm", "add_rms_norm")
RMS, LAYER, HEADS = ADD[:1], ("layer_norm",), ("head_norm",)

LATENCY = [
    *_cases(ADD, *product((1, 8, 64), (4096, 8192))),
    *_cases(RMS, (64, 4096), weight="float32"),
    *_cases(HEADS, (1, 40, 128), (64, 40, 128)),
    *_cases(LAYER, (1, 4096), (64, 8192)),
    *_cases(RMS, (16, 512), (1, 65536)),
]
# What matters most comes first: the rest is what there may be no time for.
HEADLINES = [
    *_cases(ADD, (16384, 8192), (32768, 4096), (16384, 16384), rivals=True),
    *_cases(HEADS, (32768, 40, 128), (32768, 40, 64), rivals=True),
    *_cases(LAYER, (16384, 8192), rivals=True),
    *_cases(RMS, (131072, 512), (65536, 1024), (16384, 5120), (16384, 2880), (16384, 2560)),
    *_cases(RMS, (16384, 8192), weight="float32"),
    *_cases(ADD, (8192, 65536)),
]
THROUGHPUT = [
    *HEADLINES,
    *_cases((ROPE,), (8192, 40, 128), layout="strided"),  # q and k of a packed qkv
    *_cases(ADD, *product((64, 4096, 16, 1024, 1), (4096, 8192)), rivals=True),
    *_cases(HEADS, (64, 40, 128), (4096, 40, 128), (1, 40, 128), rivals=True),
    *_cases(LAYER, (64, 4096), (4096, 4096), (1024, 65536), rivals=True),
    *_cases(RMS, (16384, 4095), (16384, 4097), (16384, 5000), (64, 4095), (64, 5000)),
    *_cases(ADD, (16384, 4096), layout="strided"),
    *_cases(HEADS, (4096, 40, 128), layout="strided"),
    *_cases(ADD, (64, 4096), (16384, 8192), (1024, 65536), dtype="float16"),
    *_cases(ADD, (64, 4096), (16384, 8192), (1024, 65536), dtype="float32"),
    *_cases(("add_layer_norm",), (64, 4096), (4096, 8192), (16384, 8192)),
    *_cases(RMS, (4096, 1024), (32768, 1024), (1024, 65536), (1024, 262144), rivals=True),
    *_cases(HEADS, *product((512, 32768), (9, 72), (64, 96, 128, 192, 256))),
    *_cases(ADD, *product((256, 2048, 32768), (512, 2048, 3072, 7168, 12288))),
    *_cases(ADD, *product((8, 1024, 8192), (32768, 131072))),
]


Names = dict[str, Any]


def make_sets(case: Case, sets: int, device: str) -> list[Names]:
    """`sets` sets; weights of their own too, since those of a model's next layer are as cold."""
    made = []
    for _ in range(sets):
        names = _bench.operands(case.like, case.shape, DTYPES[case.dtype], device)
        names |= {case.op: getattr(normkit, case.op)}
        if case.rotates:
            names |= _table(case.shape[0], case.shape[-1] // 2, device)
        if case.layout == "strided":
            names |= {k: _in_wider_rows(names[k]) for k in ("x", "residual") if k in names}
        if case.weight:
            names["weight"] = names["weight"].to(DTYPES[case.weight])
        made.append(names)
    return made


def _table(tokens: int, columns: int, device: str) -> Names:
    """Cos and sin of every token, in float32, and torch's way to rotate by them."""
    frequencies = 1e6 ** (-torch.arange(columns, device=device) / columns)
    angles = torch.arange(tokens, device=device, dtype=torch.float32).outer(frequencies)
    return {"cos": angles.cos(), "sin": angles.sin(), "roped": roped}


def roped(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """The norm and the rotation as models write them."""
    n = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))
    first, second = n.chunk(2, -1)
    return n * cos + torch.cat((-second, first), -1) * sin


def _in_wider_rows(values: Tensor) -> Tensor:
    first, second, *rest = values.shape
    return values.new_empty(first, 2 * second, *rest)[:, :second].copy_(values)


def following(names: Names) -> Names:
    """Reads what these write, and writes where these read from."""
    swapped = {"x": "y", "y": "x", "residual": "residual_out", "residual_out": "residual"}
    return names | {to: names[of] for to, of in swapped.items() if of in names}


Call = Callable[[Names], Any]


def evaluated(statement: str, **more: Any) -> Call:
    """What runs a statement over names and `more`, and returns the value of its last part."""
    parts = [compile(part, statement, "eval") for part in statement.split("; ")]
    return lambda names: [eval(part, names | more) for part in parts][-1]


def compiled(op: Op) -> tuple[Any, str]:
    """torch.compile of torch's statement, and the statement that calls it as `compiled`."""
    body = op.torch_allocating.replace("shape", "x.shape[-1:]")
    tensors = ", ".join(op.tensors)
    formula = eval(f"lambda {tensors}: {body}", {"F": F})
    torch.compiler.reset()  # one static version per shape and dtype, never a dynamic one
    return torch.compile(formula, dynamic=False, fullgraph=True), f"compiled({tensors})"


# Liger's "gemma" computes in float32 and rounds once, as normkit does unless told otherwise; QuACK
# normalises the float32 sum and returns the rounded one; FlashInfer and vLLM add in place.
RIVALS = {
    "liger": "liger_kernel.transformers.functional",
    "quack": "quack",
    "flashinfer": "flashinfer.norm",
    "vllm": "vllm._custom_ops",
}
RIVAL_STATEMENTS = {
    "liger rms_norm": "liger.liger_rms_norm(x, weight, 1e-6, 0.0, 'gemma', False)",
    "liger layer_norm": "liger.liger_layer_norm(x, weight, bias, 1e-5)",
    "liger add_rms_norm": "liger.liger_fused_add_rms_norm(x, residual, weight, 1e-6, 0.0, 'gemma')",
    "quack rms_norm": "quack.rmsnorm(x, weight, eps=1e-6)",
    "quack add_rms_norm": "quack.rmsnorm(x, weight, residual=residual, eps=1e-6, prenorm=True)",
    "flashinfer rms_norm": "flashinfer.rmsnorm(x, weight, 1e-6, out=y)",
    "flashinfer add_rms_norm": "flashinfer.fused_add_rmsnorm(x, residual, weight, 1e-6)",
    "vllm rms_norm": "vllm.rms_norm(y, x, weight, 1e-6)",
    "vllm add_rms_norm": "vllm.fused_add_rms_norm(x, residual, weight, 1e-6)",
}


def _rival(name: str, case: Case, device: str) -> Call:
    """What calls a competitor; raises where it has no such op, is not installed, or is wrong."""
    statement = RIVAL_STATEMENTS.get(f"{name} {case.like.function}")
    if statement is None:
        raise LookupError(f"no {case.op}")
    call = evaluated(statement, **{name: importlib.import_module(RIVALS[name])})
    few = case._replace(shape=(min(case.shape[0], 64), *case.shape[1:]))
    (names,) = make_sets(few, 1, device)
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in names.items()}
    expected, result = evaluated(case.like.torch)(wide), call(names)
    if result is None:  # in place
        result = names["x" if case.like.adds else "y"]
    got = result[0] if isinstance(result, (tuple, list)) else result
    check(got, expected, case.dtype)
    return call


def check(got: Tensor, expected: Tensor, dtype: str) -> None:
    """Raise where a competitor computes something else, NaN included."""
    error = ((got.float() - expected).abs() / (1 + expected.abs())).max().item()
    if not error < {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}[dtype]:
        raise ValueError(f"wrong by {error:.2g} relative to 1 + |y|")


def candidates(
    case: Case, device: str, without: dict[str, str], *, compiles: bool = False
) -> dict[str, Call]:
    """Who can be timed on a case; why others cannot goes into `without`."""
    found = {name: evaluated(statement) for name, statement in case.statements.items()}
    if case.rivals and compiles:
        function, statement = compiled(case.like)
        found[COMPILED] = evaluated(statement, compiled=function)
    for name in RIVALS if case.rivals else ():
        try:
            found[name] = _rival(name, case, device)
        except Exception as error:  # whatever it is, it is no reason to end the run
            without[name] = first_line(error)
    return found


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
