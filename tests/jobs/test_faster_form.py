"""Within a budget, a network is in integers only where that is no slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm import Bundle
from nnfuze_tvm.jobs.compile import compile


def saved(path: Path, nodes: list[onnx.NodeProto], shape: list[int], weights: np.ndarray) -> list[str]:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    samples = np.random.default_rng(1).standard_normal((16, *shape)).astype("float32")
    np.savez(path.with_suffix(".npz"), x=samples)
    return [str(path)]


@pytest.fixture
def light(tmp_path: Path) -> list[str]:
    """A network that does next to nothing with each number: rounding it and back takes longer."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    return saved(tmp_path / "light.onnx", nodes, [1, 1, 128, 128], np.full((1, 1, 1, 1), 0.5, "float32"))


@pytest.fixture
def heavy(tmp_path: Path) -> list[str]:
    """A network whose weights come from memory: a quarter of the bytes takes less time."""
    weights = np.random.default_rng(0).standard_normal((2048, 2048)).astype("float32")
    return saved(
        tmp_path / "heavy.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")], [1, 2048], weights
    )


@pytest.mark.parametrize("compare", [True, False])
def test_what_integers_slow_down_stays_in_floats(light, tmp_path, compare):
    said: list[str] = []
    samples = str(tmp_path / "light.npz")
    options = {"quantize": "auto", "max_error": 0.9, "calibration": samples, "evaluation": samples}
    report = compile(light, tmp_path / "out", compare=compare, announce=said.append, **options)
    assert any("note: float32 takes" in line and "the bundle stays in float32" in line for line in said)
    names = [stage.name for stage in report.stages if not stage.reference]
    assert names == (["merged", "int8", "float32"] if compare else ["float32"])
    assert report.budget is None and not (tmp_path / "out" / "policy.json").exists()
    assert report.check is not None and not any(layer.integer for layer in report.layers)
    data = np.load(samples)["x"][0]
    (found,) = Bundle.load(tmp_path / "out").run({"x": data}).values()
    np.testing.assert_array_equal(found, 0.5 * data)


def test_what_integers_speed_up_has_them(heavy, tmp_path):
    report = compile(heavy, tmp_path / "out", quantize="auto", max_error=0.9, calibration=str(tmp_path / "heavy.npz"))
    assert report.final.name == "int8" and report.budget is not None
    assert (tmp_path / "out" / "policy.json").exists()
    assert all(layer.integer for layer in report.layers)


def test_of_another_machine_nothing_is_known(light, tmp_path):
    samples = str(tmp_path / "light.npz")
    report = compile(light, tmp_path / "out", target="rpi4", quantize="auto", max_error=0.9, calibration=samples)
    assert report.final.name == "int8"
