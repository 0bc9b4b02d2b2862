"""How an operator of `torch.ops.normkit` is made: schema, implementations, fake and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from normkit._serving.native import Kernel, give_kernel
from normkit._spec import Fields

# Ends the name of an operator that has no gradients, beside one that has.
KERNEL = "_kernel"

_library = torch.library.Library("normkit", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    arguments: str,
    returned: str,
    implementation: Callable[..., Tensor | Sequence[Tensor] | None],
    fake: Callable[..., Tensor | Sequence[Tensor] | None],
) -> None:
    """Make an operator of `torch.ops.normkit`, for tensors on any device and for fake ones."""
    schema = f"{name}({arguments}) -> {returned}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # register_fake() would look for this file's source, and for its module: 3 ms for all of them.
    _library.impl(name, fake, "Meta")  # type: ignore[no-untyped-call]


def define_formula(
    name: str,
    overload: str,
    arguments: str,
    returned: str,
    formula: Callable[..., Tensor | Sequence[Tensor]],
) -> torch._ops.OpOverload[Any, Any]:
    """Make an operator that is made of torch's, into which torch takes it apart."""
    schema = f"{name}.{overload}({arguments}) -> {returned}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(f"{name}.{overload}", formula, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    made: torch._ops.OpOverload[Any, Any] = getattr(getattr(torch.ops.normkit, name), overload)
    return made


class Definition(NamedTuple):
    """An operator, but for its name and its gradients."""

    arguments: Fields
    returned: str
    implementation: Callable[..., Tensor | Sequence[Tensor] | None]
    fake: Callable[..., Tensor | Sequence[Tensor] | None]
    kernel: Kernel

    def define(self, name: str) -> None:
        declared = ", ".join(argument.declared(name) for name, argument in self.arguments.items())
        define(name, declared, self.returned, self.implementation, self.fake)
        give_kernel(name, self.arguments, self.kernel, self.implementation)

    def define_with_gradients(
        self, name: str, backward: Callable[..., Any], keep: Callable[..., None] | None = None
    ) -> None:
        """Make two: one with gradients, and the kernel that it calls, which has none.

        A compiled graph, out of which torch has taken the gradients, is left with the kernel, and
        spends nothing on autograd.
        """
        self.define(name)
        # Inductor hands over by name what has a default, which takes torch twice the time.
        needed = {name: field._replace(default=...) for name, field in self.arguments.items()}
        self._replace(arguments=needed).define(name + KERNEL)
        # Where gradients are recorded all the same, what it runs is plain torch, which has them.
        fallthrough = torch.library.fallthrough_kernel
        _library.impl(name + KERNEL, fallthrough, "Autograd")  # type: ignore[no-untyped-call]
        called = getattr(torch.ops.normkit, name + KERNEL).default
        defaults = tuple(argument.default for argument in self.arguments.values())

        def below_autograd(keyset: torch._C.DispatchKeySet, values: tuple[Any, ...]) -> Any:
            values += defaults[len(values) :]
            with torch._C._AutoDispatchBelowAutograd():
                return called.redispatch(keyset & torch._C._after_autograd_keyset, *values)

        class Differentiated(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
                made = below_autograd(keyset, values)
                if keep is not None:
                    keep(ctx, values, made)
                return made

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return None, *backward(ctx, *grads)

        def differentiated(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*values):
                return Differentiated.apply(keyset, *values)  # type: ignore[no-untyped-call]
            return below_autograd(keyset, values)

        _library.impl(name, differentiated, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def differentiate(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give an operator its gradients."""
    torch.library.register_autograd(
        f"normkit::{name}", backward, setup_context=setup_context, lib=_library
    )


def refuse_to_differentiate(name: str) -> None:
    """Have an operator that makes gradients say that it has none itself."""
    differentiate(name, refusal(name))


def refusal(name: str) -> Callable[..., NoReturn]:
    """The backward function of an operator that makes gradients, which has none itself."""

    def refuse(ctx: object, *_: object) -> NoReturn:
        raise RuntimeError(f"{name}: its result cannot be differentiated again")

    return refuse
