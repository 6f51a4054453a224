import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax.frontend.onnx import from_onnx
from tvm.script import ir as I
from tvm.script import relax as R

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm
from tests.helpers import evaluate_module


def ops(mod, function="main"):
    return [op_name(b.value) for b in bindings(mod[function])]


def module(shape, build, seed=0):
    """Return a module of one input ``x`` whose body ``build(emit, const, x)`` writes."""
    rng = np.random.default_rng(seed)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))

    def const(*dims, low=None):
        if low is not None:
            return relax.const(rng.uniform(low, low + 1, dims).astype("float32"))
        return relax.const(rng.standard_normal(dims).astype("float32"))

    with block.function("main", [x], attrs={"num_input": 1}):
        with block.dataflow():
            out = block.emit_output(relax.Tuple(build(block.emit, const, x)))
        block.emit_func_output(out)
    mod = block.get().with_attr("nnfuze.outputs", ["t:y"])
    relax.analysis.well_formed(mod)
    return mod


def norm(emit, const, x, channels, axis=1, **attrs):
    values = const(channels), const(channels), const(channels), const(channels, low=0.5)
    return emit(relax.op.nn.batch_norm(x, *values, axis=axis, **{"training": False, **attrs})[0])


def check(mod, shape, atol=1e-4):
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    new = tvm.transform.Sequential([FoldBatchNorm()])(mod)
    relax.analysis.well_formed(new)
    assert list(new.attrs["nnfuze.outputs"]) == ["t:y"]
    assert dict(new["main"].attrs) == dict(mod["main"].attrs)
    for a, b in zip(evaluate_module(mod, {"x": x}), evaluate_module(new, {"x": x}), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)
    return new


def test_golden():
    ones, twos = np.ones((2, 1, 1, 1), "float32"), np.full(2, 2, "float32")
    norm_constants = [relax.const(v) for v in (twos, twos, 0 * twos, np.ones(2, "float32"))]
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 1, 4, 4), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            conv = block.emit(relax.op.nn.conv2d(x, relax.const(ones)))
            y = block.emit(relax.op.nn.batch_norm(conv, *norm_constants, axis=1, epsilon=0.0, training=False)[0])
            out = block.emit_output(relax.Tuple([block.emit(relax.op.nn.relu(y))]))
        block.emit_func_output(out)

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 1, 4, 4), "float32")) -> R.Tuple(R.Tensor((1, 2, 4, 4), "float32")):
            with R.dataflow():
                lv = R.nn.conv2d(x, R.const(np.full((2, 1, 1, 1), 2, "float32")))
                lv1 = R.add(lv, R.const(np.full((1, 2, 1, 1), 2, "float32")))
                lv2 = R.nn.relu(lv1)
                R.output(lv2)
            return (lv2,)

    tvm.ir.assert_structural_equal(FoldBatchNorm()(block.get()), Expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv2d(groups, bias):
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4 // groups, 3, 3), groups=groups))
        if bias:
            y = emit(relax.op.add(y, emit(relax.op.reshape(const(8), (1, 8, 1, 1)))))
        return [norm(emit, const, y, 8)]

    new = check(module((1, 4, 6, 6), build), (1, 4, 6, 6))
    assert ops(new) == ["nn.conv2d", "add"]
    assert bindings(new["main"])[0].var.name == "lv"


def test_nhwc():
    def build(emit, const, x):
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        y = emit(relax.op.nn.conv2d(x, const(8, 3, 3, 4), **layouts))
        return [norm(emit, const, y, 8, axis=3)]

    assert ops(check(module((1, 6, 6, 4), build), (1, 6, 6, 4))) == ["nn.conv2d", "add"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv2d_transpose(groups):
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d_transpose(x, const(4, 8 // groups, 2, 2), strides=2, groups=groups))
        return [norm(emit, const, y, 8)]

    new = check(module((1, 4, 3, 3), build), (1, 4, 3, 3))
    assert ops(new) == ["nn.conv2d_transpose", "add"]


def test_conv1d_and_dense():
    def build(emit, const, x):
        y = norm(emit, const, emit(relax.op.nn.conv1d(x, const(6, 3, 3))), 6)
        y = emit(relax.op.reshape(emit(relax.op.nn.relu(y)), (2, 24)))
        y = emit(relax.op.matmul(y, emit(relax.op.permute_dims(const(5, 24)))))
        return [norm(emit, const, emit(relax.op.add(y, const(5))), 5)]

    new = check(module((2, 3, 6), build), (2, 3, 6))
    assert ops(new) == ["nn.conv1d", "add", "nn.relu", "reshape", "matmul", "add"]


def test_per_channel_arithmetic():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)))
        y = emit(relax.op.multiply(const(1, 8, 1, 1), y))
        y = emit(relax.op.subtract(y, const(8, 1, 1)))
        y = emit(relax.op.subtract(const(1, 8, 1, 1), y))
        y = emit(relax.op.divide(y, const(1, low=1.0)))
        return [emit(relax.op.multiply(y, relax.const(2.0, "float32")))]

    assert ops(check(module((1, 4, 6, 6), build), (1, 4, 6, 6))) == ["nn.conv2d", "add"]


def test_scale_only_needs_no_add_and_keeps_the_name():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)), "conv")
        return [emit(relax.op.multiply(y, const(1, 8, 1, 1)))]

    new = check(module((1, 4, 6, 6), build), (1, 4, 6, 6))
    assert [b.var.name for b in bindings(new["main"])] == ["conv"]


