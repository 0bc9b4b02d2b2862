"""One call runs a norm on several devices; here on the CPU, named several times."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from normkit import _C, parallel
from normkit._serving import backends
from normkit._spec import FLAGS, PLAIN_OPTIONS
from normkit.parallel import BroadcastType, TPContext
from torch_integration.support import assert_equal_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = {"rms_norm": {}, "layer_norm": {}, "head_norm": {}, "head_norm layer": {"kind": "layer"}}
HEADS, N = 3, 40


def operands(count: int, dtypes: Any = DTYPES[:1]) -> tuple[list[Tensor], ...]:
    """xs, weights and biases, different on every device, their dtypes in turn."""
    made = torch.Generator().manual_seed(count)
    turn = itertools.cycle(dtypes)
    shapes = ((2 + i, HEADS, N) for i in range(count))
    xs = [torch.randn(shape, generator=made).add(1).to(next(turn)) for shape in shapes]
    affine = [
        [torch.rand(N, generator=made).add(0.5).to(next(turn)) for _ in range(count)]
        for _ in range(2)
    ]
    return xs, *affine


def run(name: str, *args: Any, **options: Any) -> list[Tensor]:
    op, *_ = name.split()
    return getattr(parallel, f"{op}_tp")(*args, **OPS[name], **options)  # type: ignore[no-any-return]


def one_by_one(name: str, lists: Any, **options: Any) -> list[Tensor]:
    op, *_ = name.split()
    calls = zip(*lists, strict=True)
    return [getattr(normkit, op)(*call, **OPS[name], **options) for call in calls]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_device_gets_what_a_call_of_its_own_gives(name: str, count: int) -> None:
    context = TPContext(["cpu"] * count)
    lists = operands(count, DTYPES)
    options: dict[str, Any] = {
        "weight_offset": 1.0,
        **{flag: True for flag in FLAGS if flag in PLAIN_OPTIONS},
        "out_dtype": torch.bfloat16,
    }
    lists[0][0][0, 0, 0] = torch.inf
    assert_equal_bits(
        run(name, *lists, 0.3, context=context, **options),
        one_by_one(name, (*lists, [0.3] * count), **options),
    )


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("parts", ["neither", "weights", "biases", "some"])
def test_weights_and_biases_may_be_missing(name: str, parts: str) -> None:
    xs, weights, biases = operands(2)
    given: dict[str, Any] = {"weights": {"weights": weights}, "biases": {"biases": biases}}
    given["some"] = {"weights": [None, weights[1]]}
    options = given.get(parts, {})
    nothing = [None, None]
    affine = (options.get("weights") or nothing, options.get("biases") or nothing)
    made = run(name, xs, context=TPContext(["cpu"]), **options)
    assert_equal_bits(made, one_by_one(name, (xs, *affine)))


def test_heads_have_weights_of_their_own() -> None:
    xs, _, _ = operands(2)
    weights = [torch.rand(HEADS, N) for _ in xs]
    made = parallel.head_norm_tp(xs, weights, context=TPContext(["cpu"]))
    assert_equal_bits(made, [normkit.head_norm(*call) for call in zip(xs, weights, strict=True)])


def test_one_call_of_the_extension_runs_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        backends, "quick_tp", lambda *args: calls.append(len(args[1])) or _C.norm_tp(*args)
    )
    monkeypatch.setattr(parallel.devices, "serve", lambda call: pytest.fail("went one by one"))
    parallel.rms_norm_tp(*operands(3), context=TPContext(["cpu"] * 3))
    assert calls == [3]


@pytest.mark.parametrize("in_place", [False, True])
def test_outs_are_written_and_returned(in_place: bool) -> None:
    xs, weights, _ = operands(2)
    expected = one_by_one("rms_norm", (xs, weights))
    outs = xs if in_place else [torch.empty_like(x, dtype=torch.float16) for x in xs]
    versions = [out._version for out in outs]
    made = parallel.rms_norm_tp(xs, weights, outs=outs, context=TPContext(["cpu"] * 2))
    assert all(y is out for y, out in zip(made, outs, strict=True))
    assert_equal_bits(made, [y.to(out.dtype) for y, out in zip(expected, outs, strict=True)])
    assert [out._version for out in outs] == [version + 1 for version in versions]


def test_no_out_is_written_where_one_of_them_cannot_be() -> None:
    xs, weights = [torch.randn(3, N)] * 2, [torch.ones(N)] * 2
    with torch.inference_mode():
        inference = torch.zeros(3, N)
    normal = torch.zeros(3, N)
    for outs in ([inference, normal], [normal, inference]):
        with pytest.raises(RuntimeError, match=r"^outs\[[01]\]: expected a normal tensor"):
            parallel.rms_norm_tp(xs, weights, outs=outs, context=TPContext(["cpu"] * 2))
    assert not inference.any()
    assert not normal.any()
    assert normal._version == 0


def test_strided_rows_are_not_copied() -> None:
    packed = torch.randn(5, 3 * N)
    made = parallel.rms_norm_tp(packed.split(N, dim=1), context=TPContext(["cpu"]))
    assert_equal_bits(made, [normkit.rms_norm(x) for x in packed.split(N, dim=1)])
    parallel.rms_norm_tp(
        packed.split(N, dim=1), outs=packed.split(N, dim=1), context=TPContext(["cpu"])
    )
    assert_equal_bits(list(packed.split(N, dim=1)), made)


def test_no_devices_make_no_tensors() -> None:
    assert parallel.rms_norm_tp([], context=TPContext(["cpu"])) == []


def test_the_interpreter_is_free_meanwhile() -> None:
    """Another thread runs in the middle of a call, not only before and after it."""
    xs = [torch.zeros(8192, 4096)] * 2
    outs = [torch.zeros_like(x) for x in xs]
    stamps: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        parallel.rms_norm_tp(xs, outs=outs, context=TPContext(["cpu"]))
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    margin = (end - begin) / 10
    assert any(begin + margin < stamp < end - margin for stamp in stamps)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_gradients_flow_on_every_device(op: str) -> None:
    lists = [[t.requires_grad_() for t in of] for of in operands(2)]
    made = run(op, *lists, context=TPContext(["cpu"] * 2))
    expected = one_by_one(op, lists)
    leaves = [t for of in lists for t in of]
    sums = [sum((y * y).sum() for y in of) for of in (made, expected)]
    assert_equal_bits(*(list(torch.autograd.grad(s, leaves)) for s in sums))


@pytest.mark.parametrize("name", ["cpu", "reference", "emu"])
def test_a_backend_may_be_asked_for_by_name(name: str, request: pytest.FixtureRequest) -> None:
    if name == "emu":
        request.getfixturevalue("emu")
    xs, weights, biases = operands(2, DTYPES)
    with normkit.use_backend(name):
        made = parallel.layer_norm_tp(xs, weights, biases, context=TPContext(["cpu"] * 2))
        assert_equal_bits(made, one_by_one("layer_norm", (xs, weights, biases)))
        explained = normkit.explain("rms_norm", xs[0], weights[0])
    assert explained.backend == name


def test_float64_and_odd_strides_are_served() -> None:
    xs = [torch.randn(3, 8, dtype=torch.float64), torch.randn(8, 3).T]
    made = parallel.rms_norm_tp(xs, context=TPContext(["cpu"] * 2))
    assert_equal_bits(made, [normkit.rms_norm(x) for x in xs])


def test_calls_are_compiled() -> None:
    xs, weights, _ = operands(2)
    context = TPContext(["cpu"] * 2)

    def call(xs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return parallel.rms_norm_tp(xs, weights, context=context)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_equal_bits(compiled(xs, weights), call(xs, weights))
    torch.compiler.reset()


# ---------------------------------------------------------------- errors


def wrong_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    def calls(**changes: Any) -> dict[str, Any]:
        xs, weights, biases = operands(2)
        outs = [torch.full_like(x, 7.0) for x in xs]
        return {"xs": xs, "weights": weights, "biases": biases, "outs": outs, **changes}

    xs, weights, _ = operands(2)
    shared = torch.randn(2, HEADS, N)
    overlapping = torch.randn(3 * HEADS * N)
    shifted = [overlapping[i * 8 :][: 2 * HEADS * N].view(2, HEADS, N) for i in range(2)]
    same = {"weights": None, "biases": None}
    return {
        "a tensor for a list": (
            calls(xs=xs[0]),
            TypeError,
            "xs: expected a list of tensors, got Tensor",
        ),
        "too few weights": (
            calls(weights=weights[:1]),
            ValueError,
            "weights: expected 2, one for each of xs, got 1",
        ),
        "no tensor": (
            calls(xs=[xs[0], "x"]),
            TypeError,
            "xs[1]: expected a torch.Tensor, got str",
        ),
        "a weight of another size": (
            calls(weights=[weights[0], torch.ones(3)]),
            ValueError,
            "weights[1]: expected shape (40,), got (3,)",
        ),
        "an integer bias": (
            calls(biases=[None, torch.ones(N, dtype=torch.int64)]),
            TypeError,
            "biases[1]: expected float32, float16 or bfloat16, got torch.int64",
        ),
        "an out of another shape": (
            calls(outs=[torch.empty(2, HEADS, N), torch.empty(2, HEADS, N)]),
            ValueError,
            "outs[1]: expected x's shape (3, 3, 40), got (2, 3, 40)",
        ),
        "a negative eps": (calls(eps=-1.0), ValueError, "eps: expected a number >= 0, got -1.0"),
        "one out for two": (
            {"xs": [shared, shared + 1], "outs": [torch.full((2, HEADS, N), 7.0)] * 2, **same},
            ValueError,
            "outs[0]: expected memory apart from outs[1]'s, got an overlap",
        ),
        "an out that another reads": (
            {"xs": [shared, shared], "outs": [shared, torch.full_like(shared, 7.0)], **same},
            ValueError,
            "outs[0]: expected memory apart from xs[1]'s, got an overlap",
        ),
        "an out over part of its x": (
            {"xs": shifted[:1], "outs": shifted[1:], **same},
            ValueError,
            "outs[0]: expected x's memory or none of it, got a partial overlap",
        ),
        "a gradient into an out": (
            calls(weights=[weights[0], weights[1].clone().requires_grad_()]),
            RuntimeError,
            "weights[1]: a gradient is needed",
        ),
    }


def test_a_backend_that_cannot_serve_all_serves_none() -> None:
    xs = [torch.randn(3, 8), torch.randn(3, 8, dtype=torch.float64)]
    outs = [torch.full_like(x, 7.0) for x in xs]
    with normkit.use_backend("cpu"), pytest.raises(ValueError, match="x is float64"):
        parallel.rms_norm_tp(xs, outs=outs, context=TPContext(["cpu"]))
    assert all((out == 7).all() for out in outs)


@pytest.mark.parametrize(
    "xs", [torch.ones(2, 4), iter([torch.ones(2, 4)]), {0: torch.ones(2, 4)}], ids=type
)
def test_what_is_no_list_is_not_taken_for_one(xs: Any) -> None:
    with pytest.raises(TypeError, match="xs: expected a list of tensors"):
        parallel.rms_norm_tp(xs, context=TPContext(["cpu"]))


@pytest.mark.parametrize("wrong", wrong_calls())
def test_errors_name_the_list_and_the_place_and_nothing_is_written(wrong: str) -> None:
    arguments, kind, message = wrong_calls()[wrong]
    kept = [out.clone() for out in arguments["outs"]]
    with pytest.raises(kind) as raised:
        parallel.rms_norm_tp(**arguments, context=TPContext(["cpu"]))
    assert message in str(raised.value)
    assert_equal_bits(arguments["outs"], kept)


def test_a_device_has_to_be_the_contexts() -> None:
    xs = [torch.randn(2, 4), torch.empty(2, 4, device="meta")]
    with pytest.raises(ValueError, match=r"xs\[1\]: expected a device of the context \(cpu\)"):
        parallel.rms_norm_tp(xs, context=TPContext(["cpu"]))


def test_a_context_has_to_be_one() -> None:
    with pytest.raises(TypeError, match="context: expected a TPContext, got int"):
        parallel.rms_norm_tp([torch.ones(2, 4)], context=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "devices: expected one or more, got none"),
        ((["nowhere"],), "devices: expected devices of this machine, got 'nowhere'"),
        ((["meta"],), "devices: expected the CPU or CUDA devices, got meta"),
        ((["cuda:99"],), "CUDA devices, got cuda:99"),
        ((["cuda"] if not torch.cuda.is_available() else ["cuda:99"],), "CUDA devices, got cuda"),
        ((["cpu", "cpu"], [None]), "streams: expected 2, one a device, got 1"),
        (
            (["cpu"], None, {0: [1, 2]}),
            r"splits\[KV\]: expected a whole size for each of the 1 devices",
        ),
        ((["cpu"], None, {9: [1]}), "9 is not a valid BroadcastType"),
        ((["cpu"], None, {0: [0.5]}), r"splits\[KV\]: expected a whole size"),
        ((["cpu"], None, {0: [float("nan")]}), r"splits\[KV\]: expected a whole size"),
    ],
)
def test_a_context_says_what_is_wrong_with_it(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPContext(*arguments)


def test_a_stream_has_to_be_one() -> None:
    with pytest.raises(TypeError, match=r"streams: expected torch.cuda.Stream or None"):
        TPContext(["cpu"], [1])  # type: ignore[list-item]


# ---------------------------------------------------------------- copies


def test_a_context_is_made_of_devices_indices_and_names() -> None:
    assert TPContext([-1, "cpu", torch.device("cpu:0")]).devices == (torch.device("cpu"),) * 3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_broadcast_copies_every_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(12).view(3, 4).to(dtype)
    for copy in parallel.broadcast(x, TPContext(["cpu"] * 3)):
        assert copy.dtype == dtype
        assert torch.equal(copy, x)


def test_broadcast_goes_to_the_devices_with_a_part() -> None:
    context = TPContext(["cpu"] * 3, splits={BroadcastType.KV: [4, 0, 2]})
    x = torch.ones(2)
    assert len(parallel.broadcast(x, context, BroadcastType.KV)) == 2
    assert len(parallel.broadcast(x, context, BroadcastType.Q)) == 3
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        parallel.broadcast([x], context)  # type: ignore[arg-type]


@pytest.mark.parametrize("broadcast_type", list(BroadcastType))
def test_tp_split_puts_the_whole_norm_where_there_is_a_part(broadcast_type: BroadcastType) -> None:
    sizes = [1 + broadcast_type, 0, 3]
    context = TPContext([-1, -1, -1], splits={broadcast_type: sizes})
    assert context.get_split(broadcast_type) == [(0, 0, sizes[0]), (2, sizes[0], sum(sizes))]
    norm = normkit.RMSNorm(N, weight_offset=1.0, dtype=torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    split = parallel.tp_split(norm, context, broadcast_type)
    assert len(split) == 2
    for module in split:
        assert_equal_bits(module.weight.detach(), norm.weight.detach())
        assert module.weight.data_ptr() != norm.weight.data_ptr()
        assert module.weight_offset == 1.0


def test_replicate_makes_modules_of_their_own() -> None:
    norm = normkit.LayerNorm(N)
    first, second = parallel.replicate(norm, ["cpu", "cpu"])
    with torch.no_grad():
        first.weight.mul_(2)
    assert_equal_bits(second.weight.detach(), norm.weight.detach())
    assert len(parallel.replicate(norm, TPContext(["cpu"] * 3))) == 3
