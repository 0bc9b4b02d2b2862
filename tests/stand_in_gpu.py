"""A GPU that is not there: `torch.cuda`, NVML and gpu_baselines.cu, as the benchmarks use them.

Work runs on the host when it is captured.  What a device would punish is an error here: a graph
that is replayed before its capture has ended, a time that is read before anybody has waited for it.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

real_cuda = torch.cuda
MIB = 1 << 20


class Clock:
    """Of the device: what it has done, and up to where the host has waited for it."""

    ms = waited = 0.0


class Stream:
    def __init__(self, number: int = 1) -> None:
        self.cuda_stream = number

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def synchronize(self) -> None:
        Clock.waited = Clock.ms


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = Clock.ms

    def elapsed_time(self, end_event: Event) -> float:
        assert self.at is not None
        assert end_event.at is not None
        assert end_event.at <= Clock.waited, "the event has not been waited for"
        return end_event.at - self.at


class CUDAGraph:
    state = "new"

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.cuda.current is not self.cuda.default, "the default stream cannot be captured"
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert self.state == "new"
        self.state = "capturing"

    def capture_end(self) -> None:
        assert self.state == "capturing"
        self.state = "captured"

    def replay(self) -> None:
        assert self.state == "captured"
        Clock.ms += 1.0


class Cuda(ModuleType):
    """`torch.cuda` with one device; the names that are not here are torch's own."""

    def __init__(self, name: str = "NVIDIA H200") -> None:
        super().__init__("torch.cuda")
        self.Stream, self.Event, self.CUDAGraph = Stream, Event, lambda: CUDAGraph(self)
        self.default = self.current = Stream(0)
        self.properties = SimpleNamespace(name=name, major=9, minor=0, uuid="0-1-2")
        self.properties.multi_processor_count, self.properties.L2_cache_size = 4, MIB
        self.properties.total_memory = 16 * MIB
        self.there = True
        self.failure: Exception | None = None  # of everything that comes from now on

    def __getattr__(self, name: str) -> Any:
        return getattr(real_cuda, name)

    def is_available(self) -> bool:
        return self.there

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: Any = None) -> Any:
        return self.properties

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self.properties.major, self.properties.minor

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.properties.total_memory, self.properties.total_memory

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, device: Any = None) -> None:
        if self.failure:
            raise self.failure
        Clock.waited = Clock.ms

    def empty_cache(self) -> None:
        pass


def strangers() -> list[str]:
    """What the stand-ins have, and torch has not, or takes other arguments for."""
    found = []
    pairs = [(kind, getattr(real_cuda, kind.__name__)) for kind in (Stream, Event, CUDAGraph)]
    for ours, theirs in [(Cuda, real_cuda), *pairs]:
        for name, function in vars(ours).items():
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            if not hasattr(theirs, name):
                found.append(f"{ours.__name__}.{name}")
                continue
            arguments = set(inspect.signature(function).parameters) - {"self"}
            known = set(inspect.signature(getattr(theirs, name)).parameters)
            found += [f"{ours.__name__}.{name}({extra})" for extra in sorted(arguments - known)]
    return found


class Library:
    """gpu_baselines.cu, with the arguments in the order of its functions."""

    def __init__(self, path: str) -> None:
        self.launches: list[tuple[int, ...]] = []
        self.error: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        function = {"nk_copy": self._copy, "nk_launch": self._launch}[name]
        return lambda *arguments: function(*arguments)

    def _copy(self, tensors: int, packs: int, threads: int, most: int, *rest: Any) -> bytes | None:
        programmatic, source, target, source2, target2, size, stream = rest
        assert tensors in (1, 2)
        assert packs in (1, 4)
        assert threads % 32 == 0
        assert programmatic in (0, 1)
        assert isinstance(stream, ctypes.c_void_p)
        for to, of in ((target, source), (target2, source2)):
            ctypes.memmove(to, of, size.value // 16 * 16)
        return self.error

    def _launch(self, *arguments: Any) -> bytes | None:
        blocks, threads, cluster, programmatic, count, stream = arguments
        assert min(blocks, threads, cluster, count) > 0
        assert isinstance(stream, ctypes.c_void_p)
        self.launches.append((blocks, threads, cluster, programmatic, count))
        return self.error


def nvml(mhz: int = 1980) -> ModuleType:
    """The package pynvml; it cannot tell the temperature."""

    class NVMLError(Exception):
        pass

    def no_temperature(card: str, sensor: str) -> int:
        raise NVMLError("Not Supported")

    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-0-1-2": "card"}[uuid],
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetClockInfo": lambda card, clock: {"sm": mhz, "memory": 3201}[clock],
        "nvmlDeviceGetMaxClockInfo": lambda card, clock: {"sm": 1980}[clock],
        "nvmlDeviceGetPowerUsage": lambda card: 600_000,
        "nvmlDeviceGetEnforcedPowerLimit": lambda card: 700_000,
        "nvmlDeviceGetTemperature": no_temperature,
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": "sm",
        "NVML_CLOCK_MEM": "memory",
        "NVML_TEMPERATURE_GPU": "sensor",
    }
    module = ModuleType("pynvml")
    vars(module).update(answers)
    return module
