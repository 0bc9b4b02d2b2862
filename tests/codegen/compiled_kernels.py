"""What nvcc makes of the kernels: their PTX, their SASS, and what ptxas says of each."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sass import Program, programs

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "cuda"
KEPT = ROOT / "build" / "codegen"  # so that a second run compiles what has changed
DTYPES = ("float32", "float16", "bfloat16")
SOURCES = (  # the long ones first
    *(f"instances_{dtype}.cu" for dtype in reversed(DTYPES)),
    "instances_backward_any.cu",
    *(f"instances_backward_{dtype}.cu" for dtype in DTYPES),
    "launch_backward.cu",
    "instances_streamed.cu",
    "launch.cu",
    "device.cu",
)
# WHOLE has every source compiled for it.  The others have those of bfloat16, whose kernels take the
# most registers: everything for all of them would take five times as long.
ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
WHOLE = "sm_90"
EVERYWHERE = ("instances_bfloat16.cu", "instances_backward_bfloat16.cu")
STEPS = ("whole", "statistics", "apply")  # in the order of Step
FUSED, POST_NORM, BATCH, STRIDED = "fused", "post_norm", "batch", "strided"

# What CMakeLists.txt asks for, and what a Release build adds.
FLAGS = ("-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "-fmad=false", "-std=c++17")
ANSWERS = ("-Werror=all-warnings", "--resource-usage", "--keep")


@dataclass(frozen=True)
class Instance:
    """The template arguments of a kernel but for T."""

    statistic: str
    adds: bool
    access: str  # Uniform, Mixed, Any, or "streamed" where a row is read again for each pass
    packs: int = 0
    rows: int = 0
    backward: bool = False
    step: str = "whole"  # of a split norm: "statistics" or "apply"


@dataclass
class Kernel:
    arch: str
    dtype: str  # or another name of its source
    instance: Instance
    registers: int
    stack: int
    spills: int
    ptx: Counter[str] = field(default_factory=Counter)  # opcodes
    ptx_order: list[str] = field(default_factory=list)
    local_in_ptx: bool = False
    program: Program | None = None  # where there is a cuobjdump

    @property
    def sass(self) -> Counter[str]:
        return self.program.opcodes if self.program else Counter()

    def __str__(self) -> str:
        i = self.instance
        kind = i.access + (f" {i.packs}x{i.rows}" if i.packs else "") + " backward" * i.backward
        kind += "" if i.step == "whole" else f" {i.step} of parts"
        return f"{self.arch} {self.dtype} {i.statistic}{' adding' * i.adds} {kind}"


def find(program: str) -> str | None:
    """Where a program of the CUDA toolkit is: in PATH, beside the nvcc that is, or in a wheel."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent] if nvcc else []
    for folder in sys.path:
        places += sorted(Path(folder or ".").glob("nvidia/cu*/bin"), reverse=True)
    inside = (place / program for place in places if (place / program).is_file())
    return shutil.which(program) or next(map(str, inside), None)


def disassembled(cubin: Path) -> str:
    """The SASS of a cubin, as cuobjdump prints it."""
    cuobjdump, nvdisasm = find("cuobjdump"), find("nvdisasm")
    assert cuobjdump, "there is no cuobjdump"
    assert nvdisasm, "there is no nvdisasm"
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [cuobjdump, "-sass", str(cubin)]
    return subprocess.check_output(command, text=True, env={**os.environ, "PATH": path})


def constant(name: str) -> int:
    """A number that cpp/plan.h defines."""
    text = (ROOT / "cpp" / "plan.h").read_text()
    match = re.search(rf"\b{name} (?:= )?(\w+)", text)
    assert match, f"cpp/plan.h has no {name}"
    return int(match[1]) if match[1].isdigit() else constant(match[1])


# Of a lane: kMostPacks.
MOST_MIXED_PACKS, MOST_PACKS = map(
    int, re.findall(r"kMostPacks = kMixed \? (\d) : (\d);", (ROOT / "cpp/plan.h").read_text())[0]
)


def named_instances() -> set[Instance]:
    """What `cuda/instances.cuh` chooses from, for both statistics, with a residual and without."""
    most = {"Uniform": MOST_PACKS, "Mixed": MOST_MIXED_PACKS}
    return {
        Instance(statistic, adds, access, packs, rows)
        for statistic in ("rms", "layer")
        for adds in (False, True)
        for access in most
        for packs, rows in [(1, 4), *((packs, 1) for packs in range(1, most[access] + 1))]
        if not (rows == 4 and adds and access == "Mixed")  # they are not unrolled
    }


