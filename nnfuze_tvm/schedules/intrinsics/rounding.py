"""Float32 to the nearest (even) int32 by the one instruction that a CPU has for it.

For AArch64's ``fcvtns`` LLVM has no generic operation that becomes this instruction in vectors, and takes the
instruction's own intrinsic for whole registers only. So the operator here is vectorized by TVM to any number of lanes,
and then taken apart.
"""

from __future__ import annotations

import tvm
from tvm import tirx

_NEAREST = "tirx.nnfuze_nearest"
# The nearest float that is an integer.
_ROUND = "tirx.nearbyint"
_LANES = 4
_PURE = 1
# TVM's own rules have level 10.
_ABOVE_TVM = 11


def lrint(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the nearest int32 to a float32, by LLVM's own operation."""
    return tirx.call_llvm_pure_intrin("int32", "llvm.lrint", x)


def fcvtns(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the nearest int32 to a float32, by AArch64's instruction."""
    return tirx.call_intrin("int32", _NEAREST, x)


def _lower(call: tvm.ir.Call) -> tirx.PrimExpr:
    (x,) = call.args
    lanes = x.ty.dtype.lanes

    def convert(part: tirx.PrimExpr) -> tirx.PrimExpr:
        own = part.ty.dtype.lanes
        dtype = f"int32x{own}" if own > 1 else "int32"
        return tirx.call_llvm_pure_intrin(dtype, "llvm.aarch64.neon.fcvtns", part)

    if lanes in (1, 2, _LANES):
        return convert(x)
    width = _LANES if lanes % _LANES == 0 else 1
    vector = tirx.Var("x", x.ty)
    parts = [convert(tirx.Shuffle([vector], list(range(at, at + width)))) for at in range(0, lanes, width)]
    return tirx.Let(vector, x, tirx.Shuffle(parts, list(range(lanes))))


def install() -> None:
    """Register the operator with TVM, and that its rounding of floats is one of vectors, too.

    Otherwise TVM takes every vector apart whose numbers are rounded, with all that is computed of them.
    """
    tvm.ir.register_op_attr(_ROUND, "TVectorizable", True, level=_ABOVE_TVM)
    tvm.ir.register_op_attr(_NEAREST, "TCallEffectKind", _PURE)
    tvm.ir.register_op_attr(_NEAREST, "TVectorizable", True)
    tirx.register_intrin_lowering(_NEAREST, target="llvm", f=_lower)
