"""RealizeInteger: every operator bit for bit against NumPy, and what the integer graph looks like."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.graph.ir import FLOAT_LAYERS_ATTR
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.layout import ToNHWC
from tests import integer_reference as ref
from tests.helpers import evaluate_module, run_module

few = settings(max_examples=20)
scales = st.floats(1e-3, 0.2).map(lambda x: float(np.float32(x)))
seeds = st.integers(0, 2**32 - 1)


class Graph:
    """Builds a QDQ graph with one function ``main``."""

    def __init__(self) -> None:
        self.emitter = Emitter()
        self.params: list[relax.Var] = []

    def input(self, name, shape):
        self.params.append(relax.Var(name, R.Tensor(shape, "float32")))
        return self.params[-1]

    def __call__(self, value, name="lv"):
        return self.emitter.emit(value, name)

    def quantize(self, value, scale, zero=0, dtype="int8"):
        parameters = relax.const(np.float32(scale)), relax.const(np.array(zero, dtype))
        return self(op.quantize(value, *parameters, axis=0, out_dtype=dtype))

    def dequantize(self, codes, scale, zero=0, dtype="int8"):
        parameters = relax.const(np.float32(scale)), relax.const(np.array(zero, dtype))
        return self(op.dequantize(codes, *parameters, axis=0, out_dtype="float32"))

    def qdq(self, value, scale, zero=0, dtype="int8"):
        return self.dequantize(self.quantize(value, scale, zero, dtype), scale, zero, dtype)

    def weight(self, codes, scale, axis):
        zero = relax.const(np.zeros(np.shape(scale), "int8"))
        return self(op.dequantize(relax.const(codes), relax.const(np.asarray(scale, "float32")), zero, axis, "float32"))

    def module(self, *outputs):
        func = self.emitter.finish(self.params, outputs)
        return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def integer(mod, inputs, nhwc=False, run=evaluate_module):
    """Realize and run; check on the way that nothing is left of the QDQ form."""
    mod = ToNHWC()(mod) if nhwc else mod
    mod = RealizeInteger()(mod)
    relax.analysis.well_formed(mod)
    assert not {"quantize", "dequantize"} & {op_name(b.value) for b in bindings(mod["main"])}
    return run(mod, inputs)


def activation(rng, shape, scale, reach=140):
    """Float numbers that reach a little beyond the codes."""
    return (rng.uniform(-reach, reach, shape) * scale).astype("float32")


def stored(dtype, zero):
    """Return zero point and range of codes in the integer graph, and what to add to get the original."""
    if dtype == "uint8":
        return zero - 128, -128, 127, 128
    return zero, -128, 127, 0


types = st.sampled_from([("int8", 0), ("int8", -7), ("uint8", 128), ("uint8", 3), ("uint8", 0)])
ACTIVATIONS = {
    "none": (lambda g, x: x, -np.inf, np.inf),
    "relu": (lambda g, x: g(op.nn.relu(x)), 0.0, np.inf),
    "relu6": (lambda g, x: g(op.clip(x, 0.0, 6.0)), 0.0, 6.0),
    "bounds": (
        lambda g, x: g(op.minimum(g(op.maximum(x, relax.const(np.float32(-1)))), relax.const(np.float32(2)))),
        -1.0,
        2.0,
    ),
}


def clipped(lo, hi, scale, zero, limits):
    """Return the range of codes behind an activation that keeps to ``limits``."""
    low = lo if limits[0] == -np.inf else int(np.clip(np.rint(limits[0] / scale) + zero, lo, hi))
    high = hi if limits[1] == np.inf else int(np.clip(np.rint(limits[1] / scale) + zero, low, hi))
    return low, high


@st.composite
def convolutions(draw):
    groups, per_group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return {
        "channels": groups * per_group,
        "out": groups * draw(st.integers(1, 3)),
        "groups": groups,
        "size": draw(st.tuples(st.integers(5, 7), st.integers(5, 7))),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "padding": draw(st.tuples(*[st.integers(0, 2)] * 4)),
        "per_channel": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "float", "int32"])),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "nhwc": draw(st.booleans()),
    }


@settings(few, max_examples=16)
@given(convolutions(), types, types, scales, scales, seeds)
def test_convolution_is_bit_identical_to_numpy(case, in_type, out_type, in_scale, out_scale, seed):
    rng = np.random.default_rng(seed)
    shape = (1, case["channels"], *case["size"])
    codes = rng.integers(-127, 128, (case["out"], case["channels"] // case["groups"], *case["kernel"]))
    codes = codes.astype("int8")
    weight_scale = rng.uniform(1e-3, 2e-2, case["out"] if case["per_channel"] else 1).astype("float32")
    graph = Graph()
    x = graph.input("x", shape)
    y = graph(
        op.nn.conv2d(
            graph.qdq(x, in_scale, in_type[1], in_type[0]),
            graph.weight(codes, weight_scale if case["per_channel"] else weight_scale[0], 0),
            strides=case["stride"],
            padding=case["padding"],
            dilation=case["dilation"],
            groups=case["groups"],
        ),
        "t/conv",
    )
    bias = rng.uniform(-3, 3, (1, case["out"], 1, 1)).astype("float32")
    unit = np.broadcast_to(weight_scale.astype("float64"), (case["out"],)) * in_scale
    if case["bias"] == "float":
        y = graph(op.add(y, relax.const(bias)))
    elif case["bias"] == "int32":
        ints = np.rint(bias.ravel() / unit).astype("int32")
        real = graph(
            op.dequantize(
                relax.const(ints),
                relax.const(unit.astype("float32")),
                relax.const(np.zeros(case["out"], "int32")),
                0,
                "float32",
            )
        )
        y = graph(op.add(y, graph(op.reshape(real, (1, case["out"], 1, 1)))))
        bias = (ints * unit.astype("float32").astype("float64")).reshape(bias.shape)
    build, *limits = ACTIVATIONS[case["activation"]]
    y = graph.quantize(build(graph, y), out_scale, out_type[1], out_type[0])
    data = activation(rng, shape, in_scale)
    (result,) = integer(graph.module(y), {"x": data}, case["nhwc"])

    zero, lo, hi, _ = stored(in_type[0], in_type[1])
    total = ref.convolve(
        ref.quantize(data, in_scale, zero, lo, hi),
        codes,
        weight_scale.astype("float64"),
        case["stride"],
        case["padding"],
        case["dilation"],
        case["groups"],
    )
    if case["bias"] != "none":
        total = ref.add_bias(total, bias.astype("float64"))
    zero, lo, hi, offset = stored(out_type[0], out_type[1])
    expected = ref.requantize(total, out_scale, zero, *clipped(lo, hi, out_scale, zero, limits))
    assert result.dtype == out_type[0]
    np.testing.assert_array_equal(result, expected.codes + offset)


@few
@given(types, types, scales, scales, st.booleans(), st.sampled_from([-127, -128]), seeds)
def test_dense_is_bit_identical_to_numpy(in_type, out_type, in_scale, out_scale, relu, lowest, seed):
    rng = np.random.default_rng(seed)
    rows, depth, width = rng.integers(1, 9, 3)
    codes = rng.integers(-127, 128, (depth, width)).astype("int8")
    codes[0, 0] = lowest
    weight_scale = rng.uniform(1e-3, 2e-2, width).astype("float32")
    bias = rng.uniform(-3, 3, width).astype("float32")
    graph = Graph()
    x = graph.input("x", (rows, depth))
    y = graph(op.matmul(graph.qdq(x, in_scale, in_type[1], in_type[0]), graph.weight(codes, weight_scale, 1)))
    y = graph(op.add(y, relax.const(bias)))
    y = graph(op.nn.relu(y)) if relu else y
    data = activation(rng, (rows, depth), in_scale)
    graph = graph.module(graph.quantize(y, out_scale, out_type[1], out_type[0]))
    (result,) = integer(graph, {"x": data})
    zero, lo, hi, _ = stored(*in_type)
    total = ref.matmul(ref.quantize(data, in_scale, zero, lo, hi), codes, weight_scale.astype("float64"))
    total = ref.add_bias(total, bias.astype("float64"))
    zero, lo, hi, offset = stored(*out_type)
    limits = (0.0, np.inf) if relu else (-np.inf, np.inf)
    expected = ref.requantize(total, out_scale, zero, *clipped(lo, hi, out_scale, zero, limits))
    np.testing.assert_array_equal(result, expected.codes + offset)


@few
@given(types, types, types, scales, scales, scales, st.sampled_from(["add", "multiply"]), seeds)
def test_binary_operators_are_bit_identical_to_numpy(left, right, out, s1, s2, s3, kind, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(dim) for dim in rng.integers(1, 5, 4))
    graph = Graph()
    a, b = graph.input("a", shape), graph.input("b", shape)
    s3 = s3 if kind == "add" else float(np.float32(s3 * 0.1))
    y = getattr(op, kind)(graph.qdq(a, s1, left[1], left[0]), graph.qdq(b, s2, right[1], right[0]))
    mod = graph.module(graph.quantize(graph(y), s3, out[1], out[0]))
    data = {"a": activation(rng, shape, s1), "b": activation(rng, shape, s2)}
    (result,) = integer(mod, data)
    sides = []
    for name, scale, kind_of in (("a", s1, left), ("b", s2, right)):
        zero, lo, hi, _ = stored(*kind_of)
        sides.append(ref.quantize(data[name], scale, zero, lo, hi))
    zero, lo, hi, offset = stored(*out)
    expected = ref.requantize(getattr(ref, kind)(*sides), s3, zero, lo, hi)
    np.testing.assert_array_equal(result, expected.codes + offset)


@few
@given(types, scales, scales, scales, st.booleans(), seeds)
def test_residual_joins_the_convolution(skip_type, in_scale, skip_scale, out_scale, nhwc, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (4, 3, 3, 3)).astype("int8")
    weight_scale = rng.uniform(2e-3, 2e-2, 4).astype("float32")
    bias = rng.uniform(-3, 3, (1, 4, 1, 1)).astype("float32")
    graph = Graph()
    x, r = graph.input("x", (1, 3, 5, 6)), graph.input("r", (1, 4, 5, 6))
    y = graph(op.nn.conv2d(graph.qdq(x, in_scale), graph.weight(codes, weight_scale, 0), padding=1))
    y = graph(op.add(y, relax.const(bias)))
    y = graph(op.nn.relu(graph(op.add(graph.qdq(r, skip_scale, skip_type[1], skip_type[0]), y))))
    mod = graph.module(graph.quantize(y, out_scale))
    data = {"x": activation(rng, (1, 3, 5, 6), in_scale), "r": activation(rng, (1, 4, 5, 6), skip_scale)}
    (result,) = integer(mod, data, nhwc)
    zero, lo, hi, _ = stored(*skip_type)
    skip = ref.quantize(data["r"], skip_scale, zero, lo, hi)
    total = ref.convolve(
        ref.quantize(data["x"], in_scale, 0, -128, 127), codes, weight_scale.astype("float64"), padding=(1,) * 4
    )
    total = ref.add_bias(total, bias.astype("float64"))
    total = ref.add_residual(total, skip, ref.residual_shift(total, skip))
    np.testing.assert_array_equal(result, ref.requantize(total, out_scale, 0, 0, 127).codes)


def test_residual_of_a_layer_with_a_dying_channel_stays_exact():
    # The units of the channels differ by 2**20: no integer ratio serves all of them.
    rng = np.random.default_rng(0)
    weight_scale = np.array([1e-2, 1e-8, 2e-2], "float32")
    graph = Graph()
    x, r = graph.input("x", (1, 3, 4, 4)), graph.input("r", (1, 3, 4, 4))
    codes = rng.integers(-127, 128, (3, 3, 1, 1)).astype("int8")
    y = graph(op.nn.conv2d(graph.qdq(x, 0.02), graph.weight(codes, weight_scale, 0)))
    y = graph(op.add(y, graph.qdq(r, 0.05)))
    mod = graph.module(graph.quantize(y, 0.1))
    data = {"x": activation(rng, (1, 3, 4, 4), 0.02), "r": activation(rng, (1, 3, 4, 4), 0.05)}
    simulated = evaluate_module(mod, data)[0].astype(int)
    assert np.abs(integer(mod, data, run=run_module)[0].astype(int) - simulated).max() <= 1


@few
@given(types, scales, st.booleans(), st.booleans(), st.booleans(), seeds)
def test_pooling_is_bit_identical_to_numpy(kind, scale, count_padding, ceil, nhwc, seed):
    rng = np.random.default_rng(seed)
    shape = (1, int(rng.integers(1, 4)), *(int(dim) for dim in rng.integers(5, 9, 2)))
    size, stride = tuple(rng.integers(2, 4, 2).tolist()), tuple(rng.integers(1, 3, 2).tolist())
    padding = tuple(rng.integers(0, 2, 4).tolist())
    if ceil:  # Here only where rounding up and down agree; NumPy below rounds down.
        padding = tuple(padding[:2]) + tuple(
            padding[k + 2] + (-(shape[k + 2] + padding[k] + padding[k + 2] - size[k])) % stride[k] for k in (0, 1)
        )
        if any(padding[k + 2] >= size[k] for k in (0, 1)):
            padding, ceil = (0, 0, 0, 0), False
    graph = Graph()
    x = graph.input("x", shape)
    codes = graph.qdq(x, scale, kind[1], kind[0])
    most = graph(op.nn.max_pool2d(codes, size, stride, padding, ceil_mode=ceil))
    average = op.nn.avg_pool2d(codes, size, stride, padding, ceil_mode=ceil, count_include_pad=count_padding)
    finer = float(np.float32(scale * 0.8))
    outputs = [
        graph.quantize(most, scale, kind[1], kind[0]),
        graph.quantize(graph(average), finer),
        graph.quantize(graph(op.mean(codes, [2, 3], keepdims=True)), finer, kind[1], kind[0]),
    ]
    data = activation(rng, shape, scale)
    results = integer(graph.module(*outputs), {"x": data}, nhwc)
    zero, lo, hi, offset = stored(*kind)
    source = ref.quantize(data, scale, zero, lo, hi)
    expected = [
        ref.max_pool(source, size, stride, padding).codes + offset,
        ref.requantize(ref.average_pool(source, size, stride, padding, count_padding), finer, 0, -128, 127).codes,
        ref.requantize(ref.mean(source, (2, 3)), finer, zero, lo, hi).codes + offset,
    ]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)


@few
@given(types, types, scales, scales, scales, st.booleans(), seeds)
def test_concatenation_is_bit_identical_to_numpy(left, right, s1, s2, s3, same, seed):
    rng = np.random.default_rng(seed)
    if same:
        right, s2, s3 = left, s1, s1
    shapes = (1, 2, 3, 3), (1, int(rng.integers(1, 4)), 3, 3)
    graph = Graph()
    a, b = (graph.input(name, shape) for name, shape in zip("ab", shapes, strict=True))
    parts = [graph.qdq(a, s1, left[1], left[0]), graph.qdq(b, s2, right[1], right[0])]
    mod = graph.module(graph.quantize(graph(op.concat(parts, 1)), s3, left[1], left[0]))
    data = {name: activation(rng, shape, s) for name, shape, s in zip("ab", shapes, (s1, s2), strict=True)}
    (result,) = integer(mod, data)
    zero, lo, hi, offset = stored(*left)
    pieces = []
    for name, scale, kind in (("a", s1, left), ("b", s2, right)):
        own = stored(*kind)
        codes = ref.quantize(data[name], scale, *own[:3])
        pieces.append(codes.codes if same else ref.requantize(ref.widen(codes), s3, zero, lo, hi).codes)
    np.testing.assert_array_equal(result, np.concatenate(pieces, 1) + offset)


def test_ties_round_to_even():
    graph = Graph()
    x = graph.input("x", (1, 8))
    weight = graph.weight(np.eye(8, dtype="int8"), 1.0, 1)
    mod = graph.module(graph.quantize(graph(op.matmul(graph.qdq(x, 1.0), weight)), 2.0))
    data = np.array([[-5, -3, -1, 1, 3, 5, 7, 250]], "float32")
    np.testing.assert_array_equal(integer(mod, {"x": data})[0], [[-2, -2, 0, 0, 2, 2, 4, 64]])


def test_moving_data_keeps_the_codes():
    rng = np.random.default_rng(1)
    graph = Graph()
    x = graph.input("x", (1, 4, 3, 2))
    q = graph.qdq(x, 0.1)
    q = graph(op.nn.pad(q, [0, 0, 0, 0, 1, 1, 1, 1]))
    halves = graph(op.split(q, 2, axis=1))
    q = graph(relax.TupleGetItem(halves, 1))
    q = graph(op.permute_dims(q, [0, 2, 3, 1]))
    q = graph(op.reshape(q, (1, 40)))
    q = graph(op.strided_slice(q, [1], [0], [40], [2]))
    data = activation(rng, (1, 4, 3, 2), 0.1)
    mod = graph.module(graph.quantize(q, 0.1))
    (result,) = integer(mod, {"x": data})
    codes = ref.quantize(data, 0.1, 0, -128, 127).codes
    moved = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))[:, 2:].transpose(0, 2, 3, 1).reshape(1, 40)
    np.testing.assert_array_equal(result, moved[:, ::2])


def residual_network():
    """A float-semantics QDQ network: conv, conv + residual, average, dense."""
    rng = np.random.default_rng(3)
    graph = Graph()
    x = graph.input("x", (1, 3, 8, 8))

    def conv(data, channels, out, name):
        weight = rng.integers(-127, 128, (out, channels, 3, 3)).astype("int8")
        y = op.nn.conv2d(data, graph.weight(weight, rng.uniform(1e-3, 4e-3, out), 0), padding=1)
        return graph(op.add(graph(y, name), relax.const(rng.uniform(-1, 1, (1, out, 1, 1)).astype("float32"))))

    first = graph.qdq(graph(op.nn.relu(conv(graph.qdq(x, 0.03), 3, 8, "t/a"))), 0.04)
    second = graph.qdq(graph(op.nn.relu(conv(first, 8, 8, "t/b"))), 0.04)
    third = graph(op.nn.relu(graph(op.add(conv(second, 8, 8, "t/c"), first))))
    pooled = graph.qdq(graph(op.mean(graph.qdq(third, 0.05), [2, 3], keepdims=True)), 0.03)
    weight = graph.weight(rng.integers(-127, 128, (8, 5)).astype("int8"), rng.uniform(1e-3, 4e-3, 5), 1)
    return graph.module(graph(op.matmul(graph(op.reshape(pooled, (1, 8))), weight), "t/fc"))


def test_a_network_has_one_kernel_per_layer():
    mod = RealizeInteger()(ToNHWC()(residual_network()))
    kinds = {b.var.name: str(b.var.ty.dtype) for b in bindings(mod["main"]) if op_name(b.value) == "astype"}
    assert "uint8" in kinds.values()
    steps = [
        # As in phase 8 of the pipeline.
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    kernels = tvm.transform.Sequential(steps)(mod)
    calls = [b.value for b in bindings(kernels["main"]) if op_name(b.value) == "call_tir"]
    names = [call.args[0].name_hint for call in calls]
    # Quantize and transpose the input; three convolutions, one of them with the residual; average; dense.
    names = [name for name in names if name != "reshape"]  # becomes a view
    assert len(names) == 6, names
    assert sum("conv2d" in name for name in names) == 3
    assert sum("add_residual" in name and "conv2d" in name for name in names) == 1


def test_activations_behind_a_relu_are_7_bits_unsigned():
    mod = RealizeInteger()(residual_network())
    for binding in bindings(mod["main"]):
        if op_name(binding.value) == "astype" and str(binding.var.ty.dtype) == "uint8":
            clip = next(b.value for b in bindings(mod["main"]) if b.var.same_as(binding.value.args[0]))
            assert [float(arg.value) for arg in clip.args[1:]] == [0.0, 127.0]
            break
    else:
        pytest.fail("no uint8 activation")


def test_the_integer_network_is_the_simulated_one():
    mod = residual_network()
    data = {"x": activation(np.random.default_rng(2), (1, 3, 8, 8), 0.03)}
    simulated, real = evaluate_module(mod, data)[0], integer(mod, data, nhwc=True, run=run_module)[0]
    # One quantum of the average in front of the last layer, times the largest weight.
    np.testing.assert_allclose(real, simulated, atol=0.03 * 127 * 4e-3)


def test_nothing_is_contracted_to_a_fused_multiply_add():
    mod = RealizeInteger()(ToNHWC()(residual_network()))
    for config, fused in (
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}, ("fmadd", "fmla\t", "fmla.")),
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}, ("vfmadd",)),
    ):
        target = tvm.target.Target(config)
        with target:
            executable = relax.build(mod, target=target)
        assembly = executable.mod.imports[0].inspect_source("s")
        assert "nearbyint" not in assembly  # one instruction, no call
        assert not [line for line in assembly.splitlines() if any(name in line for name in fused)]


def test_what_stays_float_is_reported():
    rng = np.random.default_rng(0)
    graph = Graph()
    x = graph.input("x", (1, 2, 4, 4))
    weight = rng.standard_normal((2, 2, 1, 1)).astype("float32")
    y = graph(op.nn.conv2d(x, relax.const(weight)), "t/plain")
    y = graph(op.nn.conv2d(graph.qdq(y, 0.1), relax.const(weight)), "t/half")
    y = graph(op.sigmoid(graph.qdq(y, 0.1)))
    y = graph(op.nn.conv2d(graph.qdq(y, 0.01), graph.weight(np.ones((2, 2, 1, 1), "int8"), 0.1, 0)), "t/whole")
    mod = graph.module(y)
    real = RealizeInteger()(mod)
    assert [str(note) for note in real.attrs[FLOAT_LAYERS_ATTR]] == [
        "t/plain: its input is not quantized",
        "t/half: its weights are not quantized",
    ]
    data = {"x": rng.standard_normal((1, 2, 4, 4)).astype("float32")}
    np.testing.assert_allclose(evaluate_module(real, data)[0], evaluate_module(mod, data)[0], atol=0.01 * 0.1 * 2)


def test_8_bit_inputs_and_outputs_keep_their_type():
    graph = Graph()
    x = relax.Var("x", R.Tensor((1, 4), "uint8"))
    graph.params.append(x)
    real = graph.dequantize(x, 0.1, 7, "uint8")
    mod = graph.module(graph.quantize(graph(op.add(real, real)), 0.2, 7, "uint8"), real)
    data = {"x": np.array([[0, 7, 100, 255]], "uint8")}
    codes, floats = integer(mod, data, run=run_module)
    np.testing.assert_array_equal(codes, data["x"])
    np.testing.assert_array_equal(floats, (data["x"].astype("float32") - 7) * np.float32(0.1))


def test_golden():
    weight = np.array([[[[2]], [[-3]]], [[[4]], [[5]]]], "int8")  # O, I, H, W

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 2, 4, 4), "float32")) -> R.Tuple(R.Tensor((1, 2, 4, 4), "int8")):
            with R.dataflow():
                q = R.quantize(x, R.const(0.5, "float32"), R.const(0, "int8"), axis=0, out_dtype="int8")
                d = R.dequantize(q, R.const(0.5, "float32"), R.const(0, "int8"), axis=0, out_dtype="float32")
                w = R.dequantize(
                    R.const(weight), R.const(0.25, "float32"), R.const(0, "int8"), axis=0, out_dtype="float32"
                )
                c = R.nn.conv2d(d, w, padding=[1, 1, 1, 1], strides=[2, 2], kernel_layout="OIHW")
                b = R.add(c, R.const(np.array([[[[1.0]], [[-2.0]]]], "float32")))
                r = R.nn.relu(b)
                y = R.quantize(r, R.const(0.75, "float32"), R.const(0, "int8"), axis=0, out_dtype="int8")
                R.output(y)
            return (y,)

    graph = Graph()
    x = graph.input("x", (1, 2, 4, 4))
    y = op.round(op.clip(op.divide(x, relax.const(np.float32(0.5))), -128.0, 127.0))
    y = graph(op.astype(op.astype(y, "int32"), "int8"))
    y = op.nn.conv2d(y, relax.const(weight), strides=[2, 2], padding=[1, 1, 1, 1], out_dtype="int32")
    y = op.add(graph(y), relax.const(np.array([[[[8]], [[-16]]]], "int32")))
    y = op.multiply(op.astype(graph(y), "float32"), relax.const(np.float32(0.125 / 0.75)))
    y = op.astype(graph(op.round(graph(y))), "int32")
    y = op.astype(op.clip(graph(y), 0, 127), "uint8")
    after = graph.module(graph(op.astype(graph(y), "int8")))
    after = after.with_attr(FLOAT_LAYERS_ATTR, [])
    tvm.ir.assert_structural_equal(RealizeInteger()(Before), after)


def test_only_what_is_rounded_already_is_quantized_without_a_division():
    weight = relax.const(np.ones((2, 2, 1, 1), "int8"))
    scale, zero = relax.const(np.float32(0.3)), relax.const(np.int8(0))

    def through_8_bits(value):
        return op.dequantize(op.quantize(value, scale, zero, axis=0), scale, zero, axis=0)

    graph = Graph()
    data = through_8_bits(op.multiply(graph.input("x", (1, 2, 4, 4)), relax.const(np.float32(2))))
    sums = op.nn.conv2d(data, op.dequantize(weight, scale, zero, axis=0))
    integer = RealizeInteger()(graph.module(graph(through_8_bits(op.sigmoid(sums)))))
    kinds = [op_name(b.value) for b in bindings(integer["main"])]
    assert kinds.count("divide") == 1 and kinds.index("divide") < kinds.index("nn.conv2d") < kinds.index("sigmoid")


@pytest.mark.parametrize(
    "value, joined", [(0.0, "int8"), (0.6, "int8"), (-0.9, "int8"), (0.5, "float32"), (60.0, "float32")]
)
@pytest.mark.parametrize("zero", [0, 3])
def test_constants_are_joined_to_codes_that_have_their_numbers(value, joined, zero):
    scale, zero = relax.const(np.float32(0.3)), relax.const(np.int8(zero))
    graph = Graph()
    data = graph(op.quantize(graph.input("x", (1, 2, 4, 4)), scale, zero, axis=0))
    data = graph(op.dequantize(data, scale, zero, axis=0))
    rim = relax.const(np.full((1, 3, 4, 4), value, "float32"))
    mod = graph.module(graph(op.concat([rim, data], 1)))
    integer = RealizeInteger()(mod)
    (concat,) = (b.value for b in bindings(integer["main"]) if op_name(b.value) == "concat")
    assert str(concat.ty.dtype) == joined
    data = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype("float32")}
    np.testing.assert_allclose(evaluate_module(integer, data)[0], evaluate_module(mod, data)[0], rtol=1e-6)


@pytest.mark.parametrize("bound", [None, 6.0])
@pytest.mark.parametrize("divisor", [np.float32(6), np.array([[[[2]], [[-3]]]], "float32")])
def test_quotients_of_integers_and_a_constant_are_products(bound, divisor):
    weight = relax.const(np.arange(-2, 2).reshape(2, 2, 1, 1).astype("int8"))
    scale, zero = relax.const(np.float32(0.3)), relax.const(np.int8(0))
    graph = Graph()
    data = op.dequantize(op.quantize(graph.input("x", (1, 2, 4, 4)), scale, zero, axis=0), scale, zero, axis=0)
    sums = graph(op.nn.conv2d(graph(data), op.dequantize(weight, scale, zero, axis=0)))
    bounded = sums if bound is None else graph(op.clip(sums, 0.0, bound))
    mod = graph.module(graph(op.multiply(sums, op.divide(bounded, relax.const(divisor)))))
    integer = RealizeInteger()(mod)
    kinds = [op_name(b.value) for b in bindings(integer["main"])]
    assert "divide" not in kinds[kinds.index("nn.conv2d") :]
    data = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype("float32")}
    np.testing.assert_allclose(evaluate_module(integer, data)[0], evaluate_module(mod, data)[0], rtol=1e-5, atol=1e-6)
