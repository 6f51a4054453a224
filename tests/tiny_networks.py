"""Networks small enough to compile in a second, as ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 3
SHAPE = (1, 2, 6, 6)


def classifier(
    seed: int = 0,
    head_seed: int | None = None,
    *,
    op: str = "Relu",
    shape: tuple[int, ...] = SHAPE,
    name: str = "net",
    outputs: int = 1,
) -> onnx.ModelProto:
    """Return conv → activation → mean → dense: 8 channels, 3 classes; ``head_seed`` changes the dense layer only."""
    rng = np.random.default_rng(seed)
    conv = rng.standard_normal((8, shape[1], 3, 3)).astype(np.float32) / 4
    bias = rng.standard_normal(8).astype(np.float32) / 10
    if head_seed is not None:
        rng = np.random.default_rng(head_seed)
    dense = rng.standard_normal((CLASSES, 8)).astype(np.float32)
    names = [f"scores{n}" if n else "scores" for n in range(outputs)]
    nodes = [
        helper.make_node("Conv", ["x", "conv_w", "conv_b"], ["c"], name="conv", pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node(op, ["c"], ["r"], name="act"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="mean"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
        *(helper.make_node("Gemm", ["f", "dense_w"], [n], transB=1, name=f"dense_{n}") for n in names),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [shape[0], CLASSES]) for n in names],
        [
            numpy_helper.from_array(conv, "conv_w"),
            numpy_helper.from_array(bias, "conv_b"),
            numpy_helper.from_array(dense, "dense_w"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def save_pair(directory: Path) -> list[str]:
    """Write two classifiers with one trunk and return their paths."""
    paths = [directory / "one.onnx", directory / "two.onnx"]
    onnx.save(classifier(name="one"), paths[0])
    onnx.save(classifier(head_seed=9, name="two"), paths[1])
    return [str(path) for path in paths]


def samples(count: int = 6, seed: int = 3) -> np.ndarray:
    """Return inputs ``[count, 2, 6, 6]`` for the classifiers."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE[1:])).astype(np.float32)
