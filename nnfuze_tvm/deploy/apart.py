"""A network without its weights: a library that is given them when it is loaded.

TVM's libraries hold the constants of a network inside, and copy them when they are loaded. Here they are apart: the
library has a function `LOAD`, which takes them once and puts them where ``main`` has its constants. So a call of
``main`` costs what it did, weights can lie in a file that is mapped, and those that kernels read in a larger form than
they need (Winograd's, and numbers of 4 bits) are small in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.deploy import half_bytes
from nnfuze_tvm.deploy.manifest import WeightsRecord
from nnfuze_tvm.deploy.runner import LOAD
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.passes.lower.winograd import winograd_weights

# What is smaller stays in the library: a place in the file has as many bytes.
_LEAST = 64
# What stands for a constant until the weights are there: a number of no other constant.
_NOBODY = 0x6E6E66757A65 << 8
# The call in `LOAD` that `PutWeights` makes something of.
_KEEP = "nnfuze.keep"


@dataclass(frozen=True)
class Apart:
    """A lowered network and its weights.

    Attributes
    ----------
    mod : tvm.IRModule
        The network, which has a function `LOAD` if there are any weights.
    kept : list of numpy.ndarray
        The weights that kernels read as they are.
    spread : list of numpy.ndarray
        Those that `LOAD` makes larger ones of, ``[parts, n]``; bytes hold two numbers each.
    resident : int
        Bytes of the weights that kernels read.
    """

    mod: tvm.IRModule
    kept: list[np.ndarray]
    spread: list[np.ndarray]
    resident: int

    @property
    def arrays(self) -> list[np.ndarray]:
        """What `LOAD` takes."""
        return [*self.kept, *self.spread]

    @property
    def record(self) -> WeightsRecord:
        """What a manifest says of the weights."""
        kept, spread = ([(list(a.shape), str(a.dtype)) for a in arrays] for arrays in (self.kept, self.spread))
        return WeightsRecord(kept=kept, spread=spread)

    def tensors(self) -> list[tvm.runtime.Tensor]:
        """Return what `LOAD` takes here."""
        return [tvm.runtime.tensor(array) for array in self.arrays]


def take_apart(lowered: tvm.IRModule) -> Apart:
    """Take the weights out of a lowered network."""
    kept: dict[object, list[GenericConst]] = {}
    spread: dict[object, list[GenericConst]] = {}
    sources: dict[object, _Spread] = {}
    known, whole = ir.sources(lowered), ir.small_weights(lowered)
    for leaf in _constants(lowered["main"]):
        array = leaf.value.numpy()
        if array.ndim == 0 or array.nbytes < _LEAST or array.dtype.kind not in "biuf":
            continue  # of what NumPy has no dtype, neither has a manifest
        key = (array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).digest())
        if key not in sources and (small := _source(known.get(ir.address(leaf.value)), array, whole)) is not None:
            sources[key] = small
        (spread if key in sources else kept).setdefault(key, []).append(leaf)
    if not kept and not spread:
        return Apart(lowered, [], [], 0)
    groups = [*kept.values(), *spread.values()]
    vacant = {
        leaf: GenericConst(constant(np.array(_NOBODY + n, "int64")).value, group[0].ty)
        for n, group in enumerate(groups)
        for leaf in group
    }
    parts = [sources[key] for key in spread]
    mod = _with_load(_reading(lowered, vacant), [vacant[group[0]] for group in groups], len(kept), parts)
    arrays = [group[0].value.numpy() for group in groups]
    return Apart(mod, arrays[: len(kept)], [part.stored for part in parts], sum(array.nbytes for array in arrays))


def _constants(main: relax.Function) -> list[GenericConst]:
    values = [*(binding.value for binding in dataflow.bindings(main)), *dataflow.output_fields(main)]
    leaves = (leaf for value in values for leaf in dataflow.operands(value))
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, GenericConst)))


@dataclass(frozen=True)
class _Spread:
    """What larger weights are made of: taps ``[9, n]`` for tiles of an edge, or numbers of 4 bits, or both.

    ``stored`` is what the file has, ``packed`` whether that are bytes of two numbers, and ``edge`` 0 without taps.
    """

    stored: np.ndarray
    packed: bool
    edge: int


def _source(source: tvm.runtime.Tensor | None, array: np.ndarray, whole: bool) -> _Spread | None:
    """Return what weights are made of, if it gives the same bits; ``whole`` numbers take a byte where they lie."""
    small, edge = array, 0
    if source is not None and np.array_equal(winograd_weights.at_points(source.numpy(), _edge(array.shape)), array):
        small, edge = source.numpy().reshape(len(source.numpy()), -1), _edge(array.shape)
    halves = None if whole else half_bytes.packed(small)
    if halves is not None:
        return _Spread(halves, True, edge)
    return _Spread(small, False, edge) if edge else None


def _edge(shape: Sequence[int]) -> int:
    """Return the edge of the output tiles that weights at ``shape[0]`` points are for."""
    return int(shape[0] ** 0.5) - 2


def _reading(lowered: tvm.IRModule, vacant: dict[GenericConst, GenericConst]) -> tvm.IRModule:
    """Return the network that reads what is vacant in place of its constants."""
    main = lowered["main"]
    emitter = dataflow.Emitter()
    for param in main.params:
        emitter.unique(param.name)
    values: dict[dataflow.Value, dataflow.Value] = dict(vacant)
    emitter.copy(dataflow.bindings(main), values)
    outputs = [dataflow.substitute(field, values) for field in dataflow.output_fields(main)]
    return dataflow.with_main(lowered, emitter.finish(main.params, outputs, main.attrs))


def _with_load(mod: tvm.IRModule, vacant: Sequence[GenericConst], kept: int, parts: Sequence[_Spread]) -> tvm.IRModule:
    """Add `LOAD`, which puts its first arguments, and what it makes of the others, where the vacant constants are."""
    builder = relax.BlockBuilder(mod)
    # What kernels read as it is isn't looked at: the bundle's manifest says what it is, and the library its checksum.
    params = [tvm.ir.Var(f"w{n}", relax.AnyType()) for n in range(kept)]
    stored = [part.stored for part in parts]
    params += [tvm.ir.Var(f"w{kept + n}", relax.TensorType(p.shape, str(p.dtype))) for n, p in enumerate(stored)]
    with builder.function(LOAD, params, pure=False):
        made = []
        for param, place, part in zip(params[kept:], vacant[kept:], parts, strict=True):
            value = param
            if part.packed:
                kernel = builder.add_func(half_bytes.prim_func(), "whole_bytes")
                count = part.stored.shape[1]
                value = builder.emit(relax.call_tir(kernel, [value], relax.TensorType((2, count), "int8")))
            if part.edge:
                value = builder.emit(_at_points(builder, value, part, place))
            made.append(value)
        axes = relax.prim_value(len(ir.static_shape(vacant[0])) if kept else 2)
        values = [axes, *vacant, *params[:kept], *made]
        builder.emit(Call(relax.ExternFunc(_KEEP), values, ty_args=[relax.TupleType([])]))
        # What a function returns shares its memory with nothing.
        builder.emit_func_output(relax.Tuple(made))
    return builder.get()


def _at_points(builder: relax.BlockBuilder, parts: dataflow.Value, part: _Spread, place: GenericConst) -> Call:
    """Return the call that makes Winograd's weights of taps."""
    dtype = "int8" if part.packed else str(part.stored.dtype)
    kernel = builder.add_func(winograd_weights.prim_func(part.edge, dtype), f"winograd{part.edge}_{dtype}_weights")
    table = winograd_weights.factors(part.edge, dtype)
    count = part.stored.size * (1 + part.packed) // winograd_weights.TAPS
    parts = builder.emit(relax.op.reshape(parts, [winograd_weights.TAPS, count]))
    return relax.call_tir(kernel, [constant(table), parts], relax.TensorType((len(table), count), place.ty.dtype))


