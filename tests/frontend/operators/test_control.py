"""Branches, loops and sequences against ONNX Runtime, computed with NumPy: the graph is what is tested."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load, onnx_import
from nnfuze_tvm.graph import dataflow
from tests.frontend.operators.one_node import check_network, refusal
from tests.helpers import evaluate_module

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def info(name, shape=None, dtype=FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes, inputs=(), outputs=(), weights=None, name="body"):
    given = [numpy_helper.from_array(np.asarray(value), key) for key, value in (weights or {}).items()]
    infos = [
        [each if isinstance(each, onnx.ValueInfoProto) else info(each) for each in side] for side in (inputs, outputs)
    ]
    return helper.make_graph(list(nodes), name, *infos, given)


def model(nodes, inputs, outputs, weights=None, opset=17):
    return helper.make_model(
        graph(nodes, inputs, outputs, weights, "net"), opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs.split()[0]}", **attributes)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def branches(then, other, condition="flag"):
    return node("If", condition, "y", then_branch=then, else_branch=other)


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("shape", [[], [1]])
def test_computed_condition_chooses(flag, shape):
    then = graph([node("Mul", "x w", "t")], (), ["t"], {"w": random(4)})
    other = graph([node("Sqrt", "x", "e")], (), ["e"])  # NaN where x is negative
    network = model([branches(then, other)], [info("x", [3, 4]), info("flag", shape, BOOL)], ["y"])
    check_network(network, {"x": random(3, 4), "flag": np.full(shape, flag)})


def test_known_condition_keeps_one_branch_whatever_the_other_holds():
    dead = graph(
        [node("Missing", "x", "a"), helper.make_node("Thing", ["x", "a"], ["t"], name="thing", domain="vendor")],
        (),
        ["t"],
    )
    live = graph([node("Relu", "x", "e")], (), ["e"])
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape one", "size"),
        node("Equal", "size one", "flag"),
        branches(dead, live),
    ]
    network = model(nodes, [info("x", [2, 3])], ["y"], {"one": np.array(1)})
    result = evaluate_module(load([network], ["net"]), {"x": random(2, 3)}, "net")
    np.testing.assert_array_equal(result[0], np.maximum(random(2, 3), 0))
    other = model(nodes, [info("x", [2, 1])], ["y"], {"one": np.array(1)})
    message = refusal(other)
    assert message == "net: unsupported operators: Missing (Missing_a), vendor.Thing (thing)"


def test_everything_that_is_needed_is_refused_in_all_files_at_once():
    lacking = graph([node("Missing", "x", "t")], (), ["t"])
    fine = graph([node("Relu", "x", "e")], (), ["e"])
    inputs = [info("x", [2, 2]), info("flag", [], BOOL)]
    conditional = model([branches(lacking, fine)], inputs, ["y"])
    with pytest.raises(ModelError) as caught:
        load([conditional, conditional], ["one", "two"])
    text = "unsupported operators: Missing (Missing_t)"
    assert str(caught.value) == f"one: {text} | two: {text}"
    plain = model([node("Missing", "x", "z"), branches(lacking, fine)], inputs, ["y", "z"])
    assert refusal(plain) == "net: unsupported operators: Missing (Missing_z, Missing_t)"


@pytest.mark.parametrize(
    ("then", "other", "reason"),
    [
        ([node("Flatten", "x", "t")], [node("Relu", "x", "e")], "as float32 [2, 6] and as float32 [2, 3, 2]"),
        ([node("Cast", "x", "t", to=INT64)], [node("Relu", "x", "e")], "as int64 [2, 3, 2] and as float32"),
        ([node("Div", "n k", "d"), node("Cast", "d", "c", to=FLOAT), node("Add", "c x", "t")],
         [node("Relu", "x", "e")], "divides by computed integers"),
        ([node("GatherElements", "x i", "t")], [node("Relu", "x", "e")], "reads or writes at computed places"),
    ],
)  # fmt: skip
def test_what_can_not_be_chosen_is_refused(then, other, reason):
    inputs = [info("x", [2, 3, 2]), info("flag", [], BOOL), info("n", [2], INT64), info("k", [2], INT64)]
    inputs.append(info("i", [2, 3, 2], INT64))
    network = model([branches(graph(then, (), ["t"]), graph(other, (), ["e"]))], inputs, ["y"])
    assert "node 'If_y' (If): its condition is computed, and" in refusal(network)
    assert reason in refusal(network)


_NO_LSTM = [
    node("Constant", "", "axes", value_ints=[0]),
    node("Unsqueeze", "x axes", "long"),
    node("LSTM", "long wx wh", "t", hidden_size=2),
]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("MatMul", "x x", "t")],
        [node("MatMul", "x x", "m"), node("Missing", "m", "m2"), node("Relu", "m2", "t")],
        [node("If", "flag", "t", then_branch=graph([node("MatMul", "x x", "a")], (), ["a"]),
              else_branch=graph([node("Concat", "x w", "b", axis=1)], (), ["b"]))],
        _NO_LSTM,
    ],
)  # fmt: skip
def test_a_branch_that_has_no_meaning_with_these_shapes_gives_nan(nodes):
    then, other = graph(nodes, (), ["t"]), graph([node("Relu", "x", "e")], (), ["e"])
    weights = {"w": random(5, 5), "wx": random(1, 8, 4), "wh": random(1, 8, 2)}
    inputs = [info("x", [2, 3, 4]), info("flag", [], BOOL)]
    mod = load([model([branches(then, other)], inputs, ["y"], weights)], ["net"])
    x = random(2, 3, 4)
    np.testing.assert_array_equal(evaluate_module(mod, {"x": x, "flag": np.array(False)}, "net")[0], np.maximum(x, 0))
    assert np.isnan(evaluate_module(mod, {"x": x, "flag": np.array(True)}, "net")[0]).all()
    # Nobody takes it now.
    assert "node 'If_y' (If): no branch can be computed with these shapes: node" in refusal(
        model([branches(then, graph(nodes, (), ["t"], name="again"))], inputs, ["y"], weights)
    )
    # Whole numbers have no NaN.
    then = graph([*nodes, node("ArgMax", "t", "n")], (), ["n"])
    other = graph([node("ArgMax", "x", "k")], (), ["k"])
    text = refusal(model([branches(then, other)], inputs, [info("y", None, INT64)], weights))
    assert "a branch can't be computed with these shapes: node" in text


def test_a_division_outside_of_the_branches_is_no_matter():
    inputs = [info("flag", [], BOOL), info("n", [2], INT64), info("k", [2], INT64)]
    then = graph([node("Neg", "q", "t")], (), [info("t", [2], INT64)])
    other = graph([node("Identity", "q", "same")], (), [info("same", [2], INT64)])
    nodes = [node("Div", "n k", "q"), node("If", "flag", "y", then_branch=then, else_branch=other)]
    network = model(nodes, inputs, [info("y", [2], INT64)])
    check_network(network, {"flag": np.array(True), "n": np.array([7, -7]), "k": np.array([2, 3])})


def sums(steps, condition="", inner=()):
    """A loop that adds ``x`` times the number of the iteration, and hands out what it has so far."""
    body = graph(
        [
            node("Cast", "i", "f", to=FLOAT),
            node("Mul", "x f", "part"),
            node("Add", "before part", "after"),
            node("Identity", "after", "seen"),
            node("Identity", "going", "on"),
            *inner,
        ],
        [info("i", [], INT64), info("going", [], BOOL), info("before", [2])],
        [info("on", [], BOOL), info("after", [2]), info("seen", [2])],
    )
    weights = {"n": np.array(steps), "start": random(2, seed=1)}
    weights |= {"no": np.array(False)} if condition else {}
    loop = helper.make_node("Loop", ["n", condition, "start"], ["last", "all"], name="loop", body=body)
    return model([loop], [info("x", [2])], ["last", "all"], weights)


@pytest.mark.parametrize(("steps", "condition"), [(5, ""), (1, ""), (0, ""), (3, "no")])
def test_loop_with_a_known_count(steps, condition):
    check_network(sums(steps, condition), {"x": random(2)})


def test_loop_that_ends_itself_shadows_names_and_grows():
    """The body's condition follows from its counter; the carried tensor is longer after every iteration."""
    inner = graph([node("Add", "x v", "w")], (), ["w"])
    outer = graph([node("Sub", "x v", "w")], (), ["w"])
    body = graph(
        [
            node("Less", "i three", "on"),
            node("Add", "i one", "next"),
            node("Equal", "i one", "second"),
            node("If", "second", "x2", then_branch=inner, else_branch=outer),
            node("Concat", "x x2", "longer", axis=0),
        ],
        [info("i", [], INT64), info("going", [], BOOL), info("x", [None])],
        [info("on", [], BOOL), info("longer", [None])],
        {"v": np.float32(0.5), "one": np.array(1)},
    )
    loop = helper.make_node("Loop", ["", "", "x"], ["y"], name="loop", body=body)
    check_network(model([loop], [info("x", [2])], ["y"], {"three": np.array(3)}), {"x": random(2)})


