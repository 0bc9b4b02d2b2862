"""What autograd asks of the norms beyond a first gradient of everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradgradcheck

import normkit
from conformance.support import threads
from torch_integration.support import (
    FUNCTIONS,
    NAMES,
    adds,
    assert_equal_bits,
    clones,
    compiled,
    listed,
    loss_of,
    operator,
    per_head,
    results_and_gradients,
    tensors,
)

ADDING = [name for name in FUNCTIONS if adds(name)]


def eager(name: str) -> Callable[..., Any]:
    return getattr(normkit, name)  # type: ignore[no-any-return]


def dispatched(name: str) -> Callable[..., Any]:
    return lambda *given, **options: operator(name)(*given, **options)[: 1 + adds(name)]


ways = pytest.mark.parametrize("way", [eager, dispatched])


@pytest.mark.parametrize("name", NAMES)
def test_operators_can_be_differentiated_twice(name: str) -> None:
    given = tensors(name, (2, 3, 4), torch.float64, grad=True)
    kinds = ({"kind": "rms"}, {"kind": "layer"}) if per_head(name) else ({},)
    for kind in kinds:
        options = {"weight_offset": 1.0, "eps": 0.3, **kind}
        assert gradgradcheck(lambda *g, o=options: dispatched(name)(*g, **o), given)


@ways
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_of_float32_are_those_of_float64(name: str, way: Any) -> None:
    def penalty(dtype: torch.dtype) -> list[Tensor]:
        given = [t.to(dtype).requires_grad_() for t in tensors(name)]
        first = grad(loss_of(way(name)(*given)), given, create_graph=True)
        loss_of(way(name)(*given)).add(sum((g**2).sum() for g in first)).backward()
        return [t.grad for t in given]  # type: ignore[misc]

    for mine, exact in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(mine, exact.float(), rtol=1e-4, atol=1e-4)


@ways
def test_a_first_gradient_is_hardly_another_where_a_second_may_follow(way: Any) -> None:
    for name in FUNCTIONS:
        given = tensors(name, grad=True)
        once = grad(loss_of(way(name)(*given)), given)
        kept = grad(loss_of(way(name)(*given)), given, create_graph=True)
        assert all(g.requires_grad for g in kept[:-1])
        torch.testing.assert_close(list(kept), list(once))


@ways
def test_memory_efficient_says_that_it_cannot_be_differentiated_twice(way: Any) -> None:
    for name in FUNCTIONS:
        given = tensors(name, grad=True)
        loss = loss_of(way(name)(*given, memory_efficient=True))
        with pytest.raises(RuntimeError, match="memory_efficient: expected False"):
            grad(loss, given, create_graph=True)


@ways
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_gradient_can_be_asked_for_alone(name: str, way: Any) -> None:
    given = tensors(name, dtype=torch.bfloat16, weight_dtype=torch.float32)
    together = results_and_gradients(way(name), given)[1]
    for place, expected in enumerate(together):
        alone = clones(given, grad=False)
        alone[place].requires_grad_()
        loss_of(way(name)(*alone)).backward()
        assert [t.grad is None for t in alone] == [i != place for i in range(len(given))]
        torch.testing.assert_close(alone[place].grad, expected, rtol=1e-2, atol=1e-2)


@ways
@pytest.mark.parametrize("name", ADDING)
def test_a_gradient_through_the_residual_alone_is_passed_on(name: str, way: Any) -> None:
    x, residual, weight, bias = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    given = [t.requires_grad_() for t in (x, residual, weight, bias)]
    _, total = way(name)(*given)
    upstream = torch.randn(total.shape)
    total.backward(upstream)
    assert_equal_bits([x.grad, residual.grad], [upstream.to(torch.bfloat16), upstream])
    assert weight.grad is None or not weight.grad.any()
    assert bias.grad is None or not bias.grad.any()


@ways
@pytest.mark.parametrize("name", ADDING)
def test_a_gradient_through_y_alone_goes_to_both_inputs(name: str, way: Any) -> None:
    x, residual, weight, bias = given = tensors(name, grad=True)
    loss_of(way(name)(*given)[0]).backward()
    alone = tensors(name.removeprefix("add_"))
    total = (x + residual).detach()
    expected = results_and_gradients(eager(name.removeprefix("add_")), [total, *alone[1:]])
    assert_equal_bits([x.grad, residual.grad], [expected[1][0]] * 2)
    assert weight.grad is not None
    assert bias.grad is not None


@ways
@pytest.mark.parametrize("name", FUNCTIONS)
def test_upstream_gradients_may_have_any_strides(name: str, way: Any) -> None:
    given = tensors(name, grad=True)
    shape, weights = (2, 3, 8), torch.randn(8)
    for upstream in (
        torch.ones(()).expand(shape),
        weights.expand(shape),
        torch.randn(8, 3, 2).permute(2, 1, 0),
        torch.randn(2, 3, 16)[..., ::2],
        torch.complex(torch.randn(shape), torch.randn(shape)).conj().imag,
    ):
        made = listed(way(name)(*given))
        got = grad(made, given, [upstream] * len(made))
        made = listed(way(name)(*given))
        plain = torch.empty(shape).copy_(upstream)
        assert_equal_bits(got, grad(made, given, [plain] * len(made)))


def test_a_sum_can_be_differentiated() -> None:
    for name in FUNCTIONS:
        given = tensors(name, grad=True)
        listed(eager(name)(*given))[0].sum().backward()
        assert given[-1].grad is not None
        rows = given[0].numel() // given[-1].numel()
        assert (given[-1].grad == rows).all()


@ways
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_runs_and_any_number_of_threads_give_the_same_bits(name: str, way: Any) -> None:
    given = tensors(name, (64, 3, 160), torch.bfloat16)
    expected = results_and_gradients(way(name), given)[1]
    for count in (1, 2, 2, 3):
        with threads(count):
            assert_equal_bits(results_and_gradients(way(name), given)[1], expected)


@ways
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_can_be_run_twice(name: str, memory_efficient: bool, way: Any) -> None:
    given = tensors(name, grad=True)
    loss = loss_of(way(name)(*given, memory_efficient=memory_efficient))
    first = grad(loss, given, retain_graph=True)
    assert_equal_bits(grad(loss, given, retain_graph=True), first)
    assert_equal_bits(grad(loss, given), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_anomaly_mode_finds_the_norm_that_made_a_nan(name: str) -> None:
    given = tensors(name)
    with torch.autograd.detect_anomaly():
        results_and_gradients(eager(name), given)
        given[0].view(-1)[0] = float("nan")
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match="_NormBackward.*nan"),
        ):
            results_and_gradients(eager(name), given)


# -------------------------------------------------------------- one gradient for x and residual


@pytest.mark.parametrize("way", [eager, dispatched, lambda name: compiled(eager(name))])
@pytest.mark.parametrize("name", ADDING)
def test_the_gradients_of_x_and_residual_may_be_changed_apart(name: str, way: Any) -> None:
    torch._dynamo.reset()
    function, given = way(name), tensors(name, grad=True)
    x, residual = given[:2]
    loss_of(function(*given)).backward()
    assert x.grad is not None
    assert residual.grad is not None
    once = residual.grad.clone()
    assert_equal_bits(x.grad, once)
    x.grad.zero_()
    assert_equal_bits(residual.grad, once)
    for _ in range(2):  # now accumulated, in place
        loss_of(function(*given)).backward()
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(residual.grad, 3 * once)
    residual.grad.zero_()
    torch.testing.assert_close(x.grad, 2 * once)


@pytest.mark.parametrize("name", ADDING)
def test_hooks_that_return_a_gradient_change_one_of_them(name: str) -> None:
    expected = results_and_gradients(eager(name), tensors(name))[1][:2]
    for place in (0, 1):
        given = tensors(name, grad=True)
        given[place].register_hook(lambda g: 2 * g)
        loss_of(eager(name)(*given)).backward()
        doubled = [t * (1 + (i == place)) for i, t in enumerate(expected) if t is not None]
        assert_equal_bits([t.grad for t in given[:2]], doubled)


@pytest.mark.parametrize("name", ADDING)
def test_kept_and_accumulated_gradients_are_changed_apart(name: str) -> None:
    """Not leaves: what they keep are copies, as with torch's own sums."""
    leaves = tensors(name, grad=True)
    given = [t * 1 for t in leaves]
    for t in given[:2]:
        t.retain_grad()

    def clear(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.zero_()

    leaves[1].register_post_accumulate_grad_hook(clear)
    loss_of(eager(name)(*given)).backward()
    assert_equal_bits([given[1].grad, leaves[0].grad], [given[0].grad] * 2)
    assert not leaves[1].grad.any()
    given[0].grad.zero_()
    assert given[1].grad.any()
    assert leaves[0].grad.any()


@pytest.mark.parametrize("name", ADDING)
def test_the_upstream_gradient_is_not_written(name: str) -> None:
    for through in ((0, 1), (1,), (0,)):
        given = tensors(name, grad=True)
        made = [listed(eager(name)(*given))[i] for i in through]
        upstream = [torch.randn(t.shape) for t in made]
        before = clones(upstream)
        torch.autograd.backward(made, upstream)
        for t in given:
            if t.grad is not None:
                t.grad.fill_(7)
        assert_equal_bits(upstream, before)


@pytest.mark.parametrize("name", ADDING)
def test_x_may_be_the_residual_itself(name: str) -> None:
    x, _, weight, bias = tensors(name)
    both = x.clone().requires_grad_()
    loss_of(eager(name)(both, both, weight, bias)).backward()
    of_x, of_residual, *_ = results_and_gradients(eager(name), [x, x, weight, bias])[1]
    assert_equal_bits(both.grad, of_x + of_residual)


def test_weight_tied_to_itself_and_used_twice_gets_both_gradients() -> None:
    x, weight, bias = tensors("rms_norm")
    one, two = (results_and_gradients(normkit.rms_norm, [t, weight, bias])[1] for t in (x, 2 * x))
    shared = weight.clone().requires_grad_()
    y = normkit.rms_norm(x, shared, bias), normkit.rms_norm(2 * x, shared, bias)
    loss_of(list(y)).backward()
    assert_equal_bits(shared.grad, one[1] + two[1])


def test_deep_copies_of_gradients_are_their_own() -> None:
    norm = normkit.RMSNorm(8, bias=True)
    loss_of(norm(torch.randn(2, 8))).backward()
    twin = copy.deepcopy(norm)
    loss_of(twin(torch.randn(2, 8))).backward()
    assert not torch.equal(twin.weight.grad, norm.weight.grad)
