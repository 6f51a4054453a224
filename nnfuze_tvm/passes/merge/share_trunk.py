"""Compute once what is computed twice."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm_ffi import StructuralKey

from nnfuze_tvm.graph import dataflow, ir, ops


@tvm.transform.module_pass(opt_level=0, name="ShareTrunk")
class ShareTrunk:
    """Share what is structurally equal and has bit-equal constants, across tasks and within one.

    Value numbering over ``main``: a binding gets the number of an earlier one if its operator, its attributes
    and the numbers of its operands are the same. Names and positions do not matter, so networks that were
    trained from one trunk share exactly as deep as their weights agree. Equal constants are stored once,
    whether or not what reads them is shared. The names of layers that are dropped become aliases of those that
    are kept.
    """

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return ``mod`` with ``main`` rewritten."""
        numbering = _Numbering()
        main = numbering.rewrite(mod["main"])
        mod = dataflow.with_main(mod, main)
        return ir.with_aliases(mod, numbering.dropped) if numbering.dropped else mod


class _Numbering:
    """One walk over a function."""

    def __init__(self) -> None:
        self.dropped: dict[str, str] = {}
        self._values: dict[Any, dataflow.Value] = {}
        self._constants: dict[bytes, list[GenericConst]] = {}
        self._numbers: dict[dataflow.Value, int] = {}

    def rewrite(self, func: relax.Function) -> relax.Function:
        emitter = dataflow.Emitter()
        new: dict[dataflow.Value, dataflow.Value] = {}
        for param in func.params:
            emitter.unique(param.name)
        for binding in dataflow.bindings(func):
            for leaf in dataflow.operands(binding.value):
                if isinstance(leaf, GenericConst) and leaf not in new:
                    new[leaf] = self._constant(leaf)
            value = dataflow.substitute(binding.value, new)
            key = self._key(value)
            if key in self._values:
                new[binding.var] = self._values[key]
                if "/" in binding.var.name:  # a layer's, not lv
                    self.dropped[binding.var.name] = self._values[key].name
                continue
            new[binding.var] = emitter.emit(value, binding.var.name)
            if key is not None:
                self._values[key] = new[binding.var]
        return emitter.finish(
            func.params, [dataflow.substitute(out, new) for out in dataflow.output_fields(func)], func.attrs
        )

    def _number(self, leaf: dataflow.Value) -> int:
        return self._numbers.setdefault(leaf, len(self._numbers))

    def _key(self, value: dataflow.Value) -> Any:
        """Return what two bindings have in common when they compute the same; None if they never do."""
        if isinstance(value, Call):
            if not isinstance(value.op, tvm.ir.Op) or not value.op.get_attr("FPurity"):
                return None
            operator = ops.of(value)
            if operator is not None and operator.opaque:
                return None
            return (
                value.op.name,
                tuple(self._key(arg) for arg in value.args),
                None if value.attrs is None else StructuralKey(value.attrs),
                tuple(StructuralKey(ty) for ty in value.ty_args),
            )
        if isinstance(value, relax.Tuple):
            return ("tuple", tuple(self._key(field) for field in value.fields))
        if isinstance(value, relax.TupleGetItem):
            return ("field", self._key(value.tuple_value), value.index)
        if isinstance(value, tvm.ir.Var | GenericConst):
            return self._number(value)
        return StructuralKey(value)

    def _constant(self, constant: GenericConst) -> GenericConst:
        """Return the first constant with the same bits."""
        raw = _bytes(constant)
        digest = hashlib.blake2b(f"{constant.ty}".encode(), digest_size=16)
        digest.update(raw.data)
        bucket = self._constants.setdefault(digest.digest(), [])
        for known in bucket:
            if np.array_equal(_bytes(known), raw):
                return known
        bucket.append(constant)
        return constant


def _bytes(constant: GenericConst) -> np.ndarray:
    return np.ascontiguousarray(constant.value.numpy()).reshape(-1).view(np.uint8)