def test_loops_without_a_known_end_are_refused(monkeypatch):
    network = sums(3)
    network.graph.input.append(info("n", [], INT64))
    del network.graph.initializer[0]
    assert "node 'loop' (Loop): its number of iterations is computed" in refusal(network)
    network = sums(3)
    body = network.graph.node[0].attribute[0].g
    body.node[4].CopyFrom(node("Less", "limit total", "on"))
    body.node.insert(4, node("ReduceSum", "after", "total", keepdims=0))
    body.initializer.append(numpy_helper.from_array(np.float32(9), "limit"))
    assert "node 'loop' (Loop): whether it goes on is computed" in refusal(network)
    monkeypatch.setattr(onnx_import, "MOST_UNROLLED", 100)
    assert "more than 100 nodes" in refusal(sums(1 << 62))


def scan(opset=17, back=(0, 0), axes=(0, 0), out_axis=0, out_back=0):
    """A running sum over two scanned inputs."""
    body = graph(
        [node("Add", "a b", "ab"), node("Add", "state ab", "new"), node("Mul", "new outer", "out")],
        [info("state", [3]), info("a", [3]), info("b", [3])],
        [info("new", [3]), info("out", [3])],
    )
    if opset == 8:
        attributes = {"directions": back}
        inputs, shapes = ["", "start", "p", "q"], ([2, 3], [2, 4, 3], [2, 4, 3])
    else:
        attributes = {"scan_input_directions": back, "scan_input_axes": axes}
        attributes |= {"scan_output_axes": [out_axis], "scan_output_directions": [out_back]}
        inputs = ["start", "p", "q"]
        shapes = ([3], *([4, 3] if axis % 2 == 0 else [3, 4] for axis in axes))
    loop = helper.make_node("Scan", inputs, ["last", "all"], name="scan", body=body, num_scan_inputs=2, **attributes)
    values = {
        name: random(*shape, seed=n) for n, (name, shape) in enumerate(zip(("start", "p", "q"), shapes, strict=True))
    }
    infos = [info(name, shape) for name, shape in zip(values, shapes, strict=True)]
    return model([loop], infos, ["last", "all"], {"outer": np.float32(2)}, opset), values


