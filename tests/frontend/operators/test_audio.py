"""Spectra against ONNX's reference and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.frontend.operators.one_node import check, check_network, one_node, refusal


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 9),
    length=st.none() | st.integers(1, 12),
    parts=st.sampled_from([1, 2]),
    inverse=st.booleans(),
    onesided=st.booleans(),
    axis=st.sampled_from([1, -2, 2, -3]),
    opset=st.sampled_from([17, 20]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_dft(size, length, parts, inverse, onesided, axis, opset, dtype):
    if onesided:
        # A real signal there, its spectrum back.
        parts = 2 if inverse else 1
        size = max(size, 2)
    shape = [2, 3, 4, parts]
    shape[axis] = size
    given_length = None if length is None else np.array(length)
    if opset == 20:
        inputs, attributes = [random(*shape, dtype=dtype), given_length, np.array(axis)], {}
        known = [n for n in (1, 2) if inputs[n] is not None]
    else:
        inputs, attributes = [random(*shape, dtype=dtype), given_length], {"axis": axis}
        known = [1] if length is not None else []
    attributes |= {"inverse": int(inverse), "onesided": int(onesided)}
    check("DFT", inputs, known, opset=opset, reference=True, **attributes)


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(2, 12),
    step=st.integers(1, 6),
    more=st.integers(0, 20),
    windowed=st.booleans(),
    onesided=st.booleans(),
    trailing=st.sampled_from([(), (1,), (2,)]),
)
def test_stft(length, step, more, windowed, onesided, trailing):
    signal = random(2, length + more, *trailing)
    window = random(length, seed=1) if windowed else None
    inputs = [signal, np.array(step), window, np.array(length)]
    known = [n for n in (1, 2, 3) if inputs[n] is not None]
    check("STFT", inputs, known, onesided=int(onesided and trailing != (2,)))


def test_spectra_as_kernels():
    check("STFT", [random(1, 400), np.array(50), np.hanning(100).astype("float32")], [1, 2], kernels=True)
    check("DFT", [random(1, 3, 64, 1), None, np.array(2)], [2], opset=20, onesided=1, kernels=True)


@pytest.mark.parametrize("periodic", [0, 1])
def test_windows_and_filter_banks_are_made_by_the_import(periodic):
    """The front end of a keyword spotter: frames, windows, power, mel bands."""
    sizes = {"size": 64, "step": 32, "bands": 10, "rate": 8000}
    numbers = {"low": 20.0, "high": 3800.0}
    weights = [numpy_helper.from_array(np.array(value), name) for name, value in sizes.items()]
    weights += [numpy_helper.from_array(np.array(value, "float32"), name) for name, value in numbers.items()]
    nodes = [
        helper.make_node("HannWindow", ["size"], ["hann"], periodic=periodic),
        helper.make_node("HammingWindow", ["size"], ["hamming"], periodic=periodic),
        helper.make_node("BlackmanWindow", ["size"], ["blackman"], periodic=periodic),
        helper.make_node("Sum", ["hann", "hamming", "blackman"], ["window"]),
        helper.make_node("STFT", ["x", "step", "window"], ["spectrum"]),
        helper.make_node("ReduceSumSquare", ["spectrum"], ["power"], axes=[3], keepdims=0),
        helper.make_node("MelWeightMatrix", ["bands", "size", "rate", "low", "high"], ["bank"]),
        helper.make_node("MatMul", ["power", "bank"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 320])]
    infos += [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], weights)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    check_network(network, {"x": random(1, 320)})


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "reason"),
    [
        ("DFT", [random(1, 8, 1), np.array(4)], {}, "a computed dft_length"),
        ("DFT", [random(1, 8, 3)], {}, "its last axis has 3 parts"),
        ("DFT", [random(1, 8, 2)], {"onesided": 1}, "onesided spectra of complex signals"),
        ("DFT", [random(1, 8, 1)], {"axis": 2}, "axis 2 is none of the signal's 2"),
        ("DFT", [np.zeros((1, 8192, 1), "float32")], {}, "of length 8192 is too long"),
        ("STFT", [random(1, 8), np.array(2), random(4)], {}, "a computed frame_step"),
        ("HannWindow", [np.array(4)], {}, "a computed size of a window"),
    ],
)
def test_refused(operator, inputs, attributes, reason):
    network, _ = one_node(operator, inputs, **attributes)
    message = refusal(network)
    assert message.startswith(f"net: node 'node' ({operator}): ") and reason in message
