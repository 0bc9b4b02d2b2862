"""What Triton's compilers make of the kernels, for devices that need not be here."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from normkit._serving import triton as _triton
from normkit._spec import FLAGS

pytestmark = pytest.mark.usefixtures("triton_is_there")

ARCHITECTURES = {"nvidia": ("cuda", 90, 32), "amd": ("hip", "gfx942", 64)}
VARIANTS: dict[str, dict[str, Any]] = {
    "rms": {},
    "layer": {"LAYER": True, "bias": "fp16", "saved": True},
    "add": {"x": "fp16", "residual": "fp16", "IN_PLACE": True, "CLAMP_INF": True},
    "head": {"LAYER": True, "bias": "fp32", "PER_HEAD": True, "dims": 3, "index": "i64"},
}
LENGTHS = (8, 128, 1024, 4096, 16384, 40_000)


@pytest.fixture(params=ARCHITECTURES)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    from normkit._serving import triton_kernels as _triton_kernels

    if request.param not in backends:
        pytest.skip(f"this Triton has no compiler for {request.param}")
    if _triton_kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return GPUTarget(*ARCHITECTURES[request.param])


def source(
    kernel: Any,
    plan: _triton.Plan,
    *,
    aligned: bool,
    x: str = "bf16",
    residual: str | None = None,
    bias: str | None = None,
    out: str = "bf16",
    saved: bool = False,
    dims: int = 1,
    index: str = "i32",
    **flags: bool,
) -> Any:
    """A kernel as the launcher specialises it, aligned for pointers and strides of 16 bytes."""
    import triton.language as tl
    from triton import compiler

    def pointer(dtype: str | None) -> str | None:
        return dtype and f"*{dtype}"

    constants: dict[str, Any] = {
        **{name.upper(): True for name in FLAGS},
        **dict.fromkeys(("LAYER", "PER_HEAD", "CLAMP_INF", "IN_PLACE"), False),
        "HAS_OFFSET": True,
        "NORMALISED": {"fp16": tl.float16, "bf16": tl.bfloat16}[residual or x],
        "DIMS": dims,
        "ROWS": plan.rows,
        "LOG2_BLOCK": plan.block.bit_length() - 1,
        **flags,
    }
    types: dict[str, Any] = {
        "x": pointer(x),
        "residual": pointer(residual),
        "weight": "*bf16",
        "bias": pointer(bias),
        "out": pointer(out),
        "residual_out": pointer(residual),
        "saved_rstd": "*fp32" if saved else None,
        "saved_mean": "*fp32" if saved and constants["LAYER"] else None,
        **{name: (index,) * dims for name in kernel.arg_names if name.endswith("_strides")},
        "sizes": (index,) * dims,
        **dict.fromkeys(("weight_stride", "bias_stride", "rows", "heads", "n"), "i32"),
        **dict.fromkeys(("count", "eps", "weight_offset"), "fp32"),
    }
    constants |= {name: None for name, type_ in types.items() if type_ is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    hints: dict[tuple[int, ...], Any] = {}
    for i, (name, type_) in enumerate(signature.items()):
        if isinstance(type_, tuple):
            hints |= {(i, j): [["tt.divisibility", 16]] for j in range(dims)}
        elif type_.startswith("*") or name in ("n", "weight_stride", "bias_stride"):
            hints[(i,)] = [["tt.divisibility", 16]]
    return compiler.ASTSource(kernel, signature, constants, hints if aligned else {})


@cache
def assembly(target: Any, n: int, variant: str, *, aligned: bool) -> str:
    from triton import compiler

    from normkit._serving import triton_kernels as _triton_kernels

    plan = _triton.plan(n)
    kernel = getattr(_triton_kernels, plan.kernel)
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    made = compiler.compile(
        source(kernel, plan, aligned=aligned, **VARIANTS[variant]), target=target, options=options
    )
    text: str = made.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    return text


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_without_fast_math(target: Any, variant: str) -> None:
    for n, aligned in itertools.product((128, 40_000), (True, False)):
        text = assembly(target, n, variant, aligned=aligned)
        if target.backend == "cuda":
            assert not re.search(r"\.ftz|\.approx|\bfma\.|\.full\.", text)
            assert "sqrt.rn.f32" in text
            assert "div.rn.f32" in text
            assert "cvt.rn.bf16" in text
        else:
            assert ".amdhsa_float_denorm_mode_32 3" in text  # subnormals are kept
            assert "v_div_fixup_f32" in text  # the correctly rounded division ends with it


@pytest.mark.parametrize("n", LENGTHS)
def test_16_bytes_are_loaded_at_a_time(target: Any, n: int) -> None:
    wide = r"ld\.global\S*\.v4" if target.backend == "cuda" else r"(global|buffer)_load_dwordx4"
    for variant in VARIANTS:
        assert re.search(wide, assembly(target, n, variant, aligned=True)), variant


@pytest.mark.parametrize("n", LENGTHS)
def test_nothing_is_spilled(target: Any, n: int) -> None:
    for variant, aligned in itertools.product(("rms", "head"), (True, False)):
        text = assembly(target, n, variant, aligned=aligned)
        if target.backend == "cuda":
            assert ".local" not in text
        else:
            assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", text) == ["0"]


def test_short_rows_need_no_barrier(target: Any) -> None:
    barrier = "bar.sync" if target.backend == "cuda" else "s_barrier"
    for n in (8, 128, 1024):
        assert barrier not in assembly(target, n, "rms", aligned=True)
