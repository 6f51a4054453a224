"""LSTM, GRU and RNN: every attribute against ONNX Runtime, states fed back, kernels, int8, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.jobs.check.originals import calls_of
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.helpers import evaluate_module

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = {"LSTM": 3, "GRU": 2, "RNN": 1}
ACTIVATIONS = "Affine Relu LeakyRelu ThresholdedRelu Tanh ScaledTanh Sigmoid HardSigmoid Elu Softsign Softplus".split()


def recurrent(operator, sizes, given=(), lengths=None, outputs=3, opset=14, kind="float32", seed=0, **attributes):
    """Return a network of one layer and data for it; ``given`` are the optional inputs that it has.

    ``sizes`` are steps, sequences, inputs and hidden units.
    """
    steps, batch, width, units = sizes
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    rows, state = GATES[operator] * units, (count, batch, units)
    data = (steps, batch, width)
    if attributes.get("layout"):
        data, state = (batch, steps, width), (batch, count, units)
    shapes = {"x": data, "w": (count, rows, width), "r": (count, rows, units), "b": (count, 2 * rows)}
    shapes |= {"h": state, "c": state, "p": (count, 3 * units)}
    arrays = {
        name: np.random.default_rng([seed, ord(name)]).uniform(-1, 1, shape).astype(kind)
        for name, shape in shapes.items()
    }
    if lengths is not None:
        arrays["lengths"] = np.array(lengths, "int32")
    optional = ("b", "lengths", "h", "c", "p")[: 5 if operator == "LSTM" else 3]
    names = ["x", "w", "r", *(name if name in given or (name == "lengths" and lengths) else "" for name in optional)]
    results = ["y", "yh", "yc"][: min(outputs, 3 if operator == "LSTM" else 2)]
    node = helper.make_node(operator, names, results, hidden_size=units, **attributes)
    inputs = [name for name in ("x", "h", "c") if name in names]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [node],
        "main",
        [helper.make_tensor_value_info(name, element, shapes[name]) for name in inputs],
        [helper.make_tensor_value_info(name, element, None) for name in results],
        [numpy_helper.from_array(arrays[name], name) for name in names if name and name not in inputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model, {name: arrays[name] for name in inputs}


def built(model, target="host"):
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model]))
    lowered = build.lower(mod, resolve(target))
    rules = {str(f.attrs["nnfuze.rule"]) for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert "fallback" not in rules
    runner = Runner(build.generate(lowered, resolve(target)), *signature(mod))

    def run(feeds):
        (results,) = runner.run(feeds).values()
        return [np.asarray(each) for each in (results.values() if isinstance(results, dict) else [results])]

    return run


def assert_equal(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert np.abs(mine - theirs).max() <= tolerance * max(np.abs(theirs).max(), 1e-2)


@st.composite
def layers(draw):
    """Any layer that ONNX Runtime computes, too."""
    operator = draw(st.sampled_from(sorted(GATES)))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    sizes = tuple(draw(st.integers(1, most)) for most in (5, 3, 5, 9))
    attributes = {"direction": direction}
    count = FUNCTIONS[operator] * (2 if direction == "bidirectional" else 1)
    if draw(st.booleans()):
        functions = st.sampled_from(ACTIVATIONS)
        parameters = st.lists(st.floats(0.1, 1.0), min_size=count, max_size=count)
        attributes["activations"] = draw(st.lists(functions, min_size=count, max_size=count))
        attributes |= {"activation_alpha": draw(parameters), "activation_beta": draw(parameters)}
    if draw(st.booleans()):
        attributes["clip"] = draw(st.floats(0.05, 1.0))
    if operator == "LSTM":
        attributes["input_forget"] = draw(st.integers(0, 1))
    if operator == "GRU":
        attributes["linear_before_reset"] = draw(st.integers(0, 1))
    lengths = draw(st.none() | st.lists(st.integers(0, sizes[0]), min_size=sizes[1], max_size=sizes[1]))
    given = draw(st.sets(st.sampled_from("bhcp")))
    return recurrent(
        operator, sizes, given, lengths, draw(st.integers(1, 3)), draw(st.sampled_from([7, 14, 22])), **attributes
    )


@settings(max_examples=60)
@given(layers())
def test_values_are_those_of_onnx_runtime(layer):
    model, feeds = layer
    assert_equal(evaluate_module(load([model]), feeds, "main"), calls_of(model)(feeds))


@pytest.mark.parametrize("operator", sorted(GATES))
@pytest.mark.parametrize("sizes", [(4, 2, 3, 5), (1, 3, 2, 4), (5, 1, 4, 6)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_sequences_first_is_steps_first_with_other_axes(operator, sizes, direction):
    model, feeds = recurrent(operator, sizes, "bhc", layout=1, direction=direction)
    other, swapped = recurrent(operator, sizes, "bhc", direction=direction)
    swapped = {name: np.swapaxes(value, 0, 1) for name, value in feeds.items()}
    states, *last = calls_of(other)(swapped)
    want = [states.transpose(2, 0, 1, 3), *(each.transpose(1, 0, 2) for each in last)]
    assert_equal(evaluate_module(load([model]), feeds, "main"), want)


@pytest.mark.parametrize("operator", sorted(GATES))
@pytest.mark.parametrize("kind", ["float16", "float64"])
@pytest.mark.parametrize("steps", [1, 4])
def test_other_floats(operator, kind, steps):
    model, feeds = recurrent(
        operator, (steps, 2, 3, 5), "bhc", kind=kind, **({"linear_before_reset": 1} if operator == "GRU" else {})
    )
    want = ReferenceEvaluator(model).run(None, feeds)
    assert_equal(evaluate_module(load([model]), feeds, "main"), want, 2e-3 if kind == "float16" else 1e-12)


@pytest.mark.parametrize(
    ("operator", "sizes", "attributes"),
    [
        ("LSTM", (7, 1, 12, 20), {"direction": "bidirectional", "clip": 0.8}),
        ("LSTM", (3, 4, 8, 35), {"direction": "bidirectional", "activations": ACTIVATIONS[:6]}),
        ("LSTM", (3, 1, 8, 20), {"direction": "bidirectional", "activations": ACTIVATIONS[5:]}),
        ("GRU", (6, 3, 8, 17), {"direction": "reverse", "activations": ["Sigmoid", "Elu"]}),
        ("GRU", (6, 1, 8, 64), {"linear_before_reset": 1}),
        ("GRU", (2, 1, 8, 16), {}),
        ("RNN", (5, 2, 6, 33), {"activations": ["LeakyRelu"]}),
        ("LSTM", (1, 1, 16, 24), {"direction": "bidirectional"}),
    ],
    ids=str,
)
def test_kernels_compute_them(operator, sizes, attributes):
    if "activations" in attributes:
        parameters = [0.5] * len(attributes["activations"])
        attributes = {**attributes, "activation_alpha": parameters, "activation_beta": parameters}
    model, feeds = recurrent(operator, sizes, "bhcp", **attributes)
    assert_equal(built(model)(feeds), calls_of(model)(feeds))


@pytest.mark.parametrize("operator", ["LSTM", "GRU"])
def test_200_steps_one_by_one_are_200_steps_at_once(operator):
    """States go out of one call and into the next; long sums of rounding errors stay small."""
    steps = 200
    whole, feeds = recurrent(operator, (steps, 1, 10, 24), "bhc")
    single, _ = recurrent(operator, (1, 1, 10, 24), "bhc")
    want = calls_of(whole)(feeds)
    assert_equal(built(whole)(feeds), want)
    run = built(single)
    states = {name: value for name, value in feeds.items() if name != "x"}
    rows = []
    for step in range(steps):
        row, *new = run({"x": feeds["x"][step : step + 1], **states})
        rows.append(row)
        states = dict(zip(states, new, strict=True))
    assert_equal([np.concatenate(rows), *states.values()], want)


def quantized_lstm(sizes, each, direction="forward", unsigned=False, **more):
    """Return a layer of Microsoft's 8-bit weights, with a scale per direction or each column."""
    model, feeds = recurrent("LSTM", sizes, "bhcp", direction=direction, **more)
    (node,) = model.graph.node
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for tensor in list(model.graph.initializer):
        if tensor.name not in "wr":
            continue
        values = numpy_helper.to_array(tensor).transpose(0, 2, 1)
        scale = np.abs(values).max(axis=1 if each else (1, 2)) / 127
        codes, zero = np.rint(values / scale.reshape(len(scale), 1, -1)), np.zeros(scale.shape, "int8")
        if unsigned:
            # What is far from the zero point needs nine bits.
            codes, zero = np.clip(codes + 100, 0, 255), np.full(scale.shape, 100, "uint8")
        tensor.CopyFrom(numpy_helper.from_array(codes.astype(zero.dtype), tensor.name))
        for name, array in (("scale", scale.astype("float32")), ("zero", zero)):
            model.graph.initializer.append(numpy_helper.from_array(array, f"{tensor.name}_{name}"))
    node.input.extend(f"{name}_{part}" for name in "wr" for part in ("scale", "zero"))
    return model, feeds