@module_pass(opt_level=0, name="PutWeights")
class PutWeights:
    """Let the compiled `LOAD` write to where the compiled ``main`` has its constants, and that ask whether it did."""

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module of compiled functions, those of the virtual machine among them; itself without `LOAD`."""
        if f"__vmtir__{LOAD}" not in {var.name_hint for var in mod.get_global_vars()}:
            return mod
        load = mod[f"__vmtir__{LOAD}"]
        calls: list[tirx.Evaluate] = []
        tvm_ffi.structural_walk(load.body, (tirx.Evaluate, lambda each: calls.append(each) if _keeps(each) else None))
        _, axes, *places = calls[0].value.args
        half = len(places) // 2
        pairs = [(_slot(to), _slot(value)) for to, value in zip(places[:half], places[half:], strict=True)]
        stores = _stores(pairs, load.params[2], load.params[1])
        body = tvm_ffi.structural_map(load.body, (tirx.Evaluate, lambda each: stores if _keeps(each) else each))
        main = mod["__vmtir__main"]
        there = _call(
            "tirx.tvm_call_packed",
            tvm.ir.StringImm("vm.builtin.check_tensor_info"),
            _item(main.params[2], pairs[0][0]),
            axes,
            tvm.ir.StringImm(f"the network has no weights yet, call {LOAD} first:"),
        )
        return dataflow.with_functions(
            mod,
            {
                **mod.functions,
                mod.get_global_var(f"__vmtir__{LOAD}"): load.with_body(body),
                mod.get_global_var("__vmtir__main"): main.with_body(tirx.SeqStmt([there, main.body])),
            },
        )


def _keeps(statement: tirx.Evaluate) -> bool:
    value = statement.value
    return isinstance(value, Call) and value.op.name == "tirx.tvm_call_packed" and value.args[0].value == _KEEP


def _slot(item: Call) -> int:
    """Return which element of a list of the virtual machine's an expression is."""
    return int(item.args[1].value)


