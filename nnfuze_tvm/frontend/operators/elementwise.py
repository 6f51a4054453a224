"""Operators that compute element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Var
from tvm_ffi import structural_equal

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import dtype_of, required, scalar
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value, op_name


def _clip(node: Node, inputs: Operands) -> Any:
    """R.clip, R.nn.relu or a single bound, where TVM's converter calls anonymous TE functions."""
    data = inputs[0]
    dtype = str(data.ty.dtype)
    if node.opset < 11:
        bounds = [
            relax.const(node.attributes[key], dtype) if key in node.attributes else None for key in ("min", "max")
        ]
    else:
        bounds = [inputs[1], inputs[2]]
    # Scalars by definition, some exporters write a vector of one.
    least, most = (None if value is None else value.item() for value in map(known, bounds))
    if any(value is not None and np.isnan(value) for value in (least, most)):
        raise ValueError("a bound that is NaN is not supported")
    if least is not None and most is not None and np.isfinite([least, most]).all() and least <= most:
        return relax.op.clip(data, least, most)
    low, high = bounds
    if least == 0 and high is None:
        return relax.op.nn.relu(data)
    if low is not None:
        data = relax.op.maximum(data, low)
    return data if high is None else relax.op.minimum(data, high)


def _pairwise(combine: Callable[[Value, Value], Value]) -> Converter:
    """Convert an n-ary elementwise operator into a chain, where TVM's converter stacks and reduces."""

    def convert(node: Node, inputs: Operands) -> Any:
        return reduce(combine, inputs)

    return convert


def _mean(node: Node, inputs: Operands) -> Any:
    total = reduce(relax.op.add, inputs)
    return relax.op.multiply(total, relax.const(1 / len(inputs), str(inputs[0].ty.dtype)))


def _dropout(node: Node, inputs: Operands) -> Any:
    """Nothing: inference keeps every element."""
    if len(inputs) > 2 and inputs[2] is not None and required(inputs[2], "training_mode").any():
        raise ValueError("training_mode is true: what it drops is random")
    if node.outputs == 1:
        return inputs[0]
    shape = ir.static_shape(inputs[0])
    mask = np.ones(shape, dtype=bool) if node.opset >= 10 else np.ones(shape, dtype=str(inputs[0].ty.dtype))
    return relax.Tuple([inputs[0], constant(mask)])


def _kind(value: Value) -> str:
    """Return the letter that NumPy has for the kind of a tensor's numbers."""
    return np.dtype(str(value.ty.dtype)).kind


def in_float32(function: Callable[[Node, Value], Value]) -> Converter:
    """Convert a function of one tensor; of float16 in float32, as ONNX Runtime does: TVM has few of them in float16."""

    def convert(node: Node, inputs: Operands) -> Any:
        data = inputs[0]
        if str(data.ty.dtype) != "float16":
            return function(node, data)
        return relax.op.astype(function(node, node.emit(relax.op.astype(data, "float32"))), "float16")

    return convert


def _plain(function: Callable[[Value], Value]) -> Converter:
    return in_float32(lambda _, data: function(data))


def _exponential_below(node: Node, data: Value, alpha: float, gamma: float, width: float) -> Value:
    """``gamma · (x < 0 ? alpha · (e^(x / width) - 1) : x)``."""
    power = data if width == 1.0 else relax.op.divide(data, scalar(width, data))
    below = relax.op.multiply(relax.op.subtract(relax.op.exp(power), scalar(1.0, data)), scalar(alpha * gamma, data))
    above = data if gamma == 1.0 else relax.op.multiply(data, scalar(gamma, data))
    return relax.op.where(relax.op.less(data, scalar(0.0, data)), below, above)


def _elu(node: Node, data: Value) -> Value:
    return _exponential_below(node, data, node.attributes.get("alpha", 1.0), 1.0, 1.0)


def _selu(node: Node, data: Value) -> Value:
    # The defaults of opsets before 6 are rounded ones.
    old = node.opset < 6
    alpha = node.attributes.get("alpha", 1.6732 if old else 1.67326319217681884765625)
    gamma = node.attributes.get("gamma", 1.0507 if old else 1.05070102214813232421875)
    return _exponential_below(node, data, alpha, gamma, 1.0)


def _celu(node: Node, data: Value) -> Value:
    alpha = node.attributes.get("alpha", 1.0)
    if alpha <= 0:
        raise ValueError(f"alpha {alpha:g} is not supported, it must be positive")
    return _exponential_below(node, data, alpha, 1.0, alpha)


def _mish(node: Node, data: Value) -> Value:
    """``x · tanh(log(1 + e^x))``, which is ``x · n / (n + 2)`` with ``n = e^x (e^x + 2)``."""
    # Beyond 20 the quotient is 1 in float32.
    power = node.emit(relax.op.exp(relax.op.minimum(data, scalar(20.0, data))))
    product = node.emit(relax.op.multiply(power, relax.op.add(power, scalar(2.0, data))))
    return relax.op.multiply(data, relax.op.divide(product, relax.op.add(product, scalar(2.0, data))))


