"""What the extension does not do with parts of rows: it says why, and does nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from conformance.parts import Native, native_of
from normkit._serving.refusal import Refusal
from normkit._spec import DEFAULT_OPTIONS, FLAGS


@pytest.fixture(scope="session")
def native(kernels: Any) -> Native:
    return native_of(kernels.name)


class Call(NamedTuple):
    """The arguments of a call by name, in their order."""

    function: str
    arguments: dict[str, Any]

    def but(self, **changed: Any) -> tuple[Any, ...]:
        assert changed.keys() <= self.arguments.keys()
        return self.function, *(self.arguments | changed).values()


X = torch.ones(2, 3, 8)
ROW = torch.ones(8)
VALUES = torch.ones(2, 3)
GATHERED = torch.ones(4, 2, 2, 3)
STATISTICS = Call("part_statistics", {"kind": 1, "x": X, "clamp_inf": False})
APPLY = Call(
    "part_apply",
    {"kind": 1, "x": X, "weight": ROW, "bias": ROW, "eps": 1e-5}
    | DEFAULT_OPTIONS
    | {"out_dtype": None, "gathered": GATHERED},
)
GRADIENTS = {"kind": 1, "grad_y": X, "x": X, "weight": ROW}
SAVED = {"rstd": VALUES, "mean": VALUES, "weight_offset": 0.0}
BACKWARD_STATISTICS = Call("part_backward_statistics", GRADIENTS | SAVED)
BACKWARD_APPLY = Call(
    "part_backward_apply",
    GRADIENTS
    | {"bias": ROW}
    | SAVED
    | {"round_before_weight": False, "x_dtype": torch.float32, "wanted": 3, "gathered": GATHERED},
)
CALLS = (STATISTICS, APPLY, BACKWARD_STATISTICS, BACKWARD_APPLY)


class Subclass(torch.Tensor):
    pass


# What is wrong with an argument of this name, whatever function it is of.
WRONG: dict[str, list[Any]] = {
    "x": [
        None,
        1.0,
        torch.ones(()),
        torch.ones(2, 3, 0),
        torch.ones(2, 3, 8, dtype=torch.float64),
        torch.ones(2, 3, 8, dtype=torch.int32),
        torch.ones(2, 8, 3).transpose(1, 2),
        torch.ones(2, 3, 8, device="meta"),
        torch.ones(2, 3, 8).as_subclass(Subclass),
    ],
    "grad_y": [None, torch.ones(2, 3, 7), torch.ones(6, 8), torch.ones(2, 8, 3).transpose(1, 2)],
    "weight": [torch.ones(7), torch.ones(3, 8), torch.ones(16)[::2], ROW.double()],
    "bias": [torch.ones(7), torch.ones(3, 8), torch.ones(16)[::2], ROW.double()],
    "rstd": [None, VALUES.half(), torch.ones(6), torch.ones(2, 4), torch.ones(3, 2).t()],
    "mean": [None, VALUES.half(), torch.ones(6), torch.ones(2, 4), torch.ones(3, 2).t()],
    "eps": ["1", -1.0, float("nan"), float("inf"), True],
    "weight_offset": ["1", float("nan"), float("inf"), None],
    **{flag: [1, None] for flag in FLAGS},
    "out_dtype": [torch.float64, torch.int8, "float32"],
    "x_dtype": [torch.float64, torch.int8, "float32"],
    "gathered": [
        None,
        GATHERED.half(),
        GATHERED.double(),
        torch.ones(0, 2, 2, 3),
        torch.ones(4, 1, 2, 3),
        torch.ones(4, 3, 2, 3),
        torch.ones(4, 2, 6),
        torch.ones(4, 2, 3, 2),
        torch.ones(4, 2, 2, 3, 1),
        torch.ones(2, 4, 2, 3).transpose(0, 1),
        torch.ones(1, 2, 2, 3).expand(4, 2, 2, 3),
        torch.ones(4, 2, 2, 3, device="meta"),
        torch.ones(()),
    ],
}


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call in CALLS for name in call.arguments if name in WRONG],
    ids=lambda v: v.function if isinstance(v, Call) else v,
)
def test_what_cannot_be_served_is_refused_by_name(native: Native, call: Call, name: str) -> None:
    native(*call.but())
    for wrong in WRONG[name]:
        said = native.try_(*call.but(**{name: wrong}))
        assert isinstance(said, Refusal), (name, wrong)
        # That x is another one may show in what has to fit it.
        about = [name] if name != "x" else list(call.arguments)
        assert any(a in said.argument.split(" or ") for a in about), said


def test_an_rms_norm_has_no_mean_and_one_plane(native: Native) -> None:
    one_plane = torch.ones(4, 1, 2, 3)
    y, rstd, mean = native(*APPLY.but(kind=0, gathered=one_plane))
    assert (y.shape, rstd.shape, mean) == (X.shape, (2, 3), None)
    assert native.try_(*APPLY.but(kind=0)).argument == "gathered"
    assert native.try_(*BACKWARD_STATISTICS.but(kind=0)).argument == "mean"
    native(*BACKWARD_APPLY.but(kind=0, mean=None, gathered=one_plane))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.function)
def test_the_number_of_arguments_is_checked(native: Native, call: Call) -> None:
    function, *arguments = call.but()
    with pytest.raises(TypeError, match="positional arguments"):
        native.try_(function, *arguments[:-1])
    with pytest.raises(TypeError, match="positional arguments"):
        native.try_(function, *arguments, None)
