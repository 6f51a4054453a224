"""Rounding a float32 to an int32 becomes the one instruction that CPUs have for it."""

from __future__ import annotations

import tvm
from tvm import relax, te, tirx
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from nnfuze_tvm.dataflow import Emitter, bindings, op_name, output_fields, substitute


@module_pass(opt_level=0, name="RoundToInteger")
class RoundToInteger:
    """Replace ``astype(round(x), "int32")`` by LLVM's ``lrint``, where the current target is LLVM's.

    Both round to the nearest even integer. LLVM has no way of its own from a rounding and a conversion to the
    instruction that does both.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        target = Target.current(allow_none=True)
        if target is None or str(target.kind) != "llvm":
            return mod
        builder = relax.BlockBuilder(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                builder.update_func(gvar, _rewrite(func, builder))
        result = relax.transform.DeadCodeElimination()(builder.get())
        return result.with_attrs(dict(mod.attrs.items())) if mod.attrs is not None else result


def _lrint(data: te.Tensor) -> te.Tensor:
    def element(*index: tirx.Var) -> tirx.PrimExpr:
        return tirx.call_llvm_pure_intrin("int32", "llvm.lrint", data(*index))

    return te.compute(data.shape, element, name="lrint")


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    emitter = Emitter()
    values: dict[relax.Expr, relax.Expr] = {}
    rounded: dict[relax.Expr, relax.Expr] = {}
    for binding in bindings(func):
        value = substitute(binding.value, values)
        if op_name(value) == "astype" and str(value.attrs.dtype) == "int32" and value.args[0] in rounded:
            value = builder.call_te(_lrint, rounded[value.args[0]], primfunc_name_hint="lrint")
        new = emitter.emit(value, binding.var.name)
        values[binding.var] = new
        if op_name(value) == "round" and str(value.args[0].ty.dtype.dtype) == "float32":
            rounded[new] = value.args[0]
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)
