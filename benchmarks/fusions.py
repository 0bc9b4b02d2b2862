"""What does a fused norm take, beside torch's operations and what torch.compile makes of them?

    python benchmarks/fusions.py                       # ten minutes on 2 cores
    python benchmarks/fusions.py --only gated --shapes 1x32x4096 --dtypes bfloat16 --threads 1

Times in copies of x, in pairs within a round; all of it allocates but what has `out=`.  A modulated
norm moves as much as one copy, a gated one and a post-norm as one and a half, one with a sum and a
sandwich as two.  Writes a JSON
file to benchmarks/results and prints the table of docs/fusions.md.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import normkit
from normkit import _bench

# Batch x tokens x n: in the second cache, of a small image in Flux, and of a large one.
SHAPES = ("1x32x4096", "2x1024x3072", "1x4096x3072")
COPY, EAGER, COMPILED = "copy", "torch", "torch.compile"


class Fusion(NamedTuple):
    """A fused call; what it is in torch's operations, as a call of a function of this file."""

    fused: str
    unfused: str
    outputs: str
    as_rounded: str = "round_each=True"  # as the operations round that it stands for
    once: str = ""  # rounded once


FUSIONS = {
    "modulated": Fusion("modulated_norm(x, scale, shift{})", "modulated(x, scale, shift)", "out=y"),
    "with a sum": Fusion(
        "add_modulated_norm(x, residual, gate, scale, shift{})",
        "summed(x, residual, gate, scale, shift)",
        "out=y, residual_out=h",
    ),
    "gated": Fusion(
        "gated_norm(x, z, weight{})",
        "gated(x, z, weight)",
        "out=y",
        "round_before_weight=True, round_each=True",
    ),
    "gate first": Fusion(
        "gated_norm(x, z, weight, norm_before_gate=False{})",
        "gated_first(x, z, weight)",
        "out=y",
        "round_before_weight=True",
    ),
    "post-norm": Fusion(
        "norm_add(x, residual, weight{})",
        "post(x, residual, weight)",
        "out=y",
        "",
        "round_norm=False",
    ),
    "sandwich": Fusion(
        "norm_add_norm(x, residual, weight, weight{})",
        "sandwich(x, residual, weight)",
        "out=y, residual_out=h",
        "",
        "round_norm=False",
    ),
    "rope": Fusion("norm_rope(q, cos, sin, of_head{})", "roped(q, cos, sin, of_head)", "out=q_out"),
}


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """AdaLN, as diffusers has it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def summed(
    x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The same behind a sum with a gate."""
    h = residual + gate * x
    return modulated(h, scale, shift), h


def gated(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As Qwen3-Next has it."""
    wide = x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight * xhat.to(x.dtype) * F.silu(z.float())).to(x.dtype)


def gated_first(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As Mamba-2 has it."""
    wide = x.float() * F.silu(z.float())
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * xhat.to(x.dtype)


def post(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """A post-norm."""
    return residual + F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def sandwich(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A post-norm, and the norm behind its sum, as Gemma 2 and 3 have them."""
    h = post(x, residual, weight)
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h


def roped(q: Tensor, cos: Tensor, sin: Tensor, of_head: Tensor) -> Tensor:
    """q_norm and the rotary embedding, as Qwen3 and Gemma 3 have them."""
    n = F.rms_norm(q, q.shape[-1:], of_head, 1e-6)
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))
    first, second = n.chunk(2, -1)
    return n * cos + torch.cat((-second, first), -1) * sin


UNFUSED = {f.__name__: f for f in (modulated, summed, gated, gated_first, post, sandwich, roped)}
FUNCTIONS = (
    *("modulated_norm", "add_modulated_norm", "gated_norm", "norm_add", "norm_add_norm"),
    "norm_rope",
)
HEAD_DIM = 128


def names_for(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    torch._dynamo.reset()  # a graph for each shape, and not one for all
    generator = torch.Generator().manual_seed(0)
    batch, _, n = shape

    def made(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    names: dict[str, Any] = {name: made(*shape) for name in ("x", "residual", "z")}
    names |= {name: made(batch, 1, n) for name in ("gate", "scale", "shift")}
    names |= {"weight": made(n), "y": torch.empty_like(names["x"])}
    names |= {"h": torch.empty_like(names["x"]), **UNFUSED}
    heads = (*shape[:-1], n // HEAD_DIM, HEAD_DIM)
    names |= {"q": names["x"].view(heads), "q_out": names["y"].view(heads)}
    names |= {name: made(shape[1], HEAD_DIM // 2) for name in ("cos", "sin")}
    names["of_head"] = made(HEAD_DIM)
    names |= {"compiled_" + name: torch.compile(f, dynamic=False) for name, f in UNFUSED.items()}
    return names | {name: getattr(normkit, name) for name in FUNCTIONS}


def candidates(what: Fusion) -> dict[str, str]:
    def fused(*options: str) -> str:
        return what.fused.format("".join(f", {option}" for option in options if option))

    return {
        COPY: "y.copy_(x)",
        "one rounding, out=": fused(what.once, what.outputs),
        "as rounded, out=": fused(what.as_rounded, what.outputs),
        "one rounding": fused(what.once),
        "as rounded": fused(what.as_rounded),
        COMPILED: "compiled_" + what.unfused,
        EAGER: what.unfused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", choices=FUSIONS, default=tuple(FUSIONS))
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxTOKENSxN", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON file; by default one of this machine")
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    results = []
    heads: list[str] = []
    with torch.no_grad():
        for what, shape, dtype in itertools.product(args.only, args.shapes, args.dtypes):
            sizes = tuple(int(size) for size in shape.split("x"))
            names = names_for(sizes, _bench.DTYPES[dtype])
            codes = candidates(FUSIONS[what])
            timers = {who: Timer(code, globals=names) for who, code in codes.items()}
            for timer in timers.values():
                timer.timeit(4)
            compared = _bench.paired(timers, args.rounds)
            if not heads:
                heads = [who for who in codes if who != COPY]
                print(f"| | | | {' | '.join(heads)} |\n|---|---|---|{'--:|' * len(heads)}")
            in_copies = {who: compared.ratio(who, COPY) for who in heads}
            cells = " | ".join(f"{value:.2f}" for value in in_copies.values())
            print(f"| {what} | {shape} | {dtype} | {cells} |", flush=True)
            results.append(
                {"what": what, "shape": shape, "dtype": dtype, "in_copies": in_copies}
                | {"copy_us": compared.us(COPY), "retakes": _bench.retakes(compared)}
            )
    here = _bench.machine()
    data: dict[str, Any] = {"machine": here, **_bench.run_stamp()}
    data |= {"threads": args.threads, "rounds": args.rounds, "results": results}
    path = args.out or machine.results_path("fusions", here, machine.RESULTS)
    _bench.write_json(path, data)


if __name__ == "__main__":
    main()
