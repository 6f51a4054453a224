"""Matrix products take signed bytes as unsigned ones, 128 larger, where a machine's dot products want them so."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.integers.context import dtype_of
from nnfuze_tvm.graph.integers.values import INT32_MAX
from nnfuze_tvm.graph.ir import static_shape

# What stands for zero, and the largest number there is.
_ZERO, _LARGEST = 128, 255
# The machine adds so many products at once to so many channels; other layers stay as they are.
_DEPTH, _CHANNELS = 4, 8


@module_pass(opt_level=0, name="UnsignedRows")
class UnsignedRows:
    """Add 128 to the int8 data of products with constant matrices, and take back what that adds to the int32 sums.

    That is 128 times the sum of a column of weights, a constant, which joins the bias. Sums are the same bits.

    Parameters
    ----------
    unsigned : bool
        The machine has fast dot products of unsigned with signed bytes (of any values), but none of signed with signed
        ones; else the pass does nothing.
    """

    def __init__(self, unsigned: bool) -> None:
        self.unsigned = unsigned

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        for gvar, func in mod.functions_items():
            if self.unsigned and isinstance(func, relax.Function) and any(_fits(b.value) for b in bindings(func)):
                mod.update_func(gvar, _Rewriter().run(func))
        return mod


def _fits(call: Value) -> bool:
    if op_name(call) != "matmul" or str(call.attrs.out_dtype) != "int32":
        return False
    data, weights = call.args
    if (dtype_of(data), dtype_of(weights)) != ("int8", "int8") or not isinstance(weights, GenericConst):
        return False
    if len(static_shape(weights)) != 2:
        return False
    depth, channels = static_shape(weights)
    whole = depth % _DEPTH == 0 and channels % _CHANNELS == 0
    return whole and depth * _ZERO * _LARGEST <= INT32_MAX


class _Rewriter:
    def __init__(self) -> None:
        self._emitter = Emitter()
        self._values: dict[Value, Value] = {}
        # Sums that are too large, and what is to be added to them.
        self._shifted: dict[Value, tuple[Value, np.ndarray]] = {}
        self._unsigned: dict[Value, Value] = {}

    def run(self, func: relax.Function) -> relax.Function:
        for binding in bindings(func):
            value = binding.value
            if _fits(value):
                self._shifted[binding.var] = self._product(value, binding.var.name)
                continue
            if op_name(value) == "add":
                value = self._with_bias(value)
            self._values[binding.var] = self._emitter.emit(self._restored(value), binding.var.name)
        outputs = [self._restored(out) for out in output_fields(func)]
        return self._emitter.finish(func.params, outputs, func.attrs)

    def _product(self, call: Call, name: str) -> tuple[Value, np.ndarray]:
        data, weights = self._restored(call.args[0]), call.args[1]
        if data not in self._unsigned:
            wide = op.add(op.astype(data, "int16"), relax.const(np.int16(_ZERO)))
            self._unsigned[data] = self._emitter.emit(op.astype(wide, "uint8"))
        product = self._emitter.emit(op.matmul(self._unsigned[data], weights, out_dtype="int32"), name)
        return product, (-_ZERO * array(weights).astype("int64").sum(0)).astype("int32")

    def _with_bias(self, value: Call) -> Call:
        """Add what is to be added to sums to the constant that a call adds to them."""
        for sums, bias in (value.args, reversed(value.args)):
            if sums in self._shifted and isinstance(bias, GenericConst):
                raw, more = self._shifted[sums]
                return op.add(raw, constant(array(bias) + more))
        return value

    def _restored(self, value: Value) -> Value:
        for leaf in operands(value):
            if leaf in self._shifted and leaf not in self._values:
                raw, more = self._shifted[leaf]
                shape = (1,) * (len(static_shape(raw)) - 1) + more.shape
                self._values[leaf] = self._emitter.emit(op.add(raw, constant(more.reshape(shape))))
        return substitute(value, self._values)
