"""Importing ONNX networks: numerics against ONNX Runtime, the module's conventions, and every user error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.errors import InputError, ModelError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import dataflow, ir
from tests.helpers import run_module

LIGHT = Path(os.path.dirname(onnx.__file__)) / "backend" / "test" / "data" / "light"


def weight(name, *shape, seed=0, dtype="float32"):
    rng = np.random.default_rng([seed, *map(ord, name)])
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
    return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(fan_in)).astype(dtype), name)


def constant(name, values, dtype="int64"):
    return numpy_helper.from_array(np.array(values, dtype=dtype), name)


def network(nodes, inputs, outputs, weights=(), opset=17, name="net"):
    """A model with float inputs and outputs given as ``{name: shape}``."""

    def infos(shapes):
        return [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in shapes.items()]

    graph = helper.make_graph(list(nodes), name, infos(inputs), infos(outputs), list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def single(op, in_shape, out_shape, weights=(), opset=17, **attrs):
    """A model of one node that reads ``x`` and the weights."""
    node = helper.make_node(op, ["x", *(w.name if w is not None else "" for w in weights)], ["y"], **attrs)
    given = [w for w in weights if w is not None]
    return network([node], {"x": in_shape}, {"y": out_shape}, given, opset=opset)


def keyword_net(seed=0, name="net"):
    """Two convolutions, a residual add and a dense head; batch and one node name are left open."""
    nodes = [
        helper.make_node("Conv", ["audio", "w1", "b1"], ["c1"], name="/conv 1", pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["a"]),
        helper.make_node("Relu", ["a"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], transB=1, name="layer1.0/fc"),
    ]
    weights = [
        weight("w1", 8, 1, 3, 3, seed=seed),
        weight("b1", 8, seed=seed),
        weight("w2", 8, 8, 3, 3, seed=seed),
        weight("b2", 8, seed=seed),
        weight("w3", 5, 8, seed=seed),
        weight("b3", 5, seed=seed),
    ]
    return network(nodes, {"audio": ["N", 1, 9, 8]}, {"logits": ["N", 5]}, weights, name=name)


def assert_matches_onnxruntime(model, tolerance=1e-4):
    """Load ``model``, run it, and compare with ONNX Runtime relative to the range of each output."""
    mod = load([model], tasks=["net"])
    tvm.relax.analysis.well_formed(mod)
    rng = np.random.default_rng(7)
    params = mod["net"].params
    feeds = {p.name: rng.standard_normal(ir.static_shape(p)).astype(str(p.ty.dtype)) for p in params}
    # Unoptimized, because ONNX Runtime's int8 kernels may saturate on CPUs without VNNI.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    for expected, actual in zip(session.run(None, feeds), run_module(mod, feeds, "net"), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert np.abs(actual - expected).max() <= tolerance * max(np.ptp(expected), 1e-6)


CASES = {
    "network": keyword_net(),
    "depthwise": single("Conv", [1, 6, 7, 7], [1, 6, 7, 7], [weight("w", 6, 1, 3, 3)], group=6, pads=[1] * 4),
    "same-lower": single("Conv", [1, 2, 8, 9], None, [weight("w", 3, 2, 4, 3)], auto_pad="SAME_LOWER"),
    "same-upper-strided": single(
        "Conv", [1, 2, 8, 9], None, [weight("w", 3, 2, 3, 3)], auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    "conv1d": single("Conv", [1, 4, 16], None, [weight("w", 3, 4, 5), weight("b", 3)], dilations=[2]),
    "transposed": single("ConvTranspose", [1, 4, 5, 5], None, [weight("w", 4, 3, 3, 3)], strides=[2, 2]),
    "gemm-scaled": single("Gemm", [2, 4], [2, 3], [weight("w", 4, 3), weight("b", 3)], alpha=0.5, beta=2.0),
    "gemm-no-bias": single("Gemm", [2, 4], [2, 3], [weight("w", 3, 4)], transB=1),
    "gemm-transposed": single("Gemm", [4, 2], [2, 3], [weight("w", 4, 3)], transA=1),
    "batched-matmul": single("MatMul", [2, 3, 4], [2, 3, 5], [weight("w", 4, 5)]),
    "batch-norm": single(
        "BatchNormalization",
        [1, 3, 4, 4],
        [1, 3, 4, 4],
        [weight("s", 3), weight("b", 3), weight("m", 3), constant("v", [0.5, 1, 2], "float32")],
    ),
    "clip": single("Clip", [4, 4], [4, 4], [constant("lo", 0, "float32"), constant("hi", 0.5, "float32")]),
    "clip-low": single("Clip", [4, 4], [4, 4], [constant("lo", -0.5, "float32")]),
    "clip-high": single("Clip", [4, 4], [4, 4], [None, constant("hi", 0.5, "float32")]),
    "clip-nothing": single("Clip", [4, 4], [4, 4], [None, None]),
    "clip-crossed": single("Clip", [4, 4], [4, 4], [constant("lo", 1, "float32"), constant("hi", -1, "float32")]),
    "clip-attributes": single("Clip", [4, 4], [4, 4], opset=10, min=0.0, max=0.5),
    "dropout": single("Dropout", [4, 4], [4, 4]),
    "identity": single("Identity", [4, 4], [4, 4]),
    "sum": single("Sum", [2, 3], [2, 3], [weight("a", 3), weight("b", 2, 3)]),
    "mean": single("Mean", [2, 3], [2, 3], [weight("a", 3), weight("b", 2, 3)]),
    "max": single("Max", [2, 3], [2, 3], [weight("a", 3)]),
    "max-pool": single("MaxPool", [1, 2, 7, 7], None, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "max-pool-ceil": single("MaxPool", [1, 2, 8, 8], None, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average-pool": single("AveragePool", [1, 2, 7, 7], None, kernel_shape=[3, 3], pads=[1] * 4),
    "average-pool-include": single(
        "AveragePool", [1, 2, 7, 7], None, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1
    ),
    "global-max-pool": single("GlobalMaxPool", [1, 2, 7, 7], [1, 2, 1, 1]),
    "lrn": single("LRN", [1, 6, 3, 3], [1, 6, 3, 3], size=3, alpha=0.1),
    "softmax-11": single("Softmax", [2, 3, 4], [2, 3, 4], opset=11, axis=1),
    "pad": single("Pad", [1, 2, 4, 4], None, [constant("p", [0, 0, 1, 0, 0, 0, 2, 3])]),
    "pad-value-axes": single(
        "Pad",
        [1, 2, 4, 4],
        None,
        [constant("p", [1, 2]), constant("v", 3, "float32"), constant("a", [-1])],
        18,
    ),
    "pad-reflect": single("Pad", [1, 2, 4, 4], None, [constant("p", [0, 0, 1, 0, 0, 0, 2, 3])], mode="reflect"),
    "pad-2": single("Pad", [1, 2, 4, 4], None, opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1]),
    "reduce-mean": single("ReduceMean", [1, 2, 4, 4], None, axes=[2, 3], keepdims=0),
    "resize": single(
        "Resize",
        [1, 2, 4, 4],
        None,
        [None, constant("s", [1, 1, 2, 2], "float32")],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    "layer-norm": single("LayerNormalization", [2, 8], [2, 8], [weight("s", 8), weight("b", 8)]),
    "gru-less-split": network(
        [
            helper.make_node("Split", ["x"], ["a", "b"], axis=1),
            helper.make_node("Sigmoid", ["a"], ["s"]),
            helper.make_node("Mul", ["s", "b"], ["y"]),
            helper.make_node("Tanh", ["b"], ["z"]),
        ],
        {"x": [2, 6]},
        {"y": [2, 3], "z": [2, 3]},
        opset=11,
    ),
    "exported-reshape": network(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
            helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
            helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
            helper.make_node("Reshape", ["x", "shape"], ["y"]),
        ],
        {"x": ["batch", 2, 3]},
        {"y": ["batch", 6]},
        [constant("zero", 0), constant("axes", [0]), constant("rest", [-1])],
    ),
    "constant-weights": network(
        [
            helper.make_node("ConstantOfShape", ["s"], ["w"], value=constant("value", [0.25], "float32")),
            helper.make_node("Conv", ["x", "w"], ["y"]),
        ],
        {"x": [1, 2, 5, 5]},
        {"y": None},
        [constant("s", [3, 2, 3, 3])],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_onnxruntime(case):
    assert_matches_onnxruntime(CASES[case])


def test_conventions():
    mod = load([keyword_net(), keyword_net(1)], tasks=["kws", "spk"])
    assert [(out.task, out.name) for out in ir.task_outputs(mod)] == [("kws", "logits"), ("spk", "logits")]
    assert ir.SHARED_INPUTS_ATTR not in mod.attrs
    func = mod["kws"]
    assert func.attrs["global_symbol"] == "kws"
    assert [param.name for param in func.params] == ["audio"]
    assert ir.static_shape(func.params[0]) == (1, 1, 9, 8)
    assert isinstance(func.body.body, tvm.relax.Tuple)
    layers = [b.var.name for b in dataflow.bindings(func) if "/" in b.var.name]
    assert layers == ["kws//conv_1", "kws/Conv_2", "kws/layer1.0/fc"]
    # Bias reshapes and the transposed weight are folded: every operator that is left reads an activation.
    names = [dataflow.op_name(b.value) for b in dataflow.bindings(func)]
    assert names.count("reshape") == 1 and "permute_dims" not in names


def open_net(**inputs: list[int | str | None]) -> onnx.ModelProto:
    """Return a network that adds one to each of its inputs."""
    one = numpy_helper.from_array(np.ones(1, "float32"), "one")
    nodes = [helper.make_node("Add", [name, "one"], [f"{name}_more"]) for name in inputs]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
    results = [helper.make_tensor_value_info(f"{name}_more", TensorProto.FLOAT, None) for name in inputs]
    return helper.make_model(helper.make_graph(nodes, "g", values, results, [one]))


def test_batches_are_one_and_other_open_dimensions_must_be_said():
    mod = load([open_net(x=["N", 3], state=[2, "N", 4], other=[None, 5])], tasks=["t"])
    assert [ir.static_shape(param) for param in mod["t"].params] == [(1, 3), (2, 1, 4), (1, 5)]
    message = error(InputError, [open_net(x=["N", "time", 40])], tasks=["t"])
    assert "input 'x': dimension 1 (time) is open" in message and "--shape x=1,N,40" in message
    assert "dimension 2 is open" in error(InputError, [open_net(x=[1, 2, None])], tasks=["t"])
    said = load([open_net(x=["N", "time", 40])], tasks=["t"], shapes={"x": [1, 9, 40]})
    assert ir.static_shape(said["t"].params[0]) == (1, 9, 40)


def test_shapes_bind_open_dimensions():
    mod = load([keyword_net()], tasks=["kws"], shapes={"kws:audio": (3, 1, 9, 8)})
    assert ir.static_shape(mod["kws"].params[0]) == (3, 1, 9, 8)
    assert ir.static_shape(dataflow.output_fields(mod["kws"])[0]) == (3, 5)


def test_shared_inputs_are_recorded_when_declared():
    mod = load([keyword_net(), keyword_net(1)], tasks=["a", "b"], shared_inputs=["audio"])
    assert list(mod.attrs[ir.SHARED_INPUTS_ATTR]) == ["audio"]


def test_tasks_are_named_after_files(tmp_path):
    onnx.save(keyword_net(), tmp_path / "kws.onnx")
    mod = load([tmp_path / "kws.onnx", f"speaker={tmp_path / 'kws.onnx'}"])
    assert ir.tasks(mod) == ["kws", "speaker"]


def test_the_given_model_is_not_changed():
    model = keyword_net()
    before = model.SerializeToString(deterministic=True)
    load([model])
    assert model.SerializeToString(deterministic=True) == before


def test_quantized_weights_stay_integer():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "ys", "xz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "xz"], ["y"]),
    ]
    scales = np.array([0.01, 0.02, 0.03], "float32")
    weights = [
        constant("xs", 0.02, "float32"),
        constant("xz", 0, "int8"),
        constant("w", rng.integers(-127, 128, (3, 2, 3, 3)), "int8"),
        constant("ws", scales, "float32"),
        constant("wz", [0, 0, 0], "int8"),
        constant("b", rng.integers(-500, 500, 3), "int32"),
        constant("bs", scales * np.float32(0.02), "float32"),
        constant("ys", 0.05, "float32"),
    ]
    model = network(nodes, {"x": [1, 2, 6, 6]}, {"y": None}, weights)
    mod = load([model], tasks=["net"])
    read = [
        str(arg.ty.dtype)
        for b in dataflow.bindings(mod["net"])
        if dataflow.op_name(b.value) == "dequantize"
        for arg in b.value.args[:1]
        if isinstance(arg, tvm.ir.GenericConst)
    ]
    assert sorted(read) == ["int32", "int8"]
    assert_matches_onnxruntime(model)


def test_float_weights_behind_quantize_become_integer():
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    weights = [weight("w", 4, 3), constant("s", 0.01, "float32"), constant("z", 0, "int8")]
    mod = load([network(nodes, {"x": [1, 4]}, {"y": [1, 3]}, weights)], tasks=["net"])
    assert [dataflow.op_name(b.value) for b in dataflow.bindings(mod["net"])] == ["dequantize", "matmul"]


@pytest.mark.parametrize(
    "name", ["densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet"]
)
def test_published_networks_import(name):
    mod = load([LIGHT / f"light_{name}.onnx"], tasks=[name])
    tvm.relax.analysis.well_formed(mod)
    assert len(dataflow.output_fields(mod[name])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bvlc_alexnet", "vgg19", "zfnet512"])
def test_large_published_networks_import(name):
    assert ir.tasks(load([LIGHT / f"light_{name}.onnx"], tasks=[name])) == [name]


def test_published_network_computes_what_was_published():
    model = onnx.load(LIGHT / "light_squeezenet.onnx")
    assert_matches_onnxruntime(model)


def with_a_thing(model):
    """Add a node of an unknown operator, whose result is an output."""
    model.graph.node.append(helper.make_node("FusedThing", ["x"], ["z"], name="thing", domain="vendor"))
    model.graph.output.append(helper.make_empty_tensor_value_info("z"))
    return model


def unsupported():
    node = helper.make_node("ImageDecoder", ["x"], ["y"], name="decoder")
    return network([node], {"x": [2, 2]}, {"y": []})


def error(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file(tmp_path):
    assert error(ModelError, [tmp_path / "no.onnx"]) == f"{tmp_path / 'no.onnx'}: no such file"


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x00\x01\x02" * 50, b"<html></html>"])
def test_no_onnx_file(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    assert "x.onnx: not an ONNX file" in error(ModelError, [tmp_path / "x.onnx"])


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, part):
    data = keyword_net().SerializeToString()
    (tmp_path / "x.onnx").write_bytes(data[: int(len(data) * part)])
    assert "x.onnx: truncated or damaged" in error(ModelError, [tmp_path / "x.onnx"])


def test_directory(tmp_path):
    assert "a directory; name the model file" in error(InputError, [tmp_path], tasks=["a"])


def test_missing_external_data(tmp_path):
    onnx.save(keyword_net(), tmp_path / "x.onnx", save_as_external_data=True, location="x.bin", size_threshold=0)
    load([tmp_path / "x.onnx"])
    (tmp_path / "x.bin").unlink()
    message = error(ModelError, [tmp_path / "x.onnx"])
    assert "x.onnx: its weights are in 'x.bin': copy that beside it" in message


def bad_convolution() -> onnx.ModelProto:
    model = single("Conv", [1, 2, 5, 5], None, [weight("w", 3, 2, 3, 3)])
    model.graph.node[0].name = "bad conv"
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    return model


def test_unsupported_operators_are_all_named():
    model = unsupported()
    with_a_thing(model)
    message = error(ModelError, [model, keyword_net(), unsupported()], tasks=["one", "two", "three"])
    assert message == (
        "one: unsupported operators: ImageDecoder (decoder), vendor.FusedThing (thing) | "
        "three: unsupported operators: ImageDecoder (decoder)"
    )


def test_unsupported_operators_and_nodes_that_do_not_convert_are_named_together():
    model, other = bad_convolution(), unsupported()
    with_a_thing(model)
    message = error(ModelError, [model, other], tasks=["one", "two"])
    assert message.startswith("one: unsupported operators: vendor.FusedThing (thing); node 'bad conv' (Conv): ")
    assert " | two: unsupported operators: ImageDecoder (decoder)" in message


def test_node_that_does_not_convert():
    message = error(ModelError, [bad_convolution()], tasks=["net"])
    assert message.startswith("net: node 'bad conv' (Conv): ")


def test_dangling_edge():
    model = keyword_net()
    model.graph.node[1].input[0] = "nowhere"
    message = error(ModelError, [model], tasks=["net"])
    assert message == "net: node 'Relu_1' reads 'nowhere', which nothing defines"


def test_equal_task_names():
    message = error(InputError, [keyword_net(), keyword_net()])
    assert "two models have the task name 'net'" in message and "=net.onnx" in message
    assert "two models" in error(InputError, [keyword_net(), keyword_net()], tasks=["a", "a"])


@pytest.mark.parametrize("name", ["", "a:b"])
def test_bad_task_name(name):
    assert "is no task name" in error(InputError, [keyword_net()], tasks=[name])


def test_wrong_number_of_task_names():
    assert "1 models but 2 task names" in error(InputError, [keyword_net()], tasks=["a", "b"])


def test_no_models():
    assert "no models" in error(InputError, [])


def test_shapes_that_do_not_fit():
    assert "no network has an input 'video'" in error(InputError, [keyword_net()], shapes={"video": (1,)})
    assert "can't be 1x2x9x8" in error(InputError, [keyword_net()], shapes={"audio": (1, 2, 9, 8)})
    assert "of 4 dimensions; 1x1 has 2" in error(InputError, [keyword_net()], shapes={"audio": (1, 1)})
    assert "can't be 0x1x9x8" in error(InputError, [keyword_net()], shapes={"audio": (0, 1, 9, 8)})


def test_shared_inputs_that_do_not_fit():
    models, names = [keyword_net(), keyword_net(1)], ["a", "b"]
    message = error(InputError, models, names, ["audio"], {"b:audio": (2, 1, 9, 8)})
    assert message == "shared input 'audio' differs: float32 1x1x9x8 in a, float32 2x1x9x8 in b"
    assert "no network has it (there are: audio)" in error(InputError, models, names, ["video"])