def _softplus(node: Node, data: Value) -> Value:
    """``log(1 + e^x)``, of an exponential that can't overflow."""
    small = relax.op.exp(relax.op.negative(relax.op.abs(data)))
    return relax.op.add(relax.op.nn.relu(data), relax.op.log(relax.op.add(small, scalar(1.0, data))))


def _swish(node: Node, data: Value) -> Value:
    alpha = node.attributes.get("alpha", 1.0)
    if alpha == 1.0:
        return relax.op.nn.silu(data)
    return relax.op.multiply(data, relax.op.sigmoid(relax.op.multiply(data, scalar(alpha, data))))


def _gated(node: Node, inputs: Operands) -> Value:
    return relax.op.multiply(node.emit(in_float32(_swish)(node, inputs[:1])), inputs[1])


def _gelu(node: Node, data: Value) -> Value:
    mode = node.text("approximate", "none")
    if mode not in ("none", "tanh"):
        raise ValueError(f"approximate {mode!r} is not supported")
    return relax.op.nn.gelu_tanh(data) if mode == "tanh" else relax.op.nn.gelu(data)


def _half_exponentials(data: Value) -> tuple[Value, Value]:
    """Return e^x / 2 and e^-x / 2, which overflow no sooner than their sum."""
    shift = scalar(float(np.log(2.0)), data)
    return (
        relax.op.exp(relax.op.subtract(data, shift)),
        relax.op.exp(relax.op.subtract(relax.op.negative(data), shift)),
    )


def _cosh(node: Node, data: Value) -> Value:
    return relax.op.add(*_half_exponentials(data))


def _sinh(node: Node, data: Value) -> Value:
    """Near zero, where the exponentials cancel, by its series."""
    square = node.emit(relax.op.multiply(data, data))
    series = scalar(1.0, data)
    for step in (42.0, 20.0, 6.0):
        series = relax.op.add(relax.op.multiply(relax.op.divide(square, scalar(step, data)), series), scalar(1.0, data))
    near = relax.op.multiply(data, series)
    far = relax.op.subtract(*_half_exponentials(data))
    return relax.op.where(relax.op.less(square, scalar(0.25, data)), near, far)


def _thresholded_relu(node: Node, inputs: Operands) -> Any:
    data, alpha = inputs[0], scalar(node.attributes.get("alpha", 1.0), inputs[0])
    return relax.op.where(relax.op.greater(data, alpha), data, scalar(0.0, data))


def _shrink(node: Node, inputs: Operands) -> Any:
    data = inputs[0]
    bound, bias = node.attributes.get("lambd", 0.5), node.attributes.get("bias", 0.0)
    zero = scalar(0, data)
    if _kind(data) != "f":
        if bias != int(bias):
            raise ValueError(f"bias {bias:g} of integers is not supported")
        # No integer is between a bound and the whole number below it.
        bound, bias = int(np.floor(bound)), int(bias)
    above = relax.op.subtract(data, scalar(bias, data))
    if _kind(data) == "u":
        return above if bound < 0 else relax.op.where(relax.op.greater(data, scalar(bound, data)), above, zero)
    inner = relax.op.where(relax.op.greater(data, scalar(bound, data)), above, zero)
    below = relax.op.add(data, scalar(bias, data))
    return relax.op.where(relax.op.less(data, scalar(-bound, data)), below, inner)


def _prelu(node: Node, inputs: Operands) -> Any:
    """R.nn.leakyrelu for one number, R.nn.prelu for one per channel, else a choice."""
    data, slope = inputs
    shape, own = ir.static_shape(data), ir.static_shape(slope)
    if len(own) > len(shape) or np.broadcast_shapes(shape, own) != shape:
        raise ValueError(f"a slope of shape {list(own)} for data of shape {list(shape)} is not supported")
    axes = [axis + len(shape) - len(own) for axis, size in enumerate(own) if size != 1]
    number = known(slope)
    if number is not None and not axes and np.isfinite(number).all() and _kind(data) == "f":
        return relax.op.nn.leakyrelu(data, float(number.item()))
    if len(axes) == 1 and _kind(data) == "f":
        return relax.op.nn.prelu(data, relax.op.reshape(slope, [shape[axes[0]]]), axes[0])
    return relax.op.where(relax.op.less(data, scalar(0, data)), relax.op.multiply(data, slope), data)


def _sign(node: Node, inputs: Operands) -> Any:
    data = inputs[0]
    if _kind(data) == "u":
        return relax.op.minimum(data, scalar(1, data))
    sign = relax.op.sign(data)
    return relax.op.where(relax.op.isnan(data), data, sign) if _kind(data) == "f" else sign


