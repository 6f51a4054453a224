"""Padding around a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.batching import along
from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.values import Known, Quantized
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_moving as onnx
from nnfuze_tvm.graph.ops.operator import Example, Operator

# What NumPy calls them.
_MODES = {"replicate": "edge", "circular": "wrap"}


def _widths(call: Call) -> np.ndarray:
    return np.array([int(width) for width in call.attrs.pad_width]).reshape(-1, 2)


def _evaluate(call: Call, value: np.ndarray, *_: Any) -> np.ndarray:
    mode = str(call.attrs.pad_mode)
    if mode == "constant":
        return np.pad(value, _widths(call), constant_values=np.asarray(call.attrs.pad_value, value.dtype))
    return np.pad(value, _widths(call), _MODES.get(mode, mode))  # type: ignore[call-overload]


def _train(torch: Any, call: Call, value: Any, *_: Any) -> Any:
    mode, widths = str(call.attrs.pad_mode), _widths(call)
    if mode == "constant":
        behind_first = [int(width) for pair in widths[::-1] for width in pair]
        return torch.nn.functional.pad(value, behind_first, value=float(call.attrs.pad_value))
    for axis, width in enumerate(widths):
        places = np.pad(np.arange(value.shape[axis]), width, _MODES.get(mode, mode))  # type: ignore[call-overload]
        value = value.index_select(axis, torch.from_numpy(places))
    return value


def _couple(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    result = []
    for each, size, width in zip(coupling.tensor(call.args[0]), static_shape(var), _widths(call), strict=True):
        if width.any():
            coupling.channels.fix(each)
        result.append(np.full(size, FIXED) if width.any() else each)
    return result


def _integer(context: Integers, call: Call, _: str) -> Known | None:
    value = context.value(call.args[0])
    if not isinstance(value, Quantized) or str(call.attrs.pad_mode) != "constant":
        return None
    if float(call.attrs.pad_value) != 0 or not value.codes.lo <= value.zero_point <= value.codes.hi:
        return None
    widths = [int(width) for width in call.attrs.pad_width]
    return context.with_expr(value, lambda expr: op.nn.pad(expr, widths, pad_value=value.zero_point))


def _proportional(call: Call) -> tuple[int, ...]:
    return (0,) if str(call.attrs.pad_mode) != "constant" or float(call.attrs.pad_value) == 0 else ()


def _position(call: Call, axis: int) -> int | None:
    return None if _widths(call)[axis].any() else axis


OPERATORS = {
    "nn.pad": Operator(
        effect="moves",
        evaluate=_evaluate,
        train=_train,
        examples=(Example(((2, 8, 6, 6),), lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1])),),
        couple=_couple,
        integer=_integer,
        proportional=_proportional,
        half=True,
        batch=along(_position, fuses=True),
        kernels=("elementwise",),
    ),
}

ONNX = {"nn.pad": onnx.pad}
