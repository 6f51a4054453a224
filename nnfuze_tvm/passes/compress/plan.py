"""What becomes 8 bits: decided by operators and who reads what, without looking at any numbers."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields, readers
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.compress.delicate import Delicate
from nnfuze_tvm.passes.compress.lone_sums import without_lone_sums
from nnfuze_tvm.passes.compress.quantizable import quantizable, why_not

# What is computed from codes and gives codes: values are moved, put side by side, or averaged.
NARROW = ("moves", "joins", "averages")


def layer_of(call: Call) -> ops.Layer:
    """Return where a layer that can be quantized has its channels."""
    found = ops.layer(call)
    assert found is not None
    return found


def effect(value: Value | None) -> str:
    """Return what a bound value's call does to values, see `operator.Effect`."""
    return "" if value is None else ops.effect_of(value)


def _follows(value: Value) -> bool:
    """Tell whether an operator's result is made of 8 bits where all that it reads is."""
    operator = ops.of(value)
    return operator is not None and (effect(value) in NARROW or operator.bounds or op_name(value) == "add")


def _grows(value: Value, known: Container[Value]) -> bool:
    """Tell whether a value grows at least in proportion to those of its operands that are known: 8 bits fit it, too."""
    degrees = zip(operands(value), ops.degrees(value), strict=True)
    return all(degree is not None and degree >= 1 for leaf, degree in degrees if leaf in known)


