"""An ONNX graph on its way: values by tensor, quantized ones behind QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nnfuze_tvm.frontend.tflite.file import Network, Operator, Quantization, Tensor

FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)
"""Channels from the end to the front, and back."""


@dataclass
class Variable:
    """What a variable's state is called (nothing: it needs none), its tensor, and its value by now, as it is stored."""

    state: str
    tensor: Tensor
    value: str


@dataclass
class Variables:
    """Variables by tensor or resource, the resources that tensors are handles of, and resources' values at first."""

    known: dict[int | str, Variable] = field(default_factory=dict)
    handles: dict[int, str] = field(default_factory=dict)
    initial: dict[int | str, np.ndarray] = field(default_factory=dict)


_ACTIVATIONS: dict[int, tuple[str, Sequence[float]]] = {
    1: ("Relu", ()),
    2: ("Clip", (-1.0, 1.0)),
    3: ("Clip", (0.0, 6.0)),
    4: ("Tanh", ()),
}


class Writer:
    """Collects nodes and constants.

    Attributes
    ----------
    network : Network
        What is converted.
    operator : Operator
        What is being converted: nodes are named after its first output.
    variables : Variables
        What the network keeps from one inference to the next.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.variables = network, Variables()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.operator: Operator | None = None
        self._names: dict[int, str] = {}
        self._used: set[str] = set()
        self._count = 0

    def bind(self, tensor: Tensor) -> str:
        """Return the name of a tensor's value as it is stored."""
        if tensor.data is not None and tensor.number not in self._names:
            self._names[tensor.number] = self.constant(tensor.data)
        return self._names.setdefault(tensor.number, tensor.name)

    def constant(self, value: Any, dtype: str | None = None) -> str:
        """Add a constant and return its name."""
        name = f"constant/{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(np.array(value, dtype, order="C"), name)
        return name

    def add(self, kind: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return the name of its output, or names if ``outputs`` is not 1."""
        assert self.operator is not None
        base = (*self.operator.outputs, *filter(None, self.operator.inputs))[0].name
        self._count += 1
        made = [f"{base}/{kind}.{self._count}" + (f".{n}" if n else "") for n in range(outputs)]
        # What does the work has the operator's name; what is around it has another.
        plain = kind not in ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity")
        name = base if plain and base not in self._used else made[0]
        self._used.add(name)
        self.nodes.append(helper.make_node(kind, inputs, made, name=name, **attributes))
        return made if outputs != 1 else made[0]

    def raw(self, index: int) -> str:
        """Return an input as it is stored."""
        return self.bind(self.given(index))

    def given(self, index: int) -> Tensor:
        """Return the tensor of an input.

        Raises
        ------
        ValueError
            If it is left out, or of a type that isn't supported.
        """
        assert self.operator is not None
        inputs = self.operator.inputs
        tensor = inputs[index] if index < len(inputs) else None
        if tensor is None:
            raise ValueError(f"its input {index} is missing")
        return checked(tensor)

    def has(self, index: int) -> bool:
        """Whether there is such an input."""
        assert self.operator is not None
        return index < len(self.operator.inputs) and self.operator.inputs[index] is not None

    def read(self, index: int, order: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> str:
        """Return an input as floats if it stands for such, its axes in another order or its shape another."""
        tensor = self.given(index)
        if tensor.data is not None and (order or shape is not None):
            data = tensor.data.reshape(shape) if shape is not None else tensor.data.transpose(order)
            name = self.constant(data)
        else:
            name = self.moved(self.bind(tensor), order, shape)
        axis = tensor.quantization.axis if tensor.quantization else 0
        if order and tensor.quantization and len(tensor.quantization.scale) > 1:
            axis = list(order).index(axis)
        return self.dequantized(name, tensor, axis)

    def moved(self, name: str, order: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> str:
        """Return a value with its axes in another order, or of another shape."""
        if shape is not None:
            name = self.add("Reshape", [name, self.constant(list(shape), "int64")])
        return self.add("Transpose", [name], perm=list(order)) if order else name

    def dequantized(self, name: str, tensor: Tensor, axis: int = 0) -> str:
        """Return the floats that a stored value stands for."""
        if tensor.quantization is None or not tensor.dtype.startswith(("int", "uint")):
            return name
        if tensor.dtype == "int64" and tensor.data is not None:
            # What is added to sums of 16 bits, which ONNX has no operator for.
            return self.constant(tensor.real)
        return self.add("DequantizeLinear", [name, *self._parameters(tensor.quantization, tensor.dtype)], axis=axis)

    def quantized(self, value: str, tensor: Tensor) -> str:
        """Return floats as a quantized tensor stores them."""
        assert tensor.quantization is not None
        return self.add("QuantizeLinear", [value, *self._parameters(tensor.quantization, tensor.dtype)])

    def write(
        self,
        value: str,
        index: int = 0,
        order: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        stored: bool = False,
    ) -> None:
        """Make a value the operator's output: floats, quantized here if the output is, unless they are ``stored`` so.

        ``order`` and ``shape`` are what it still needs to be the output.
        """
        assert self.operator is not None
        tensor = checked(self.operator.outputs[index])
        if tensor.quantization is not None and tensor.dtype.startswith(("int", "uint")) and not stored:
            value = self.quantized(value, tensor)
        value = self.moved(value, order, shape)
        if self.nodes and self.nodes[-1].output[0] == value and tensor.number not in self._names:
            self.nodes[-1].output[0] = self.bind(tensor)
        else:
            name = self.bind(tensor)
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))

    def activated(self, value: str, function: int) -> str:
        """Return a value behind the activation that is part of the operator.

        Raises
        ------
        ValueError
            If there is no such activation here.
        """
        if function == 0:
            return value
        if function not in _ACTIVATIONS:
            raise ValueError(f"its activation {function} is not supported")
        kind, bounds = _ACTIVATIONS[function]
        return self.add(kind, [value, *(self.constant(bound, "float32") for bound in bounds)])

    def _parameters(self, quantization: Quantization, dtype: str) -> list[str]:
        one = len(quantization.scale) == 1
        scale, zero = (v[0] if one else v for v in (quantization.scale, quantization.zero_point))
        return [self.constant(scale, "float32"), self.constant(zero, dtype)]


def checked(tensor: Tensor) -> Tensor:
    """Return the tensor.

    Raises
    ------
    ValueError
        If its type isn't supported, or it holds quantized values of a type that can't be computed with.
    """
    if not tensor.dtype:
        raise ValueError(f"the type of {tensor.name!r} is not supported")
    sums = tensor.dtype == "int64" and tensor.data is not None
    if tensor.quantization is not None and tensor.dtype not in ("int8", "uint8", "int16", "int32") and not sums:
        raise ValueError(f"{tensor.name!r} is quantized to {tensor.dtype}; only 8 and 16 bits are supported")
    return tensor
