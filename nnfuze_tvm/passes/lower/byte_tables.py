"""Tables of which rows are picked (embeddings) stay in 8 bits, where their numbers were made of such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values

# Smaller tables are not worth the look.
_LEAST = 1 << 16
# Numbers of a table that are looked at before all of them are.
_SOME = 1 << 14
# Float32 quotients that round the same way as the scale that is sought.
_NEAR = range(-2, 3)


@module_pass(opt_level=0, name="ByteTables")
class ByteTables:
    """Hold large float32 tables as bytes and scales, per table or per row, if that gives the same bits.

    Weight-only files have them so; a row is multiplied when it is picked.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, lambda func, _builder: with_values(func, partial(_narrow, {})))


@dataclass(frozen=True)
class _Bytes:
    """Codes, what is added to them, and scales ``[]`` or ``[rows, 1]``."""

    codes: GenericConst
    least: int
    scale: GenericConst

    @staticmethod
    def of(table: np.ndarray) -> _Bytes | None:
        """Return the bytes that a table was made of, None if it was not."""
        found = _per_table(table)
        found = _per_row(table) if found is None else found
        if found is None:
            return None
        codes, scale = found
        if codes.min() >= -128 and codes.max() <= 127:
            return _Bytes(constant(codes, "int8"), 0, constant(scale))
        least = int(codes.min())
        return _Bytes(constant(codes - least, "uint8"), least, constant(scale))


def _narrow(known: dict[Value, _Bytes | None], value: Value, _name: str, emitter: Emitter) -> Value | None:
    if not _picks_rows(value):
        return None
    table, rows = value.args
    if table not in known:
        known[table] = _Bytes.of(array(table))
    if (found := known[table]) is None:
        return None
    real = emitter.emit(op.astype(emitter.emit(_take(value, found.codes, rows)), "float32"))
    if found.least:
        real = emitter.emit(op.add(real, relax.const(float(found.least), "float32")))
    per_row = bool(found.scale.ty.ndim)
    return op.multiply(real, emitter.emit(_take(value, found.scale, rows)) if per_row else found.scale)


def _take(call: Call, table: Value, rows: Value) -> Call:
    return op.take(table, rows, 0, str(call.attrs.mode))


def _picks_rows(value: Value) -> bool:
    if op_name(value) != "take" or not isinstance(value.args[0], GenericConst) or value.attrs.axis is None:
        return False
    shape, dtype = value.args[0].ty.shape.values, str(value.args[0].ty.dtype)
    sizes = [int(size) for size in shape]
    known = isinstance(value.args[1], GenericConst)
    return (
        len(sizes) == 2
        and not known
        and int(value.attrs.axis) in (0, -2)
        and dtype == "float32"
        and (sizes[0] * sizes[1] >= _LEAST)
    )


def _per_table(table: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return codes within 255 steps and the scale ``[]`` that they are multiplied by, None if there are none."""
    some = np.unique(table.ravel()[:: max(table.size // _SOME, 1)])
    largest = np.abs(table).max()
    if len(some) > 256 or not np.isfinite(largest) or not largest:
        return None
    for steps in range(1, 256):
        for scale in _near(largest / np.float32(steps)):
            if _codes(some, scale) is not None and (codes := _codes(table, scale)) is not None:
                return (codes, scale) if np.ptp(codes) <= 255 else None
    return None


def _per_row(table: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return codes of at most 127, which each row reaches, and the scales ``[rows, 1]``."""
    for rows in (table[:: max(len(table) // 16, 1)], table):
        largest = np.abs(rows).max(1, keepdims=True)
        if not np.isfinite(largest).all():
            return None
        scales, missing = np.ones_like(largest), largest[:, 0] > 0
        for each in _near(largest / np.float32(127)):
            right = missing & (np.rint(rows / np.maximum(each, 1e-37)) * each == rows).all(1)
            scales[right], missing = each[right], missing & ~right
            if not missing.any():
                break
        if missing.any():
            return None
    return np.rint(table / scales).astype("int64"), scales


def _near(quotient: np.ndarray) -> Iterator[np.ndarray]:
    """Give float32 numbers around a quotient, the nearest first."""
    bits = np.asarray(quotient, "float32").view("int32")
    for step in sorted(_NEAR, key=abs):
        yield (bits + np.int32(step)).view("float32")


def _codes(values: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """Return the whole numbers that give the values, if there are such."""
    whole = np.rint(values / scale)
    return whole.astype("int64") if np.abs(whole).max() <= 255 and (whole * scale == values).all() else None
