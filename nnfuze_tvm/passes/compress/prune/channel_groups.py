"""Which channels of a network can only be removed together.

One walk over a function asks every operator what it does to the labels of its operands (`graph.channels`); the classes
of equal labels are then the sets of channels that live and die together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import Call

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.channels import FIXED, CoupledLayer, Coupling, Labels, arrays, fixed
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.folding import folded


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that occur side by side in the same tensors, and so compete for being kept.

    ``classes`` are the representatives of the removable units, ``layers`` the layers that make them.
    """

    classes: np.ndarray
    layers: list[CoupledLayer]

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [layer.name for layer in self.layers]


class CoupledFunction(Coupling):
    """The coupled channels of one straight-line function, whose constant subgraphs are computed first.

    Parameters
    ----------
    func : relax.Function
        The function.
    open_end : bool
        The last output goes on as the beginning of something else, so that its channels need not stay.

    Attributes
    ----------
    func : relax.Function
        The function.
    bindings, outputs : list
        Its bindings and output fields, constants folded.
    """

    def __init__(self, func: relax.Function, open_end: bool = False) -> None:
        super().__init__()
        self.func = func
        self.bindings, self.outputs = folded(func)
        for param in func.params:
            self.labels[param] = fixed(param.ty)
        for binding in self.bindings:
            operator = ops.of(binding.value)
            couple = None if operator is None else operator.couple
            labels = None if couple is None else couple(self, binding.var, binding.value)
            self.labels[binding.var] = self._hand_on(binding) if labels is None else labels
        for output in self.outputs[:-1] if open_end else self.outputs:
            self.fix(self.of(output))

    def _hand_on(self, binding: relax.VarBinding) -> Labels | tuple:
        """Return the labels of a value whose operator says nothing: safe, because nothing around it is removed."""
        value: Value = binding.value
        if isinstance(value, relax.TupleGetItem):
            source = self.of(value.tuple_value)
            assert isinstance(source, tuple)
            return source[value.index]
        if isinstance(value, relax.Tuple):
            return self.of(value)
        for arg in value.args if isinstance(value, Call) else []:
            self.fix(self.of(arg))
        return fixed(binding.var.ty)

    def groups(self) -> list[ChannelGroup]:
        """Return the groups of removable channels, in the order of their first layers.

        Two classes are in one group if they occur in exactly the same axes of the same tensors. Every axis is
        then a union of whole groups, and as long as each group keeps a channel no tensor becomes empty.
        """
        roots = self.channels.roots()
        part = np.zeros(len(roots), "int64")
        count = 1
        for axis in arrays(tuple(self.labels.values())):
            if axis.any():
                members = np.unique(roots[axis])
                members = members[members != FIXED]
                before, refined = np.unique(part[members], return_inverse=True)
                part[members] = count + refined
                count += len(before)
        layers: dict[int, list[CoupledLayer]] = {}
        for layer in self.layers.values():
            for number in np.unique(part[roots[layer.outputs]]).tolist():
                layers.setdefault(number, []).append(layer)
        layers.pop(0, None)
        return [
            ChannelGroup(np.flatnonzero((part == number) & (roots == np.arange(len(roots)))), members)
            for number, members in layers.items()
        ]
