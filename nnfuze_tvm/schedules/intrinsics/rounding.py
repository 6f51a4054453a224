"""Float32 to the nearest (even) int32 by the one instruction that a CPU has for it.

For AArch64's ``fcvtns`` LLVM has no generic operation that becomes this instruction in vectors, and takes the
instruction's own intrinsic for whole registers only. So the operator here is vectorized by TVM to any number of lanes,
and then taken apart.
"""

from __future__ import annotations

import tvm
from tvm import tirx

_NEAREST = "tirx.nnfuze_nearest"
_LANES = 4
_PURE = 1


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
    """Register the operator with TVM."""
    tvm.ir.register_op_attr(_NEAREST, "TCallEffectKind", _PURE)
    tvm.ir.register_op_attr(_NEAREST, "TVectorizable", True)
    tirx.register_intrin_lowering(_NEAREST, target="llvm", f=_lower)
