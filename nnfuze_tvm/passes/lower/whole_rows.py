"""Integer products get sums of whole groups, so that dot products fit."""

from __future__ import annotations

import numpy as np
import tvm
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.ir import static_shape

# A dot product takes this many neighbours.
_GROUP = 4
# Shorter sums, or fewer of them, are not worth a copy of the data.
_LEAST, _LEAST_SUMS = 16, 4


@module_pass(opt_level=0, name="WholeRows")
class WholeRows:
    """Give products of 8-bit data and weights, whose sums are of no multiple of four products, some more of zeros."""

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, lambda func, _builder: with_values(func, _whole))


def _has_odd_rows(value: Value) -> bool:
    if op_name(value) != "matmul" or not isinstance(value.args[1], GenericConst):
        return False
    data, weights = (str(arg.ty.dtype) for arg in value.args)
    shape = static_shape(value.args[1])
    return (
        data in ("int8", "uint8")
        and weights == "int8"
        and str(value.attrs.out_dtype) == "int32"
        and len(shape) == 2
        and shape[0] % _GROUP != 0
        and shape[0] >= _LEAST
        and shape[1] >= _LEAST_SUMS
    )


def _whole(value: Value, _name: str, emitter: Emitter) -> Value | None:
    return _wider(value, emitter) if _has_odd_rows(value) else None


def _wider(call: Call, emitter: Emitter) -> Call:
    data, weights = call.args[0], array(call.args[1])
    more = -len(weights) % _GROUP
    padded = emitter.emit(op.nn.pad(data, [0, 0] * (len(static_shape(data)) - 1) + [0, more]))
    return op.matmul(padded, constant(np.pad(weights, ((0, more), (0, 0)))), out_dtype="int32")
