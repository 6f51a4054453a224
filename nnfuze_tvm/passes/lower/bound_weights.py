"""Kernels know how many products with their weights fit in int16: of small ones, more are added at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst, GlobalVar
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.contraction import NARROW_PRODUCTS, NO_PRODUCTS, Narrow, narrow_products
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.ir import static_shape


@module_pass(opt_level=0, name="BoundWeights")
class BoundWeights:
    """Say in an attribute of each kernel how many products with its int8 weights fit in int16 (`narrow_products`).

    It holds for every call of the kernel in the module.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with these attributes."""
        calls: dict[GlobalVar, list[Sequence[Value]]] = defaultdict(list)
        for func in mod.functions.values():
            if isinstance(func, relax.Function):
                for binding in bindings(func):
                    if op_name(binding.value) == "call_tir":
                        calls[binding.value.args[0]].append(binding.value.args[1].fields)
        mod = mod.clone()
        for kernel, arguments in calls.items():
            found = [count for each in zip(*arguments, strict=True) if (count := _products(each)) is not None]
            if found and any(fewest := _fewest(found)) and isinstance(mod[kernel], tirx.PrimFunc):
                mod.update_func(kernel, mod[kernel].with_attr(NARROW_PRODUCTS, list(fewest)))
        return mod


def _products(arguments: Sequence[Value]) -> Narrow | None:
    """Return how many products fit, given what an argument is in each call; None where it is weights in none."""
    weights = [each for each in arguments if isinstance(each, GenericConst) and str(each.ty.dtype) == "int8"]
    weights = [each for each in weights if len(static_shape(each)) > 1]
    if not weights:
        return None
    if len(weights) < len(arguments):
        return NO_PRODUCTS
    # Which axis is that of the output channels is the kernel's business.
    return _fewest([narrow_products(array(each), axis) for each in weights for axis in (0, array(each).ndim - 1)])


def _fewest(counts: Sequence[Narrow]) -> Narrow:
    return Narrow(*map(min, zip(*counts, strict=True)))