def test_not_per_channel_stays():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)))
        y = emit(relax.op.add(y, const(1, 1, 6, 1)))
        y = emit(relax.op.multiply(y, const(6)))
        return [emit(relax.op.divide(const(1, 8, 1, 1), emit(relax.op.nn.relu(y))))]

    new = FoldBatchNorm()(module((1, 4, 6, 6), build))
    assert ops(new) == ["nn.conv2d", "add", "multiply", "nn.relu", "divide"]


def test_division_by_zero_stays():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)))
        return [emit(relax.op.divide(y, relax.const(np.zeros((1, 8, 1, 1), "float32"))))]

    assert ops(FoldBatchNorm()(module((1, 4, 6, 6), build))) == ["nn.conv2d", "divide"]


def test_value_read_twice_is_not_folded():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)))
        z = norm(emit, const, y, 8)
        return [emit(relax.op.add(y, z)), y]

    new = check(module((1, 4, 6, 6), build), (1, 4, 6, 6))
    assert ops(new)[:3] == ["nn.conv2d", "multiply", "add"]


def test_norm_elsewhere_becomes_multiply_and_add():
    def build(emit, const, x):
        y = norm(emit, const, x, 4)
        y = emit(relax.op.nn.relu(y))
        return [norm(emit, const, y, 4, scale=False, center=False)]

    new = check(module((1, 4, 6, 6), build), (1, 4, 6, 6))
    assert ops(new) == ["multiply", "add", "nn.relu", "multiply", "add"]


def test_norm_along_another_axis():
    def build(emit, const, x):
        y = emit(relax.op.nn.conv2d(x, const(8, 4, 1, 1)))
        return [norm(emit, const, y, 6, axis=2)]

    assert ops(check(module((1, 4, 6, 6), build), (1, 4, 6, 6))) == ["nn.conv2d", "multiply", "add"]


def test_training_form_and_running_statistics_stay():
    def training(emit, const, x):
        return [norm(emit, const, x, 4, training=True)]

    def statistics(emit, const, x):
        values = const(4), const(4), const(4), const(4, low=0.5)
        result = emit(relax.op.nn.batch_norm(x, *values, axis=1, training=False))
        return [emit(relax.TupleGetItem(result, 0)), emit(relax.TupleGetItem(result, 1))]

    for build in (training, statistics):
        assert "nn.batch_norm" in ops(FoldBatchNorm()(module((1, 4, 6, 6), build)))


def test_imported_network():
    rng = np.random.default_rng(0)

    def weight(name, *shape, low=None):
        value = rng.standard_normal(shape) if low is None else rng.uniform(low, low + 1, shape)
        return numpy_helper.from_array(value.astype("float32"), name)

    initializers = [weight("w", 6, 3, 3, 3), weight("b", 6), weight("fc", 12, 6), weight("fb", 12)]
    initializers += [weight("gamma", 6), weight("beta", 6), weight("mean", 6), weight("var", 6, low=0.1)]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "fc", "fb"], ["y"], transB=1),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 8, 8]), ("y", [1, 12])))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], initializers), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.checker.check_model(model)
    mod = from_onnx(model).with_attr("nnfuze.outputs", ["t:y"])
    new = check(mod, (1, 3, 8, 8))
    assert ops(new) == ["nn.conv2d", "add", "nn.relu", "mean", "reshape", "matmul", "add"]
    assert all(isinstance(b.value.args[1], GenericConst) for b in bindings(new["main"]) if op_name(b.value) == "add")


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    steps=st.lists(st.sampled_from(["conv", "depthwise", "norm", "bias", "scale", "relu", "tap"]), max_size=7),
)
def test_random_chains(seed, steps):
    def build(emit, const, x):
        outputs = []
        for step in steps:
            if step == "conv":
                x = emit(relax.op.nn.conv2d(x, const(4, 4, 1, 1)))
            elif step == "depthwise":
                x = emit(relax.op.nn.conv2d(x, const(4, 1, 3, 3), groups=4, padding=1))
            elif step == "norm":
                x = norm(emit, const, x, 4)
            elif step == "bias":
                x = emit(relax.op.add(x, const(1, 4, 1, 1)))
            elif step == "scale":
                x = emit(relax.op.multiply(x, const(1, 4, 1, 1)))
            elif step == "relu":
                x = emit(relax.op.nn.relu(x))
            else:
                outputs.append(x)
        return [*outputs, x]

    new = check(module((1, 4, 4, 4), build, seed), (1, 4, 4, 4), atol=2e-3)
    assert "nn.batch_norm" not in ops(new)
