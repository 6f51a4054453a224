"""Loads of short rows that stay inside them.

LLVM loads a row of ten numbers that it knows to be aligned as sixteen: the bytes behind it share its cache line. What
they hold is nobody's, and where it looks like tiny floats, products with it take the processor a hundred cycles each
(Intel's "denormal assist"; a layer of ten channels with a PReLU took six times as long, or not, as the heap would have
it). So rows don't claim more alignment than their length has.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

# What TVM's buffers are aligned to, and about what the widest vectors hold.
_ALIGNMENT = 64


def keep_to_short_rows(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a kernel whose parameters of one row are aligned as their end is."""
    # What an instruction stands for is matched with the buffer it was written for, and that is an aligned one.
    matched: list[tvm.ir.Var] = []

    def collect(block: s_tir.SBlock) -> None:
        matched.extend(match.source.source for match in block.match_buffers)

    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, collect))
    kept: dict[tvm.ir.Var, tvm.ir.Var] = {}
    for param in func.params:
        if any(param.same_as(source) for source in matched):
            continue
        shape = [int(size) for size in param.shape]
        length = math.prod(shape) * np.dtype(str(param.dtype)).itemsize
        if shape and math.prod(shape) == shape[-1] and length % _ALIGNMENT:
            kept[param] = tirx.decl_buffer(param.shape, param.dtype, param.name, data_alignment=length & -length)
    if not kept:
        return func
    body = tvm_ffi.structural_map(func.body, (tvm.ir.Var, lambda var: kept.get(var, var)))
    return tirx.PrimFunc([kept.get(param, param) for param in func.params], body, func.ret_type, attrs=func.attrs)
