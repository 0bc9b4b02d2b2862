"""The forward functions of `normkit.compat.dropout_layer_norm`."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normkit
from compat.dropout_calls import (
    AUTO,
    BFLOAT16,
    DTYPES,
    EPS,
    FLOAT16,
    FLOAT32,
    Options,
    assert_norm_of,
    call,
    forward,
    random,
    subset,
    summed,
)
from conformance.support import assert_same_bits, bits
from normkit.compat import dropout_layer_norm

both_kinds = pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])
parallel = dropout_layer_norm.dropout_add_ln_parallel_residual_fwd


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "dropout_add_ln_fwd",
            "x0 residual gamma beta_ rowscale_ colscale_ x0_subset_ z_subset_ dropout_p epsilon"
            " rowscale_const z_numrows gen_ residual_in_fp32=False is_rms_norm=False",
        ),
        (
            "dropout_add_ln_bwd",
            "dz dx_ x x0_ dmask_ mu rsigma gamma rowscale_ colscale_ x0_subset_ z_subset_ dropout_p"
            " rowscale_const x0_numrows has_residual is_rms_norm=False",
        ),
        (
            "dropout_add_ln_parallel_residual_fwd",
            "x0 x1_ residual gamma0 beta0_ gamma1_ beta1_ dropout_p epsilon gen_"
            " residual_in_fp32=False is_rms_norm=False",
        ),
        (
            "dropout_add_ln_parallel_residual_bwd",
            "dz0 dz1_ dx_ x dmask0_ dmask1_ mu rsigma gamma0 gamma1_ dropout_p has_x1 has_residual"
            " is_rms_norm=False",
        ),
    ],
)
def test_arguments_are_those_of_the_extension(name: str, arguments: str) -> None:
    parameters = inspect.signature(getattr(dropout_layer_norm, name)).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert " ".join(shown) == arguments


# ---------------------------------------------------------------- the sum and its norm

EVERY_MIX = list(itertools.product((FLOAT32, FLOAT16, BFLOAT16), repeat=3))


@both_kinds
@pytest.mark.parametrize("has_beta", [False, True], ids=["", "beta"])
@pytest.mark.parametrize("dtypes", EVERY_MIX, ids=str)
def test_z_is_rounded_once_and_x_is_the_rounded_sum(
    backend: Any, dtypes: tuple[torch.dtype, ...], has_beta: bool, is_rms_norm: bool
) -> None:
    x0, residual = random(4, 200, dtype=dtypes[0]), random(4, 200, dtype=dtypes[1], seed=1)
    gamma = random(200, dtype=dtypes[2], seed=2)
    beta = random(200, dtype=dtypes[2], seed=3) if has_beta else None
    options = Options(is_rms_norm=is_rms_norm)
    z, x, dmask, mu, rsigma = forward(backend, x0, residual, gamma, beta, options)
    assert z.dtype == x0.dtype
    assert_same_bits(x, (x0.float() + residual.float()).to(residual.dtype))
    assert_norm_of(z, x0, residual, x, gamma, beta, is_rms_norm=is_rms_norm)
    assert dmask is None
    assert mu.dtype == rsigma.dtype == FLOAT32
    total = x0.double() + residual.double()
    mean = total.mean(-1)
    if is_rms_norm:
        assert_same_bits(mu, torch.zeros(4))
        statistic = total.square().mean(-1)
    else:
        torch.testing.assert_close(mu, mean.float(), rtol=1e-6, atol=1e-6)
        statistic = (total - mean.unsqueeze(1)).square().mean(-1)
    torch.testing.assert_close(rsigma, (statistic + EPS).rsqrt().float(), rtol=1e-6, atol=0)


@both_kinds
def test_the_norm_sees_the_sum_before_it_is_rounded(backend: Any, is_rms_norm: bool) -> None:
    x0 = torch.ones(1, 2, dtype=BFLOAT16)
    residual = torch.tensor([[2.0**-9, -(2.0**-9)]], dtype=BFLOAT16)  # both lost in bfloat16
    gamma, beta = torch.full((2,), 128.0), torch.full((2,), -128.0)
    options = Options(is_rms_norm=is_rms_norm, epsilon=0.0)
    z, x, *_ = forward(backend, x0, residual, gamma, beta, options)
    assert x.tolist() == [[1.0, 1.0]]
    expected = [[0.25, -0.25]] if is_rms_norm else [[0.0, -256.0]]
    torch.testing.assert_close(z.float(), torch.tensor(expected), rtol=0.01, atol=0)


@both_kinds
@pytest.mark.parametrize("n", [1, 5, 192, 8200, 16384])
def test_every_hidden_size_is_served(backend: Any, n: int, is_rms_norm: bool) -> None:
    x0, residual = random(3, n, dtype=BFLOAT16), random(3, n, seed=1)
    gamma, beta = random(n, seed=2), random(n, seed=3)
    options = Options(is_rms_norm=is_rms_norm)
    z, x, *_ = forward(backend, x0, residual, gamma, beta, options)
    assert_same_bits(x, x0.float() + residual)
    assert_norm_of(z, x0, residual, x, gamma, beta, is_rms_norm=is_rms_norm)


def test_x_is_none_where_it_would_be_x0(backend: Any) -> None:
    x0, gamma = random(3, 8, dtype=FLOAT16), random(8, seed=1)
    z, x, dmask, _, _ = forward(backend, x0, None, gamma, None, Options(residual_in_fp32=False))
    assert x is None
    assert dmask is None
    assert_norm_of(z, x0, None, None, gamma)
    wide = forward(backend, x0.float(), None, gamma, None, Options(residual_in_fp32=True))
    assert wide[1] is None


def test_residual_in_fp32_gives_x_in_float32_where_there_is_no_residual(backend: Any) -> None:
    x0, gamma = random(3, 8, dtype=FLOAT16), random(8, seed=1)
    options = Options(residual_in_fp32=True)
    z, x, *_ = forward(backend, x0, None, gamma, None, options)
    assert_same_bits(x, x0.float())
    assert_norm_of(z, x0, None, None, gamma)
    residual = random(3, 8, dtype=FLOAT16, seed=2)
    assert forward(backend, x0, residual, gamma, None, options)[1].dtype == FLOAT16


@both_kinds
def test_zero_rows_are_served(backend: Any, is_rms_norm: bool) -> None:
    x0, residual = torch.empty(0, 24, dtype=FLOAT16), torch.empty(0, 24)
    options = Options(is_rms_norm=is_rms_norm, dropout_p=0.5, rowscale=torch.empty(0))
    z, x, dmask, mu, rsigma = forward(backend, x0, residual, torch.ones(24), None, options)
    assert z.shape == x.shape == dmask.shape == (0, 24)
    assert mu.shape == rsigma.shape == (0,)


def test_rows_may_lie_anywhere_and_keep_their_bits(backend: Any) -> None:
    packed = random(6, 3 * 40, dtype=BFLOAT16)
    residual, gamma = random(6, 40, seed=1).t().contiguous().t(), random(40, seed=2)
    x0 = packed[:, 41:81]
    straight = forward(backend, x0.contiguous(), residual.contiguous(), gamma, None, Options())
    for got, expected in zip(
        forward(backend, x0, residual, gamma, None, Options()), straight, strict=True
    ):
        assert_same_bits(got, expected)
    alone = forward(backend, x0[4:5], residual[4:5], gamma, None, Options())
    assert_same_bits(alone[0], straight[0][4:5])


# ---------------------------------------------------------------- scales


@both_kinds
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_scales_multiply_x0_before_the_sum(
    backend: Any, dtypes: tuple[torch.dtype, ...], has_residual: bool, is_rms_norm: bool
) -> None:
    x0 = random(4, 40, dtype=dtypes[0])
    residual = random(4, 40, dtype=dtypes[1], seed=1) if has_residual else None
    gamma, colscale = random(40, dtype=dtypes[2], seed=2), random(40, dtype=dtypes[2], seed=3)
    rowscale = random(4, dtype=dtypes[0], seed=4)
    options = Options(
        rowscale, colscale, residual_in_fp32=dtypes[1] == FLOAT32, is_rms_norm=is_rms_norm
    )
    z, x, *_ = forward(backend, x0, residual, gamma, None, options)
    product = x0.float() * rowscale.float().unsqueeze(1) * colscale.float()
    added = product if residual is None else product + residual.float()
    stored = dtypes[1] if has_residual or dtypes[1] == FLOAT32 else dtypes[0]
    assert_same_bits(x, added.to(stored))
    assert z.dtype == x0.dtype
    assert_norm_of(z, product, residual, x, gamma, is_rms_norm=is_rms_norm)


# ---------------------------------------------------------------- dropout


def test_what_is_kept_is_divided_by_the_probability_to_keep_it(backend: Any) -> None:
    x0, residual, gamma = random(4, 40), random(4, 40, seed=1), random(40, seed=2)
    options = Options(dropout_p=0.25)
    z, x, dmask, *_ = forward(backend, x0, residual, gamma, None, options)
    assert dmask.dtype == torch.uint8
    assert set(dmask.flatten().tolist()) == {0, 1}
    expected = residual + torch.where(dmask.bool(), x0 * (1 / 0.75), 0.0)
    assert_same_bits(x, expected)
    assert_norm_of(z, x, None, None, gamma)


def test_what_is_dropped_counts_as_0_even_if_it_is_not_finite() -> None:
    x0 = torch.full((4, 40), torch.nan)
    _, x, dmask, *_ = forward(AUTO, x0, None, torch.ones(40), None, Options(dropout_p=0.5))
    assert torch.equal(x.isnan(), dmask.bool())
    assert not x[dmask == 0].any()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_as_much_is_dropped_as_was_asked_for(dropout_p: float) -> None:
    torch.manual_seed(0)
    x0 = torch.ones(100, 1000)
    dmask = forward(AUTO, x0, None, torch.ones(1000), None, Options(dropout_p=dropout_p))[2]
    deviation = (dropout_p * (1 - dropout_p) / x0.numel()) ** 0.5
    assert abs(1 - dmask.double().mean().item() - dropout_p) < 5 * deviation


def test_dropout_is_that_of_the_seed() -> None:
    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        x0 = torch.ones(8, 64)
        made = forward(AUTO, x0, None, torch.ones(64), None, Options(dropout_p=0.5))
        return made[2]

    assert torch.equal(dropped(3), dropped(3))
    assert not torch.equal(dropped(3), dropped(4))


def test_a_generator_of_ones_own_leaves_the_default_one_alone() -> None:
    def dropped() -> Tensor:
        options = Options(dropout_p=0.5, generator=torch.Generator().manual_seed(3))
        return forward(AUTO, torch.ones(8, 64), None, torch.ones(64), None, options)[2]

    before = torch.get_rng_state()
    assert torch.equal(dropped(), dropped())
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- subsets


@both_kinds
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_subsets_say_which_rows_enter_and_which_are_made(
    backend: Any, dropout_p: float, is_rms_norm: bool
) -> None:
    x0, residual = random(2, 40, dtype=BFLOAT16), random(5, 40, seed=1)
    gamma, beta, colscale = random(40, seed=2), random(40, seed=3), random(40, seed=4)
    entering, made_of = subset([1, 0, 0, 1, 0]), subset([0, 1, 0, 1, 1])
    options = Options(
        None, colscale, entering, made_of, dropout_p, rowscale_const=2.0, z_numrows=4
    )._replace(is_rms_norm=is_rms_norm)
    z, x, dmask, mu, rsigma = forward(backend, x0, residual, gamma, beta, options)
    assert mu.shape == rsigma.shape == (5,)
    expected = summed(x0.double(), residual.double(), dmask, options._replace(colscale=colscale))
    torch.testing.assert_close(x, expected.float(), rtol=1e-6, atol=1e-6)
    assert_same_bits(x[1], residual[1])  # into which no row of x0 enters
    options = Options(is_rms_norm=is_rms_norm)
    whole = forward(backend, x, None, gamma, beta, options)[0].to(BFLOAT16)
    torch.testing.assert_close(z[:3], whole[[1, 3, 4]], rtol=2**-7, atol=1e-6)
    assert not z[3].any()  # a row that no number names


def test_what_is_not_named_does_not_matter(backend: Any) -> None:
    x0, residual, gamma = random(2, 8), random(2, 8, seed=1), random(8, seed=2)
    x0[0], residual[1] = torch.nan, torch.nan
    numbers = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    options = Options(None, None, *numbers, z_numrows=1)
    z, x, *_ = forward(backend, x0, residual, gamma, None, options)
    assert_same_bits(x[0], x0[1] + residual[0])
    assert z.isfinite().all()


def test_no_row_may_enter(backend: Any) -> None:
    nothing = torch.zeros(3, dtype=torch.int32)
    residual, gamma = random(3, 8), random(8, seed=1)
    options = Options(None, None, nothing, subset([1, 1, 1]), z_numrows=3)
    z, x, *_ = forward(backend, torch.empty(0, 8), residual, gamma, None, options)
    assert_same_bits(x, residual)
    assert_norm_of(z, residual, None, None, gamma)


# ---------------------------------------------------------------- two summands, two norms


@both_kinds
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_both_norms_are_of_the_unrounded_sum(
    backend: Any, dtypes: tuple[torch.dtype, ...], is_rms_norm: bool
) -> None:
    x0, x1 = random(4, 40, dtype=dtypes[0]), random(4, 40, dtype=dtypes[0], seed=1)
    residual = random(4, 40, dtype=dtypes[1], seed=2)
    weights = [random(40, dtype=dtypes[2], seed=seed) for seed in range(3, 7)]
    given = x0, x1, residual, *weights, 0.0, EPS, None, False, is_rms_norm
    z0, z1, x, dmask0, dmask1, mu, rsigma = call(backend, parallel, *given)
    both = x0.float() + x1.float()
    assert_same_bits(x, (both + residual.float()).to(residual.dtype))
    assert dmask0 is None
    assert dmask1 is None
    assert mu.shape == rsigma.shape == (4,)
    for z, gamma, beta in ((z0, *weights[:2]), (z1, *weights[2:])):
        assert z.dtype == x0.dtype
        assert_norm_of(z, both, residual, x, gamma, beta, is_rms_norm=is_rms_norm)


def test_what_is_not_there_has_no_results(backend: Any) -> None:
    x0, gamma = random(4, 40, dtype=FLOAT16), random(40, seed=1)
    given = x0, None, None, gamma, None, None, None
    z0, z1, x, dmask0, dmask1, _, _ = call(backend, parallel, *given, 0.0, EPS, None)
    assert z1 is x is dmask0 is dmask1 is None
    assert_norm_of(z0, x0, None, None, gamma)
    x, dmask0, dmask1 = call(backend, parallel, *given, 0.5, EPS, None)[2:5]
    assert x.dtype == FLOAT16
    assert dmask0.shape == x0.shape
    assert dmask1 is None
    assert call(backend, parallel, *given, 0.0, EPS, None, True)[2].dtype == FLOAT32


def test_both_summands_are_dropped_each_by_itself(backend: Any) -> None:
    x0, x1, gamma = random(8, 64), random(8, 64, seed=1), random(64, seed=2)
    given = x0, x1, None, gamma, None, gamma, None, 0.5, EPS, None
    z0, z1, x, dmask0, dmask1, *_ = call(backend, parallel, *given)
    assert not torch.equal(dmask0, dmask1)
    expected = torch.where(dmask0.bool(), 2 * x0, 0.0) + torch.where(dmask1.bool(), 2 * x1, 0.0)
    assert_same_bits(x, expected)
    assert_same_bits(z0, z1)


# ---------------------------------------------------------------- what holds for every call


def _everything() -> tuple[Tensor, Tensor, Tensor, Tensor, Options]:
    x0, residual = random(4, 40), random(4, 40, seed=1)
    gamma, beta, colscale = random(40, seed=2), random(40, seed=3), random(40, seed=4)
    return x0, residual, gamma, beta, Options(random(4, seed=5), colscale, dropout_p=0.5)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_inputs_are_never_written_and_results_are_memory_of_their_own(
    backend: Any, scaled: bool, has_residual: bool
) -> None:
    x0, residual, gamma, beta, options = _everything()
    given = [x0, *([residual] if has_residual else []), gamma, beta, *options[:2]]
    before = [bits(t).clone() for t in given]
    made = forward(
        backend,
        x0,
        residual if has_residual else None,
        gamma,
        beta,
        options if scaled else Options(),
    )
    for t in made:
        if t is not None:
            t.fill_(7)
    for t, old in zip(given, before, strict=True):
        assert torch.equal(bits(t), old)


def test_autograd_records_nothing() -> None:
    x0, residual, gamma, beta, options = _everything()
    for t in (x0, residual, gamma, beta):
        t.requires_grad_()
    for given in (options, Options()):
        made = forward(AUTO, x0, residual, gamma, beta, given)
        assert not any(t is not None and t.requires_grad for t in made)


def test_a_device_without_kernels_is_served() -> None:
    x0, residual, gamma, beta, options = _everything()
    on_meta = [t.to("meta") for t in (x0, residual, gamma, beta, *options[:2])]
    options = options._replace(rowscale=on_meta[4], colscale=on_meta[5])
    made = forward(AUTO, *on_meta[:4], options)
    assert [tuple(t.shape) for t in made] == [(4, 40)] * 3 + [(4,)] * 2
    assert all(t.is_meta for t in made)


@pytest.mark.parametrize("epsilon", [1, np.float32(1e-5), np.float64(1e-5)], ids=repr)
def test_numbers_of_every_kind_are_taken(epsilon: Any) -> None:
    x0, gamma = random(3, 8), random(8)
    z, *_ = forward(AUTO, x0, None, gamma, None, Options(epsilon=epsilon))
    expected, *_ = forward(AUTO, x0, None, gamma, None, Options(epsilon=float(epsilon)))
    assert_same_bits(z, expected)


def test_compiled_code_gives_the_same() -> None:
    x0, residual, gamma, beta, _ = _everything()

    def twice(x0: Tensor, residual: Tensor) -> Tensor:
        given = 2 * x0, residual, gamma, beta, *Options()
        return 2 * dropout_layer_norm.dropout_add_ln_fwd(*given)[0]

    with warnings.catch_warnings():  # once a process, where the graph is broken
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace", UserWarning)
        compiled = torch.compile(twice, backend="eager")(x0, residual)
    assert_same_bits(compiled, twice(x0, residual))


def test_a_backend_asked_for_by_name_serves_or_raises() -> None:
    *given, _ = _everything()
    with normkit.use_backend("cuda"), pytest.raises(ValueError, match="cannot serve"):
        dropout_layer_norm.dropout_add_ln_fwd(*given, *Options())
