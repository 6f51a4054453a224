"""Max pooling: a window's largest number, whatever else is in it."""

from __future__ import annotations

import numpy as np
from tvm import relax, te, tirx, topi
from tvm.ir import Call

from nnfuze_tvm.graph.dataflow import op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.keep_nan import Legalize, by_tvm


def legalizations() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write max poolings of floats, so that NaN counts as nothing.

    That is what the standard's reference makes of it, and ONNX Runtime of rows. TVM's kernel forgets what it saw before
    a NaN.
    """
    return {f"relax.nn.max_pool{rank}d": _max_pool for rank in (1, 2, 3)}


def _max_pool(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    attrs = call.attrs
    layout = str(attrs.layout)
    if not str(call.ty.dtype).startswith("float") or str(attrs.out_layout) != layout or not layout.isupper():
        return by_tvm(builder, call)
    axes = [axis for axis, letter in enumerate(layout) if letter not in "NC"]
    shape, result = static_shape(call.args[0]), static_shape(call)
    sizes, strides, dilations, padding = (
        [int(each) for each in field] for field in (attrs.pool_size, attrs.strides, attrs.dilation, attrs.padding)
    )
    before, behind = [0] * len(shape), [0] * len(shape)
    for place, axis in enumerate(axes):
        before[axis] = padding[place]
        reach = (result[axis] - 1) * strides[place] + (sizes[place] - 1) * dilations[place] + 1
        behind[axis] = max(reach - before[axis] - shape[axis], 0)

    def pool(data: te.Tensor) -> te.Tensor:
        padded = topi.nn.pad(data, before, behind, _least(data.dtype)) if any(before) or any(behind) else data
        taps = [te.reduce_axis((0, size), f"tap{place}") for place, size in enumerate(sizes)]

        def window(*index: tirx.Var) -> tirx.Expr:
            seen = list(index)
            for axis, tap, stride, dilation in zip(axes, taps, strides, dilations, strict=True):
                seen[axis] = index[axis] * stride + tap * dilation
            return _largest(padded(*seen), axis=taps)

        return te.compute(result, window, name="pool_max", tag="pool_max")

    return builder.call_te(pool, call.args[0], primfunc_name_hint=op_name(call).removeprefix("nn."))


def _least(dtype: str) -> tirx.Expr:
    return tirx.const(-np.inf, dtype)


# The second operand is the result where one is NaN: that is the largest one so far.
_largest = te.comm_reducer(lambda so_far, x: tirx.max(x, so_far), _least, name="largest")
