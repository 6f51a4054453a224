"""What a network costs, read from its graph: MACs, parameters, bytes, sparsity, kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph import ir, ops, packed_weights
from nnfuze_tvm.graph.dataflow import bindings, op_name, operands, output_fields

_INTEGERS = ("int8", "uint8", "int16", "uint16")


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of the work.

    Attributes
    ----------
    name : str
        The layer's name (``<task>/<node>``).
    op : str
        The operator: ``nn.conv2d``, ``matmul``, …
    macs : int
        Multiply-accumulates of one inference.
    parameters : int
        Elements of its weight and its bias.
    integer : bool
        Whether it computes on integers (or on dequantized ones, which `RealizeInteger` makes integers of).
    tasks : tuple of str
        The tasks whose outputs depend on it.
    shape : tuple of int
        Shape of its output.
    depth : int
        Number of layers on the longest way from an input to it.
    origins : tuple of str
        The networks' own layers whose work it does, or a part of it (`graph.Lineage.names`).
    """

    name: str
    op: str
    macs: int
    parameters: int
    integer: bool
    tasks: tuple[str, ...]
    shape: tuple[int, ...]
    depth: int
    origins: tuple[str, ...]


@dataclass(frozen=True)
class LoweredKernel:
    """One kernel of a lowered module.

    Attributes
    ----------
    name : str
        Name of the PrimFunc.
    calls : int
        How often one inference calls it.
    arguments : tuple
        Shape and dtype per argument, results last.
    tasks : tuple of str
        The tasks whose outputs depend on one of the calls.
    layers : tuple of str
        The layers that it computes, call by call.
    rule : str
        The schedule rule that made it.
    knobs : dict
        What the rule chose, by name.
    parallel : bool
        Whether it runs on several threads where it may.
    """

    name: str
    calls: int
    arguments: tuple[tuple[tuple[int, ...], str], ...]
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    rule: str
    knobs: dict[str, int | str]
    parallel: bool


@dataclass(frozen=True)
class Size:
    """What a module has to store: every distinct constant counts once, scalars don't.

    Attributes
    ----------
    parameters : int
        Elements.
    bytes : int
        Bytes.
    zeros : float
        Fraction of the elements that are zero.
    """

    parameters: int
    bytes: int
    zeros: float


def layers(mod: tvm.IRModule) -> list[LayerCost]:
    """Return the layers of a module (before or after the merge, not lowered), in execution order.

    In a module after `InsertQDQ` a layer counts as integer if its input and its weight are dequantized.
    """
    found: list[LayerCost] = []
    lineage = ir.lineage(mod)
    for func, owners in _functions(mod):
        bound = {b.var: b.value for b in bindings(func)}
        tasks = _tasks_of(func, owners)
        users: dict = {}
        for binding in bindings(func):
            for leaf in operands(binding.value):
                users.setdefault(leaf, []).append(binding)
        depths: dict = {}
        for binding in bindings(func):
            call = binding.value
            depth = max((depths.get(leaf, 0) for leaf in operands(call)), default=0)
            depths[binding.var] = depth + (ops.is_layer(call))
            if ops.is_layer(call):
                weight = _constant(call.args[1], bound)
                size = 0 if weight is None else math.prod(_shape(weight))
                found.append(
                    LayerCost(
                        name=binding.var.name,
                        op=op_name(call),
                        macs=ops.macs(call),
                        parameters=size + _bias_size(binding.var, call, bound, users),
                        integer=_is_integer_layer(call, bound),
                        tasks=tuple(tasks.get(binding.var, ())),
                        shape=_shape(binding.var),
                        depth=depth,
                        origins=tuple(lineage.names(binding.var.name)),
                    )
                )
    return found


def size(mod: tvm.IRModule) -> Size:
    """Return what the constants of all Relax functions of a module add up to, as they are stored (`ir.sources`)."""
    sources = ir.sources(mod)
    seen: set[tuple[int, str]] = set()
    elements = total = zeros = 0
    for func, _ in _functions(mod):
        for constant in _constants(func):
            array = np.from_dlpack(constant.value) if _viewable(constant) else constant.value.numpy()
            if source := sources.get(array.ctypes.data):
                array = np.from_dlpack(source)
            key = (array.ctypes.data, str(array.dtype))
            if array.ndim == 0 or array.size == 0 or (_viewable(constant) and key in seen):
                continue
            seen.add(key)
            elements += array.size * (packed_weights.IN_WORD if array.dtype == packed_weights.WORD else 1)
            total += array.nbytes
            zeros += array.size - int(np.count_nonzero(array))
    return Size(elements, total, zeros / elements if elements else 0.0)


def weight_sparsity(mod: tvm.IRModule) -> float:
    """Return the fraction of the layers' weights that is zero."""
    elements = zeros = 0
    for func, _ in _functions(mod):
        bound = {b.var: b.value for b in bindings(func)}
        weights = [_constant(b.value.args[1], bound) for b in bindings(func) if ops.is_layer(b.value)]
        for constant in {w for w in weights if w is not None}:
            array = constant.value.numpy()
            elements += array.size
            zeros += array.size - int(np.count_nonzero(array))
    return zeros / elements if elements else 0.0


