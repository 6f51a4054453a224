"""Batch normalization and other per-channel constants disappear into the layer before them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, operands, substitute
from nnfuze_tvm.graph.folding import folded
from nnfuze_tvm.graph.ir import static_shape


@module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """Fold per-channel affine chains into the weights and the bias of the layer that precedes them.

    A chain is any sequence of ``batch_norm`` (inference form) and add, subtract, multiply, divide by
    constants that vary along the channel axis only. Behind a convolution (grouped and transposed ones too)
    or a matmul with constant weights, whose result nothing else reads, it becomes scaled weights and one
    add. A batch norm elsewhere becomes one multiply and one add. The arithmetic is done in float64 and
    rounded once.

    ``relax.transform.FoldBatchnormToConv2D`` only knows ``conv2d`` with the batch norm right behind it, in
    OIHW, and loses the names of the layers.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the batch norms of all its functions folded."""
        functions = {
            gvar: _Folder(func).rewrite() for gvar, func in mod.functions_items() if isinstance(func, relax.Function)
        }
        mod = mod.clone()
        for gvar, func in functions.items():
            mod.update_func(gvar, func)
        return mod


@dataclass
class _Affine:
    """``scale * x + shift`` per channel (float64 vectors, or None for one and zero)."""

    scale: np.ndarray | None = None
    shift: np.ndarray | None = None

    def then(self, scale: np.ndarray | None, shift: np.ndarray | None) -> _Affine:
        """Return this map followed by ``scale * y + shift``."""

        def times(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
            return b if a is None else a if b is None else a * b

        moved = None if self.shift is None else times(self.shift, scale)
        return _Affine(times(self.scale, scale), shift if moved is None else moved if shift is None else moved + shift)


@dataclass
class _Chain:
    """A layer and the affine operators behind it."""

    layer: relax.VarBinding
    axis: int
    affine: _Affine


class _Folder:
    """Rewrites one function."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.bindings, self.outputs = folded(func)
        self.bound = {b.var: b.value for b in self.bindings}
        values = [b.value for b in self.bindings]
        self.uses = Counter(leaf for value in [*values, *self.outputs] for leaf in operands(value))

    def rewrite(self) -> relax.Function:
        """Return the rewritten function."""
        chains = self._chains()
        last = {id(chain): var for var, chain in chains.items()}
        replaced = {b.value.tuple_value for b in self.bindings if self._batch_norm(b.value) is not None}
        emitter = Emitter()
        for param in self.func.params:
            emitter.unique(param.name)
        done: dict[Value, Value] = {}
        for binding in self.bindings:
            chain = chains.get(binding.var)
            if binding.var in replaced:
                continue
            if chain is None:
                affine = self._batch_norm(binding.value)
                if affine is not None:
                    done[binding.var] = self._apply(emitter, affine, done, binding)
                else:
                    done[binding.var] = emitter.emit(substitute(binding.value, done), binding.var.name)
            elif binding is chain.layer:
                end = last[id(chain)]
                done[end] = self._layer(emitter, chain, done, end.name)
        return emitter.finish(self.func.params, [substitute(out, done) for out in self.outputs], self.func.attrs)

    def _chains(self) -> dict[Value, _Chain]:
        """Return the chain that each Var is part of; a chain's last Var comes last."""
        chains: dict[Value, _Chain] = {}
        for binding in self.bindings:
            axis = _channel_axis(binding.value)
            if axis is not None:
                chains[binding.var] = _Chain(binding, axis, _Affine())
                continue
            source, step = self._step(binding.value, chains)
            if source is not None and step is not None:
                chain = chains[source]
                chain.affine = chain.affine.then(step.scale, step.shift)
                chains[binding.var] = chain
        return chains

    def _step(self, value: Value, chains: dict[Value, _Chain]) -> tuple[Value | None, _Affine | None]:
        """Return what ``value`` does to the end of a chain that only ``value`` reads."""
        norm = self._batch_norm(value)
        if norm is not None:
            call = self.bound[value.tuple_value]
            source = call.args[0]
            if source in chains and self.uses[source] == 1 and call.attrs.axis == chains[source].axis:
                return source, norm
            return None, None
        operator = ops.of(value)
        if operator is None or operator.affine is None:
            return None, None
        left, right = value.args
        source, const, swapped = (right, left, True) if isinstance(left, GenericConst) else (left, right, False)
        if not isinstance(const, GenericConst) or source not in chains or self.uses[source] != 1:
            return None, None
        vector = _per_channel(array(const), static_shape(source), chains[source].axis)
        affine = None if vector is None else operator.affine(vector, swapped)
        return (None, None) if affine is None else (source, _Affine(*affine))

    def _batch_norm(self, value: Value) -> _Affine | None:
        """Return the affine map when ``value`` is field 0 of a batch norm in inference form."""
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        call = self.bound.get(value.tuple_value)
        if call is None or op_name(call) != "nn.batch_norm" or call.attrs.training:
            return None
        if self.uses[value.tuple_value] != 1:
            return None
        if not all(isinstance(arg, GenericConst) for arg in call.args[1:]):
            return None
        gamma, beta, mean, variance = (array(arg).astype("float64") for arg in call.args[1:])
        scale = 1 / np.sqrt(variance + float(call.attrs.epsilon))
        if call.attrs.scale:
            scale = scale * gamma
        shift = -mean * scale
        return _Affine(scale, shift + beta if call.attrs.center else shift)

    def _apply(self, emitter: Emitter, affine: _Affine, done: dict[Value, Value], binding: relax.VarBinding) -> Value:
        """Emit a batch norm that stands alone as multiply and add."""
        assert affine.scale is not None and affine.shift is not None
        call = self.bound[binding.value.tuple_value]
        source = substitute(call.args[0], done)
        shape, dtype = static_shape(source), str(source.ty.dtype.dtype)
        broadcast = [-1 if a == call.attrs.axis % len(shape) else 1 for a in range(len(shape))]
        scale, shift = (constant(v.reshape(broadcast), dtype) for v in (affine.scale, affine.shift))
        product = emitter.emit(relax.op.multiply(source, scale), f"{binding.var.name}_scale")
        return emitter.emit(relax.op.add(product, shift), binding.var.name)

    def _layer(self, emitter: Emitter, chain: _Chain, done: dict[Value, Value], end: str) -> Value:
        """Emit a layer with its chain folded in."""
        call, name = chain.layer.value, chain.layer.var.name
        data, weight = call.args
        value, affine = array(weight), chain.affine
        if affine.scale is not None:
            value = _scaled(call, value, affine.scale)
            call = Call(call.op, [data, constant(value)], call.attrs, call.ty_args)
        result = emitter.emit(substitute(call, done), name)
        if affine.shift is None:
            return result
        rank = len(static_shape(chain.layer.var))
        shape = [-1] if op_name(call) == "matmul" else [-1 if a == chain.axis else 1 for a in range(rank)]
        bias = constant(affine.shift.reshape(shape), str(result.ty.dtype.dtype))
        return emitter.emit(relax.op.add(result, bias), end)


def _channel_axis(value: Value) -> int | None:
    """Return the axis of the output channels if ``value`` is a floating-point layer with constant weights."""
    layer = ops.layer(value)
    if layer is None:
        return None
    data, weight = value.args[:2]
    return layer.result if array(weight).dtype.kind == "f" and data.ty.dtype == weight.ty.dtype else None


def _per_channel(value: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray | None:
    """Return a constant operand as one number per channel, or None where it varies along another axis."""
    if value.dtype.kind != "f" or value.ndim > len(shape):
        return None
    padded = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if any(size != 1 for a, size in enumerate(padded.shape) if a != axis):
        return None
    return np.broadcast_to(padded.ravel().astype("float64"), (shape[axis],))


def _scaled(call: Call, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the weights of a layer whose output channels are multiplied by ``scale``."""
    layer = ops.layer(call)
    assert layer is not None
    filters = layer.filters.unpack(weight.astype("float64"))
    factors = scale.reshape(*filters.shape[:2], *[1] * (filters.ndim - 2))
    return layer.filters.pack(filters * factors).astype(weight.dtype)
