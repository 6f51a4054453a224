"""InsertQDQ: what is quantized, where, with which scales, and how close the result is to the float network."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.script import relax as R

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.contraction import FEW_PRODUCTS, MOST_WEIGHTS, most_of_few
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.graph.ir import FLOAT_LAYERS_ATTR
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ, _fitting_scale
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.layout import ToNHWC
from tests.helpers import evaluate_module, run_module

INT8 = Policy.uniform(bits=8)


class Graph:
    """Builds a float graph with one function ``main`` and well conditioned random weights."""

    def __init__(self, seed=0, shape=(1, 3, 8, 8)):
        self.rng = np.random.default_rng(seed)
        self.emitter = Emitter()
        self.x = relax.Var("x", R.Tensor(shape, "float32"))

    def __call__(self, value, name="lv"):
        return self.emitter.emit(value, name)

    def conv(self, data, out, name, size=3, groups=1, bias=True, stride=1):
        channels = ir.static_shape(data)[1] // groups
        weight = self.rng.standard_normal((out, channels, size, size)) * np.sqrt(2 / (channels * size**2))
        y = op.nn.conv2d(data, relax.const(weight.astype("float32")), padding=size // 2, groups=groups, strides=stride)
        y = self(y, name)
        shift = self.rng.standard_normal((1, out, 1, 1)).astype("float32")
        return self(op.add(y, relax.const(shift * 0.3))) if bias else y

    def relu(self, data):
        return self(op.nn.relu(data))

    def dense(self, data, out, name):
        depth = ir.static_shape(data)[-1]
        weight = self.rng.standard_normal((depth, out)) / np.sqrt(depth)
        y = self(op.matmul(data, relax.const(weight.astype("float32"))), name)
        return self(op.add(y, relax.const(self.rng.standard_normal(out).astype("float32"))))

    def head(self, data):
        pooled = self(op.mean(data, [2, 3], keepdims=True))
        return self.dense(self(op.reshape(pooled, (1, ir.static_shape(data)[1]))), 5, "t/fc")

    def module(self, *outputs):
        func = self.emitter.finish([self.x], outputs).with_attr("global_symbol", "main")
        mod = tvm.IRModule({"main": func})
        return ir.with_task_outputs(mod, [ir.TaskOutput("t", f"y{k}") for k in range(len(outputs))])

    def samples(self, count=6):
        return {"x": self.rng.standard_normal((count, *ir.static_shape(self.x)[1:])).astype("float32")}


def quantize(mod, samples, policy=INT8, **options):
    return InsertQDQ(samples, policy, **options)(mod)


def residual_network(seed=0):
    graph = Graph(seed)
    first = graph.relu(graph.conv(graph.x, 8, "t/stem"))
    inner = graph.relu(graph.conv(first, 8, "t/a"))
    joined = graph.relu(graph(op.add(graph.conv(inner, 8, "t/b"), first)))
    pooled = graph(op.nn.max_pool2d(joined, (2, 2), (2, 2)))
    left = graph.relu(graph.conv(pooled, 16, "t/c"))
    shortcut = graph.conv(pooled, 16, "t/shortcut", size=1)
    main = graph.conv(left, 16, "t/d")
    return graph, graph.head(graph.relu(graph(op.add(main, shortcut))))


def calls(mod, kind):
    return [b for b in bindings(mod["main"]) if op_name(b.value) == kind]


def scale_of(binding):
    return float(binding.value.args[1].value.numpy())


def codes_fill(codes, outer):
    """Tell of each row of codes whether no larger ones would do, and whether eight products with them fit in int16."""
    if codes.ndim == 4:
        codes = np.moveaxis(codes, 1, 3)
    rows = np.moveaxis(codes, outer, 0).reshape(codes.shape[outer], -1)
    largest, inputs = np.abs(rows).max(1), codes.shape[-1] if codes.ndim == 4 else codes.shape[1 - outer]
    if inputs % FEW_PRODUCTS:
        return largest == 127, largest <= 127
    most = most_of_few(rows)
    # Rounding may take what is a little more than fits.
    return (largest == 127) | (most > MOST_WEIGHTS - 8), most <= MOST_WEIGHTS


@given(
    shape=st.sampled_from([(8, 16, 1, 1), (5, 8, 3, 3), (3, 24, 1, 5), (4, 12, 1, 1), (6, 8, 1, 1)]),
    tails=st.floats(0.5, 4.0),
    seed=st.integers(0, 2**16),
)
def test_eight_products_fit_in_int16_and_scales_are_no_larger_than_that_takes(shape, tails, seed):
    rng = np.random.default_rng(seed)
    weights = np.sign(rng.standard_normal(shape)) * np.abs(rng.standard_normal(shape)) ** tails
    scale = (np.abs(weights).max((1, 2, 3)) / 127).astype("float32")
    found = _fitting_scale(weights[None], scale)
    assert found.dtype == np.float32 and (found >= scale).all() and (found <= 2.05 * scale).all()
    codes = np.rint(weights / found.astype("float64")[:, None, None, None]).astype("int32")
    full, fits = codes_fill(codes, 0)
    assert full.all() and fits.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_have_the_scale_that_they_had(value):
    weights = np.ones((4, 8, 1, 1))
    weights[1, 3] = value
    scale = (np.abs(weights).max((1, 2, 3)) / 127).astype("float32")
    with np.errstate(invalid="ignore"):
        found = _fitting_scale(weights[None], scale)
    np.testing.assert_array_equal(found[1], scale[1])


def test_a_residual_network():
    graph, y = residual_network()
    mod, samples = graph.module(y), graph.samples()
    result = quantize(mod, samples)
    relax.analysis.well_formed(result)
    names = [b.var.name for b in bindings(result["main"])]
    for layer in ("t/stem", "t/a", "t/b", "t/c", "t/d", "t/shortcut", "t/fc"):
        assert layer in names
    assert ir.task_outputs(result) == ir.task_outputs(mod)
    # Input, stem, a, b + stem, c, d (the shortcut comes first and stays a sum), the sum, its average.
    assert len(calls(result, "quantize")) == 8
    for conv in calls(result, "nn.conv2d") + calls(result, "matmul"):
        dequantize = next(b.value for b in bindings(result["main"]) if b.var.same_as(conv.value.args[1]))
        weight = dequantize.args[0].value.numpy()
        assert weight.dtype == np.int8
        full, fits = codes_fill(weight.astype("int32"), 0 if weight.ndim == 4 else 1)
        assert full.all() and fits.all()
    # What goes in is not changed, and logits stay float.
    assert not calls(mod, "quantize")
    data = {"x": samples["x"][:1]}
    wanted, simulated = evaluate_module(mod, data)[0], evaluate_module(result, data)[0]
    assert np.abs(simulated - wanted).max() < 0.05 * np.abs(wanted).max()
    real = RealizeInteger()(ToNHWC()(result))
    assert list(real.attrs[FLOAT_LAYERS_ATTR]) == []
    np.testing.assert_allclose(run_module(real, data)[0], simulated, atol=0.01 * np.abs(wanted).max())


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_random_networks_simulate_what_they_become(data):
    graph = Graph(data.draw(st.integers(0, 2**31)), (1, 4, 6, 6))
    layers = iter(range(100))
    values = [graph.x]
    for _ in range(data.draw(st.integers(1, 4))):
        source = data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["conv", "depthwise", "add", "concat", "max", "average", "relu6"]))
        if kind == "conv":
            values.append(graph.relu(graph.conv(source, 4, f"t/c{next(layers)}")))
        elif kind == "depthwise":
            channels = ir.static_shape(source)[1]
            values.append(graph.conv(source, channels, f"t/c{next(layers)}", groups=channels))
        elif kind == "add":
            other = data.draw(st.sampled_from([v for v in values if ir.static_shape(v) == ir.static_shape(source)]))
            values.append(graph(op.add(graph.conv(source, ir.static_shape(source)[1], f"t/c{next(layers)}"), other)))
        elif kind == "concat":
            values.append(graph(op.concat([source, graph.conv(source, 3, f"t/c{next(layers)}")], 1)))
        elif kind == "max":
            values.append(graph(op.nn.max_pool2d(source, (3, 3), (1, 1), (1, 1))))
        elif kind == "average":
            values.append(graph(op.nn.avg_pool2d(source, (3, 3), (1, 1), (1, 1))))
        else:
            values.append(graph(op.clip(graph.conv(source, 4, f"t/c{next(layers)}"), 0.0, 6.0)))
    mod, samples = graph.module(graph.head(values[-1])), graph.samples(2)
    result = quantize(mod, samples)
    inputs = {"x": samples["x"][:1]}
    wanted, simulated = evaluate_module(mod, inputs)[0], evaluate_module(result, inputs)[0]
    real = evaluate_module(RealizeInteger()(ToNHWC()(result)), inputs)[0]
    reach = np.abs(wanted).max()
    assert np.abs(simulated - wanted).max() < 0.15 * reach
    assert np.abs(real - simulated).max() < 0.03 * reach


def test_a_policy_keeps_layers_in_float():
    graph, y = residual_network()
    policy = Policy.parse({"default": {"bits": 8}, "layers": {"t/stem": {"bits": 32}, "t/fc": {"bits": 32}}})
    result = quantize(graph.module(y), graph.samples(), policy)
    by_name = {b.var.name: b.value for b in bindings(result["main"])}
    assert isinstance(by_name["t/stem"].args[1], tvm.ir.GenericConst)
    assert isinstance(by_name["t/fc"].args[1], tvm.ir.GenericConst)
    assert by_name["t/stem"].args[0].same_as(result["main"].params[0])
    assert not isinstance(by_name["t/a"].args[1], tvm.ir.GenericConst)
    real = RealizeInteger()(result)
    assert [str(note).split(":")[0] for note in real.attrs[FLOAT_LAYERS_ATTR]] == ["t/stem", "t/fc"]


def test_without_8_bit_layers_nothing_changes():
    graph, y = residual_network()
    mod = graph.module(y)
    tvm.ir.assert_structural_equal(quantize(mod, graph.samples(), Policy.uniform()), mod)


def test_aliases_of_merged_layers_count():
    graph, y = residual_network()
    mod = ir.with_aliases(graph.module(y), {"other/stem": "t/stem"})
    policy = Policy.parse({"layers": {"other/stem": {"bits": 8}}})
    assert len(calls(quantize(mod, graph.samples(), policy), "quantize")) == 1


def test_a_concatenation_has_one_scale():
    graph = Graph()
    wide = graph(op.multiply(graph.conv(graph.x, 4, "t/wide"), relax.const(np.float32(10))))
    narrow = graph(op.nn.max_pool2d(graph.relu(graph.conv(graph.x, 4, "t/narrow")), (3, 3), (1, 1), (1, 1)))
    joined = graph(op.concat([wide, narrow], 1))
    result = quantize(graph.module(graph.conv(joined, 4, "t/last")), graph.samples())
    scales = [scale_of(q) for q in calls(result, "quantize")]
    assert len(scales) == 3 and scales[1] == scales[2] != scales[0]
    integer = RealizeInteger()(result)
    assert len(calls(integer, "concat")) == 1
    assert str(calls(integer, "concat")[0].var.ty.dtype) == "int8"


def test_every_function_of_an_unmerged_module_is_quantized():
    first, second = residual_network(1), residual_network(2)
    mods = [graph.module(y) for graph, y in (first, second)]
    mod = tvm.IRModule({name: m["main"].with_attr("global_symbol", name) for name, m in zip("ab", mods, strict=True)})
    result = quantize(mod, first[0].samples())
    for name in "ab":
        assert "quantize" in {op_name(b.value) for b in bindings(result[name])}


def test_a_dying_channel_does_not_overflow_its_bias():
    graph = Graph(shape=(1, 3, 4, 4))
    weight = graph.rng.standard_normal((4, 3, 1, 1)).astype("float32")
    weight[1], weight[2] = 0, 1e-12
    y = graph(op.nn.conv2d(graph.x, relax.const(weight)), "t/conv")
    bias = np.array([1, 2, -3, 4], "float32").reshape(1, 4, 1, 1)
    mod = graph.module(graph.relu(graph(op.add(y, relax.const(bias)))))
    samples = graph.samples()
    result = RealizeInteger()(quantize(mod, samples))
    assert list(result.attrs[FLOAT_LAYERS_ATTR]) == []
    data = {"x": samples["x"][:1]}
    np.testing.assert_allclose(evaluate_module(result, data)[0], evaluate_module(mod, data)[0], atol=0.1)


def test_bias_correction_removes_the_mean_error():
    graph = Graph(shape=(1, 8, 6, 6))
    # Weights that all round the same way, and inputs with a mean: the worst case for the bias.
    weight = np.full((4, 8, 1, 1), 0.3049, "float32")
    weight[:, 0] = 10.0
    y = graph(op.nn.conv2d(graph.x, relax.const(weight)), "t/conv")
    y = graph(op.add(y, relax.const(np.zeros((1, 4, 1, 1), "float32"))))
    mod = graph.module(y)
    samples = {"x": graph.samples(8)["x"] + 2}
    errors = []
    for correct in (False, True):
        run = evaluate.executor(quantize(mod, samples, bias_correction=correct))
        wanted = evaluate.executor(mod)
        mean = [run({"x": s[None]})[0] - wanted({"x": s[None]})[0] for s in samples["x"]]
        errors.append(np.abs(np.mean(mean, axis=(0, 1, 3, 4))).max())
    assert errors[1] < 0.5 * errors[0]


def test_bias_correction_adds_a_bias_where_there_is_none():
    graph = Graph()
    y = graph.conv(graph.conv(graph.x, 4, "t/a", bias=False), 8, "t/b", bias=False, groups=2)
    y = graph.dense(graph(op.reshape(y, (1, 512))), 3, "t/fc")
    samples = {"x": graph.samples()["x"] + 2}
    result = quantize(graph.module(y), samples, bias_correction=True)
    assert len(calls(result, "add")) == 3


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_methods_choose_other_scales(method):
    graph = Graph()
    samples = graph.samples(500)
    samples["x"][0, 0, 0, 0] = 10
    result = quantize(graph.module(graph.conv(graph.x, 4, "t/conv")), samples, method=method)
    (scale,) = (scale_of(q) for q in calls(result, "quantize"))
    assert scale == pytest.approx(10 / 127) if method == "minmax" else scale < 0.9 * 10 / 127


def test_bad_options_and_data_are_refused():
    graph, y = residual_network()
    with pytest.raises(InputError, match="'max' is unknown; choose one of: minmax, percentile, mse"):
        InsertQDQ(graph.samples(), INT8, method="max")
    with pytest.raises(InputError, match="no array for input 'x'"):
        quantize(graph.module(y), {})


def test_golden():
    graph = Graph(shape=(1, 2))
    weight = np.array([[1.0, -0.5], [0.25, 2.0]], "float32")
    mod = graph.module(graph(op.nn.relu(graph(op.matmul(graph.x, relax.const(weight)), "t/fc"))))
    result = quantize(mod, {"x": np.array([[127.0, -20.0]], "float32")}, bias_correction=False)
    after = Graph(shape=(1, 2))
    one, zero = relax.const(np.float32(1)), relax.const(np.int8(0))
    data = after(op.dequantize(after(op.quantize(after.x, one, zero, 0, "int8")), one, zero, 0, "float32"))
    codes = relax.const(np.array([[127, -32], [32, 127]], "int8"))
    scale = relax.const((np.array([1.0, 2.0]) / 127).astype("float32"))
    real = after(op.dequantize(codes, scale, relax.const(np.zeros(2, "int8")), 1, "float32"))
    after = after.module(after(op.nn.relu(after(op.matmul(data, real), "t/fc"))))
    tvm.ir.assert_structural_equal(result, after)


@pytest.mark.parametrize("operator", [op.multiply, op.add, op.maximum, op.minimum])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (1, 1, 1, 1)])
def test_constants_of_higher_rank(operator, shape):
    graph = Graph(shape=(3, 6))
    data = graph.relu(graph.dense(graph.x, 5, "t/first"))
    wide = graph(operator(data, relax.const(np.full(shape, 0.75, "float32"))))
    mod = graph.module(graph.dense(wide, 4, "t/second"))
    samples = {"x": np.random.default_rng(0).standard_normal((24, 6)).astype("float32")}
    integer = RealizeInteger()(InsertQDQ(samples, INT8)(mod))
    one = {"x": samples["x"][:3]}
    (expected,), (got,) = evaluate_module(mod, one), evaluate_module(integer, one)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_one_of_several_results_is_quantized():
    graph = Graph(shape=(1, 16))
    both = graph(op.topk(graph.dense(graph.x, 12, "t/first"), 8, axis=1, ret_type="both", dtype="int64"))
    mod = graph.module(graph.dense(graph(relax.TupleGetItem(both, 0)), 4, "t/second"))
    samples = {"x": np.random.default_rng(0).standard_normal((24, 16)).astype("float32")}
    integer = RealizeInteger()(InsertQDQ(samples, INT8)(mod))
    assert not ir.float_layers(integer)
    one = {"x": samples["x"][:1]}
    (expected,), (got,) = evaluate_module(mod, one), evaluate_module(integer, one)
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_layer_that_8_bits_of_its_input_would_spoil_stays_float(method):
    graph = Graph(shape=(1, 3, 64, 64))
    y = graph.relu(graph.conv(graph.x, 4, "t/a"))
    samples = graph.samples(2)
    samples["x"][0, 0, 0, 0] = 300
    result = quantize(
        graph.module(graph.conv(graph(op.nn.max_pool2d(y, (8, 8), (8, 8))), 4, "t/b")), samples, method=method
    )
    # What reaches further than the percentile saturates, as it shall.
    left = ir.float_layers(result)
    assert list(left) == (["t/a"] if method == "minmax" else [])
    assert all("8 bits of its input are off by" in reason for reason in left.values())
    assert len(calls(result, "quantize")) == 2 - len(left)


def number(value):
    return relax.const(np.float32(value))


ACTIVATIONS = {
    "silu": lambda x: op.multiply(x, op.sigmoid(x)),
    "hardswish": lambda x: op.divide(op.multiply(x, op.clip(op.add(x, number(3)), 0.0, 6.0)), number(6)),
    "mish": lambda x: op.multiply(x, op.tanh(op.nn.softplus(x))),
    "square": lambda x: op.multiply(x, x),
    "elu": lambda x: op.add(op.nn.relu(x), op.subtract(op.exp(op.minimum(x, number(0))), number(1))),
    "leakyrelu": lambda x: op.nn.leakyrelu(x, 0.1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_computed_from_floats(name):
    graph = Graph()
    first = graph(ACTIVATIONS[name](graph.conv(graph.x, 8, "t/a")))
    pooled = graph.conv(graph(op.mean(first, [2, 3], keepdims=True)), 8, "t/squeeze", size=1)
    gated = graph(op.multiply(first, graph(op.sigmoid(pooled))))
    mod, samples = graph.module(graph.conv(gated, 8, "t/b")), graph.samples()
    result = quantize(mod, samples)
    made_by = {b.var: b.value for b in bindings(result["main"])}
    # The input; the activation, which is averaged and scaled; its average; the factors; the products.
    points = [op_name(made_by.get(q.value.args[0])) for q in calls(result, "quantize")]
    last = {"hardswish": "divide", "leakyrelu": "nn.leakyrelu", "elu": "add"}.get(name, "multiply")
    assert sorted(points) == sorted(["", last, "mean", "sigmoid", "multiply"])
    data = {"x": samples["x"][:1]}
    (wanted,), (simulated,) = evaluate_module(mod, data), evaluate_module(result, data)
    assert np.abs(simulated - wanted).max() < 0.05 * np.abs(wanted).max()
