"""Torch's own norms while `patch_torch` holds: normkit's bits, torch's rules, no trace after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from normkit.integrations import _torch, patch_torch

N = 48
OPS = ("rms", "layer")
# x, weight: what torch takes on the CPU
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
SHAPES = [(5, N), (2, 3, N), (0, N), (1, N), (N,), (3, 4, 12)]
both_ops = pytest.mark.parametrize("op", OPS)


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ops that normkit's kernels ran, in order."""
    ran: list[str] = []

    def counted(name: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        def count(*values: object) -> Any:
            made = serve(*values)
            if made is not None:
                ran.append(name)
            return made

        return count

    for name, serve in list(_torch._SERVED.items()):
        monkeypatch.setitem(_torch._SERVED, name, counted(name, serve))
    yield ran
    assert not _torch._holders, "a test has left torch patched"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def torchs(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 0.3) -> Tensor:
    if op == "rms":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def normkits(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 0.3) -> Tensor:
    rows = x.flatten(x.ndim - weight.ndim)
    if op == "rms":
        y = normkit.rms_norm(rows, weight.flatten(), None, eps)
    else:
        y = normkit.layer_norm(rows, weight.flatten(), bias.flatten(), eps)
    return y.view(x.shape)


def gradients(norm: Callable[..., Tensor], op: str, *tensors: Tensor) -> list[Tensor]:
    """Y and the gradients of all that the op takes."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = norm(op, *leaves)
    wanted = leaves[:2] if op == "rms" else leaves
    return [y.detach(), *torch.autograd.grad((y.double() ** 2).sum(), wanted)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, ...]:
    whole = shape[-2:] if shape == SHAPES[-1] else shape[-1:]
    return (
        random(*shape, dtype=dtype),
        random(*whole, dtype=wide, seed=1),
        random(*whole, dtype=wide, seed=2),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("op", "dtype", "wide"),
    # torch has no fused rms norm of two dtypes
    [(op, x, weight) for op in OPS for x, weight in DTYPES if op == "layer" or x == weight],
    ids=str,
)
def test_forward_and_backward_have_normkits_bits(
    kernels_run: list[str], op: str, dtype: torch.dtype, wide: torch.dtype, shape: tuple[int, ...]
) -> None:
    given = tensors(shape, dtype, wide)
    with patch_torch():
        got = gradients(torchs, op, *given)
    name = "_fused_rms_norm" if op == "rms" else "native_layer_norm"
    assert kernels_run == [name, f"{name}_backward"]
    want = gradients(normkits, op, *given)
    assert torch.equal(got[0], want[0])
    # of its rstd torch keeps 16 bits where all is in 16 bits
    rounded = op == "layer" and dtype == wide != torch.float32
    for mine, other in zip(got[1:], want[1:], strict=True):
        assert mine.dtype == other.dtype
        if rounded:
            torch.testing.assert_close(mine, other, atol=0.1, rtol=0.03)
        else:
            assert torch.equal(mine, other)


@both_ops
@pytest.mark.parametrize("n", [1, 2, 31, 257, 53_248, 100_003])
def test_rows_of_any_length_are_right(kernels_run: list[str], n: int, op: str) -> None:
    given = tensors((3, n), torch.float32, torch.float32)
    want = gradients(torchs, op, *given)
    with patch_torch():
        got = gradients(torchs, op, *given)
    assert len(kernels_run) == 2
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@both_ops
def test_results_are_what_torch_returns_in_dtype_shape_and_strides(
    kernels_run: list[str], op: str
) -> None:
    for dtype, wide in DTYPES:
        for shape in SHAPES:
            x, weight, bias = tensors(shape, dtype, wide)

            def call(
                x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias
            ) -> tuple[Tensor, ...]:
                if op == "rms":
                    made: tuple[Tensor, ...] = torch.ops.aten._fused_rms_norm(
                        x, weight.shape, weight, 0.3
                    )
                    return made
                return torch.native_layer_norm(x, weight.shape, weight, bias, 0.3)

            if op == "rms" and wide != dtype:
                continue
            want = call()
            kernels_run.clear()
            with patch_torch():
                got = call()
            assert len(kernels_run) == 1
            for mine, torchs_ in zip(got, want, strict=True):
                assert mine.dtype == torchs_.dtype
                assert mine.shape == torchs_.shape
                assert mine.stride() == torchs_.stride()
                torch.testing.assert_close(mine, torchs_, atol=2e-2, rtol=2e-2)


def test_a_large_mean_does_not_spoil_gradients_in_16_bits(kernels_run: list[str]) -> None:
    """Torch hands over the mean in 16 bits: of 100.2 it is 100, a fifth of a deviation off."""
    x = random(8, N, dtype=torch.bfloat16) * 2 + 100.2
    weight, bias = random(N, seed=1).bfloat16(), random(N, seed=2).bfloat16()
    with patch_torch():
        got = gradients(torchs, "layer", x, weight, bias)
    assert "native_layer_norm_backward" in kernels_run
    want = gradients(torchs, "layer", x.double(), weight.double(), bias.double())
    own = gradients(torchs, "layer", x, weight, bias)

    def error(g: Tensor) -> float:
        return ((g.double() - want[2]).abs().max() / want[2].abs().max()).item()

    assert error(got[2]) < 0.02
    assert error(own[2]) > 2 * error(got[2])


@both_ops
def test_modules_are_served(kernels_run: list[str], op: str) -> None:
    module = torch.nn.RMSNorm(N) if op == "rms" else torch.nn.LayerNorm(N)
    with patch_torch(), torch.no_grad():
        module(random(3, N))
    assert len(kernels_run) == 1


@both_ops
def test_inference_mode_is_served(kernels_run: list[str], op: str) -> None:
    with patch_torch(), torch.inference_mode():
        given = tensors((3, N), torch.float32, torch.float32)
        y = torchs(op, *given)
        assert torch.equal(y, normkits(op, *given))
    assert len(kernels_run) == 1


def test_eps_of_none_is_torchs(kernels_run: list[str]) -> None:
    x = random(4, N) * 1e-4
    want = F.rms_norm(x, (N,))
    with patch_torch():
        torch.testing.assert_close(F.rms_norm(x, (N,)), want)
    assert kernels_run == ["_fused_rms_norm"]


@both_ops
def test_what_kernels_do_not_run_goes_to_torch(kernels_run: list[str], op: str) -> None:
    def of(dtype: torch.dtype) -> list[Tensor]:
        return [random(4, N, dtype=dtype), random(N, dtype=dtype, seed=1), random(N, dtype=dtype)]

    wide, narrow = of(torch.float64), of(torch.float32)
    crosswise = [random(12, 4, 3).permute(2, 1, 0), random(4, 12), random(4, 12)]
    calls: list[Callable[[], list[Tensor]]] = [
        lambda: gradients(torchs, op, *wide),
        lambda: [torchs(op, *narrow, eps=-0.01)],
        lambda: gradients(torchs, op, *crosswise),
    ]
    for call in calls:
        want = call()
        with patch_torch():
            got = call()
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert kernels_run == []


def test_use_backend_reference_leaves_it_to_torch(kernels_run: list[str]) -> None:
    given = tensors((3, N), torch.float32, torch.float32)
    want = gradients(torchs, "layer", *given)
    with patch_torch(), normkit.use_backend("reference"):
        got = gradients(torchs, "layer", *given)
    assert all(map(torch.equal, got, want))
    assert kernels_run == []


def test_calls_that_torch_refuses_raise_torchs_errors() -> None:
    x = random(3, N)
    refused: list[Callable[[], Tensor]] = [
        lambda: F.layer_norm(x, (N,), random(N - 1)),
        lambda: F.layer_norm(x, (N,), random(N).bfloat16()),
        lambda: F.layer_norm(x, ()),
        lambda: F.rms_norm(x, (N - 1,)),
        lambda: F.rms_norm(x, (4, N)),
        lambda: F.rms_norm(x, (N,), random(1, N)),
    ]
    for call in refused:
        with pytest.raises(RuntimeError) as torchs_error:
            call()
        with patch_torch(), pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == str(torchs_error.value)


# ---------------------------------------------------------------- autograd and transforms


@both_ops
def test_gradients_can_be_differentiated_again(kernels_run: list[str], op: str) -> None:
    given = tensors((3, N), torch.float32, torch.float32)

    def twice() -> Tensor:
        x = given[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(torchs(op, x, *given[1:]).sin().sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    want = twice()
    with patch_torch():
        got = twice()
    assert kernels_run
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both_ops
def test_expanded_gradients_are_right(kernels_run: list[str], op: str) -> None:
    """Those of a sum have strides of 0."""
    given = tensors((3, N), torch.float32, torch.float32)
    with patch_torch():
        x = given[0].clone().requires_grad_()
        torchs(op, x, *given[1:]).sum().backward()
    assert kernels_run[-1].endswith("_backward")
    mine, x.grad = x.grad, None
    torchs(op, x, *given[1:]).sum().backward()
    torch.testing.assert_close(mine, x.grad, rtol=1e-4, atol=1e-5)


@both_ops
def test_transforms_of_torch_func_are_as_without(kernels_run: list[str], op: str) -> None:
    x, weight, bias = tensors((4, N), torch.float32, torch.float32)

    def loss(x: Tensor) -> Tensor:
        return torchs(op, x, weight, bias).sin().sum()

    transformed: list[Callable[[], Tensor]] = [
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.vmap(torch.func.grad(loss))(x),
        lambda: torch.func.vmap(lambda row: torchs(op, row, weight, bias))(x),
        lambda: torch.func.jvp(lambda x: torchs(op, x, weight, bias), (x,), (x,))[1],
    ]
    for run in transformed:
        want = run()
        with patch_torch():
            torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-5)


@both_ops
def test_autocast_on_the_cpu_changes_nothing(kernels_run: list[str], op: str) -> None:
    given = tensors((3, N), torch.bfloat16, torch.bfloat16)
    with patch_torch(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = torchs(op, *given)
    assert len(kernels_run) == 1
    assert torch.equal(y, normkits(op, *given))


@both_ops
@pytest.mark.parametrize("training", [False, True])
def test_graphs_of_torch_compile_run_the_kernels_where_they_call_torch(
    kernels_run: list[str], training: bool, op: str
) -> None:
    torch.compiler.reset()
    given = tensors((3, N), torch.float32, torch.float32)
    compiled = torch.compile(lambda *t: torchs(op, *t) * 2, backend="aot_eager", fullgraph=True)
    with patch_torch():
        got = [compiled(*given)]
        if training:
            got = gradients(lambda _, *t: compiled(*t), op, *given)
    assert ("_backward" in kernels_run[-1]) == training
    want = gradients(lambda op, *t: torchs(op, *t) * 2, op, *given)
    for mine, other in zip(got, want, strict=training):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# ---------------------------------------------------------------- patching


@both_ops
def test_revert_gives_torch_its_bits_back(kernels_run: list[str], op: str) -> None:
    given = tensors((64, N), torch.float32, torch.float32)
    before = gradients(torchs, op, *given)
    patch = patch_torch()
    during = gradients(torchs, op, *given)
    patch.revert()
    patch.revert()
    ran = len(kernels_run)
    after = gradients(torchs, op, *given)
    assert ran == len(kernels_run) == 2
    assert all(map(torch.equal, after, before))
    assert not all(map(torch.equal, during, before))


@both_ops
def test_a_backward_pass_after_revert_is_right(kernels_run: list[str], op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = tensors((3, N), dtype, dtype)
        leaves = [t.clone().requires_grad_() for t in given][: 2 if op == "rms" else 3]
        with patch_torch():
            y = torchs(op, *leaves, *given[len(leaves) :])
        got = torch.autograd.grad((y.double() ** 2).sum(), leaves)
        want = gradients(torchs, op, *given)[1:]
        for mine, other in zip(got, want, strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    assert not any(name.endswith("_backward") for name in kernels_run)


def test_the_first_to_revert_leaves_torch_patched_for_the_others(kernels_run: list[str]) -> None:
    first, second = patch_torch(), patch_torch()
    first.revert()
    F.rms_norm(random(2, N), (N,))
    second.revert()
    F.rms_norm(random(2, N), (N,))
    assert kernels_run == ["_fused_rms_norm"]


def test_an_error_inside_of_the_context_reverts_too(kernels_run: list[str]) -> None:
    with pytest.raises(KeyError), patch_torch():
        raise KeyError
    F.rms_norm(random(2, N), (N,))
    assert kernels_run == []


def test_threads_may_patch_call_and_revert_at_once(kernels_run: list[str]) -> None:
    given = tensors((3, N), torch.float32, torch.float32)
    want = [gradients(torchs, op, *given) for op in OPS]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with patch_torch():
                    for op, expected in zip(OPS, want, strict=True):
                        for mine, other in zip(
                            gradients(torchs, op, *given), expected, strict=True
                        ):
                            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert kernels_run


def test_grad_mode_is_left_as_it_was() -> None:
    with patch_torch():
        F.layer_norm(random(2, N), (N,))
        assert torch.is_grad_enabled()
        with torch.no_grad():
            F.layer_norm(random(2, N), (N,))
            assert not torch.is_grad_enabled()
