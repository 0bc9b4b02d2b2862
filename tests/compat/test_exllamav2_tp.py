"""ExLlamaV2's norms on several devices: here the CPU, several times over."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat.exllamav2_support import (
    DTYPES,
    EPS,
    Split,
    check,
    loaded,
    rows_for,
    run,
    values,
)
from conformance.support import assert_same_bits
from normkit import parallel
from normkit.compat import exllamav2, exllamav2_tp
from normkit.compat import exllamav2_ext as ext_c
from normkit.compat.exllamav2 import ExLlamaV2RMSNorm

CPU = torch.device("cpu")
WHOLE = [(-1, 0, 64)]
TWICE = [(-1, 0, 40), (-1, 40, 64)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def handle() -> Iterator[int]:
    """A context whose split of type 3 has two parts."""
    made = ext_c.make_tp_context(WHOLE, WHOLE, WHOLE, TWICE, WHOLE, [], [])
    yield made
    if made in exllamav2_tp._contexts:
        ext_c.free_tp_context(made)


@pytest.fixture
def global_streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """As ExLlamaV2 has them once a model is loaded."""
    device = ModuleType("exllamav2.device")
    device.global_streams = {0: "the stream of 0", 1: "the stream of 1"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exllamav2.device", device)
    return device.global_streams  # type: ignore[no-any-return]


def lists(dtype: torch.dtype = torch.float16) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    x = [values(3, 64, dtype=dtype, seed=i) for i in range(2)]
    return x, [values(64, seed=5), values(64, seed=6)], [torch.empty_like(t) for t in x]


# -------------------------------------------------------------------------------------- rms_norm_tp


@dtypes
@pytest.mark.parametrize("context", ["TPContext", "handle"])
def test_rms_norm_tp_norms_every_tensor_of_the_lists(
    backend: Any, handle: int, context: str, dtype: torch.dtype
) -> None:
    if backend.name == "cuda":
        pytest.skip("one device, not several")
    x, w, y = lists(dtype)
    given = handle if context == "handle" else parallel.TPContext([CPU, CPU])
    assert run(backend, ext_c.rms_norm_tp, x, w, y, EPS, given) is None
    for one, weight, out in zip(x, w, y, strict=True):
        expected = torch.empty_like(one)
        run(backend, ext_c.rms_norm, one, weight, expected, EPS)
        assert_same_bits(out, expected)


def test_rms_norm_tp_takes_parameters_that_want_gradients(handle: int) -> None:
    x, w, y = lists()
    ext_c.rms_norm_tp(x, [nn.Parameter(t) for t in w], y, EPS, handle)
    assert not any(t.requires_grad for t in y)


WRONG = [
    ({"x": values(3, 64)}, TypeError, r"x: expected a list"),
    ({"w": values(64)}, TypeError, r"w: expected a list"),
    ({"y": None}, TypeError, r"y: expected a list"),
    ({"x": [None, None]}, TypeError, r"x\[0\]: expected a torch.Tensor, got NoneType"),
    ({"w": [values(64), None]}, TypeError, r"w\[1\]: expected a torch.Tensor, got NoneType"),
    ({"y": [values(3, 64)]}, ValueError, r"y: expected 2 tensors"),
    ({"w": [values(64)]}, ValueError, r"w: expected 2 tensors"),
    ({"w": [values(64), values(65)]}, ValueError, r"^w.*\(65,\)"),
    ({"y": [values(3, 64), values(4, 64)]}, ValueError, r"^y.*\(4, 64\)"),
    ({"y": [values(3, 64), values(3, 64).int()]}, TypeError, r"^y.*int32"),
    ({"epsilon": None}, TypeError, r"epsilon: expected a number, got NoneType"),
    ({"epsilon": -1.0}, ValueError, r"epsilon: .*-1"),
    ({"tp_context": None}, TypeError, r"tp_context: expected a TPContext or a handle"),
    ({"tp_context": "cuda"}, TypeError, r"tp_context: expected a TPContext or a handle"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
def test_what_does_not_fit_is_an_error_in_the_callers_words(
    handle: int, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, w, y = lists()
    args = {"x": x, "w": w, "y": y, "epsilon": EPS, "tp_context": handle} | changed
    with pytest.raises(error, match=message):
        ext_c.rms_norm_tp(*args.values())


# ------------------------------------------------------------------------------------------ handles


def test_a_freed_handle_is_an_error(handle: int, global_streams: dict[int, Any]) -> None:
    """Even where an unknown one would be taken for ExLlamaV2's."""
    x, w, y = lists()
    ext_c.rms_norm_tp(x, w, y, EPS, handle)
    ext_c.free_tp_context(handle)
    uses = [
        lambda: ext_c.rms_norm_tp(x, w, y, EPS, handle),
        lambda: ext_c.tp_broadcast(handle, 0, x[0], 3, y, 1, -1),
        lambda: ext_c.free_tp_context(handle),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=f"tp_context: .*{handle}, which was freed"):
            use()


