"""Variables: what a network keeps from one inference to the next, an input and an output more of the ONNX network.

States begin with zeros, and so must variables. Codes whose zero point is not 0 are kept as the floats that they stand
for, which become the same codes again.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from nnfuze_tvm.frontend.tflite.file import Operator, Tensor
from nnfuze_tvm.frontend.tflite.writer import Variable, Writer, checked


def handle(w: Writer, op: Operator) -> None:
    """VAR_HANDLE: the name of a resource."""
    w.variables.handles[op.outputs[0].number] = _name(op)


def read(w: Writer, op: Operator) -> None:
    """READ_VARIABLE of a resource."""
    w.write(state(w, _resource(w, op), op.outputs[0]), stored=True)


def assign(w: Writer, op: Operator) -> None:
    """ASSIGN_VARIABLE of a resource: what is read from now on, also in the next inference."""
    keep(w, _resource(w, op), w.given(1), w.raw(1))


def call_once(w: Writer, op: Operator) -> None:
    """CALL_ONCE of a graph that gives variables their first values."""
    number = op.options.InitSubgraphIndex()
    names: dict[int, str] = {}
    for inner in w.network.graphs[number] if 0 < number < len(w.network.graphs) else ():
        if inner.kind == "VAR_HANDLE":
            names[inner.outputs[0].number] = _name(inner)
        elif inner.kind == "ASSIGN_VARIABLE" and inner.inputs[0] is not None and inner.inputs[0].number in names:
            inner.constant(1)
            assert inner.inputs[1] is not None
            w.variables.initial[names[inner.inputs[0].number]] = inner.inputs[1].real
        else:
            raise ValueError(f"its graph computes the variables' first values ({inner.kind}), which is not supported")


def state(w: Writer, key: int | str, tensor: Tensor) -> str:
    """Return what a variable of such a tensor holds, as stored; its key is a tensor's number or a resource's name.

    Raises
    ------
    ValueError
        If it begins with other values than zeros, or has several scales.
    """
    known, name = w.variables.known, key if isinstance(key, str) else tensor.name
    if key not in known:
        if w.variables.initial.get(key, np.zeros(1)).any():
            raise ValueError(f"variable {name!r} begins with other values than zeros, which is not supported")
        if tensor.quantization is not None and len(tensor.quantization.scale) > 1:
            raise ValueError(f"variable {name!r} has several scales, which is not supported")
        called = _unique(w, name)
        value = called
        if not _stored(checked(tensor)):
            value = w.quantized(called, tensor)
        known[key] = Variable(called, tensor, value)
    return known[key].value


def keep(w: Writer, key: int | str, tensor: Tensor, value: str) -> None:
    """Make a value, as it is stored in such a tensor, what a variable holds."""
    known = w.variables.known
    if key in known:
        known[key].value = value
    else:
        # Nobody has read what was there before.
        known[key] = Variable("", tensor, value)


def states(w: Writer) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Return the states before and after an inference, of all variables that are read."""
    before, after = [], []
    for variable in w.variables.known.values():
        if not variable.state:
            continue
        tensor, name = variable.tensor, f"{variable.state}.next"
        value = variable.value if _stored(tensor) else w.dequantized(variable.value, tensor)
        w.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype if _stored(tensor) else "float32"))
        before.append(helper.make_tensor_value_info(variable.state, dtype, tensor.shape))
        after.append(helper.make_tensor_value_info(name, dtype, tensor.shape))
    return before, after


def _stored(tensor: Tensor) -> bool:
    """Whether a state is kept as the tensor stores it: zeros are zeros."""
    return tensor.quantization is None or not tensor.quantization.zero_point.any()


def _name(op: Operator) -> str:
    container, name = (text or b"" for text in (op.options.Container(), op.options.SharedName()))
    return b"/".join(filter(None, (container, name))).decode(errors="replace") or "variable"


def _resource(w: Writer, op: Operator) -> str:
    resource = op.inputs[0]
    if resource is None or resource.number not in w.variables.handles:
        raise ValueError("its variable is not known")
    return w.variables.handles[resource.number]


def _unique(w: Writer, name: str) -> str:
    """Return a name for a state that no tensor has."""
    taken = {tensor.name for op in w.network.operators for tensor in (*op.inputs, *op.outputs) if tensor is not None}
    taken |= {variable.state for variable in w.variables.known.values()}
    called = name = name.replace("=", "_").replace("\n", "_")
    count = 0
    while {called, f"{called}.next"} & taken:
        count += 1
        called = f"{name}_{count}"
    return called
