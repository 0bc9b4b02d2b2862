"""How the GPU benchmarks measure: graphs of many calls, cold or hot caches, and the baselines.

What is timed is always one replay of a CUDA graph of many calls, between two events, with an
untimed replay queued before it.  The device is then busy while the host queues the timed one, so
that no launch of the host's is part of a time.  Everything here that decides something
(`rotation`, `spread`, `parse_smi`) is plain arithmetic and runs without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normkit._bench import Comparison

SOURCE = Path(__file__).with_name("gpu_baselines.cu")
BUILD = Path(__file__).resolve().parents[1] / "build" / "benchmarks"

# Between two uses of a buffer this many times the second-level cache has passed through it.
COLD_L2S = 3
MAX_CALLS, MIN_CALLS = 200, 2
SAMPLE_US = 600.0
# For choosing the number of calls only: about what a call costs on the device that this is for.
CALL_US, BYTES_PER_US = 2.0, 4.0e6
# Never more than this share of the free memory: competitors allocate outputs of their own.
MEMORY_SHARE = 0.4


class BaselineError(RuntimeError):
    """A baseline could not be built or launched."""


# -------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Rotation:
    """How many calls a graph has, and over how many sets of buffers they go round."""

    calls: int
    sets: int
    flush: bool  # the sets would stay in the cache from one replay to the next


def rotation(
    moved: int, held: int, l2: int, free: int, *, hot: bool = False, sample_us: float = SAMPLE_US
) -> Rotation | None:
    """Plan the graph of a call that moves `moved` bytes between buffers of `held` bytes.

    None when not even one set fits the memory.
    """
    affordable = int(free * MEMORY_SHARE) // max(held, 1)
    if affordable < 1:
        return None
    calls = round(sample_us / (CALL_US + moved / BYTES_PER_US))
    calls = min(max(calls, MIN_CALLS), MAX_CALLS)
    if hot:
        return Rotation(calls, 1, False)
    cold = -(-COLD_L2S * l2 // max(held, 1))
    if cold <= min(calls, affordable):
        return Rotation(-(-calls // cold) * cold, cold, False)
    sets = min(calls, affordable)
    return Rotation(sets, sets, True)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Half of the values lie between these two; with one value, both are that."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def noise(values: Sequence[float]) -> float:
    """The interquartile range as a share of the median."""
    low, high = spread(values)
    return (high - low) / statistics.median(values)


def differences(compared: Comparison, name: str, floor: str) -> list[float]:
    """Microseconds of `name` above `floor`, taken inside each round."""
    pairs = zip(compared.samples[name], compared.samples[floor], strict=True)
    return [(a - b) * 1e6 for a, b in pairs]


# ------------------------------------------------------------------------------------------ graphs


@dataclass
class Graph:
    """A captured sequence of calls, and what has to live as long as it does."""

    cuda_graph: torch.cuda.CUDAGraph
    calls: int
    alive: Any


def capture(calls: Sequence[Callable[[], Any]], keep_graph: bool = False) -> Graph:
    """Capture calls in order, in one stream.

    Not with `torch.cuda.graph`, which collects garbage and empties the allocator's cache first: for
    hundreds of cases that takes longer than the measurements.  Outputs are kept, so that each call
    that allocates has an output of its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # whatever compiles or loads at its first call does it here
            calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep_graph else torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            alive = [call() for call in calls]
        except BaseException:
            _abandon(graph)
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Graph(graph, len(calls), (list(calls), alive))


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    with contextlib.suppress(
        RuntimeError
    ):  # the error that spoilt the capture is the one to report
        graph.capture_end()


def time_graphs(
    graphs: Mapping[str, Graph], rounds: int, flush: Callable[[], None] | None = None
) -> Comparison:
    """Time one replay of each graph in each round, in an order that rotates.

    Everything is queued at once and read at the end: the device never waits for the host.
    """
    names = list(graphs)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graphs[name].cuda_graph.replay()
            if flush:
                flush()
            begin.record()
            graphs[name].cuda_graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return Comparison(
        {
            name: [begin.elapsed_time(end) * 1e-3 / graphs[name].calls for begin, end in pairs]
            for name, pairs in events.items()
        }
    )


class EagerTimer(timeit.Timer):
    """Times calls as the host sees them, each sample from an idle device on."""

    def timeit(self, number: int = 1000) -> float:
        torch.cuda.synchronize()
        return super().timeit(number)


# --------------------------------------------------------------------------------------- baselines


class LaunchShape(ctypes.Structure):
    """How a kernel is launched; the same layout as in gpu_baselines.cu."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_smem", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("programmatic", ctypes.c_uint),
    )

    def described(self) -> dict[str, Any]:
        return {
            "grid": list(self.grid),
            "block": list(self.block),
            "dynamic_smem": self.dynamic_smem,
            "cluster": self.cluster,
            "programmatic": bool(self.programmatic),
        }


@dataclass(frozen=True)
class CopyShape:
    """One way to launch the copy; blocks_per_sm 0: a block per chunk."""

    threads: int
    packs_in_flight: int
    blocks_per_sm: int

    def __str__(self) -> str:
        grid = f", {self.blocks_per_sm} blocks an SM" if self.blocks_per_sm else ""
        return f"{self.threads} threads x {self.packs_in_flight} packs{grid}"


COPY_SHAPES = (
    CopyShape(256, 1, 0),
    CopyShape(256, 4, 0),
    CopyShape(512, 2, 0),
    CopyShape(1024, 1, 0),
    CopyShape(512, 4, 4),
    CopyShape(256, 8, 8),
)


def nvcc() -> str | None:
    """The CUDA compiler, from PATH, CUDA_HOME or its usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [str(Path(home) / "bin") for home in (*homes, "/usr/local/cuda")]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def compile_cuda(source: Path, output: Path, arch: str, *options: str) -> None:
    compiler = nvcc()
    if compiler is None:
        raise BaselineError("there is no nvcc in PATH, CUDA_HOME or /usr/local/cuda")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}")
    command = [compiler, "-O3", "-std=c++17", f"-arch={arch}", *options]
    done = subprocess.run([*command, "-o", partial, source], capture_output=True, text=True)
    if done.returncode:
        raise BaselineError(f"nvcc failed on {source.name}: {done.stderr.strip()[-2000:]}")
    partial.replace(output)


