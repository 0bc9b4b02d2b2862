"""Who serves a call, and how one finds out."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch

import normkit
from conformance.support import (
    EVERY,
    EVERY_AFFINE,
    Op,
    assert_same_results,
    inputs_for,
    needs_kernels,
    run,
)
from normkit._serving import backends
from normkit._serving.refusal import Refusal
from normkit.testing import make_inputs


def call(name: str, *tensors: Any, **options: Any) -> Any:
    return getattr(normkit, name)(*tensors, **options)


def test_every_backend_is_listed_with_a_reason() -> None:
    found = normkit.backends()
    assert list(found) == ["cpu", "cuda", "triton", "reference"]
    for name, backend in found.items():
        assert backend.name == name
        assert isinstance(backend.usable, bool)
        assert backend.reason
    assert found["reference"].usable


def test_an_unknown_backend_is_an_error() -> None:
    for name in ("CPU", "", "gpu", None, 0):
        with (
            pytest.raises(ValueError, match="^name: expected one of auto, cpu, cuda, triton, ref"),
            normkit.use_backend(name),
        ):
            pass


def test_a_backend_that_is_not_usable_raises_and_says_why() -> None:
    if normkit.backends()["cuda"].usable:
        pytest.skip("CUDA is usable here")
    x = torch.ones(2, 4)
    reason = normkit.backends()["cuda"].reason
    with normkit.use_backend("cuda"), pytest.raises(ValueError, match="rms_norm") as raised:
        normkit.rms_norm(x)
    assert reason in str(raised.value)


def test_the_choice_ends_with_its_block_even_by_an_exception() -> None:
    x = torch.ones(2, 4)
    before = normkit.explain("rms_norm", x)
    with normkit.use_backend("reference"):
        assert normkit.explain("rms_norm", x).backend == "reference"
        with normkit.use_backend("auto"):
            assert normkit.explain("rms_norm", x) == before
        assert normkit.explain("rms_norm", x).backend == "reference"
        with pytest.raises(ValueError, match="weight"):
            normkit.explain("rms_norm", x, torch.ones(3))
        with pytest.raises(KeyError), normkit.use_backend("auto"):
            raise KeyError
        assert normkit.explain("rms_norm", x).backend == "reference"
    assert normkit.explain("rms_norm", x) == before


def test_the_choice_is_of_its_thread_alone() -> None:
    x = torch.ones(2, 4)
    found = []
    with normkit.use_backend("reference"):
        other = threading.Thread(target=lambda: found.append(normkit.explain("rms_norm", x)))
        other.start()
        other.join()
    assert found == [normkit.explain("rms_norm", x)]


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_explain_writes_nothing(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 3, 8, torch.float32)
    before = inputs._replace(x=inputs.x.clone(), residual=inputs.residual.clone())
    out = torch.full((3, 8), 7.0)
    with normkit.use_backend(backend.name):
        normkit.explain(op.name, *op.tensors(inputs), out=out, **op.selected)
        normkit.explain(f"{op.name}_", *op.tensors(inputs), **op.selected)
    assert (out == 7).all()
    assert torch.equal(inputs.x, before.x)
    assert torch.equal(inputs.residual, before.residual)


def test_explain_takes_a_function_or_its_name() -> None:
    x = torch.ones(2, 4)
    assert normkit.explain(normkit.rms_norm, x) == normkit.explain("rms_norm", x)
    for wrong in ("softmax", torch.softmax, 3):
        with pytest.raises(ValueError, match=r"^op: expected one of rms_norm, .*add_layer_norm_"):
            normkit.explain(wrong, x)


@needs_kernels
def test_explain_says_why_the_reference_serves() -> None:
    x = torch.ones(2, 4)
    reasons = {
        "x is float64": normkit.explain("rms_norm", x.double()),
        "plain torch.Tensor": normkit.explain(
            "rms_norm", x.as_subclass(type("S", (torch.Tensor,), {}))
        ),
    }
    with normkit.use_backend("reference"):
        reasons["use_backend"] = normkit.explain("rms_norm", x)
    for text, explanation in reasons.items():
        assert explanation.backend == "reference"
        assert text in explanation.reason


def test_a_kernel_asked_for_by_name_does_not_fall_back(kernels: Any) -> None:
    if kernels.name == "auto":
        assert normkit.rms_norm(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
        return
    with pytest.raises(ValueError, match="cannot serve this rms_norm: x is float64"):
        kernels.unexplained("rms_norm", torch.ones(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("op", EVERY_AFFINE, ids=str)
def test_calls_from_several_threads_at_once(backend: Any, op: Op) -> None:
    """Kernels keep scratch memory from one call to the next; no two threads may share it."""
    cases = [
        inputs_for(op, rows, n, torch.float16, seed=n)
        for rows, n in ((40, 700), (300, 96), (9, 4100))
    ]
    options = {"clamp_inf": True, "weight_offset": 1.0, "round_before_weight": True}
    expected = [run(backend, op, inputs, **options) for inputs in cases]
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for i in range(first, first + 30):
                result = run(backend, op, cases[i % 3], **options)
                assert_same_results(result, expected[i % 3])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_parameters_and_buffers_are_plain_tensors(kernels: Any) -> None:
    inputs = make_inputs((3, 8))
    expected = kernels("rms_norm", inputs.x, inputs.weight)
    for wrap in (torch.nn.Buffer, lambda t: torch.nn.Parameter(t, requires_grad=False)):
        assert torch.equal(kernels("rms_norm", wrap(inputs.x), wrap(inputs.weight)), expected)


def test_explain_answers_for_functions_of_normkit_only() -> None:
    """torch.nn.functional.rms_norm has the name of one, and other semantics."""
    for function in (torch.nn.functional.rms_norm, "rms_norm_tp", len, None, []):
        with pytest.raises(ValueError, match="^op: expected one of rms_norm, "):
            normkit.explain(function, torch.ones(2, 8))
    assert normkit.explain(normkit.rms_norm, torch.ones(2, 8)) == normkit.explain(
        "rms_norm", torch.ones(2, 8)
    )


# Private names of torch that the quick path reads.
@pytest.mark.parametrize(
    "path",
    [
        "autograd.forward_ad._current_level",
        "utils._python_dispatch._is_in_torch_dispatch_mode",
        "_C._is_tracing",
        "_C._are_functorch_transforms_active",
        "_C._increment_version",
        "Tensor._version",
        "Tensor.__dlpack_c_exchange_api__",
    ],
)
def test_a_private_name_that_torch_has_no_more_is_an_import_error(path: str) -> None:
    """Its absence would read as "off", and tangents or dispatch modes be passed by in silence."""
    if backends._missing:
        pytest.skip("no extension")
    with pytest.raises(ImportError, match=rf"torch\.{re.escape(path)}"):
        backends._C.bind_torch(_Without(torch, path.split(".")), Refusal)
    assert (
        normkit.rms_norm(torch.zeros(2, 4)).count_nonzero() == 0
    )  # what was bound before still is


class _Without:
    """An object that lacks what is at the end of a path."""

    def __init__(self, original: Any, path: list[str]) -> None:
        self._original, self._path = original, path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        if name != self._path[0]:
            return value
        if len(self._path) == 1:
            raise AttributeError(name)
        return _Without(value, self._path[1:])
