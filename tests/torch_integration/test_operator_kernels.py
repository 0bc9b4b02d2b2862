"""Operators that torch's dispatcher runs by the extension, and what it does without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import normkit
from normkit._serving import backends, native
from normkit._spec import FLAGS, OPS
from torch_integration.support import (
    FORMS,
    NAMES,
    arguments_of,
    assert_equal_bits,
    clones,
    operator,
    tensors,
)

KERNELS = [
    *NAMES,
    *(f"{name}_kernel" for name in NAMES),
    *(n + f for n in NAMES for f in FORMS[1:]),
]
CALLED = [(name, form) for name in NAMES for form in ("_kernel", *FORMS[1:])]

# Torch's own deep copies warn, and what it reads a package with.
uses_inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
needs_kernels = pytest.mark.skipif(
    not native.NATIVE_OPERATORS, reason="no extension, or torch lacks the C functions"
)


@contextmanager
def frames_of_normkit() -> Iterator[list[str]]:
    """The functions of the package that are entered inside."""
    folder = str(Path(normkit.__file__).parent)
    seen: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            seen.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def values_of(name: str, form: str, given: list[Any]) -> list[Any]:
    """Arguments in the order of an operator, which a kernel without gradients needs all."""
    arguments = list(arguments_of(name, "" if form == "_kernel" else form, clones(given)))
    schema = operator(name)._schema.arguments
    if form == "_kernel":
        arguments += [a.default_value for a in schema[len(arguments) :]]
    return arguments


def test_torch_has_the_functions_that_kernels_of_operators_take() -> None:
    if backends._missing:
        pytest.skip("no extension")
    names = {f"{name}{form}" for name in OPS for form in ("", "_kernel", *FORMS[1:])}
    assert {*names, "norm_backward", "norm_backward_kernel"} == native.NATIVE_OPERATORS


@needs_kernels
@pytest.mark.parametrize(("name", "form"), CALLED)
def test_operators_run_without_a_python_frame_with_the_bits_of_the_functions(
    name: str, form: str
) -> None:
    given = tensors(name, dtype=torch.bfloat16)
    arguments = values_of(name, form, given)
    with torch.no_grad(), frames_of_normkit() as entered:
        made = operator(name, form)(*arguments)
    assert entered == []
    expected = getattr(normkit, name)(*given) if hasattr(normkit, name) else None
    if form == "_kernel" and expected is not None:
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert_equal_bits(made[: len(expected)], expected)


@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_compiled_graphs_run_without_a_python_frame(name: str) -> None:
    given = tensors(name, grad=True)
    asked: list[tuple[Any, ...]] = []
    backward = torch.ops.normkit.norm_backward.default

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.normkit.norm_backward_kernel.default:
                asked.append(args)
            return func(*args, **(kwargs or {}))

    outputs = operator(name)(*given)
    with Recorder():
        torch.autograd.grad(outputs[0], given, torch.randn_like(outputs[0]))
    (arguments,) = asked
    with torch.no_grad(), frames_of_normkit() as entered:
        made = torch.ops.normkit.norm_backward_kernel(*arguments)
    assert entered == []
    with normkit.use_backend("cpu"), torch.no_grad():  # the implementation in Python
        assert_equal_bits(made, backward(*arguments))


@needs_kernels
def test_what_kernels_of_operators_refuse_python_runs_or_raises() -> None:
    kernel = torch.ops.normkit.rms_norm_
    x, weight = torch.randn(3, 8), torch.ones(8)
    expected = normkit.rms_norm(x.double(), weight)
    y = x.double()
    kernel(y, weight)
    assert_equal_bits(y, expected)
    with pytest.raises(ValueError, match=r"weight: expected shape \(8,\), got \(7,\)"):
        kernel(x, torch.ones(7))
    with pytest.raises(RuntimeError, match="x: expected float32, float16 or bfloat16"):
        kernel(x.int(), weight)
    flags = [False] * sum(flag in OPS["rms_norm"].fields for flag in FLAGS)
    given = (torch.randn(3, 8), weight, None, 1e-6, 0.0, *flags, torch.float8_e5m2)
    with pytest.raises(RuntimeError, match="out_dtype: expected .* got torch.float8_e5m2"):
        torch.ops.normkit.rms_norm_kernel(*given, False)
    with pytest.raises(ValueError, match='kind: expected "rms" or "layer", got "?\'?batch'):
        torch.ops.normkit.head_norm_(x, kind="batch")
    with pytest.raises(RuntimeError, match="x: a gradient is needed"):
        kernel(x.requires_grad_(), weight)


@needs_kernels
def test_operators_count_what_they_write() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    before = x._version, residual._version
    torch.ops.normkit.add_rms_norm_(x, residual)
    assert (x._version, residual._version) == (before[0] + 1, before[1] + 1)


WITHOUT_KERNELS = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import torch
spec = spec_from_file_location("normkit._C", sys.argv[1])
extension = sys.modules["normkit._C"] = module_from_spec(spec)
spec.loader.exec_module(extension)
extension.implement = lambda *_: False  # as where torch lacks a function
import normkit
from normkit._serving import native
assert not native.NATIVE_OPERATORS
x, weight = torch.randn(3, 8), torch.ones(8, requires_grad=True)
expected = normkit.rms_norm(x, weight)
assert torch.equal(torch.ops.normkit.rms_norm(x, weight)[0], expected)
compiled = torch.compile(normkit.rms_norm, fullgraph=True, backend="aot_eager")
with normkit.compile_mode("op"):
    y = compiled(x, weight)
assert torch.equal(y, expected)
y.sum().backward()
gradient, weight.grad = weight.grad, None
expected.sum().backward()
assert torch.equal(gradient, weight.grad)
with torch.no_grad():
    torch.ops.normkit.rms_norm_(x, weight)
    assert torch.equal(x, expected)
    try:
        torch.ops.normkit.rms_norm_(x.int(), weight)
    except TypeError as error:
        assert "x: expected float32" in str(error)
        print("as before")
"""


@needs_kernels
def test_a_torch_without_the_functions_runs_operators_in_python() -> None:
    path = backends._C.__file__
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNELS, path], capture_output=True, text=True
    )
    assert done.stdout == "as before\n", done.stderr


@needs_kernels
@uses_inductor
def test_an_ahead_of_time_package_runs_without_a_python_frame(tmp_path: Path) -> None:
    module = normkit.RMSNorm(8).requires_grad_(False)
    x = torch.randn(3, 8)
    program = torch.export.export(module, (x,))
    package = str(tmp_path / "norm.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    run = torch._inductor.aoti_load_package(package)
    with frames_of_normkit() as entered:
        made = run(x)
    assert entered == []
    assert_equal_bits(made, module(x))
