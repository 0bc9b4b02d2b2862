"""What `normkit.compat.dropout_layer_norm` says to calls that cannot be served."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from compat.dropout_calls import EPS
from normkit.compat import dropout_layer_norm

ROWS, N = 4, 8
NUMBERS = torch.ones(ROWS, dtype=torch.int32)
SUBSETS_BACK = {"x0_subset_": NUMBERS, "z_subset_": NUMBERS, "x0_numrows": ROWS}
SUBSETS = {"x0_subset_": NUMBERS, "z_subset_": NUMBERS, "z_numrows": ROWS}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x0": [1.0]}, TypeError, "x0: expected a torch.Tensor, got list"),
        (
            {"x0": torch.ones(N)},
            ValueError,
            r"x0: expected shape \(rows, n\) with n > 0, got \(8,\)",
        ),
        ({"x0": torch.ones(2, 2, N)}, ValueError, "x0: expected shape"),
        ({"x0": torch.ones(ROWS, 0)}, ValueError, "x0: expected shape"),
        (
            {"x0": torch.ones(ROWS, N).double()},
            TypeError,
            "x0: expected float32, float16 or bfloat",
        ),
        (
            {"residual": torch.ones(3, N)},
            ValueError,
            r"residual: expected shape \(4, 8\), got \(3, 8",
        ),
        (
            {"residual": torch.ones(ROWS, N).long()},
            TypeError,
            "residual: expected float32, .* got torch.int64",
        ),
        (
            {"residual": torch.ones(ROWS, N, device="meta")},
            ValueError,
            "residual: expected device cpu",
        ),
        ({"gamma": None}, TypeError, "gamma: expected a torch.Tensor, got NoneType"),
        ({"gamma": torch.ones(7)}, ValueError, r"gamma: expected shape \(8,\), got \(7,\)"),
        ({"beta_": torch.ones(1, N)}, ValueError, r"beta_: expected shape \(8,\), got \(1, 8\)"),
        ({"rowscale_": torch.ones(3)}, ValueError, r"rowscale_: expected shape \(4,\), got \(3,\)"),
        ({"colscale_": torch.ones(3)}, ValueError, r"colscale_: expected shape \(8,\), got \(3,\)"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a number from 0 to below 1, got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a number from 0 to below 1"),
        ({"dropout_p": "0"}, TypeError, "dropout_p: expected a number, got str"),
        ({"epsilon": -1e-5}, ValueError, "epsilon: expected a finite number >= 0, got -1e-05"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: expected a finite number >= 0, got nan"),
        ({"z_subset_": NUMBERS}, ValueError, "x0_subset_: expected a tensor, since .* got None"),
        ({"x0_subset_": NUMBERS}, ValueError, "z_subset_: expected a tensor, since .* got None"),
        ({**SUBSETS, "x0_subset_": NUMBERS.long()}, TypeError, "x0_subset_: expected int32"),
        ({**SUBSETS, "z_subset_": NUMBERS[1:]}, ValueError, r"z_subset_: expected shape \(4,\)"),
        (
            {**SUBSETS, "x0_subset_": 5 * NUMBERS},
            ValueError,
            "x0_subset_: expected numbers up to 4",
        ),
        ({**SUBSETS, "z_numrows": 0}, ValueError, "z_subset_: expected numbers up to 0, got 1"),
        ({**SUBSETS, "z_numrows": -1}, ValueError, "z_numrows: expected a number of rows, got -1"),
        ({**SUBSETS, "z_numrows": 2.0}, TypeError, "z_numrows: expected an int, got float"),
        ({**SUBSETS, "rowscale_": torch.ones(ROWS)}, ValueError, "rowscale_: expected None with"),
    ],
)
def test_an_error_names_the_argument(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    function = dropout_layer_norm.dropout_add_ln_fwd
    right = dict.fromkeys(inspect.signature(function).parameters)
    right |= {"x0": torch.ones(ROWS, N), "residual": torch.ones(ROWS, N), "gamma": torch.ones(N)}
    right |= {"dropout_p": 0.0, "epsilon": EPS, "rowscale_const": 1.0, "z_numrows": 0}
    assert len(function(**right)) == 5
    with pytest.raises(error, match=f"^{message}"):
        function(**{**right, **wrong})


@pytest.mark.parametrize("name", ["x1_", "residual", "beta0_", "gamma1_", "beta1_"])
def test_an_error_names_the_argument_of_two_norms(name: str) -> None:
    parallel = dropout_layer_norm.dropout_add_ln_parallel_residual_fwd
    right = dict.fromkeys(inspect.signature(parallel).parameters)
    right |= {"x0": torch.ones(ROWS, N), "gamma0": torch.ones(N), "dropout_p": 0.0, "epsilon": EPS}
    assert len(parallel(**right)) == 7
    with pytest.raises(ValueError, match=f"^{name}: expected shape .* got \\(3, 3\\)"):
        parallel(**{**right, name: torch.ones(3, 3)})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
        ({"x": torch.ones(ROWS, 1, N)}, ValueError, r"x: expected shape \(rows, n\)"),
        ({"dz": torch.ones(3, N)}, ValueError, r"dz: expected shape \(4, 8\), got \(3, 8\)"),
        ({"dz": None}, TypeError, "dz: expected a torch.Tensor, got NoneType"),
        ({"dx_": torch.ones(3, N)}, ValueError, r"dx_: expected shape \(4, 8\), got \(3, 8\)"),
        ({"mu": torch.ones(3)}, ValueError, r"mu: expected shape \(4,\), got \(3,\)"),
        ({"mu": torch.ones(ROWS).half()}, TypeError, "mu: expected float32, got torch.float16"),
        ({"rsigma": torch.ones(3)}, ValueError, r"rsigma: expected shape \(4,\), got \(3,\)"),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma: expected shape \(8,\), got \(3,\)"),
        ({"rowscale_": torch.ones(3)}, ValueError, r"rowscale_: expected shape \(4,\)"),
        ({"colscale_": torch.ones(N)}, ValueError, "x0_: expected a tensor, since .* got None"),
        ({"x0_": torch.ones(3, N)}, ValueError, r"x0_: expected shape \(4, 8\)"),
        ({"dropout_p": 0.5}, ValueError, "dmask_: expected a tensor, since .* 0.5, got None"),
        (
            {"dropout_p": 0.5, "dmask_": torch.ones(ROWS, N)},
            TypeError,
            "dmask_: expected uint8, got torch.float32",
        ),
        ({"dropout_p": 1}, ValueError, "dropout_p: expected a number from 0 to below 1, got 1"),
        ({"x0_subset_": NUMBERS}, ValueError, "z_subset_: expected a tensor, since .* got None"),
        ({**SUBSETS_BACK, "x0_numrows": None}, TypeError, "x0_numrows: expected an int"),
        ({**SUBSETS_BACK, "x0_numrows": 0}, ValueError, "x0_subset_: expected numbers up to 0"),
        ({**SUBSETS_BACK, "dz": torch.ones(0, N)}, ValueError, "z_subset_: expected numbers up to"),
        ({**SUBSETS_BACK, "dz": 1.0}, TypeError, "dz: expected a torch.Tensor, got float"),
        ({**SUBSETS_BACK, "dz": torch.tensor(1.0)}, ValueError, "dz: expected at least one dimens"),
    ],
)
def test_an_error_names_the_argument_of_the_gradients(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    function = dropout_layer_norm.dropout_add_ln_bwd
    right = dict.fromkeys(inspect.signature(function).parameters)
    right |= {"dz": torch.ones(ROWS, N), "x": torch.ones(ROWS, N), "gamma": torch.ones(N)}
    right |= {"mu": torch.ones(ROWS), "rsigma": torch.ones(ROWS), "dropout_p": 0.0}
    assert len(function(**right)) == 6
    with pytest.raises(error, match=f"^{message}"):
        function(**{**right, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dz1_": torch.ones(ROWS, N)}, "gamma1_: expected a tensor, since there is a dz1_"),
        ({"gamma1_": torch.ones(N)}, "dz1_: expected a tensor, since there is a gamma1_"),
        ({"dz0": torch.ones(3, N)}, r"dz0: expected shape \(4, 8\), got \(3, 8\)"),
        ({"gamma0": torch.ones(3)}, r"gamma0: expected shape \(8,\), got \(3,\)"),
        ({"dropout_p": 0.5}, "dmask0_: expected a tensor, since dropout_p is 0.5, got None"),
        (
            {"dropout_p": 0.5, "has_x1": True, "dmask0_": torch.ones(ROWS, N, dtype=torch.uint8)},
            "dmask1_: expected a tensor, since dropout_p is 0.5, got None",
        ),
    ],
)
def test_an_error_names_the_argument_of_the_gradients_of_two_norms(
    wrong: dict[str, Any], message: str
) -> None:
    function = dropout_layer_norm.dropout_add_ln_parallel_residual_bwd
    right = dict.fromkeys(inspect.signature(function).parameters)
    right |= {"dz0": torch.ones(ROWS, N), "x": torch.ones(ROWS, N), "gamma0": torch.ones(N)}
    right |= {"mu": torch.ones(ROWS), "rsigma": torch.ones(ROWS), "dropout_p": 0.0}
    assert len(function(**right)) == 11
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{**right, **wrong})