def named_backward_instances(source: str) -> set[Instance]:
    """What a source of the backward pass names: `launch_backward` or `backward_` and a dtype."""
    if source == "launch_backward":
        return {Instance("", False, "fold", backward=True)}
    most = constant("kBackwardColumns")  # of a thread
    kinds = {
        "backward_float32": {("Uniform", packs) for packs in (1, 2, most // 4)},
        "backward_float16": {("Uniform", packs) for packs in (1, most // 8)},
        "backward_bfloat16": {("Uniform", packs) for packs in (1, most // 8)},
        "backward_any": {("Any4", 1), ("Any4", most // 4), ("Any8", 1), ("Any8", most // 8)}
        | {("streamed", 0)},
    }[source]
    found = {
        Instance(statistic, False, access, packs, 1 if packs else 0, backward=True)
        for statistic in ("rms", "layer")
        for access, packs in kinds
    }
    if source == "backward_any":
        found.add(Instance("", False, "columns", backward=True))
    return found


def named_streamed_instances() -> set[Instance]:
    """What `cuda/instances_streamed.cu` names, and each step of split rows."""
    whole = {
        Instance(statistic, adds, "streamed")
        for statistic in ("rms", "layer")
        for adds in (False, True)
    }
    for step in (FUSED, POST_NORM):  # of both statistics
        whole.add(Instance("layer", True, "streamed", step=step))
    whole.add(Instance("layer", False, "streamed", step=BATCH))
    whole.add(Instance("layer", False, "streamed", step=STRIDED))
    return whole | {
        Instance("layer", False, "streamed", backward=backward, step=step)
        for backward in (False, True)
        for step in STEPS[1:]
    }


_STEP = r"(?:LNS_4StepE(?P<step>[012])E)?"
_MANGLED = re.compile(
    r"row_norm_kernelI(?:(?:f|6__half|13__nv_bfloat16))?"
    r"LNS_9StatisticE(?P<statistic>[01])ELb(?P<adds>[01])E"
    r"(?:NS0_4WideI\w+?Lb(?P<mixed>[01])E+Li(?P<packs>\d+)ELi(?P<rows>\d+)E)?"
    + _STEP
    + r"(?:Lb(?P<fused>[01])E)?E"
)
_MANGLED_BACKWARD = re.compile(
    r"\d\d(?P<kind>row_norm_backward|long_row_backward|long_columns|fold)_kernel"
    r"(?:ILNS_9StatisticE(?P<statistic>[01])E)?"
    + _STEP
    + r"(?:NS0_\d(?P<access>Uniform|Any)I(?:f|6__half|13__nv_bfloat16)?(?:Li(?P<size>\d)ELi1E)?E+"
    + r"Li(?P<packs>\d)E)?"
)


def instance_of(mangled: str) -> Instance | None:
    if "post_norm_kernel" in mangled:
        return Instance("layer", True, "streamed", step=POST_NORM)
    if "norm_batch_kernel" in mangled:
        return Instance("layer", False, "streamed", step=BATCH)
    if "strided_row_norm_kernel" in mangled:
        return Instance("layer", False, "streamed", step=STRIDED)
    if match := _MANGLED_BACKWARD.search(mangled):
        statistic = ("rms", "layer")[int(match["statistic"])] if match["statistic"] else ""
        kind = {"fold": "fold", "long_columns": "columns", "long_row_backward": "streamed"}
        access = kind.get(match["kind"]) or match["access"] + (match["size"] or "")
        packs, step = int(match["packs"] or 0), STEPS[int(match["step"] or 0)]
        return Instance(
            statistic, False, access, packs, 1 if packs else 0, backward=True, step=step
        )
    match = _MANGLED.search(mangled)
    if not match:
        return None
    statistic = ("rms", "layer")[int(match["statistic"])]
    adds = match["adds"] == "1"
    if match["packs"] is None:
        step = FUSED if match["fused"] == "1" else STEPS[int(match["step"])]
        return Instance(statistic, adds, "streamed", step=step)
    access = "Mixed" if match["mixed"] == "1" else "Uniform"
    return Instance(statistic, adds, access, int(match["packs"]), int(match["rows"]))


def _numbers(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, f"ptxas did not say {pattern}"
    return max(map(int, found))


class Compiled(NamedTuple):
    """What ptxas says of each kernel, the PTX, and the machine code where there is a cuobjdump."""

    said: list[str]
    ptx: str
    programs: list[tuple[Any, ...]]  # the fields of each Program


def _compile(source: str, arch: str, folder: Path) -> Compiled:
    """Fails with the compiler's complaints."""
    folder.mkdir()
    done = subprocess.run(
        [*_command(arch), f"--keep-dir={folder}", "-c", str(CUDA / source), "-o", "kernels.o"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    said = done.stdout + done.stderr
    complaints = [line[:200] for line in said.splitlines() if re.search(r"error|warning", line)]
    complaint = "\n".join(complaints[:10]) or f"nvcc ended with {done.returncode}"
    fine = done.returncode == 0 and not complaints
    assert fine, f"{source} for {arch}:\n{complaint}"
    made = (folder / source).with_suffix(".cubin")
    has_kernels = "Compiling entry function" in said
    found = programs(made, disassembled(made)) if has_kernels and find("cuobjdump") else {}
    entries = said.split("Compiling entry function ")[1:]
    ptx = made.with_suffix(".ptx").read_text()
    return Compiled(entries, ptx, [astuple(program) for program in found.values()])


def _command(arch: str) -> list[str]:
    nvcc = find("nvcc")
    assert nvcc
    return [nvcc, f"--generate-code=arch=compute_{arch[3:]},code=[{arch}]", *FLAGS, *ANSWERS]


def _compiled(source: str, arch: str, folder: Path) -> Compiled:
    """What `_compile` made before of the same files with the same tools, or makes now."""
    contents = (CUDA / source).read_text()
    kept = KEPT / f"{source}.{arch}.{key(source, contents, *_command(arch))}.json"
    if not kept.exists():
        made = _compile(source, arch, folder / f"{source}.{arch}")
        for old in KEPT.glob(f"{source}.{arch}.*"):
            old.unlink()
        kept.with_suffix(".new").write_text(json.dumps(made))
        kept.with_suffix(".new").rename(kept)
    return Compiled(*json.loads(kept.read_text()))


def compile_text(source: str, arch: int) -> dict[str, Program]:
    """The kernels of a source that is no file, by symbol."""
    kept = KEPT / f"text.{key(str(arch), source, *FLAGS)}.json"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            cubin.with_suffix(".cu").write_text(source)
            command = [find("nvcc") or "nvcc", *FLAGS, f"-arch=sm_{arch}", "-cubin"]
            command += ["-o", str(cubin), str(cubin.with_suffix(".cu"))]
            subprocess.run(command, check=True)
            made = programs(cubin, disassembled(cubin))
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps([astuple(program) for program in made.values()]))
        unfinished.rename(kept)
        for old in sorted(KEPT.glob("text.*.json"), key=lambda path: path.stat().st_mtime)[:-100]:
            old.unlink(missing_ok=True)
    return {fields[0]: Program(*fields) for fields in json.loads(kept.read_text())}


def key(*parts: str) -> str:
    """A hash of all that an outcome depends on: `parts`, what sources include, and the tools."""
    headers = (*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *(ROOT / "cpp").glob("*.h"))
    version = subprocess.check_output([find("nvcc") or "nvcc", "--version"])
    known = [version, repr((parts, find("cuobjdump") is not None)).encode()]
    known += [path.name.encode() + path.read_bytes() for path in sorted(headers)]
    return hashlib.sha256(b"".join(known)).hexdigest()[:16]


_PTX_OPCODE = re.compile(r"^[\s{]*(?:@!?%?\w+\s+)?([a-z][\w.:]*)[\s;]", re.MULTILINE)


def _kernels(dtype: str, arch: str, made: Compiled) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    for text in made.said:
        name = text.split("'")[1]
        instance = instance_of(name)
        assert instance, f"{name} is none of the family"
        kernels[name] = Kernel(
            arch,
            dtype,
            instance,
            _numbers(r"Used (\d+) registers", text),
            _numbers(r"(\d+) bytes stack frame", text),
            _numbers(r"(\d+) bytes spill (?:stores|loads)", text),
        )
    for text in re.split(r"\.entry\s+", made.ptx)[1:]:
        kernel = kernels[text[: text.index("(")]]
        kernel.ptx_order = _PTX_OPCODE.findall(text)
        kernel.ptx = Counter(kernel.ptx_order)
        kernel.local_in_ptx = ".local" in text
    for program in (Program(*fields) for fields in made.programs):
        kernels[program.symbol].program = program
    return list(kernels.values())


@cache  # to read what has been compiled takes seconds, too
def compile_all(workers: int = 2) -> list[Kernel]:
    """Every instance, for WHOLE, and some for all of ARCHS; of several processes, one compiles and
    the others wait.
    """
    jobs = [
        (source, arch)
        for source in SOURCES
        for arch in ARCHS
        if arch == WHOLE or source in EVERYWHERE
    ]
    KEPT.mkdir(parents=True, exist_ok=True)
    with (
        (KEPT / "lock").open("w") as lock,
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(workers) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiled = list(pool.map(lambda job: _compiled(job[0], job[1], Path(folder)), jobs))
    kernels: list[Kernel] = []
    for (source, arch), made in zip(jobs, compiled, strict=True):
        if source not in ("launch.cu", "device.cu"):
            name = source.removesuffix(".cu").removeprefix("instances_")
            kernels += _kernels(name, arch, made)
    return kernels
