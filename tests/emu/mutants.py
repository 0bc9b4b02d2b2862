"""Proof that the sweep sees what it is there to see: broken kernels, each of which must fail.

Every mutant is a patch of the kernels or of their launch, and stands for a bug that somebody has
had.  The unbroken kernels must pass in the same builds.

    python tests/emu/mutants.py [--only NAME] [--jobs 2]
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLAIN, ADDRESS, THREAD = "plain", "address,undefined", "thread"
# What the sweep runs: all of it, or a part where a sanitizer makes it slow.
SHARE = {PLAIN: ("0", "1"), ADDRESS: ("0", "8"), THREAD: ("0", "8")}
TIME_LIMIT = 150  # seconds for a sweep; an endless loop is no catch


@dataclass(frozen=True)
class Mutant:
    name: str
    stands_for: str
    build: str
    file: str
    patches: tuple[tuple[str, str], ...]


def mutant(name: str, stands_for: str, build: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, stands_for, build, file, ((old, new),))


PACK, REDUCE, ROW, LAUNCH = (
    "cuda/pack.cuh",
    "cuda/reduce.cuh",
    "cuda/row_norm.cuh",
    "cuda/launch.cu",
)

WARP_TREE = """\
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    storage.thread[q][threadIdx.x] = v.quad[q];
    __syncwarp(0xffffffffu);
    for (int half = kWarp / 2; half > 0; half /= 2)
      if (lane < half) storage.thread[q][threadIdx.x] += storage.thread[q][threadIdx.x + half];
    __syncwarp(0xffffffffu);
    v.quad[q] = storage.thread[q][threadIdx.x - lane];
  }
  return fold<kQuads>(v.quad);
