"""Kernels that only their module calls."""

from __future__ import annotations

import tvm
from tvm import tirx


@tvm.transform.module_pass(opt_level=0, name="HideKernels")
class HideKernels:
    """Take the global symbols of PrimFuncs away.

    A PrimFunc that has one is kept whether or not something calls it, and a kernel that is made of it alone takes the
    symbol over: then there are two of one name, which can't be linked.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return ``mod`` with private PrimFuncs."""
        mod = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and "global_symbol" in func.attrs:
                mod.update_func(var, func.without_attr("global_symbol"))
        return mod
