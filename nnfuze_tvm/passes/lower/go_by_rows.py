"""Kernels that go from row to row can be computed band by band, so that less memory is needed."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.contraction import BY_ROWS
from nnfuze_tvm.graph.ir import small_weights


@module_pass(opt_level=0, name="GoByRows")
class GoByRows:
    """Say in an attribute of each kernel that its tiles shall not run on into the next row, where memory comes first.

    Of other modules than those whose weights shall stay small (`ir.small_weights`), nothing is said.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with these attributes."""
        if not small_weights(mod):
            return mod
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc):
                mod.update_func(gvar, func.with_attr(BY_ROWS, True))
        return mod
