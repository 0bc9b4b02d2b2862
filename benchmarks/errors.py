"""How far are the norms from float64, and how far are other ways to compute them?

    python benchmarks/errors.py           # a minute
    python benchmarks/figures.py errors   # draws docs/images/errors.svg from what it keeps

Errors do not depend on how busy a machine is, and normkit's not on which CPU it has: the bits are
the same for every instruction set.  Inputs are those of normkit.testing.make_inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, results_path
from torch import Tensor
from torch.nn import functional as F

import normkit
from normkit import _bench, reference
from normkit.testing import error_bound, make_inputs

COLUMNS = (64, 256, 1024, 4096, 16384, 65536, 262144)
MEANS = (1, 10, 100, 1000, 10_000, 100_000)
ROWS = (16, 128, 1024, 8192, 65536)
FORMULA = "as models write it"

Norm = Callable[[Tensor, Tensor], Tensor]


def by_torch(kind: str) -> Norm:
    function = F.rms_norm if kind == "rms" else F.layer_norm
    return lambda x, weight: function(x, weight.shape, weight, eps=1e-6)


def ours(kind: str) -> Norm:
    function = normkit.rms_norm if kind == "rms" else normkit.layer_norm
    return lambda x, weight: function(x, weight, eps=1e-6)


def exact(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return reference.norm(x.double(), weight.double(), eps=1e-6, kind=kind)


def squares_less_square(x: Tensor, weight: Tensor) -> Tensor:
    """A LayerNorm in one pass, E[x^2] - E[x]^2, in float32."""
    mean = x.mean(-1, keepdim=True)
    variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    return (x - mean) * torch.rsqrt(variance + 1e-6) * weight


def written_out(x: Tensor, weight: Tensor) -> Tensor:
    """An RMSNorm as models have it: rounded, then multiplied in x's dtype."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def against_length(columns: int) -> dict[str, float]:
    """The largest error in float32, as a share of the bound of docs/numerics.md."""
    x, _, weight, _ = make_inputs((max(8, 2**20 // columns), columns))
    found = {}
    for kind in ("rms", "layer"):
        y, bound = exact(x, weight, kind), error_bound(x, weight, eps=1e-6, kind=kind)
        for name, norm in {"normkit": ours(kind), "torch": by_torch(kind)}.items():
            error = ((norm(x, weight).double() - y).abs() / bound).max()
            found[f"{kind}, {name}"] = error.item()
    return found


def against_mean(mean: float) -> dict[str, float]:
    """The largest error of a LayerNorm of rows with a deviation of 1, relative to the largest y."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4096, generator=generator, dtype=torch.float64).add(mean).float()
    weight = torch.ones(4096)
    y = exact(x, weight, "layer")
    norms = {"normkit": ours("layer"), "torch": by_torch("layer")}
    norms["E[x²] - E[x]²"] = squares_less_square
    return {k: ((norm(x, weight) - y).abs().max() / y.max()).item() for k, norm in norms.items()}


def in_16_bits() -> dict[str, dict[str, float]]:
    """Errors of a bfloat16 rms_norm in steps of y: the share beyond a half, and the largest."""
    x, _, weight, _ = make_inputs((1024, 4096), torch.bfloat16)
    y = exact(x, weight, "rms")
    step = torch.frexp(y).exponent.double().sub(8).exp2()
    norms = {"normkit": ours("rms"), "torch": by_torch("rms"), FORMULA: written_out}
    found = {}
    for name, norm in norms.items():
        steps = (norm(x, weight).double() - y).abs() / step
        beyond = (steps > 0.5 * (1 + 2**-9)).double().mean()
        found[name] = {"beyond a half": beyond.item(), "largest": steps.max().item()}
    return found


def against_rows(rows: int) -> dict[str, float]:
    """The largest error of the gradient of a weight, relative to the largest gradient."""
    x, grad, weight, _ = make_inputs((rows, 256))
    xhat = exact(x, torch.ones(256), "rms")
    true = (grad.double() * xhat).sum(0)
    found = {}
    for name, norm in {"normkit": ours("rms"), "torch": by_torch("rms")}.items():
        w = weight.clone().requires_grad_()
        (made,) = torch.autograd.grad(norm(x, w), w, grad)
        found[name] = ((made - true).abs().max() / true.abs().max()).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS)
    parser.add_argument("--means", type=int, nargs="+", default=MEANS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    machine = _bench.machine()
    kept: dict[str, Any] = {"machine": machine, "run": _bench.run_stamp()}
    kept["length"] = {str(n): against_length(n) for n in args.columns}
    kept["mean"] = {str(m): against_mean(m) for m in args.means}
    kept["bfloat16"] = in_16_bits()
    kept["rows"] = {str(n): against_rows(n) for n in args.rows}
    path = results_path("errors", machine, args.out)
    _bench.write_json(path, kept)
    for part in ("length", "mean", "bfloat16", "rows"):
        print(f"\n{part}")
        for name, errors in kept[part].items():
            print(name, *(f"{k}: {error:.3g}" for k, error in errors.items()), sep="  ")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
