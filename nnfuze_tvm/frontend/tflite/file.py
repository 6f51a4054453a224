"""What a TensorFlow Lite file holds: tensors, and operators in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tflite
from tflite.utils import BUILTIN_OPCODE2NAME

from nnfuze_tvm.errors import ModelError

# The schema's numbers of the types that tensors may have here, by NumPy's names.
_TYPES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64",
    12: "uint64", 15: "uint32", 16: "uint16",
}  # fmt: skip

# Operators whose options are not called after them.
_OPTIONS = {
    "BATCH_MATMUL": "BatchMatMulOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "L2_POOL_2D": "Pool2DOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "SUM": "ReducerOptions",
    "MEAN": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "REDUCE_ANY": "ReducerOptions",
    "REDUCE_ALL": "ReducerOptions",
    "L2_NORMALIZATION": "L2NormOptions",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTMOptions",
    "BIDIRECTIONAL_SEQUENCE_LSTM": "BidirectionalSequenceLSTMOptions",
    "UNIDIRECTIONAL_SEQUENCE_RNN": "SequenceRNNOptions",
    "BIDIRECTIONAL_SEQUENCE_RNN": "BidirectionalSequenceRNNOptions",
    "LSTM": "LSTMOptions",
    "RNN": "RNNOptions",
    "SVDF": "SVDFOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
}


@dataclass(frozen=True)
class Quantization:
    """Scales and zero points ``[1]`` or ``[channels]``, along an axis."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int

    def alike(self, other: Quantization | None) -> bool:
        """Whether equal integers mean equal values."""
        return (
            other is not None
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True)
class Tensor:
    """A tensor: its number, name, shape, NumPy dtype, how it is quantized, and its values if it is a constant."""

    number: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None
    data: np.ndarray | None = None

    @property
    def real(self) -> np.ndarray:
        """The numbers that a constant stands for, in float32."""
        assert self.data is not None
        known = self.quantization
        if known is None:
            return self.data.astype("float32")
        shape = [1] * self.data.ndim
        if len(known.scale) > 1:
            shape[known.axis] = -1
        whole = self.data.astype("int64") - known.zero_point.reshape(shape)
        return (whole * known.scale.reshape(shape).astype("float64")).astype("float32")


@dataclass(frozen=True)
class Operator:
    """An operator: its kind by the schema's name, its inputs (None: left out), its outputs, its options."""

    kind: str
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    _table: Any = field(repr=False)

    @cached_property
    def options(self) -> Any:
        """The options' accessors, as the schema has them."""
        camel = "".join(part.capitalize() for part in self.kind.split("_"))
        name = _OPTIONS.get(self.kind, f"{camel}Options")
        found = getattr(tflite, name)()
        found.Init(self._table.Bytes, self._table.Pos)
        return found

    def constant(self, index: int) -> np.ndarray:
        """Return the values of an input that must be known.

        Raises
        ------
        ValueError
            If it isn't a constant.
        """
        tensor = self.inputs[index] if index < len(self.inputs) else None
        if tensor is None or tensor.data is None:
            raise ValueError(f"its input {index} is no constant")
        return tensor.data


@dataclass(frozen=True)
class Network:
    """A file's network, and the operators of its other graphs by their numbers."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    operators: Sequence[Operator]
    graphs: Sequence[Sequence[Operator]]


def parse(data: bytes, label: str) -> Network:
    """Read a file.

    Raises
    ------
    ModelError
        If it is damaged, or holds what no network here may hold.
    """
    try:
        return _Reader(data, label).read()
    except ModelError:
        raise
    except Exception:  # whatever a flatbuffer's accessors do with bytes that are none
        raise damaged(label) from None


def damaged(label: str) -> ModelError:
    """Return what is said of a file in which numbers point anywhere."""
    return ModelError(f"{label}: truncated or damaged TensorFlow Lite file: export or copy it again")


class _Reader:
    def __init__(self, data: bytes, label: str) -> None:
        self.model = tflite.Model.GetRootAsModel(data, 0)
        self.label = label

    def read(self) -> Network:
        graph = self.model.Subgraphs(0)
        tensors = self._tensors(graph)
        places = _places(graph.InputsLength, graph.Inputs), _places(graph.OutputsLength, graph.Outputs)
        inputs, outputs = ([tensors[n] for n in numbers] for numbers in places)
        operators = self._operators(graph, tensors)
        if not operators or not outputs:
            raise ModelError(f"{self.label}: holds no network")
        others = [self.model.Subgraphs(n) for n in range(1, self.model.SubgraphsLength())]
        graphs = [operators, *(self._operators(other, self._tensors(other)) for other in others)]
        return Network(inputs, outputs, operators, graphs)

    def _tensors(self, graph: Any) -> list[Tensor]:
        names: dict[str, int] = {}
        return [self._tensor(n, graph.Tensors(n), names) for n in range(graph.TensorsLength())]

    def _operators(self, graph: Any, tensors: Sequence[Tensor]) -> list[Operator]:
        return [self._operator(graph.Operators(n), tensors) for n in range(graph.OperatorsLength())]

    def _operator(self, operator: Any, tensors: Sequence[Tensor]) -> Operator:
        code = self.model.OperatorCodes(operator.OpcodeIndex())
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        custom = code.CustomCode()
        kind = custom.decode(errors="replace") if custom else BUILTIN_OPCODE2NAME.get(number, f"operator {number}")
        given = _places(operator.InputsLength, operator.Inputs)
        made = _places(operator.OutputsLength, operator.Outputs)
        inputs = [None if n < 0 else tensors[n] for n in given]
        return Operator(kind, inputs, [tensors[n] for n in made], operator.BuiltinOptions())

    def _tensor(self, number: int, tensor: Any, names: dict[str, int]) -> Tensor:
        name = (tensor.Name() or b"").decode(errors="replace") or f"tensor{number}"
        while name in names:
            names[name] += 1
            name = f"{name}_{names[name]}"
        names[name] = 0
        if tensor.Type() not in _TYPES:
            # Whoever reads it says so.
            return Tensor(number, name, (), "")
        dtype = _TYPES[tensor.Type()]
        shape = tuple(int(tensor.Shape(n)) for n in range(tensor.ShapeLength()))
        if tensor.Sparsity() is not None:
            raise ModelError(f"{self.label}: tensor {name!r} is stored sparse, which is not supported")
        buffer = self.model.Buffers(tensor.Buffer())
        data = None
        if buffer.DataLength():
            data = np.frombuffer(buffer.DataAsNumpy().tobytes(), dtype).reshape(shape)
        elif 0 in shape and not tensor.IsVariable() and tensor.Buffer():
            data = np.zeros(shape, dtype)
        return Tensor(number, name, shape, dtype, _quantization(tensor), data)


def _places(count: Callable[[], int], item: Callable[[int], int]) -> list[int]:
    return [int(item(n)) for n in range(count())]


def _quantization(tensor: Any) -> Quantization | None:
    found = tensor.Quantization()
    if found is None or not found.ScaleLength() or tensor.Type() in (0, 1, 10):
        return None
    scale = np.array(found.ScaleAsNumpy(), "float32")
    zero = np.array(found.ZeroPointAsNumpy(), "int64") if found.ZeroPointLength() else np.zeros(len(scale), "int64")
    return Quantization(scale, np.broadcast_to(zero, scale.shape), int(found.QuantizedDimension()))