@pytest.mark.parametrize("each", [False, True], ids=["per layer", "per channel"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("sizes", [(4, 1, 12, 8), (1, 2, 3, 5), (9, 3, 5, 37), (70, 1, 6, 20)], ids=str)
def test_weights_of_8_bits(each, direction, sizes):
    """What is multiplied is quantized in each step, as ONNX Runtime does it."""
    model, feeds = quantized_lstm(sizes, each, direction, unsigned=sizes[0] == 4)
    assert_equal(evaluate_module(load([model]), feeds, "main"), calls_of(model)(feeds))


def test_kernels_of_weights_of_8_bits():
    """Sequences are quantized together, and the rest of the last vector is no part of the range."""
    model, feeds = quantized_lstm((7, 2, 5, 37), True, "bidirectional")
    run = Runner(build.build(load([model]), resolve("host")), *signature(load([model])))
    (results,) = run.run(feeds).values()
    assert_equal([np.asarray(each) for each in results.values()], calls_of(model)(feeds), 1e-4)


def test_weights_of_8_bits_stay_what_they_are_in_int8():
    model, feeds = quantized_lstm((3, 1, 6, 8), False)
    samples = {name: np.repeat(value, 2, 0) for name, value in feeds.items()}
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model]))
    integer = RealizeInteger()(InsertQDQ(samples, Policy.uniform(bits=8))(mod))
    assert_equal(evaluate_module(integer, feeds), calls_of(model)(feeds))