def kernels(lowered: tvm.IRModule) -> list[LoweredKernel]:
    """Return the kernels that ``main`` of a lowered or finished module calls, in order of their first call."""
    main = lowered["main"]
    tasks = _tasks_of(main, [o.task for o in ir.task_outputs(lowered)])
    calls: Counter[str] = Counter()
    arguments: dict[str, tuple] = {}
    used_by: dict[str, dict[str, None]] = {}
    layers: dict[str, dict[str, None]] = {}
    for binding in bindings(main):
        call = binding.value
        if op_name(call) not in ("call_tir", "call_tir_inplace"):
            continue
        name = call.args[0].name_hint
        calls[name] += 1
        made = _tensors(call)
        if op_name(call) == "call_tir_inplace":
            made = [each for each, over in zip(made, call.attrs.inplace_indices, strict=True) if int(over) < 0]
        arguments[name] = (*_tensors(call.args[1]), *made)
        used_by.setdefault(name, {}).update(dict.fromkeys(tasks.get(binding.var, ())))
        layers.setdefault(name, {}).update(dict.fromkeys(ir.layers_of(binding.var)))
    return [
        LoweredKernel(
            name, calls[name], arguments[name], tuple(used_by[name]), tuple(layers[name]), *_schedule(lowered[name])
        )
        for name in calls
    ]


def _schedule(func: tirx.PrimFunc) -> tuple[str, dict[str, int | str], bool]:
    """Return a scheduled kernel's rule and knobs, and whether it has a parallel loop."""
    loops: list[tirx.For] = []
    tvm_ffi.structural_walk(func.body, (tirx.For, loops.append))
    parallel = any(loop.kind == tirx.ForKind.PARALLEL for loop in loops)
    knobs = func.attrs.get("nnfuze.knobs", {})
    values = {str(k): str(v) if isinstance(v, str) else int(v) for k, v in knobs.items()}
    return str(func.attrs.get("nnfuze.rule", "")), values, parallel


def _functions(mod: tvm.IRModule) -> Iterator[tuple[relax.Function, list[str]]]:
    """Yield each Relax function with the task of each of its outputs."""
    outputs = ir.task_outputs(mod)
    functions = {gv.name_hint: f for gv, f in mod.functions.items() if isinstance(f, relax.Function)}
    if "main" in functions and len(output_fields(functions["main"])) == len(outputs):
        yield functions["main"], [o.task for o in outputs]
        return
    for task in ir.tasks(mod):
        yield functions[task], [o.task for o in outputs if o.task == task]


def _tasks_of(func: relax.Function, owners: list[str]) -> dict:
    """Return for every Var the tasks whose outputs depend on it, in the order of the outputs."""
    tasks: dict = {}
    order = list(dict.fromkeys(owners))
    for field, owner in zip(output_fields(func), owners, strict=True):
        for leaf in operands(field):
            tasks.setdefault(leaf, set()).add(owner)
    for binding in reversed(bindings(func)):
        if found := tasks.get(binding.var):
            for leaf in operands(binding.value):
                if isinstance(leaf, relax.Var):
                    tasks.setdefault(leaf, set()).update(found)
    return {var: [t for t in order if t in found] for var, found in tasks.items()}


def _constants(func: relax.Function) -> Iterator[GenericConst]:
    for binding in bindings(func):
        yield from (leaf for leaf in operands(binding.value) if isinstance(leaf, GenericConst))
    for field in output_fields(func):
        yield from (leaf for leaf in operands(field) if isinstance(leaf, GenericConst))


def _viewable(constant: GenericConst) -> bool:
    return str(constant.value.dtype) not in ("bool", "bfloat16") and "float8" not in str(constant.value.dtype)


def _constant(expr: relax.Expr, bound: dict) -> GenericConst | None:
    """Return the constant that ``expr`` is, seen through quantization and changes of layout."""
    while not isinstance(expr, GenericConst):
        value = bound.get(expr, expr)
        if isinstance(value, GenericConst):
            return value
        if not isinstance(value, Call) or not _is_wrapper(value):
            return None
        expr = value.args[0]
    return expr


def _bias_size(var: relax.Var, call: relax.Expr, bound: dict, users: dict) -> int:
    """Return the elements of the constant that is added to a layer's result, per output channel."""
    channels = _output_channels(call)
    for _ in range(2):  # the bias, or an astype and then the bias
        consumers = users.get(var, [])
        if len(consumers) != 1:
            return 0
        value = consumers[0].value
        if op_name(value) == "add":
            other = value.args[1] if value.args[0].same_as(var) else value.args[0]
            constant = _constant(other, bound)
            if constant is not None and math.prod(_shape(constant)) == channels:
                return channels
            return 0
        if not _is_wrapper(value):
            return 0
        var = consumers[0].var
    return 0


def _output_channels(call: relax.Expr) -> int:
    operator = ops.of(call)
    layer = operator.layer(call) if operator is not None and operator.layer is not None else None
    return _shape(call)[-1 if layer is None else layer.result]


def _is_wrapper(value: relax.Expr) -> bool:
    """Tell whether an operator leaves numbers what they are, in another type or place."""
    operator = ops.of(value)
    return operator is not None and (operator.effect == "moves" or operator.retypes)


def _is_integer_layer(call: Call, bound: dict) -> bool:
    operator = ops.of(call)
    if operator is not None and operator.recurs is not None:
        return operator.recurs.already(call)
    return all(_is_integer(arg, bound) for arg in call.args[:2])


def _is_integer(expr: relax.Expr, bound: dict) -> bool:
    if str(expr.ty.dtype) in _INTEGERS:
        return True
    while (value := bound.get(expr)) is not None and (_is_wrapper(value) or op_name(value) == "nn.relu"):
        if op_name(value) == "dequantize":
            return True
        expr = value.args[0]
    return False


def _tensors(expr: relax.Expr) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and dtype of a tensor, or of every field of a tuple."""
    types = expr.ty.fields if isinstance(expr.ty, relax.TupleType) else [expr.ty]
    return [(tuple(int(dim) for dim in ty.shape.values), str(ty.dtype)) for ty in types]


def _shape(expr: relax.Expr) -> tuple[int, ...]:
    return ir.static_shape(expr)
