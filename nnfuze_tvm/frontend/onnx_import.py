"""One ONNX graph as one Relax function: TVM's importer, with layer names and folded constants."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax.frontend.onnx import onnx_frontend

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend.onnx_file import Shape, Source, first_line
from nnfuze_tvm.frontend.onnx_menders import MENDERS
from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.evaluate import call_of_constants

# Control flow and outputs of unknown shape have no place in a straight-line function with static shapes.
_REFUSED = frozenset(
    (
        "If Optional OptionalHasElement OptionalGetElement SequenceConstruct SequenceEmpty SequenceErase "
        "SequenceInsert SequenceLength ConcatFromSequence SplitToSequence SequenceAt Unique NonZero Compress"
    ).split()
)
# What TVM's importer means by these is Microsoft's operator, not that of ONNX.
_MICROSOFT = frozenset(
    "Attention BiasGelu FastGelu SkipLayerNormalization EmbedLayerNormalization MatMulInteger16".split()
)
_SHARED_WITH_MICROSOFT = frozenset({"Gelu", "QuantizeLinear", "DequantizeLinear"})
# Constant inputs do not make these constant, or (dequantize) an int8 weight shall stay one.
_NEVER_FOLDED = frozenset(
    (
        "DequantizeLinear Dropout RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli"
    ).split()
)


def is_supported(node: onnx.NodeProto) -> bool:
    """Return whether there is a converter for the operator of ``node``."""
    operator = node.op_type
    if node.domain == "com.microsoft":
        return operator in _MICROSOFT | _SHARED_WITH_MICROSOFT
    if node.domain not in ("", "ai.onnx") or operator in _REFUSED | _MICROSOFT:
        return False
    return operator == "Constant" or operator in MENDERS or operator in onnx_frontend._get_convert_map()


def convert(source: Source, shapes: dict[str, Shape]) -> tvm.IRModule:
    """Convert one network.

    Parameters
    ----------
    source
        The network; its nodes have unique names and supported operators.
    shapes
        Static shape of every input.

    Returns
    -------
    tvm.IRModule
        ``main`` in the form that :func:`nnfuze_tvm.load` promises, and PrimFuncs that it calls, if any.

    Raises
    ------
    ModelError
        If a node can't be converted, or its shape depends on data.
    """
    importer = _Importer(source, shapes)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            imported = importer.from_onnx(source.model.graph, source.opset)
        except ModelError:
            importer.close()
            raise
        except Exception as error:
            raise ModelError(f"{source.label}: can't be imported: {first_line(error)}") from error
    imported["main"] = _canonicalize(imported["main"], importer.layers, source)
    return imported


class _Importer(onnx_frontend.ONNXGraphImporter):
    """TVM's importer; remembers which layer a node became, and computes what is constant."""

    def __init__(self, source: Source, shapes: dict[str, Shape]) -> None:
        super().__init__({name: list(shape) for name, shape in shapes.items()}, {}, sanitize=False)
        self._source = source
        self._by_name = {node.name: node for node in source.model.graph.node}
        self._seen: set[Value] = set()
        self.layers: dict[Value, str] = {}

    def close(self) -> None:
        """End the open block of an import that failed: TVM warns on stderr when it finds one left."""
        with contextlib.suppress(Exception):
            self.bb._end_block()

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Nothing: all files were checked before the first was converted."""

    def _convert_operator(self, op_name: str, inputs: list[Value], attrs: dict, opset: int) -> Value:
        node = self._by_name[attrs["tvm_custom"]["name"]]
        try:
            result = self._folded(node, inputs, opset)
            if result is None:
                result = self._converted(op_name, inputs, attrs, opset)
        except Exception as error:
            raise ModelError(f"{self._source.label}: node {node.name!r} ({op_name}): {first_line(error)}") from error
        for value in result.fields if isinstance(result, relax.Tuple) else [result]:
            self._note_layers(value, node.name)
        return result

    def _converted(self, operator: str, inputs: list[Value], attrs: dict, opset: int) -> Value:
        if operator in MENDERS:
            result = MENDERS[operator](self.bb, inputs, attrs, opset)
        else:
            result = NotImplemented
        if result is NotImplemented:
            result = super()._convert_operator(operator, inputs, attrs, opset)
        if isinstance(result, relax.Tuple):
            return relax.Tuple([self._bound(field) for field in result.fields])
        return self._bound(result)

    def _bound(self, value: Value) -> Value:
        return self.bb.emit(value) if isinstance(value, Call | relax.TupleGetItem) else value

    def _folded(self, node: onnx.NodeProto, inputs: list[Value], opset: int) -> Value | None:
        """Return the node's value if it follows from constants and static shapes."""
        if node.op_type == "Shape" and isinstance(inputs[0], relax.Expr):
            shape = np.array(ir.static_shape(inputs[0]), dtype=np.int64)
            span = {attribute.name: attribute.i for attribute in node.attribute}
            return relax.const(shape[span.get("start", 0) : span.get("end")])
        if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER_FOLDED:
            return None
        if any(value is not None and not isinstance(value, GenericConst) for value in inputs):
            return None
        arrays = [None if value is None else value.value.numpy() for value in inputs]
        try:
            results = _evaluate(node, arrays, opset)
        except Exception:
            # The reference evaluator does not know everything; the importer may.
            return None
        if not all(isinstance(array, np.ndarray | np.generic) for array in results):
            return None
        constants = [relax.const(np.asarray(array)) for array in results]
        return constants[0] if len(constants) == 1 else relax.Tuple(constants)

    def _note_layers(self, value: Value, name: str) -> None:
        """Give the node's name to the anchor calls that its conversion has bound."""
        pending, found = [value], []
        while pending:
            var = pending.pop()
            if not isinstance(var, tvm.ir.Var) or var in self._seen:
                continue
            self._seen.add(var)
            bound = self.bb.lookup_binding(var)
            if bound is None:
                continue
            if ops.is_layer(bound):
                found.append(var)
            pending.extend(dataflow.operands(bound))
        for var in reversed(found):
            self.layers[var] = ir.clean_name(f"{self._source.task}/{name}")


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


def _canonicalize(func: relax.Function, layers: dict[Value, str], source: Source) -> relax.Function:
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
    result = emitter.finish(func.params, outputs)
    for binding in dataflow.bindings(result):
        if isinstance(binding.var.ty, relax.TensorType):
            try:
                ir.static_shape(binding.var)
            except ValueError:
                operator = op_name(binding.value)
                raise ModelError(
                    f"{source.label}: the shape of a {operator} depends on data, which is not supported"
                ) from None
    return result
