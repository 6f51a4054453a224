"""One ONNX graph as one Relax function, node by node, with layer names and folded constants."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax.frontend.onnx import onnx_frontend

from nnfuze_tvm.errors import ModelError, first_line
from nnfuze_tvm.frontend import onnx_door, onnx_file
from nnfuze_tvm.frontend.onnx_file import TYPES, Shape, Source, type_name
from nnfuze_tvm.frontend.onnx_tensors import values_of
from nnfuze_tvm.frontend.operators import CONVERTERS, sequences
from nnfuze_tvm.frontend.operators.node import FailedInside, Impossible, Node, Operands, Tensors, known, tensors_of
from nnfuze_tvm.frontend.validity import contradiction, objection
from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.evaluate import call_of_constants

# What TVM's importer means by these is Microsoft's operator, not that of ONNX.
_MICROSOFT = frozenset("BiasGelu FastGelu SkipLayerNormalization EmbedLayerNormalization MatMulInteger16".split())
# What it does with Microsoft's operators of these names is right.
_RIGHT = frozenset({"MatMulInteger16"})
# Iterations of all loops together, without the first ones: what would take many minutes to compile is refused.
MOST_UNROLLED = 4000
# Constant inputs do not make these constant, or an int8 weight shall stay one (dequantize), or ONNX's reference ignores
# attributes (recurrent layers).
_NEVER_FOLDED = frozenset(
    (
        "DequantizeLinear LSTM GRU RNN Dropout RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
        "Multinomial Bernoulli"
    ).split()
)
# Where the reference evaluator is wrong: it takes infinity from itself, and reads old versions as new ones.
_NOT_BY_REFERENCE = frozenset({"ReduceLogSumExp"})
_NOT_BY_REFERENCE_BEFORE_13 = frozenset({"Hardmax", "LogSoftmax", "Softmax"})


def is_supported(node: onnx.NodeProto) -> bool:
    """Return whether there is a converter for the operator of ``node``."""
    operator = _operator(node)
    if operator in CONVERTERS or operator == "Constant":
        return True
    if node.domain == "com.microsoft":
        return node.op_type in _RIGHT
    if node.domain not in ("", "ai.onnx") or operator in _MICROSOFT:
        return False
    return operator in onnx_frontend._get_convert_map()


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def convert(source: Source, shapes: dict[str, Shape]) -> tvm.IRModule:
    """Convert one network.

    Parameters
    ----------
    source
        The network; its nodes have unique names.
    shapes
        Static shape of every input.

    Returns
    -------
    tvm.IRModule
        ``main`` in the form that :func:`nnfuze_tvm.load` promises, and PrimFuncs that it calls, if any.

    Raises
    ------
    ModelError
        If operators are not supported, nodes can't be converted, or their shapes depend on data: with a line that
        names all of them. What is in branches that are not taken does not matter.
    """
    importer = _Importer(source)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        imported = importer.module(shapes)
    problems = [*importer.unsupported(), *importer.errors]
    if problems:
        raise ModelError(f"{source.label}: {'; '.join(problems)}")
    imported["main"] = _canonicalize(imported["main"], importer.layers)
    return imported


class _Importer:
    """Converts nodes one after another; remembers which layer a node became, and what could not be converted."""

    def __init__(self, source: Source) -> None:
        self.layers: dict[Value, str] = {}
        self.errors: list[str] = []
        self._source = source
        self._builder = relax.BlockBuilder()
        # The innermost subgraph's names first; None is what depends on a node that failed.
        self._values: ChainMap[str, Value | None] = ChainMap()
        self._seen: set[Value] = set()
        # Weights of subgraphs, which may be imported many times; the graph is kept so that its id stays its own.
        self._weights: dict[int, tuple[onnx.GraphProto, dict[str, Value | None]]] = {}
        self._unrolled = 0
        # Those of the errors that are no fault of ours.
        self._impossible: set[str] = set()
        self._unsupported: dict[str, dict[str, None]] = {}

    def unsupported(self) -> list[str]:
        """Return a text that names the nodes whose operators have no converter, if there are any."""
        listed = ", ".join(f"{operator} ({', '.join(names)})" for operator, names in self._unsupported.items())
        return [f"unsupported operators: {listed}"] if listed else []

    def module(self, shapes: dict[str, Shape]) -> tvm.IRModule:
        """Return the network as a module; what is in it is of no use if there are errors."""
        graph = self._source.model.graph
        params = []
        for value in self._source.inputs:
            dtype = type_name(value.type.tensor_type.elem_type)
            params.append(relax.Var(value.name, relax.TensorType(shapes[value.name], dtype)))
            self._values[value.name] = _settled(params[-1])
        with self._builder.function("main", params):
            with self._builder.dataflow():
                found = [field for field in self._results(graph) if field is not None]
                self._check_outputs(graph, found)
                result = self._builder.emit_output(relax.Tuple(found))
            self._builder.emit_func_output(result)
        return self._builder.get()

    def _check_outputs(self, graph: onnx.GraphProto, found: list[Value]) -> None:
        if len(found) < len(graph.output):
            return
        for output, value in zip(graph.output, found, strict=True):
            if isinstance(value, Tensors):
                self.errors.append(f"output {output.name!r} is a sequence, which is not supported")
                found.clear()

    def _results(self, graph: onnx.GraphProto) -> list[Value | None]:
        known_before = self._weights.get(id(graph))
        if known_before is None:
            weights = self._initializers(graph)
            self._weights[id(graph)] = (graph, weights)
        else:
            weights = known_before[1]
        self._values.update(weights)
        for node in graph.node:
            unread = not any(node.output)
            if unread or (node.op_type == "Constant" and node.output[0] in weights):
                continue
            self._node(node)
            if node.op_type == "Constant" and self._values[node.output[0]] is not None:
                weights[node.output[0]] = self._values[node.output[0]]
        return [self._values[value.name] for value in graph.output]

    def _initializers(self, graph: onnx.GraphProto) -> dict[str, Value | None]:
        weights: dict[str, Value | None] = {}
        for tensor in graph.initializer:
            try:
                type_name(tensor.data_type, f"constant {tensor.name!r}: ")
                weights[tensor.name] = constant(values_of(tensor))
            except (ModelError, ValueError) as error:
                weights[tensor.name] = None
                said = str(error) if isinstance(error, ModelError) else f"constant {tensor.name!r}: {error}"
                self.errors.append(said)
        return weights

    def _body(self, graph: onnx.GraphProto, operands: Sequence[Value]) -> list[Value]:
        """Import a subgraph in place; see `Node.body`."""
        names = [value.name for value in graph.input]
        if len(names) != len(operands):
            raise ValueError(f"its subgraph has {len(names)} inputs, {len(operands)} are given")
        if id(graph) in self._weights:
            self._unrolled += len(graph.node) + 1
        if self._unrolled > MOST_UNROLLED:
            raise ValueError(f"loops unroll to more than {MOST_UNROLLED} nodes, which is not supported")
        before = len(self.errors)
        self._values = self._values.new_child(dict(zip(names, operands, strict=True)))
        try:
            results = self._results(graph)
        finally:
            self._values = self._values.parents
        if len(self.errors) > before or any(value is None for value in results):
            raise FailedInside
        return results

    def _branch(self, graph: onnx.GraphProto) -> list[Value]:
        """Import a subgraph that may never be computed; see `Node.branch`."""
        before, unsupported = len(self.errors), {name: dict(nodes) for name, nodes in self._unsupported.items()}
        try:
            return self._body(graph, [])
        except FailedInside:
            errors = self.errors[before:]
            if not errors or not self._impossible.issuperset(errors):
                raise
            del self.errors[before:]
            self._unsupported = unsupported
            raise Impossible(errors[0]) from None

    def _node(self, proto: onnx.NodeProto) -> None:
        operands = onnx_frontend.onnx_input(self._values[name] if name else None for name in proto.input)
        # What depends on a node that failed isn't tried: one line per cause.
        lost = any(name and value is None for name, value in zip(proto.input, operands, strict=True))
        results: Sequence[Value | None] = [None] * len(proto.output)
        if not is_supported(proto):
            # A loop may come here again.
            self._unsupported.setdefault(_operator(proto), {})[proto.name] = None
        elif not lost:
            try:
                results = self._converted(proto, operands)
            except FailedInside:
                pass
            except Exception as error:
                why = contradiction(proto, operands, self._source.opset)
                reason = first_line(error) if _is_ours(error) or not why else why
                self.errors.append(f"node {proto.name!r} ({_operator(proto)}): {reason}")
                if isinstance(error, Impossible) or why:
                    self._impossible.add(self.errors[-1])
        for name, value in zip(proto.output, results, strict=False):
            for tensor in tensors_of([value]):
                self._note_layers(tensor, proto.name)
            if name:
                self._values[name] = value

    def _converted(self, proto: onnx.NodeProto, operands: Operands) -> list[Value]:
        opset = self._source.opset
        if why := objection(proto, operands, opset):
            raise ValueError(why)
        folded = self._folded(proto, operands, opset)
        if folded is not None:
            return folded
        node = Node(proto, onnx_file.attributes(proto), opset, self._builder, self._body, self._branch, self._values)
        operator = _operator(proto)
        if any(isinstance(value, Tensors) for value in operands):
            if operator == "Identity":
                return list(operands)
            if operator not in sequences.TAKING:
                raise ValueError("a sequence as an input is not supported")
        result = CONVERTERS[operator](node, operands) if operator in CONVERTERS else NotImplemented
        if result is NotImplemented:
            if why := contradiction(proto, operands, opset):
                raise ValueError(why)
            result = self._by_tvm(node, operands)
        results = list(map(self._bound, self._fields(result)))
        wanted = max((n for n, name in enumerate(proto.output, 1) if name), default=0)
        if len(results) < wanted:
            raise ValueError(f"its output {proto.output[wanted - 1]!r} is not supported")
        for value in tensors_of(results):
            try:
                shape = ir.static_shape(value)
            except ValueError:
                raise ValueError("its shape depends on data, which is not supported") from None
            if str(value.ty.dtype) not in TYPES:
                raise ValueError(f"a result of type {value.ty.dtype} is not supported")
            if reason := onnx_door.impossible_size(shape, np.dtype(str(value.ty.dtype)).itemsize):
                raise ValueError(f"a result {reason}")
        return list(map(_settled, results))

    def _by_tvm(self, node: Node, operands: Operands) -> Any:
        """Convert as TVM's importer does."""
        converter = onnx_frontend._get_convert_map()[node.proto.op_type].get_converter(node.opset)
        custom = {"name": node.proto.name, "num_outputs": node.outputs}
        result = converter(self._builder, operands, {**node.attributes, "tvm_custom": custom}, [self._values, {}])
        return self._builder.normalize(result) if isinstance(result, relax.Expr) else result

    def _fields(self, result: Any) -> list[Value]:
        if isinstance(result, Tensors):
            return [result]
        if isinstance(result, list | tuple):
            return list(result)
        if isinstance(result, relax.Tuple):
            return list(result.fields)
        value = self._bound(result)
        if isinstance(value.ty, relax.TupleType):
            return [relax.TupleGetItem(value, n) for n in range(len(value.ty.fields))]
        return [value]

    def _bound(self, value: Value) -> Value:
        if isinstance(value, Tensors):
            return Tensors(map(self._bound, value))
        if isinstance(value, Call):
            value = _fold_call(self._builder.normalize(value))
        return self._builder.emit(value) if isinstance(value, Call | relax.TupleGetItem) else value

    def _folded(self, node: onnx.NodeProto, inputs: Operands, opset: int) -> list[Value] | None:
        """Return the node's values if they follow from constants and static shapes."""
        if node.op_type == "Shape":
            shape = np.array(ir.static_shape(inputs[0]), dtype=np.int64)
            span = {attribute.name: attribute.i for attribute in node.attribute}
            return [constant(shape[span.get("start", 0) : span.get("end")])]
        if node.op_type == "Size":
            return [constant(np.array(np.prod(ir.static_shape(inputs[0])), dtype=np.int64))]
        if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER_FOLDED:
            return None
        # What has no elements it knows.
        if node.op_type in _NOT_BY_REFERENCE and 0 not in ir.static_shape(inputs[0]):
            return None
        if opset < 13 and node.op_type in _NOT_BY_REFERENCE_BEFORE_13:
            return None
        if any(attribute.HasField("g") for attribute in node.attribute):
            return None
        if any(value is not None and not isinstance(value, GenericConst) for value in inputs):
            return None
        arrays = [known(value) for value in inputs]
        try:
            results = _evaluate(node, arrays, opset)
        except Exception:
            # The reference evaluator does not know everything; the importer may.
            return None
        if not all(isinstance(array, np.ndarray | np.generic) for array in results):
            return None
        return list(map(constant, results))

    def _note_layers(self, value: Value, name: str) -> None:
        """Give the node's name to the anchor calls that its conversion has bound."""
        pending, found = [value], []
        while pending:
            var = pending.pop()
            if not isinstance(var, tvm.ir.Var) or var in self._seen:
                continue
            self._seen.add(var)
            bound = self._builder.lookup_binding(var)
            if bound is None:
                continue
            if ops.is_layer(bound):
                found.append(var)
            pending.extend(dataflow.operands(bound))
        for var in reversed(found):
            self.layers[var] = ir.clean_name(f"{self._source.task}/{name}")


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised an error; what TVM says of its own calls tells nobody what is in the file."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    return where is not None and str(where.tb_frame.f_globals.get("__name__")).startswith("nnfuze_tvm")