def test_an_unknown_handle_is_an_error() -> None:
    x, w, y = lists()
    with pytest.raises(ValueError, match="tp_context: expected a handle of make_tp_context, or"):
        ext_c.rms_norm_tp(x, w, y, EPS, 140243571)
    with pytest.raises(ValueError, match="tp_context: .*140243571"):
        ext_c.free_tp_context(140243571)


def test_handles_are_different() -> None:
    made = [ext_c.make_tp_context([], [], [], [], [], [], []) for _ in range(3)]
    assert len(set(made)) == 3
    for one in made:
        ext_c.free_tp_context(one)


@pytest.mark.parametrize("part", [(1, 0, 8), (-2, 0, 8), (0, 8)])
def test_parts_without_a_stream_are_errors(part: Any) -> None:
    with pytest.raises(ValueError, match="rs_split: expected .device, begin, end"):
        ext_c.make_tp_context(WHOLE, WHOLE, WHOLE, [part], WHOLE, [], [0])


def test_a_handle_of_exllamav2_means_its_streams(global_streams: dict[int, Any]) -> None:
    devices = [torch.device("cuda:1"), CPU, torch.device("cuda:0"), torch.device("cuda:2")]
    expected = [global_streams[1], None, global_streams[0], None]
    assert exllamav2_tp.streams_of(140243571, devices) == expected
    x, w, y = lists()
    ext_c.rms_norm_tp(x, w, y, EPS, 140243571)
    expected_y = torch.empty_like(x[0])
    ext_c.rms_norm(x[0], w[0], expected_y, EPS)
    assert_same_bits(y[0], expected_y)


def test_the_context_of_a_handle_is_made_once(handle: int) -> None:
    made = exllamav2_tp.context_of(handle, (CPU, CPU))
    assert exllamav2_tp.context_of(handle, (CPU, CPU)) is made
    assert made.devices == (CPU, CPU)


def test_streams_of_a_handle_are_those_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    made = ext_c.make_tp_context([(0, 0, 4), (2, 4, 8)], [], [], [], [], [], [11, 0, 33])
    zero, one, two = (torch.device("cuda", i) for i in range(3))
    assert exllamav2_tp.streams_of(made, [two, zero]) == [(33, two), (11, zero)]
    assert exllamav2_tp.streams_of(made, [one, CPU]) == [None, None]
    with pytest.raises(ValueError, match="cuda:3"):
        exllamav2_tp.streams_of(made, [torch.device("cuda:3")])
    ext_c.free_tp_context(made)


# ---------------------------------------------------------------------------------------- broadcast


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8], ids=str)
def test_tp_broadcast_copies_any_dtype(handle: int, dtype: torch.dtype) -> None:
    """ExLlamaV2 takes every element for 2 bytes."""
    source = (values(3, 5, dtype=torch.float64) * 50).to(dtype)
    targets = [torch.zeros_like(source) for _ in TWICE]
    ext_c.tp_broadcast(handle, 0, source, 3, targets, 1)
    assert all(torch.equal(t, source) for t in targets)


