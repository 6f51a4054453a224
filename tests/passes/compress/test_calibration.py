"""Calibration data: what is refused with which words, and what is remembered of a tensor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from tvm import relax, topi
from tvm.script import ir as I
from tvm.script import relax as R

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.deploy.runner import Input, sample_batches
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.frontend import load, onnx_import
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.dataflow import Emitter, bindings
from nnfuze_tvm.passes import InsertQDQ, PruneChannels, pipeline
from nnfuze_tvm.passes.compress.calibration import Range, batches, collect_ranges, load_calibration
from nnfuze_tvm.passes.compress.magnitudes import CALIBRATION_METHODS
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import run_module


@I.ir_module
class Network:
    @R.function
    def main(image: R.Tensor((1, 2, 3), "float32"), extra: R.Tensor((2, 4), "float32")):
        with R.dataflow():
            a = R.nn.relu(image)
            b = R.multiply(extra, R.const(2.0, "float32"))
            R.output(a, b)
        return (a, b)


def good(n=3):
    rng = np.random.default_rng(0)
    return {
        "image": rng.standard_normal((n, 2, 3)).astype("float32"),
        "extra": rng.standard_normal((2 * n, 4)).astype("float32"),
    }


def test_good_data_from_a_mapping_and_from_a_file(tmp_path):
    np.savez(tmp_path / "data.npz", **good())
    for source in (good(), tmp_path / "data.npz", str(tmp_path / "data.npz")):
        loaded = load_calibration(source, Network)
        assert loaded.keys() == {"image", "extra"}
        np.testing.assert_array_equal(loaded["image"], good()["image"])


def test_wider_floats_are_narrowed():
    data = {name: array.astype("float64") for name, array in good().items()}
    assert load_calibration(data, Network)["image"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("extra"), "no array for input 'extra'; it holds: image"),
        (lambda d: d.update(audio=np.zeros(1)), "array 'audio' is no input of the network; its inputs are: image"),
        (lambda d: d.update(image=np.zeros((2, 3), "f4")), r"'image' has shape \[2, 3\]; expected \[N, 2, 3\]"),
        (lambda d: d.update(image=np.zeros((5, 3, 2), "f4")), r"has shape \[5, 3, 2\]; expected \[N, 2, 3\]"),
        (lambda d: d.update(image=np.zeros((0, 2, 3), "f4")), "'image' is empty"),
        (lambda d: d.update(extra=np.zeros((5, 4), "f4")), "has 5 samples; expected a multiple of the batch, 2"),
        (lambda d: d.update(image=np.zeros((3, 2, 3), "u1")), "has type uint8; expected float32"),
        (lambda d: d.update(image=np.full((3, 2, 3), np.nan, "f4")), "holds NaN or infinity"),
        (lambda d: d.update(image=np.full((3, 2, 3), np.inf, "f4")), "holds NaN or infinity"),
        (lambda d: d.update(image=np.zeros((4, 2, 3), "f4")), "different numbers of network batches"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(change, message, tmp_path):
    data = good()
    change(data)
    with pytest.raises(InputError, match=message) as error:
        load_calibration(data, Network)
    assert "\n" not in str(error.value)
    path = tmp_path / "data.npz"
    np.savez(path, **data)
    with pytest.raises(InputError, match=r"data\.npz"):
        load_calibration(path, Network)


def test_bad_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "single.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    for name, message in (
        ("missing.npz", "No such file"),
        (".", "can't read"),
        ("text.npz", "not an .npz file"),
        ("empty.npz", "not an .npz file"),
        ("single.npy", "a single array"),
        ("objects.npz", "array 'image': holds values of type '[|]O', not numbers"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_calibration(tmp_path / name, Network)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_ranges_of_inputs_and_inner_tensors():
    func = Network["main"]
    relu = next(b.var for b in bindings(func))
    data = good()
    image = func.params[0]
    ranges = collect_ranges(
        Network, func, {image: 1, relu: 1}, data, lambda mod, _: lambda inputs: run_module(mod, inputs)
    )
    assert ranges[image].low == data["image"].min() and ranges[image].high == data["image"].max()
    assert ranges[relu].low == 0 and ranges[relu].high == data["image"].max()
    np.testing.assert_allclose(ranges[relu].mean, np.maximum(data["image"], 0).mean((0, 2)), rtol=1e-6)


def test_both_executors_run_the_network():
    data = {name: array[: len(array) // 3] for name, array in good().items()}
    expected = run_module(Network, data)
    mod = tvm.IRModule({"main": Network["main"]})
    for executor in (evaluate.executor, host_executor):
        for result, wanted in zip(executor(mod)(data), expected, strict=True):
            np.testing.assert_allclose(result, wanted)


@pytest.mark.parametrize("executor", [evaluate.executor, host_executor])
def test_both_executors_take_single_numbers(executor):
    builder = relax.BlockBuilder()
    x, n = relax.Var("x", relax.TensorType((4,), "float32")), relax.Var("n", relax.TensorType((), "float32"))
    with builder.function("main", [x, n]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([builder.emit(relax.op.multiply(x, n))]))
        builder.emit_func_output(result)
    (found,) = executor(builder.get())({"x": np.arange(4, dtype="float32"), "n": np.array(2, "float32")})
    np.testing.assert_array_equal(found, [0, 2, 4, 6])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_range_forgets_the_order_but_no_number(reaches, seed):
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((2, 50)) * reach).astype("float32") for reach in reaches]
    seen = Range(1)
    for part in parts:
        seen.observe(part)
    every = np.concatenate(parts)
    assert seen.limit("minmax") == np.abs(every).max()
    assert seen.magnitudes.counts().sum() == every.size
    np.testing.assert_allclose(seen.mean, every.mean(0), rtol=1e-4, atol=1e-4)
    for method in ("percentile", "mse", "kl", "average"):
        assert 0 < seen.limit(method) <= seen.limit("minmax")


def test_outliers_are_cut_where_that_pays():
    values = np.random.default_rng(0).standard_normal((1, 200_000)).astype("float32")
    values[0, 0] = 60
    seen = Range()
    seen.observe(values)
    assert seen.limit("minmax") == 60
    assert 3.5 < seen.limit("percentile") < 5

    def error(limit):
        scale = limit / 127
        return np.mean((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2)

    assert error(seen.limit("mse")) <= error(60) * 1.001


def test_a_tensor_that_is_always_zero_has_a_range():
    seen = Range()
    seen.observe(np.zeros((1, 4), "float32"))
    assert [seen.limit(method) for method in CALIBRATION_METHODS] == [0] * len(CALIBRATION_METHODS)


def test_long_tails_are_cut():
    """Of Student's distribution with three degrees of freedom, hardly a number is where the largest are."""
    values = np.random.default_rng(0).standard_t(3, (20, 20_000)).astype("float32")
    seen = Range()
    for sample in values:
        seen.observe(sample[None])
    largest = seen.limit("minmax")
    assert largest > 60
    assert 2 < seen.limit("kl") < 0.5 * largest
    assert seen.limit("average") == pytest.approx(np.abs(values).max(1).mean(), rel=1e-6)

    def error(limit):
        return np.abs(np.clip(np.rint(values * 127 / limit), -127, 127) * limit / 127 - values).mean()

    assert error(seen.limit("kl")) < 0.6 * error(largest)


