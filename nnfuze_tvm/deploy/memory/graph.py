"""The bindings of a function that calls kernels as steps over buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import GlobalVar, Type

from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.offsets import aligned
from nnfuze_tvm.deploy.memory.overwrites import may_overwrite
from nnfuze_tvm.deploy.memory.work import Step, Work
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields
from nnfuze_tvm.graph.ir import nbytes

Overwrite = tuple[GlobalVar, int, int]
"""A kernel, one of its results and one of its operands."""


class Graph:
    """What the kernels of a function are to its memory.

    Parameters
    ----------
    main : tvm.relax.Function
        A straight-line function that calls kernels.
    loops : dict of GlobalVar to PrimFunc
        The kernels, as loops.
    may : dict, optional
        Which results of kernels may lie over which operands, as far as that is known already; gets what is new.

    Attributes
    ----------
    work : Work
        The steps.
    calls : list of VarBinding
        What computes something, one binding per step.
    views : list of VarBinding
        What gives other names and shapes to what is there.
    """

    def __init__(
        self, main: relax.Function, loops: dict[GlobalVar, tirx.PrimFunc], may: dict[Overwrite, bool] | None = None
    ) -> None:
        self.main = main
        self.loops = loops
        self.calls: list[relax.VarBinding] = []
        self.views: list[relax.VarBinding] = []
        self._bound = {binding.var for binding in bindings(main)}
        self._fields: dict[Value, list[frozenset[int]]] = {}
        self._sizes: list[int] = []
        self._may = {} if may is None else may
        steps = []
        for binding in bindings(main):
            fields = self._view(binding.value)
            if fields is not None:
                self._fields[binding.var] = fields
                self.views.append(binding)
            else:
                steps.append(self._step(binding))
                self.calls.append(binding)
        kept = frozenset[int]().union(*map(self._buffers, output_fields(main)))
        self.work = Work(self._sizes, steps, kept)

    def kernel(self, n: int) -> GlobalVar | None:
        """Return the kernel that a step calls."""
        value = self.calls[n].value
        return value.args[0] if op_name(value) == "call_tir" else None

    def operand(self, n: int, buffer: int) -> int:
        """Return the place of the operand of a step's kernel that is in a buffer."""
        return next(place for place, each in enumerate(self.calls[n].value.args[1]) if buffer in self._buffers(each))

    def bound(self, value: Value) -> list[Value]:
        """Return the variables that a value reads and that are not parameters."""
        return [leaf for leaf in operands(value) if leaf in self._bound]

    def _buffers(self, value: Value) -> frozenset[int]:
        """Return the buffers that a value is in."""
        parts = [part for leaf in operands(value) for part in self._fields.get(leaf, ())]
        return frozenset[int]().union(*parts)

    def _view(self, value: Value) -> list[frozenset[int]] | None:
        """Return per field the buffers of a value that needs none of its own, None if it is computed."""
        if isinstance(value, relax.Tuple):
            return [self._buffers(part) for part in value.fields]
        if isinstance(value, relax.TupleGetItem):
            fields = self._fields.get(value.tuple_value)
            return None if fields is None or len(fields) <= value.index else [fields[value.index]]
        if isinstance(value, tvm.ir.Var):
            return self._fields.get(value, [frozenset()])
        return [self._buffers(value.args[0])] if op_name(value) == "reshape" else None

    def _step(self, binding: relax.VarBinding) -> Step:
        value = binding.value
        takes = tuple(sorted(self._buffers(value)))
        if op_name(value) != "call_tir":
            # What this returns may be a part of what it takes.
            made = self._new(0)
            self._fields[binding.var] = [frozenset((*takes, made))]
            return Step(takes, (made,))
        new = [self._new(aligned(_size(ty))) for ty in results(value)]
        self._fields[binding.var] = [frozenset([buffer]) for buffer in new]
        scratch = sum(aligned(kernels.buffer_size(b)) for b in kernels.scratch(self.loops[value.args[0]]))
        return Step(takes, tuple(new), scratch, self._over(value, new))

    def _new(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def _over(self, call: Value, made: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return which of its results a kernel can write over which buffers that it takes."""
        read = [self._buffers(operand) for operand in call.args[1]]
        found: list[tuple[int, int]] = []
        for result, (buffer, ty) in enumerate(zip(made, results(call), strict=True)):
            for place, own in enumerate(read):
                alone = len(own) == 1 and sum(bool(own & other) for other in read) == 1
                if alone and _alike(call.args[1][place].ty, ty) and self._can(call, result, place):
                    found.append((buffer, min(own)))
        return tuple(found)

    def _can(self, call: Value, result: int, operand: int) -> bool:
        key = call.args[0], result, operand
        if key not in self._may:
            own = tvm_ffi.StructuralKey(self.loops[key[0]])
            self._may[key] = _may_overwrite(own, len(call.args[1]) + result, operand)
        return self._may[key]


# Whoever looks at a network's memory twice asks this of the same kernels.
@lru_cache(maxsize=256)
def _may_overwrite(kernel: tvm_ffi.StructuralKey, result: int, operand: int) -> bool:
    return may_overwrite(kernel.key, kernel.key.params[result], kernel.key.params[operand])


def results(call: Value) -> list[Type]:
    """Return the types of what a kernel computes."""
    return list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]


def _size(ty: Type) -> int:
    return nbytes([int(dim) for dim in ty.shape.values], str(ty.dtype))


def _alike(one: Type, other: Type) -> bool:
    """Tell whether two tensors have the same shape and numbers."""
    return str(one.dtype) == str(other.dtype) and list(map(int, one.shape.values)) == list(map(int, other.shape.values))
