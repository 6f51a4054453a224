"""Arithmetic, comparisons and functions of single values, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.batching import Axes, Join, JoinedCall, differ_only_along, same_call
from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels, Removal
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.values import Constant, Known, Quantized, Sum
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_maths as onnx
from nnfuze_tvm.graph.ops.operator import Affine, Example, Operator, Train, always, grows, proportional_to

Function = Callable[..., np.ndarray]

# A sum of two grows with each.
_EVENLY = grows(1, 1)

# NumPy has none.
erf: Function = np.vectorize(math.erf, otypes=["float64"])


def tensors(call: Call) -> list[Value]:
    """Return the operands that are tensors, constants included."""
    return [arg for arg in call.args if isinstance(arg.ty, relax.TensorType)]


def couple(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    """Tie the labels of operands that meet."""
    args = [arg for arg in tensors(call) if not isinstance(arg, GenericConst)]
    result = []
    for axis, size in enumerate(reversed(static_shape(var)), start=1):
        # Constants adapt; an operand of length one is broadcast and can't lose that one.
        own = [labels[-axis] for labels in map(coupling.tensor, args) if len(labels) >= axis]
        own = [labels for labels in own if len(labels) == size]
        for other in own[1:]:
            coupling.channels.tie(own[0], other)
        result.append(own[0] if own else np.full(size, FIXED))
    return result[::-1]


def cut(removal: Removal, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    """Cut the constants among the operands."""
    labels = removal.coupling.tensor(var)
    smaller = [removal.cut(arg, labels) if isinstance(arg, GenericConst) else arg for arg in args]
    return Call(call.op, smaller, call.attrs, call.ty_args)


def batch(calls: Sequence[Call], axes: Axes) -> JoinedCall | None:
    """Join operands, constants as well, where they differ."""
    shapes = [static_shape(call) for call in calls]
    rank = len(shapes[0])
    places = [i for i, arg in enumerate(calls[0].args) if isinstance(arg.ty, relax.TensorType)]
    known = {
        axis + rank - len(static_shape(calls[0].args[i]))
        for i, axis in enumerate(axes)
        if axis is not None and i in places
    }
    if len(known) != 1:
        return None
    (axis,) = known
    if axis < 0 or any(len(shape) != rank for shape in shapes) or not differ_only_along(shapes, axis):
        return None
    sizes = tuple(shape[axis] for shape in shapes)
    operands: list[Join | Value] = []
    for i in places:
        joined = _joined([call.args[i] for call in calls], axis, sizes, rank, axes[i] is not None)
        if joined is None:
            return None
        operands.append(joined)
    return JoinedCall(operands, same_call(calls[0]), axis, sizes, fuses=True)


def _joined(
    values: Sequence[Value], axis: int, sizes: tuple[int, ...], rank: int, is_joined: bool
) -> Join | Value | None:
    """Join one operand of calls whose results are joined along ``axis``."""
    shapes = [static_shape(value) for value in values]
    own_axis = axis - (rank - len(shapes[0]))
    broadcast = own_axis < 0 or all(shape[own_axis] == 1 for shape in shapes)
    if all(isinstance(value, GenericConst) for value in values):
        return _joined_constants(values, axis, sizes, rank, broadcast)
    if any(isinstance(value, GenericConst) for value in values) or len({len(s) for s in shapes}) != 1:
        return None
    if broadcast and not is_joined and all(value.same_as(values[0]) for value in values):
        return values[0]
    if own_axis < 0 or not differ_only_along(shapes, own_axis):
        return None
    if any(shape[own_axis] != size for shape, size in zip(shapes, sizes, strict=True)):
        return None
    return Join(tuple(values), own_axis)


def _joined_constants(
    values: Sequence[Value], axis: int, sizes: tuple[int, ...], rank: int, broadcast: bool
) -> Value | None:
    known = [array(value) for value in values]
    if broadcast and all(a.shape == known[0].shape and a.tobytes() == known[0].tobytes() for a in known):
        return values[0]
    parts = []
    for one, size in zip(known, sizes, strict=True):
        full = one.reshape((1,) * (rank - one.ndim) + one.shape)
        parts.append(np.repeat(full, size, axis) if full.shape[axis] == 1 else full)
    if not differ_only_along([part.shape for part in parts], axis):
        return None
    return relax.const(np.concatenate(parts, axis))


def transposed(call: Call, sources: list[Value], _: tuple[int, ...]) -> Value:
    """Return the call in whatever order its operands are."""
    return Call(call.op, [*sources, *call.args[len(sources) :]], call.attrs, call.ty_args, call.span)


def _add(context: Integers, call: Call, _: str) -> Known | None:
    left, right = context.value(call.args[0]), context.value(call.args[1])
    if isinstance(left, Constant):
        left, right = right, left
    if isinstance(right, Constant):
        if isinstance(left, Quantized):
            left = context.spread(left)
        return context.add_constant(left, right) if isinstance(left, Sum) else None
    if not isinstance(left, Quantized | Sum) or not isinstance(right, Quantized | Sum):
        return None
    if left.shape != right.shape:
        return None
    if isinstance(left, Quantized) and isinstance(right, Quantized):
        return context.add_codes(left, right)
    if isinstance(left, Quantized):
        left, right = right, left
    assert isinstance(left, Sum)
    if left.clamped or (isinstance(right, Sum) and right.clamped):
        return None
    if isinstance(right, Quantized):
        return context.add_residual(left, right)
    return context.add_sums(left, right)


def _multiply(context: Integers, call: Call, _: str) -> Known | None:
    left, right = context.value(call.args[0]), context.value(call.args[1])
    if isinstance(left, Constant):
        left, right = right, left
    if isinstance(right, Constant):
        return _times(context, call, left, right)
    if isinstance(left, Quantized) and isinstance(right, Quantized):
        return context.multiply(left, right)
    return None


def _times(context: Integers, call: Call, value: Any, constant: Constant) -> Known | None:
    """Multiply what integers stand for by a constant, which changes what they stand for."""
    factor = constant.values
    scalar = factor.size == 1 and factor.ndim <= len(static_shape(call.args[0])) == len(static_shape(call))
    if isinstance(value, Quantized) and scalar and factor.flat[0] > 0:
        return Quantized(value.codes, value.scale * float(factor.flat[0]), value.zero_point)
    if isinstance(value, Quantized):
        value = context.spread(value)
    return context.multiply_constant(value, constant) if isinstance(value, Sum) else None


def _divide(context: Integers, call: Call, name: str) -> Known | Value | None:
    """Divide what integers stand for by a constant: multiply by its reciprocal, which takes a fifth of the time."""
    left, right = context.value(call.args[0]), context.value(call.args[1])
    if not isinstance(right, Constant) or not np.all(right.values):
        return None
    inverse = 1 / right.values
    known = _times(context, call, left, Constant(inverse))
    inexact = isinstance(left, Sum | Quantized) or (isinstance(left, tvm.ir.Var) and left in context.inexact)
    if known is not None or not inexact:
        return known
    factor = relax.const(inverse.astype("float32"))
    result = context.emit(op.multiply(context.as_float(call.args[0]), factor), name)
    context.inexact.add(result)
    return result


def _bound(lower: bool) -> Callable[[Integers, Call, str], Known | None]:
    def integer(context: Integers, call: Call, _: str) -> Known | None:
        for source, limit in (call.args, reversed(list(call.args))):
            number = context.value(limit)
            shape = static_shape(source)
            if isinstance(number, Constant) and np.broadcast_shapes(number.values.shape, shape) == shape:
                edge = number.values.reshape((1,) * (len(shape) - number.values.ndim) + number.values.shape)
                return context.clamp(source, edge, np.inf) if lower else context.clamp(source, -np.inf, edge)
        return None

    return integer


def _affine_add(vector: np.ndarray, _: bool) -> tuple[None, np.ndarray]:
    return None, vector


def _affine_subtract(vector: np.ndarray, left: bool) -> tuple[np.ndarray | None, np.ndarray]:
    return (-np.ones_like(vector), vector) if left else (None, -vector)


def _affine_multiply(vector: np.ndarray, _: bool) -> tuple[np.ndarray, None]:
    return vector, None


def _affine_divide(vector: np.ndarray, left: bool) -> tuple[np.ndarray, None] | None:
    return None if left or not np.all(vector != 0) else (1 / vector, None)


def _quotient(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Divide; integers are cut off towards zero, as in C."""
    if left.dtype.kind == "f":
        return left / right
    below = left // right
    return below + ((below < 0) & (below * right != left)).astype(left.dtype)


