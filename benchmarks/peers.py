"""Inference engines that run a norm on a CPU, timed where they are installed: `bench-peers`.

Each is given a model of nothing but the norm, with its weights as constants, and the tensors that
it reads and writes, as `out=` does; its result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from cases import check, evaluated, first_line
from torch import Tensor

from normkit._bench import Names, Op

# Idle threads of an engine wait in a loop for a while, on a core that the next candidate needs.
SETTLE_SECONDS = 0.005
EXTRA = "normkit[bench-peers]"


def _data(op: Op, names: Names) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What an engine reads, what it writes, and its constants."""
    tensors = {name: t.detach() for name, t in names.items() if isinstance(t, Tensor)}

    def some(*wanted: str) -> dict[str, Tensor]:
        return {name: tensors[name] for name in wanted}

    read = some("x", *["residual"] * op.adds)
    written = some("y", *["residual_out"] * op.adds)
    return read, written, some("weight", *["bias"] * op.layer)


def _onnxruntime(op: Op, names: Names) -> tuple[str, Names]:
    import onnx
    import onnxruntime
    from onnx import helper

    if op.heads:
        raise LookupError("no operator with weights per head")
    read, written, constants = _data(op, names)
    code = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
    }[read["x"].dtype]
    name = "Skip" * op.adds + "Simplified" * (not op.layer) + "LayerNormalization"
    # Outputs between these two are statistics.
    outputs = ["y", "", "", "residual_out"] if op.adds else ["y"]
    node = helper.make_node(
        name,
        [*read, *constants],
        outputs,
        domain="com.microsoft" * op.adds,
        epsilon=1e-5 if op.layer else 1e-6,
        **({} if op.adds else {"axis": -1}),
    )

    def described(tensors: dict[str, Tensor]) -> list[Any]:
        return [helper.make_tensor_value_info(k, code, t.shape) for k, t in tensors.items()]

    stored = [
        helper.make_tensor(k, code, t.shape, t.view(torch.uint8).numpy().tobytes(), raw=True)
        for k, t in constants.items()
    ]
    graph = helper.make_graph([node], "norm", described(read), described(written), stored)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for k, t in read.items():
        binding.bind_input(k, "cpu", 0, code, t.shape, t.data_ptr())
    for k, t in written.items():
        binding.bind_output(k, "cpu", 0, code, t.shape, t.data_ptr())
    names = {"onnxruntime": session, "onnxruntime_binding": binding}
    return "onnxruntime.run_with_iobinding(onnxruntime_binding)", names


def _openvino(op: Op, names: Names) -> tuple[str, Names]:
    import numpy
    import openvino
    from openvino import opset13

    read, written, constants = _data(op, names)
    kind = {
        torch.float32: openvino.Type.f32,
        torch.float16: openvino.Type.f16,
        torch.bfloat16: openvino.Type.bf16,
    }[read["x"].dtype]
    wide, stored = openvino.Type.f32, kind.get_type_name()
    inputs = [opset13.parameter(t.shape, kind, name=k) for k, t in read.items()]
    x, *residual = (opset13.convert(i, wide.get_type_name()) for i in inputs)
    results = []
    if residual:
        rounded = opset13.convert(opset13.add(x, *residual), stored)
        results, x = [rounded], opset13.convert(rounded, wide.get_type_name())
    weight, *bias = (opset13.constant(t.float().numpy()) for t in constants.values())
    axis = opset13.constant(numpy.array([-1]))

    def number(value: float) -> Any:
        return opset13.constant(numpy.float32(value))

    if op.layer:
        y = opset13.multiply(opset13.mvn(x, axis, True, 1e-5, "inside_sqrt"), weight)
        y = opset13.add(y, *bias)
    else:  # which its CPU plug-in recognises as an RMS norm
        squares = opset13.reduce_mean(opset13.power(x, number(2)), axis, True)
        root = opset13.sqrt(opset13.add(squares, number(1e-6)))
        y = opset13.multiply(opset13.multiply(x, opset13.divide(number(1), root)), weight)
    results.insert(0, opset13.convert(y, stored))
    model = openvino.Model([opset13.result(r) for r in results], inputs, "norm")
    core = openvino.Core()
    able = {torch.float16: "FP16", torch.bfloat16: "BF16"}.get(read["x"].dtype)
    computed = kind if able in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else wide
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": computed.get_type_name(),
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def shared(t: Tensor) -> Any:
        bits = t.view(torch.uint16) if t.dtype == torch.bfloat16 else t  # which numpy has not
        return openvino.Tensor(bits.numpy(), openvino.Shape(list(t.shape)), kind)

    for i, t in enumerate(read.values()):
        request.set_input_tensor(i, shared(t))
    for i, t in enumerate(written.values()):
        request.set_output_tensor(i, shared(t))
    return f"openvino.infer()  # in {computed.get_type_name()}", {"openvino": request}


Engine = Callable[[Op, Names], tuple[str, Names]]
PEERS: dict[str, Engine] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def installed() -> dict[str, str]:
    """Those that can be timed, and their versions."""
    return {name: version(name) for name in PEERS if find_spec(name)}


def candidates(
    op: Op, names: Names, dtype: str, without: dict[str, str]
) -> tuple[dict[str, str], Names]:
    """Statements of the engines and what they use; why others are missing goes into `without`."""
    statements, used = {}, {}
    for name, engine in PEERS.items():
        try:
            if not find_spec(name):
                raise ModuleNotFoundError(f"{name} is not installed: {EXTRA}")
            statement, more = engine(op, names)
            _check(op, names, dtype, statement, more)
        except Exception as error:  # whatever it is, it is no reason to end the run
            without[name] = first_line(error)
        else:
            statements[name] = statement
            used |= more
    return statements, used


@torch.no_grad()
def _check(op: Op, names: Names, dtype: str, statement: str, more: Names) -> None:
    """Raise where the engine does not compute the norm of x, or writes it somewhere else."""
    read, written, constants = _data(op, names)
    for t in written.values():
        t.fill_(torch.nan)
    evaluated(statement.partition("  #")[0], **more)(names)
    few = {k: t[:64].float() for k, t in read.items()} | {
        k: t.float() for k, t in constants.items()
    }
    expected = evaluated(op.torch_allocating)(names | few)
    for t, e in zip(written.values(), reversed(expected) if op.adds else [expected], strict=True):
        check(t[:64], e, dtype)
