"""ExLlamaV2's own norm modules, unmodified, on normkit's functions.

The files come from the installed distribution.  Importing it would compile CUDA code, so its
package is entered without running it: `exllamav2.ext` is the functions of normkit, and
`exllamav2.stloader`, whose reader is in the extension too, reads with safetensors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import normkit
from compat.exllamav2_support import (
    DTYPES,
    EPS,
    HEADS,
    make_model,
    values,
)
from conformance.support import assert_same_bits, bits
from normkit.compat import exllamav2 as ours
from normkit.compat import exllamav2_ext
from normkit.testing import assert_accurate

try:
    FOLDER = str(distribution("exllamav2").locate_file("exllamav2"))
except PackageNotFoundError:
    reason = "ExLlamaV2's sources are not here: pip install --no-deps exllamav2==0.3.2"
    pytest.skip(reason, allow_module_level=True)

KINDS = ("RMSNorm", "LayerNorm", "HeadNorm rmsnorm", "HeadNorm layernorm")
kinds = pytest.mark.parametrize("kind", KINDS)


def _named(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


class STFile:
    """The one of `exllamav2.stloader`, as far as norms are loaded with it."""

    def __init__(self, filename: str) -> None:
        self.filename = filename

    @staticmethod
    def open(filename: str, keymap: Any = None) -> STFile:
        assert keymap is None
        return STFile(filename)

    def get_tensor(self, key: str, device: str) -> Tensor:
        with safe_open(self.filename, framework="pt", device=device) as file:
            return file.get_tensor(key)


@contextmanager
def installed(extension: ModuleType = exllamav2_ext) -> Iterator[Any]:
    """The modules of ExLlamaV2 on this extension, for as long as this lasts."""
    before = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "exllamav2"}
    for name in before:
        del sys.modules[name]
    for module in (
        _named("exllamav2", __path__=[FOLDER]),
        _named(
            "exllamav2.ext",
            exllamav2_ext=extension,
            none_tensor=exllamav2_ext.none_tensor,
        ),
        _named("exllamav2.stloader", STFile=STFile, cleanup_stfiles=None),
    ):
        sys.modules[module.__name__] = module
    try:
        yield SimpleNamespace(
            **{
                name: importlib.import_module(f"exllamav2.{name}")
                for name in ("rmsnorm", "layernorm", "headnorm", "tensor_p")
            }
        )
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "exllamav2"]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def originals() -> Iterator[Any]:
    with installed() as modules:
        yield modules


def test_sys_modules_are_as_before_afterwards() -> None:
    before = set(sys.modules)
    with installed() as originals:
        assert Path(originals.rmsnorm.__file__).is_relative_to(FOLDER)
        assert originals.rmsnorm.ext_c is exllamav2_ext
    left = {name for name in set(sys.modules) - before if name.startswith("exllamav2")}
    assert not left


def test_functions_are_replaced_one_by_one_at_any_time(tmp_path: Path) -> None:
    extension = ModuleType("exllamav2_ext")
    with installed(extension) as originals:
        theirs, norm = both(originals, "RMSNorm", tmp_path, stored_for("RMSNorm"))
        x = states("RMSNorm")
        with pytest.raises(AttributeError, match="rms_norm"):
            theirs.forward(x)
        extension.rms_norm = exllamav2_ext.rms_norm  # type: ignore[attr-defined]
        assert_same_bits(theirs.forward(x), norm.forward(x))


def test_modules_of_exllamav2_make_ours_where_they_are_put_in(
    originals: Any, tmp_path: Path
) -> None:
    moe_mlp = importlib.import_module("exllamav2.moe_mlp")
    moe_mlp.ExLlamaV2RMSNorm = ours.ExLlamaV2RMSNorm
    weight = stored_for("RMSNorm")
    model = make_model(tmp_path, {"model.layers.0.ln_2.weight": weight})
    keys = {"norm_2": ".ln_2", "mlp_gate": "", "mlp_up": "", "mlp_down": "", "mlp_expert_gate": ""}
    vars(model.config.arch.lm).update(norm="rmsnorm", keys=keys, mlp_bias=False)
    vars(model.config).update(intermediate_size=32, num_experts=0, num_experts_per_token=0)
    mlp = moe_mlp.ExLlamaV2MoEMLP(model, "model.layers.0", 0)
    mlp.set_device_idx(-1)
    norm = mlp.post_attention_layernorm
    with torch.inference_mode():  # as ExLlamaV2 loads
        norm.load()
    assert isinstance(norm, ours.ExLlamaV2RMSNorm)
    assert mlp.submodules[0] is norm
    x = states("RMSNorm")
    check("RMSNorm", norm.forward(x), x, weight)


# -------------------------------------------------------------------------------------- one device


def both(
    originals: Any, kind: str, folder: Path, weight: Tensor, bias: Tensor | None = None, **lm: Any
) -> tuple[Any, Any]:
    """ExLlamaV2's module and normkit's, loaded from the same file."""
    name, *headnorm = kind.split()
    tensors = {"model.norm.weight": weight} | ({} if bias is None else {"model.norm.bias": bias})
    model = make_model(folder, tensors, **({"headnorm": headnorm[0]} if headnorm else {}), **lm)
    heads = HEADS if headnorm else ()
    made = []
    for module in (getattr(originals, name.lower()), ours):
        norm = getattr(module, f"ExLlamaV2{name}")(model, "model.norm", *heads)
        norm.set_device_idx(-1)
        norm.load()
        made.append(norm)
    return made[0], made[1]


def stored_for(kind: str, seed: int = 1) -> Tensor:
    return values(*(HEADS if kind.startswith("Head") else (24,)), seed=seed)


def states(kind: str, dtype: torch.dtype = torch.float16) -> Tensor:
    return values(2, 5, *(HEADS if kind.startswith("Head") else (24,)), dtype=dtype, seed=7)


def check(kind: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Against float64, with the weight as the module has it."""
    rms = "layer" if "layernorm" in kind.lower() else "rms"
    assert_accurate(y, x, weight, bias, EPS, kind=rms, clamp_inf=True)