def _settled(value: Value) -> Value:
    """Return what has no elements as the constant that it is: no kernel has to know of it."""
    if isinstance(value, Tensors):
        return Tensors(map(_settled, value))
    shape = ir.static_shape(value)
    return constant(np.zeros(shape, str(value.ty.dtype))) if 0 in shape else value


def _evaluate(node: onnx.NodeProto, inputs: list[np.ndarray | None], opset: int) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and most networks do without

    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    # The same tensor may be read twice: name operands by position.
    names = [f"in{index}" if value is not None else "" for index, value in enumerate(inputs)]
    del alone.input[:]
    alone.input.extend(names)
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    outputs = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output]
    operands = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds]
    graph = onnx.helper.make_graph([alone], "constant", operands, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return list(ReferenceEvaluator(model).run(None, feeds))


def _fold_call(value: Value) -> Value:
    """Return the constant that a call of constants makes, or ``value``.

    TVM's FoldConstant compiles every PrimFunc with LLVM, which takes longer than the import.
    """
    operator = ops.of(value)
    # Weights that a file has in 8 bits stay so.
    result = None if operator is None or operator.family == "quantization" else call_of_constants(value)
    return value if result is None else constant(result)


def _canonicalize(func: relax.Function, layers: dict[Value, str]) -> relax.Function:
    """Rename the layers, fold constants, drop what is dead, and return a tuple."""
    emitter = dataflow.Emitter()
    for param in func.params:
        emitter.unique(param.name)
    new: dict[Value, Value] = {}
    for binding in dataflow.bindings(func):
        value = _fold_call(dataflow.substitute(binding.value, new))
        if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Tuple):
            value = value.tuple_value.fields[value.index]
        if isinstance(value, relax.Tuple) and not isinstance(binding.var.ty, relax.TensorType):
            new[binding.var] = value
            continue
        name = layers.get(binding.var, "lv")
        new[binding.var] = emitter.emit(value, name)
    outputs = [dataflow.substitute(field, new) for field in dataflow.output_fields(func)]
    return emitter.finish(func.params, outputs)