@pytest.mark.parametrize("method", ["percentile", "mse", "kl"])
def test_a_sample_like_no_other_is_left_out(method):
    rng = np.random.default_rng(0)
    ordinary = rng.standard_normal((8, 500)).astype("float32")
    seen, alone = Range(1), Range(1)
    for n, sample in enumerate(ordinary):
        seen.observe(sample[None])
        alone.observe(sample[None])
        if n == 0:
            seen.observe(1e4 * ordinary[:1])
    assert seen.limit(method) == pytest.approx(alone.limit(method), rel=0.01)
    np.testing.assert_allclose(seen.mean, alone.mean)


@pytest.mark.parametrize("executor", [evaluate.executor, host_executor])
def test_a_network_with_kernels_of_its_own_is_calibrated(executor, monkeypatch):
    """An importer may make PrimFuncs of what has no operator."""

    def pad(node, inputs):
        return node.builder.emit_te(topi.nn.reflect_pad, inputs[0], [0, 0, 1, 1], [0, 0, 1, 1])

    monkeypatch.setattr(onnx_import, "CONVERTERS", {**onnx_import.CONVERTERS, "Pad": pad})
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.standard_normal((6, 6, 3, 3)).astype("float32") for n in range(3)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w0"], ["a"], name="first", pads=[1] * 4),
            helper.make_node("Conv", ["a", "w1"], ["b"], name="second", pads=[1] * 4),
            helper.make_node("Pad", ["b", "widths"], ["c"], name="pad", mode="reflect"),
            helper.make_node("Conv", ["c", "w2"], ["y"], name="third"),
        ],
        "padded",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 6, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 6, 8, 8])],
        [
            *(numpy_helper.from_array(value, name) for name, value in weights.items()),
            numpy_helper.from_array(np.array([0, 0, 1, 1] * 2), "widths"),
        ],
    )
    mod = load([helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)])
    mod = tvm.transform.Sequential(pipeline.merge_phases())(mod)
    samples = {"x": rng.standard_normal((4, 6, 8, 8)).astype("float32")}
    policy = Policy.uniform(keep=0.5, bits=8)
    passes = [PruneChannels(policy, "activation", samples, executor), InsertQDQ(samples, policy, executor=executor)]
    quantized = tvm.transform.Sequential(passes)(mod)
    assert [layer.integer for layer in metrics.layers(quantized)] == [True, True, True]
    assert [layer.shape[1] for layer in metrics.layers(quantized)] == [3, 6, 6]  # nothing is known of the pad