def test_tp_broadcast_copies_to_one_device_if_asked(handle: int) -> None:
    source = values(3, 5)
    targets = [torch.zeros_like(source) for _ in TWICE]
    ext_c.tp_broadcast(handle, 0, source, 3, targets, 1, 0)
    assert not any(t.any() for t in targets)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"targets": [values(3, 5)]}, ValueError, r"targets: expected one on each of -1, -1"),
        ({"targets": [values(3, 5), values(5, 3)]}, ValueError, r"targets\[1\]: .*\(5, 3\)"),
        ({"targets": [values(3, 5), values(1)]}, ValueError, r"targets\[1\]: .*\(1,\)"),
        ({"targets": [values(3, 5), values(3, 5).int()]}, TypeError, r"targets\[1\]: .*int32"),
        ({"targets": [values(3, 5), 0]}, TypeError, r"targets\[1\]: .*int"),
        ({"source": None}, TypeError, r"source: .*NoneType"),
        ({"broadcast_type": 5}, ValueError, r"broadcast_type: expected 0 to 4, got 5"),
    ],
)
def test_targets_that_do_not_fit_are_errors_before_anything_is_copied(
    handle: int, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    targets = [torch.zeros(3, 5, dtype=torch.float16) for _ in TWICE]
    args = {"tp_context": handle, "buffer": 0, "source": values(3, 5), "broadcast_type": 3}
    args |= {"targets": targets, "dim": 1} | changed
    before = [t.clone() for t in args["targets"] if isinstance(t, Tensor)]
    with pytest.raises(error, match=message):
        ext_c.tp_broadcast(**args)
    after = [t for t in args["targets"] if isinstance(t, Tensor)]
    assert all(map(torch.equal, before, after))


# -------------------------------------------------------------------------------- ExLlamaV2RMSNorm


def split(folder: Path, *stored: Tensor | None, parts: Any = TWICE, **lm: Any) -> Any:
    norm = loaded(ExLlamaV2RMSNorm, folder, *stored, **lm)
    norm.model.tp_context = Split(*parts)
    norm.tp_split(3)
    return norm


def test_tp_split_puts_the_whole_weight_on_every_device_with_a_part(tmp_path: Path) -> None:
    weight, bias = values(24, dtype=torch.bfloat16), values(24, seed=3)
    parts = [(-1, 0, 8), (-1, 8, 8), (-1, 8, 24)]  # the second is empty
    norm = split(tmp_path, weight, bias, parts=parts, norm_constant_bias=1)
    assert (norm.is_tp, norm.broadcast_type) == (True, 3)
    assert (len(norm.weight), len(norm.bias)) == (2, 2)
    for one in norm.weight:
        assert isinstance(one, nn.Parameter)
        assert_same_bits(one.data, (weight.float() + 1).half())
    assert_same_bits(norm.get_weight()[0], weight)
    x = rows_for(norm)
    assert [y.shape for y in norm.forward(x)] == [x.shape, x.shape]


def test_a_split_norm_without_a_bias_has_none_on_any_device(tmp_path: Path) -> None:
    assert split(tmp_path).bias == [None, None]


@dtypes
@pytest.mark.parametrize("output_fp32", [False, True])
@pytest.mark.parametrize("path", ["forward", "forward_tp", "forward_torch"])
def test_forward_of_a_split_norm_gives_the_bits_of_one_device(
    tmp_path: Path, dtype: torch.dtype, output_fp32: bool, path: str
) -> None:
    weight, bias = values(24, seed=1), values(24, seed=3)
    norm = split(tmp_path, weight, bias, norm_constant_bias=1)
    whole = loaded(ExLlamaV2RMSNorm, tmp_path, weight, bias, norm_constant_bias=1)
    x = rows_for(norm, dtype)
    one_device = whole.forward_torch if path == "forward_torch" else whole.forward
    expected = one_device(x, output_fp32=output_fp32)
    ys = getattr(norm, path)(x, output_fp32=output_fp32, output_split=True)
    assert isinstance(ys, list)
    for y in ys:
        assert_same_bits(y, expected)
        check(norm, y, x, weight, bias)


def test_states_may_come_as_one_tensor_per_device(tmp_path: Path) -> None:
    norm = split(tmp_path)
    xs = [rows_for(norm), rows_for(norm) * 2]
    for y, x in zip(norm.forward(xs), xs, strict=True):
        check(norm, y, x, norm.get_weight())


@pytest.mark.parametrize("path", ["forward", "forward_tp", "forward_torch"])
def test_intermediates_of_a_split_norm_come_in_a_dict(tmp_path: Path, path: str) -> None:
    norm = split(tmp_path)
    got = getattr(norm, path)(rows_for(norm), intermediates=True)
    assert list(got) == ["hidden_states"]
    assert [y.shape for y in got["hidden_states"]] == [(2, 5, 24)] * 2


def test_a_split_norm_works_in_exllamav2s_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        exllamav2, "exllamav2_streams", lambda devices: asked.append(devices) or [None, None]
    )
    norm = split(tmp_path)
    norm.forward(rows_for(norm))
    norm.forward(rows_for(norm))
    assert asked == [[CPU, CPU]]  # one context is enough


def test_states_that_do_not_fit_a_split_norm_are_errors(tmp_path: Path) -> None:
    norm = split(tmp_path)
    x = rows_for(norm)
    with pytest.raises(
        ValueError, match="hidden_states: expected 2 tensors, one per device, got 3"
    ):
        norm.forward([x, x, x])
    with pytest.raises(TypeError, match="hidden_states: expected a tensor or a list"):
        norm.forward(None)
    with pytest.raises(TypeError, match=r"hidden_states.*int32"):
        norm.forward([x.int(), x.int()])


def test_what_was_not_split_or_loaded_is_an_error(tmp_path: Path) -> None:
    norm = loaded(ExLlamaV2RMSNorm, tmp_path)
    with pytest.raises(RuntimeError, match=r"model\.norm: expected tp_split\(\)"):
        norm.forward_tp(rows_for(norm))
    norm.model.tp_context = Split((-1, 4, 4))
    with pytest.raises(ValueError, match="broadcast_type: expected a split with parts"):
        norm.tp_split(3)
    assert not norm.is_tp
    norm.unload()
    with pytest.raises(RuntimeError, match=r"model\.norm: expected load\(\)"):
        norm.tp_split(3)


@pytest.mark.parametrize("again", ["load", "reload"])
def test_a_split_norm_is_whole_again_once_it_is_loaded_again(tmp_path: Path, again: str) -> None:
    norm = split(tmp_path)
    norm.set_device_idx(None)
    getattr(norm, again)()
    assert not norm.is_tp
    assert isinstance(norm.weight, nn.Parameter)
    assert isinstance(norm.forward(rows_for(norm)), Tensor)


def test_a_copy_is_made_only_for_other_devices(tmp_path: Path) -> None:
    norm = loaded(ExLlamaV2RMSNorm, tmp_path)
    weight = norm.get_weight()
    norm.model.tp_context = SimpleNamespace(get_split=lambda _: TWICE)
    norm.tp_split(0)
    assert [t.data_ptr() for t in norm.weight] == [weight.data_ptr()] * 2
