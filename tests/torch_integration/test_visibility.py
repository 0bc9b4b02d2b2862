"""Profilers, modes and tracers of torch see the operators, and tensors that only look like it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import normkit
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    assert_equal_bits,
    clones,
    compiled,
    listed,
    loss_of,
    randomised,
    results_and_gradients,
    tensors,
)

TESTS = Path(__file__).parents[1]
CPU = torch.profiler.ProfilerActivity.CPU


class Seen(TorchDispatchMode):
    """Write down the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run_with_every_call_dispatched(script: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        check=True,
        timeout=120,
        cwd=TESTS,
        env=os.environ | {"NORMKIT_ALWAYS_DISPATCH": "1"},
    )


def test_with_always_dispatch_everything_is_seen_and_no_bit_is_another(tmp_path: Path) -> None:
    given = {name: tensors(name, dtype=torch.bfloat16) for name in FUNCTIONS}
    made = {name: results_and_gradients(getattr(normkit, name), given[name]) for name in FUNCTIONS}
    torch.save((given, made), tmp_path / "eager.pt")
    run_with_every_call_dispatched(f"""
        import torch, normkit
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch_integration.support import *
        from torch_integration.test_visibility import CPU, Seen

        every, made = torch.load({str(tmp_path / "eager.pt")!r})
        for name in FUNCTIONS:
            function, in_place = getattr(normkit, name), getattr(normkit, f"{{name}}_")
            given = every[name]
            for a, b in zip(results_and_gradients(function, given), made[name], strict=True):
                assert_equal_bits(a, b)

            with Seen() as seen:
                function(*given)
                function(*given, out=torch.empty(2, 3, 8))
                in_place(*clones(given))
                loss_of(function(*clones(given, grad=True))).backward()
            ours = [n for n in seen.names if n.startswith("normkit")]
            expected = [f"normkit.{{name}}{{form}}.default"
                        for form in ("_kernel", "_out", "_", "_kernel")]
            assert ours == [*expected, "normkit.norm_backward_kernel.default"], ours

            graph = make_fx(lambda *g: function(*g), tracing_mode="real")(*given)
            assert called(graph, "normkit") == [f"normkit.{{name}}_kernel.default"]
            doubled = [2 * t for t in given]
            assert_equal_bits(graph(*doubled), function(*doubled))

        with torch.profiler.profile(activities=[CPU], acc_events=True) as profile:
            normkit.rms_norm_(torch.ones(2, 8))
            loss_of(normkit.RMSNorm(8)(torch.ones(2, 8))).backward()
        names = {{event.name for event in profile.events()}}
        assert {{"normkit::rms_norm", "normkit::rms_norm_", "normkit::norm_backward"}} <= names
    """)


def test_the_profiler_sees_eager_gradients_without_it() -> None:
    with torch.profiler.profile(activities=[CPU], acc_events=True) as profile:
        x = torch.ones(2, 8, requires_grad=True)
        loss_of(normkit.rms_norm(x)).backward()
    assert any("_NormBackward" in event.name for event in profile.events())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_jit_trace_computes_the_norm_of_new_inputs(name: str, grad: bool) -> None:
    function, given = getattr(normkit, name), tensors(name, grad=grad)
    traced = torch.jit.trace(lambda *g: function(*g), tuple(given), check_trace=False)
    again = [(2 * t).detach() for t in given]
    torch.testing.assert_close(traced(*again), function(*again))