def _is_infinite(node: Node, inputs: Operands) -> Any:
    data = inputs[0]
    signs = [node.attributes.get(f"detect_{sign}", 1) for sign in ("negative", "positive")]
    if not any(signs):
        return constant(np.zeros(ir.static_shape(data), bool))
    if all(signs):
        return relax.op.equal(relax.op.abs(data), scalar(np.inf, data))
    return relax.op.equal(data, scalar(np.inf if signs[1] else -np.inf, data))


def _equal(node: Node, inputs: Operands) -> Any:
    """Compare; TVM would take truth values for floats."""
    if _kind(inputs[0]) != "b":
        return NotImplemented
    return relax.op.logical_not(relax.op.logical_xor(*inputs))


def _power(node: Node, inputs: Operands) -> Any:
    """Of two types the result has the first; integers are computed in float64, as ONNX Runtime does."""
    base, exponent = inputs
    kept = str(base.ty.dtype)
    number = known(exponent)
    if number is not None and number.ndim == 0 and number in (1, 2):
        return base if number == 1 else relax.op.multiply(base, base)
    wide = kept if _kind(base) == "f" else "float64"
    base, exponent = (
        value if str(value.ty.dtype) == wide else relax.op.astype(value, wide) for value in (base, exponent)
    )
    result = relax.op.power(base, exponent)
    return result if wide == kept else relax.op.astype(result, kept)


def _mod(node: Node, inputs: Operands) -> Any:
    """The remainder has the sign of the divisor, or of the dividend with ``fmod``."""
    left, right = inputs
    if node.attributes.get("fmod", 0):
        return relax.op.mod(left, right)
    if _kind(left) != "f":
        return relax.op.floor_mod(left, right)
    rest, zero = node.emit(relax.op.mod(left, right)), scalar(0.0, left)
    other = relax.op.logical_xor(relax.op.less(rest, zero), relax.op.less(right, zero))
    moved = relax.op.logical_and(relax.op.not_equal(rest, zero), other)
    return relax.op.where(moved, relax.op.add(rest, right), rest)


def _bit_shift(node: Node, inputs: Operands) -> Any:
    """Shift; by as many bits as there are, which machines disagree about, all but the sign is shifted out."""
    data, amount = inputs
    direction = node.text("direction")
    if direction not in ("LEFT", "RIGHT"):
        raise ValueError(f"direction {direction!r} is not supported")
    shift = relax.op.left_shift if direction == "LEFT" else relax.op.right_shift
    bits, number = 8 * np.dtype(str(data.ty.dtype)).itemsize, known(amount)
    if number is not None and (number < bits).all():
        return shift(data, amount)
    amount = node.emit(amount) if number is None else amount
    inside = shift(data, relax.op.minimum(amount, scalar(bits - 1, data)))
    if direction == "RIGHT" and _kind(data) == "i":
        return inside
    return relax.op.where(relax.op.less(amount, scalar(bits, data)), inside, scalar(0, data))


def _subtract(node: Node, inputs: Operands) -> Any:
    """Take away what was just added as its negative: TVM takes ``(x + c) - c`` for ``x`` and ``x - x`` for 0.

    In floats they are not, and ``x + c - c`` with a large c is how some exporters round.
    """
    left, right = inputs[0], inputs[1]
    if not dtype_of(left).startswith("float"):
        return NotImplemented
    before = node.builder.lookup_binding(left) if isinstance(left, Var) else None
    taken = [left, *(before.args if before is not None and op_name(before) == "add" else [])]
    if not any(each.same_as(right) or structural_equal(each, right) for each in taken):
        return NotImplemented
    number = known(right)
    return relax.op.add(left, node.emit(relax.op.negative(right)) if number is None else constant(-number))


CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    "Sub": _subtract,
    "Sum": _pairwise(relax.op.add),
    "Min": _pairwise(relax.op.minimum),
    "Max": _pairwise(relax.op.maximum),
    "Mean": _mean,
    "Dropout": _dropout,
    "Elu": in_float32(_elu),
    "Selu": in_float32(_selu),
    "Celu": in_float32(_celu),
    "Mish": in_float32(_mish),
    "Softplus": in_float32(_softplus),
    "SwiGLU": _gated,
    "Swish": in_float32(_swish),
    "Gelu": in_float32(_gelu),
    "Cosh": in_float32(_cosh),
    "Sinh": in_float32(_sinh),
    "ThresholdedRelu": _thresholded_relu,
    "Shrink": _shrink,
    "PRelu": _prelu,
    "Sign": _sign,
    "IsInf": _is_infinite,
    "Equal": _equal,
    "Pow": _power,
    "Mod": _mod,
    "BitShift": _bit_shift,
    **{
        name: _plain(getattr(relax.op, name.lower()))
        for name in "Acos Acosh Asin Asinh Atan Atanh Erf Exp Log Sigmoid Sin Cos Tan Tanh".split()
    },
}