@settings(max_examples=10, deadline=None)
@given(
    back=st.tuples(*[st.integers(0, 1)] * 2),
    axes=st.tuples(*[st.sampled_from([0, 1, -1])] * 2),
    out_axis=st.sampled_from([0, 1, -1]),
    out_back=st.integers(0, 1),
)
def test_scan_in_any_direction_over_any_axis(back, axes, out_axis, out_back):
    network, feeds = scan(17, back, axes, out_axis, out_back)
    check_network(network, feeds)


@pytest.mark.parametrize("back", [(0, 0), (1, 0)])
def test_scan_with_a_batch(back):
    network, feeds = scan(8, back)
    network.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(3, 2, "float32"), "outer"))
    check_network(network, feeds)


def test_sequences_are_gone_after_the_import():
    network = model(
        [
            node("SplitToSequence", "x two", "pieces", axis=1),
            node("SequenceAt", "pieces last", "tail"),
            node("SequenceErase", "pieces zero", "fewer"),
            node("SequenceInsert", "fewer x", "more"),
            node("SequenceLength", "more", "count"),
            node("ConcatFromSequence", "more", "y", axis=-1),
            node("SequenceConstruct", "tail tail", "pair"),
            node("ConcatFromSequence", "pair", "z", axis=-1, new_axis=1),
        ],
        [info("x", [2, 5])],
        ["y", "z", info("count", [], INT64)],
        {"two": np.array(2), "last": np.array(-1), "zero": np.array(0)},
    )
    check_network(network, {"x": random(2, 5)})


