"""What processes do with CUDA before anything else.  Each function is run in one of its own."""

from __future__ import annotations

import ctypes
import os

import torch
from gpu_support import EVERY, call, inputs_on, overwrite, tensors_of

import normkit
from normkit import parallel

BF16 = torch.bfloat16
# A row kept by one warp, by a block, by a cluster of blocks, and streamed: a kernel for each.
SIZES = (128, 4096, 65536, 400_000)


def in_use(index: int) -> bool:
    """Whether this process has a primary context on a device; asking makes none."""
    driver = ctypes.CDLL("libcuda.so.1")
    flags, active = ctypes.c_uint(), ctypes.c_int()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxGetState(index, *map(ctypes.byref, (flags, active))) == 0
    return bool(active.value)


def has_context() -> bool:
    """Whether this thread has a current context."""
    context = ctypes.c_void_p()
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value is not None


def capture(mode: str, loading: str) -> None:
    """Capture the first calls of all, whose kernels are not loaded yet."""
    os.environ["CUDA_MODULE_LOADING"] = loading  # read when the first context is made
    inputs = [torch.full((3, n), 3.0, dtype=BF16, device="cuda") for n in SIZES]
    outputs = [torch.zeros_like(x) for x in inputs]
    of_ops = [(op, inputs_on(op, 3, 128)) for op in EVERY]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode), normkit.use_backend("cuda"):
        for x, y in zip(inputs, outputs, strict=True):
            normkit.rms_norm(x, out=y)
        results = [call(op, given) for op, given in of_ops]
    for x in inputs:
        x.copy_(torch.randn(x.shape))
    for op, given in of_ops:
        overwrite(given, inputs_on(op, 3, 128, seed=1))
    graph.replay()
    torch.cuda.synchronize()
    for (op, given), made in zip(of_ops, results, strict=True):
        for got, expected in zip(tensors_of(made), tensors_of(call(op, given)), strict=True):
            assert torch.equal(got, expected), op
    for x, y in zip(inputs, outputs, strict=True):
        assert torch.equal(y, normkit.rms_norm(x))


def use_the_second_device_only() -> None:
    """Call everything that looks for a device, and leave the first one alone."""
    assert not in_use(0)
    x = torch.ones(8, 4, 128, dtype=BF16, device="cuda:1")
    weight = torch.ones(128, dtype=BF16, device="cuda:1", requires_grad=True)
    with normkit.use_backend("cuda"):
        normkit.rms_norm(x, weight.detach())
        normkit.rms_norm(x, weight.detach(), out=torch.empty_like(x))
        normkit.rms_norm(x, weight).sum().backward()
        normkit.explain("rms_norm", x)
    stream = torch.cuda.Stream("cuda:1")
    parallel.rms_norm_tp([x, x], context=parallel.TPContext([1, 1], [stream, stream]))
    assert normkit.backends()["cuda"].usable
    x.cpu()  # waits
    assert in_use(1)
    assert not in_use(0), "normkit made a context on a device that nobody uses"
    torch.ones(1, device="cuda:0")
    assert in_use(0), "a context is not noticed"
