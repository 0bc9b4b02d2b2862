"""Measuring on a GPU: graphs of many calls, cold or hot caches, and what calls are held against.

What is timed is one replay of a CUDA graph of many calls, between two events, with an untimed
replay queued before it.  The device is then busy while the host queues the timed one, so that no
launch of the host's is part of a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import nvcc
import torch
from torch import Tensor
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from normkit._bench import Comparison

DEVICE = "cuda"
Read = TypeVar("Read")

# Between two uses of a buffer this many times the second-level cache has passed through it.
COLD_L2S = 3
MIN_CALLS, MAX_CALLS, SAMPLE_US = 2, 200, 600.0
# For choosing the number of calls only: about what a call costs on the device that this is for.
CALL_US, BYTES_PER_US = 2.0, 4.0e6
# Never more than this share of the free memory: competitors allocate outputs of their own.
MEMORY_SHARE = 0.4


def rotation(moved: int, held: int, l2: int, free: int) -> tuple[int, int, bool]:
    """The calls of a graph, the sets of buffers that they go round, and whether these need a flush.

    A call moves `moved` bytes between buffers of `held` bytes.
    """
    affordable = int(free * MEMORY_SHARE) // max(held, 1)
    if affordable < 1:
        raise MemoryError(f"one call needs {held >> 20} MiB, and that is too much here")
    calls = min(max(round(SAMPLE_US / (CALL_US + moved / BYTES_PER_US)), MIN_CALLS), MAX_CALLS)
    cold = -(-COLD_L2S * l2 // max(held, 1))
    if cold <= min(calls, affordable):
        return -(-calls // cold) * cold, cold, False
    sets = min(calls, affordable)
    return sets, sets, True


def properties() -> Any:
    return torch.cuda.get_device_properties(torch.cuda.current_device())


class Graph(NamedTuple):
    """A captured sequence of calls, and what has to live as long as it does."""

    cuda_graph: torch.cuda.CUDAGraph
    calls: int
    alive: Any


def capture(calls: Sequence[Callable[[], Any]]) -> Graph:
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
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            alive = [call() for call in calls]
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Graph(graph, len(calls), (list(calls), alive))


def time_graphs(
    graphs: Mapping[str, Graph], rounds: int, flush: Callable[[], Any] | None = None
) -> Comparison:
    """Time one replay of each graph in each round, in an order that rotates.

    Everything is queued at once and read at the end: the device never waits for the host.
    """
    names = list(graphs)
    events: dict[str, list[Any]] = {name: [] for name in names}
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
    seconds = {k: [begin.elapsed_time(end) / 1e3 for begin, end in v] for k, v in events.items()}
    calls = {name: graph.calls for name, graph in graphs.items()}
    return Comparison({k: Measurement(calls[k], v, TaskSpec(k, "")) for k, v in seconds.items()})


def warm_up(graph: Graph, seconds: float = 0.1) -> None:
    """Replay until the clocks are up: an idle card takes its first samples at a fifth of them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        graph.cuda_graph.replay()
        torch.cuda.synchronize()


def under_load(graph: Graph, read: Callable[[], Read]) -> Read:
    """What `read` returns while the device replays: at rest its clocks are others."""
    with ThreadPoolExecutor(1) as pool:
        graph.cuda_graph.replay()
        reading = pool.submit(read)
        while not reading.done():
            graph.cuda_graph.replay()
            torch.cuda.synchronize()
    return reading.result()


class Launch(NamedTuple):
    """How a kernel is launched."""

    blocks: int
    threads: int
    cluster: int
    programmatic: bool  # may start before the kernel ahead has ended

    @classmethod
    def of_plan(cls, plan: str, rows: int) -> Launch:
        """What `explain` says of a norm of so many rows."""
        blocks = re.search(r"(?:(\d+) to a block of|by) (\d+)", plan)
        if not blocks:
            raise ValueError(f"plan: expected the threads of a block, got {plan!r}")
        clusters = re.search(r"in clusters of (\d+)", plan)
        cluster = int(clusters[1]) if clusters else 1
        count = -(-rows // int(blocks[1] or 1)) * cluster
        return cls(count, int(blocks[2]), cluster, "programmatic" in plan)


# Threads of a block, packs in flight, blocks on a processor (0: a block per chunk).
COPY_SHAPES = ((256, 1, 0), (256, 4, 0), (512, 4, 0), (1024, 1, 0), (512, 4, 4), (256, 4, 8))


class Baselines:
    """The library of gpu_baselines.cu, launching on torch's current stream."""

    def __init__(self) -> None:
        arch = nvcc.ARCH.format(*torch.cuda.get_device_capability())
        self._library = ctypes.CDLL(str(nvcc.compiled(nvcc.BASELINES, arch)))
        # Read to drive out of the cache what is in it: nothing has to be written back then.
        words = COLD_L2S * properties().L2_cache_size // 4
        self._zeros = torch.zeros(words, dtype=torch.int32, device=DEVICE)

    def flush(self) -> None:
        """Leave nothing of earlier calls in the second-level cache."""
        self._zeros.amax()

    def copy(self, shape: Sequence[int], programmatic: bool, *pairs: tuple[Tensor, Tensor]) -> None:
        """Move the bytes of one or two tensors to others, in one launch.

        Strides do not matter: what moves is as many bytes as the elements have, from the start or
        from up to 15 bytes before it.
        """
        threads, packs, blocks_per_sm = shape
        most = blocks_per_sm * properties().multi_processor_count
        ends = (*pairs[0], *pairs[-1])
        places = [ctypes.c_void_p(end.data_ptr() & ~15) for end in ends]
        size = ctypes.c_int64(ends[0].numel() * ends[0].element_size())
        how = (len(pairs), packs, threads, most, int(programmatic))
        self._call("nk_copy", *how, *places, size)

    def launch(self, launch: Launch, count: int = 1) -> None:
        """Launch an empty kernel `count` times."""
        self._call("nk_launch", *map(int, launch), count)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
