"""When does which form of a compiled norm win: an operator, or plain torch to be fused?

    python benchmarks/compiled.py                                # ten minutes on 2 cores
    python benchmarks/compiled.py --only decoder --tokens 1 --dtypes bfloat16
    python benchmarks/compiled.py --only alone --gradients       # forward and backward
    python benchmarks/compiled.py --device cuda                  # has not run yet

Compiles the same function in both modes of `normkit.compile_mode`, counts what the generated code
calls, and times both in pairs, with the eager call beside them.  Keeps the results in
results/compiled-<machine>.json.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import RESULTS, gpu, results_path
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.benchmark import Timer

import normkit
from normkit import _bench

HEAD_DIM = 64
EAGER, OP, INLINE = "eager", "op", "inline"
MODES = (OP, INLINE)
DTYPES = ("bfloat16", "float32")
Result = dict[str, Any]


class Alone(nn.Module):
    """Nothing but a norm."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = normkit.RMSNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Decoder(nn.Module):
    """Layers of Qwen3's kind: norms of rows with residual adds, and norms of q's and k's heads."""

    def __init__(self, n: int, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(n) for _ in range(layers))
        self.norm = normkit.RMSNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x, residual)[0]


class _DecoderLayer(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(n, 3 * n, bias=False), nn.Linear(n, n, bias=False)
        self.up, self.down = nn.Linear(n, 6 * n, bias=False), nn.Linear(3 * n, n, bias=False)
        self.before, self.between = normkit.RMSNorm(n), normkit.RMSNorm(n)
        self.of_q, self.of_k = (normkit.HeadNorm(None, HEAD_DIM) for _ in range(2))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.before(x, residual)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(-3)
        q, k, v = (t.transpose(-2, -3) for t in (self.of_q(q), self.of_k(k), v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        x, residual = self.between(self.out(x), residual)
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up), residual


class Modulated(nn.Module):
    """Two halves of a DiT block: a norm without weights, scale and shift, a linear map, a gate."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = normkit.LayerNorm(n, elementwise_affine=False)
        self.linears = nn.ModuleList(nn.Linear(n, n) for _ in range(2))
        self.modulation = nn.Parameter(torch.randn(2, 3, n) / 8)

    def forward(self, x: Tensor) -> Tensor:
        for linear, (scale, shift, gate) in zip(self.linears, self.modulation, strict=True):
            x = x + gate * linear(self.norm(x) * (1 + scale) + shift)
        return x


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "alone": Alone,
    "decoder": Decoder,
    "modulated": Modulated,
}


def calls_of(code: str) -> Counter[str]:
    """How often generated code calls a fused kernel, an operator of normkit, or anything else."""
    body = code[code.index("def call(") :].partition("def benchmark")[0]
    body = re.sub(r"#.*", "", body)
    kinds = {
        "fused": r"\b(?:cpp|triton)_\w+(?:\.run)?\(",
        "normkit": r"\btorch\.ops\.normkit\.[\w.]+\(",
        "others": r"\bextern_kernels\.\w+\(|\btorch\.ops\.(?!normkit)[\w.]+\(",
    }
    return Counter({kind: len(re.findall(pattern, body)) for kind, pattern in kinds.items()})


def run_case(
    name: str, n: int, tokens: int, dtype: str, device: str, rounds: int, gradients: bool
) -> Result:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = MODELS[name](n).to(device, _bench.DTYPES[dtype]).requires_grad_(gradients)
    x = torch.randn(tokens, n, device=device).to(_bench.DTYPES[dtype]).requires_grad_(gradients)
    call = "torch.autograd.grad({}(x), wanted, x)" if gradients else "{}(x)"
    names = {
        "eager": model,
        "compiled": torch.compile(model, fullgraph=True, dynamic=False),
        "x": x,
        "wanted": [x, *model.parameters()],
        "torch": torch,
    }
    names["compile_mode"] = normkit.compile_mode
    timers, calls = {EAGER: Timer(call.format("eager"), globals=names)}, {}
    for mode in MODES:
        setup = f"compile_mode({mode!r})"  # for each sample: other modes would compile it again
        timers[mode] = Timer(call.format("compiled"), setup, globals=names)
        with normkit.compile_mode(mode):
            calls[mode] = calls_of("".join(run_and_get_code(names["compiled"], x)[1]))
    compared = _bench.paired(timers, rounds)
    forms = {
        form: {
            "us": compared.us(form),
            "of_op": compared.ratio(form, OP),
            "of_op_quartiles": compared.quartiles(form, OP),
            "calls": calls.get(form),
        }
        for form in timers
    }
    case = {"model": name, "n": n, "tokens": tokens, "dtype": dtype, "gradients": gradients}
    case["rounds"] = rounds
    return case | {"threads": torch.get_num_threads(), **_bench.retakes(compared), "forms": forms}


def row(result: Result) -> str:
    eager, op, inline = (result["forms"][form] for form in (EAGER, *MODES))
    cells = [result["model"], result["n"], result["tokens"], result["dtype"]]
    cells += [f"{form['us']:.0f}" for form in (eager, op, inline)]
    cells += ["{:.2f} ({:.2f}-{:.2f})".format(inline["of_op"], *inline["of_op_quartiles"])]
    cells += [
        " + ".join(f"{count} {kind}" for kind, count in form["calls"].items() if count)
        for form in (op, inline)
    ]
    return f"| {' | '.join(map(str, cells))} |"


HEADINGS = ("model", "n", "tokens", "dtype", "eager us", "op us", "inline us", "inline / op")
HEADINGS += ("calls, op", "calls, inline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--n", nargs="+", type=int, default=(512, 1024))
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16, 256))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_bench.DTYPES), default=DTYPES)
    parser.add_argument("--gradients", action="store_true", help="the backward pass as well")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    results = []
    for case in itertools.product(args.only, args.n, args.tokens, args.dtypes):
        results.append(run_case(*case, args.device, args.rounds, args.gradients))
        print(row(results[-1]), flush=True)
    machine = gpu() if args.device == "cuda" else _bench.machine()
    path = results_path("compiled", machine, args.out)
    kept = {"machine": machine, "threads": args.threads, "run": _bench.run_stamp()}
    _bench.write_json(path, {**kept, "results": results})
    print(path)


if __name__ == "__main__":
    main()
