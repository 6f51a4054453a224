"""Networks of one node, against ONNX Runtime or ONNX's reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from tests.helpers import evaluate_module, run_module

Arrays = Sequence[np.ndarray | None]


def one_node(
    operator: str, inputs: Arrays, outputs: int = 1, known: Sequence[int] = (), opset: int = 17, **attributes: object
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a network of ``domain.operator``, whose ``known`` inputs are weights, and what it is fed with."""
    domain, _, name = operator.rpartition(".")
    names = [f"x{n}" if value is not None else "" for n, value in enumerate(inputs)]
    given = {names[n]: value for n, value in enumerate(inputs) if value is not None}
    weights = [numpy_helper.from_array(given.pop(names[n]), names[n]) for n in known]
    infos = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for key, value in given.items()
    ]
    results = [f"y{n}" for n in range(outputs)]
    node = helper.make_node(name, names, results, name="node", domain=domain, **attributes)
    graph = helper.make_graph([node], "net", infos, list(map(helper.make_empty_tensor_value_info, results)), weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), given


def check(
    network: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    tolerance: float = 1e-5,
    build: bool = False,
    reference: bool = False,
) -> None:
    """Compare all outputs: shapes, types, and values relative to their range."""
    if reference:
        expected = ReferenceEvaluator(network).run(None, dict(feeds))
    else:
        expected = onnxruntime.InferenceSession(network.SerializeToString()).run(None, dict(feeds))
    actual = (run_module if build else evaluate_module)(load([network], ["net"]), feeds, "net")
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        finite = other[np.isfinite(other)].astype("float64")
        span = max(np.ptp(finite), 1e-3) if finite.size else 1.0
        np.testing.assert_allclose(one.astype("float64"), other.astype("float64"), rtol=0, atol=tolerance * span)


def refusal(network: onnx.ModelProto) -> str:
    """Return the one line that says why a network is not taken."""
    with pytest.raises(ModelError) as caught:
        load([network], ["net"])
    assert "\n" not in str(caught.value)
    return str(caught.value)
