"""One node through the import, computed with NumPy or by its kernels, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from tests.helpers import evaluate_module, run_module

onnxruntime.set_default_logger_severity(4)


def numbers(*shape, seed=0, dtype="float32"):
    """Return normally distributed numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def node_model(
    op: str,
    operands: Sequence[np.ndarray | None],
    constants: Sequence[int] = (),
    opset: int = 19,
    outputs: Sequence[str] = ("y",),
    domain: str = "",
    **attributes,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a model of one node and what its inputs are; ``constants`` are the operands that the file has."""
    names = [f"x{n}" if value is not None else "" for n, value in enumerate(operands)]
    given = {n: value for n, value in enumerate(operands) if value is not None}
    feeds = {names[n]: value for n, value in given.items() if n not in constants}
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain=domain, **attributes)],
        "net",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs if name],
        [numpy_helper.from_array(value, names[n]) for n, value in given.items() if n in constants],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def check(op, operands, constants=(), kernels=False, tolerance=1e-4, want=None, **node):
    """Compare the node's results with ``want``, by default ONNX Runtime's: values, types and shapes."""
    model, feeds = node_model(op, operands, constants, **node)
    run = run_module if kernels else evaluate_module
    results = run(load([model], tasks=["net"]), feeds, "net")
    if want is None:
        want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    for expected, actual in zip(want, results, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        if expected.dtype.kind != "f":
            np.testing.assert_array_equal(actual, expected)
            continue
        span = np.abs(expected[np.isfinite(expected)]).max(initial=1e-6)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * span)


def refusal(op, operands, constants=(), **node) -> str:
    """Return why a node is refused."""
    model, _ = node_model(op, operands, constants, **node)
    with pytest.raises(ModelError) as caught:
        load([model], tasks=["net"])
    return str(caught.value)
