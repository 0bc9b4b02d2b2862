"""What does `normkit.convert` change of a model: its outputs, its speed, its kernel launches?

    python benchmarks/convert.py                  # tiny depths of known shapes, five minutes
    python benchmarks/convert.py --model FOLDER   # an encoder with its weights: `make demo`

Needs transformers.  Converted copies, one of them with fuse="layer", take turns with the model; the
figures are kept in results/convert-<machine>.json.  A launch is an operator that computes: with
torch's own norms, each is a kernel on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, results_path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from normkit import _bench

SENTENCES = (
    "A cat sits on the mat.",
    "There is a cat on a rug.",
    "The stock market fell by three percent.",
)
_QWEN = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
_GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4}
_LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
_COMMON = {"vocab_size": 1000, "max_position_embeddings": 1024}
# model_type and config; layers enough for the time of a token to be that of layers
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen3 0.6B, 4 layers": (
        "qwen3",
        _QWEN | _COMMON | {"num_hidden_layers": 4, "num_key_value_heads": 8},
    ),
    "Gemma 3 270M, 6 layers": (
        "gemma3_text",
        _GEMMA | _COMMON | {"num_hidden_layers": 6, "num_key_value_heads": 1},
    ),
    "Llama 1B, 2 layers": (
        "llama",
        _LLAMA | _COMMON | {"num_hidden_layers": 2, "num_key_value_heads": 8},
    ),
    "GPT-2, 4 layers": (
        "gpt2",
        {"n_embd": 768, "n_layer": 4, "n_head": 12, "vocab_size": 1000},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of an encoder with its weights")
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.model is not None:
        show_encoder(given.model, given.rounds)
        return
    _bench.pin_heap(given.threads)
    results = []
    for name in given.only:
        for dtype in given.dtypes:
            results.append(measure(name, dtype, given.prompt, given.rounds))
            print(line_of(results[-1]), flush=True)
    machine = _bench.machine()
    report = {"machine": machine, **_bench.run_stamp(), "results": results}
    _bench.write_json(results_path("convert", machine, given.out), report)


class Pairs:
    """Times of candidates that take turns: a pair has what else the machine does in common."""

    def __init__(self, candidates: dict[str, Callable[[], object]], rounds: int) -> None:
        self._seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(-2, rounds):  # the first two are not counted
            order = list(candidates)[:: 1 if turn % 2 else -1]
            for name in order:
                start = time.perf_counter()
                candidates[name]()
                if turn >= 0:
                    self._seconds[name].append(time.perf_counter() - start)

    def ms(self, name: str) -> float:
        return statistics.median(self._seconds[name]) * 1e3

    def gain(self, before: str, after: str) -> float:
        return statistics.median(self._ratios(before, after))

    def quartiles(self, before: str, after: str) -> list[float]:
        return statistics.quantiles(self._ratios(before, after), n=4)[::2]

    def _ratios(self, before: str, after: str) -> list[float]:
        pairs = zip(self._seconds[before], self._seconds[after], strict=True)
        return [a / b for a, b in pairs]


# ----------------------------------------------------------------------- an encoder, as in the demo


def show_encoder(folder: Path, rounds: int) -> None:
    """Embed sentences before and after converting, and after the revert."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    plain = copied(model)
    before = embeddings(model, tokens)
    report = normkit.convert(model, strict=True)
    print(f"{type(model).__name__}, converted:\n{report}")
    after = embeddings(model, tokens)
    for i, j in ((0, 1), (0, 2)):
        alike = [float(e[i] @ e[j]) for e in (before, after)]
        print(
            f'"{SENTENCES[i]}" and "{SENTENCES[j]}": '
            f"similarity {alike[0]:.6f} before, {alike[1]:.6f} after"
        )
    print(f"embeddings: at most {(after - before).abs().max().item():.1e} apart")
    times = Pairs(
        {"before": lambda: embeddings(plain, tokens), "after": lambda: embeddings(model, tokens)},
        rounds,
    )
    print(
        f"time of {len(SENTENCES)} sentences: {times.ms('before'):.2f} ms before, "
        f"{times.ms('after'):.2f} ms after, {times.gain('before', 'after'):.2f} times as fast"
    )
    report.revert()
    same = torch.equal(embeddings(model, tokens), before)
    print("reverted: " + ("the same bits as before" if same else "OTHER BITS than before"))


def embeddings(model: nn.Module, tokens: Any) -> Tensor:
    """The mean of the tokens' vectors, of length 1."""
    with torch.no_grad():
        vectors = model(**tokens).last_hidden_state
    weights = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1), dim=-1)


# ------------------------------------------------------------------------------- shapes of decoders


