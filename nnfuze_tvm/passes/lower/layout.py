"""Channels last in activations and convolution weights, with the transposes moved out of the way."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, readers, substitute
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.lone_rows import lone_rows

# Poolings follow their input; to name them here is an error.
DESIRED_LAYOUTS = {
    "relax.nn.conv1d": ["NWC", "OWI"],
    "relax.nn.conv2d": ["NHWC", "OHWI"],
    "relax.nn.conv3d": ["NDHWC", "ODHWI"],
}

Axes = tuple[int, ...]

# TVM's builders make an underscore of a dot in a name. No name of a layer has this character (`ir.clean_name`).
_DOT = "|"


@module_pass(opt_level=0, name="ToNHWC")
class ToNHWC:
    """Convert convolutions and poolings to NHWC/OHWI (of any rank) and cancel the transposes in between.

    ``relax.transform.ConvertLayout`` puts a transpose on both sides of every operator that it knows nothing
    about, quantize and dequantize among them. Those are moved through and cancelled; transposes of constants
    are computed, and a transpose that only moves axes of length one becomes a reshape. A convolution that transposes
    would be made for alone stays as it is, see `lone_rows`.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions converted."""
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                named = _with_names(func, lambda name: name.replace(".", _DOT))
                mod.update_func(gvar, _with_flat_norms(named))
        lone = [call for func in mod.functions.values() if isinstance(func, relax.Function) for call in lone_rows(func)]

        def desired(call: Call) -> dict[str, list[str]]:
            stays = any(call.same_as(each) for each in lone)
            return {"relax.nn.conv1d": ["NCW", "OIW"]} if stays else DESIRED_LAYOUTS

        mod = relax.transform.ConvertLayout(DESIRED_LAYOUTS, desired)(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod.update_func(gvar, _TransposeMover().rewrite(func))
        return relax.transform.DeadCodeElimination()(mod)


def _with_names(func: relax.Function, rename: Callable[[str], str]) -> relax.Function:
    """Return ``func`` with its Vars renamed."""
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        values[binding.var] = emitter.emit(substitute(binding.value, values), rename(binding.var.name))
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _with_flat_norms(func: relax.Function) -> relax.Function:
    """Return ``func`` with one axis in place of the last several ones that a normalization is over.

    ConvertLayout moves the axes of the data, but not those of the constants that it is scaled with.
    """
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        value = substitute(binding.value, values)
        if op_name(value) in ("nn.layer_norm", "nn.rms_norm") and len(value.attrs.axes) > 1:
            value = _flat_norm(emitter, value)
        values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _flat_norm(emitter: Emitter, call: Call) -> Value:
    data, *constants = call.args
    shape = static_shape(data)
    flat = emitter.emit(relax.op.reshape(data, (*shape[: -len(call.attrs.axes)], -1)))
    own = [emitter.emit(relax.op.reshape(constant, (-1,))) for constant in constants]
    if op_name(call) == "nn.rms_norm":
        result = relax.op.nn.rms_norm(flat, *own, [-1], call.attrs.epsilon)
    else:
        result = relax.op.nn.layer_norm(flat, *own, [-1], call.attrs.epsilon, call.attrs.center, call.attrs.scale)
    return relax.op.reshape(emitter.emit(result), shape)


def _names(func: relax.Function) -> dict[Value, str]:
    """Return other names for Vars: ConvertLayout gave those of layers to transposes behind them."""
    layers = {b.var for b in bindings(func) if ops.is_layer(b.value)}
    found: dict[Value, str] = {}
    for binding in bindings(func):
        if op_name(binding.value) == "permute_dims" and binding.value.args[0] in layers and "/" in binding.var.name:
            found |= {binding.value.args[0]: binding.var.name, binding.var: "lv"}
    return found


def _shuffles(func: relax.Function) -> dict[Value, tuple[Value, Axes, Axes]]:
    """Return by results of shuffled channels (axis 1): what is shuffled, as which axes, and in which order of these.

    A shuffle splits the channels, permutes what it made of them, and joins that, with nothing read in between.
    """
    made = {b.var: b.value for b in bindings(func)}
    read_by, returned = readers(func), set(output_fields(func))

    def before(value: Value, name: str) -> Value | None:
        """Return what a value is made of by an operator; None if it is read elsewhere, too, or made otherwise."""
        alone = len(read_by.get(value, ())) == 1 and value not in returned
        return made[value].args[0] if value in made and op_name(made[value]) == name and alone else None

    found: dict[Value, tuple[Value, Axes, Axes]] = {}
    for joined, value in made.items():
        turned = value.args[0] if op_name(value) == "reshape" else None
        apart = None if turned is None else before(turned, "permute_dims")
        data = None if apart is None else before(apart, "reshape")
        if data is None or turned is None or isinstance(data, GenericConst):
            continue
        count, channels, *space = static_shape(data)
        shape = static_shape(apart)
        parts = shape[1 : len(shape) - len(space)]
        axes = tuple(int(axis) for axis in made[turned].attrs.axes or range(len(shape))[::-1])
        inner = axes[1 : 1 + len(parts)]
        shuffled = (count, *parts, *space) == shape and prod(parts) == channels
        outside = (0, *range(1 + len(parts), len(shape)))
        if shuffled and (axes[0], *axes[1 + len(parts) :]) == outside and static_shape(joined) == static_shape(data):
            found[joined] = (data, parts, tuple(axis - 1 for axis in inner))
    return found


class _TransposeMover:
    """Rebuild a straight-line function, keeping transposes pending until an operator needs their result."""

    def __init__(self) -> None:
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}
        self.pending: dict[Value, tuple[Value, Axes]] = {}
        self.bound: dict[Value, Call] = {}
        self.names: dict[Value, str] = {}
        self.shuffles: dict[Value, tuple[Value, Axes, Axes]] = {}
        # What several operators read transposed is transposed once.
        self.moved: dict[tuple[Value, Axes], Value] = {}

    def rewrite(self, func: relax.Function) -> relax.Function:
        """Return ``func`` with its transposes moved."""
        self.names, self.shuffles = _names(func), _shuffles(func)
        for binding in bindings(func):
            self._bind(binding.var, binding.value)
        outputs = [self._read(field) for field in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _bind(self, var: Var, value: Value) -> None:
        if isinstance(value, Var) and value in self.pending:
            self.pending[var] = self.pending[value]
            return
        name = op_name(value)
        if name == "permute_dims":
            self._permute(var, value)
            return
        if name == "reshape":
            source, axes = self.pending.get(value.args[0], (None, ()))
            if source is not None and _moves_only_unit_axes(static_shape(source), axes):
                self.values[var] = self._emit(relax.op.reshape(source, value.args[1]), var)
                return
            if isinstance(value.args[0], GenericConst):
                self.values[var] = relax.const(value.args[0].value.numpy().reshape(static_shape(var)))
                return
        if self._move_through(var, value) or self._pool_channels_last(var, value) or self._shuffle(var):
            return
        self.values[var] = self._emit(self._read(value), var)

    def _move_through(self, var: Var, value: Value) -> bool:
        """Compute ``value`` from operands that still have their old order of axes, if it can be."""
        operator = ops.of(value)
        if operator is None or operator.transposed is None:
            return False
        operands = operator.operands(value)
        axes = next((self.pending[arg][1] for arg in operands if arg in self.pending), None)
        if axes is None:
            return False
        sources = [self._in_order(arg, axes) for arg in operands]
        if any(source is None for source in sources):
            return False
        others = [arg for arg in value.args if isinstance(arg, Var) and not any(arg.same_as(each) for each in operands)]
        rest = [self._read(arg) if any(arg.same_as(each) for each in others) else arg for arg in value.args]
        moved = operator.transposed(Call(value.op, rest, value.attrs, value.ty_args, value.span), sources, axes)
        if moved is None:
            return False
        self.pending[var] = (self._emit(moved, var), axes)
        return True

    def _pool_channels_last(self, var: Var, value: Value) -> bool:
        """Pool data that no convolution made, channels last, too."""
        operator, layout = ops.of(value), str(getattr(getattr(value, "attrs", None), "layout", ""))
        if operator is None or operator.transposed is None or "pooling" not in operator.kernels or layout[:2] != "NC":
            return False
        rank = len(layout)
        source = self.emitter.emit(relax.op.permute_dims(self._read(value.args[0]), [0, *range(2, rank), 1]))
        back = (0, rank - 1, *range(1, rank - 1))
        pooled = operator.transposed(value, [source], back)
        if pooled is not None:
            self.pending[var] = (self._emit(pooled, var), back)
        return pooled is not None

    def _shuffle(self, var: Var) -> bool:
        """Shuffle channels where they stand."""
        data, parts, order = self.shuffles.get(var, (None, (), ()))
        if data not in self.pending:
            return False
        source, axes = self.pending[data]
        shape, at = static_shape(source), axes[1]
        apart = [*shape[:at], *parts, *shape[at + 1 :]]
        turned = [*range(at), *(at + axis for axis in order), *range(at + len(parts), len(apart))]
        value = self.emitter.emit(relax.op.reshape(source, apart))
        value = self.emitter.emit(relax.op.permute_dims(value, turned))
        self.pending[var] = (self._emit(relax.op.reshape(value, shape), var), axes)
        return True

    def _in_order(self, expr: Value, axes: Axes) -> Value | None:
        """Return an operand whose transposition by ``axes`` is ``expr``; None if it takes work to get it."""
        if expr in self.pending:
            source, own = self.pending[expr]
            return source if own == axes else None
        if isinstance(expr, GenericConst):
            shape = static_shape(expr)
            wide = expr.value.numpy().reshape((1,) * (len(axes) - len(shape)) + shape)
            back = sorted(range(len(axes)), key=axes.__getitem__)
            return expr if wide.size == 1 else relax.const(np.ascontiguousarray(wide.transpose(back)))
        return None

    def _permute(self, var: Var, call: Call) -> None:
        operand = call.args[0]
        rank = len(static_shape(var))
        axes = tuple(int(a) % rank for a in call.attrs.axes) if call.attrs.axes else tuple(range(rank))[::-1]
        if isinstance(operand, GenericConst):
            self.values[var] = _transposed(operand, axes)
            return
        if operand in self.pending:
            source, inner = self.pending[operand]
        else:
            source, inner = self._read(operand), tuple(range(rank))
        axes = tuple(inner[a] for a in axes)
        if axes == tuple(range(rank)):
            self.values[var] = source
            return
        made_by = self.bound.get(source)
        dequantized = made_by is not None and op_name(made_by) == "dequantize"
        if made_by is not None and dequantized and isinstance(made_by.args[0], GenericConst):
            data, scale, zero = made_by.args
            axis = axes.index(int(made_by.attrs.axis) % rank)
            moved = relax.op.dequantize(_transposed(data, axes), scale, zero, axis, made_by.attrs.out_dtype)
            self.values[var] = self._emit(moved, var)
            return
        self.pending[var] = (source, axes)

    def _emit(self, value: Value, var: Var) -> Value:
        emitted = self.emitter.emit(value, self.names.get(var, var.name).replace(_DOT, "."))
        if isinstance(value, Call):
            self.bound[emitted] = value
        return emitted

    def _read(self, expr: Value) -> Value:
        """Return ``expr`` over the rebuilt function's variables, with the transposes it needs carried out."""
        if expr in self.values:
            return self.values[expr]
        if expr in self.pending:
            source, axes = self.pending[expr]
            shape = static_shape(source)
            if _moves_only_unit_axes(shape, axes):
                self.values[expr] = self.emitter.emit(relax.op.reshape(source, [shape[a] for a in axes]))
            else:
                if (source, axes) not in self.moved:
                    self.moved[source, axes] = self.emitter.emit(relax.op.permute_dims(source, list(axes)))
                self.values[expr] = self.moved[source, axes]
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._read(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._read(expr.tuple_value), expr.index)
        if isinstance(expr, Call):
            return Call(expr.op, [self._read(arg) for arg in expr.args], expr.attrs, expr.ty_args, expr.span)
        return expr


def _transposed(constant: GenericConst, axes: Axes) -> GenericConst:
    return relax.const(np.ascontiguousarray(constant.value.numpy().transpose(axes)))


def _moves_only_unit_axes(shape: Axes, axes: Axes) -> bool:
    kept = [a for a in axes if shape[a] != 1]
    return kept == sorted(kept)
