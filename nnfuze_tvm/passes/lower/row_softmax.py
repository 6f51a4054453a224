"""Softmax with one quotient per row."""

from __future__ import annotations

from tvm import relax, te, tirx
from tvm.ir import Call

from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.keep_nan import Legalize, by_tvm


def legalizations() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write softmax of float32 along the last axis."""
    return {"relax.nn.softmax": _softmax}


def _softmax(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    """Write softmax as TVM does, but for the last step: a product with 1 / sum instead of a quotient per number."""
    shape = static_shape(call)
    axis = int(call.attrs.axis) % len(shape)
    if str(call.ty.dtype) != "float32" or axis != len(shape) - 1 or axis == 0:
        return by_tvm(builder, call)
    rows = shape[:-1]

    def softmax(data: te.Tensor) -> te.Tensor:
        k, m = (te.reduce_axis((0, shape[-1]), name) for name in "km")
        largest = te.compute(rows, lambda *i: te.max(data(*i, k), axis=k), name="T_softmax_maxelem")
        powers = te.compute(shape, lambda *i: tirx.exp(data(*i) - largest(*i[:-1])), name="T_softmax_exp")
        sums = te.compute(rows, lambda *i: te.sum(powers(*i, m), axis=m), name="T_softmax_expsum")

        def part(*i: tirx.Var) -> tirx.Expr:
            return powers(*i) * (tirx.const(1.0, "float32") / sums(*i[:-1]))

        return te.compute(shape, part, name="T_softmax_norm")

    result = builder.call_te(softmax, call.args[0], primfunc_name_hint="softmax")
    gvar = result.args[0]
    builder.update_func(gvar, builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    return result
