"""Tensors side by side in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.channels import Coupling, Labels
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.sums import LEAST, MOST
from nnfuze_tvm.graph.integers.values import Codes, Constant, Known, Parts, Quantized, Sum
from nnfuze_tvm.graph.ops import _onnx_moving as onnx
from nnfuze_tvm.graph.ops.operator import Example, Operator


def _evaluate(call: Call, parts: list[np.ndarray]) -> np.ndarray:
    axis = call.attrs.axis
    return np.concatenate([part.ravel() for part in parts] if axis is None else parts, 0 if axis is None else int(axis))


def _joined(torch: Any, call: Call, parts: list[Any]) -> Any:
    axis = call.attrs.axis
    return torch.cat([part.flatten() for part in parts] if axis is None else parts, 0 if axis is None else int(axis))


def _stacked(call: Call, parts: list[np.ndarray]) -> np.ndarray:
    return np.stack(parts, int(call.attrs.axis))


def _couple(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels | None:
    parts = coupling.of(call.args[0])
    if not isinstance(parts, tuple) or call.attrs.axis is None:
        return None
    along = int(call.attrs.axis) % len(parts[0])
    result = []
    for axis in range(len(parts[0])):
        if axis == along:
            result.append(np.concatenate([labels[axis] for labels in parts]))
            continue
        for labels in parts[1:]:
            coupling.channels.tie(parts[0][axis], labels[axis])
        result.append(parts[0][axis])
    return result


def _integer(context: Integers, call: Call, _: str) -> Known | None:
    if not isinstance(call.args[0], relax.Tuple):
        return None
    parts = [context.value(part) for part in call.args[0].fields]
    axis = int(call.attrs.axis) if call.attrs.axis is not None else 0
    if all(isinstance(part, Codes) for part in parts):
        codes = [part for part in parts if isinstance(part, Codes)]
        same = len({(part.offset, part.dtype) for part in codes}) == 1
        return context.concat(codes, axis) if same else None
    quantized = [part for part in parts if isinstance(part, Quantized)]
    meanings = {(part.scale, part.zero_point, part.codes.offset, part.codes.dtype) for part in quantized}
    if len(meanings) == 1:
        parts = [_as_codes(part, quantized[0]) if isinstance(part, Constant) else part for part in parts]
        quantized = [part for part in parts if isinstance(part, Quantized)]
    known = tuple(part for part in parts if isinstance(part, Quantized | Sum))
    if len(known) < len(parts):
        return None
    if len(quantized) == len(known) and len(meanings) == 1:
        joined = context.concat([part.codes for part in quantized], axis)
        return Quantized(joined, quantized[0].scale, quantized[0].zero_point)
    return Parts(known, axis)


def _as_codes(part: Constant, like: Quantized) -> Quantized | Constant:
    """Return a constant as codes of the same meaning as others, where they have its very numbers, as zeros."""
    codes = np.rint(part.values / like.scale)
    if not np.allclose(codes * like.scale, part.values, rtol=1e-6, atol=0):
        return part
    codes += like.zero_point
    kind = str(like.codes.expr.ty.dtype.dtype)
    least = 0 if kind == "uint8" else LEAST
    if codes.min(initial=MOST) < least or codes.max(initial=least) > MOST:
        return part
    span = int(codes.min(initial=MOST)), int(codes.max(initial=least))
    return Quantized(
        Codes(relax.const(codes.astype(kind)), *span, like.codes.offset, like.codes.dtype), like.scale, like.zero_point
    )


def _parts(call: Call) -> Sequence[Value]:
    return call.args[0].fields if isinstance(call.args[0], relax.Tuple) else ()


def _transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value:
    return op.concat(sources, axes[int(call.attrs.axis) % len(axes)])


OPERATORS = {
    "concat": Operator(
        effect="joins",
        evaluate=_evaluate,
        train=_joined,
        examples=(Example(((2, 8, 6, 6), (2, 4, 6, 6)), lambda x, y: op.concat([x, y], 1)),),
        couple=_couple,
        integer=_integer,
        half=True,
        operands=_parts,
        transposed=_transposed,
        kernels=("elementwise",),
    ),
    "stack": Operator(
        effect="mixes",
        evaluate=_stacked,
        train=lambda torch, call, parts: torch.stack(parts, int(call.attrs.axis)),
    ),
}

ONNX = {"concat": onnx.concat, "stack": onnx.stack}