def _product_degrees(call: Call) -> tuple[float, float]:
    """Return those of a product: a square, where it is a value's with itself."""
    return (2.0, 2.0) if call.args[0].same_as(call.args[1]) else (1.0, 1.0)


def _power_degrees(call: Call) -> tuple[float, None]:
    """Return those of a power; an exponent that is not one constant number may be any."""
    exponent = array(call.args[1]) if isinstance(call.args[1], GenericConst) else np.zeros(1)
    return float(exponent.min()), None


def operator(function: Function, arity: int, call: Any = None, **facts: Any) -> Operator:
    """Return what all operators of this family have in common, with ``facts``."""

    def evaluate(_: Call, *values: Any) -> np.ndarray:
        return function(*values)

    base: dict[str, Any] = {
        "effect": "maps",
        "evaluate": evaluate,
        "couple": couple,
        "cut": cut,
        "batch": batch,
        "operands": tensors,
        "transposed": transposed,
        "kernels": ("elementwise",),
    }
    if call is not None:
        low, high = facts.pop("range", (-2.0, 2.0))
        base["examples"] = (Example(((2, 8, 6, 6),) * arity, call, low=low, high=high),)
    return Operator(**{**base, **facts})


def _binary() -> dict[str, Operator]:
    def arithmetic(function: Function, call: Any, affine: Affine, **facts: Any) -> Operator:
        return operator(function, 2, call, **{"affine": affine, "exact": True, "folds": True, **facts})

    linear: dict[str, Any] = {"exact": True, "half": True, "proportional": proportional_to(0, 1)}

    found = {
        "add": arithmetic(np.add, op.add, _affine_add, degrees=_EVENLY, integer=_add, **linear),
        "subtract": arithmetic(np.subtract, op.subtract, _affine_subtract, degrees=_EVENLY, **linear),
        "multiply": arithmetic(
            np.multiply, op.multiply, _affine_multiply, degrees=_product_degrees, integer=_multiply, half=True
        ),
        "divide": arithmetic(
            _quotient, op.divide, _affine_divide, degrees=grows(1, -1), integer=_divide, range=(0.5, 2.0)
        ),
        "maximum": operator(np.maximum, 2, op.maximum, integer=_bound(True), bounds=True, **linear),
        "minimum": operator(np.minimum, 2, op.minimum, integer=_bound(False), bounds=True, **linear),
        "floor_divide": operator(np.floor_divide, 2, op.floor_divide, range=(0.5, 2.0)),
        "power": operator(np.power, 2, op.power, degrees=_power_degrees, range=(0.5, 2.0)),
        "mod": operator(np.fmod, 2, op.mod, range=(0.5, 2.0)),
        "floor_mod": operator(np.mod, 2, op.floor_mod, range=(0.5, 2.0)),
        "log_add_exp": operator(np.logaddexp, 2, op.log_add_exp),
        # An angle is that of a ratio.
        "atan2": operator(np.arctan2, 2, op.atan2, degrees=grows(0, 0)),
        "where": operator(
            np.where, 3, lambda c, x, y: op.where(_positive(c), x, y), degrees=grows(None, 1, 1), exact=True
        ),
    }
    compared = {
        "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater, "greater_equal": np.greater_equal,
        "less": np.less, "less_equal": np.less_equal,
    }  # fmt: skip
    whole = {
        "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
        "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or, "bitwise_xor": np.bitwise_xor,
        "left_shift": np.left_shift, "right_shift": np.right_shift,
    }  # fmt: skip
    found |= {name: operator(function, 2, getattr(op, name)) for name, function in compared.items()}
    return found | {name: _whole(name, function, 2) for name, function in whole.items()}