"""

MUTANTS = (
    mutant(
        "tail-load",
        "a whole pack is loaded where the row ends inside it",
        ADDRESS,
        PACK,
        "if (row.wide && column + kSize <= end) {",
        "if (row.wide && column < end) {",
    ),
    mutant(
        "alignment-not-checked",
        "16 bytes at once from rows of any alignment",
        ADDRESS,
        LAUNCH,
        "return offset % std::min<int64_t>(16, pack * item_size(dtype)) == 0;",
        "return (void)offset, (void)dtype, (void)pack, true;",
    ),
    mutant(
        "storage-used-twice",
        "both reductions through one storage, without a barrier between them",
        THREAD,
        ROW,
        "sum[r] = sum_of_row(fold_packs(of_pack), squares_storage);",
        "sum[r] = sum_of_row(fold_packs(of_pack), sum_storage);",
    ),
    mutant(
        "warp-tree-unsynced",
        "a tree over shared memory that trusts a warp to run in step",
        THREAD,
        REDUCE,
        "  return fold_lanes(v, kWarp);\n",
        WARP_TREE,
    ),
    mutant(
        "barrier-missing",
        "other warps' sums are read before they are written",
        THREAD,
        REDUCE,
        "  __syncthreads();\n",
        "",
    ),
    mutant(
        "barrier-divergent",
        "a barrier that only threads with columns of the row reach",
        PLAIN,
        REDUCE,
        "  __syncthreads();\n",
        "  if (v.quad[0] != 0.f) __syncthreads();\n",
    ),
    mutant(
        "shared-uninitialised",
        "sums of warps that the group does not have",
        PLAIN,
        REDUCE,
        "warp * kWarp < lanes ? storage.thread[q][first + warp * kWarp + lane] : 0.f;",
        "storage.thread[q][(first + warp * kWarp + lane) % kMostLanes];",
    ),
    mutant(
        "offset-32-bits",
        "row * stride in 32 bits, for tensors of more than 2 GiB",
        PLAIN,
        ROW,
        "int64_t offset = at[2] * rows.stride[2];",
        "int64_t offset = static_cast<int>(at[2] * static_cast<uint32_t>(rows.stride[2]));",
    ),
    mutant(
        "order-follows-lanes",
        "a batch of another size gives other bits",
        PLAIN,
        REDUCE,
        "for (int half = lanes / 2; half > 0; half /= 2)",
        "for (int half = 1; half < lanes; half *= 2)",
    ),
    mutant(
        "mean-lost",
        "LayerNorm without its mean",
        PLAIN,
        ROW,
        "float v = (x.v[i] - mean) * rstd;",
        "float v = x.v[i] * rstd;",
    ),
    mutant(
        "offset-in-weight-dtype",
        "1 + weight rounded to bfloat16 (Gemma's norm)",
        PLAIN,
        ROW,
        "a.weight.data ? weight.v[i] + a.weight_offset : 1.f;",
        "a.weight.data ? Access::rounded(a.weight.dtype, weight.v[i] + a.weight_offset) : 1.f;",
    ),
    mutant(
        "wrong-head",
        "tokens and heads exchanged in the choice of the weight",
        PLAIN,
        ROW,
        "row - a.heads.divide(row) * a.heads.value;",
        "a.heads.divide(row) % a.heads.value;",
    ),
    mutant(
        "sum-written-early",
        "residual_out takes the residual's memory before its last read",
        PLAIN,
        ROW,
        "      f(column, v, added);\n",
        "      if constexpr (kAdds)\n"
        "        Access::store(place.of(a.residual_out, a.dims), column, a.n, added);\n"
        "      f(column, v, added);\n",
    ),
    mutant(
        "tail-dropped",
        "columns behind the last whole pack are left out",
        PLAIN,
        ROW,
        "column < a.n;",
        "column + kSize <= a.n;",
    ),
    Mutant(
        "rounded-after-weight",
        "Llama's rounding before the weight comes after it",
        PLAIN,
        ROW,
        (
            ("if (a.round_before_weight) v = Access::rounded(a.normalised, v);", ""),
            (
                "x.v[i] = a.bias.data ? fmaf(v, w, bias.v[i]) : v * w;",
                "v *= w;\n"
                "    if (a.round_before_weight) v = Access::rounded(a.normalised, v);\n"
                "    x.v[i] = a.bias.data ? v + bias.v[i] : v;",
            ),
        ),
    ),
    mutant(
        "sum-not-rounded",
        "the norm of another sum than the one in residual_out",
        PLAIN,
        ROW,
        "v = rounds ? residual.v[i] : sum;",
        "v = sum;",
    ),
    mutant(
        "peer-before-barrier",
        "a peer's shared memory is read with only the own block waited for",
        PLAIN,
        REDUCE,
        "  cluster_arrive();\n  cluster_wait();\n",
        "  __syncthreads();\n",
    ),
    Mutant(
        "peer-gone",
        "a block ends while its peers read its shared memory",
        PLAIN,
        ROW,
        (
            ("if constexpr (kCluster) cluster_arrive();", ""),
            ("if constexpr (kCluster) cluster_wait();", ""),
        ),
    ),
    mutant(
        "masked-in-variance",
        "columns behind the end count as the mean squared (Triton's where left out)",
        PLAIN,
        ROW,
        "else if (count > (Access::kWhole ? 0 : i))",
        "else if (count > -1)",
    ),
    mutant(
        "divisor-off-by-one",
        "a division by multiplication with the factor rounded down",
        PLAIN,
        LAUNCH,
        "(power + d.value - 1) / d.value",
        "power / d.value",
    ),
    mutant(
        "variance-of-a-sample",
        "n - 1 in the place of n",
        PLAIN,
        ROW,
        "inverse_square_root(squares / static_cast<float>(a.n) + a.eps)",
        "inverse_square_root(squares / static_cast<float>(a.n > 1 ? a.n - 1 : 1) + a.eps)",
    ),
    mutant(
        "eps-outside",
        "eps added to the root, not under it",
        PLAIN,
        ROW,
        "return inverse_square_root(squares / static_cast<float>(a.n) + a.eps);",
        "return 1.f / (sqrtf(squares / static_cast<float>(a.n)) + a.eps);",
    ),
    mutant(
        "weight-of-first-row",
        "the rows of one thread all take the first one's weight",
        PLAIN,
        ROW,
        "Access::load(weight_row[r], column(p), live[r])",
        "Access::load(weight_row[0], column(p), live[r])",
    ),
    mutant(
        "rows-behind-the-last",
        "groups without a row work on the first one, in place, again",
        PLAIN,
        ROW,
        "live[r] = rows[r] < a.rows ? end : 0;",
        "live[r] = end;",
    ),
    mutant(
        "clamp-swallows-nan",
        "fminf and fmaxf make a number of NaN",
        PLAIN,
        PACK,
        "return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v;",
        "return fminf(fmaxf(v, -65504.f), 65504.f);",
    ),
    mutant(
        "errors-not-kept",
        "a plain sum over a long row, whose error grows with it",
        PLAIN,
        ROW,
        "lost.quad[q] = t - t == 0.f ? (t - sum.quad[q]) - y : 0.f;",
        "lost.quad[q] = 0.f;",
    ),
)


@dataclass(frozen=True)
class Result:
    name: str
    build: str
    good: bool
    what: str
    seconds: float


class NeedsCare(Exception):
    """The proof itself does not work: no catch, whatever the exit code."""


def output_of(command: list[str], limit: float) -> tuple[int, str]:
    environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1", ASAN_OPTIONS="detect_leaks=0")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def patched(text: str, patches: tuple[tuple[str, str], ...]) -> str:
    for old, new in patches:
        if text.count(old) != 1:
            raise NeedsCare(f"the mutant needs care: {text.count(old)} times in the file: {old!r}")
        text = text.replace(old, new)
    return text


def build(tree: Path, kind: str) -> Path:
    folder = tree / kind.replace(",", "-")
    if not (folder / "build.ninja").exists():
        code, nanobind = output_of([sys.executable, "-m", "nanobind", "--cmake_dir"], 60)
        if code:
            raise NeedsCare("nanobind is not installed beside this Python")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "nanobind_ROOT": nanobind.strip(),
            "SKBUILD_SABI_VERSION": "3.10",
            "NORMKIT_SANITIZE": "" if kind == PLAIN else kind,
        }
        code, text = output_of(
            ["cmake", "-S", str(tree / "tests/emu"), "-B", str(folder), "-GNinja"]
            + [f"-D{key}={value}" for key, value in options.items()],
            120,
        )
        if code:
            raise NeedsCare("cmake failed: " + " ".join(text.split())[-300:])
    code, text = output_of(
        ["cmake", "--build", str(folder), "--target", "sweep", "--parallel", "1"], 600
    )
    if code:
        errors = re.findall(r".*error: .*", text)
        raise NeedsCare("it does not compile: " + (errors or [text[-300:]])[0].strip())
    return folder / "sweep"


def reason(code: int, text: str) -> str:
    patterns = (
        r"SUMMARY: \w+Sanitizer: [\w-]+(?: race)?",
        r"runtime error: .{,50}",
        r"emu: .*",
        r".*the bits follow.*",
        r"(?:y|residual_out) at row .*",
        r"this plan was not run.*",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            return found.group().strip()
    return f"exit code {code}"


def work(tree: Path, name: str, kind: str, change: Mutant | None) -> Result:
    began = time.monotonic()
    path = tree / change.file if change else None
    original = path.read_text() if path else ""
    try:
        if path and change:
            path.write_text(patched(original, change.patches))
        sweep = build(tree, kind)
        code, text = output_of([str(sweep), "1", *SHARE[kind]], TIME_LIMIT)
        if change is None:
            good, what = code == 0, "passes" if code == 0 else reason(code, text)
        else:
            good, what = code != 0, reason(code, text) if code else "SURVIVES"
    except subprocess.TimeoutExpired as error:
        good, what = False, f"still running after {error.timeout:.0f} s"
    except NeedsCare as error:
        good, what = False, str(error)
    finally:
        if path:
            path.write_text(original)
    return Result(name, kind, good, what, time.monotonic() - began)


def worker(
    tree: Path, todo: queue.SimpleQueue[tuple[str, str, Mutant | None]], done: list[Result]
) -> None:
    for part in ("cpp", "cuda", "tests/emu"):
        shutil.copytree(ROOT / part, tree / part)
    while True:
        try:
            name, kind, change = todo.get_nowait()
        except queue.Empty:
            return
        result = work(tree, name, kind, change)
        done.append(result)
        verdict = "ok  " if result.good else "FAIL"
        print(
            f"{verdict} {name:24}{kind:19}{result.seconds:4.0f} s  {result.what[:110]}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", metavar="NAME", help="one mutant")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in (None, m.name)]
    if not chosen:
        parser.error(f"no mutant is named {arguments.only!r}")
    began = time.monotonic()
    todo: queue.SimpleQueue[tuple[str, str, Mutant | None]] = queue.SimpleQueue()
    for kind in (ADDRESS, THREAD, PLAIN):
        if any(m.build == kind for m in chosen):
            todo.put(("(unbroken)", kind, None))
    for m in chosen:
        todo.put((m.name, m.build, m))
    done: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="normkit-mutants-") as folder:
        threads = [
            threading.Thread(target=worker, args=(Path(folder) / str(i), todo, done))
            for i in range(min(arguments.jobs, len(chosen) + 1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = len(chosen) + len({m.build for m in chosen})
    bad = [r.name for r in done if not r.good]
    print(f"{len(chosen)} mutants in {time.monotonic() - began:.0f} s", end="; ")
    print("not as they should be: " + ", ".join(bad) if bad else "all are caught")
    return int(bool(bad) or len(done) != expected)


if __name__ == "__main__":
    sys.exit(main())
