import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from benchmarks import networks

TINY = ("ds_cnn", "resnet8", "mobilenet_v1_025", "mlp_autoencoder")

# Multiply-accumulates for one input in millions, of the published architectures.
MEGA_MACS = {
    "ds_cnn": 2.7,
    "resnet8": 12.5,
    "mobilenet_v1_025": 7.5,
    "mlp_autoencoder": 0.26,
    "resnet18": 556,
    "resnet50": 4090,
    "mobilenet_v1": 569,
    "mobilenet_v2": 301,
    "transformer": 54.5,
}


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def macs(model: onnx.ModelProto) -> int:
    """Count multiply-accumulates for a batch of one."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shape = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    shape |= {t.name: list(t.dims) for t in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            total += math.prod(shape[node.output[0]]) * math.prod(shape[node.input[1]][1:])
        elif node.op_type == "MatMul":
            total += math.prod(shape[node.output[0]]) * shape[node.input[0]][-1]
    return total


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


@pytest.mark.parametrize("name", networks.NAMES)
def test_valid_with_unique_names_and_the_published_size(name):
    model = networks.build(name)
    onnx.checker.check_model(model, full_check=True)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    assert macs(model) / 1e6 == pytest.approx(MEGA_MACS[name], rel=0.03)
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input] == ["N"]


@pytest.mark.parametrize(
    ("name", "batch_norm"),
    [*product([*TINY, "resnet18", "mobilenet_v2"], [False, True]), ("transformer", False)],
)
def test_outputs_are_well_conditioned(name, batch_norm):
    model = networks.build(name, seed=1, batch_norm=batch_norm)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    anchors = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(norms) == (len(anchors) - 1 if batch_norm else 0)

    out = run(model, networks.inputs(model, 16 if name in TINY else 4))
    assert np.isfinite(out).all()
    assert 0.2 < out.std() < 5
    assert out.std(axis=0).mean() > 0.2, "the output hardly depends on the input"


@pytest.mark.parametrize("name", TINY)
def test_weights_depend_on_the_seed_only(name):
    first, again, other = (networks.build(name, seed) for seed in (3, 3, 4))
    assert first.SerializeToString() == again.SerializeToString()
    assert all((value != weights(other)[key]).any() for key, value in weights(first).items())


def test_shared_trunk_pair_differs_in_the_head_only():
    first, second = networks.shared_trunk_pair("resnet8", heads=(10, 10))
    differing = {key for key, value in weights(first).items() if (value != weights(second)[key]).any()}
    assert differing == {"head.weight", "head.bias"}

    first, second = networks.shared_trunk_pair("resnet8")
    feed = networks.inputs(first, 2)
    assert run(first, feed).shape == (2, 10)
    assert run(second, feed).shape == (2, 7)


def test_command_line_writes_the_model(tmp_path):
    path = tmp_path / "net.onnx"
    command = [sys.executable, "-m", "benchmarks.networks", "ds_cnn", "-o", str(path), "--seed", "5"]
    subprocess.run(command, check=True, cwd=Path(networks.__file__).parents[1])
    assert weights(onnx.load(path)).keys() == weights(networks.build("ds_cnn", 5)).keys()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no network 'vgg'; there are ds_cnn"):
        networks.build("vgg")