def measure(name: str, dtype: str, prompt: int, rounds: int) -> dict[str, Any]:
    """Time a prompt and one more token before and after converting; count launches in a layer."""
    plain = decoder(name, dtype)
    ours, fused = copied(plain), copied(plain)
    norms = normkit.convert(ours, strict=True).converted
    sums = _sums(normkit.convert(fused, fuse="layer"))
    tokens = torch.randint(0, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {"model": name, "dtype": dtype, "prompt": prompt}
    result |= {"threads": torch.get_num_threads(), "rounds": rounds, "norms": len(norms)}
    models = {"before": plain, "after": ours} | ({"fused": fused} if sums else {})
    with torch.no_grad():
        logits = [m(input_ids=tokens).logits.float() for m in (plain, ours)]
        result["difference"] = ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item()
        for what, call in (("prompt", of_prompt), ("token", of_token)):
            times = Pairs({name: call(m, tokens) for name, m in models.items()}, rounds)
            result[what] = {name: times.ms(name) for name in models}
            result[what] |= {"gain": times.gain("before", "after")}
            result[what] |= {"gain_quartiles": times.quartiles("before", "after")}
            if sums:
                result[what] |= {"fused_gain": times.gain("before", "fused")}
                result[what] |= {"fused_gain_quartiles": times.quartiles("before", "fused")}
        result["launches"] = launches(plain, tokens[:, :2])
        result["launches of a layer"] = of_a_layer(plain, tokens[:, :2])
    return result


def copied(model: nn.Module) -> nn.Module:
    """A copy with the same parameters: where they lie in memory may change the time by a tenth."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def of_prompt(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=tokens, use_cache=False)


def of_token(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """One more token; its keys and values are taken away again."""
    made = model(input_ids=tokens, use_cache=True)
    # as newer versions of transformers call it, and as all did
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = made[name]

    def call() -> None:
        model(input_ids=tokens[:, -1:], use_cache=True, **{name: cache})
        cache.crop(-1)

    return call


def decoder(name: str, dtype: str) -> nn.Module:
    """A model of a known shape with random weights."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    kind, sizes = SHAPES[name]
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(_bench.DTYPES[dtype]).eval()


class _Counting(TorchDispatchMode):
    """Counts operators that compute, those inside of norms apart."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.of_norms = self.depth = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if not any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        ):
            self.all += 1
            self.of_norms += self.depth > 0
        return func(*args, **(kwargs or {}))


def launches(model: nn.Module, tokens: Tensor) -> dict[str, int]:
    """Operators of a model, and what they would be with one for each norm, or sum and norm."""
    report = normkit.convert(model, dry_run=True, fuse="layer")
    paths = {entry.path for entry in report.converted}
    norms = [module for path, module in model.named_modules() if path in paths]
    counting = _Counting()
    with _marked(norms, counting) as calls, counting:
        model(input_ids=tokens, use_cache=False)
    after = counting.all - counting.of_norms + len(calls)
    return {
        "before": counting.all,
        "in norms": counting.of_norms,
        "after": after,
        "fused": after - _sums(report),
    }


def _sums(report: normkit.conversion.Report) -> int:
    return sum(len(layer.norms) for layer in report.layers)


def of_a_layer(model: nn.Module, tokens: Tensor) -> dict[str, int]:
    """What one layer less would save."""
    fewer = copied(model)
    del max((m for m in fewer.modules() if isinstance(m, nn.ModuleList)), key=len)[-1]
    counts, rest = launches(model, tokens), launches(fewer, tokens)
    return {name: count - rest[name] for name, count in counts.items()}


@contextmanager
def _marked(norms: list[nn.Module], counting: _Counting) -> Iterator[list[nn.Module]]:
    calls: list[nn.Module] = []

    def enter(module: nn.Module, _: object) -> None:
        counting.depth += 1
        calls.append(module)

    def leave(*_: object) -> None:
        counting.depth -= 1

    hooks = [m.register_forward_pre_hook(enter) for m in norms]
    hooks += [m.register_forward_hook(leave) for m in norms]
    yield calls
    for hook in hooks:
        hook.remove()


def line_of(result: dict[str, Any]) -> str:
    """A result in a line."""

    def of(what: str) -> str:
        times = result[what]
        fused = f" ({times['fused_gain']:.3f} fused)" if "fused_gain" in times else ""
        before_and_after = f"{times['before']:.2f} -> {times['after']:.2f} ms"
        return f"{what}: {before_and_after}, {times['gain']:.3f} times as fast{fused}"

    def count(counts: dict[str, int]) -> str:
        fused = f" ({counts['fused']} fused)" if counts["fused"] < counts["after"] else ""
        return f"{counts['before']} -> {counts['after']}{fused}"

    return "; ".join(
        [f"{result['model']}, {result['dtype']}", of("prompt"), of("token"),
         f"launches {count(result['launches'])}, of a layer {count(result['launches of a layer'])}",
         f"logits {result['difference']:.1e} apart"]
    )  # fmt: skip


if __name__ == "__main__":
    main()
