"""ONNX forms of what computes element by element, reduces or normalizes."""

from __future__ import annotations

import math
from typing import Any

from tvm.ir import Call

from nnfuze_tvm.graph.constants import scalar
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.onnx_form import Form, Writer, dtype_of, named, rank_of, require
from nnfuze_tvm.graph.ops._axes import axes_of


def negated(operator: str) -> Form:
    """Return the form of what is the opposite of an operator that returns truth values."""
    return lambda write, _, *x: write("Not", write(operator, *x))


def is_float(call: Call) -> bool:
    """Tell whether the first operand has real numbers."""
    return "float" in dtype_of(call.args[0])


def finite(write: Writer, _: Call, x: str) -> str:
    """What is neither infinite nor NaN."""
    return write("Not", write("Or", write("IsInf", x), write("IsNaN", x)))


def whole(operator: str) -> Form:
    """Return the form of a function to whole numbers, which are whole already if they are integers."""
    return lambda write, call, x: write(operator, x) if is_float(call) else x


def trunc(write: Writer, call: Call, x: str) -> str:
    """Round towards zero."""
    return write("Mul", write("Sign", x), write("Floor", write("Abs", x))) if is_float(call) else x


def square(write: Writer, _: Call, x: str) -> str:
    """Multiply a value by itself."""
    return write("Mul", x, x)


def rsqrt(write: Writer, _: Call, x: str) -> str:
    """One by the root."""
    return write("Reciprocal", write("Sqrt", x))


def floor_divide(write: Writer, call: Call, x: str, y: str) -> str:
    """Divide and round down; of integers the rest goes before, so that nothing is left to round."""
    if is_float(call):
        return write("Floor", write("Div", x, y))
    return write("Div", write("Sub", x, write("Mod", x, y)), y)


def mod(write: Writer, _: Call, x: str, y: str) -> str:
    """Take the rest that has the sign of what is divided."""
    return write("Mod", x, y, fmod=1)


def floor_mod(write: Writer, call: Call, x: str, y: str) -> str:
    """Take the rest that has the sign of the divisor."""
    if not is_float(call):
        return write("Mod", x, y)
    rest = write("Mod", x, y, fmod=1)
    return write("Mod", write("Add", rest, y), y, fmod=1)


def log_add_exp(write: Writer, call: Call, x: str, y: str) -> str:
    """Return log(exp(x) + exp(y)), also where both are infinite."""
    distance = write("Abs", write("Sub", x, y))
    apart = write("Add", write("Max", x, y), write("Softplus", write("Neg", distance)))
    twice = write("Add", x, write.like(call.args[0], math.log(2)))
    return write("Where", write("Equal", x, y), twice, apart)


def bitwise(name: str) -> Form:
    """Return the form of an operator on bits; truth values have one of their own."""
    return lambda write, call, *x: write(name if dtype_of(call) == "bool" else f"Bitwise{name}", *x)


def shift(direction: str) -> Form:
    """Return the form of a shift; ONNX has that of numbers without a sign."""

    def form(write: Writer, call: Call, x: str, count: str) -> str:
        kind = dtype_of(call)
        unsigned = "uint64" if kind.endswith("64") else "uint32"
        signed = not kind.startswith("u")
        # What is negative goes as its complement, so that ones come in where its sign is.
        sign = ""
        if signed and direction == "RIGHT":
            below, zero = write("Less", x, write.like(call.args[0], 0)), write.like(call.args[0], 0)
            sign = write("Where", below, write.like(call.args[0], -1), zero)
            x = write("BitwiseXor", x, sign)
        sides = [write.cast(side, kind, unsigned) for side in (x, count)]
        result = write.cast(write("BitShift", *sides, direction=direction), unsigned, kind)
        return write("BitwiseXor", result, sign) if sign else result

    return form


def astype(write: Writer, call: Call, x: str) -> str:
    """Return the same numbers in another type."""
    return write("Cast", x, to=str(call.attrs.dtype))


def clip(write: Writer, call: Call, x: str, *_: Any) -> str:
    """Bound values by two numbers."""
    return write("Clip", x, *(write.like(call.args[0], scalar(arg)) for arg in call.args[1:]))


def relu6(write: Writer, call: Call, x: str) -> str:
    """Bound values by 0 and 6."""
    return write("Clip", x, write.like(call.args[0], 0), write.like(call.args[0], 6))


def silu(write: Writer, _: Call, x: str) -> str:
    """Multiply a value by its sigmoid."""
    return write("Mul", x, write("Sigmoid", x))


def leaky_relu(write: Writer, call: Call, x: str) -> str:
    """Multiply what is negative by a number."""
    return write("LeakyRelu", x, alpha=float(call.attrs.alpha))


def softplus(write: Writer, call: Call, x: str) -> str:
    """Return log(1 + exp(beta · x)) / beta, which is x where that is large."""
    beta, threshold = float(call.attrs.beta), float(call.attrs.threshold)
    require(threshold >= 15, f"has a threshold of {threshold:g}, which ONNX's Softplus has not")
    if beta == 1:
        return write("Softplus", x)
    factor = write.like(call.args[0], beta)
    return write("Div", write("Softplus", write("Mul", x, factor)), factor)


