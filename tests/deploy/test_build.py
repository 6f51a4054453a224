"""From a graph to an executable: the registered pipeline, kernels without a rule of their own, tuning records."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir

from nnfuze_tvm import schedules
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.schedules.knobs import take_knobs
from nnfuze_tvm.schedules.rule import Rule
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels, schedule_kernel

HOST = resolve("host")


def small_network() -> tvm.IRModule:
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((1, 8, 6, 6), "float32"))
    weights = relax.const(rng.standard_normal((16, 8, 3, 3)).astype("float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            value = builder.emit(relax.op.nn.relu(builder.emit(relax.op.nn.conv2d(data, weights, strides=2))))
            result = builder.emit_output(relax.Tuple([value]))
        builder.emit_func_output(result)
    return builder.get()


def primitives(mod: tvm.IRModule) -> list[tvm.tirx.PrimFunc]:
    return [f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]


def run(executable: relax.VMExecutable) -> np.ndarray:
    data = np.random.default_rng(1).standard_normal((1, 8, 6, 6)).astype("float32")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(data))[0].numpy()


def test_pipeline_is_registered_with_tvm():
    ours = relax.build(small_network(), HOST, relax_pipeline=relax.get_pipeline("nnfuze"))
    by_name = relax.build(small_network(), HOST, relax_pipeline="nnfuze")
    plain = relax.build(small_network(), HOST)
    np.testing.assert_allclose(run(ours), run(plain), atol=1e-4)
    np.testing.assert_array_equal(run(ours), run(by_name))


def test_every_kernel_is_scheduled():
    lowered = build.lower(small_network(), HOST)
    kernels = [f for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert kernels
    assert all("nnfuze.rule" in kernel.attrs for kernel in kernels)


def test_kernels_say_how_they_are_scheduled():
    kernels = primitives(build.lower(small_network(), HOST))
    knobs = [list(f.attrs["nnfuze.knobs"].items()) for f in kernels]
    again = primitives(build.lower(small_network(), HOST))
    assert knobs == [list(f.attrs["nnfuze.knobs"].items()) for f in again]
    (conv,) = (dict(found) for found, f in zip(knobs, kernels, strict=True) if f.attrs["nnfuze.rule"] == "conv2d")
    assert conv["channels"] % conv["lanes"] == 0
    assert "knob" not in {name for found in knobs for name, _ in found}, "every knob has a name"


def test_rule_that_fails_costs_speed_and_not_the_compilation(monkeypatch, caplog):
    def broken(sch, hw, tunable):
        raise s_tir.ScheduleError("not this one")

    rules = [Rule(rule.name, broken) if rule.name == "conv2d" else rule for rule in schedules.RULES]
    monkeypatch.setattr(schedules, "RULES", rules)
    with caplog.at_level(logging.WARNING):
        lowered = build.lower(small_network(), HOST)
    assert "not this one" in caplog.text
    rules = {f.attrs["nnfuze.rule"] for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert "fallback" in rules and "conv2d" not in rules
    monkeypatch.undo()
    np.testing.assert_allclose(run(build.generate(lowered, HOST)), run(build.build(small_network(), HOST)), atol=1e-4)


def test_record_of_the_database_goes_before_the_rule():
    fused = build.fuse(small_network(), HOST)
    database = s_tir.meta_schedule.database.MemoryDatabase()
    tasks = s_tir.meta_schedule.relax_integration.extract_tasks(fused, HOST)
    (task,) = (t for t in tasks if "conv2d" in t.task_name)
    sch = s_tir.Schedule(task.dispatched[0], seed=3)
    schedules.apply(sch, HOST, tunable=True)
    workload = database.commit_workload(task.dispatched[0])
    database.commit_tuning_record(s_tir.meta_schedule.database.TuningRecord(sch.trace, workload, [1e-6], HOST))
    scheduled = ScheduleKernels(HOST, database)(fused)
    tuned = [f for g, f in scheduled.functions_items() if isinstance(f, tvm.tirx.PrimFunc) and "conv2d" in g.name_hint]
    expected, notes = take_knobs(schedules.apply_rewrites(sch.mod["main"]))
    tvm.ir.assert_structural_equal(tuned[0].body, expected.body, map_free_vars=True)
    assert notes.pop("rule") == tuned[0].attrs["nnfuze.rule"] == "conv2d"
    assert notes == dict(tuned[0].attrs["nnfuze.knobs"])
    assert notes != dict(schedule_kernel("k", task.dispatched[0]["main"], HOST).attrs["nnfuze.knobs"])


@pytest.mark.parametrize("name", ["rpi9", "", '{"kind": "llvm", "mcpu": 1}', "{broken"])
def test_unknown_target_is_one_line(name):
    with pytest.raises(DeviceError, match="target") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["host", "aarch64", "x86-64-v4", '{"kind": "llvm", "mcpu": "znver3"}'])
def test_known_targets(name):
    assert resolve(name).kind.name == "llvm"


@pytest.mark.parametrize("kind", ["conv2d", "dense"])
@pytest.mark.parametrize("weight", [-127, -128])
def test_lowest_weights_are_exact_on_signed_data(kind, weight):
    """A CPU that multiplies magnitudes would have none for -128; see also ``tests/arm/test_lowest_numbers.py``."""
    scale, zero = relax.const(np.float32(1.0)), relax.const(np.int8(0))
    builder = relax.BlockBuilder()
    shape, weight_shape = ((1, 8, 3, 3), (16, 8, 1, 1)) if kind == "conv2d" else ((1, 8), (8, 16))
    data = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            codes = builder.emit(relax.op.quantize(data, scale, zero, axis=0, out_dtype="int8"))
            value = builder.emit(relax.op.dequantize(codes, scale, zero, axis=0, out_dtype="float32"))
            stored = relax.const(np.full(weight_shape, weight, "int8"))
            weights = builder.emit(relax.op.dequantize(stored, scale, zero, axis=0, out_dtype="float32"))
            layer = relax.op.nn.conv2d(value, weights) if kind == "conv2d" else relax.op.matmul(value, weights)
            result = builder.emit_output(relax.Tuple([builder.emit(layer)]))
        builder.emit_func_output(result)
    x = np.random.default_rng(0).integers(-127, 128, shape).astype("float32")
    machine = relax.VirtualMachine(build.build(builder.get(), HOST), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(x))[0].numpy()
    np.testing.assert_array_equal(got, np.broadcast_to(x.sum(1, keepdims=True) * weight, got.shape))


def test_results_without_elements_are_loaded_from_libraries(tmp_path):
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            result = builder.emit_output(
                relax.Tuple([relax.const(np.zeros((2, 0), "int8")), builder.emit(data + data)])
            )
        builder.emit_func_output(result)
    path = export_library(build.build(builder.get(), HOST), tmp_path / "lib.so", HOST)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    empty, twice = machine["main"](tvm.runtime.tensor(np.ones((2, 3), "float32")))
    assert empty.numpy().shape == (2, 0) and str(empty.dtype) == "int8"
    np.testing.assert_array_equal(twice.numpy(), np.full((2, 3), 2, "float32"))
