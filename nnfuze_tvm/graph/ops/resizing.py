"""Images of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.values import Known
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops.moving import move
from nnfuze_tvm.graph.ops.operator import Example, Operator
from nnfuze_tvm.graph.ops.pooling import couple


def _copies(call: Call) -> bool:
    return str(call.attrs.method) == "nearest_neighbor"


def _integer(context: Integers, call: Call, name: str) -> Known | None:
    return move(context, call, name) if _copies(call) else None


def _transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    attrs = call.attrs
    layout = "".join(str(attrs.layout)[axes.index(axis)] for axis in range(len(axes)))
    if layout not in ("NCHW", "NHWC"):
        return None
    return op.image.resize2d(
        sources[0],
        call.args[1],
        [float(each) for each in attrs.roi],
        layout,
        str(attrs.method),
        str(attrs.coordinate_transformation_mode),
        str(attrs.rounding_method),
        float(attrs.cubic_alpha),
        int(attrs.cubic_exclude),
        float(attrs.extrapolation_value),
        attrs.out_dtype or None,
    )


def _train(torch: Any, call: Call, data: Any, _: Any) -> Any:
    """Return the image resized along one axis after the other: of each place two neighbours, or the nearest."""
    attrs, layout = call.attrs, str(call.attrs.layout)
    if str(attrs.method) not in ("nearest_neighbor", "linear") or any(float(each) for each in attrs.roi):
        raise NotImplementedError(f"resizing with method {attrs.method!r}")
    for axis, letter in enumerate(layout):
        if letter in "NC" or data.shape[axis] == static_shape(call)[axis]:
            continue
        size = data.shape[axis]
        at = _coordinates(size, static_shape(call)[axis], str(attrs.coordinate_transformation_mode))
        if str(attrs.method) == "nearest_neighbor":
            nearest = _ROUNDINGS[str(attrs.rounding_method) or "round"](at)
            data = data.index_select(axis, torch.from_numpy(np.clip(nearest, 0, size - 1).astype("int64")))
            continue
        low = np.floor(at)
        part = torch.from_numpy((at - low).astype("float32").reshape([-1 if n == axis else 1 for n in range(4)]))
        below, above = (
            data.index_select(axis, torch.from_numpy(np.clip(place, 0, size - 1).astype("int64")))
            for place in (low, low + 1)
        )
        data = below + (above - below) * part
    return data


def _coordinates(size: int, new: int, mode: str) -> np.ndarray:
    """Return where along an axis of ``size`` each of ``new`` places is."""
    places = np.arange(new)
    if mode == "align_corners":
        return places * ((size - 1) / max(new - 1, 1))
    if mode == "asymmetric":
        return places * (size / new)
    if mode in ("half_pixel", "pytorch_half_pixel"):
        at = (places + 0.5) * (size / new) - 0.5
        return at if new > 1 or mode == "half_pixel" else at * 0
    raise NotImplementedError(f"resizing with coordinates {mode!r}")


_ROUNDINGS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "round": lambda at: np.floor(at + 0.5),
    "round_prefer_ceil": lambda at: np.floor(at + 0.5),
    "round_prefer_floor": lambda at: np.ceil(at - 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


OPERATORS = {
    "image.resize2d": Operator(
        effect="mixes",
        train=_train,
        examples=(
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12), method="nearest_neighbor")),
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12))),
        ),
        couple=couple,
        moves=_copies,
        proportional=lambda call: () if float(call.attrs.extrapolation_value) else (0,),
        integer=_integer,
        transposed=_transposed,
        kernels=("elementwise",),
    ),
}

ONNX = {"image.resize2d": onnx.resized}
