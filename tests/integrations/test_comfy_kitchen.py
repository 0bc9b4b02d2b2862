"""`normkit.integrations.comfy_kitchen` in comfy-kitchen's registry, and in a stand-in for it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import normkit
from conformance.support import assert_same_bits, needs_kernels
from integrations import comfy_stand_in
from normkit.integrations import comfy_kitchen

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("comfy_kitchen") is None,
    reason="comfy-kitchen is not installed: `pip install --no-deps comfy-kitchen`",
)
KINDS = {"adaln": "layer", "rms_adaln": "rms"}
B16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = B16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


# ---------------------------------------------------------------- the functions


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "shape", [(), (1,), (24,), (1, 24), (3, 24), (2, 1, 24), (2, 3, 24), (2, 1, 1), (1, 3, 1)]
)
def test_scale_and_shift_are_broadcast_as_by_torch(name: str, shape: tuple[int, ...]) -> None:
    x, scale, shift = normal(2, 3, 24), normal(*shape), normal(*shape) / 2
    expected = normkit.modulated_norm(
        x, scale.expand(2, 3, 24), shift.expand(2, 3, 24), eps=0.3, kind=KINDS[name]
    )
    assert_same_bits(getattr(comfy_kitchen, name)(x, scale, shift, 0.3), expected)


def test_a_scale_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^scale: expected x's first .* got \(1, 23\)"):
        comfy_kitchen.adaln(normal(2, 24), normal(23), normal(24))


# ---------------------------------------------------------------- the registry


@pytest.fixture(params=["stand-in", pytest.param("package", marks=needs_it)])
def registry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "package":
        import comfy_kitchen as package

        yield package.registry
        comfy_kitchen.unregister()
        return
    made = {name: ModuleType(f"comfy_kitchen.{name}") for name in ("constraints", "registry")}
    vars(made["constraints"]).update(vars(comfy_stand_in))
    vars(made["registry"])["registry"] = comfy_stand_in.BackendRegistry()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", ModuleType("comfy_kitchen"))
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, f"comfy_kitchen.{name}", module)
    yield vars(made["registry"])["registry"]


@needs_kernels
def test_normkit_is_asked_first_until_it_is_unregistered(registry: Any) -> None:
    before = list(registry._priority)
    for _ in range(2):
        comfy_kitchen.register()
        assert registry._priority == ["normkit", *before]
        assert registry.is_available("normkit")
    for _ in range(2):
        comfy_kitchen.unregister()
        assert registry._priority == before
        assert not registry.is_available("normkit")
    comfy_kitchen.register()
    assert registry.is_available("normkit")


def test_without_kernels_nothing_is_registered(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = dataclasses.replace(normkit.backends()["cpu"], usable=False, reason="for a test")
    monkeypatch.setattr(comfy_kitchen, "backends", lambda: {"cpu": none, "cuda": none})
    before = list(registry._priority)
    with pytest.raises(RuntimeError, match=r"^comfy_kitchen: expected kernels .*for a test"):
        comfy_kitchen.register()
    assert registry._priority == before


@needs_it
def test_the_stand_in_is_as_the_package_is() -> None:
    # Of which the package's attribute of that name is an object.
    registry = importlib.import_module("comfy_kitchen.registry")
    constraints = importlib.import_module("comfy_kitchen.constraints")

    for name in ("register", "disable", "enable", "set_priority", "is_available"):
        real, ours = (
            inspect.signature(getattr(of.BackendRegistry, name)).parameters
            for of in (registry, comfy_stand_in)
        )
        assert [(p.name, p.kind) for p in real.values()] == [
            (p.name, p.kind) for p in ours.values()
        ]
    for name in ("MinDims", "ParamConstraint", "FunctionConstraints"):
        real, ours = (dataclasses.fields(getattr(of, name)) for of in (constraints, comfy_stand_in))
        assert [f.name for f in real] == [f.name for f in ours]
    # With ROCm it has another order; none has a name that is ours.
    assert isinstance(registry.registry._priority, list)
    assert comfy_kitchen.NAME not in registry.BackendRegistry()._priority


# ---------------------------------------------------------------- the package


@needs_it
@needs_kernels
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, B16])
def test_what_the_package_calls_is_normkit(name: str, dtype: torch.dtype) -> None:
    import comfy_kitchen as package

    assert list(inspect.signature(getattr(package, name)).parameters) == list(
        inspect.signature(getattr(comfy_kitchen, name)).parameters
    )
    x = normal(2, 1, 5, 3, 64, dtype=dtype)
    scale, shift = (normal(2, 1, 1, 1, 64, dtype=dtype) / size for size in (1, 2))
    given = {"x": x, "scale": scale, "shift": shift, "eps": 1e-5}
    own = getattr(package, name)(**given)
    wide = {key: t.float() if isinstance(t, torch.Tensor) else t for key, t in given.items()}
    exact = getattr(package, name)(**wide)
    assert package.registry.get_capable_backend(name, given) != "normkit"
    comfy_kitchen.register()
    try:
        assert package.registry.get_capable_backend(name, given) == "normkit"
        y = getattr(package, name)(**given)
        with package.registry.use_backend("eager"):
            assert_same_bits(getattr(package, name)(**given), own)
        x.requires_grad_()
        assert_same_bits(getattr(package, name)(**given).detach(), y)
    finally:
        comfy_kitchen.unregister()
    assert_same_bits(y, getattr(comfy_kitchen, name)(**given).detach())
    torch.testing.assert_close(y, exact.to(dtype))
    assert_same_bits(getattr(package, name)(**given).detach(), own)


@needs_it
@needs_kernels
def test_what_normkit_does_not_take_goes_on_to_other_backends() -> None:
    import comfy_kitchen as package

    comfy_kitchen.register()
    try:
        row = normal(24, dtype=torch.float64)
        with pytest.raises(package.NoCapableBackendError, match="normkit"):
            package.adaln(row, row, row)
        meta = torch.ones(2, 24, device="meta")
        chosen = package.registry.get_capable_backend(
            "adaln", {"x": meta, "scale": meta, "shift": meta}
        )
        assert chosen == "eager"
    finally:
        comfy_kitchen.unregister()
