"""ONNX networks as Relax functions, one per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import tvm
from tvm import relax
from tvm.ir import GlobalVar
from tvm.relax.expr import _update_type
from tvm_ffi import StructuralKey, structural_equal

from nnfuze_tvm.errors import InputError, ModelError
from nnfuze_tvm.frontend import onnx_file, onnx_import
from nnfuze_tvm.frontend.onnx_file import Source
from nnfuze_tvm.frontend.onnx_states import states_of
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.views import forms


def load(
    models: Sequence[str | Path | onnx.ModelProto],
    tasks: Sequence[str] | None = None,
    shared_inputs: Sequence[str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tvm.IRModule:
    """Import several ONNX networks into one module.

    Parameters
    ----------
    models
        Paths (also ``"task=path"``) or models in memory.
    tasks
        Names of the tasks, one per model. By default the files' stems, or the graphs' names.
    shared_inputs
        Names of inputs that are one and the same wherever they occur. By default a later merge decides:
        inputs of equal name, shape and type are the same.
    shapes
        Shapes of inputs, by name or ``"task:name"``. Dimensions that nobody fixes are 1.

    Returns
    -------
    tvm.IRModule
        One Relax function per task, named after it. Weights are constants, shapes are static, the result is a
        tuple, and the Var of a layer is named ``<task>/<node name>``.

    Raises
    ------
    ModelError
        If a file can't be read or holds something that is not supported.
    InputError
        If names or shapes do not fit the networks.
    """
    sources, input_shapes = onnx_file.checked_sources(models, tasks, shapes or {})
    functions: dict[GlobalVar | str, tvm.ir.BaseFunc] = {}
    kernels: dict[StructuralKey, GlobalVar] = {}
    taken = {source.task for source in sources}
    problems = []
    for source in sources:
        try:
            imported = onnx_import.convert(source, input_shapes[source.task])
        except ModelError as error:
            # Those of all files at once.
            problems.append(str(error))
            continue
        functions[source.task] = _adopt_kernels(imported, source, functions, kernels, taken)
    if problems:
        raise ModelError(" | ".join(problems))
    mod = tvm.IRModule(functions)
    mod = ir.with_task_outputs(
        mod,
        [ir.TaskOutput(source.task, value.name) for source in sources for value in source.model.graph.output],
    )
    kept = [f"{source.task}.{taken}={given}" for source in sources for taken, given in states_of(source.model)]
    if kept:
        mod = mod.with_attr(ir.OWN_STATES_ATTR, kept)
    if shared_inputs is not None:
        _check_shared(mod, sources, shared_inputs)
        mod = mod.with_attr(ir.SHARED_INPUTS_ATTR, list(shared_inputs))
    return mod


def _adopt_kernels(
    imported: tvm.IRModule,
    source: Source,
    functions: dict[GlobalVar | str, tvm.ir.BaseFunc],
    kernels: dict[StructuralKey, GlobalVar],
    taken: set[str],
) -> tvm.ir.BaseFunc:
    """Move the PrimFuncs of one imported network over, equal ones once, and return its Relax function.

    Their names are none of those that are ``taken``: kernels or tasks may be called alike.
    """
    main = imported["main"].with_attr("global_symbol", source.task)
    renamed = {}
    for var, func in imported.functions.items():
        if var.name_hint == "main":
            continue
        key = StructuralKey(func.without_attr("global_symbol"))
        if key not in kernels:
            name = f"{source.task}_{var.name_hint}"
            while name in taken:
                name += "_"
            taken.add(name)
            kernels[key] = GlobalVar(name)
            _update_type(kernels[key], var.ty)
            # Private, as what TVM makes of operators is: fusing copies kernels, and a symbol of its own with them.
            functions[kernels[key]] = func.without_attr("global_symbol")
        renamed[var] = kernels[key]
    if not renamed:
        return main
    emitter = dataflow.Emitter()
    new: dict[dataflow.Value, dataflow.Value] = dict(renamed)
    emitter.copy(dataflow.bindings(main), new)
    outputs = [dataflow.substitute(field, new) for field in dataflow.output_fields(main)]
    return emitter.finish(main.params, outputs, main.attrs)


def _check_shared(mod: tvm.IRModule, sources: Sequence[Source], shared_inputs: Sequence[str]) -> None:
    several = forms(shared_inputs)
    for name in shared_inputs:
        if name in several:  # they are brought together where networks are
            continue
        owners = [(source, param) for source in sources for param in mod[source.task].params if param.name == name]
        if not owners:
            known = sorted({param.name for source in sources for param in mod[source.task].params})
            raise InputError(f"shared input {name!r}: no network has it (there are: {', '.join(known)})")
        first, reference = owners[0]
        for source, param in owners[1:]:
            if not structural_equal(param.ty, reference.ty):
                raise InputError(
                    f"shared input {name!r} differs: {_describe(reference.ty)} in {first.label}, "
                    f"{_describe(param.ty)} in {source.label}"
                )


def _describe(ty: relax.TensorType) -> str:
    return f"{ty.dtype} {'x'.join(str(int(dim)) for dim in ty.shape)}"