def _whole(name: str, function: Function, arity: int) -> Operator:
    """Return an operator on truth values or whole numbers."""
    cast = _positive if name.startswith("logical") else _integers
    return operator(function, arity, lambda *x: getattr(op, name)(*map(cast, x)), range=(-2.0, 2.0))


def _positive(value: Value) -> Value:
    return op.greater(value, relax.const(0.0, "float32"))


def _integers(value: Value) -> Value:
    return op.astype(op.abs(op.multiply(value, relax.const(4.0, "float32"))), "int32")


def _unary() -> dict[str, Operator]:
    everywhere: dict[str, tuple[Function, tuple[float, float]]] = {
        "acosh": (np.arccosh, (1.5, 3.0)), "acos": (np.arccos, (-0.9, 0.9)), "asin": (np.arcsin, (-0.9, 0.9)),
        "asinh": (np.arcsinh, (-2.0, 2.0)), "atan": (np.arctan, (-2.0, 2.0)), "atanh": (np.arctanh, (-0.9, 0.9)),
        "tan": (np.tan, (-1.0, 1.0)),
        "isfinite": (np.isfinite, (-2.0, 2.0)), "isinf": (np.isinf, (-2.0, 2.0)), "isnan": (np.isnan, (-2.0, 2.0)),
    }  # fmt: skip
    whole: dict[str, Function] = {
        "ceil": np.ceil, "floor": np.floor, "round": np.rint, "sign": np.sign, "trunc": np.trunc,
    }  # fmt: skip
    linear: dict[str, Any] = {"degrees": grows(1), "exact": True, "half": True, "proportional": proportional_to(0)}
    of_one: dict[str, Function] = {"cos": np.cos, "erf": erf, "sin": np.sin, "tanh": np.tanh}
    found = {
        name: operator(function, 1, getattr(op, name), range=span) for name, (function, span) in everywhere.items()
    }
    found |= {name: operator(function, 1, getattr(op, name), exact=True) for name, function in whole.items()}
    found |= {name: operator(function, 1, getattr(op, name), of_one=True) for name, function in of_one.items()}
    return found | {
        "abs": operator(np.abs, 1, op.abs, nonnegative=always, **linear),
        "exp": operator(np.exp, 1, op.exp, nonnegative=always),
        "square": operator(np.square, 1, op.square, degrees=grows(2), nonnegative=always),
        "negative": operator(np.negative, 1, op.negative, folds=True, **linear),
        "log": operator(np.log, 1, op.log, degrees=grows(0), range=(0.5, 3.0)),
        "sqrt": operator(np.sqrt, 1, op.sqrt, degrees=grows(0.5), folds=True, range=(0.5, 3.0)),
        "rsqrt": operator(lambda x: 1 / np.sqrt(x), 1, op.rsqrt, degrees=grows(-0.5), range=(0.5, 3.0)),
        # TVM has no vectors of these two, so there are no kernels.
        "cosh": operator(np.cosh, 1, kernels=()),
        "sinh": operator(np.sinh, 1, kernels=()),
        "logical_not": _whole("logical_not", np.logical_not, 1),
        "bitwise_not": _whole("bitwise_not", np.bitwise_not, 1),
    }


