"""Products with weights get whole vectors of columns."""

from __future__ import annotations

from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.deferred import Form, Rewriter
from nnfuze_tvm.passes.lower.weights import is_constant, rearranged
from nnfuze_tvm.passes.lower.whole_vectors import FirstChannels, is_odd, whole, whole_tiles

# With shorter sums, to cut the others off costs more.
_MIN_ROWS = 16


@module_pass(opt_level=0, name="WholeColumns")
class WholeColumns:
    """Give products with an odd number of columns (the characters that a network can read) columns of zero weights.

    They are cut off behind what follows element by element.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and any(_has_odd_columns(b.value) for b in bindings(func)):
                mod.update_func(gvar, Rewriter(_product).rewrite(func))
        return mod


def _has_odd_columns(value: Value) -> bool:
    if op_name(value) != "matmul" or len(static_shape(value.args[1])) != 2:
        return False
    rows, columns = static_shape(value.args[1])
    return is_odd(columns) and rows >= _MIN_ROWS


def _product(rewriter: Rewriter, call: Call, _: Var) -> tuple[list[Call], Form] | None:
    """Return the product with more columns, and which of them are the result."""
    if not _has_odd_columns(call) or not is_constant(call.args[1], rewriter.bound):
        return None
    columns = static_shape(call.args[1])[1]
    alone = prod(static_shape(call)) == columns
    form = FirstChannels(-1, columns, whole_tiles(columns) if alone else whole(columns))

    def arrange(values: np.ndarray, fill: np.ndarray) -> np.ndarray:
        wide = np.empty((len(values), form.computed), values.dtype)
        wide[:] = fill[:, -1:]
        wide[:, :columns] = values
        return wide

    weights = rearranged(call.args[1], rewriter.bound, arrange, form.along_channels, channel_axes=(1, 1))
    return [op.matmul(rewriter.read(call.args[0]), weights, call.attrs.out_dtype or None)], form
