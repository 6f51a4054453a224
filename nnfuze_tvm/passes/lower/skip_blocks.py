"""Layers whose weights are zero in whole blocks: kernels that neither store these nor multiply by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tvm
import tvm_ffi
from tvm import relax, s_tir, te, tirx
from tvm.ir import Call
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import block_sparsity, ops
from nnfuze_tvm.graph.block_sparsity import INPUTS, OUTPUTS
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.contraction import Contraction
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import small_weights, static_shape
from nnfuze_tvm.passes.lower import unsigned_bytes
from nnfuze_tvm.passes.lower.whole_channels import contraction_of

# The name of its sums.
SUMS = "sparse_sums"
_DTYPES = (("float32", "float32", "float32"), ("int8", "int8", "int32"), ("uint8", "int8", "int32"))

Cycles = Callable[..., float]
"""``(contraction, block=None)`` → the cycles of a layer; ``block``: outputs that share an index, and its inputs."""


@module_pass(opt_level=0, name="SkipBlocks")
class SkipBlocks:
    """Compute layers whose weights are zero in whole blocks (`graph.block_sparsity`) by what is left, where that pays.

    What is left is stored side by side, and beside it which blocks these are. Takes convolutions with the channels last
    that are not grouped, and products with a matrix, in float32 and with int8 weights; sums of integers are the same
    bits. Of a module whose weights shall stay small (`ir.small_weights`), all such layers.

    Parameters
    ----------
    cycles : callable
        What layers take, see `Cycles`.
    share : callable
        Which part of that a layer takes that stays as it is: less than 1 if it will multiply less, see `Winograd`.
    unsigned : bool
        Signed bytes are taken as unsigned ones, see `UnsignedBytes`.
    """

    def __init__(self, cycles: Cycles, share: Callable[[Value], float] = lambda _: 1.0, unsigned: bool = False) -> None:
        self.cycles, self.share, self.unsigned = cycles, share, unsigned

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        small = small_weights(mod)
        return with_rewritten(mod, lambda func, builder: self._rewrite(func, builder, small))

    def _rewrite(self, func: relax.Function, builder: relax.BlockBuilder, small: bool) -> relax.Function:
        def skipping(value: Value, name: str, emitter: Emitter) -> Value | None:
            work, layer = contraction_of(value)[0], ops.layer(value)
            if work is None or layer is None or (work.data, work.weights, work.sums) not in _DTYPES:
                return None
            filters = layer.filters.unpack(array(value.args[1]))
            if not block_sparsity.has_blocks(filters):
                return None
            kept = block_sparsity.kept_blocks(filters)
            if not (self._pays(value, work, kept.shape[1] * INPUTS) or (small and kept.shape[1] * INPUTS < work.depth)):
                return None
            rows = block_sparsity.in_rows(filters, kept)
            own = layer.filters.pack(rows.reshape(1, filters.shape[1], *rows.shape[2:]))
            operands = [value.args[0], constant(own), constant(kept.astype("uint16"))]
            if not (self.unsigned and work.data == "int8" and unsigned_bytes.fits(work.products)):
                return _call(value, operands, builder, is_unsigned=False)
            if not _padding(value):
                operands[0] = emitter.emit(unsigned_bytes.larger(operands[0]))
            sums = emitter.emit(_call(value, operands, builder, is_unsigned=True), name)
            return relax.op.add(sums, constant(unsigned_bytes.correction(filters[0])))

        return with_values(func, skipping)

    def _pays(self, value: Value, work: Contraction, inputs: int) -> bool:
        left = replace(work, products=work.products // work.depth * inputs, depth=inputs)
        return self.cycles(left, block=(OUTPUTS, INPUTS)) < self.cycles(work) * self.share(value)


def _padding(layer: Call) -> list[int]:
    """Return the zeros around the data of a convolution; none of a product, or where there are none."""
    padding = [int(each) for each in layer.attrs.padding] if op_name(layer) != "matmul" else []
    return padding if any(padding) else []


def _call(layer: Call, operands: list[Value], builder: relax.BlockBuilder, is_unsigned: bool) -> Call:
    """Return the call that computes a layer of data, weights and index."""
    shape, dtype = static_shape(layer), str(layer.ty.dtype)
    name = op_name(layer).removeprefix("nn.")

    def sums(data: te.Tensor, weights: te.Tensor, kept: te.Tensor) -> te.Tensor:
        if _padding(layer):
            data = _padded(data, _padding(layer), is_unsigned)
        places = weights.shape[1:-1] if name != "matmul" else []
        window = [te.reduce_axis((0, size), f"k{at}") for at, size in enumerate(places)]
        depth = te.reduce_axis((0, weights.shape[0 if name == "matmul" else -1]), "rc")

        def element(*index: tirx.Var) -> tirx.Expr:
            output = index[-1]
            source = kept(output // OUTPUTS, depth // INPUTS).astype("int32") * INPUTS + depth % INPUTS
            if name == "matmul":
                number, weight = data(*index[:-1], source), weights(depth, output)
            else:
                strides, dilations = ([int(e) for e in each] for each in (layer.attrs.strides, layer.attrs.dilation))
                steps = zip(index[1:-1], strides, window, dilations, strict=True)
                at = [place * stride + tap * dilation for place, stride, tap, dilation in steps]
                number, weight = data(index[0], *at, source), weights(output, *window, depth)
            return te.sum(number.astype(dtype) * weight.astype(dtype), axis=[*window, depth])

        return te.compute(shape, element, name=SUMS)

    result = builder.call_te(sums, *operands, primfunc_name_hint=f"sparse_{name}")
    gvar = result.args[0]
    builder.update_func(gvar, _without_index(builder.get()[gvar]).with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    return result


def _padded(data: te.Tensor, padding: list[int], is_unsigned: bool) -> te.Tensor:
    """Return data with zeros around; signed bytes become unsigned ones if asked for."""
    rank = len(padding) // 2
    before, behind = padding[:rank], padding[rank:]
    sizes = data.shape[1:-1]
    shape = [first + size + last for first, size, last in zip(before, sizes, behind, strict=True)]
    zero = tirx.const(unsigned_bytes.ZERO, "uint8") if is_unsigned else tirx.const(0, data.dtype)

    def at(*index: tirx.Var) -> tirx.Expr:
        places = [place - first if first else place for place, first in zip(index[1:-1], before, strict=True)]
        inside = [
            tirx.all(place >= first, place < first + size)
            for place, first, last, size in zip(index[1:-1], before, behind, sizes, strict=True)
            if first or last
        ]
        number = data(index[0], *places, index[-1])
        return tirx.if_then_else(tirx.all(*inside), unsigned_bytes.unsigned(number) if is_unsigned else number, zero)

    return te.compute((data.shape[0], *shape, data.shape[-1]), at, name="pad_temp")


def _without_index(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return the kernel whose sums say that they read data, then weights, as those of all contractions do.

    The index they read, too; but it is a parameter, which nothing in the kernel writes, and tensor intrinsics match
    blocks that read two things.
    """

    def visit(block: s_tir.SBlock) -> s_tir.SBlock:
        if block.name_hint != SUMS:
            return block
        weights, kept = (param.name for param in func.params[1:3])
        reads = [read for read in block.reads if read.source.name != kept]
        reads.sort(key=lambda read: bool(read.source.name == weights))
        parts = (block.iter_vars, reads, block.writes, block.name_hint, block.body, block.init)
        return s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, block.annotations)

    return func.with_body(tvm_ffi.structural_map(func.body, (s_tir.SBlock, visit)))
