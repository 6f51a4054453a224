"""Operators that pick, order, repeat or accumulate values; channels that they touch stay whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers
from nnfuze_tvm.graph.integers.values import Known
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_moving as onnx
from nnfuze_tvm.graph.ops.moving import move
from nnfuze_tvm.graph.ops.operator import Example, Operator, Train, as_its_operand, grows


def _take(call: Call, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    return np.take(data, indices, axis, mode="clip" if str(call.attrs.mode) == "clip" else "raise")


def _picks(call: Call) -> bool:
    """Tell whether it is an image, or the like, of which constant places along one axis are taken."""
    data, indices = call.args
    return (
        call.attrs.axis is not None
        and not isinstance(data, GenericConst)
        and isinstance(indices, GenericConst)
        and len(static_shape(indices)) == 1
    )


def _couple_take(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    """Keep the axis along which is picked whole; others pass."""
    if not _picks(call):
        return None
    labels = list(coupling.tensor(call.args[0]))
    axis = int(call.attrs.axis) % len(labels)
    coupling.channels.fix(labels[axis])
    labels[axis] = np.full(static_shape(var)[axis], FIXED)
    return labels


def _integer_take(context: Integers, call: Call, name: str) -> Known | None:
    return move(context, call, name) if _picks(call) else None


def _transposed_take(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    if not _picks(call):
        return None
    return op.take(sources[0], call.args[1], axes[int(call.attrs.axis) % len(axes)], str(call.attrs.mode))


def _gather_elements(call: Call, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    axis = int(call.attrs.axis) % data.ndim
    # Along other axes there may be fewer indices than data.
    own = tuple(slice(None if n == axis else size) for n, size in enumerate(indices.shape))
    return np.take_along_axis(data[own], indices, axis)


def _flip(call: Call, data: np.ndarray) -> np.ndarray:
    return np.flip(data, int(call.attrs.axis))


def _tile(call: Call, data: np.ndarray) -> np.ndarray:
    return np.tile(data, [int(each) for each in call.attrs.repeats])


def _repeat(call: Call, data: np.ndarray) -> np.ndarray:
    return np.repeat(data, int(call.attrs.repeats), None if call.attrs.axis is None else int(call.attrs.axis))


def _accumulated(function: Callable[..., np.ndarray], start: float) -> Callable[..., np.ndarray]:
    def evaluate(call: Call, data: np.ndarray) -> np.ndarray:
        axis = None if call.attrs.axis is None else int(call.attrs.axis)
        data = data.ravel() if axis is None else data
        total = function(data, axis=axis or 0)
        if not int(call.attrs.exclusive):
            return total
        first = np.full_like(total.take([0], axis or 0), start)
        return np.concatenate([first, total.take(range(total.shape[axis or 0] - 1), axis or 0)], axis or 0)

    return evaluate


def _ordered(call: Call, data: np.ndarray) -> np.ndarray:
    ordered = np.sort(data, int(call.attrs.axis))
    return np.flip(ordered, int(call.attrs.axis)) if call.attrs.descending else ordered


def _largest(call: Call, data: np.ndarray) -> Any:
    """Return values and their places; of equal ones the first comes first."""
    axis, count = int(call.attrs.axis), int(call.attrs.k)
    if call.attrs.largest:
        backwards = np.argsort(np.flip(data, axis), axis, kind="stable")
        places = data.shape[axis] - 1 - np.flip(backwards, axis)
    else:
        places = np.argsort(data, axis, kind="stable")
    places = places.take(range(count), axis)
    both = {"values": np.take_along_axis(data, places, axis), "indices": places}
    wanted = str(call.attrs.ret_type)
    return tuple(both.values()) if wanted == "both" else both[wanted]


def _scattered(call: Call, data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    axis, reduction = int(call.attrs.axis) % data.ndim, str(call.attrs.reduction)
    places: list[np.ndarray] = list(np.indices(indices.shape))
    places[axis] = np.where(indices < 0, indices + data.shape[axis], indices)
    result = data.copy()
    if reduction == "update":
        result[tuple(places)] = updates
        return result
    combine = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    combine.at(result, tuple(places), updates)
    return result


def _triangle(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def evaluate(_: Call, data: np.ndarray, offset: int) -> np.ndarray:
        return function(data, offset)

    return evaluate


def _torch_take(torch: Any, call: Call, data: Any, indices: Any) -> Any:
    axis = call.attrs.axis
    data, axis = (data.flatten(), 0) if axis is None else (data, int(axis) % data.ndim)
    size = data.shape[axis]
    clips = str(call.attrs.mode) == "clip"
    places = indices.clamp(0, size - 1) if clips else torch.where(indices < 0, indices + size, indices)
    return data.index_select(axis, places.flatten()).reshape(static_shape(call))


def _torch_gather(torch: Any, call: Call, data: Any, indices: Any) -> Any:
    axis = int(call.attrs.axis) % data.ndim
    return torch.gather(data, axis, torch.where(indices < 0, indices + data.shape[axis], indices))


def _torch_scatter(torch: Any, call: Call, data: Any, indices: Any, updates: Any) -> Any:
    axis, reduction = int(call.attrs.axis) % data.ndim, str(call.attrs.reduction)
    places = torch.where(indices < 0, indices + data.shape[axis], indices)
    if reduction == "update":
        return torch.scatter(data, axis, places, updates)
    combine = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return torch.scatter_reduce(data, axis, places, updates, combine)


def _torch_accumulated(name: str, start: float) -> Train:
    def train(torch: Any, call: Call, data: Any) -> Any:
        data, axis = (data.flatten(), 0) if call.attrs.axis is None else (data, int(call.attrs.axis))
        total = getattr(torch, name)(data, axis)
        if not int(call.attrs.exclusive):
            return total
        first = torch.full_like(total.narrow(axis, 0, 1), start)
        return torch.cat([first, total.narrow(axis, 0, total.shape[axis] - 1)], axis)

    return train


def _torch_largest(torch: Any, call: Call, data: Any) -> Any:
    axis, wanted = int(call.attrs.axis), str(call.attrs.ret_type)
    values, places = torch.sort(data, dim=axis, descending=bool(call.attrs.largest), stable=True)
    both = {"values": values, "indices": places}
    both = {name: each.narrow(axis, 0, int(call.attrs.k)) for name, each in both.items()}
    return tuple(both.values()) if wanted == "both" else both[wanted]


def _torch_ordered(torch: Any, call: Call, data: Any) -> Any:
    return torch.sort(data, dim=int(call.attrs.axis), descending=bool(call.attrs.descending)).values


def _torch_triangle(name: str) -> Train:
    return lambda torch, _, data, offset: getattr(torch, name)(data, offset)


def _torch_repeat(torch: Any, call: Call, data: Any) -> Any:
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    return torch.repeat_interleave(data, int(call.attrs.repeats), axis)


def _torch_filled(torch: Any, call: Call, *_: Any) -> Any:
    return torch.from_numpy(_filled(call))


def _filled(call: Call, *_: Any) -> np.ndarray:
    return np.full(static_shape(call), 1 if call.op.name.endswith(("ones", "ones_like")) else 0)


def _full(call: Call, *values: Any) -> np.ndarray:
    return np.full(static_shape(call), values[1])


def _torch_full(_: Any, call: Call, *values: Any) -> Any:
    return values[1].broadcast_to(static_shape(call))


def _operator(evaluate: Any, *examples: Example, **facts: Any) -> Operator:
    # What makes constants is computed before there are kernels.
    kernels = facts.pop("kernels", ("elementwise", "fallback") if examples else ())
    return Operator(effect="mixes", evaluate=evaluate, examples=examples, kernels=kernels, **facts)


_DATA = ((2, 8, 6),)

OPERATORS = {
    "take": _operator(
        _take,
        Example(_DATA, lambda x: op.take(x, relax.const(np.array([5, 0, 2])), 1)),
        train=_torch_take,
        couple=_couple_take,
        degrees=grows(1, None),
        moves=_picks,
        integer=_integer_take,
        nonnegative=as_its_operand,
        transposed=_transposed_take,
    ),
    "gather_elements": _operator(
        _gather_elements,
        Example(_DATA, lambda x: op.gather_elements(x, relax.const(np.arange(24).reshape(2, 2, 6) % 8), 1)),
        train=_torch_gather,
        degrees=grows(1, None),
    ),
    "scatter_elements": Operator(
        effect="mixes",
        evaluate=_scattered,
        train=_torch_scatter,
        examples=tuple(
            Example(
                (*_DATA, (2, 3, 6)),
                lambda x, y, reduction=reduction: op.scatter_elements(
                    x, relax.const(np.arange(36).reshape(2, 3, 6) % 7), y, 1, reduction
                ),
            )
            for reduction in ("update", "add", "max")
        ),
        kernels=("fallback",),
    ),
    "topk": Operator(
        effect="mixes",
        evaluate=_largest,
        train=_torch_largest,
        examples=tuple(
            Example(_DATA, lambda x, largest=largest: op.topk(x, 3, 1, "both", largest, "int64"))
            for largest in (True, False)
        ),
        kernels=("fallback",),
    ),
    "flip": _operator(
        _flip,
        Example(_DATA, lambda x: op.flip(x, 1)),
        train=lambda _, call, data: data.flip(int(call.attrs.axis)),
        degrees=grows(1),
    ),
    "tile": _operator(
        _tile,
        Example(_DATA, lambda x: op.tile(x, (2, 1, 3))),
        train=lambda torch, call, data: torch.tile(data, [int(each) for each in call.attrs.repeats]),
        degrees=grows(1),
    ),
    "repeat": _operator(_repeat, Example(_DATA, lambda x: op.repeat(x, 2, 1)), train=_torch_repeat, degrees=grows(1)),
    "cumsum": _operator(
        _accumulated(np.cumsum, 0),
        Example(_DATA, lambda x: op.cumsum(x, 1)),
        train=_torch_accumulated("cumsum", 0),
        degrees=grows(1),
        kernels=("scan",),
    ),
    "cumprod": _operator(
        _accumulated(np.cumprod, 1),
        Example(_DATA, lambda x: op.cumprod(x, 1)),
        train=_torch_accumulated("cumprod", 1),
        kernels=("scan",),
    ),
    "sort": _operator(
        _ordered,
        Example(_DATA, lambda x: op.sort(x, -1)),
        train=lambda torch, call, data: (
            torch.sort(data, dim=int(call.attrs.axis), descending=bool(call.attrs.descending)).values
        ),
    ),
    "tril": _operator(
        _triangle(np.tril),
        Example(_DATA, lambda x: op.tril(x, 0)),
        train=lambda torch, _, data, offset: torch.tril(data, offset),
    ),
    "triu": _operator(
        _triangle(np.triu),
        Example(_DATA, lambda x: op.triu(x, 1)),
        train=lambda torch, _, data, offset: torch.triu(data, offset),
    ),
    **{name: _operator(_filled, train=_torch_filled) for name in ("zeros", "ones", "zeros_like", "ones_like")},
    **{name: _operator(_full, train=_torch_full) for name in ("full", "full_like")},
}

ONNX = {
    "take": onnx.take,
    "gather_elements": onnx.gather_elements,
    "scatter_elements": onnx.scatter_elements,
    "topk": onnx.topk,
    "flip": onnx.flip,
    "tile": onnx.tile,
    "repeat": onnx.repeat,
    "cumsum": onnx.cumsum,
    "cumprod": onnx.cumprod,
    "sort": onnx.sort,
    "tril": onnx.triangle(0),
    "triu": onnx.triangle(1),
    **dict.fromkeys(("zeros", "zeros_like"), onnx.filled(0)),
    **dict.fromkeys(("ones", "ones_like"), onnx.filled(1)),
    **dict.fromkeys(("full", "full_like"), onnx.full),
}
