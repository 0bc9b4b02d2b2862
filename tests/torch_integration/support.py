"""What the tests of this folder share: operators and their arguments, memory layouts, bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import normkit
from conformance.support import bits
from normkit._spec import OPS
from normkit.testing import make_inputs

# Of the norms alone; test_fusions.py is about the others.
NAMES = tuple(name for name, op in OPS.items() if op.is_plain)
FUNCTIONS = tuple(name for name in NAMES if hasattr(normkit, name))
FORMS = ("", "_", "_out")
MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "RMSNorm": lambda n, **rest: normkit.RMSNorm(n, bias=True, **rest),
    "LayerNorm": lambda n, **rest: normkit.LayerNorm(n, **rest),
    "HeadNorm": lambda n, **rest: normkit.HeadNorm(3, n, kind="layer", bias=True, **rest),
}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def operator(name: str, form: str = "") -> Any:
    return getattr(torch.ops.normkit, name + form).default


def adds(name: str) -> bool:
    return name.startswith("add_")


def per_head(name: str) -> bool:
    return "head" in name


def tensors(
    name: str,
    shape: tuple[int, ...] = (2, 3, 8),
    dtype: torch.dtype = torch.float32,
    *,
    grad: bool = False,
    **rest: Any,
) -> list[Tensor]:
    """Make x, residual if the norm adds one, weight and bias."""
    made = make_inputs(shape, dtype, per_head=per_head(name), **rest)
    given = [made.x, *([made.residual] if adds(name) else []), made.weight, made.bias]
    return [t.requires_grad_(grad) for t in given]


def arguments_of(name: str, form: str, given: list[Tensor | None]) -> list[Any]:
    """Put outputs before the inputs where the form writes them."""
    if form != "_out":
        return list(given)
    x, residual = given[0], given[1] if adds(name) else None
    assert x is not None
    outputs = [torch.empty(x.shape, dtype=x.dtype)]
    if residual is not None:
        outputs.append(torch.empty(x.shape, dtype=residual.dtype))
    return [*outputs, *given]


def clones(given: Any, grad: bool | None = None) -> list[Any]:
    """Copies of the same strides, detached from everything."""
    return [
        copy_of(t).requires_grad_(t.requires_grad if grad is None else grad)
        if isinstance(t, Tensor)
        else t
        for t in given
    ]


def copy_of(t: Tensor) -> Tensor:
    memory = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage().clone())
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + 1)
    return module


def listed(made: Any) -> list[Tensor]:
    return list(made) if isinstance(made, tuple | list) else [made]


def loss_of(made: Any) -> Tensor:
    """Make a scalar that weighs all elements differently."""
    return sum(
        (t.float() * torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape)).sum()
        for t in listed(made)
    )  # type: ignore[return-value]


def assert_equal_bits(got: Any, expected: Any) -> None:
    got, expected = listed(got), listed(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (t.detach().contiguous() for t in (a, b))
        different = bits(a) != bits(b)
        assert not different.any(), f"{int(different.sum())} of {a.numel()} elements differ"


def results_and_gradients(
    function: Callable[..., Any], given: list[Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Call function on copies that want gradients, and run backward."""
    wanting = clones(given, grad=True)
    made = function(*wanting)
    loss_of(made).backward()
    return listed(made), [t.grad for t in wanting if isinstance(t, Tensor)]


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Make tensors of one shape and three dimensions, whose memory looks different."""
    a, b, n = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    places = {
        "contiguous": torch.empty(shape, dtype=dtype),
        "a slice of a wider row": torch.empty(a, b, n + 5, dtype=dtype)[..., 2 : 2 + n],
        "outer dimensions swapped": torch.empty(b, a, n, dtype=dtype).transpose(0, 1),
        "every other row": torch.empty(a, 2 * b, n, dtype=dtype)[:, ::2],
        "last stride 2": torch.empty(a, b, 2 * n, dtype=dtype)[..., ::2],
        "permuted": torch.empty(a, n, b, dtype=dtype).transpose(1, 2),
        "reversed": torch.empty(n, b, a, dtype=dtype).permute(2, 1, 0),
        "a step beyond the rows": torch.empty(a * (b * n + 3), dtype=dtype).as_strided(
            shape, (b * n + 3, n, 1)
        ),
    }
    for name, t in places.items():
        yield name, t.copy_(values)
    yield "expanded", torch.randn(n, dtype=torch.float32).to(dtype).expand(shape)


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


class Recorder:
    """A backend of torch.compile that keeps the graphs, forward and backward, and runs them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)


def called(graph: torch.fx.GraphModule, namespace: str = "") -> list[str]:
    """Name the operators that a graph calls."""
    targets = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [t for t in targets if t.startswith(namespace)]