def _astype(call: Call, value: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return value.astype(str(call.attrs.dtype))


def _in_torch(name: str) -> Train:
    """Return how PyTorch computes what it has, most of it under the same name."""
    names = {
        "equal": "eq", "floor_mod": "remainder", "left_shift": "bitwise_left_shift", "log_add_exp": "logaddexp",
        "mod": "fmod", "power": "pow", "right_shift": "bitwise_right_shift",
    }  # fmt: skip

    def train(torch: Any, _: Call, *values: Any) -> Any:
        if name == "divide" and not values[0].is_floating_point():
            return torch.div(*values, rounding_mode="trunc")
        if name == "round" and values[0].is_floating_point():
            # The gradient of rounding is one, as that of quantization.
            return values[0] + (torch.round(values[0]) - values[0]).detach()
        return getattr(torch, names.get(name, name))(*values)

    return train


OPERATORS = {
    **{name: replace(each, train=_in_torch(name)) for name, each in {**_binary(), **_unary()}.items()},
    "astype": operator(
        np.positive,
        1,
        lambda x: op.astype(x, "float16"),
        evaluate=_astype,
        train=lambda torch, call, x: x.to(getattr(torch, str(call.attrs.dtype))),
        degrees=grows(1),
        retypes=True,
        exact=True,
        folds=True,
    ),
}

ONNX = {
    **{name: name.capitalize() for name in _unary() if not name.startswith(("is", "logical", "bitwise"))},
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "maximum": "Max", "minimum": "Min",
    "power": "Pow", "where": "Where", "mod": onnx.mod, "floor_mod": onnx.floor_mod, "floor_divide": onnx.floor_divide,
    "log_add_exp": onnx.log_add_exp, "equal": "Equal", "not_equal": onnx.negated("Equal"), "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "less": "Less", "less_equal": "LessOrEqual",
    "logical_and": "And", "logical_or": "Or", "logical_xor": "Xor", "logical_not": "Not",
    "bitwise_and": onnx.bitwise("And"), "bitwise_or": onnx.bitwise("Or"), "bitwise_xor": onnx.bitwise("Xor"),
    "bitwise_not": onnx.bitwise("Not"), "left_shift": onnx.shift("LEFT"), "right_shift": onnx.shift("RIGHT"),
    "ceil": onnx.whole("Ceil"), "floor": onnx.whole("Floor"), "round": onnx.whole("Round"), "trunc": onnx.trunc,
    "isfinite": onnx.finite, "isinf": "IsInf", "isnan": "IsNaN", "negative": "Neg", "square": onnx.square,
    "rsqrt": onnx.rsqrt, "astype": onnx.astype,
}  # fmt: skip