def prelu(write: Writer, call: Call, x: str, slope: str) -> str:
    """Multiply what is negative by a number per channel."""
    shape = [1] * rank_of(call)
    shape[int(call.attrs.axis)] = static_shape(call.args[1])[0]
    return write("PRelu", x, write.reshaped(slope, shape))


def reduced(operator: str) -> Form:
    """Return the form of a reduction over axes."""

    def form(write: Writer, call: Call, x: str) -> str:
        axes = write.integers(axes_of(call.attrs.axis, rank_of(call)))
        return write(operator, x, axes, keepdims=int(bool(call.attrs.keepdims)))

    return form


def variance(write: Writer, call: Call, x: str) -> str:
    """Return the mean square of what is left without the mean."""
    axes = write.integers(axes_of(call.attrs.axis, rank_of(call)))
    centered = write("Sub", x, write("ReduceMean", x, axes, keepdims=1))
    return write("ReduceMean", write("Mul", centered, centered), axes, keepdims=int(bool(call.attrs.keepdims)))


def std(write: Writer, call: Call, x: str) -> str:
    """Return the root of the variance."""
    return write("Sqrt", variance(write, call, x))


def position(operator: str) -> Form:
    """Return the form of the place of an extreme, the first one."""

    def form(write: Writer, call: Call, x: str) -> str:
        axis, keepdims = call.attrs.axis, int(bool(call.attrs.keepdims))
        if axis is None:
            found = write(operator, write.reshaped(x, [-1]), axis=0, keepdims=1)
            found = write.reshaped(found, static_shape(call))
        else:
            found = write(operator, x, axis=int(axis), keepdims=keepdims)
        return write.cast(found, "int64", dtype_of(call))

    return form


def batch_norm(write: Writer, call: Call, x: str, *moments: str) -> list[str]:
    """Normalize by stored moments, which go on unchanged."""
    attrs, channels = call.attrs, static_shape(call.args[1])
    require(int(attrs.axis) % rank_of(call) == 1, "does not have its channels along axis 1")
    require(not attrs.training, "is in training")
    kind = dtype_of(call.args[1])
    gamma = moments[0] if attrs.scale else write.constant([1] * channels[0], kind)
    beta = moments[1] if attrs.center else write.constant([0] * channels[0], kind)
    result = write("BatchNormalization", x, gamma, beta, *moments[2:], epsilon=float(attrs.epsilon))
    return [result, *moments[2:]]


def _require_image_axes(call: Call) -> None:
    rank = rank_of(call)
    require(int(call.attrs.channel_axis) % rank == 1, "does not have its channels along axis 1")
    require(axes_of(call.attrs.axes, rank) == list(range(2, rank)), "is not over all axes behind the channels")


def instance_norm(write: Writer, call: Call, x: str, gamma: str, beta: str) -> str:
    """Normalize every channel of every image."""
    _require_image_axes(call)
    return write("InstanceNormalization", x, gamma, beta, epsilon=float(call.attrs.epsilon))


def group_norm(write: Writer, call: Call, x: str, gamma: str, beta: str) -> str:
    """Normalize groups of channels of every image, as if each were one channel."""
    _require_image_axes(call)
    shape, groups, kind = static_shape(call), int(call.attrs.num_groups), dtype_of(call.args[1])
    rows = write.reshaped(x, [shape[0], groups, math.prod(shape[1:]) // groups])
    plain = (write.constant([number] * groups, kind) for number in (1, 0))
    normal = write("InstanceNormalization", rows, *plain, epsilon=float(call.attrs.epsilon))
    sides = [write.reshaped(each, [-1, *[1] * (len(shape) - 2)]) for each in (gamma, beta)]
    return write("Add", write("Mul", write.reshaped(normal, shape), sides[0]), sides[1])


def layer_norm(write: Writer, call: Call, x: str, gamma: str, beta: str) -> str:
    """Normalize over the last axes."""
    rank, axes = rank_of(call), axes_of(call.attrs.axes, rank_of(call))
    require(axes == list(range(axes[0], rank)), "is not over the last axes")
    return write("LayerNormalization", x, gamma, beta, axis=axes[0], epsilon=float(call.attrs.epsilon))


def rms_norm(write: Writer, call: Call, x: str, weight: str) -> str:
    """Divide by the root mean square."""
    axes = write.integers(axes_of(call.attrs.axes, rank_of(call)))
    mean = write("ReduceMean", write("Mul", x, x), axes, keepdims=1)
    size = write("Sqrt", write("Add", mean, write.like(call.args[0], float(call.attrs.epsilon))))
    return write("Mul", write("Div", x, size), weight)


def over_axis(operator: str) -> Form:
    """Return the form of a function over one axis."""
    return lambda write, call, x: write(operator, x, axis=int(call.attrs.axis))


def gelu(approximate: str) -> Form:
    """Return the form of a GELU, exact or by tanh."""
    return named("Gelu", approximate=approximate)
