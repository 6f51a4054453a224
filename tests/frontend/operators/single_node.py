"""Networks of one node, computed with NumPy and with kernels, against ONNX Runtime or ONNX's reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph.evaluate import executor
from nnfuze_tvm.passes import pipeline
from tests.helpers import run_module


def model(
    op: str,
    *operands: Any,
    constant: Iterable[int] = (),
    opset: int = 18,
    outputs: int = 1,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a network of one node and data for its inputs.

    Operands are arrays, or None for one that is left out; those with the numbers ``constant`` are weights.
    """
    weights = set(constant)
    arrays = {f"x{n}": np.asarray(each) for n, each in enumerate(operands) if each is not None}
    names = [f"x{n}" if each is not None else "" for n, each in enumerate(operands)]
    kept = {name: value for name, value in arrays.items() if int(name[1:]) not in weights}
    results = [f"y{n}" for n in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attributes)],
        "net",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in kept.items()],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [numpy_helper.from_array(value, name) for name, value in arrays.items() if name not in kept],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), kept


def imported(network: onnx.ModelProto) -> tvm.IRModule:
    """Return a network as a merged module."""
    return tvm.transform.Sequential(pipeline.merge_phases(None))(load([network], ["t"]))


def expected(network: onnx.ModelProto, feeds: dict[str, np.ndarray], reference: bool) -> list[np.ndarray]:
    """Return what ONNX Runtime makes of the inputs, or ONNX's reference."""
    if reference:
        return [np.asarray(each) for each in ReferenceEvaluator(network).run(None, feeds)]
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def check(op: str, *operands: Any, reference: bool = False, kernels: bool = False, **node: Any) -> tvm.IRModule:
    """Check values, types and shapes of one node; computed by kernels, or with NumPy.

    Returns
    -------
    tvm.IRModule
        The network.
    """
    network, feeds = model(op, *operands, **node)
    mod = imported(network)
    want = expected(network, feeds, reference)
    got = run_module(build.lower(mod, resolve("host")), feeds, level=0) if kernels else executor(mod)(feeds)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if theirs.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs)
            continue
        finite = np.abs(theirs[np.isfinite(theirs)])
        tolerance = (1e-2 if theirs.dtype == "float16" else 1e-5) * max(finite.max(initial=0), 1e-30)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)
    return mod