@dataclass
class Plan:
    """Decides which tensors of a function become 8 bits, without looking at any numbers.

    Parameters
    ----------
    func : tvm.relax.Function
        A straight-line function of real numbers.
    names : set of str
        The layers that shall become integer; then those that do.

    Attributes
    ----------
    layers
        The calls of the layers that become integer.
    points
        Tensors that get a quantize and a dequantize, each with the representative of those it shares its
        scale with.
    left
        The layers that shall become integer and don't, each with the reason.
    """

    func: relax.Function
    names: set[str]
    layers: dict[Var, Call] = field(default_factory=dict)
    points: dict[Value, Value] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = set(self.func.params)
        self.made_by = {b.var: b.value for b in bindings(self.func)}
        self.order = {var: k for k, var in enumerate(self.made_by)}
        self.readers = readers(self.func)
        self._origins: dict[Value, Value] = {}
        for var, value in self.made_by.items():
            known = {self._origins.get(leaf, leaf) for leaf in operands(value) if isinstance(leaf, Var)}
            self._origins[var] = known.pop() if effect(value) == "maps" and len(known) == 1 else var
        self.outputs = {leaf for out in output_fields(self.func) for leaf in operands(out)}
        self.delicate = Delicate(self.func)
        for var, value in self.made_by.items():
            if var.name in self.names:
                reason = self._why_not(var, value)
                if reason is None:
                    self.layers[var] = value
                else:
                    self.left[var.name] = reason
        self.names = {var.name for var in self.layers}
        self._same: dict[Value, Value] = {}
        integer = without_lone_sums(self._integer(), self.made_by, self.readers)
        for var in self.made_by:
            if var in integer:
                self._demand(var, self.made_by[var])
        self.points = {tensor: self._representative(tensor) for tensor in self.points}

    def bias(self, layer: Var) -> tuple[Var, GenericConst] | None:
        """Return the add behind a layer and its constant, if the layer has a bias."""
        readers = self.readers.get(layer, [])
        if len(readers) == 1 and layer not in self.outputs and op_name(self.made_by[readers[0]]) == "add":
            for arg in self.made_by[readers[0]].args:
                if isinstance(arg, GenericConst):
                    return readers[0], arg
        return None

    def reads_codes(self, reader: Var, tensor: Value) -> bool:
        """Tell whether a call computes from the 8 bits of one of its operands that is a point."""
        wide = effect(self.made_by[reader]) not in NARROW and op_name(self.made_by[reader]) not in ("add", "multiply")
        # A float operator reads the caller's own numbers; of an inner one only the 8 bits are kept.
        return not (wide and tensor in self.params) and (reader, tensor) not in self.delicate.exact

    def source(self, tensor: Value) -> Value:
        """Return the tensor whose numbers these are, before they were moved about."""
        while self._effect(tensor) in ("moves", "joins"):
            tensor = next(leaf for leaf in operands(self.made_by[tensor]) if isinstance(leaf, Var))
        return tensor

    def _why_not(self, layer: Var, value: Call) -> str | None:
        if not quantizable(value):
            return why_not(value)
        cause = self.delicate.causes.get(layer)
        return None if cause is None else f"{cause} follows, for which 8 bits are too coarse near zero"

    def _integer(self) -> set[Value]:
        """Return the Vars that are computed from 8-bit tensors."""
        found: set[Value] = set()
        for var, value in self.made_by.items():
            if var in self.delicate.causes:
                continue
            name = op_name(value)
            tensors = [leaf for leaf in operands(value) if isinstance(leaf, Var)]
            known = [leaf in found for leaf in tensors]
            alone = self._has_one_origin(var)
            if (
                var in self.layers
                or (_follows(value) and known and all(known))
                or (isinstance(value, relax.TupleGetItem) and all(known))
                or (name == "multiply" and len(tensors) == 2 and any(known) and all(map(static_shape, tensors)))
                or (alone and any(known) and _grows(value, found))
            ):
                found.add(var)
        return found

    def _demand(self, var: Var, value: Value) -> None:
        """Note what an integer operator wants of its operands."""
        name = op_name(value)
        tensors = [leaf for leaf in operands(value) if isinstance(leaf, Var)]
        if var in self.layers or effect(value) == "averages":
            self._quantize(tensors[0])
        elif effect(value) == "joins":
            for tensor in tensors:
                self._quantize(tensor)
                self._join(self.source(tensors[0]), self.source(tensor))
        elif name in ("add", "multiply") and len(tensors) == 2 and not self._has_one_origin(var):
            summed = self._summed(tensors) if name == "add" else None
            for tensor in tensors:
                if summed is None or not tensor.same_as(summed):
                    self._quantize(tensor)

    def _has_one_origin(self, var: Var) -> bool:
        """Tell whether a tensor is computed element by element from one other.

        As an activation, it is computed from the other's floats, in the epilogue of what makes that.
        """
        return not self._origins[var].same_as(var)

    def _summed(self, tensors: list[Value]) -> Value | None:
        """Return the operand of an add that stays a sum in int32, because a layer makes it for this add only.

        Of two such layers it is the first: kernels are fused in this order, so the add joins that one.
        """
        own = [tensor for tensor in tensors if len(self.readers[tensor]) == 1 and self._is_sum(tensor)]
        return min(own, key=lambda tensor: self.order[tensor]) if own else None

    def _is_sum(self, tensor: Value) -> bool:
        if tensor in self.outputs:
            return False
        if tensor in self.layers:
            return True
        value = self.made_by.get(tensor)
        leaves = [leaf for leaf in operands(value) if isinstance(leaf, Var)] if value is not None else []
        return (
            op_name(value) == "add"
            and len(leaves) == 1
            and self.readers[leaves[0]] == [tensor]
            and self._is_sum(leaves[0])
        )

    def _effect(self, tensor: Value) -> str:
        """Return what the call that makes a tensor does to 8 bits; nothing where floats are read, too."""
        value = self.made_by.get(tensor)
        if tensor in self.delicate.causes:
            return ""
        if isinstance(value, relax.TupleGetItem) and effect(self.made_by.get(value.tuple_value)) == "moves":
            return "moves"
        return effect(value)

    def _quantize(self, tensor: Value) -> None:
        """Make a tensor 8 bits: at its source, and for a concatenation at all of its sources."""
        kind = self._effect(tensor)
        if kind not in ("moves", "joins"):
            self.points.setdefault(tensor, tensor)
            return
        leaves = [leaf for leaf in operands(self.made_by[tensor]) if isinstance(leaf, Var)]
        for leaf in leaves if kind == "joins" else leaves[:1]:
            self._quantize(leaf)
            if kind == "joins":
                self._join(self.source(leaves[0]), self.source(leaf))

    def _representative(self, tensor: Value) -> Value:
        while tensor in self._same:
            tensor = self._same[tensor]
        return tensor

    def _join(self, first: Value, second: Value) -> None:
        first, second = self._representative(first), self._representative(second)
        if not first.same_as(second):
            self._same[second] = first
