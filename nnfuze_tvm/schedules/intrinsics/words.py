"""Products of int16 in int32 by AArch64's ``smull``, in vectors of any number of lanes.

LLVM finds it by itself where as few bytes are widened as a vector has sums; sixteen bytes at a time it widens to int32
first, which takes twice the instructions. Like ``rounding``'s, this operator is vectorized by TVM and then taken apart.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

_PRODUCT = "tirx.nnfuze_word_product"
_KEY = "nnfuze.word_products"
_LANES = 4
_PURE = 1


def mark(sch: s_tir.Schedule, block: SBlockRV) -> None:
    """Mark a block whose products in int32 are of factors that int16 holds."""
    sch.annotate(block, _KEY, 1)


def multiply_words(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked blocks multiply int16."""

    def visit(block: s_tir.SBlock) -> s_tir.SBlock:
        if _KEY not in block.annotations:
            return block
        rest = {key: value for key, value in block.annotations.items() if key != _KEY}
        body = tvm_ffi.structural_map(block.body, (tirx.Mul, _product))
        parts = (block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init)
        return s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, rest)

    return func.with_body(tvm_ffi.structural_map(func.body, (s_tir.SBlock, visit)))


def _product(product: tirx.Mul) -> tirx.PrimExpr:
    factors = (product.a, product.b)
    if not all(isinstance(factor, tirx.Cast) and str(factor.ty.dtype) == "int32" for factor in factors):
        return product
    return tirx.call_intrin("int32", _PRODUCT, *(factor.value.astype("int16") for factor in factors))


def _lower(call: tvm.ir.Call) -> tirx.PrimExpr:
    lanes = call.args[0].ty.dtype.lanes
    if lanes % _LANES:
        a, b = (tirx.Cast(call.ty.dtype, factor) for factor in call.args)
        return a * b
    if lanes == _LANES:
        return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smull", *call.args)
    names = [tirx.Var(f"factor_{i}", factor.ty) for i, factor in enumerate(call.args)]
    parts = [
        tirx.call_llvm_pure_intrin(
            "int32x4",
            "llvm.aarch64.neon.smull",
            *(tirx.Shuffle([name], list(range(at, at + _LANES))) for name in names),
        )
        for at in range(0, lanes, _LANES)
    ]
    result: tirx.PrimExpr = tirx.Shuffle(parts, list(range(lanes)))
    for name, factor in zip(names, call.args, strict=True):
        result = tirx.Let(name, factor, result)
    return result


def install() -> None:
    """Register the operator with TVM."""
    tvm.ir.register_op_attr(_PRODUCT, "TCallEffectKind", _PURE)
    tvm.ir.register_op_attr(_PRODUCT, "TVectorizable", True)
    tirx.register_intrin_lowering(_PRODUCT, target="llvm", f=_lower)
