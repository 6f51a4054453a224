"""The published architectures that come with the onnx package, built and run whole, against ONNX Runtime.

Their weights are constants, made by ConstantOfShape nodes, so that the files stay small; some are run with random
weights as well, since equal weights hide what is mixed up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import numpy_helper
from tvm import relax

from nnfuze_tvm import load
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
HOST = resolve("host")


def with_random_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with random kernels and matrices in place of its constant ones."""
    rng = np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type != "ConstantOfShape" or len(shapes[node.input[0]]) < 2:
            continue
        shape = shapes[node.input[0]]
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(values.astype("float32"), node.output[0]))
        model.graph.node.remove(node)
    return model


def check(model: onnx.ModelProto) -> float:
    """Compare with ONNX Runtime on a random input; return the range of the output."""
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([model], tasks=["net"]))
    (param,) = mod["main"].params
    shape = [int(dim) for dim in param.ty.shape]
    data = np.random.default_rng(1).random(shape).astype("float32")
    machine = relax.VirtualMachine(build.build(mod, HOST), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(data))[0].numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {param.name: data})[0]
    assert np.abs(got - want).max() <= 1e-4 * max(np.ptp(want), np.abs(want).max())
    return float(np.ptp(want))


# The others have the same operators, and take ten times as long to build.
SMALL = ("shufflenet", "squeezenet")
NAMES = sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("light_*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_it_is(name: str) -> None:
    check(onnx.load(LIGHT / f"light_{name}.onnx"))


@pytest.mark.parametrize("name", [*SMALL, pytest.param("inception_v1", marks=pytest.mark.slow)])
def test_with_random_weights(name: str) -> None:
    assert check(with_random_weights(onnx.load(LIGHT / f"light_{name}.onnx"))) > 0