def _item(where: tirx.Var, slot: int | tirx.PrimExpr) -> Call:
    number = tirx.const(slot, "int32") if isinstance(slot, int) else slot
    return Call(tvm.ir.Op.get("tirx.anylist_getitem"), [where, number], None, [], None, where.ty)


def _call(name: str, *args: tvm.ir.Expr) -> tirx.Stmt:
    return tirx.Evaluate(tirx.call_intrin("int32", name, *args))


def _stores(pairs: Sequence[tuple[int, int]], places: tirx.Var, values: tirx.Var) -> tirx.Stmt:
    """Return what puts values, by their numbers, at places: a loop where numbers follow each other evenly."""
    loops: list[tirx.Stmt] = []
    while pairs:
        (to, value), *others = pairs
        step = others[0][1] - value if others else 1
        count = next((n for n, pair in enumerate(pairs) if pair != (to + n, value + n * step)), len(pairs))
        n = tirx.Var("n", "int32")
        copy = tvm.ir.StringImm("vm.builtin.copy")
        store = _call("tirx.anylist_setitem_call_packed", places, n + to, copy, _item(values, n * step + value))
        loops.append(tirx.For(n, 0, count, tirx.ForKind.SERIAL, store))
        pairs = pairs[count:]
    return tirx.SeqStmt(loops) if len(loops) > 1 else loops[0]


@module_pass(opt_level=0, name="LoadFirst")
class LoadFirst:
    """Put `LOAD` in front of the other functions: the constants of the first one get numbers that follow each other."""

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module in another order; itself without `LOAD`."""
        if LOAD not in {var.name_hint for var in mod.get_global_vars()}:
            return mod
        first = mod.get_global_var(LOAD)
        return dataflow.with_functions(mod, {first: mod[first], **mod.functions})
