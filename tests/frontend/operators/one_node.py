"""Networks of one node, computed with NumPy or by their kernels, against ONNX Runtime or ONNX's reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.jobs.check.originals import calls_of
from nnfuze_tvm.passes import pipeline
from tests.helpers import evaluate_module, run_module


def numbers(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Return normally distributed numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def one_node(
    operator: str,
    operands: Sequence[Any],
    known: Iterable[int] = (),
    *,
    opset: int = 19,
    outputs: int | Sequence[str] = 1,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Return a network of one node, ``node``, and data for its inputs ``x0``, ``x1``, ….

    Parameters
    ----------
    operator
        Its type, behind its domain and a dot where that isn't ONNX's own.
    operands
        Arrays, or None for one that is left out.
    known
        The numbers of those that are weights.
    outputs
        How many, or their names.
    """
    domain, _, name = operator.rpartition(".")
    known = set(known)
    arrays = {n: np.asarray(each) for n, each in enumerate(operands) if each is not None}
    names = [f"x{n}" if n in arrays else "" for n in range(len(operands))]
    feeds = {names[n]: value for n, value in arrays.items() if n not in known}
    results = [f"y{n}" for n in range(outputs)] if isinstance(outputs, int) else list(outputs)
    graph = helper.make_graph(
        [helper.make_node(name, names, results, name="node", domain=domain, **attributes)],
        "net",
        [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for key, value in feeds.items()
        ],
        [helper.make_empty_tensor_value_info(key) for key in results if key],
        [numpy_helper.from_array(value, names[n]) for n, value in arrays.items() if n in known],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def imported(network: onnx.ModelProto) -> tvm.IRModule:
    """Return a network as a merged module."""
    return tvm.transform.Sequential(pipeline.merge_phases(None))(load([network], ["net"]))


def check_network(
    network: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    *,
    kernels: bool = False,
    reference: bool = False,
    want: Sequence[np.ndarray] | None = None,
    tolerance: float | None = None,
) -> None:
    """Check values, types and shapes of all outputs.

    Parameters
    ----------
    kernels
        Compute them by the kernels that are shipped, not with NumPy.
    reference
        Compare with ONNX's reference, not with ONNX Runtime.
    want
        Compare with these.
    tolerance
        How far floats may be off, in parts of the largest one: 1e-5, of float16 1e-2.
    """
    if want is None and reference:
        want = [np.asarray(each) for each in ReferenceEvaluator(network).run(None, dict(feeds))]
    elif want is None:
        want = calls_of(network)(feeds)
    if kernels:
        got = run_module(build.lower(imported(network), resolve("host")), feeds, level=0)
    else:
        got = evaluate_module(load([network], ["net"]), feeds, "net")
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if theirs.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs)
            continue
        near = tolerance or (1e-2 if theirs.dtype == "float16" else 1e-5)
        wide = theirs.astype("float64")
        span = np.abs(wide[np.isfinite(wide)]).max(initial=1e-30)
        np.testing.assert_allclose(mine.astype("float64"), wide, rtol=0, atol=near * span)


def check(
    operator: str,
    operands: Sequence[Any],
    known: Iterable[int] = (),
    *,
    kernels: bool = False,
    reference: bool = False,
    want: Sequence[np.ndarray] | None = None,
    tolerance: float | None = None,
    **node: Any,
) -> None:
    """Check a network of one node: `one_node`, then `check_network`."""
    network, feeds = one_node(operator, operands, known, **node)
    check_network(network, feeds, kernels=kernels, reference=reference, want=want, tolerance=tolerance)


def refusal(network: onnx.ModelProto) -> str:
    """Return the one line that says why a network is not taken."""
    with pytest.raises(ModelError) as caught:
        load([network], ["net"])
    assert "\n" not in str(caught.value)
    return str(caught.value)
