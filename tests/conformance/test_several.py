"""Several norms from one call: each has the results of a call of its own, and caches get theirs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import emulation
import normkit
from conformance.support import DTYPES, Guarded, assert_same_bits, lazily_negated
from normkit import testing
from normkit._serving import backends

F32, F16, BF16 = DTYPES
HEADS, WIDTH, HALF, PAGE = (4, 2, 2), 24, 12, 3
needs_emulation = pytest.mark.skipif(emulation.extension() is None, reason="no emulation is built")


class Several:
    """Calls functions of several norms on a backend, and fails where it runs them alone."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.launches, self.monkeypatch = name, 0, monkeypatch

    def __call__(self, op: str, *args: Any, together: bool = True, **options: Any) -> Any:
        before = self.launches
        with normkit.use_backend(self.name), self.counted():
            made = getattr(normkit, op)(*args, **options)
        if self.name not in ("reference", "triton"):
            assert self.launches == before + together
        return made

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the calls of the extension that run several."""

        def counting(run: Any) -> Any:
            def counted(calls: Any) -> Any:
                made = run(calls)
                self.launches += isinstance(made, list)
                return made

            return counted

        with self.monkeypatch.context() as patch:
            patch.setattr(backends, "quick_norms", counting(backends.quick_norms))
            entries = backends.natives[self.name]
            replaced = entries._replace(norms=counting(entries.norms))
            patch.setitem(backends.natives, self.name, replaced)
            yield


@pytest.fixture
def several(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Several:
    return Several(backend.name, monkeypatch)


def packed(dtype: torch.dtype, tokens: tuple[int, ...] = (5,)) -> Tensor:
    """A projection with q, k and v of a token side by side."""
    return testing.make_inputs((*tokens, sum(HEADS), WIDTH), dtype).x


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k = testing.make_inputs((1, WIDTH), dtype), testing.make_inputs((1, WIDTH), dtype, seed=3)
    assert q.weight is not None
    assert k.weight is not None
    return q.weight, k.weight


def angles(tokens: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    made = testing.make_inputs((*tokens, HALF), seed=7).x * 3
    return made.cos(), made.sin()


def caches(dtype: torch.dtype, heads_first: bool) -> tuple[Guarded, Guarded]:
    """k and v of four pages, heads or slots first, with gaps between pages."""
    heads = HEADS[1]
    if heads_first:
        strides = (heads * PAGE * WIDTH + 8, WIDTH, PAGE * WIDTH, 1)
    else:
        strides = (heads * PAGE * WIDTH + 8, heads * WIDTH, WIDTH, 1)
    made = tuple(Guarded((4, PAGE, heads, WIDTH), dtype, strides) for _ in "kv")
    for cache in made:
        cache.fill(torch.full((4, PAGE, heads, WIDTH), -7.0, dtype=dtype))
    return made[0], made[1]


# ------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_each_of_several_norms_has_the_bits_of_its_own_call(
    backend: Any, several: Several, kind: str
) -> None:
    """Slices of different widths of one projection, as MLA has them, and unlike dtypes."""
    for dtype, options in itertools.product(
        DTYPES, ({}, {"weight_offset": 1.0, "round_before_weight": True}, {"out_dtype": F32})
    ):
        projection = testing.make_inputs((7, 1536 + 512 + 64), dtype).x
        q_a, kv_a, _ = projection.split((1536, 512, 64), -1)
        heads = packed(BF16)
        xs = [q_a, kv_a, heads, torch.randn(3, 2)]
        of_heads = testing.make_inputs((1, sum(HEADS), WIDTH), BF16, per_head=True)
        given = [torch.rand(1536), torch.rand(512).to(dtype), of_heads.weight, None]
        biases = [None, torch.rand(512), None, None]
        made = several("norms", xs, given, biases, kind=kind, **options)
        for x, weight, bias, y in zip(xs, given, biases, made, strict=True):
            name = "head_norm" if weight is not None and weight.ndim > 1 else f"{kind}_norm"
            own = {"kind": kind} if name == "head_norm" else {}
            assert_same_bits(y, backend(name, x, weight, bias, 1e-6, **own, **options))


def test_slices_of_one_tensor_are_normalised_where_they_are(several: Several) -> None:
    guarded = Guarded((6, 130), BF16, strides=(140, 1))
    projection = guarded.fill(testing.make_inputs((6, 130), BF16).x)
    xs = list(projection.split((70, 40, 20), -1))
    expected = several("norms", [x.clone() for x in xs[:2]], eps=0.1)
    left = xs[2].clone()
    made = several("norms", xs[:2], eps=0.1, outs=xs[:2])
    assert all(y is x for x, y in zip(xs, made, strict=False))
    for x, y in zip(xs, expected, strict=False):
        assert_same_bits(x, y)
    assert_same_bits(xs[2], left)
    guarded.assert_only_elements_written()


def test_what_one_norm_writes_and_another_reads_is_done_in_their_order(several: Several) -> None:
    x = testing.make_inputs((60, 64), F32).x
    first, second = torch.empty_like(x), torch.empty_like(x)
    made = several("norms", [x, first], outs=[first, second], kind="layer", eps=0.3)
    once = normkit.layer_norm(x, eps=0.3)
    torch.testing.assert_close(made[0], once)
    torch.testing.assert_close(made[1], normkit.layer_norm(once, eps=0.3))


@needs_emulation
def test_norms_are_one_launch_where_none_reads_what_another_writes() -> None:
    projection, table = packed(BF16, (2, 3)), angles((2, 3))
    q, k, v = projection.split(HEADS, -2)
    k_cache, v_cache = (cache.tensor for cache in caches(BF16, True))
    slots = torch.arange(6).view(2, 3)
    to_caches = {"k_cache": k_cache, "v_cache": v_cache, "slots": slots}
    both = testing.make_inputs((4, 2, PAGE, HEADS[1], WIDTH), BF16).x
    one_memory = {"k_cache": both[:, 0], "v_cache": both[:, 1], "slots": slots}
    wide = torch.randn(8, 100)
    first, second = torch.empty(2, 8, 100)
    on_its_own = [[wide, first], [first, second]]
    for launches, function, args, options in (
        (1, "norms", ([wide[:, :70], wide[:, 70:]],), {"outs": [wide[:, :70], wide[:, 70:]]}),
        (1, "norms", ([q, k, v],), {"outs": [q, k, v]}),
        (1, "norms", ([q.transpose(1, 2), k],), {"outs": [q.transpose(1, 2), k]}),
        (1, "qk_norm_rope", (q, k, *table), {"outs": (q, k)}),
        (1, "qk_norm_rope", (q, k, *table), {"v": v, "norm_v": True, **to_caches}),
        (1, "qk_norm_rope", (q, k, *table), {"v": v, "outs": (q, k), **to_caches}),
        (1, "qk_norm_rope", (q, k, *table), {"v": v, "outs": (q, k), **one_memory}),
        (2, "norms", ([torch.randn(2, 8) for _ in range(5)],), {}),
        (2, "norms", (on_its_own[0],), {"outs": on_its_own[1]}),
        (2, "norms", ([wide, wide],), {"outs": [first, first]}),
        (2, "norms", ([wide[:, :71], wide[:, 70:]],), {"outs": [wide[:, :71], second[:, 70:]]}),
        (2, "norms", ([wide, wide[4:]],), {"outs": [wide, second[4:]]}),
    ):  # fmt: skip
        before = emulation.launches()
        with normkit.use_backend("emu"):
            getattr(normkit, function)(*args, **options)
        assert emulation.launches() - before == launches, (function, options)


def test_single_columns_that_are_negated_lazily_count_as_negative(several: Several) -> None:
    x = torch.tensor([[1.0], [-2.0]])
    (y,) = several("norms", [lazily_negated(x)], together=False)
    assert_same_bits(y, several("norms", [-x], together=False)[0])
    q, one = torch.ones(2, 1, 3), torch.ones(2, 1)
    made = several("qk_norm_rope", q, q, one, lazily_negated(one), together=False)
    assert_same_bits(made[0], several("qk_norm_rope", q, q, one, -one, together=False)[0])


def test_strided_columns_among_several_are_read_where_they_are(several: Several) -> None:
    image = testing.make_inputs((2, 20, 3, 4), F32).x
    xs = [image.permute(0, 2, 3, 1), testing.make_inputs((5, 64), BF16).x]
    expected = several("norms", [x.contiguous() for x in xs], kind="layer")
    for got, one in zip(several("norms", xs, kind="layer"), expected, strict=True):
        assert_same_bits(got, one)


def test_more_norms_than_a_launch_has_room_for(backend: Any, several: Several) -> None:
    xs = [testing.make_inputs((rows, n), F32).x for rows, n in ((1, 8), (0, 9), (5, 2), (2, 700))]
    xs += [testing.make_inputs((rows, 40), BF16).x for rows in range(1, 8)]
    for x, y in zip(xs, several("norms", xs), strict=True):
        assert_same_bits(y, backend("rms_norm", x))
    assert normkit.norms([]) == []


def test_norms_that_need_gradients_are_calls_of_their_own(several: Several) -> None:
    xs = [testing.make_inputs((3, n), F32).x.requires_grad_() for n in (8, 20)]
    made = several("norms", xs, together=False)
    got = torch.autograd.grad([y.square().sum() + y[0, 0] for y in made], xs)
    for x, gradient in zip(xs, got, strict=True):
        again = x.detach().double().requires_grad_()
        y = torch.nn.functional.rms_norm(again, (x.shape[-1],), eps=1e-6)
        (expected,) = torch.autograd.grad(y.square().sum() + y[0, 0], again)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------- q, k and a cache


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("norm_v", [False, True])
@pytest.mark.parametrize("tokens", [(5,), (2, 3)], ids=str)
def test_q_k_and_v_have_the_bits_of_their_own_calls_and_the_cache_has_theirs(
    backend: Any, several: Several, tokens: tuple[int, ...], norm_v: bool, heads_first: bool
) -> None:
    for dtype, index in itertools.product(DTYPES, (torch.int32, torch.int64)):
        projection, table = packed(dtype, tokens), angles(tokens)
        before = projection.clone()
        q, k, v = projection.split(HEADS, -2)
        q_weight, k_weight = weights(dtype)
        k_cache, v_cache = caches(dtype, heads_first)
        slots = torch.tensor([4, 11, -1, 0, 12, 7])[: projection[..., 0, 0].numel()]
        slots = slots.view(tokens).to(index)
        given = (q, k, *table, q_weight, k_weight)
        options = {"v": v, "norm_v": norm_v, "slots": slots, "round_norm": True}
        of_caches = {"k_cache": k_cache.tensor, "v_cache": v_cache.tensor}
        made = several("qk_norm_rope", *given, **options, **of_caches)
        assert_same_bits(projection, before)
        expected = [
            backend("norm_rope", x, *table, weight, round_norm=True)
            for x, weight in ((q, q_weight), (k, k_weight))
        ]
        expected.append(backend("head_norm", v) if norm_v else v)
        for got, one in zip(made, expected, strict=True):
            assert_same_bits(got, one)
        for cache, y in ((k_cache, expected[1]), (v_cache, expected[2])):
            kept = torch.full((12, HEADS[1], WIDTH), -7.0, dtype=dtype)
            for slot, of_token in zip(slots.flatten(), y.reshape(-1, HEADS[1], WIDTH), strict=True):
                if 0 <= slot < 12:
                    kept[slot] = of_token
            assert_same_bits(cache.tensor.reshape(12, HEADS[1], WIDTH), kept)
            cache.assert_only_elements_written()


@pytest.mark.parametrize("norm_v", [False, True])
def test_a_cache_without_pages_gets_nothing(several: Several, norm_v: bool) -> None:
    q, k, v = packed(BF16).split(HEADS, -2)
    none = torch.empty(0, PAGE, HEADS[1], WIDTH, dtype=BF16)
    slots = torch.tensor([0, -1, 3, 1, 2])
    options = {"v": v, "norm_v": norm_v, "k_cache": none, "v_cache": none, "slots": slots}
    made = several("qk_norm_rope", q, k, *angles(), **options)
    expected = several("qk_norm_rope", q, k, *angles(), v=v, norm_v=norm_v)
    for got, one in zip(made, expected, strict=True):
        assert_same_bits(got, one)


def test_q_and_k_of_a_packed_projection_are_written_in_place(several: Several) -> None:
    projection, table = packed(BF16), angles()
    q, k, v = projection.split(HEADS, -2)
    left = v.clone()
    expected = several("qk_norm_rope", q, k, *table, *weights(BF16))
    made = several("qk_norm_rope", q, k, *table, *weights(BF16), outs=(q, k))
    assert made[0] is q
    assert made[1] is k
    for x, y in zip((q, k), expected, strict=True):
        assert_same_bits(x, y)
    assert_same_bits(v, left)


def test_without_cos_nothing_is_rotated(backend: Any, several: Several) -> None:
    q, k, _ = packed(BF16).split(HEADS, -2)
    made = several("qk_norm_rope", q, k, None, None, *weights(BF16), kind="layer")
    for x, weight, y in zip((q, k), weights(BF16), made, strict=True):
        assert_same_bits(y, backend("head_norm", x, weight, kind="layer"))


def test_compiled_calls_have_the_results_of_eager_ones() -> None:
    torch._dynamo.reset()
    q, k, v = packed(BF16).split(HEADS, -2)
    slots = torch.tensor([4, 11, -1, 0, 12])

    def call(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, ...]:
        given = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slots": slots}
        return normkit.qk_norm_rope(q, k, *angles(), *weights(BF16), **given)

    eager, compiled = ([c.tensor.clone() for c in caches(BF16, False)] for _ in "ec")
    expected = call(*eager)
    with normkit.compile_mode("op"):
        made = torch.compile(call, backend="aot_eager")(*compiled)
    for got, one in zip((*made, *compiled), (*expected, *eager), strict=True):
        assert_same_bits(got, one)


def test_writes_are_counted_for_autograd() -> None:
    q, k, v = packed(BF16).split(HEADS, -2)
    k_cache, v_cache = (cache.tensor for cache in caches(BF16, False))
    versions = [t._version for t in (q, k_cache, v_cache)]
    slots = torch.zeros(5, dtype=torch.int64)
    normkit.qk_norm_rope(
        q, k, *angles(), v=v, k_cache=k_cache, v_cache=v_cache, slots=slots, outs=(q, k)
    )
    assert all(t._version > old for t, old in zip((q, k_cache, v_cache), versions, strict=True))


# ------------------------------------------------------------------------------------------ errors


K_CACHE = torch.zeros(4, PAGE, HEADS[1], WIDTH)
SLOTS = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sin": None}, TypeError, r"^sin: expected a torch.Tensor, got NoneType"),
        ({"k_cache": K_CACHE}, TypeError, r"^slots: expected a torch.Tensor, got NoneType"),
        ({"slots": SLOTS}, ValueError, r"^slots: expected None without k_cache and v_cache"),
        ({"norm_v": True}, TypeError, r"^v: expected a torch.Tensor for norm_v and v_cache"),
        (
            {"k_cache": K_CACHE.half(), "slots": SLOTS},
            TypeError,
            r"^cache: expected y's dtype torch.float32, got torch.float16",
        ),
        (
            {"k_cache": K_CACHE[:, :, :1], "slots": SLOTS},
            ValueError,
            r"^cache: expected shape \(pages, page_size, 2, 24\), got \(4, 3, 1, 24\)",
        ),
        (
            {"k_cache": K_CACHE, "slots": SLOTS[:4]},
            ValueError,
            r"^slots: expected x's tokens \(5,\), got shape \(4,\)",
        ),
        (
            {"k_cache": K_CACHE, "slots": SLOTS.float()},
            TypeError,
            r"^slots: expected int32 or int64, got torch.float32",
        ),
        (
            {"k_cache": K_CACHE.transpose(2, 3).contiguous().transpose(2, 3), "slots": SLOTS},
            ValueError,
            r"^cache: expected a last stride of 1 in what is written, got 2",
        ),
        (
            {"k_cache": K_CACHE[:1].expand(4, -1, -1, -1), "slots": SLOTS},
            ValueError,
            r"^cache: expected rows of their own, got rows that share memory",
        ),
        ({"outs": [torch.ones(5, 4, 24)]}, ValueError, r"^outs: expected 2, for q, k, got 1"),
        ({"outs": torch.ones(2, 5, 4, 24)}, TypeError, r"^outs: expected a list of tensors"),
        ({"weight_offsets": 1.0}, TypeError, r"unexpected keyword argument 'weight_offsets'"),
        ({"kind": "batch"}, ValueError, r'^kind: expected "rms" or "layer", got'),
    ],
)
def test_errors_name_the_argument_and_nothing_is_written(
    backend: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    q, k = torch.randn(5, 4, 24), torch.randn(5, 2, 24)
    before = q.clone(), k.clone(), K_CACHE.clone()
    cos, sin = angles()
    given = {"q": q, "k": k, "cos": cos, "sin": sin, "outs": (q, k)} | change
    with normkit.use_backend(backend.name), pytest.raises(error, match=message):
        normkit.qk_norm_rope(**given)
    for t, old in zip((q, k, K_CACHE), before, strict=True):
        assert_same_bits(t, old)


def test_a_list_that_does_not_fit_is_an_error() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^weights: expected as many as xs, 1, got 2"):
        normkit.norms([x], [None, None])
    with pytest.raises(TypeError, match=r"^xs: expected a list of tensors, got Tensor"):
        normkit.norms(x)
    with pytest.raises(TypeError, match=r"^outs: expected a list of tensors, got Tensor"):
        normkit.norms([x, x], outs=torch.ones(2, 2, 4))
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got NoneType"):
        normkit.norms([x, None])
    with pytest.raises(ValueError, match=r"^cache: expected memory apart from x's"):
        normkit.qk_norm_rope(torch.ones(5, 4, 24), K_CACHE.flatten(0, 1)[:5], k_cache=K_CACHE,
                             slots=SLOTS)  # fmt: skip
