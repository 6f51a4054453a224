"""What each operator of a TensorFlow Lite file is in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from nnfuze_tvm.frontend.tflite import layers, recurrent, variables
from nnfuze_tvm.frontend.tflite.file import Operator
from nnfuze_tvm.frontend.tflite.writer import Writer

Converter = Callable[[Writer, Operator], None]


def _chain(*kinds: str, **attributes: Any) -> Converter:
    """Operators one after the other on one input, the attributes for the first."""

    def convert(w: Writer, op: Operator) -> None:
        value = w.read(0)
        for n, kind in enumerate(kinds):
            value = w.add(kind, [value], **(attributes if n == 0 else {}))
        w.write(value)

    return convert


def _clip(w: Writer, op: Operator) -> None:
    low, high = {"RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0), "RELU_0_TO_1": (0.0, 1.0)}[op.kind]
    w.write(w.add("Clip", [w.read(0), w.constant(low, "float32"), w.constant(high, "float32")]))


def _square(w: Writer, op: Operator) -> None:
    value = w.read(0)
    w.write(w.add("Mul", [value, value]))


def _arithmetic(kind: str, *further: str) -> Converter:
    """Two inputs, perhaps an activation behind."""

    def convert(w: Writer, op: Operator) -> None:
        value = w.add(kind, [w.read(0), w.read(1)])
        for one in further:
            value = w.add(one, [value])
        fused = op.kind in ("ADD", "SUB", "MUL", "DIV")
        w.write(w.activated(value, op.options.FusedActivationFunction()) if fused else value)

    return convert


def _squared_difference(w: Writer, op: Operator) -> None:
    value = w.add("Sub", [w.read(0), w.read(1)])
    w.write(w.add("Mul", [value, value]))


def _floor_div(w: Writer, op: Operator) -> None:
    if not op.outputs[0].dtype.startswith("float"):
        raise ValueError("integers can't be divided with rounding down here")
    w.write(w.add("Floor", [w.add("Div", [w.read(0), w.read(1)])]))


def _compare(kind: str, inverted: bool = False) -> Converter:
    def convert(w: Writer, op: Operator) -> None:
        value = w.add(kind, [w.read(0), w.read(1)])
        w.write(w.add("Not", [value]) if inverted else value)

    return convert


def _logical(kind: str) -> Converter:
    def convert(w: Writer, op: Operator) -> None:
        w.write(w.add(kind, [w.raw(n) for n in range(len(op.inputs))]))

    return convert


def _reduce(kind: str) -> Converter:
    def convert(w: Writer, op: Operator) -> None:
        axes = [int(axis) for axis in op.constant(1).ravel()]
        keep = int(op.options.KeepDims())
        w.write(w.add(kind, [w.read(0), w.constant(axes, "int64")], keepdims=keep))

    return convert


def _softmax(w: Writer, op: Operator) -> None:
    value, beta = w.read(0), op.options.Beta()
    if beta != 1:
        value = w.add("Mul", [value, w.constant(beta, "float32")])
    w.write(w.add("Softmax", [value], axis=-1))


def _leaky_relu(w: Writer, op: Operator) -> None:
    w.write(w.add("LeakyRelu", [w.read(0)], alpha=op.options.Alpha()))


def _prelu(w: Writer, op: Operator) -> None:
    w.write(w.add("PRelu", [w.read(0), w.read(1)]))


def _gelu(w: Writer, op: Operator) -> None:
    w.write(w.add("Gelu", [w.read(0)], approximate="tanh" if op.options.Approximate() else "none"))


def _cast(w: Writer, op: Operator) -> None:
    w.write(_as_type(w, w.raw(0), op.outputs[0].dtype), stored=True)


def _as_type(w: Writer, value: str, dtype: str) -> str:
    return w.add("Cast", [value], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _dequantize(w: Writer, op: Operator) -> None:
    # Of float16 it is a cast.
    value = _as_type(w, w.raw(0), "float32") if w.given(0).dtype == "float16" else w.read(0)
    w.write(value)


def _quantize(w: Writer, op: Operator) -> None:
    w.write(w.read(0))


def _arg(kind: str) -> Converter:
    def convert(w: Writer, op: Operator) -> None:
        axis = int(op.constant(1).ravel()[0])
        value = w.add(kind, [w.read(0)], axis=axis, keepdims=0)
        w.write(value if op.outputs[0].dtype == "int64" else _as_type(w, value, op.outputs[0].dtype))

    return convert


def _matmul(w: Writer, op: Operator) -> None:
    options, values = op.options, []
    for n, turned in enumerate((options.AdjX(), options.AdjY())):
        rank = len(w.given(n).shape)
        values.append(w.read(n, (*range(rank - 2), rank - 1, rank - 2) if turned else None))
    w.write(w.add("MatMul", values))


def _moves(w: Writer, op: Operator, index: int = 0) -> bool:
    """Whether integers can be moved as they are."""
    x, y = w.given(index), op.outputs[0]
    if x.quantization is None:
        return True
    return x.quantization.alike(y.quantization) and x.dtype == y.dtype


def _source(w: Writer, op: Operator, index: int = 0) -> str:
    return w.raw(index) if _moves(w, op, index) else w.read(index)


def _moving(make: Callable[[Writer, Operator, str], str]) -> Converter:
    """Values of the first input at other places: integers stay what they are."""

    def convert(w: Writer, op: Operator) -> None:
        w.write(make(w, op, _source(w, op)), stored=_moves(w, op))

    return convert


@_moving
def _reshape(w: Writer, op: Operator, value: str) -> str:
    return w.add("Reshape", [value, w.constant(op.outputs[0].shape, "int64")], allowzero=1)


@_moving
def _transpose(w: Writer, op: Operator, value: str) -> str:
    return w.add("Transpose", [value], perm=[int(axis) for axis in op.constant(1)])


@_moving
def _slice(w: Writer, op: Operator, value: str) -> str:
    starts, sizes = op.constant(1).astype("int64"), op.constant(2).astype("int64")
    ends = np.where(sizes < 0, np.array(w.given(0).shape), starts + sizes)
    return w.add("Slice", [value, w.constant(starts), w.constant(ends), w.constant(np.arange(len(starts)), "int64")])


@_moving
def _strided_slice(w: Writer, op: Operator, value: str) -> str:
    options, shape = op.options, w.given(0).shape
    if options.EllipsisMask() or options.NewAxisMask():
        raise ValueError("an ellipsis or a new axis in its bounds is not supported")
    begins, ends, strides = (op.constant(n).astype("int64").tolist() for n in (1, 2, 3))
    bounds, dropped = [], []
    for axis, (begin, end, stride) in enumerate(zip(begins, ends, strides, strict=True)):
        bit = 1 << axis
        if options.ShrinkAxisMask() & bit:
            begin = begin + shape[axis] if begin < 0 else begin
            bounds.append((begin, begin + 1, 1))
            dropped.append(axis)
            continue
        most = np.iinfo("int64").max
        begin = (0 if stride > 0 else most) if options.BeginMask() & bit else begin
        end = (most if stride > 0 else -most) if options.EndMask() & bit else end
        bounds.append((begin, end, stride))
    starts, stops, steps = (w.constant(list(column), "int64") for column in zip(*bounds, strict=True))
    axes = w.constant(list(range(len(bounds))), "int64")
    value = w.add("Slice", [value, starts, stops, axes, steps])
    return w.add("Squeeze", [value, w.constant(dropped, "int64")]) if dropped else value


@_moving
def _gather(w: Writer, op: Operator, value: str) -> str:
    if op.options.BatchDims():
        raise ValueError("batch dimensions are not supported")
    return w.add("Gather", [value, w.raw(1)], axis=op.options.Axis())


@_moving
def _gather_nd(w: Writer, op: Operator, value: str) -> str:
    return w.add("GatherND", [value, _as_type(w, w.raw(1), "int64")])


@_moving
def _tile(w: Writer, op: Operator, value: str) -> str:
    return w.add("Tile", [value, w.constant(op.constant(1), "int64")])


@_moving
def _broadcast(w: Writer, op: Operator, value: str) -> str:
    return w.add("Expand", [value, w.constant(op.outputs[0].shape, "int64")])


def _split(w: Writer, op: Operator) -> None:
    """SPLIT (axis, data) and SPLIT_V (data, sizes, axis)."""
    data, axis = (1, op.constant(0)) if op.kind == "SPLIT" else (0, op.constant(2))
    where = int(axis.ravel()[0])
    sizes = [tensor.shape[where] for tensor in op.outputs]
    alike = _moves(w, op, data)
    inputs = [_source(w, op, data), w.constant(sizes, "int64")]
    parts = w.add("Split", inputs, len(sizes), axis=where)
    for n, part in enumerate([parts] if len(sizes) == 1 else parts):
        w.write(part, n, stored=alike)


def _unpack(w: Writer, op: Operator) -> None:
    axis, count = op.options.Axis(), len(op.outputs)
    parts = w.add("Split", [_source(w, op), w.constant([1] * count, "int64")], count, axis=axis)
    for n, part in enumerate([parts] if count == 1 else parts):
        w.write(w.add("Squeeze", [part, w.constant([axis], "int64")]), n, stored=_moves(w, op))


def _joined(w: Writer, op: Operator) -> tuple[list[str], bool]:
    """Return all inputs, as they are stored if all are quantized as the output is."""
    alike = all(_moves(w, op, n) for n in range(len(op.inputs)))
    return [w.raw(n) if alike else w.read(n) for n in range(len(op.inputs))], alike


def _concatenation(w: Writer, op: Operator) -> None:
    values, alike = _joined(w, op)
    w.write(w.add("Concat", values, axis=op.options.Axis()), stored=alike)


def _pack(w: Writer, op: Operator) -> None:
    values, alike = _joined(w, op)
    axis = op.options.Axis()
    raised = [w.add("Unsqueeze", [value, w.constant([axis], "int64")]) for value in values]
    w.write(w.add("Concat", raised, axis=axis), stored=alike)


def _select(w: Writer, op: Operator) -> None:
    w.write(w.add("Where", [w.raw(0), w.read(1), w.read(2)]))


def _topk(w: Writer, op: Operator) -> None:
    count = w.constant([int(op.constant(1).ravel()[0])], "int64")
    values, places = w.add("TopK", [w.read(0), count], 2, axis=-1)
    w.write(values, 0)
    w.write(_as_type(w, places, op.outputs[1].dtype), 1, stored=True)


def _cumsum(w: Writer, op: Operator) -> None:
    axis, options = int(op.constant(1).ravel()[0]), op.options
    attributes = {"exclusive": int(options.Exclusive()), "reverse": int(options.Reverse())}
    w.write(w.add("CumSum", [w.read(0), w.constant(axis, "int64")], **attributes))


def _shape(w: Writer, op: Operator) -> None:
    w.write(w.constant(w.given(0).shape, op.outputs[0].dtype), stored=True)


def _fill(w: Writer, op: Operator) -> None:
    w.write(w.add("Expand", [w.raw(1), w.constant(op.constant(0), "int64")]), stored=True)


_SAME: Sequence[tuple[str, str]] = (
    ("RELU", "Relu"), ("LOGISTIC", "Sigmoid"), ("TANH", "Tanh"), ("EXP", "Exp"), ("LOG", "Log"), ("SQRT", "Sqrt"),
    ("ABS", "Abs"), ("NEG", "Neg"), ("FLOOR", "Floor"), ("CEIL", "Ceil"), ("ROUND", "Round"), ("SIN", "Sin"),
    ("COS", "Cos"), ("ELU", "Elu"), ("HARD_SWISH", "HardSwish"), ("SIGN", "Sign"),
)  # fmt: skip

CONVERTERS: Mapping[str, Converter] = {
    **{kind: _chain(name) for kind, name in _SAME},
    "RELU6": _clip,
    "RELU_N1_TO_1": _clip,
    "RELU_0_TO_1": _clip,
    "RSQRT": _chain("Sqrt", "Reciprocal"),
    "SQUARE": _square,
    "LOG_SOFTMAX": _chain("LogSoftmax", axis=-1),
    "L2_NORMALIZATION": _chain("LpNormalization", axis=-1, p=2),
    "SOFTMAX": _softmax,
    "LEAKY_RELU": _leaky_relu,
    "PRELU": _prelu,
    "GELU": _gelu,
    "ADD": _arithmetic("Add"),
    "SUB": _arithmetic("Sub"),
    "MUL": _arithmetic("Mul"),
    "DIV": _arithmetic("Div"),
    "MAXIMUM": _arithmetic("Max"),
    "MINIMUM": _arithmetic("Min"),
    "POW": _arithmetic("Pow"),
    "SQUARED_DIFFERENCE": _squared_difference,
    "FLOOR_DIV": _floor_div,
    "ADD_N": lambda w, op: w.write(w.add("Sum", [w.read(n) for n in range(len(op.inputs))])),
    "EQUAL": _compare("Equal"),
    "NOT_EQUAL": _compare("Equal", inverted=True),
    "LESS": _compare("Less"),
    "LESS_EQUAL": _compare("LessOrEqual"),
    "GREATER": _compare("Greater"),
    "GREATER_EQUAL": _compare("GreaterOrEqual"),
    "LOGICAL_AND": _logical("And"),
    "LOGICAL_OR": _logical("Or"),
    "LOGICAL_NOT": _logical("Not"),
    "MEAN": _reduce("ReduceMean"),
    "SUM": _reduce("ReduceSum"),
    "REDUCE_MAX": _reduce("ReduceMax"),
    "REDUCE_MIN": _reduce("ReduceMin"),
    "REDUCE_PROD": _reduce("ReduceProd"),
    "CAST": _cast,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "ARG_MAX": _arg("ArgMax"),
    "ARG_MIN": _arg("ArgMin"),
    "BATCH_MATMUL": _matmul,
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "TRANSPOSE": _transpose,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "GATHER": _gather,
    "GATHER_ND": _gather_nd,
    "TILE": _tile,
    "BROADCAST_TO": _broadcast,
    "SPLIT": _split,
    "SPLIT_V": _split,
    "UNPACK": _unpack,
    "PACK": _pack,
    "CONCATENATION": _concatenation,
    "SELECT": _select,
    "SELECT_V2": _select,
    "TOPK_V2": _topk,
    "CUMSUM": _cumsum,
    "SHAPE": _shape,
    "FILL": _fill,
    **recurrent.CONVERTERS,
    "VAR_HANDLE": variables.handle,
    "READ_VARIABLE": variables.read,
    "ASSIGN_VARIABLE": variables.assign,
    "CALL_ONCE": variables.call_once,
    "PAD": layers.pad,
    "PADV2": layers.pad,
    "MIRROR_PAD": layers.mirror_pad,
    "CONV_2D": layers.convolution(),
    "DEPTHWISE_CONV_2D": layers.convolution(depthwise=True),
    "TRANSPOSE_CONV": layers.transposed,
    "FULLY_CONNECTED": layers.dense,
    "AVERAGE_POOL_2D": layers.pool("AveragePool"),
    "MAX_POOL_2D": layers.pool("MaxPool"),
    "RESIZE_BILINEAR": layers.resize("linear"),
    "RESIZE_NEAREST_NEIGHBOR": layers.resize("nearest"),
    "SPACE_TO_DEPTH": layers.space_to_depth,
    "DEPTH_TO_SPACE": layers.depth_to_space,
    "SPACE_TO_BATCH_ND": layers.space_to_batch,
    "BATCH_TO_SPACE_ND": layers.batch_to_space,
}
