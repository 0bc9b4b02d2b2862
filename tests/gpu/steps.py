"""Prove and measure normkit on a GPU, in two commands of less than eight minutes each.

    python tests/gpu/steps.py check     # tests, latency and eager calls, sanitizers
    python tests/gpu/steps.py bench     # throughput, also without overlap; other builds; counters

`make gpu` runs all parts, and builds first.  Wheels in build/gpu, from `make gpu-wheels`, are
installed for these steps alone; without any, normkit is used as it is installed.  A step that fails
or takes too long does not keep the next ones from running.  Where torch finds no GPU because there
is none, it says "skipped" and ends well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "build" / "gpu"
DEVICES = Path("/dev")  # has an nvidia0, nvidia1 and so on where there are GPUs
WORKERS = 8
PIP = ("-m", "pip", "install", "-q", "--disable-pip-version-check")

EXPLAIN = """
import normkit, torch
x = torch.ones(4, 4096, device="cuda", dtype=torch.bfloat16)
explanation = normkit.explain("rms_norm", x, x[0])
print(explanation)
assert explanation.backend == "cuda"
"""
COUNTERS = (
    "smsp__inst_executed.sum",
    "smsp__inst_issued.sum",
    "smsp__warps_launched.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
)


class Step(NamedTuple):
    name: str
    seconds: int  # at most
    command: list[str]
    env: Mapping[str, str] = {}
    needed: bool = True  # or may fail, as where ncu is kept from the counters


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def tests(*arguments: str) -> list[str]:
    """The warnings of a torch that these tests have not seen before are no errors."""
    return python("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", *arguments)


def profiler() -> str | None:
    newest = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)
    return shutil.which("ncu") or next(map(str, newest), None)


def parts(out: Path) -> dict[str, list[Step]]:
    """What there is to do, what matters most first."""

    def benchmark(name: str, *arguments: str) -> list[str]:
        return python(f"benchmarks/{name}.py", *arguments, "--out", str(out))

    cuda, alone = {"NORMKIT_TEST_BACKENDS": "cuda"}, {"NORMKIT_PDL": "0"}
    no_triton = cuda | {"NORMKIT_TEST_TRITON": "0"}
    sanitizers, parallel = "tests/gpu/test_sanitizer.py", ("-n", str(WORKERS))
    latency = ("--parts", "latency", "--seconds", "40")
    throughput = ("--parts", "throughput", "--seconds")
    host = ("--device", "cuda", "--rows", "1", "--n", "4096", "--rounds", "9", "--no-compile")
    found = {
        "check": [
            Step("info", 20, python("-m", "normkit", "info")),
            Step("explain", 20, python("-c", EXPLAIN)),
            Step("tests", 110, tests("tests/gpu", f"--ignore={sanitizers}"), no_triton),
            Step("conformance", 130, tests("tests/conformance", *parallel), no_triton),
            Step("latency", 60, benchmark("gpu", *latency)),
            Step("eager calls", 40, benchmark("host", *host)),
            Step("sanitizers", 300, tests(sanitizers), no_triton),
        ],
        "more": [
            Step("torch", 600, tests("tests/torch_integration", *parallel), cuda),
            Step("other names", 600, tests("tests/compat", *parallel), cuda),
            Step("triton", 600, tests("tests/test_triton.py", *parallel), cuda),
            Step("latency, launches do not overlap", 60, benchmark("gpu", *latency), alone),
            Step("gradients", 300, benchmark("backward", "--device", "cuda")),
        ],
        "bench": [
            Step("predictions", 20, python("benchmarks/predictions.py")),
            Step("throughput", 150, benchmark("gpu", *throughput, "120")),
            Step(
                "throughput, launches do not overlap",
                100,
                benchmark("gpu", *throughput, "70"),
                alone,
            ),
        ],
    }
    if builds := sorted(map(str, KIT.glob("builds/*.so"))):
        tune = benchmark("tune", *builds, "--seconds", "70")
        found["bench"].append(Step("other builds", 100, tune))
    if ncu := profiler():
        out.mkdir(parents=True, exist_ok=True)
        command = [
            ncu,
            "--csv",
            "--page",
            "raw",
            "--print-units",
            "base",
            "--clock-control",
            "none",
        ]
        command += ["--kernel-name", "regex:.*row_norm_kernel.*", "--metrics", ",".join(COUNTERS)]
        command += ["--log-file", str(out / "counters.csv"), *python("benchmarks/counters.py")]
        found["bench"].append(Step("counters", 80, command, needed=False))
    return found


def build() -> Step:
    import torch

    env = {"CUDAARCHS": "{}{}".format(*torch.cuda.get_device_capability()), "NORMKIT_CUDA": "ON"}
    what = ("--editable", ".[bench]", "pytest", "pytest-xdist", "hypothesis")
    return Step("build", 1800, python(*PIP, *what), env)


def install(site: str, wheels: list[str]) -> Step:
    """Beside what is installed, which stays as it is, and before it in the path."""
    alone = ("--no-index", "--no-deps", "--no-compile", "--target", site)
    return Step("install", 60, python(*PIP, *alone, *wheels))


def why_there_is_no_gpu() -> str:
    """Nothing where there is one; raises where there should be one, and torch does not find it."""
    import torch  # one that cannot be imported ends this with its own words

    if torch.cuda.is_available():
        return ""
    found = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
    built = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    if found:
        raise RuntimeError(f"{DEVICES}: {', '.join(found)}; but {built} finds no CUDA device")
    return f"{built} finds no CUDA device, and {DEVICES} has no nvidia0"


def problem(step: Step, seconds: float, env: Mapping[str, str]) -> str:
    """Runs a step for so long at most; returns what went wrong, or nothing."""
    if seconds < 1:
        return "no time was left"
    env = {**env, **step.env}
    process = subprocess.Popen(step.command, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(seconds)
        return f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # what it has started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(steps: list[Step], seconds: float, env: Mapping[str, str]) -> bool:
    """Runs all steps, in so many seconds together; False where one has failed."""
    begin, told, fine = time.monotonic(), [], True
    for step in steps:
        started = time.monotonic()
        print(f"\n======== {step.name}", flush=True)
        why = problem(step, min(step.seconds, begin + seconds - started), env)
        fine = fine and not (why and step.needed)
        how = f"{'FAILED' if step.needed else 'did not work'}: {why}" if why else "passed"
        told.append(f"{step.name}: {how}, {time.monotonic() - started:.0f} s")
        print(f"-------- {told[-1]}", flush=True)
    print("\n", *told, sep="\n", flush=True)
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("build", "check", "more", "bench")
    parser.add_argument("parts", nargs="+", choices=names, metavar="PART", help=" ".join(names))
    parser.add_argument("--seconds", type=float, default=470.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if why := why_there_is_no_gpu():
        print(f"skipped: {why}")
        return 0
    env, wheels = dict(os.environ), sorted(map(str, KIT.glob("*.whl")))
    with tempfile.TemporaryDirectory() as site:
        first = []
        if "build" in args.parts:
            first = [build()]
        elif wheels:
            first = [install(site, wheels)]
            env["PYTHONPATH"] = os.pathsep.join([site, *filter(None, [env.get("PYTHONPATH")])])
            env["NORMKIT_COMMIT"] = (KIT / "commit").read_text().strip()
        known = parts(args.out.resolve())
        steps = [step for name in args.parts if name != "build" for step in known[name]]
        return 0 if run(first + steps, args.seconds, env) else 1


if __name__ == "__main__":
    sys.exit(main())