def test_sequence_that_a_loop_fills():
    body = graph(
        [
            node("Identity", "going", "on"),
            node("Cast", "i", "f", to=FLOAT),
            node("Mul", "x f", "row"),
            node("SequenceInsert", "before row", "after"),
        ],
        [info("i", [], INT64), info("going", [], BOOL),
         helper.make_tensor_sequence_value_info("before", FLOAT, None)],
        [info("on", [], BOOL), helper.make_tensor_sequence_value_info("after", FLOAT, None)],
    )  # fmt: skip
    nodes = [
        node("SequenceEmpty", "", "none"),
        helper.make_node("Loop", ["n", "", "none"], ["rows"], name="loop", body=body),
        node("ConcatFromSequence", "rows", "y", axis=0),
    ]
    check_network(model(nodes, [info("x", [3, 2])], ["y"], {"n": np.array(3)}), {"x": random(3, 2)})


def test_sequences_where_they_can_not_be_are_refused():
    output = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    assert "output 'y' is a sequence" in refusal(
        model([node("SequenceConstruct", "x x", "y")], [info("x", [2])], [output])
    )
    nodes = [node("SequenceConstruct", "x x", "s"), node("SequenceAt", "s k", "y")]
    assert "computed position" in refusal(model(nodes, [info("x", [2]), info("k", [], INT64)], ["y"]))


def test_a_loop_and_a_choice_as_kernels():
    then = graph([node("Identity", "last", "t")], (), ["t"])
    other = graph([node("Neg", "last", "e")], (), ["e"])
    network = sums(3)
    network.graph.input.append(info("rate", [], INT64))
    network.graph.initializer.append(numpy_helper.from_array(np.array(16000), "high"))
    network.graph.node.extend([node("Equal", "rate high", "flag"), branches(then, other)])
    network.graph.output.append(info("y"))
    for rate in (8000, 16000):
        check_network(network, {"x": random(2), "rate": np.array(rate)}, kernels=True)


def test_weights_of_a_body_are_there_once():
    network = sums(4, inner=())
    body = network.graph.node[0].attribute[0].g
    body.node[1].CopyFrom(node("MatMul", "x big", "part"))
    body.initializer.append(numpy_helper.from_array(random(2, 2), "big"))
    main = load([network], ["net"])["net"]
    found = [b.value.args[1] for b in dataflow.bindings(main) if dataflow.op_name(b.value) == "matmul"]
    assert len(found) == 4 and all(each.same_as(found[0]) for each in found)


@pytest.mark.parametrize("operator", ["RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"])
def test_random_values_are_refused(operator):
    network = model([node(operator, "x", "y")], [info("x", [2, 3])], ["y"])
    assert refusal(network) == f"net: unsupported operators: {operator} ({operator}_y)"


@pytest.mark.parametrize("operator", ["RandomNormal", "RandomUniform"])
def test_random_constants_are_refused(operator):
    nodes = [node(operator, "", "r", shape=[3]), node("Add", "x r", "y")]
    network = model(nodes, [info("x", [2, 3])], ["y"])
    assert refusal(network) == f"net: unsupported operators: {operator} ({operator}_r)"
