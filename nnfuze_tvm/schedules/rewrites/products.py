"""Products that are added to something are rounded by themselves where the result becomes 8 bits.

LLVM makes one instruction of a multiplication and an addition, which rounds once, where a CPU has it: a number that is
halfway between two codes would get one code here and the other there. Codes are to be the same bits everywhere.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

_CODES = ("int8", "uint8")
# What LLVM computes nothing across.
_FENCE = "llvm.arithmetic.fence"


def round_products(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose float32 products are rounded before they are added, if it makes codes of floats.

    Sums of a reduction stay what they are: those of codes are integers.
    """
    stores: list[tirx.BufferStore] = []
    tvm_ffi.structural_walk(func.body, (tirx.BufferStore, stores.append))
    if not any(_type(store.buffer) in _CODES and _is_of_floats(store) for store in stores):
        return func

    def visit(store: tirx.BufferStore) -> tirx.BufferStore:
        if not _is_of_floats(store) or _adds_up(store):
            return store
        value = tvm_ffi.structural_map(store.value, ((tirx.Add, tirx.Sub), _apart))
        # What is kept in a buffer is read from a register, and may be added there.
        return tirx.BufferStore(store.buffer, _rounded(value), store.indices)

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.BufferStore, visit)))


def _apart(total: tirx.Add | tirx.Sub) -> tirx.Expr:
    return type(total)(_rounded(total.a), _rounded(total.b))


def _rounded(value: tirx.Expr) -> tirx.Expr:
    if isinstance(value, tirx.Mul) and _type(value) == "float32":
        return tirx.call_llvm_pure_intrin(value.ty.dtype, _FENCE, value)
    return value


def _is_of_floats(store: tirx.BufferStore) -> bool:
    found: list[tirx.Mul] = []
    tvm_ffi.structural_walk(store.value, (tirx.Mul, found.append))
    return any(_type(product) == "float32" for product in found)


def _adds_up(store: tirx.BufferStore) -> bool:
    """Whether what is stored is made of what was there."""
    loads: list[TensorLoad] = []
    tvm_ffi.structural_walk(store.value, (TensorLoad, loads.append))
    return any(load.source.same_as(store.buffer) for load in loads)


def _type(value: tirx.Expr | tirx.Buffer) -> str:
    return str(value.ty.dtype).partition("x")[0]