def test_not_a_number_stays_one():
    for name in ACTIVATIONS:
        activations = {"activations": [name], "activation_alpha": [0.5], "activation_beta": [0.5]}
        for steps in (1, 3):
            model, feeds = recurrent("RNN", (steps, 1, 2, 4), clip=1.0, **activations)
            feeds["x"][-1] = np.nan
            assert np.isnan(evaluate_module(load([model]), feeds, "main")[1]).all(), (name, steps)


def test_what_nothing_reads_is_not_computed():
    """Exporters name all outputs; without a use of the cell's state no row is kept for it, and Y is not copied."""
    model, _ = recurrent("LSTM", (5, 1, 3, 8), outputs=3)
    del model.graph.output[1:]
    calls = [op_name(b.value) for b in bindings(load([model])["main"])]
    assert calls == ["reshape", "matmul", "nnfuze.recurrence"]


def test_constant_data_are_computed_with_all_attributes():
    """ONNX's reference evaluator, which folds constants, knows no activations."""
    model, feeds = recurrent("RNN", (3, 1, 2, 4), activations=["Relu"])
    extra = helper.make_node("Add", ["y", "z"], ["sum"])
    model.graph.node.append(extra)
    model.graph.initializer.append(numpy_helper.from_array(feeds["x"], "x"))
    del model.graph.input[:], model.graph.output[:]
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))
    zero = {"z": np.zeros(1, "float32")}
    mod = load([model])
    assert [op_name(b.value) for b in bindings(mod["main"])] == ["add"]
    assert_equal(evaluate_module(mod, zero, "main"), calls_of(model)(zero))


@pytest.mark.parametrize("steps", [1, 6])
def test_int8(steps):
    """The products of what is no state in 8 bits, and of the states, too, where the steps are written out."""
    model, feeds = recurrent("LSTM", (steps, 1, 16, 32), "bhc")
    rng = np.random.default_rng(5)
    samples = {
        name: rng.uniform(-1, 1, (8 * len(value), *value.shape[1:])).astype("float32") for name, value in feeds.items()
    }
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model]))
    quantized = InsertQDQ(samples, Policy.uniform(bits=8))(mod)
    integer = RealizeInteger()(quantized)
    products = [str(b.var.ty.dtype) for b in bindings(integer["main"]) if op_name(b.value) == "matmul"]
    assert products == ["int32"] * (2 if steps == 1 else 1)
    got, want = Runner(build.build(quantized, resolve("host")), *signature(quantized)), calls_of(model)(feeds)
    (results,) = got.run(feeds).values()
    for mine, theirs in zip(results.values(), want, strict=True):
        assert np.abs(np.asarray(mine) - theirs).max() <= 0.03 * np.ptp(theirs)


def _with_input(model, name):
    """Make a constant of a model an input."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    model.graph.initializer.remove(tensor)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return model


@pytest.mark.parametrize("operator", sorted(GATES))
@pytest.mark.parametrize("steps", [1, 4])
def test_weights_that_are_no_constants(operator, steps):
    model, feeds = recurrent(operator, (steps, 1, 3, 5), "b")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name in tensors:
        _with_input(model, name)
    feeds |= tensors
    assert_equal(evaluate_module(load([model]), feeds, "main"), calls_of(model)(feeds))


REFUSED = {
    "activation 'softmax' is not supported": {"activations": ["Softmax"]},
    "activation 'affine' without activation_beta": {"activations": ["Affine"], "activation_alpha": [0.5]},
    "2 activations instead of 1": {"activations": ["Relu", "Relu"]},
    "direction 'sideways' is not supported": {"direction": "sideways"},
    "layout 2 is not supported": {"layout": 2},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_node_and_reason(reason):
    model, _ = recurrent("RNN", (3, 2, 2, 4), **REFUSED[reason])
    with pytest.raises(ModelError, match=rf"^main: node 'RNN_0' \(RNN\): .*{reason}") as caught:
        load([model])
    assert "\n" not in str(caught.value)


def test_lengths_must_be_constant():
    model, _ = recurrent("GRU", (3, 2, 2, 4), lengths=[3, 2])
    with pytest.raises(ModelError, match=r"node 'GRU_0' \(GRU\): sequence_lens that is no constant"):
        load([_with_input(model, "lengths")])


def test_opset_and_wrong_shapes():
    for name, axis in itertools.product("wrb", (0, 1)):
        model, _ = recurrent("LSTM", (3, 1, 2, 4), "b")
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.repeat(numpy_helper.to_array(tensor), 2, axis), name))
        with pytest.raises(ModelError, match=rf"{name.upper()} has shape"):
            load([model])
