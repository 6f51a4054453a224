"""Kernels know how many products with their weights fit in int16: of small ones, more are added at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
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
            func = mod[kernel]
            if not isinstance(func, tirx.PrimFunc):
                continue
            operands = zip(func.params, zip(*arguments, strict=True), strict=False)
            found = [count for param, each in operands if (count := _products(func, param, each)) is not None]
            if found and any(fewest := _fewest(found)):
                mod.update_func(kernel, func.with_attr(NARROW_PRODUCTS, list(fewest)))
        return mod


def _products(kernel: tirx.PrimFunc, param: tirx.Var, arguments: Sequence[Value]) -> Narrow | None:
    """Return how many products fit, given what an argument is in each call; None where it is weights in none."""
    weights = [each for each in arguments if isinstance(each, GenericConst) and str(each.ty.dtype) == "int8"]
    weights = [each for each in weights if len(static_shape(each)) > 1]
    if not weights:
        return None
    if len(weights) < len(arguments):
        return NO_PRODUCTS
    axes = _channel_axes(kernel, param)
    return _fewest([narrow_products(array(each), axis) for each in weights for axis in axes]) if axes else NO_PRODUCTS


def _channel_axes(kernel: tirx.PrimFunc, param: tirx.Var) -> set[int]:
    """Return which axes of a buffer are a sum's last spatial one, where it is summed over others: output channels."""
    axes: set[int] = set()

    def visit(block: s_tir.SBlock) -> None:
        kinds = [iterator.iter_type for iterator in block.iter_vars]
        spatial = [iterator.var for iterator in block.iter_vars if iterator.iter_type == tirx.IterVar.DataPar]
        if tirx.IterVar.CommReduce not in kinds or not spatial:
            return
        for region in block.reads:
            if region.source.same_as(param):
                axes.update(n for n, index in enumerate(region.region) if index.min.same_as(spatial[-1]))

    tvm_ffi.structural_walk(kernel.body, (s_tir.SBlock, visit))
    return axes


def _fewest(counts: Sequence[Narrow]) -> Narrow:
    return Narrow(*map(min, zip(*counts, strict=True)))