def _aligned(t: torch.Tensor) -> int:
    """Where t begins, or up to 15 bytes before: the copy only knows whole packs."""
    return t.data_ptr() & ~15


class Baselines:
    """The library of gpu_baselines.cu, launching on torch's current stream."""

    def __init__(self, arch: str | None = None) -> None:
        if arch is None:
            arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
        path = BUILD / f"gpu_baselines-{arch}-{platform.machine()}-{digest}.so"
        if not path.exists():
            compile_cuda(SOURCE, path, arch, "-shared", "-Xcompiler", "-fPIC")
        self._library = ctypes.CDLL(str(path))
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        shape = ctypes.POINTER(LaunchShape)
        arguments = {
            "nk_copy": [number] * 4 + [size] + [pointer] * 4 + [size, pointer],
            "nk_read": [pointer, size, number, pointer, pointer],
            "nk_empty": [shape, pointer],
            "nk_launch_loop": [shape, number, ctypes.POINTER(ctypes.c_double), pointer],
            "nk_kernels_of_graph": [pointer, shape, number, ctypes.POINTER(number)],
        }
        for name, types in arguments.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, ctypes.c_char_p
        self._flushed: tuple[torch.Tensor, torch.Tensor] | None = None

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            raise BaselineError(f"{name}: {error.decode()}")

    def copy(
        self, shape: CopyShape, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> None:
        """Move the bytes of `sources` to `targets`, two to one by combining them.

        Strides do not matter: what moves is as many bytes as the elements have, from the start.
        """
        used = sources[0].numel() * sources[0].element_size()
        at = [_aligned(t) for t in (sources[0], sources[-1])]
        to = [_aligned(t) for t in (targets[0], targets[-1])]
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self._call(
            "nk_copy",
            len(sources),
            len(targets),
            shape.packs_in_flight,
            shape.threads,
            shape.blocks_per_sm * sms,
            *at,
            *to,
            used,
            torch.cuda.current_stream().cuda_stream,
        )

    def flush(self) -> None:
        """Leave nothing of earlier calls in the second-level cache, and nothing to write back."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if self._flushed is None:
            size = COLD_L2S * properties.L2_cache_size
            zeros = torch.zeros(size, dtype=torch.uint8, device="cuda")
            self._flushed = zeros, torch.zeros(4, dtype=torch.int32, device="cuda")
        zeros, never = self._flushed
        blocks = 4 * properties.multi_processor_count
        stream = torch.cuda.current_stream().cuda_stream
        self._call("nk_read", zeros.data_ptr(), zeros.numel(), blocks, never.data_ptr(), stream)

    def empty(self, shape: LaunchShape) -> None:
        self._call("nk_empty", ctypes.byref(shape), torch.cuda.current_stream().cuda_stream)

    def launch_timer(self, shape: LaunchShape) -> LaunchTimer:
        return LaunchTimer(self, shape)

    def launch_loop(self, shape: LaunchShape, number: int) -> float:
        seconds = ctypes.c_double()
        stream = torch.cuda.current_stream().cuda_stream
        self._call("nk_launch_loop", ctypes.byref(shape), number, ctypes.byref(seconds), stream)
        return seconds.value

    def kernels_of(self, call: Callable[[], Any], calls: int = 2) -> list[LaunchShape]:
        """The launch shapes of `calls` calls in a row, as a graph has them.

        More than one call, because whether launches are programmatic is a property of the edge
        between two.
        """
        graph = capture([call] * calls, keep_graph=True).cuda_graph
        shapes, count = (LaunchShape * 64)(), ctypes.c_int()
        self._call("nk_kernels_of_graph", graph.raw_cuda_graph(), shapes, 64, ctypes.byref(count))
        return list(shapes[: count.value])


class LaunchTimer:
    """Bare launches of an empty kernel from a loop in C, for `_bench.paired`."""

    def __init__(self, baselines: Baselines, shape: LaunchShape) -> None:
        self._baselines, self._shape = baselines, shape

    def timeit(self, number: int) -> float:
        torch.cuda.synchronize()
        return self._baselines.launch_loop(self._shape, number)


# ------------------------------------------------------------------------------------------ device

_SMI = {
    "gpu": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_mhz_most": "clocks.max.sm",
    "power_cap_w": "power.limit",
    "power_w": "power.draw",
    "celsius": "temperature.gpu",
}


def parse_smi(line: str) -> dict[str, Any]:
    """One line of `nvidia-smi --query-gpu`: numbers where they are numbers."""
    found: dict[str, Any] = {}
    for name, text in zip(_SMI, (part.strip() for part in line.split(",")), strict=True):
        try:
            found[name] = text if name == "driver" else float(text)
        except ValueError:
            found[name] = text
    return found


def device_state() -> dict[str, Any]:
    """What nvidia-smi says of the device just now, or why it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia_smi": "not found"}
    command = [program, f"--query-gpu={','.join(_SMI.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        lines = done.stdout.splitlines()
        return parse_smi(lines[torch.cuda.current_device() if len(lines) > 1 else 0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"nvidia_smi": f"{type(error).__name__}: {error}"}


def device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "os": platform.platform(),
    }
