"""An LSTM whose cell's state lies within bounds, as other formats have it: a function of an ONNX network.

Whoever knows ONNX's functions computes its body; our importer takes the call as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

DOMAIN, NAME, VERSION = "nnfuze", "ClippedLSTM", 1


def function(opset: int) -> onnx.FunctionProto:
    """Return the function.

    Its inputs are those of ONNX's LSTM of one direction, forward, without lengths of sequences, and then the scalar
    that the cell's state is not beyond, nor beyond its negative; its outputs are those of ONNX's LSTM.
    """
    axes = [helper.make_node("Constant", [], [name], value_ints=[axis]) for name, axis in (("first", 0), ("second", 1))]
    nodes = [
        *axes,
        *(helper.make_node("Squeeze", [name, "first"], [f"{name}0"]) for name in ("W", "R", "B", "P", "h", "c")),
        helper.make_node("Split", ["B0"], ["bw", "br"], num_outputs=2),
        helper.make_node("Split", ["P0"], ["pi", "po", "pf"], num_outputs=3),
        helper.make_node("Add", ["bw", "br"], ["b"]),
        helper.make_node("Neg", ["bound"], ["low"]),
        helper.make_node("Scan", ["h0", "c0", "X"], ["hT", "cT", "ys"], num_scan_inputs=1, body=_step()),
        helper.make_node("Unsqueeze", ["ys", "second"], ["Y"]),
        helper.make_node("Unsqueeze", ["hT", "first"], ["Yh"]),
        helper.make_node("Unsqueeze", ["cT", "first"], ["Yc"]),
    ]
    inputs = ["X", "W", "R", "B", "h", "c", "P", "bound"]
    return helper.make_function(DOMAIN, NAME, inputs, ["Y", "Yh", "Yc"], nodes, [helper.make_opsetid("", opset)])


def _step() -> onnx.GraphProto:
    def apply(kind: str, inputs: Sequence[str], outputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, outputs.split(), **attributes)

    nodes = [
        apply("Gemm", ["x", "W0", "b"], "own", transB=1),
        apply("Gemm", ["h", "R0"], "other", transB=1),
        apply("Add", ["own", "other"], "sums"),
        apply("Split", ["sums"], "i o f g", axis=1, num_outputs=4),
        *_gate("i", "c"),
        *_gate("f", "c"),
        apply("Tanh", ["g"], "new"),
        apply("Mul", ["f_gate", "c"], "left"),
        apply("Mul", ["i_gate", "new"], "taken"),
        apply("Add", ["left", "taken"], "whole"),
        apply("Clip", ["whole", "low", "bound"], "cell"),
        *_gate("o", "cell"),
        apply("Tanh", ["cell"], "shown"),
        apply("Mul", ["o_gate", "shown"], "hidden"),
        apply("Identity", ["hidden"], "y"),
    ]
    given, made = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names] for names in _NAMES)
    return helper.make_graph(nodes, "step", given, made)


_NAMES = (("h", "c", "x"), ("hidden", "cell", "y"))


def _gate(name: str, state: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Mul", [f"p{name}", state], [f"{name}_seen"]),
        helper.make_node("Add", [name, f"{name}_seen"], [f"{name}_sum"]),
        helper.make_node("Sigmoid", [f"{name}_sum"], [f"{name}_gate"]),
    ]
