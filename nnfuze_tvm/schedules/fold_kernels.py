"""Kernels of constants are run now: weights are packed at compile time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute, with_main
from nnfuze_tvm.graph.evaluate import library_of
from nnfuze_tvm.graph.ir import address, sources, static_shape, with_sources


@module_pass(opt_level=0, name="FoldKernels")
class FoldKernels:
    """Replace calls of PrimFuncs in ``main`` whose arguments are all constants by their results.

    ``relax.transform.FoldConstant`` builds a library for every call. Here they share one, which is all there is to
    gain: a network's weights are packed in a tenth of the time that it takes to compile the kernels for it.
    What constants are computed from (`ir.sources`) is packed beside them.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module without these calls; their PrimFuncs stay."""
        main = mod["main"]
        foldable: dict[Value, Call] = {}
        for binding in bindings(main):
            if _is_foldable(binding.value, foldable):
                foldable[binding.var] = binding.value
        library = library_of({call.args[0].name_hint: mod[call.args[0]] for call in foldable.values()})
        # Splitting a kernel binds its result a second time, to the Var that has the layer's name.
        names = {b.value: b.var.name for b in bindings(main) if isinstance(b.value, tvm.ir.Var)}
        emitter = Emitter()
        known: dict[Value, Value] = {}
        several: dict[Value, list[tvm.runtime.Tensor]] = {}
        origins = sources(mod)
        pairs = []
        for binding in bindings(main):
            value = substitute(binding.value, known)
            if binding.var in foldable and isinstance(value.ty, relax.TupleType):
                several[binding.var] = _results(library, value)
            elif isinstance(value, relax.TupleGetItem) and value.tuple_value in several:
                known[binding.var] = relax.const(several[value.tuple_value][value.index])
            elif binding.var in foldable:
                (result,) = _results(library, value)
                known[binding.var] = relax.const(result)
                if (source := _packed_source(library, value, origins)) is not None:
                    origins[address(result)] = source
                    pairs.append((result, source))
            else:
                known[binding.var] = emitter.emit(value, names.get(binding.var, binding.var.name))
        outputs = [substitute(field, known) for field in output_fields(main)]
        folded = with_main(mod, emitter.finish(main.params, outputs, main.attrs))
        return with_sources(folded, pairs) if pairs else folded


def _is_foldable(value: Value, foldable: dict[Value, Call]) -> bool:
    return (
        op_name(value) == "call_tir"
        and len(value.args) == 2
        and len(value.args[1].fields) > 0
        and all(isinstance(argument, GenericConst) or argument in foldable for argument in value.args[1].fields)
    )


def _results(library: tvm.runtime.Module, call: Call) -> list[tvm.runtime.Tensor]:
    return _computed(library, call, [argument.value for argument in call.args[1].fields])


def _computed(library: tvm.runtime.Module, call: Call, arguments: list[tvm.runtime.Tensor]) -> list[tvm.runtime.Tensor]:
    types = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    results = [tvm.runtime.empty([int(size) for size in ty.shape.values], str(ty.dtype.dtype)) for ty in types]
    library[call.args[0].name_hint](*arguments, *results)
    return results


def _packed_source(
    library: tvm.runtime.Module, call: Call, origins: Mapping[int, tvm.runtime.Tensor]
) -> tvm.runtime.Tensor | None:
    """Return the source of a call's only argument as the call packs it; None if it has none."""
    argument, *others = call.args[1].fields
    source = origins.get(address(argument.value))
    if source is None or others or static_shape(call)[0] != static_shape(argument)[0]:
        return None
    wide = np.zeros(static_shape(argument), str(argument.ty.dtype.dtype))
    small = source.numpy()
    wide[: len(small)] = small
    (result,) = _computed(library, call, [tvm.runtime.tensor(wide)])
    packed = result.numpy()
    return tvm.runtime.tensor(packed[: len(small)].astype(small.dtype))
