"""What a layer computes once is not fused with what needs it many times."""

from __future__ import annotations

from math import prod

import tvm
from tvm import tirx
from tvm.ir import Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape

# TVM's operator patterns, least first: elementwise, broadcast, injective.
_BROADCAST, _INJECTIVE = 1, 2


@module_pass(opt_level=0, name="KeepSpreads")
class KeepSpreads:
    """Keep TVM from fusing a layer with what spreads its result over a larger one (a squeeze-and-excitation block).

    TVM takes an operator that broadcasts a layer's result for one that adds a bias to it. A kernel of both has no tile.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the patterns of operators that spread layers corrected."""
        bound = {binding.var: binding.value for binding in bindings(mod["main"])}
        spreading = {
            value.args[0]
            for value in bound.values()
            if _pattern(value, mod) <= _BROADCAST and any(_is_spread(leaf, value, bound, mod) for leaf in value.args[1])
        }
        for gvar in spreading:
            mod.update_func(gvar, mod[gvar].with_attr("op_pattern", _INJECTIVE))
        return mod


def _pattern(value: Value, mod: tvm.IRModule) -> int:
    """Return the pattern of what a value calls; for what is no call, more than any."""
    if op_name(value) != "call_tir" or not isinstance(func := mod[value.args[0]], tirx.PrimFunc):
        return 1 << 8
    return int(func.attrs.get("op_pattern", 1 << 8))


def _is_spread(leaf: Value, call: Value, bound: dict[Value, Value], mod: tvm.IRModule) -> bool:
    """Tell whether an operand is smaller than the result, and a layer's, but for what was done to each element."""
    if not isinstance(leaf, Var) or prod(static_shape(leaf)) >= prod(static_shape(call)):
        return False
    size = prod(static_shape(leaf))
    while leaf in bound:
        made = bound[leaf]
        pattern = _pattern(made, mod)
        if pattern == OUT_ELEMENTWISE_FUSABLE:
            return True
        if pattern > _BROADCAST:
            return False
        sources = [e for e in made.args[1] if isinstance(e, Var) and prod(static_shape(e)) == size]
        leaf = sources[0] if sources else None
    return False