class Wrapped(torch.Tensor):
    """Two tensors that go through every operator together; as DTensor and TwoTensor are made."""

    one: Tensor
    two: Tensor

    @staticmethod
    def __new__(cls, one: Tensor, two: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(
            cls, one.shape, strides=one.stride(), dtype=one.dtype, requires_grad=one.requires_grad
        )
        made.one, made.two = one, two
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return "Wrapped"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> Wrapped:
        return Wrapped(inner["one"], inner["two"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def side(name: str) -> Any:
            return pytree.tree_map_only(Wrapped, lambda t: getattr(t, name), (args, kwargs or {}))

        made = [func(*a, **k) for a, k in (side("one"), side("two"))]
        flat, spec = pytree.tree_flatten(made[0])
        pairs = zip(flat, pytree.tree_leaves(made[1]), strict=True)
        wrapped = [Wrapped(a, b) if isinstance(a, Tensor) else a for a, b in pairs]
        return pytree.tree_unflatten(wrapped, spec)


def wrapped(name: str, **rest: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    one, two = tensors(name, seed=1, **rest), tensors(name, seed=2, **rest)
    return [Wrapped(a, b) for a, b in zip(one, two, strict=True)], one, two


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_with_torch_dispatch_get_the_operators(name: str) -> None:
    function, (both, one, two) = getattr(normkit, name), wrapped(name, dtype=torch.bfloat16)
    made = listed(function(*both))
    assert all(type(t) is Wrapped for t in made)
    assert_equal_bits([t.one for t in made], function(*one))
    assert_equal_bits([t.two for t in made], function(*two))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_with_torch_dispatch_are_written_in_place(name: str) -> None:
    (both, one, two), in_place = wrapped(name), getattr(normkit, f"{name}_")
    made = listed(in_place(*both))
    assert made[0] is both[0]
    assert_equal_bits([t.one for t in made], in_place(*one))
    assert_equal_bits([t.two for t in made], in_place(*two))
    outputs = {"out": Wrapped(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))}
    assert listed(getattr(normkit, name)(*both, **outputs))[0] is outputs["out"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_with_torch_dispatch_get_gradients(name: str) -> None:
    def function(*given: Tensor) -> Any:
        return getattr(normkit, name)(*given, memory_efficient=adds(name))

    both, one, two = wrapped(name)
    expected = [results_and_gradients(function, given)[1] for given in (one, two)]
    for call in (function, compiled(function)):
        torch._dynamo.reset()
        wanting = [t.detach().requires_grad_() for t in both]
        made = listed(call(*wanting))
        weights = [torch.linspace(-1, 2, t.numel()).view(t.shape) for t in made]
        torch.autograd.backward(made, [Wrapped(w, w.clone()) for w in weights])
        assert_equal_bits([t.grad.one for t in wanting], expected[0])
        assert_equal_bits([t.grad.two for t in wanting], expected[1])


@pytest.mark.parametrize("kind", MODULES)
def test_modules_take_parameters_of_subclasses(kind: str) -> None:
    module, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    expected = module(x)
    for name, p in list(module.named_parameters()):
        double = Wrapped(p.detach().clone(), p.detach().clone())
        setattr(module, name, torch.nn.Parameter(double))
    y = module(Wrapped(x, x))
    assert type(y) is Wrapped
    assert_equal_bits([y.one, y.two], [expected, expected])


class Tagged(torch.Tensor):
    """A subclass that is told of functions, and whose results know what they came from."""

    calls: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Tagged.calls.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_with_torch_function_see_the_operators(name: str) -> None:
    given = tensors(name)
    tagged = [t.as_subclass(Tagged) for t in given]
    Tagged.calls = []
    made = listed(getattr(normkit, name)(*tagged))
    assert any(f"normkit.{name}" in call for call in Tagged.calls)
    assert all(type(t) is Tagged for t in made)
    plain = [t.as_subclass(Tensor) for t in made]
    torch.testing.assert_close(plain, listed(getattr(normkit, name)(*given)))
    mixed = [given[0], *tagged[1:]]
    assert type(listed(getattr(normkit, name)(*mixed))[0]) is Tagged


@pytest.mark.parametrize("name", FUNCTIONS)
def test_subclasses_with_torch_function_get_gradients(name: str) -> None:
    given = tensors(name)
    expected = results_and_gradients(getattr(normkit, name), given)[1]
    Tagged.calls = []
    wanting = [t.as_subclass(Tagged).detach().requires_grad_() for t in clones(given)]
    loss_of(getattr(normkit, name)(*wanting)).backward()
    torch.testing.assert_close([t.grad.as_subclass(Tensor) for t in wanting], expected)


def test_names_of_arguments_are_in_the_errors_of_subclasses() -> None:
    both, *_ = wrapped("rms_norm")
    with pytest.raises(ValueError, match="weight: expected shape"):
        normkit.rms_norm(both[0], Wrapped(torch.ones(7), torch.ones(7)))
