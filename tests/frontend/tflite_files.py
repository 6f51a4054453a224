"""TensorFlow Lite files written operator by operator, and what Google's runtime makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9,
         "resource": 13}  # fmt: skip


class File:
    """A network on its way."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.graph.inputs, self.graph.outputs = [], []
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.model.subgraphs = [self.graph]

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "float32",
        *,
        scale: float | Sequence[float] | None = None,
        zero: int = 0,
        axis: int = 0,
        data: np.ndarray | None = None,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), TYPES[str(dtype)], 0
        if scale is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.atleast_1d(np.array(scale, "float32"))
            tensor.quantization.zeroPoint = np.full(len(tensor.quantization.scale), zero, "int64")
            tensor.quantization.quantizedDimension = axis
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), "uint8")
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def constant(self, data: Any, dtype: str = "int32", **quantization: Any) -> int:
        array = np.array(data, dtype)
        return self.tensor(f"constant{len(self.graph.tensors)}", array.shape, dtype, data=array, **quantization)

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32", **quantization: Any) -> int:
        number = self.tensor(name, shape, dtype, **quantization)
        self.graph.inputs.append(number)
        return number

    def variable(self, name: str, shape: Sequence[int], dtype: str = "float32", **quantization: Any) -> int:
        """Add a tensor that keeps its values from one inference to the next."""
        number = self.tensor(name, shape, dtype, **quantization)
        self.graph.tensors[number].isVariable = True
        return number

    def handle(self, name: str) -> int:
        """Add a resource."""
        number = self.tensor(f"{name}_handle", (), "resource")
        self.add("VAR_HANDLE", [], [number], sharedName=name)
        return number

    def begin(self, name: str, first: np.ndarray, **quantization: Any) -> None:
        """Give a resource its first value, in a graph of its own."""
        main, self.graph = self.graph, schema.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.inputs, self.graph.outputs = [], [], [], []
        self.model.subgraphs.append(self.graph)
        value = self.constant(first, str(first.dtype), **quantization)
        self.add("ASSIGN_VARIABLE", [self.handle(name), value], [])
        self.graph = main
        self.add("CALL_ONCE", [], [], initSubgraphIndex=len(self.model.subgraphs) - 1)

    def output(self, number: int) -> None:
        self.graph.outputs.append(number)

    def add(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: Any = None,
        version: int = 1,
        **fields: Any,
    ) -> None:
        """Add an operator; fields are those of its options, which are named if not after the operator."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        self.model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self.model.operatorCodes) - 1
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        name = options or "".join(part.capitalize() for part in kind.split("_")) + "Options"
        assert hasattr(schema, f"{name}T") or not fields, name
        if hasattr(schema, f"{name}T"):
            operator.builtinOptions = getattr(schema, f"{name}T")()
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            for field, value in fields.items():
                assert hasattr(operator.builtinOptions, field), field
                setattr(operator.builtinOptions, field, value)
        self.graph.operators.append(operator)

    def bytes(self) -> bytes:
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def answers(data: bytes, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what TensorFlow Lite's own kernels compute."""
    return next(steps(data, [inputs]))


def steps(data: bytes, calls: Sequence[Mapping[str, np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """Give what they compute in calls that follow each other."""
    interpreter = Interpreter(
        model_content=data,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    for inputs in calls:
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], inputs[detail["name"]])
        interpreter.invoke()
        yield [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
