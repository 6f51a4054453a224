"""Which convolutions over one axis stay channels first."""

from __future__ import annotations

from collections import Counter

from tvm import relax
from tvm.ir import Call, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.ir import static_shape

# Shorter rows don't fill vectors.
_MIN_WIDTH = 16


def lone_rows(func: relax.Function) -> list[Call]:
    """Return the depthwise convolutions over one axis, of stride 1, that nothing else wants channels last for.

    For such a layer alone, data and result would be transposed, which takes longer than the layer itself. That it is
    not alone (another convolution, a pooling, a transpose of the network's own reads or makes the same values, be it
    behind operators that follow any order of axes) means that there are transposes to save, not to make.
    """
    same: dict[Value, Value] = {}

    def group(value: Value) -> Value:
        while value in same:
            value = same[value]
        return value

    def join(one: Value, other: Value) -> None:
        if isinstance(other, Var) and not group(one).same_as(group(other)):
            same[group(one)] = group(other)

    wanting: list[tuple[Call, tuple[Value, Value]]] = []
    for binding in bindings(func):
        value, operator = binding.value, ops.of(binding.value)
        if isinstance(value, Var):
            join(binding.var, value)
        elif operator is not None and operator.transposed is not None:
            for operand in operator.operands(value):
                join(binding.var, operand)
        if operator is not None and ("pooling" in operator.kernels or op_name(value).startswith("nn.conv")):
            wanting.append((value, (value.args[0], binding.var)))
        elif op_name(value) == "permute_dims":
            wanting.append((value, (value.args[0], binding.var)))
    count = Counter(end for _, ends in wanting for end in {group(end) for end in ends})
    return [call for call, ends in wanting if _is_depthwise_row(call) and all(count[group(end)] == 1 for end in ends)]


def _is_depthwise_row(call: Call) -> bool:
    if op_name(call) != "nn.conv1d" or str(call.attrs.data_layout) != "NCW":
        return False
    channels, groups = static_shape(call.args[0])[1], int(call.attrs.groups)
    _, outputs, width = static_shape(call)
    return channels == groups == outputs > 1 and int(call.attrs.strides[0]) == 1 and width >= _MIN_WIDTH
