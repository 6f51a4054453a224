"""Which few numbers a tensor can hold: signs, comparisons, what is rounded and bounded, and what is made of these."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, scalar
from nnfuze_tvm.graph.dataflow import Value, op_name, operands
from nnfuze_tvm.graph.evaluate import value_of

# Four bits.
MOST = 16
_WHOLE = frozenset({"round", "floor", "ceil", "trunc", "sign"})
_KEEPS_WHOLE = frozenset({"add", "subtract", "multiply", "clip", "negative"})


class Levels:
    """The numbers that the Vars of a function can hold, where they are few, NaN aside. Bindings are seen in order."""

    def __init__(self) -> None:
        self._known: dict[Value, np.ndarray] = {}
        self._bound: dict[Value, Value] = {}

    def of(self, expr: Value) -> np.ndarray | None:
        """Return all numbers that an operand can hold, smallest first; None if they are more than `MOST`."""
        if isinstance(expr, GenericConst):
            found = np.unique(array(expr))
            return found if 0 < len(found) <= MOST else None
        return self._known.get(expr)

    def see(self, var: tvm.ir.Var, value: Value) -> None:
        """Take note of what a Var is bound to."""
        self._bound[var] = value
        found = self._found(value)
        if found is not None and 0 < len(found) <= MOST:
            self._known[var] = found

    def _found(self, value: Value) -> np.ndarray | None:
        if isinstance(value, tvm.ir.Var | GenericConst):
            return self.of(value)
        if isinstance(value, relax.TupleGetItem):
            return self.of(value.tuple_value)
        effect = ops.effect_of(value)
        if effect == "moves":
            return self._with_padding(value, self.of(value.args[0]))
        if op_name(value) == "concat":
            parts = [part for leaf in operands(value) if (part := self.of(leaf)) is not None]
            return np.unique(np.concatenate(parts)) if len(parts) == len(operands(value)) else None
        return self._mapped(value) if effect == "maps" else None

    def _with_padding(self, value: Call, own: np.ndarray | None) -> np.ndarray | None:
        if own is None or op_name(value) != "nn.pad":
            return own
        return np.unique(np.append(own, np.asarray(value.attrs.pad_value, own.dtype)))

    def _mapped(self, value: Call) -> np.ndarray | None:
        """Return what an element-wise operator makes of few numbers, or which few it makes of any."""
        dtype, name = str(value.ty.dtype), op_name(value)
        variables = list(dict.fromkeys(leaf for leaf in operands(value) if isinstance(leaf, tvm.ir.Var)))
        numbers = all(array(leaf).size == 1 for leaf in operands(value) if isinstance(leaf, GenericConst))
        parts = [part for leaf in variables if (part := self.of(leaf)) is not None]
        if numbers and len(parts) == len(variables):
            combined: list[np.ndarray] = list(np.meshgrid(*parts, indexing="ij"))
            known = {leaf: each.ravel() for leaf, each in zip(variables, combined, strict=True)}
            return np.unique(value_of(value, known, None))
        if dtype == "bool":
            return np.array([False, True])
        if name == "where" and op_name(self._bound.get(value.args[0])) == "isnan":
            return self.of(value.args[2])
        if name == "sign":
            return np.array([-1, 0, 1], dtype)
        if name == "clip" and self._is_whole(value.args[0]):
            low, high = (float(scalar(bound)) for bound in value.args[1:])
            if low.is_integer() and high.is_integer() and high - low < MOST:
                return np.arange(low, high + 1).astype(dtype)
        return None

    def _is_whole(self, expr: Value) -> bool:
        """Tell whether a tensor, or a bound, holds whole numbers only."""
        if isinstance(expr, GenericConst):
            values = array(expr)
            return bool(np.all(values == np.rint(values)))
        if not isinstance(expr, tvm.ir.Var):
            return float(scalar(expr)).is_integer()
        if "int" in str(expr.ty.dtype):
            return True
        value = self._bound.get(expr)
        if op_name(value) in _WHOLE:
            return True
        return value is not None and op_name(value) in _KEEPS_WHOLE and all(self._is_whole(arg) for arg in value.args)