@kinds
@pytest.mark.parametrize("has_bias", [False, True])
def test_forward_of_the_originals_is_accurate_and_ours_has_its_bits(
    originals: Any, tmp_path: Path, kind: str, has_bias: bool
) -> None:
    if kind == "RMSNorm" and has_bias:
        with pytest.raises(AssertionError, match="RMSNorm does not support bias"):
            both(originals, kind, tmp_path, stored_for(kind), stored_for(kind, 2))
        return
    weight, bias = stored_for(kind), stored_for(kind, 2) if has_bias else None
    theirs, norm = both(originals, kind, tmp_path, weight, bias)
    x = states(kind)
    y = theirs.forward(x.clone())
    check(kind, y, x, weight, bias)
    assert_same_bits(norm.forward(x), y)
    as_dict = theirs.forward(x.clone(), intermediates=True)
    assert_same_bits(as_dict["hidden_states"], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_fp32", [False, True])
def test_an_original_rms_norm_takes_every_dtype_and_makes_float16_or_float32(
    originals: Any, tmp_path: Path, dtype: torch.dtype, output_fp32: bool
) -> None:
    weight = stored_for("RMSNorm")
    theirs, norm = both(originals, "RMSNorm", tmp_path, weight)
    x = states("RMSNorm", dtype)
    y = theirs.forward(x, output_fp32=output_fp32)
    assert y.dtype == (torch.float32 if output_fp32 else torch.float16)
    check("RMSNorm", y, x, weight)
    assert_same_bits(norm.forward(x, output_fp32=output_fp32), y)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_one_weight_of_a_head_norm_is_repeated_in_both(
    originals: Any, tmp_path: Path, kind: str
) -> None:
    theirs, norm = both(originals, kind, tmp_path, values(8), values(8, seed=2))
    assert_same_bits(norm.weight.data, theirs.weight.data)
    assert_same_bits(norm.bias.data, theirs.bias.data)
    x = states(kind)
    assert_same_bits(norm.forward(x), theirs.forward(x.clone()))


def test_an_original_head_norm_writes_its_input_and_ours_does_not(
    originals: Any, tmp_path: Path
) -> None:
    kind = "HeadNorm rmsnorm"
    theirs, norm = both(originals, kind, tmp_path, stored_for(kind))
    x = states(kind)
    before = bits(x).clone()
    y = norm.forward(x)
    assert torch.equal(bits(x), before)
    assert theirs.forward(x) is x
    assert_same_bits(x, y)


@kinds
def test_attributes_of_ours_are_those_of_the_originals(
    originals: Any, tmp_path: Path, kind: str
) -> None:
    theirs, norm = both(originals, kind, tmp_path, stored_for(kind), norm_constant_bias=1)
    assert set(vars(theirs)) <= {name for name in dir(norm) if not name.startswith("_")}
    methods = {name for name in vars(type(theirs)) if callable(getattr(theirs, name))}
    inherited = {"device", "set_device_idx", "is_quant", "reload"}
    assert all(hasattr(norm, name) for name in methods | inherited)
    assert (norm.name, norm.device()) == (theirs.name, theirs.device())
    assert norm.variance_epsilon == theirs.variance_epsilon
    assert norm.numel() == theirs.numel()
    assert isinstance(norm.weight, nn.Parameter)
    assert_same_bits(norm.weight.data, theirs.weight.data)
    if not kind.startswith("Head"):
        assert norm.weight_footprint() == theirs.weight_footprint()


# ---------------------------------------------------------------------- what the originals do wrong


@pytest.mark.parametrize("kind", ["RMSNorm", "HeadNorm rmsnorm", "HeadNorm layernorm"])
def test_the_constant_of_gemma_costs_bits_only_in_the_originals(
    originals: Any, tmp_path: Path, kind: str
) -> None:
    stored = stored_for(kind) * 0.01
    theirs, norm = both(originals, kind, tmp_path, stored, norm_constant_bias=1)
    x = states(kind)
    check(kind, theirs.forward(x.clone()), x, theirs.weight.data)
    check(kind, norm.forward(x), x, stored.double() + 1)
    assert not torch.equal(theirs.get_weight(), stored)
    assert_same_bits(norm.get_weight(), stored)


def test_forward_torch_has_the_models_eps_only_in_ours(originals: Any, tmp_path: Path) -> None:
    kind = "LayerNorm"
    theirs, norm = both(originals, kind, tmp_path, stored_for(kind))
    x = states(kind) * 0.01
    check(kind, norm.forward_torch(x), x, stored_for(kind))
    with pytest.raises(AssertionError, match="out of bounds"):
        check(kind, theirs.forward_torch(x), x, stored_for(kind))


@pytest.mark.parametrize("kind", KINDS[2:])
def test_forward_torch_and_get_weight_of_head_norms_have_the_bias_only_in_ours(
    originals: Any, tmp_path: Path, kind: str
) -> None:
    weight, bias = stored_for(kind), stored_for(kind, 2)
    theirs, norm = both(originals, kind, tmp_path, weight, bias, norm_constant_bias=1)
    x = states(kind)
    check(kind, norm.forward_torch(x), x, weight.double() + 1, bias)
    with pytest.raises(AssertionError, match="out of bounds"):
        check(kind, theirs.forward_torch(x), x, weight.double() + 1, bias)
    assert isinstance(norm.get_weight(), tuple)
    assert isinstance(theirs.get_weight(), Tensor)


def test_forward_torch_of_the_originals_is_near_ours(originals: Any, tmp_path: Path) -> None:
    for kind in KINDS[:1] + KINDS[2:]:
        theirs, norm = both(originals, kind, tmp_path, stored_for(kind))
        x = states(kind)
        torch.testing.assert_close(
            norm.forward_torch(x), theirs.forward_torch(x), rtol=2e-3, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_originals_serve_every_dtype_now(
    originals: Any, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    theirs, norm = both(originals, kind, tmp_path, stored_for(kind))
    x = states(kind, dtype)
    y = theirs.forward(x.clone())
    check(kind, y, x, stored_for(kind))
    assert_same_bits(norm.forward(x), y)


# ---------------------------------------------------------------------------------- several devices


@pytest.fixture
def context(originals: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """ExLlamaV2's TPContext with the CPU as both of its devices.

    Its constructor asks the GPUs for their memory, and "cpu" stands for the index -1, which torch
    would not take for a device where ExLlamaV2 allocates.
    """
    made = object.__new__(originals.tensor_p.TPContext)
    parts = [(-1, 0, 12), (-1, 12, 24)]
    made.ext_tp_context = exllamav2_ext.make_tp_context(parts, parts, parts, parts, parts, [], [])
    made.kv_split = [("cpu", begin, end) for _, begin, end in parts]
    made.id_split = made.vc_split = made.rs_split = made.q_split = made.kv_split
    made.num_devices = 1
    yield made
    made.unload()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_of_the_original_context_copies_any_dtype(
    context: Any, dtype: torch.dtype
) -> None:
    x = values(10, 24, dtype=dtype)
    for broadcast_type in range(5):
        copies = context.broadcast(0, x, broadcast_type)
        assert len(copies) == 2
        for copy in copies:
            assert_same_bits(copy, x)
            assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_of_an_original_split_norm_is_accurate(
    originals: Any, tmp_path: Path, context: Any, dtype: torch.dtype
) -> None:
    weight = stored_for("RMSNorm")
    theirs, norm = both(originals, "RMSNorm", tmp_path, weight)
    x = states("RMSNorm", dtype)
    # Theirs makes what it is given: split, it knows nothing of output_fp32.
    module = norm.layernorm
    expected = normkit.rms_norm(x, module.weight, eps=norm.variance_epsilon, clamp_inf=True)
    theirs.model.tp_context = context
    theirs.tp_split(3)
    for given in (x, [x, x.clone()]):
        ys = theirs.forward(given)
        assert len(ys) == 2
        for y in ys:
            check("RMSNorm", y, x, weight)
            assert_same_bits(y, expected)


def test_an_original_context_that_was_unloaded_is_an_error(context: Any) -> None:
    handle = context.ext_tp_context
    context.unload()
    x = values(2, 24)
    with pytest.raises(ValueError, match="tp_context: .*freed"):
        exllamav2_ext.rms_norm_tp([x], [values(24)], [x.clone()], EPS, handle)
