"""Turns quantize/dequantize islands into integer operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.integers.context import Integers, Unsupported, dtype_of, few_steps
from nnfuze_tvm.graph.integers.values import Codes, Constant, ConstantCodes, Known, Parts, Pieces, Quantized, Sum
from nnfuze_tvm.graph.ir import float_layers, with_float_layers
from nnfuze_tvm.passes.lower.integer.few_bit_data import few_bit_data


@tvm.transform.module_pass(opt_level=0, name="RealizeInteger")
class RealizeInteger:
    """Replace quantize/dequantize islands by integer operators that give the same bits on every machine.

    Takes quantize/dequantize as ``InsertQDQ`` places them or as an ONNX file has them: int8 or uint8, with or
    without zero point, weights per tensor or per channel, biases in float32 or int32. Works in NCHW and NHWC.
    So do layers of floats whose weights are few multiples of a number per output channel, and whose data are few
    multiples of another (`few_bit_data`): signs, and what is rounded and bounded.
    What has no integer form stays float32, between a dequantize and a quantize; layers among it are listed in
    the module attribute ``nnfuze.float_layers`` as ``"layer: reason"``.

    The integer graph holds int8, or uint8 in [0, 127] where nothing is negative (after a ReLU). A convolution
    and what follows it become ``conv2d(out_dtype="int32")``, [``add_residual``], ``add`` (int32),
    ``astype`` (float32), ``multiply``, ``round``, [``add`` zero point], ``clip``, ``astype``.
    """

    def transform_module(self, mod: tvm.IRModule, ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        builder = relax.BlockBuilder(mod)
        notes: dict[str, str] = {}
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                realizer = _Realizer(builder)
                builder.update_func(gvar, realizer.run(func))
                notes |= realizer.notes
        result = builder.get()
        if mod.attrs is not None:
            result = result.with_attrs(dict(mod.attrs.items()))
        # What came before knows better why a layer is none.
        notes |= {name: reason for name, reason in float_layers(mod).items() if name in notes}
        return relax.transform.DeadCodeElimination()(with_float_layers(result, notes))


class _Realizer(Integers):
    """One walk over one function: every Var becomes a :data:`Known` value, or stays a float expression."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        super().__init__(builder)
        self.floats: dict[relax.Expr, relax.Expr] = {}
        self.notes: dict[str, str] = {}

    def run(self, func: relax.Function) -> relax.Function:
        for param in func.params:
            dtype = dtype_of(param)
            if dtype in ("int8", "uint8"):
                self.known[param] = self.from_original(param, dtype)
        few = few_bit_data(func)
        for binding in bindings(func):
            self.known[binding.var] = self._visit(binding.value, binding.var)
            if binding.var in few:
                self.known[binding.var] = self._coded(binding.var, few[binding.var])
        outputs = [self.as_float(out) for out in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _visit(self, value: relax.Expr, var: relax.Var) -> Known | relax.Expr:
        if isinstance(value, tvm.ir.Var | GenericConst):
            return self.value(value)
        if isinstance(value, relax.TupleGetItem):
            source = self.value(value.tuple_value)
            if isinstance(source, Pieces):
                return source.fields[value.index]
        operator = ops.of(value)
        if operator is not None and operator.integer is not None:
            try:
                known = operator.integer(self, value, var.name)
                if known is not None:
                    return known
            except Unsupported as reason:
                # A file's own integer products are none that could have become integer.
                if ops.is_layer(value) and dtype_of(var) == "float32":
                    self.notes[var.name] = str(reason)
        elif ops.is_layer(value) and dtype_of(var) == "float32":
            self.notes[var.name] = f"{op_name(value)} has no integer form"
        leaves = {leaf: self.as_float(leaf) for leaf in operands(value)}
        kept = self.emitter.emit(substitute(value, leaves), var.name)
        computes = operator is not None and operator.effect == "maps" and not operator.bounds
        integers = computes and any(isinstance(self.value(leaf), Sum | Quantized) for leaf in leaves)
        if integers or not self.inexact.isdisjoint(leaves.values()):
            self.inexact.add(kept)
        if operator is not None and operator.nonnegative is not None:
            if operator.nonnegative(value, leaves.get(value.args[0]) in self.nonnegative):
                self.nonnegative.add(kept)
        return kept

    def as_float(self, expr: relax.Expr) -> relax.Expr:
        """Return an operand as the float graph has it."""
        if isinstance(expr, GenericConst):
            return expr
        known = self.known.get(expr, expr)
        if expr not in self.floats:
            self.floats[expr] = self._materialize(known)
        return self.floats[expr]

    def _coded(self, var: tvm.ir.Var, levels: np.ndarray) -> Known | relax.Expr:
        """Return a tensor of few numbers as codes."""
        known = self.known[var]
        step = few_steps(levels, None)
        if step is None or isinstance(known, Quantized):
            return known
        low, high = (round(float(levels[end] / step.flat[0])) for end in (0, -1))
        codes = self.quantize(self.as_float(var), float(step.flat[0]), 0, "int8", low >= 0)
        return Quantized(replace(codes, lo=low, hi=high), float(step.flat[0]), 0)

    def _materialize(self, known: Known | relax.Expr) -> relax.Expr:
        if isinstance(known, Quantized):
            result = self.dequantize(known)
        elif isinstance(known, Sum):
            result = self.float_sum(known)
        elif isinstance(known, Codes):
            return self.original(known)
        elif isinstance(known, Constant):
            return relax.const(known.values.astype("float32"))
        elif isinstance(known, ConstantCodes):
            return relax.const(known.codes.astype(known.dtype))
        elif isinstance(known, Parts):
            return self.emitter.emit(op.concat([self._materialize(part) for part in known.parts], known.axis))
        elif isinstance(known, Pieces):
            return relax.Tuple([self._materialize(piece) for piece in known.fields])
        else:
            return known
        if (isinstance(known, Sum) and known.nonnegative) or (
            isinstance(known, Quantized) and known.codes.lo >= known.zero_point
        ):
            self.nonnegative.add(result)
        return result
