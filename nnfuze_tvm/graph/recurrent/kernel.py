"""A recurrent layer as one PrimFunc."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.recurrent.dynamic_loops import DynamicLoops
from nnfuze_tvm.graph.recurrent.form import Form, Sizes, operand_shapes, operand_types
from nnfuze_tvm.graph.recurrent.integer_loops import ONE_BY_ONE, Dots, IntegerLoops
from nnfuze_tvm.graph.recurrent.loops import Loops
from nnfuze_tvm.graph.recurrent.tile import Tile

ATTRIBUTE = "nnfuze.recurrence"
"""The attribute of the PrimFunc that has the form's attributes."""


def prim_func(
    form: Form,
    sizes: Sizes,
    tile: Tile,
    packed: bool = False,
    params: Sequence[tirx.Var] = (),
    dots: Dots = ONE_BY_ONE,
) -> tirx.PrimFunc:
    """Return the PrimFunc of a recurrent layer: its operands, then its result.

    Parameters
    ----------
    form : Form
        What is computed.
    sizes : Sizes
        Of what.
    tile : Tile
        What is computed at once.
    packed : bool
        The weights are constants: they are copied, tile by tile in the order in which they are read, in blocks that
        are evaluated at compile time.
    params : sequence of Var, optional
        The parameters of another such PrimFunc, to be those of this one, too.
    dots : Dots
        How the machine multiplies states of 8 bits, of a layer in integers.
    """
    shapes, types = operand_shapes(form, sizes), operand_types(form, sizes)
    given = params or [
        *(_buffer(shape, types[name]) for name, shape in shapes.items()),
        _buffer(sizes.result(form), sizes.dtype),
    ]
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name(form.kind)
            T.func_attr({"op_pattern": 8, "tirx.noalias": True, ATTRIBUTE: form.attributes()})
            *buffers, out = (T.arg(name, each) for name, each in zip((*shapes, "out"), given, strict=True))
            with T.sblock("root"):
                named = dict(zip(shapes, buffers, strict=True))
                if form.dynamic:
                    DynamicLoops(form, sizes, tile, named, out, dots).write(packed)
                elif form.integer:
                    IntegerLoops(form, sizes, tile, named, out, dots).write(packed)
                else:
                    Loops(form, sizes, tile, named, out).write(packed)
    return builder.get()


def _buffer(shape: Sequence[int], dtype: str) -> Any:
    return T.Buffer([tirx.IntImm("int64", extent) for extent in shape], dtype, layout=None)
