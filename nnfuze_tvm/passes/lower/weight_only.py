"""Dense layers of floats whose weights are codes of 4 or 8 bits: kernels that read the codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute, with_rewritten
from nnfuze_tvm.graph.evaluate import call_of_constants
from nnfuze_tvm.graph.integers.context import along
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.packed_weights import IN_WORD, Packed, packed
from nnfuze_tvm.passes.compress.quantizable import integer_layers
from nnfuze_tvm.passes.lower.integer.few_bit_data import few_bit_data, moved_from
from nnfuze_tvm.passes.lower.whole_channels import first_channels

# Outputs become a multiple of one of these: of the last, which is whole vectors on every machine, or, for several
# vectors to be summed at once, of a larger one that adds at most one output to so many.
_OUTPUTS, _MANY = (64, 32, 16), 16


@module_pass(opt_level=0, name="WeightOnly")
class WeightOnly:
    """Compute dense layers of float32 data and dequantized weights by kernels that read the weights' codes.

    Weights are constants behind a ``dequantize``, with a scale for all, per output, or per block of inputs: moved about
    behind it, as a block-wise one is written. Sums are float32. Layers whose data are codes as well, of which
    `RealizeInteger` makes integer ones, stay what they are.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, _rewrite)


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    integer, few = integer_layers(func), few_bit_data(func)
    bound = {binding.var: binding.value for binding in bindings(func)}
    held: dict[Value, _Codes] = {}
    emitter, values, changed = Emitter(), dict[Value, Value](), False
    for binding in bindings(func):
        value, name = substitute(binding.value, values), binding.var.name
        codes = _codes(binding.value, held)
        if codes is not None:
            held[binding.var] = codes
        weights = _weights(binding.value, held)
        # Integers have one scale per output.
        if weights is not None and len(weights.scales) == 1:
            weights = None if name in integer or moved_from(binding.value.args[0], bound) in few else weights
        if weights is not None:
            value, changed = _layer(builder, emitter, name, value.args[0], weights), True
        values[binding.var] = emitter.emit(value, name)
    if not changed:
        return func
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


@dataclass(frozen=True)
class _Codes:
    """Codes, and the scale and zero point of each."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def _codes(value: Value, held: dict[Value, _Codes]) -> _Codes | None:
    """Return the codes that a value stands for; None if it doesn't."""
    name = op_name(value)
    if name == "dequantize" and all(isinstance(arg, GenericConst) for arg in value.args):
        codes, scale, zero = map(array, value.args)
        if codes.dtype not in (np.int8, np.uint8) or str(value.ty.dtype) != "float32" or not codes.size:
            return None
        axis = int(value.attrs.axis)
        scale, zero = (np.broadcast_to(along(each, axis, codes.ndim), codes.shape) for each in (scale, zero))
        return _Codes(codes, scale, zero)
    if ops.effect_of(value) != "moves" or value.args[0] not in held:
        return None
    source = held[value.args[0]]
    moved = [_moved(value, each) for each in (source.codes, source.scales, source.zeros)]
    known = [each for each in moved if each is not None]
    return _Codes(*known) if len(known) == len(moved) else None


def _moved(value: Call, numbers: np.ndarray) -> np.ndarray | None:
    call = Call(value.op, [constant(numbers), *value.args[1:]], value.attrs, value.ty_args)
    return call_of_constants(relax.BlockBuilder().normalize(call))


def _weights(value: Value, held: dict[Value, _Codes]) -> Packed | None:
    """Return the weights of a dense layer that is taken, else None."""
    if op_name(value) != "matmul" or value.args[1] not in held or len(static_shape(value)) < 2:
        return None
    if len(static_shape(value.args[1])) != 2 or {str(e.ty.dtype) for e in (value, value.args[0])} != {"float32"}:
        return None
    codes = held[value.args[1]]
    return packed(codes.codes, codes.scales, codes.zeros) if 0 not in static_shape(value) else None


def _layer(builder: relax.BlockBuilder, emitter: Emitter, name: str, data: Value, weights: Packed) -> Value:
    """Return the result of a layer."""
    outputs = weights.codes.shape[1]
    sizes = [-(-outputs // multiple) * multiple for multiple in _OUTPUTS]
    whole = weights.padded(next((size for size in sizes if size - outputs <= outputs // _MANY), sizes[-1]))
    operands = [constant(each) for each in (whole.words, whole.scales, whole.zeros) if each is not None]

    def sums(data: te.Tensor, words: te.Tensor, scales: te.Tensor, *zeros: te.Tensor) -> te.Tensor:
        return _sums(data, words, scales, zeros[0] if zeros else None, whole)

    call = builder.call_te(sums, data, *operands, primfunc_name_hint=f"weights{whole.bits}_matmul")
    gvar = call.args[0]
    builder.update_func(gvar, builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    if whole.codes.shape == weights.codes.shape:
        return call
    return first_channels(builder, emitter.emit(call, name), outputs)


def _sums(data: te.Tensor, words: te.Tensor, scales: te.Tensor, zeros: te.Tensor | None, own: Packed) -> te.Tensor:
    """Return products ``[..., outputs]``: sums of each block, scaled and added."""
    (blocks, outputs), rows = own.scales.shape, data.shape[:-1]
    in_word = IN_WORD if own.bits == 4 else 1
    word, place = te.reduce_axis((0, own.block // in_word), "word"), te.reduce_axis((0, in_word), "place")

    def product(*index: tirx.Var) -> tirx.Expr:
        *row, block, output = index
        at = block * (own.block // in_word) + word
        code = words(at, output)
        if own.bits == 4:  # its sign is the word's once it is in front
            code = code << (28 - 4 * place.var).astype("uint32")
        code = code.astype("int32")
        if own.bits == 4:
            code = code >> tirx.const(28, "int32")
        if zeros is not None:
            code = code - zeros(block, output).astype("int32")
        return te.sum(data(*row, at * in_word + place) * code.astype("float32"), axis=[word, place])

    products = te.compute((*rows, blocks, outputs), product, name="block_products")
    block = te.reduce_axis((0, blocks), "block")

    def scaled(*index: tirx.Var) -> tirx.Expr:
        *row, output = index
        return te.sum(products(*row, block, output) * scales(block, output), axis=block)

    return te.compute((*rows, outputs), scaled, name="scaled_sums")
