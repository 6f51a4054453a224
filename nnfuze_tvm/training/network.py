"""A Relax function as a ``torch.nn.Module`` whose parameters are its constants, and trained constants put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant, scalar
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute

try:
    import torch
except ImportError:
    raise NNFuzeError("training needs PyTorch: pip install 'nnfuze-tvm[train]'") from None


class Network(torch.nn.Module):
    """A straight-line function over float32 tensors, differentiable.

    Its parameters are the constants of several floats that calls read, named after the call's layer and the operand's
    place: ``trunk/conv/1`` is that layer's weight. A constant that is read several times is one parameter. What says
    which numbers integers stand for is none. What a function computes for the sample that it was compiled for, all with
    the same shapes, `forward` does for many.

    Parameters
    ----------
    func : tvm.relax.Function
        The function; its operators' PyTorch forms are in the registry (`graph.ops`).

    Raises
    ------
    NNFuzeError
        If the function has control flow or an operator without a PyTorch form.
    """

    def __init__(self, func: relax.Function) -> None:
        super().__init__()
        self._func = func
        self._names: dict[GenericConst, str] = {}
        self._constants: dict[GenericConst, torch.Tensor] = {}
        found = _bindings(func)
        self._constants |= {leaf: torch.from_numpy(array(leaf).copy()) for leaf in _steps(found)}
        for binding in found:
            for place, leaf in enumerate(operands(binding.value)):
                if isinstance(leaf, GenericConst):
                    self._add(leaf, f"{binding.var.name}/{place}")
        for leaf in output_fields(func):
            if isinstance(leaf, GenericConst):
                self._add(leaf, "output")

    def _add(self, leaf: GenericConst, name: str) -> None:
        if leaf in self._names or leaf in self._constants:
            return
        values = torch.from_numpy(array(leaf).copy())
        if not values.is_floating_point() or values.numel() < 2:
            self._constants[leaf] = values
            return
        # PyTorch's names have no dots.
        name = name.replace(".", "_")
        unique, count = name, 1
        while unique in self._parameters:
            count += 1
            unique = f"{name}_{count}"
        self._names[leaf] = unique
        if values.ndim == 4:
            # PyTorch computes in this order then, which is the faster one.
            values = values.contiguous(memory_format=torch.channels_last)
        self.register_parameter(unique, torch.nn.Parameter(values))

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input of one sample, by name."""
        return {param.name: tuple(int(dim) for dim in param.ty.shape.values) for param in self._func.params}

    def forward(self, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        """Return the outputs, in tuple order, of many samples.

        Parameters
        ----------
        inputs : mapping of str to torch.Tensor
            By parameter name ``[N, *shape]``: N samples of the function's own shapes.
        dtype : torch.dtype
            What is computed in where the function has float32; parameters, inputs and outputs are float32 all the same.

        Returns
        -------
        list of torch.Tensor
            ``[N, *shape]`` of each output.
        """

        def one(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = (_in(dtype, value) for value in values)
            known: dict[Value, Any] = dict(zip(self._func.params, given, strict=True))
            for binding in bindings(self._func):
                known[binding.var] = self._value(binding.value, known, dtype)
            fields = [self._value(field, known, dtype) for field in output_fields(self._func)]
            return tuple(fields[0] if len(fields) == 1 and isinstance(fields[0], list | tuple) else fields)

        names = [param.name for param in self._func.params]
        return [_in(torch.float32, value) for value in torch.func.vmap(one)(*(inputs[name] for name in names))]

    def _value(self, value: Value, known: Mapping[Value, Any], dtype: torch.dtype) -> Any:
        if isinstance(value, tvm.ir.Var):
            return known[value]
        if isinstance(value, GenericConst):
            name = self._names.get(value)
            return _in(dtype, self._constants[value] if name is None else self._parameters[name])
        if isinstance(value, relax.Tuple):
            return [self._value(field, known, dtype) for field in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, known, dtype)[value.index]
        if isinstance(value, Call):
            operator = ops.of(value)
            assert operator is not None and operator.train is not None
            found = operator.train(torch, value, *(self._value(arg, known, dtype) for arg in value.args))
            # An operator may make float32 of what it is given.
            return _in(dtype, found) if isinstance(found, torch.Tensor) else found
        return scalar(value)

    def trained(self) -> relax.Function:
        """Return the function with the parameters as they are now; what was not changed is the same, bit by bit."""
        new = {
            leaf: constant(np.ascontiguousarray(self._parameters[name].detach().numpy()), str(leaf.ty.dtype))
            for leaf, name in self._names.items()
        }
        emitter = Emitter()
        values: dict[Value, Value] = dict(new)
        emitter.copy(bindings(self._func), values)
        outputs = [substitute(field, values) for field in output_fields(self._func)]
        return emitter.finish(self._func.params, outputs, self._func.attrs)


def quickest() -> torch.dtype:
    """Return what a network learns in fastest here: bfloat16 where the CPU has products of it."""
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else torch.float32


def _in(dtype: torch.dtype, values: torch.Tensor) -> torch.Tensor:
    """Return float32 or what is computed in instead of it as ``dtype``, other values as they are."""
    return values.to(dtype) if values.dtype in (torch.float32, torch.bfloat16) else values


def _steps(bindings: Sequence[relax.VarBinding]) -> list[GenericConst]:
    """Return the scales and zero points that are constants."""
    calls = [b.value for b in bindings if op_name(b.value) in ("quantize", "dequantize")]
    return [leaf for call in calls for leaf in call.args[1:3] if isinstance(leaf, GenericConst)]


def _bindings(func: relax.Function) -> Sequence[relax.VarBinding]:
    """Return the bindings of a function that can be trained."""
    found = bindings(func)
    for binding in found:
        if isinstance(binding.value, Call):
            operator = ops.of(binding.value)
            if operator is None or operator.train is None:
                raise NNFuzeError(
                    f"layer {binding.var.name}: PyTorch has no form of {op_name(binding.value) or 'a kernel'} here"
                )
    return found