def test_inputs_that_are_one_number_have_one_per_sample():
    x, gain = relax.Var("x", R.Tensor((1, 4), "float32")), relax.Var("gain", R.Tensor((), "float32"))
    emitter = Emitter()
    weight = relax.const(np.eye(4, 3, dtype="float32"))
    product = emitter.emit(relax.op.matmul(x, weight), "t/fc")
    scaled = emitter.emit(relax.op.multiply(product, gain))
    func = emitter.finish([x, gain], [scaled]).with_attr("global_symbol", "main")
    mod = ir.with_task_outputs(tvm.IRModule({"main": func}), [ir.TaskOutput("t", "y")])
    samples = {"x": np.ones((5, 4), "f4"), "gain": np.arange(5, dtype="f4")}
    checked = load_calibration(samples, mod)
    assert [batch["gain"].item() for batch in batches(checked, func.params)] == [0, 1, 2, 3, 4]
    assert all(batch["gain"].shape == () for batch in batches(checked, func.params))
    with pytest.raises(InputError, match=r"'gain' has shape \[5, 1\]; expected \[N\]"):
        load_calibration(samples | {"gain": np.ones((5, 1), "f4")}, mod)
    with pytest.raises(InputError, match="different numbers of network batches"):
        load_calibration(samples | {"gain": np.ones(4, "f4")}, mod)
    # The number itself may be anything when the network runs.
    quantized = InsertQDQ(samples, Policy.uniform(bits=8))(mod)
    (got,) = evaluate.evaluate(quantized["main"], {"x": np.ones((1, 4), "f4"), "gain": np.float32(1000)})
    np.testing.assert_allclose(got, np.full((1, 3), 1000), rtol=0.02)
    inputs = [Input("x", (1, 4), "float32"), Input("gain", (), "float32")]
    assert [batch["gain"].item() for batch in sample_batches(samples, inputs)] == [0, 1, 2, 3, 4]


def test_samples_that_lead_to_infinity_are_refused():
    x = relax.Var("x", R.Tensor((1, 4), "float32"))
    emitter = Emitter()
    quotient = emitter.emit(relax.op.divide(relax.const(1.0, "float32"), x))
    product = emitter.emit(relax.op.matmul(quotient, relax.const(np.eye(4, 3, dtype="float32"))), "t/fc")
    func = emitter.finish([x], [product]).with_attr("global_symbol", "main")
    with pytest.raises(InputError, match="the samples make the input of 't/fc' infinite or NaN"):
        InsertQDQ({"x": np.zeros((2, 4), "f4")}, Policy.uniform(bits=8))(tvm.IRModule({"main": func}))


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(0.01, 100), st.integers(0, 2**31))
def test_the_error_of_8_bits_is_that_of_rounding(mean, deviation, seed):
    values = np.random.default_rng(seed).normal(mean * deviation, deviation, 20_000)
    seen = Range()
    for part in np.split(values, 4):
        seen.observe(part)
    scale = seen.limit("minmax") / 127
    wanted = np.sqrt(np.mean((values - np.rint(values / scale) * scale) ** 2)) / values.std()
    assert seen.error(scale) == pytest.approx(wanted, rel=0.05)


def test_what_never_varies_has_no_error():
    seen = Range()
    seen.observe(np.full(100, 0.7))
    assert seen.error(0.5) == 0


def test_an_input_that_is_one_number_reaches_compiled_networks():
    emitter, x, scale = Emitter(), relax.Var("x", R.Tensor((1, 4), "float32")), relax.Var("s", R.Tensor((), "float32"))
    func = emitter.finish([x, scale], [emitter.emit(relax.op.multiply(x, scale))]).with_attr("global_symbol", "main")
    data = {"x": np.ones((1, 4), "float32"), "s": np.float32(3)}
    (found,) = host_executor(ir.with_task_outputs(tvm.IRModule({"main": func}), [ir.TaskOutput("t", "y")]))(data)
    np.testing.assert_array_equal(found, np.full((1, 4), 3))
