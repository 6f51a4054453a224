"""Back from float32 to 8 bits by the few instructions that CPUs have for it."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax, te, tirx
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name, output_fields, substitute

Rounding = Callable[[tirx.Expr], tirx.Expr]
"""From a float32 expression to the nearest (even) int32 one."""


@module_pass(opt_level=0, name="RoundToInteger")
class RoundToInteger:
    """Replace ``astype(round(x), "int32")`` by what the machine has one instruction for.

    All round to the nearest even integer. LLVM has no way of its own from TVM's rounding and a conversion to the
    instruction that does both. Where a machine narrows integers with saturation, what follows becomes that, too: to
    int16, then to 8 bits, so that bounds are left to compare with only in 8 bits, sixteen at a time.

    Parameters
    ----------
    nearest : callable, optional
        The machine's way from a float32 expression to the nearest int32; without one the graph stays as it is.
    saturating : bool
        The machine narrows integers with saturation in one instruction.
    """

    def __init__(self, nearest: Rounding | None, saturating: bool = False) -> None:
        self.nearest = nearest
        self.saturating = saturating

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        if self.nearest is None:
            return mod
        builder = relax.BlockBuilder(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                builder.update_func(gvar, _rewrite(func, builder, self.nearest, self.saturating))
        result = relax.transform.DeadCodeElimination()(builder.get())
        return result.with_attrs(dict(mod.attrs.items())) if mod.attrs is not None else result


def _narrow(data: te.Tensor, low: int, high: int, dtype: str) -> te.Tensor:
    """Return int32 bounded and in 8 bits, by steps of which each is an instruction of a machine that saturates."""

    def element(*index: tirx.Var) -> tirx.PrimExpr:
        value = data(*index)
        for bits, kind in ((16, "int16"), (8, dtype)):
            least, most = (0, 255) if kind == "uint8" else (-(1 << bits - 1), (1 << bits - 1) - 1)
            value = tirx.max(
                tirx.min(value, tirx.const(most, value.ty.dtype)), tirx.const(least, value.ty.dtype)
            ).astype(kind)
        if low > least:
            value = tirx.max(value, tirx.const(low, dtype))
        return tirx.min(value, tirx.const(high, dtype)) if high < most else value

    return te.compute(data.shape, element, name="narrow")


def _bounds(value: relax.Expr, clipped: dict[relax.Expr, relax.Expr]) -> tuple[relax.Expr, int, int, str] | None:
    """Return of a conversion of bounded int32 to 8 bits: the int32, its bounds and the dtype."""
    if op_name(value) != "astype" or value.args[0] not in clipped:
        return None
    dtype, clip = str(value.attrs.dtype), clipped[value.args[0]]
    low, high = (int(bound.value) for bound in clip.args[1:3])
    least, most = {"int8": (-128, 127), "uint8": (0, 255)}.get(dtype, (1, 0))
    return (clip.args[0], low, high, dtype) if least <= low <= high <= most else None


def _rewrite(func: relax.Function, builder: relax.BlockBuilder, nearest: Rounding, saturating: bool) -> relax.Function:
    def lrint(data: te.Tensor) -> te.Tensor:
        return te.compute(data.shape, lambda *index: nearest(data(*index)), name="lrint")

    emitter = Emitter()
    values: dict[relax.Expr, relax.Expr] = {}
    rounded: dict[relax.Expr, relax.Expr] = {}
    clipped: dict[relax.Expr, relax.Expr] = {}
    for binding in bindings(func):
        value = substitute(binding.value, values)
        bounds = _bounds(value, clipped) if saturating else None
        if op_name(value) == "astype" and str(value.attrs.dtype) == "int32" and value.args[0] in rounded:
            value = builder.call_te(lrint, rounded[value.args[0]], primfunc_name_hint="lrint")
        elif bounds is not None:
            value = builder.call_te(_narrow, *bounds, primfunc_name_hint="narrow")
        new = emitter.emit(value, binding.var.name)
        values[binding.var] = new
        if op_name(value) == "round" and str(value.args[0].ty.dtype.dtype) == "float32":
            rounded[new] = value.args[0]
        if op_name(value) == "clip" and str(value.ty.dtype.dtype) == "int32":
            clipped[new] = value
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)
