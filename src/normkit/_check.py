"""Running every norm of a checkpoint: beside float64, the model's own module, and torch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F

from normkit import _bench, reference, testing
from normkit._originals import NoOriginals, Originals, Verdict
from normkit._spec import FLOATS, FLOATS_TEXT
from normkit.checkpoint import NormEntry, NoRowError, describe_norm, read_norm
from normkit.checkpoint._files import Files, printable
from normkit.checkpoint._meaning import Given, assumed
from normkit.checkpoint._names import canonical_name
from normkit.functional import explain
from normkit.loading import module_of
from normkit.modules import HeadNorm, LayerNorm, RMSNorm

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

Norm: TypeAlias = RMSNorm | LayerNorm | HeadNorm

CHECK_ROUNDS = 15
# Several times the widest norm of any model; a run takes some 3 KB for each of its elements.
WIDEST = 1 << 16


def activations(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Make values as transformers have them: heavy tails, outlier channels, a mean not 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    rows, n = shape[0], math.prod(shape[1:])
    student_t = normal(rows, n) / normal(5, rows, n).square().mean(0).sqrt()
    channel = torch.exp(0.5 * normal(n))
    channel[torch.randperm(n, generator=generator)[: max(1, n // 256)]] *= 30
    scale = torch.exp(0.3 * normal(rows, 1))
    return ((student_t + 0.3 * normal(n)) * channel * scale + 0.5).reshape(shape).to(dtype)


def _torch_timer(module: Norm, kind: str, x: torch.Tensor) -> Timer:
    """Time torch's function, on weights as it wants them: of x's dtype, the offset added."""
    weight = (module.weight + module.weight_offset).to(x.dtype)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    names = {"F": F, "x": x, "shape": x.shape[-1:], "weight": weight, "bias": bias}
    names["eps"] = module.eps
    if kind == "layer" and weight.ndim == 1:
        return _bench.timer("F.layer_norm(x, shape, weight, bias, eps)", names)
    # torch has neither a bias in rms_norm nor weights per head
    if weight.ndim == 1:
        code = "F.rms_norm(x, shape, weight, eps)"
    else:
        code = f"F.{kind}_norm(x, shape, eps=eps) * weight"
    return _bench.timer(code + (" + bias" if bias is not None else ""), names)


def _options(module: Norm) -> dict[str, Any]:
    return {
        "eps": module.eps,
        "weight_offset": module.weight_offset,
        "round_weight": module.round_weight,
        "round_before_weight": module.round_before_weight,
    }


def _backend(module: Norm, kind: str, x: torch.Tensor) -> str:
    """The name of the backend that runs the module."""
    op, options = f"{kind}_norm", _options(module)
    if isinstance(module, HeadNorm):
        op, options = "head_norm", options | {"kind": kind}
    return explain(op, x, module.weight, module.bias, **options).backend


def _eps_as_computed(eps: float | None) -> float:
    float32 = torch.finfo(torch.float32).eps if eps is None else eps
    return torch.tensor(float32, dtype=torch.float32).item()


def _worst_error(module: Norm, kind: str, x: torch.Tensor) -> float:
    """The largest error of the module on x, as a fraction of the bound; inf where it is NaN."""
    options = _options(module) | {"eps": _eps_as_computed(module.eps), "kind": kind}
    double: dict[str, Any] = {"out_dtype": torch.float64, "compute_dtype": torch.float64}
    exact = reference.norm(x, module.weight, module.bias, **double, **options)
    bound = testing.error_bound(x, module.weight, module.bias, out_dtype=x.dtype, **options)
    # what lies beyond the largest number rounds to infinity, which counts as the number after it
    infinity = math.ldexp(1.0, math.frexp(torch.finfo(x.dtype).max)[1])
    y = module(x).double()
    # an inf or NaN of the weights makes the exact result one, which has no bound: the same is right
    same = (y == exact) | (y.isnan() & exact.isnan())
    y, exact = (t.clamp(-infinity, infinity) for t in (y, exact))
    fraction = ((y - exact).abs() / bound).masked_fill(same, 0.0).max().item()
    return math.inf if math.isnan(fraction) else fraction


def _not_finite(module: Norm) -> int:
    """How many stored values are infinite or NaN."""
    stored = [t for t in (module.weight, module.bias) if t is not None]
    return sum(int((~t.isfinite()).sum()) for t in stored)


class _NotRun(Exception):
    """A norm is as it should be, and still not one to run here."""


@dataclass(frozen=True)
class Checker:
    """What every norm of a checkpoint is checked with.

    Attributes:
        files: the checkpoint.
        given: the options that the user states.
        rows: rows of activations for a norm.
        dtypes: those of the activations, by name.
        originals: the model's own modules, or why there are none.
    """

    files: Files
    given: Given
    rows: int
    dtypes: Sequence[str]
    originals: Originals | NoOriginals

    def check(self, name: str) -> tuple[str, dict[str, Any]] | None:
        """Check the norm whose weight has that name.

        Returns:
            The list of the report that it belongs in, and its line; None for no norm.
        """
        key = name.rpartition(".")[0]
        try:
            loaded = self._loaded(name)
            return loaded and ("norms", self._line(name, *loaded))
        except (_NotRun, NoRowError, TypeError, RuntimeError) as error:  # TypeError: of integers
            return "not_run", {"layer": key, "reason": one_line(error)}
        except (OSError, ValueError) as error:
            return "unreadable", {"layer": key, "reason": one_line(error)}

    def _loaded(self, name: str) -> tuple[Norm, NormEntry] | None:
        """The module of a stored norm; None for what has only the name of one."""
        entry = describe_norm(self.files, name, self.given)
        if entry is None:
            return None
        n = math.prod(entry.shape)
        if n > WIDEST:
            raise _NotRun(f"{name}: expected at most {WIDEST} elements, got {n}")
        module = module_of(read_norm(self.files, entry.key, **vars(self.given)))
        for part, stored in module.named_parameters():
            if stored.dtype not in FLOATS:
                only = ", which only a float64 x takes" if stored.dtype == torch.float64 else ""
                raise _NotRun(f"{part}: expected {FLOATS_TEXT}, got {stored.dtype}{only}")
        return module, entry

    def _line(self, name: str, module: Norm, entry: NormEntry) -> dict[str, Any]:
        """Run one norm on activations of each dtype: its line of the report."""
        seed = zlib.crc32(entry.key.encode())  # the same in every run, another for every layer
        inputs = {
            d: activations((self.rows, *entry.shape), _bench.DTYPES[d], seed) for d in self.dtypes
        }
        stored = str(entry.dtype).removeprefix("torch.")
        timed = stored if stored in inputs else self.dtypes[0]
        kind = entry.spec.kind
        with torch.no_grad():
            errors = {d: _worst_error(module, kind, x) for d, x in inputs.items()}
            x = inputs[timed]
            timers = {"ours": _bench.timer("module(x)", {"module": module, "x": x})}
            timers["torch"] = _torch_timer(module, kind, x)
            compared = _bench.paired(timers, CHECK_ROUNDS)
            backend = _backend(module, kind, x)
        worst = max(errors, key=errors.__getitem__)
        verdict = self._verdict(name, module, entry)
        return {
            "layer": entry.key,
            "kind": kind,
            "shape": list(entry.shape),
            "dtype": stored,
            **_options(module),
            "origins": {option: str(origin) for option, origin in entry.origins.items()},
            "assumed": assumed(entry.origins),
            "note": entry.note,
            "own_module": {"same": verdict.same, "reason": verdict.reason},
            "not_finite": _not_finite(module),
            "error_of_bound": errors,
            "worst": {"dtype": worst, "error_of_bound": errors[worst]},
            "within_bound": errors[worst] <= 1,
            "backend": backend,
            "timed_dtype": timed,
            "us": compared.us("ours"),
            "torch_us": compared.us("torch"),
            "torch_over_normkit": compared.ratio("torch", "ours"),
        }

    def _verdict(self, name: str, module: Norm, entry: NormEntry) -> Verdict:
        if isinstance(self.originals, NoOriginals):
            return Verdict(None, str(self.originals))
        if _not_finite(module):
            return Verdict(None, "inf or NaN is stored, which hides what is computed")
        return self.originals.judge(canonical_name(name), module, entry.spec.kind)


def originals_of(files: Files) -> Originals | NoOriginals:
    """The model's own modules, or why there are none."""
    if not files.config:
        return NoOriginals("there is no config.json")
    try:
        return Originals(files.config)
    except NoOriginals as why:
        return why


def one_line(error: Exception) -> str:
    """An error's text for a line of the report."""
    return printable(" ".join(str(error).split()), most=1000) or type(error).__name__
