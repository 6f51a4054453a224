"""Graphs as ONNX networks: every example of every operator, computed by ONNX Runtime and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.frontend.export import export
from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import Emitter, Value
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.ops.operator import Example
from nnfuze_tvm.graph.ops.recurrence import recurrence
from nnfuze_tvm.graph.recurrent.form import Form
from nnfuze_tvm.passes import pipeline
from tests.graph.calls import calls, examples

# Angles of all four quadrants are no operator of ONNX.
WITHOUT = {"atan2"}
# A recurrent layer with bounds of its cell.
BOUNDED = "task/nnfuze.recurrence-1"
FAMILIES = sorted({operator.family for operator in ops.OPERATORS.values() if operator.examples})


def answers(model: Any, inputs: dict[str, np.ndarray], optimized: bool = True) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_equal(got: list[np.ndarray], want: list[np.ndarray], names: list[str]) -> None:
    for name, one, other in zip(names, got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        if other.dtype.kind != "f":
            np.testing.assert_array_equal(one, other, err_msg=name)
            continue
        size = max(float(np.abs(other).max(initial=0)), 1e-3)
        tolerance = (2e-3 if other.dtype == "float16" else 1e-5) * size
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=name)


def check(named: dict[str, Example], *, again: bool = False) -> None:
    """Compare ONNX Runtime, and the network when it is loaded again, with the graph."""
    mod, inputs = calls(named)
    model, want = export(mod), evaluate(mod["main"], inputs)
    names = [output.name for output in ir.task_outputs(mod)]
    assert_equal(answers(model, inputs), want, names)
    if again:
        assert_equal(evaluate(load([model], ["net"])["net"], inputs), want, names)


def call(make: Callable[..., Value], *shapes: tuple[int, ...], constants: int = 0) -> dict[str, Example]:
    return {"task/call": Example(shapes, make, constants=constants)}


def test_only_these_have_no_form():
    assert {name for name, operator in ops.OPERATORS.items() if operator.examples and not operator.export} == WITHOUT


@pytest.mark.parametrize("family", FAMILIES)
def test_examples(family):
    named = {name: each for name, each in examples(family).items() if name[5:].rsplit("-", 1)[0] not in WITHOUT}
    named.pop(BOUNDED, None)
    check(named, again=True)


def test_cells_with_bounds_are_refused():
    mod, _ = calls({BOUNDED: examples("recurrence")[BOUNDED]})
    with pytest.raises(ModelError, match="has a cell with bounds"):
        export(mod)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_what_has_no_form_is_refused(name):
    mod, _ = calls({"task/angle": ops.OPERATORS[name].examples[0]})
    with pytest.raises(ModelError, match=f"^task/angle: {name} can't be exported: it has no form in ONNX$"):
        export(mod)


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    transposed=st.booleans(),
)
def test_convolutions(rank, groups, stride, dilation, pads, transposed):
    facts = {"strides": stride, "dilation": dilation, "groups": groups, "padding": pads[: 2 * rank]}
    kernel = (3, 2, 3)[:rank]
    name = f"conv{rank}d_transpose" if transposed else f"conv{rank}d"
    if transposed:
        facts["output_padding"] = [stride - 1] * rank
    weight = (4, 8 // groups, *kernel) if transposed else (8, 4 // groups, *kernel)
    make = lambda x, w: getattr(op.nn, name)(x, w, **facts)  # noqa: E731
    check(call(make, (2, 4, *(7, 6, 5)[:rank]), weight, constants=1))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["max", "avg"]),
    size=st.integers(2, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    ceil=st.booleans(),
)
def test_poolings(kind, size, stride, dilation, pads, ceil):
    facts = {"strides": stride, "dilation": dilation, "padding": pads, "ceil_mode": ceil, "count_include_pad": True}
    check(call(lambda x: getattr(op.nn, f"{kind}_pool2d")(x, [size, size], **facts), (1, 2, 9, 8)))


def integers(values: Any, dtype: str = "int64") -> Value:
    return relax.const(np.asarray(values, dtype), dtype)


OTHERS: dict[str, dict[str, Example]] = {
    "average without padding": call(
        lambda x: op.nn.avg_pool2d(x, [3, 3], [2, 2], [1, 0, 1, 1], ceil_mode=True), (1, 2, 7, 8)
    ),
    "adaptive, even": call(lambda x: op.nn.adaptive_avg_pool2d(x, [3, 2]), (1, 2, 6, 8)),
    "adaptive, uneven": call(lambda x: op.nn.adaptive_avg_pool3d(x, [3, 2, 4]), (1, 2, 7, 5, 6)),
    "slice to the front": call(lambda x: op.strided_slice(x, [0, 1], [5, -1], [-9, 0], [-2, -1]), (7, 6)),
    "take clips": call(lambda x: op.take(x, integers([[-3, 9], [0, 2]]), 0, mode="clip"), (4, 3)),
    "take of a vector": call(lambda x: op.take(x, integers([[5, 7]], "int32"), None), (9,)),
    "tile to more axes": call(lambda x: op.tile(x, (2, 1, 3)), (4, 3)),
    "tile less": call(lambda x: op.tile(x, (2,)), (4, 3)),
    "repeat all": call(lambda x: op.repeat(x, 2), (4, 3)),
    "sum before": call(lambda x: op.cumsum(x, 1, exclusive=True), (4, 7)),
    "product before": call(lambda x: op.cumprod(x, 0, exclusive=True), (5, 3)),
    "sum of all": call(lambda x: op.cumsum(x), (4, 3)),
    "downwards": call(lambda x: op.sort(x, 0, descending=True), (5, 3)),
    "places of the smallest": call(lambda x: op.topk(x, 2, 0, "indices", False, "int32"), (5, 3)),
    "place of all": call(lambda x: op.argmax(x, None), (5, 3)),
    "edges": call(lambda x: op.nn.pad(x, [1, 0, 2, 1], pad_mode="replicate"), (5, 3)),
    "reflection": call(lambda x: op.nn.pad(x, [1, 0, 2, 1], pad_mode="reflect"), (5, 3)),
    "padding of a number": call(lambda x: op.nn.pad(x, [1, 0, 2, 1], pad_value=-1.5), (5, 3)),
    "concat of vectors": call(lambda x, y: op.concat([x, y], None), (3,), (4,)),
    "stack": call(lambda x, y: op.stack([x, y], -1), (2, 3), (2, 3)),
    "resized by corners": call(
        lambda x: op.image.resize2d(x, (7, 9), method="linear", coordinate_transformation_mode="align_corners"),
        (1, 2, 4, 5),
    ),
    "cubic": call(lambda x: op.image.resize2d(x, (9, 10), method="cubic", cubic_alpha=-0.75), (1, 2, 4, 5)),
    "repeated pixels": call(
        lambda x: op.image.resize2d(
            x, (12, 15), method="nearest_neighbor", coordinate_transformation_mode="asymmetric", rounding_method="floor"
        ),
        (1, 2, 4, 5),
    ),
    "soft": call(lambda x: op.nn.softplus(x, beta=2.0, threshold=20.0), (4, 9)),
    "rest of what is negative": call(lambda x: op.mod(x, relax.const(-0.37, "float32")), (4, 9)),
    "rest with the divisor's sign": call(lambda x: op.floor_mod(x, relax.const(-0.37, "float32")), (4, 9)),
    "divided down": call(
        lambda x: op.floor_divide(
            op.astype(op.multiply(x, relax.const(9.0, "float32")), "int32"), integers(-2, "int32")
        ),
        (4, 9),
    ),
    "shifted right": call(
        lambda x: op.right_shift(
            op.astype(op.multiply(x, relax.const(99.0, "float32")), "int32"), integers(2, "int32")
        ),
        (4, 9),
    ),
    "bounds of bytes": call(
        lambda x: op.clip(op.astype(op.multiply(op.abs(x), relax.const(99.0, "float32")), "uint8"), 7, 255), (4, 9)
    ),
    "bytes": call(
        lambda x: op.matmul(
            op.astype(op.multiply(x, relax.const(99.0, "float32")), "int8"),
            integers(np.arange(-9, 9).reshape(9, 2), "int8"),
            out_dtype="int32",
        ),
        (4, 9),
    ),
    "shorts": call(
        lambda x: op.matmul(
            op.astype(op.multiply(x, relax.const(999.0, "float32")), "int16"),
            integers(np.arange(-9, 9).reshape(9, 2), "int16"),
            out_dtype="int32",
        ),
        (4, 9),
    ),
    "codes by channel": call(
        lambda x: op.dequantize(
            op.quantize(x, relax.const(np.float32([0.01, 0.02])), integers([0, 3], "uint8"), axis=1, out_dtype="uint8"),
            relax.const(np.float32([0.01, 0.02])),
            integers([0, 3], "uint8"),
            axis=1,
        ),
        (4, 2, 3),
    ),
    "shorts by channel": call(
        lambda x: op.dequantize(
            op.quantize(x, relax.const(np.float32(0.01)), integers(3, "int16"), axis=0, out_dtype="int16"),
            relax.const(np.float32(0.01)),
            integers(3, "int16"),
            axis=0,
        ),
        (4, 2, 3),
    ),
    "full": call(lambda x: op.add(x, op.full((4, 2), relax.const(0.5, "float32"), "float32")), (4, 2)),
    "ones": call(lambda x: op.add(op.ones_like(x), op.zeros((4, 2), "float32")), (4, 2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name):
    check(OTHERS[name])


REFUSED = {
    "max_pool2d .* padding as wide as its windows": lambda x: op.nn.max_pool2d(x, [2, 2], padding=2),
    "conv2d .* layouts NHWC": lambda x: op.nn.conv2d(
        x, relax.const(np.ones((3, 1, 1, 4), "float32")), data_layout="NHWC", kernel_layout="OHWI"
    ),
    "resize2d .* rounds between two pixels": lambda x: op.image.resize2d(
        x, (2, 2), method="nearest_neighbor", rounding_method="round"
    ),
    "resize2d .* has the layout NHWC": lambda x: op.image.resize2d(x, (8, 8), layout="NHWC"),
    "take .* by the mode 'wrap'": lambda x: op.take(x, integers([3, 9]), 1, mode="wrap"),
    "softplus .* threshold of 3": lambda x: op.nn.softplus(x, threshold=3.0),
    "einsum .* has no form": lambda x: op.einsum((x,), "abcd->ab"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_not_be_written_is_refused(message):
    mod, _ = calls(call(REFUSED[message], (1, 4, 4, 4)))
    with pytest.raises(ModelError, match=f"^task/call: .*{message}"):
        export(mod)


def test_states_in_8_bits_are_refused():
    example = ops.OPERATORS["nnfuze.recurrence"].examples[0]

    def make(*operands: Value) -> Value:
        made = example.call(*operands)
        return recurrence(replace(Form.of(made.attrs), scale=0.01), made.args)

    mod, _ = calls({"task/lstm": replace(example, call=make)})
    with pytest.raises(ModelError, match=r"^task/lstm: nnfuze.recurrence .* has states in 8 bits"):
        export(mod)


def test_kernels_are_refused():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            doubled = builder.emit_te(lambda t: tvm.te.compute(t.shape, lambda i: t[i] * 2.0), x)
            result = builder.emit_output(relax.Tuple([doubled]))
        builder.emit_func_output(result)
    mod = ir.with_task_outputs(builder.get(), [ir.TaskOutput("task", "y")])
    with pytest.raises(ModelError, match=r"kernel .* can't be exported: it is no ONNX operator"):
        export(mod)


def test_names():
    x = tvm.ir.Var("x", relax.TensorType((2, 3), "float32"))
    emitter = Emitter()
    layer = emitter.emit(op.nn.relu(x), "a/relu")
    other = emitter.emit(op.exp(layer), "b/exp")
    owners = [ir.TaskOutput(*each) for each in (("a", "y"), ("b", "p"), ("b", "q"), ("x", "y"), ("a", "y"))]
    main = emitter.finish([x], [layer, other, x, layer, other]).with_attr("global_symbol", "main")
    mod = ir.with_task_outputs(tvm.IRModule({"main": main}), owners).with_attr(ir.STATES_ATTR, ["x"])
    model = export(mod)
    assert [value.name for value in model.graph.input] == ["x"]
    # An output must not have an input's name.
    assert [value.name for value in model.graph.output] == ["a", "b/p", "b/q", "x/y", "x/next"]
    assert [node.name for node in model.graph.node][:2] == ["a/relu", "b/exp"]
    data = {"x": np.array([[-1, 0, 1], [2, 3, 4]], "float32")}
    assert_equal(answers(model, data), evaluate(main, data), [value.name for value in model.graph.output])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_one_node_again(kind):
    """The product of the input, a layer of its own here, is the node's, with its bias."""
    gates, rng = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], np.random.default_rng(0)
    weights = {"w": (2, gates * 6, 5), "r": (2, gates * 6, 6), "b": (2, 2 * gates * 6)}
    facts = {"hidden_size": 6, "direction": "bidirectional", **({"linear_before_reset": 1} if kind == "GRU" else {})}
    node = onnx.helper.make_node(kind, ["x", *weights], ["y"], name="layer", **facts)
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", (9, 2, 5)), ("y", (9, 2, 2, 6)))
    ]
    tensors = [
        onnx.numpy_helper.from_array(rng.uniform(-0.5, 0.5, shape).astype("float32"), name)
        for name, shape in weights.items()
    ]
    graph = onnx.helper.make_graph([node], "net", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model], ["net"]))
    again = export(mod)
    assert [node.op_type for node in again.graph.node].count(kind) == 1
    assert not {"MatMul", "Add"} & {node.op_type for node in again.graph.node}
    inputs = {"x": rng.standard_normal((9, 2, 5)).astype("float32")}
    assert_equal(answers(again, inputs), answers(model, inputs), ["y"])


