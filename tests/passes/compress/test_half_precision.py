"""HalfPrecision: which values become float16, and how close the result stays."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.script import relax as R

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import evaluate_module, run_module
from tests.passes.lower import test_weight_only
from tests.tiny_networks import save_pair

HALF = Policy.uniform(bits=16)
ARM = '{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}'


def network(seed: int = 0, channels: int = 8, scale: float = 1.0) -> tvm.IRModule:
    """Return stem → relu → (conv + stem) → clip → mean → dense, one function ``main``."""
    rng = np.random.default_rng(seed)
    emitter = Emitter()
    x = relax.Var("x", R.Tensor((1, 3, 8, 8), "float32"))

    def weights(*shape: int) -> relax.Expr:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        return relax.const((rng.standard_normal(shape) * spread * scale).astype("float32"))

    stem = emitter.emit(op.nn.conv2d(x, weights(channels, 3, 3, 3), padding=1), "t/stem")
    stem = emitter.emit(op.nn.relu(emitter.emit(op.add(stem, weights(1, channels, 1, 1)))))
    inner = emitter.emit(op.nn.conv2d(stem, weights(channels, channels, 3, 3), padding=1), "t/inner")
    total = emitter.emit(op.clip(emitter.emit(op.add(inner, stem)), 0, 6))
    flat = emitter.emit(op.mean(total, [2, 3]))
    out = emitter.emit(op.matmul(flat, weights(channels, 5)), "t/head")
    return tvm.IRModule({"main": emitter.finish([x], [out]).with_attr("global_symbol", "main")})


def dtypes(mod: tvm.IRModule) -> dict[str, list[str]]:
    """Return the dtypes of the results of each operator, in order."""
    found: dict[str, list[str]] = {}
    for binding in bindings(mod["main"]):
        found.setdefault(op_name(binding.value), []).append(str(binding.var.ty.dtype))
    return found


def test_values_between_layers_are_float16_and_averages_are_not():
    half = HalfPrecision(HALF)(network())
    relax.analysis.well_formed(half)
    found = dtypes(half)
    assert set(found["nn.conv2d"] + found["nn.relu"] + found["clip"] + found["matmul"] + found["add"]) == {"float16"}
    assert found["mean"] == ["float32"]
    # In and out of each of the two islands; none in between.
    assert found["astype"] == ["float16", "float32", "float16", "float32"]
    assert str(half["main"].params[0].ty.dtype) == str(half["main"].ret_ty.fields[0].dtype) == "float32"


def test_layers_keep_their_names():
    names = {b.var.name for b in bindings(HalfPrecision(HALF)(network())["main"])}
    assert {"t/stem", "t/inner", "t/head"} <= names


def test_policy_chooses_the_layers():
    policy = Policy.parse({"layers": {"t/inner": {"bits": 16}}})
    found = dtypes(HalfPrecision(policy)(network()))
    assert found["nn.conv2d"] == ["float32", "float16"] and found["matmul"] == ["float32"]
    untouched = HalfPrecision(Policy.uniform())(network())
    assert "float16" not in str(dtypes(untouched))


def test_weights_beyond_the_range_stay_float32():
    found = dtypes(HalfPrecision(HALF)(network(scale=1e6)))
    assert "float16" not in str(found)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([1, 5, 8]))
def test_result_is_close(seed, channels):
    mod = network(seed, channels)
    x = {"x": np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype("float32")}
    (want,) = evaluate_module(mod, x)
    (got,) = evaluate_module(HalfPrecision(HALF)(mod), x)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= 2e-2 * max(1.0, float(np.abs(want).max()))


def test_int8_network_with_a_float16_layer():
    mod = network()
    rng = np.random.default_rng(1)
    samples = {"x": rng.standard_normal((16, 3, 8, 8)).astype("float32")}
    policy = Policy.parse({"default": {"bits": 8}, "layers": {"t/stem": {"bits": 16}}})
    mixed = HalfPrecision(policy)(InsertQDQ(samples, policy)(mod))
    found = dtypes(mixed)
    assert found["nn.conv2d"] == ["float16", "float32"]
    (want,) = evaluate_module(mod, {"x": samples["x"][:1]})
    (got,) = run_module(mixed, {"x": samples["x"][:1]})
    assert np.abs(got - want).max() <= 0.1 * np.abs(want).max()
    lowered = build.lower(mixed, resolve("host"))
    assert "float16" in lowered.script() and "int8" in lowered.script()


def test_arm_multiplies_eight_at_once():
    target = resolve(ARM)
    mod = build.lower(HalfPrecision(HALF)(network(channels=32)), target)
    kernels = next(m for m in build.generate(mod, target).mod.imports if "llvm" in str(m.kind))
    assembly = kernels.inspect_source("asm")
    assert len(re.findall(r"fmla\s+v\d+\.8h", assembly)) > len(re.findall(r"fmla\s+v\d+\.4s", assembly))


def test_asked_for_where_the_cpu_has_it(tmp_path):
    models = save_pair(tmp_path)
    with pytest.raises(InputError, match="doesn't compute in float16"):
        make_graphs(NetworkRequest.parse(models, {"quantize": "fp16", "target": "aarch64"}))
    graphs = make_graphs(NetworkRequest.parse(models, {"quantize": "fp16", "target": ARM}))
    assert list(graphs.stages) == ["merged", "fp16"]


def test_weights_that_a_file_stores_as_codes_become_float16_ones() -> None:
    mod, inputs = test_weight_only.network(4, 32, True, 3, 16)
    new = HalfPrecision(HALF)(mod)
    (layer,) = [b.value for b in bindings(new["main"]) if op_name(b.value) == "matmul"]
    assert isinstance(layer.args[1], tvm.ir.GenericConst) and str(layer.args[1].ty.dtype) == "float16"
    (want,), (got,) = evaluate_module(mod, inputs), evaluate_module(new, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())
