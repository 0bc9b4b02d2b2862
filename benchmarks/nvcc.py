"""The CUDA programs that measurements and tests need, compiled once and kept in build/gpu.

python benchmarks/nvcc.py --arch sm_90      # all of them beforehand, without a GPU or torch
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "gpu"
ARCH = "sm_{}{}"  # of a compute capability
BASELINES, BROKEN = "benchmarks/gpu_baselines.cu", "tests/gpu/broken.cu"
OPTIONS = {BASELINES: ("-O3", "-shared", "-Xcompiler", "-fPIC"), BROKEN: ("-lineinfo",)}


def compiled(source: str, arch: str) -> Path:
    """The program, of this very text and for this architecture; compiled if it is not kept yet."""
    digest = hashlib.sha256((ROOT / source).read_bytes()).hexdigest()[:12]
    path = KEPT / f"{Path(source).stem}-{arch}-{digest}"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        command = [_compiler(path), "-std=c++17", f"-arch={arch}", *OPTIONS[source]]
        subprocess.run([*command, "-o", part, ROOT / source], check=True)
        part.rename(path)
    path.chmod(0o755)  # a copy from another machine may have lost it
    return path


def _compiler(path: Path) -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise FileNotFoundError(
            f"expected nvcc in PATH or {home}/bin, or {path} from `make gpu-wheels`, got neither"
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_90")
    for source in OPTIONS:
        print(compiled(source, parser.parse_args().arch))
