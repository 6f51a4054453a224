"""Elementwise operators: their values against ONNX Runtime in all their types, NaN and infinities included."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from tests.frontend.operators.one_node import imported, one_node, refusal
from tests.helpers import evaluate_module

NAN, INF = np.nan, np.inf
SPECIAL = np.array([NAN, INF, -INF, 0, 0.3, -0.3, 2.5, -2.5, 1e-3, -1e-3, 7, -7, 60, -60, 100, -100])
SMALL = np.array([3, -7, 0, 5, 8, -8, 2, -1])


def check(operator, arrays, constants=(), opset=22, **attributes):
    """Compare each value with ONNX Runtime's, or with those of ONNX's own evaluator where that has no kernel."""
    model, feeds = one_node(operator, arrays, constants, opset=opset, **attributes)
    try:
        (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    except Exception:
        (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    (got,) = evaluate_module(load([model], ["t"]), feeds, "t")
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.dtype.kind in "biu":
        np.testing.assert_array_equal(got, expected)
    else:
        rtol = 3e-3 if got.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(got.astype("f8"), expected.astype("f8"), rtol=rtol, atol=rtol / 20)


def value(operator, arrays, constants=(), **attributes):
    """Return what a node computes."""
    model, feeds = one_node(operator, arrays, constants, **attributes)
    return evaluate_module(load([model], ["t"]), feeds, "t")[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Relu", {}), ("Elu", {"alpha": 0.5}), ("Selu", {}), ("Selu", {"alpha": 2.0, "gamma": 3.0}), ("Mish", {}),
        ("Softplus", {}), ("Softsign", {}), ("HardSigmoid", {"alpha": 0.3}), ("HardSwish", {}), ("LeakyRelu", {}),
        ("ThresholdedRelu", {"alpha": 0.5}), ("Shrink", {"lambd": 0.4, "bias": 0.25}), ("Shrink", {"lambd": -0.4}),
        ("IsInf", {}), ("IsInf", {"detect_negative": 0}), ("IsInf", {"detect_positive": 0}), ("IsNaN", {}),
        ("Gelu", {}), ("Gelu", {"approximate": "tanh"}), ("Sinh", {}), ("Cosh", {}), ("Atan", {}), ("Tanh", {}),
    ],
)  # fmt: skip
def test_functions_of_special_values(operator, attributes, dtype):
    check(operator, [SPECIAL.astype(dtype)], **attributes)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_celu_and_swish(alpha):
    finite = SPECIAL[np.isfinite(SPECIAL)].astype("float32")
    check("Celu", [finite], alpha=alpha)
    got = value("Swish", [finite], opset=24, alpha=alpha)
    wide = finite.astype("float64")
    np.testing.assert_allclose(got, wide / (1 + np.exp(-alpha * wide)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("operator", ["Max", "Min"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_extremes_of_several_with_broadcasting(operator, count):
    operands = [np.array([[NAN, 1, 2], [3, NAN, -1]], "f4"), np.array([0, NAN, 1], "f4"), np.array([[1], [2]], "f4")]
    check(operator, operands[:count])
    check(operator, operands[:count], constants=(1,))
    check(operator, [np.arange(4, dtype="i8"), np.array([2, 1, 5, 0])])


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 6), (0, None), (None, 2), (3, 1), (None, None)])
def test_clip(low, high):
    finite = SPECIAL[~np.isinf(SPECIAL)].astype("float32")
    bounds = [None if bound is None else np.array(bound, "float32") for bound in (low, high)]
    check("Clip", [finite, *bounds], constants=(1, 2))
    check("Clip", [finite, *bounds])


def test_clip_refuses_bounds_that_are_nan():
    message = refusal(one_node("Clip", [SPECIAL.astype("f4"), np.array(NAN, "f4")], (1,))[0])
    assert "(Clip)" in message and "NaN" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1, 1), (1, 5, 1, 1), (6,), (5, 4, 6), (2, 1, 1, 1)])
def test_slopes_of_any_shape(shape, dtype):
    rng = np.random.default_rng(0)
    data, slope = (rng.integers(-9, 9, size).astype(dtype) for size in ((2, 5, 4, 6), shape))
    check("PRelu", [data, slope], constants=(1,), opset=16)
    check("PRelu", [data, slope], opset=16)


def test_slopes_that_would_grow_the_data_are_refused():
    message = refusal(one_node("PRelu", [np.zeros(3, "f4"), np.zeros((2, 3), "f4")])[0])
    assert "(PRelu)" in message and "slope of shape [2, 3]" in message


@pytest.mark.parametrize(("base", "exponent"), ["fl", "fi", "ff", "lf", "il", "li", "df", "fd", "ef"])
def test_powers_of_two_types(base, exponent):
    values = np.array([-3, 2, 0, 1, 2.5, 7]).astype(base)
    check("Pow", [values, np.array([2, 3, 2, 0, 1, 2], exponent)])
    for number in (0, 1, 2, 3):
        check("Pow", [values, np.array(number, exponent)], constants=(1,))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders(dtype, fmod):
    left, right = np.array([-4, 7, 5, 4, -7, 8]), np.array([2, -3, 8, -2, 3, 5])
    if dtype == "float32":
        left, right = (np.append(side * 1.1, [2.0, -2.0, NAN]) for side in (left, right))
        right[-2:] = INF
    if dtype == "uint8":
        left, right = abs(left), abs(right)
    operands = [left.astype(dtype), right.astype(dtype)]
    expected = (np.fmod if fmod else np.mod)(*operands)
    np.testing.assert_allclose(value("Mod", operands, fmod=fmod, opset=13), expected, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(left=st.integers(-(2**63), 2**63 - 1), right=st.integers(-(2**63), 2**63 - 1).filter(lambda n: n not in (0, -1)))
def test_quotients_of_large_integers_are_exact(left, right):
    got = value("Div", [np.array([left]), np.array([right])])
    assert int(got[0]) == abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int32"])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("constants", [(), (1,)])
def test_bits_that_are_shifted_out(dtype, direction, constants):
    kind = np.dtype(dtype)
    bits = kind.itemsize * 8
    amounts = np.array([0, 1, bits - 1, bits, bits + 3]).astype(dtype)
    number = 201 if kind.kind == "u" else -55
    data = np.full(5, number, dtype)
    got = value("BitShift", [data, amounts], constants, direction=direction)
    shifted = [number << int(n) if direction == "LEFT" else number >> int(n) for n in amounts]
    assert [int(value) % 2**bits for value in got] == [value % 2**bits for value in shifted]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64", "float32", "float16"])
def test_signs(dtype):
    check("Sign", [SMALL.astype(dtype)])


def test_equality_of_truth_values():
    check("Equal", [np.array([True, False, True]), np.array([[True], [False]])])


def test_what_can_not_be_said_of_integers_is_refused():
    message = refusal(one_node("Shrink", [SMALL], bias=1.5)[0])
    assert "(Shrink)" in message and "bias 1.5 of integers" in message


@pytest.mark.parametrize("kind", [onnx.TensorProto.STRING, onnx.TensorProto.INT4, onnx.TensorProto.BFLOAT16])
def test_other_types_are_refused_in_one_line(kind):
    model, _ = one_node("Identity", [SMALL])
    model.graph.input[0].type.tensor_type.elem_type = kind
    name = onnx.TensorProto.DataType.Name(kind).lower()
    assert refusal(model) == f"net: input 'x0': type {name} is not supported"


def built(models, feeds):
    mod = tvm.transform.Sequential(pipeline.merge_phases(None))(load(models, [f"t{k}" for k in range(len(models))]))
    return Runner(build.build(mod, resolve("host")), *signature(mod)).run(feeds)


def test_a_number_may_come_as_a_vector_of_one():
    numbers = [np.float32(2), np.float32(3)]
    network, feeds = one_node("Mul", numbers)
    got = built([network], {name: np.ascontiguousarray(number) for name, number in feeds.items()})
    assert got["t0"].shape == () and got["t0"] == 6


def test_kernels_keep_nan():
    data = np.resize(SPECIAL, 40).astype("float32")
    operands = {
        "Relu": [data], "HardSigmoid": [data], "Sinh": [data], "Cosh": [data], "Elu": [data], "Erf": [data],
        "Max": [data, np.roll(data, 1)], "Min": [data, np.float32(0.5)], "Clip": [data, np.float32(0), np.float32(6)],
    }  # fmt: skip
    models = [one_node(name, arrays, range(1, 3))[0] for name, arrays in operands.items()]
    for got, model in zip(built(models, {"x0": data}).values(), models, strict=True):
        (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x0": data})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("target", "written"), [("rpi5", "llvm.maximum"), ("x86-64-v3", "T.max(T.float32(0.0), ")])
def test_a_relu_is_one_instruction_that_keeps_nan(target, written):
    mod = imported(one_node("Relu", [np.zeros(64, "f4")])[0])
    assert written in build.fuse(mod, resolve(target)).script()


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "computed"])
def test_what_was_added_is_taken_away_with_its_rounding(constant):
    """As exporters round: TVM would take ``(x + c) - c`` for ``x``, and ``x - x`` for zero."""
    x, c = np.array([[0.3, 1.7, -2.5, 7.49]], "float32"), np.full((1, 4), 1.5 * 2**23, "float32")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["a"]), helper.make_node("Sub", ["a", "c"], ["y"]),
         helper.make_node("Sub", ["x", "x"], ["z"])],
        "net",
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in ("xc"[:1] if constant else "xc")],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "yz"],
        [numpy_helper.from_array(c, "c")] if constant else [],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model], ["net"]))
    runner = Runner(build.build(mod, resolve("host")), *signature(mod))
    x[0, 3] = np.inf
    feeds = {"x": x} if constant else {"x": x, "c": c}
    for name, found in runner.run(feeds)["net"].items():
        np.testing.assert_array_equal(found, x + c - c if name == "y" else [[0, 0, 0, np.nan]])
