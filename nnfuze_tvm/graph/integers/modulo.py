"""Sums, differences and products of int32 modulo 2^32, in kernels.

What TVM's own operators make may be taken for free of overflow. These are of 64 bits until LLVM's passes see that half
of that is cut off; TVM sees operators that it doesn't look into, as its analysis of ranges takes minutes for a chain of
the former.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache

import tvm
from tvm import tirx

_NAMES: dict[str, Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}
_PURE = 1


def add(a: tirx.PrimExpr, b: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the sum of two int32 modulo 2^32."""
    return _call("add", a, b)


def subtract(a: tirx.PrimExpr, b: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the difference of two int32 modulo 2^32."""
    return _call("subtract", a, b)


def multiply(a: tirx.PrimExpr, b: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the product of two int32 modulo 2^32."""
    return _call("multiply", a, b)


def _call(name: str, a: tirx.PrimExpr, b: tirx.PrimExpr) -> tirx.PrimExpr:
    return tirx.call_intrin("int32", f"tirx.nnfuze_modulo_{name}", a, b)


@cache
def install() -> None:
    """Register the operators with TVM, in every process that reads kernels."""
    for name, apply in _NAMES.items():
        _register(f"tirx.nnfuze_modulo_{name}", apply)


def _register(name: str, apply: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]) -> None:
    def lower(call: tvm.ir.Call) -> tirx.PrimExpr:
        return apply(*(each.astype(_wide(each)) for each in call.args)).astype(call.ty.dtype)

    tvm.ir.register_op_attr(name, "TCallEffectKind", _PURE)
    tvm.ir.register_op_attr(name, "TVectorizable", True)
    tirx.register_intrin_lowering(name, target="llvm", f=lower)


def _wide(value: tirx.PrimExpr) -> str:
    lanes = value.ty.dtype.lanes
    return "int64" if lanes == 1 else f"int64x{lanes}"


install()
