"""How a call that the quick path did not take goes on: operators, autograd, or a backend.

Compiled calls are plain torch of `inline.py` or an operator of `operators.py`.  Traced and
subclassed tensors take an operator, too; a call that needs a gradient an autograd function; the
rest a backend.  Types that `normkit.parallel` knows are handed over to it, by the name of the type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from normkit._serving import dispatch, nested, operators
from normkit._serving.autograd import run_with_gradient
from normkit._serving.backends import ALWAYS_DISPATCH, falls_back, wanted_backend
from normkit._serving.checks import check, in_groups
from normkit._serving.dispatch import Explanation, run_by_reference
from normkit._serving.inline import run_compiled
from normkit._spec import FUSED_TENSORS, INDICES, OPS, Call, Result
from normkit.reference import is_transformed

# Devices on which torch's autocast has its layer norm (True) or rms norm (False) return float32.
# Torch itself is asked: that of 2.10 has no such rule for rms_norm.
AUTOCAST_TO_FLOAT32 = tuple(
    (device, layer)
    for device in ("cuda", "xpu")
    for layer, norm in ((False, "aten::rms_norm"), (True, "aten::layer_norm"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(norm, f"Autocast{device.upper()}")
)

PLAIN = (Tensor, torch.nn.Parameter)

# The public functions by name: what other types than tensors are told of, as torch tells its own.
FUNCTIONS: dict[str, Callable[..., Result]] = {}

# Who runs calls of tensors of a type, and explains them: found by name, so that nobody who has none
# pays for importing torch.distributed.
PLUG_INS = {"DTensor": "normkit.parallel._dtensor"}


def serve(call: Call) -> Result:
    """Check and run a call that the quick path did not take."""
    if is_dynamo_compiling():
        return _serve_compiled(call)
    if type(call.x) not in PLAIN:
        if nested.is_jagged(call.x) and not call.fused:
            return _run_jagged(call)
        if not isinstance(call.x, Tensor | type) and has_torch_function((call.x,)):
            return _hand_over(call)
    call = _autocast(call)
    transformed = is_transformed()
    if torch.compiler.is_compiling():
        return run_by_reference(check(call)) if transformed else run_compiled(call)
    transformed = transformed or torch._C._is_tracing()
    if ALWAYS_DISPATCH or torch._C._len_torch_dispatch_stack() > 0 or not _is_plain(call):
        call = check(call)
        plug_in = _plug_in(call)
        if plug_in is not None and not transformed:
            made: Result | None = plug_in.run(call)
            if made is not None:
                return made
        # A backend asked for by name has to say that it cannot run these.
        by_name = transformed or not falls_back(wanted_backend())
        return dispatch.run(call) if by_name else operators.call_operator(call)
    writes = call.out is not None or call.residual_out is not None
    if transformed or writes or not call.requires_grad():
        return dispatch.run(check(call))
    if call.fused:
        return operators.call_operator(check(call))
    # The extension checks, and what it refuses dispatch.save; but neither sees the first and the
    # last of these, and the backward pass wants numbers that torch can add.
    if (
        type(call.memory_efficient) is not bool
        or (call.eps is not None and type(call.eps) is not float)
        or type(call.weight_offset) is not float
        or (call.takes_residual and call.residual is None)
    ):
        call = check(call)
    return run_with_gradient(call)


def _serve_compiled(call: Call) -> Result:
    """Trace a call.

    At each call of what it compiled Dynamo looks whether all that this reads is as it was, twice
    where two modules have one thing by a name: functions are imported, and few things are read.
    """
    if getattr(call.x, "is_nested", False) and nested.is_jagged(call.x) and not call.fused:
        return _run_jagged(call)
    if not getattr(call.x, "is_cpu", True):
        call = _autocast(call)
    return run_by_reference(check(call)) if is_transformed() else run_compiled(call)


_signature = cache(inspect.signature)


def explain(op: str | Callable[..., Result], *args: object, **options: object) -> Explanation:
    """Tell how exactly this call would run, and why; nothing is computed or written.

    No output is allocated; inputs that the call would copy, for their strides, are copied here too.

    Args:
        op: one of normkit's functions, or its name.
        args: its positional arguments.
        options: its keyword arguments.

    Returns:
        An `Explanation` with `backend` ("cpu", "cuda", "triton" or "reference"), `plan` and
        `reason`.

    Raises:
        ValueError: op is not one of normkit's functions.
        Exception: whatever the call itself would raise.

    Example:
        >>> import normkit, torch
        >>> normkit.explain("rms_norm", torch.ones(2, 4, dtype=torch.float64)).reason
        'x is float64'
    """
    function = FUNCTIONS.get(op) if isinstance(op, str) else op
    if function is None or function not in FUNCTIONS.values():
        raise ValueError(f"op: expected one of {', '.join(FUNCTIONS)} of normkit, got {op!r}")
    name: str = function.__name__
    given = _signature(function).bind(*args, **options)
    given.apply_defaults()
    arguments = given.arguments
    group_size = arguments.pop("group_size", None)
    if group_size is not None:
        names = [name for name in ("x", "z", "weight", "bias", "out") if name in arguments]
        arguments.update(in_groups(group_size, **{name: arguments[name] for name in names}))
    return _explain(OPS[name.rstrip("_")].call(arguments, in_place=name[-1] == "_"))


def _explain(call: Call) -> Explanation:
    if nested.is_jagged(call.x) and not call.fused:
        return _explain(nested.norm_of_values(call))
    call = check(_autocast(call))
    plug_in = _plug_in(call)
    if plug_in is not None and not (is_transformed() or torch._C._is_tracing()):
        call = plug_in.part_of_rank(call) or call
    return dispatch.explain_call(call)


def _plug_in(call: Call) -> ModuleType | None:
    name = PLUG_INS.get(type(call.x).__name__)
    return None if name is None else import_module(name)


def _run_jagged(call: Call) -> Result:
    def ragged(values: Tensor, out: Tensor | None) -> Tensor:
        return nested.ragged_as(call.x, values) if out is None else out

    made = serve(nested.norm_of_values(call))
    if not isinstance(made, tuple):
        return ragged(made, call.out)
    return ragged(made[0], call.out), ragged(made[1], call.residual_out)


def _hand_over(call: Call) -> Result:
    """Let an x that is no tensor, as torch.fx traces with, say what a call of it means."""
    function = FUNCTIONS[call.op]
    given: dict[str, object] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = call.statistic if name == "kind" else getattr(call, name)
        default = parameter.default
        is_default = value is default or (type(value) is type(default) and value == default)
        if not is_default or default is parameter.empty:
            given[name] = value
    made: Result = handle_torch_function(function, (call.x,), given.pop("x"), **given)
    return made


def _autocast(call: Call) -> Call:
    return replace(call, out_dtype=torch.float32) if autocasts(call) else call


def autocasts(call: Call) -> bool:
    """Whether torch's rules for autocast have this call return float32."""
    if call.post:  # which is a sum, of residual's dtype
        return False
    if not isinstance(call.x, Tensor) or call.x.is_cpu:
        return False
    if call.out_dtype is not None or call.out is not None:
        return False
    device = call.x.device.type
    return (
        (device, call.layer) in AUTOCAST_TO_FLOAT32
        and call.x.dtype != torch.float64
        and torch.is_autocast_enabled(device)
    )


def _is_plain(call: Call) -> bool:
    """Whether kernels may read the tensors, and autograd needs no help of the dispatcher."""
    given = (call.x, call.residual, call.weight, call.bias, call.out, call.residual_out)
    if call.fused:
        given += tuple(getattr(call, name) for name in (*FUSED_TENSORS, *INDICES))
    for t in given:
        # A nested tensor of the older kind is a plain Tensor without a shape.
        if t is not None and (type(t) not in PLAIN or t.is_nested):
            return False
    return call.x is not None and (call.x.is_cpu or call.x.is_cuda or call.x.is_xpu)
