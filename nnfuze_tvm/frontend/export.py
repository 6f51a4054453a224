"""The other way round: one Relax function as an ONNX network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, output_fields
from nnfuze_tvm.graph.onnx_form import Node, Unwritable, Writer, named

_IR_VERSION = 10
# Convolutions of ONNX add a vector per channel themselves.
_BIASED = ("Conv", "ConvTranspose")
# Protocol buffers hold less than 2 GiB.
_LARGEST = 2**31 - 2**24


def export(mod: tvm.IRModule) -> onnx.ModelProto:
    """Return ``main`` of a module, merged and perhaps compressed but not lowered, as an ONNX network.

    Inputs keep their names. An output is named after its task if that has no other, else ``<task>/<output>``; the next
    value of a state is ``<state>/next``. Nodes have the names of layers.

    Raises
    ------
    ModelError
        If ONNX has no form for something, or the network is too large for one file.
    """
    return _Exporter(mod).model()


class _Exporter:
    def __init__(self, mod: tvm.IRModule) -> None:
        self.mod, self.main = mod, mod["main"]
        self.write = Writer()
        self.known: dict[Value, Any] = {}
        for param in self.main.params:
            self.known[param] = self.write.unique(param.name)
        self.outputs = self._output_names()
        fields = output_fields(self.main)
        # A value that leaves has the output's name from the start.
        self.leaves = dict(zip(reversed(fields), reversed(self.outputs), strict=True))

    def _output_names(self) -> list[str]:
        owners, states, names = ir.task_outputs(self.mod), ir.states(self.mod), []
        # The states' next values come last.
        owners = owners[: len(owners) - len(states)]
        tasks = [owner.task for owner in owners]
        for owner in owners:
            alone = tasks.count(owner.task) == 1 and owner.task not in self.known.values()
            names.append(self.write.unique(owner.task if alone else f"{owner.task}/{owner.name}"))
        return names + [self.write.unique(f"{state}/next") for state in states]

    def model(self) -> onnx.ModelProto:
        """Return the network."""
        for binding in bindings(self.main):
            self._bind(binding.var, binding.value)
        for name, field in zip(self.outputs, output_fields(self.main), strict=True):
            if (found := self._operand(field)) != name:
                self.write.nodes.append(Node("Identity", (found,), (name,), {}, name))
        self.write.nodes = _with_biases(self.write, self.outputs)
        self.write.keep(self.outputs)
        size = sum(value.nbytes for value in self.write.constants.values())
        if size > _LARGEST:
            raise ModelError(f"the weights take {size / 2**30:.1f} GiB; an ONNX file holds less than 2: compress more")
        graph = helper.make_graph(
            [_proto(node) for node in self.write.nodes],
            "main",
            [_info(self.known[param], param) for param in self.main.params],
            [_info(*pair) for pair in zip(self.outputs, output_fields(self.main), strict=True)],
            [numpy_helper.from_array(value, name) for name, value in self.write.constants.items()],
        )
        opset = [helper.make_opsetid("", self.write.opset)]
        model = helper.make_model(graph, producer_name="nnfuze", opset_imports=opset, ir_version=_IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _bind(self, var: tvm.ir.Var, value: Value) -> None:
        if not isinstance(value, Call):
            self.known[var] = self._operand(value)
            return
        start = len(self.write.nodes)
        found = self._written(var, value)
        made = {name for node in self.write.nodes[start:] for name in node.outputs}
        results = {}
        if isinstance(found, str) and found in made:
            results[found] = self.leaves.get(var) or self.write.unique(var.name)
        self.write.rename(start, results, var.name)
        self.known[var] = results.get(found, found) if isinstance(found, str) else found

    def _written(self, var: tvm.ir.Var, call: Call) -> Any:
        name, operator = op_name(call), ops.of(call)
        label = f"{var.name}: {name or 'a function'}"
        if name.startswith("call_tir"):
            raise ModelError(f"{var.name}: kernel {call.args[0].name_hint} can't be exported: it is no ONNX operator")
        if operator is None or operator.export is None:
            raise ModelError(f"{label} can't be exported: it has no form in ONNX")
        form = named(operator.export) if isinstance(operator.export, str) else operator.export
        try:
            return form(self.write, call, *map(self._operand, call.args))
        except Unwritable as reason:
            raise ModelError(f"{label} can't be exported: it {reason}") from None

    def _operand(self, value: Value) -> Any:
        """Return the name of a tensor, names for a tuple, None for anything else."""
        if isinstance(value, tvm.ir.Var):
            return self.known[value]
        if isinstance(value, GenericConst):
            return self.write.constant(array(value))
        if isinstance(value, relax.Tuple):
            return [self._operand(field) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._operand(value.tuple_value)[value.index]
        return None


def _with_biases(write: Writer, results: Sequence[str]) -> list[Node]:
    """Return the nodes with what is added per channel to convolutions as their own third operand."""
    uses = Counter([*results, *(name for node in write.nodes for name in node.inputs)])
    makers = {name: n for n, node in enumerate(write.nodes) for name in node.outputs}
    nodes: list[Node | None] = list(write.nodes)
    for n, node in enumerate(write.nodes):
        if node.operator != "Add" or node.inputs[0] not in makers or node.inputs[1] not in write.constants:
            continue
        layer = nodes[makers[node.inputs[0]]]
        bias = write.constants[node.inputs[1]]
        if layer is None or layer.operator not in _BIASED or len(layer.inputs) > 2 or uses[node.inputs[0]] > 1:
            continue
        # [C, 1, …] or [1, C, 1, …]: what is added to all channels alike stays an addition.
        rank = len(layer.attributes["kernel_shape"]) + 2
        own = (bias.size, *[1] * (rank - 2))
        if bias.size == 1 or bias.shape not in (own, (1, *own)):
            continue
        inputs = (*layer.inputs, write.constant(bias.reshape(-1)))
        nodes[makers[node.inputs[0]]], nodes[n] = replace(layer, inputs=inputs, outputs=node.outputs), None
        makers[node.outputs[0]] = makers[node.inputs[0]]
    return [node for node in nodes if node is not None]


def _proto(node: Node) -> onnx.NodeProto:
    attributes: Mapping[str, Any] = node.attributes
    if node.operator == "Cast":
        attributes = {"to": _type(attributes["to"])}
    return helper.make_node(node.operator, node.inputs, node.outputs, name=node.name, **attributes)


def _type(dtype: str) -> int:
    return onnx.TensorProto.BFLOAT16 if dtype == "bfloat16" else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _type(str(value.ty.dtype)), ir.static_shape(value))