@pytest.mark.parametrize(
    ("shape", "folds"),
    [((8, 1, 1), True), ((1, 8, 1, 1), True), ((1, 1, 1), False), ((6,), False), ((1, 1, 8, 1, 1), False)],
)
def test_biases_are_the_convolutions_own(shape, folds):
    def make(x: Value, weight: Value, bias: Value) -> Value:
        return op.add(op.nn.conv2d(x, weight, padding=1), bias)

    named = call(make, (1, 4, 5, 6), (8, 4, 3, 3), shape, constants=2)
    check(named)
    found = [node.op_type for node in export(calls(named)[0]).graph.node]
    assert found == (["Conv"] if folds else ["Conv", "Add"])


def test_what_is_returned_without_its_bias_keeps_it_apart():
    x = tvm.ir.Var("x", relax.TensorType((1, 4, 5, 6), "float32"))
    rng, emitter = np.random.default_rng(0), Emitter()
    layer = emitter.emit(op.nn.conv2d(x, relax.const(rng.standard_normal((8, 4, 3, 3)).astype("float32"))), "a/conv")
    total = emitter.emit(op.add(layer, relax.const(np.ones((8, 1, 1), "float32"))))
    main = emitter.finish([x], [layer, total]).with_attr("global_symbol", "main")
    mod = ir.with_task_outputs(tvm.IRModule({"main": main}), [ir.TaskOutput("a", "y"), ir.TaskOutput("b", "y")])
    data = {"x": rng.standard_normal((1, 4, 5, 6)).astype("float32")}
    assert_equal(answers(export(mod), data), evaluate(main, data), ["a", "b"])
