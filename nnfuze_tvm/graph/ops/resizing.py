"""Images of another size."""

from __future__ import annotations

from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.values import Known
from nnfuze_tvm.graph.ops.moving import move
from nnfuze_tvm.graph.ops.operator import Example, Operator
from nnfuze_tvm.graph.ops.pooling import couple


def _copies(call: Call) -> bool:
    return str(call.attrs.method) == "nearest_neighbor"


def _integer(context: Integers, call: Call, name: str) -> Known | None:
    return move(context, call, name) if _copies(call) else None


def _transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    attrs = call.attrs
    layout = "".join(str(attrs.layout)[axes.index(axis)] for axis in range(len(axes)))
    if layout not in ("NCHW", "NHWC"):
        return None
    return op.image.resize2d(
        sources[0],
        call.args[1],
        [float(each) for each in attrs.roi],
        layout,
        str(attrs.method),
        str(attrs.coordinate_transformation_mode),
        str(attrs.rounding_method),
        float(attrs.cubic_alpha),
        int(attrs.cubic_exclude),
        float(attrs.extrapolation_value),
        attrs.out_dtype or None,
    )


OPERATORS = {
    "image.resize2d": Operator(
        effect="mixes",
        examples=(
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12), method="nearest_neighbor")),
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12))),
        ),
        couple=couple,
        moves=_copies,
        proportional=lambda call: () if float(call.attrs.extrapolation_value) else (0,),
        integer=_integer,
        transposed=_transposed,
        kernels=("elementwise",),
    ),
}
