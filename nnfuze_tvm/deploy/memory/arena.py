"""All that kernels hand to each other in one piece of memory, whose offsets are known when the network is built."""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar
from tvm.ir.transform import PassContext, module_pass
from tvm.tirx.transform import prim_func_pass

from nnfuze_tvm.deploy.memory.offsets import Span, place
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields, with_functions
from nnfuze_tvm.graph.ir import nbytes

ATTRIBUTE = "nnfuze.arena"
"""A function that has it takes so many bytes for what its kernels hand to each other."""

# Fields of a DLTensor, as `tvm_struct_get` counts them.
_DATA, _BYTE_OFFSET = 1, 8


def allocating_passes() -> list[tvm.transform.Pass]:
    """Return what makes allocations, and calls with what they write to, out of a graph of kernels.

    What sorts is no kernel until then. They run with a target as the current one.
    """
    transform = relax.transform
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        OneArena(),
    ]


@module_pass(opt_level=0, name="OneArena")
class OneArena:
    """Give tensors that a function allocates and does not return their places in one allocation.

    It takes the place of TVM's ``StaticPlanBlockMemory``, which gives each a whole storage that it has to itself for a
    while. Kernels have to mind offsets: build them with `ByteOffsets`.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the allocations of its functions, calls of kernels already, planned."""
        functions = {
            gvar: _planned(func) if isinstance(func, relax.Function) else func for gvar, func in mod.functions_items()
        }
        return with_functions(mod, functions)


def size(expr: Value) -> int:
    """Return the bytes of a tensor of static shape."""
    return nbytes([int(dim) for dim in expr.ty.shape.values], str(expr.ty.dtype))


def _planned(func: relax.Function) -> relax.Function:
    steps = bindings(func)
    roots: dict[Value, frozenset[Value]] = {}
    times: dict[Value, list[int]] = {}
    for n, binding in enumerate(steps):
        value = binding.value
        if op_name(value) == "builtin.alloc_tensor":
            roots[binding.var] = frozenset([binding.var])
            continue
        found = frozenset[Value]().union(*(roots.get(leaf, ()) for leaf in operands(value)))
        for root in found:
            times.setdefault(root, []).append(n)
        # What a call returns that is no kernel may be a part of what it was given.
        if not (isinstance(value, Call) and isinstance(value.op, GlobalVar)):
            roots[binding.var] = found
    given = frozenset[Value]().union(*(roots.get(leaf, ()) for out in output_fields(func) for leaf in operands(out)))
    planned = [b.var for b in steps if b.var in times and b.var in roots.get(b.var, ()) and b.var not in given]
    if not planned:
        return func
    places = place([Span(size(var), times[var][0], times[var][-1]) for var in planned])
    return _with_offsets(func, dict(zip(planned, places.offsets, strict=True)), places.total)


def _with_offsets(func: relax.Function, offsets: dict[Value, int], total: int) -> relax.Function:
    normal = relax.BlockBuilder().normalize
    call = normal(relax.op.memory.alloc_storage(relax.ShapeExpr([total]), 0, "global", "uint8"))
    storage = tvm.ir.Var("arena", call.ty)
    blocks = []
    for block in func.body.blocks:
        new = []
        for binding in block.bindings:
            value = binding.value
            if binding.var in offsets:
                shape, dtype = value.args[0], str(binding.var.ty.dtype)
                value = normal(relax.op.memory.alloc_tensor(storage, offsets[binding.var], shape, dtype, 0))
            new.append(relax.VarBinding(binding.var, value))
        blocks.append(relax.BindingBlock(new))
    first = relax.BindingBlock([relax.VarBinding(storage, call)])
    body = normal(relax.SeqExpr([first, *blocks], func.body.body))
    planned = relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
    return planned.with_attr(ATTRIBUTE, total)


@prim_func_pass(opt_level=0, name="ByteOffsets")
class ByteOffsets:
    """Let packed functions add the byte offsets of their tensors to the pointers: TVM's own expect them to be zero."""

    def transform_function(self, func: tirx.PrimFunc, _: tvm.IRModule, __: PassContext) -> tirx.PrimFunc:
        """Return the function with offsets added where it declares the buffers of its arguments."""
        return func.with_body(tvm_ffi.structural_map(func.body, (tirx.DeclBuffer, _moved)))


def _moved(declared: tirx.DeclBuffer) -> tirx.DeclBuffer:
    """Return the declaration of a buffer behind its tensor's offset, itself if it is none of a tensor's."""
    pointer = declared.data
    if not _calls(pointer, "reinterpret") or not _calls(field := pointer.args[0], "tvm_struct_get"):
        return declared
    if int(field.args[2]) != _DATA or not isinstance(declared.buffer.ty.elem_offset, tirx.IntImm):
        return declared  # no tensor's data, or a kernel that adds the offset to its indices
    offset = tirx.call_intrin("uint64", "tirx.tvm_struct_get", *field.args[:2], _BYTE_OFFSET)
    add = tvm.ir.Op.get("tirx.handle_add_byte_offset")
    moved = Call(add, [field, tirx.Cast("int64", offset)], field.attrs, field.ty_args, None, field.ty)
    behind = Call(pointer.op, [moved], pointer.attrs, pointer.ty_args, None, pointer.ty)
    return tirx.DeclBuffer(declared.buffer, data=behind)


def _calls(expr: object, name: str) -> bool:
    return isinstance(expr, Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name == f"tirx.{name}"
