"""The check of a compilation finds what is broken, names the layer, and raises no false alarm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from onnx import TensorProto, helper, numpy_helper
from tvm import relax, tirx

from nnfuze_tvm import cli
from nnfuze_tvm.errors import CheckError
from nnfuze_tvm.frontend import onnx_import
from nnfuze_tvm.graph import dataflow
from nnfuze_tvm.jobs.check.differences import difference, tolerated
from nnfuze_tvm.jobs.check.originals import Originals
from nnfuze_tvm.jobs.compile import compile
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.report import Check
from nnfuze_tvm.schedules import schedule_kernels
from tests.tiny_networks import samples, save_pair

Paths = list[str]


@pytest.fixture
def pair(tmp_path: Path) -> Paths:
    return save_pair(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def checked(models: Sequence[str], out: Path, **fields: object) -> Check:
    report = compile(models, out, compare=False, **fields)
    assert report.check is not None
    assert Check.model_validate_json(report.check.model_dump_json()) == report.check
    return report.check


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, tuple[int, ...]]],
    outputs: dict[str, int],
    weights: dict[str, np.ndarray] | None = None,
) -> str:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return str(path)


class TestDifference:
    def test_is_relative_to_the_range(self) -> None:
        want = np.array([100.0, 104.0], np.float32)
        assert difference([want + np.float32(0.5)], [want]) == pytest.approx(0.125)

    def test_of_outputs_that_hardly_vary_is_relative_to_their_size(self) -> None:
        want = np.full(3, 50.0, np.float32)
        assert difference([want + np.float32(1)], [want]) == pytest.approx(0.02)
        assert difference([np.nextafter(want, np.float32(99))], [want]) < 1e-6

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_must_be_in_the_same_places(self, value: float) -> None:
        want = np.array([1.0, value, 3.0], np.float32)
        assert difference([want.copy()], [want]) == 0
        assert np.isinf(difference([want[[0, 2, 1]]], [want]))
        assert np.isinf(difference([np.array([1, 2, 3], np.float32)], [want]))

    def test_types_and_shapes_count(self) -> None:
        want = np.arange(4, dtype=np.int64)
        assert np.isinf(difference([want.astype(np.int32)], [want]))
        assert np.isinf(difference([want.reshape(2, 2)], [want]))
        assert difference([np.zeros((0, 3))], [np.zeros((0, 3))]) == 0


class TestFaults:
    def test_kernel(self, pair: Paths, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, "dense")
        with pytest.raises(CheckError, match=r"task 'one': output 'scores' differs from ONNX Runtime") as error:
            checked(pair, out)
        assert "'one/dense_scores'" in str(error.value)
        assert "(schedule rule dense)" in str(error.value)
        assert not out.exists()

    @pytest.mark.slow
    def test_kernel_of_a_stage_before(
        self, pair: Paths, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil(monkeypatch, "dense")
        with pytest.raises(CheckError, match=r"differs from ONNX Runtime.*'one/dense_scores', in its kernel"):
            compile(pair, out, prune=0.75)

    def test_integer_kernel(self, pair: Paths, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        np.savez(tmp_path / "calibration.npz", x=samples())
        spoil(monkeypatch, "conv2d", "int8")
        with pytest.raises(CheckError, match=r"differs from its graph in NumPy.*'one/conv', in its kernel"):
            checked(pair, out, quantize="int8", calibration=str(tmp_path / "calibration.npz"))

    def test_pass(self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = save(
            tmp_path / "net.onnx",
            [
                helper.make_node("Conv", ["x", "w1"], ["a"], name="first"),
                helper.make_node("Relu", ["a"], ["b"], name="act"),
                helper.make_node("Conv", ["b", "w2"], ["c"], name="second"),
                helper.make_node("Flatten", ["c"], ["y"], name="flat"),
            ],
            {"x": (TensorProto.FLOAT, (1, 2, 5, 5))},
            {"y": TensorProto.FLOAT},
            {"w1": weights(4, 2, 1, 1), "w2": weights(3, 4, 1, 1)},
        )
        break_pass(monkeypatch, "FoldBatchNorm", "net/second")
        with pytest.raises(CheckError, match=r"'net/second', in the pass FoldBatchNorm"):
            checked([model], out)

    def test_pass_to_integers(self, pair: Paths, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        np.savez(tmp_path / "calibration.npz", x=samples())
        break_pass(monkeypatch, "RealizeInteger", "two/dense_scores")
        with pytest.raises(CheckError, match=r"task 'two'.*'two/dense_scores', in the pass RealizeInteger"):
            checked(pair, out, quantize="int8", calibration=str(tmp_path / "calibration.npz"))

    @pytest.mark.parametrize("fields", [{}, pytest.param({"prune": 0.75}, marks=pytest.mark.slow)])
    def test_import(self, pair: Paths, out: Path, monkeypatch: pytest.MonkeyPatch, fields: dict) -> None:
        broken = {**onnx_import.CONVERTERS, "Relu": lambda node, inputs: relax.op.nn.leakyrelu(inputs[0], 0.5)}
        monkeypatch.setattr(onnx_import, "CONVERTERS", broken)
        with pytest.raises(CheckError, match=r"differs from ONNX Runtime .*Relu 'act', as it was imported"):
            checked(pair, out, **fields)

    def test_command_line(
        self, pair: Paths, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spoil(monkeypatch, "dense")
        command = ["compile", *pair, "-o", str(out), "--no-compare"]
        assert cli.run(command) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("nnfuze: ")]
        assert len(lines) == 1
        assert lines[0].startswith("error: check: task 'one'")
        assert not out.exists()
        assert cli.run([*command, "--no-check"]) == 0
        assert (out / "lib.so").exists()
        assert "check:" not in capsys.readouterr().out


class TestNoFalseAlarm:
    def test_odd_networks(self, tmp_path: Path, out: Path) -> None:
        found = checked(odd_networks(tmp_path), out)
        assert found.against == "ONNX Runtime"
        assert found.loaded is not None
        assert found.loaded < 1e-4
        assert found.text.startswith("equal to ONNX Runtime within ")

    @pytest.mark.parametrize("target", ["host", pytest.param("rpi4", marks=pytest.mark.slow)])
    def test_chaos(self, tmp_path: Path, out: Path, target: str) -> None:
        """Each layer makes differences several times larger, until nothing is left in common."""
        nodes, arrays = [], {}
        for n in range(30):
            nodes.append(helper.make_node("MatMul", [f"s{n}" if n else "x", f"w{n}"], [f"m{n}"], name=f"dense{n}"))
            nodes.append(helper.make_node("Sin", [f"m{n}"], [f"s{n + 1}"], name=f"sin{n}"))
            arrays[f"w{n}"] = 6 * weights(8, 8) * (-1) ** n
        model = save(
            tmp_path / "net.onnx", nodes, {"x": (TensorProto.FLOAT, (1, 8))}, {"s30": TensorProto.FLOAT}, arrays
        )
        found = checked([model], out, target=target)
        assert found.loaded is not None
        assert found.loaded > 1e-4
        assert "only by what rounding does to this network" in found.text

    def test_overflow(self, tmp_path: Path, out: Path) -> None:
        """Sums become infinite in one order and not in another, and small numbers zero on one machine."""
        node = helper.make_node
        growing = [node("MatMul", [f"a{n}" if n else "x", "w"], [f"a{n + 1}"], name=f"dense{n}") for n in range(60)]
        vanishing = [
            node("MatMul", ["x", "w"], ["a"], name="dense"),
            node("Softmax", ["a"], ["b"], name="soft"),
            node("Log", ["b"], ["y"], name="log"),
        ]
        inputs = {"x": (TensorProto.FLOAT, (1, 16))}
        models = [
            save(tmp_path / "growing.onnx", growing, inputs, {"a60": TensorProto.FLOAT}, {"w": 3 * weights(16, 16)}),
            save(tmp_path / "gone.onnx", vanishing, inputs, {"y": TensorProto.FLOAT}, {"w": 20 * weights(16, 16)}),
        ]
        assert checked(models, out).samples

    def test_float16(self, tmp_path: Path, out: Path) -> None:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")]
        inputs = {"x": (TensorProto.FLOAT16, (1, 64))}
        arrays = {"w": weights(64, 5).astype(np.float16)}
        found = checked([save(tmp_path / "net.onnx", nodes, inputs, {"y": TensorProto.FLOAT16}, arrays)], out)
        assert found.loaded is not None
        assert found.loaded < 1e-2

    @pytest.mark.parametrize("scale", [0.125, pytest.param(0.1, marks=pytest.mark.slow)])
    def test_quantized_file(self, tmp_path: Path, out: Path, scale: float) -> None:
        """With scales that are powers of two, many values are halfway between two steps."""
        found = checked([quantized_file(tmp_path / "net.onnx", scale)], out)
        assert found.built == 0
        assert "as built, equal to its graph in NumPy, bit by bit" in found.text

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"quantize": "int8"}, "as built, equal to its graph in NumPy"),
            ({"prune": 0.75}, "as built, equal to its graph in NumPy within "),
            pytest.param({"target": "rpi4"}, "kernels for another machine can't run here", marks=pytest.mark.slow),
            ({"target": "rpi4", "quantize": "int8"}, "as built, equal to its graph in NumPy"),
        ],
    )
    def test_compressed(self, pair: Paths, out: Path, tmp_path: Path, fields: dict, text: str) -> None:
        np.savez(tmp_path / "calibration.npz", x=samples())
        found = checked(pair, out, calibration=str(tmp_path / "calibration.npz"), **fields)
        assert text in found.text
        assert found.loaded is not None
        assert found.loaded < 1e-5

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["shared", "independent"])
    @pytest.mark.parametrize("fields", [{}, {"quantize": "int8", "prune": 0.75}])
    def test_examples(self, out: Path, name: str, fields: dict) -> None:
        speech = Path(__file__).parent.parent.parent / "examples" / "speech"
        models = [str(speech / name / f"{task}.onnx") for task in ("keyword", "speaker")]
        found = checked(models, out, calibration=str(speech / "calibration.npz"), **fields)
        assert found.samples
        assert found.loaded is not None
        assert found.loaded < 1e-4

    def test_without_onnx_runtime(self, pair: Paths, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert checked(pair, out).text.startswith("equal to ONNX's own evaluator within ")
        monkeypatch.setattr("nnfuze_tvm.jobs.check.check._HEAVY", 1)
        found = checked(pair, out, force=True)
        assert found.loaded is None
        assert found.text.startswith("as built, equal to its graph in NumPy within ")
        assert "not compared with the networks as they were given: onnxruntime can't run" in found.text

    def test_networks_that_are_random(self, pair: Paths, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        right = Originals.__call__
        rng = np.random.default_rng(0)
        monkeypatch.setattr(Originals, "__call__", lambda self, x: [y + rng.normal() for y in right(self, x)])
        assert "the networks give different answers each time" in checked(pair, out).text


def odd_networks(directory: Path) -> Paths:
    """Networks whose outputs are integers, NaN, infinite, constant, single numbers, their input, or near a step."""
    real, whole, truth = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
    node = helper.make_node
    x = {"x": (real, (1, 8))}
    dense = node("MatMul", ["x", "w"], ["a"], name="dense")
    w = {"w": weights(8, 5)}
    three, zero, large = np.array([3]), np.zeros(1, np.float32), np.full(1, 1000, np.float32)
    axis = {"axis": 1}
    networks: dict[str, tuple] = {
        "argmax": ([dense, node("ArgMax", ["a"], ["y"], **axis)], x, {"y": whole}, w),
        "ties": ([node("Floor", ["x"], ["a"]), node("ArgMax", ["a"], ["y"], **axis)], x, {"y": whole}),
        "topk": ([node("TopK", ["x", "k"], ["y", "z"], **axis)], x, {"y": real, "z": whole}, {"k": three}),
        "truth": ([dense, node("Greater", ["a", "o"], ["y"])], x, {"y": truth}, {**w, "o": zero}),
        "steps": ([dense, node("Round", ["a"], ["y"])], x, {"y": real}, {"w": 10 * weights(8, 5)}),
        "nan": ([dense, node("Log", ["a"], ["y"])], x, {"y": real}, w),
        "infinite": ([node("Floor", ["x"], ["a"]), node("Div", ["x", "a"], ["y"])], x, {"y": real}),
        "constant": (
            [node("Mul", ["x", "o"], ["a"]), node("Add", ["a", "p"], ["y"])],
            x,
            {"y": real},
            {"o": zero, "p": large},
        ),
        "offset": ([dense, node("Add", ["a", "o"], ["y"])], x, {"y": real}, {"w": weights(8, 5) / 1000, "o": large}),
        "number": ([node("ReduceSum", ["x"], ["y"], keepdims=0)], x, {"y": real}),
        "same": ([node("Relu", ["x"], ["y"]), node("Identity", ["x"], ["z"])], x, {"y": real, "z": real}),
        "indices": ([node("Gather", ["w", "i"], ["y"])], {"i": (whole, (1, 6))}, {"y": real}, {"w": weights(2, 4)}),
        "bytes": (
            [node("Cast", ["x"], ["c"], to=real), node("MatMul", ["c", "w"], ["y"], name="dense")],
            {"x": (TensorProto.UINT8, (1, 8))},
            {"y": real},
            w,
        ),
        "mask": ([node("Where", ["m", "x", "o"], ["y"])], {**x, "m": (truth, (1, 8))}, {"y": real}, {"o": zero}),
    }
    return [save(directory / f"{name}.onnx", *parts) for name, parts in networks.items()]


def quantized_file(path: Path, scale: float) -> str:
    """Write two dense layers in QDQ form."""
    node = helper.make_node
    nodes, value = [], "x"
    for n in range(2):
        nodes += [
            node("QuantizeLinear", [value, "s", "z"], [f"q{n}"], name=f"q{n}"),
            node("DequantizeLinear", [f"q{n}", "s", "z"], [f"d{n}"], name=f"d{n}"),
            node("DequantizeLinear", [f"w{n}", "t", "z"], [f"v{n}"], name=f"v{n}"),
            node("MatMul", [f"d{n}", f"v{n}"], [f"m{n}"], name=f"dense{n}"),
        ]
        value = f"m{n}"
    rng = np.random.default_rng(0)
    arrays = {
        "s": np.float32(scale),
        "t": np.float32(scale / 16),
        "z": np.int8(0),
        **{f"w{n}": rng.integers(-127, 128, (32, 32)).astype(np.int8) for n in range(2)},
    }
    inputs = {"x": (TensorProto.FLOAT, (16, 32))}
    return save(path, nodes, inputs, {value: TensorProto.FLOAT}, {k: np.asarray(v) for k, v in arrays.items()})


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("function", "most"), [(relax.op.sigmoid, 1e-5), (relax.op.exp, 1e-9)])
def test_scores_near_zero_are_judged_as_parts_of_one(function: Callable[[relax.Expr], relax.Expr], most: float) -> None:
    """What a wake word says of silence has hardly any digits."""
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output([builder.emit(function(x))])
        builder.emit_func_output(result)
    given = {"x": np.linspace(-12, -11, 4, dtype="float32")[None]}
    (allowed,) = tolerated(builder.get(), [given], 0.0)
    values = np.exp(given["x"])
    assert most / 20 < allowed * (values.max() - values.min()) < most


def spoil(monkeypatch: pytest.MonkeyPatch, rule: str, dtype: str = "float32") -> None:
    """Break the kernels that one schedule rule makes of data of a type: what they store is doubled."""
    right = schedule_kernels.schedule_kernel

    def doubled(store: tirx.BufferStore) -> tirx.Stmt:
        return tirx.BufferStore(store.buffer, store.value + store.value, store.indices)

    def schedule(name: str, func: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc:
        done = right(name, func, target)
        if done.attrs["nnfuze.rule"] != rule or str(func.params[0].ty.dtype) != dtype:
            return done
        return done.with_body(tvm_ffi.structural_map(done.body, (tirx.BufferStore, doubled)))

    monkeypatch.setattr(schedule_kernels, "schedule_kernel", schedule)


def break_pass(monkeypatch: pytest.MonkeyPatch, name: str, layer: str) -> None:
    """Break a pass of the pipeline: it doubles the result of one layer."""
    right = getattr(pipeline, name)

    def transform(mod: tvm.IRModule, _context: object) -> tvm.IRModule:
        main = mod["main"]
        emitter = dataflow.Emitter()
        new: dict = {}
        for binding in dataflow.bindings(main):
            var = emitter.emit(dataflow.substitute(binding.value, new), binding.var.name)
            new[binding.var] = emitter.emit(relax.op.add(var, var)) if binding.var.name == layer else var
        outputs = [new.get(field, field) for field in dataflow.output_fields(main)]
        return right()(dataflow.with_main(mod, emitter.finish(main.params, outputs, main.attrs)))

    broken = tvm.transform.module_pass(transform, opt_level=0, name=name)
    monkeypatch.setattr(pipeline, name, lambda: broken)
