"""TensorFlow Lite files: what Google's kernels compute, in floats and in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

import nnfuze_tvm
from benchmarks import networks
from benchmarks.arm import tflite
from nnfuze_tvm import cli
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.frontend.tflite_files import File, answers

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


def merged(data: bytes, folder: Path) -> tvm.IRModule:
    path = folder / "network.tflite"
    path.write_bytes(data)
    return tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([path]))


def check(data: bytes, inputs: Mapping[str, np.ndarray], folder: Path, tolerance: float = 1e-5) -> None:
    """Compare with TensorFlow Lite: floats within rounding, all else exactly."""
    want = answers(data, inputs)
    got = evaluate.executor(merged(data, folder))(inputs)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        if theirs.dtype == np.float32:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(np.ptp(theirs), 1e-3))
        else:
            np.testing.assert_array_equal(mine, theirs)


def one(
    kind: str,
    shapes: list[tuple[int, ...]],
    out: tuple[int, ...] | list[tuple[int, ...]],
    constants: list[Any] | None = None,
    *,
    before: list[Any] | None = None,
    options: str | None = None,
    dtype: str = "float32",
    dtypes: list[str] | None = None,
    low: float | None = None,
    **fields: Any,
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file of one operator: constants ``before`` the inputs, inputs, constants behind them; and its inputs."""
    file = File()
    leading = [file.constant(v, v.dtype if isinstance(v, np.ndarray) else "int32") for v in before or []]
    given = [file.input(f"x{n}", shape) for n, shape in enumerate(shapes)]
    behind = [file.constant(c, c.dtype if isinstance(c, np.ndarray) else "int32") for c in constants or []]
    outs = out if isinstance(out, list) else [out]
    types = dtypes or [dtype] * len(outs)
    made = [file.tensor(f"y{n}", *each) for n, each in enumerate(zip(outs, types, strict=True))]
    file.add(kind, [*leading, *given, *behind], made, options, **fields)
    for number in made:
        file.output(number)
    inputs = {f"x{n}": normal(*shape) for n, shape in enumerate(shapes)}
    if low is not None:
        inputs = {name: np.abs(value) + np.float32(low) for name, value in inputs.items()}
    return file.bytes(), inputs


X = (2, 5, 6, 4)
UNARY = ["RELU", "RELU6", "RELU_N1_TO_1", "LOGISTIC", "TANH", "EXP", "ABS", "NEG", "FLOOR", "CEIL", "ROUND", "SIN",
         "COS", "ELU", "HARD_SWISH", "SQUARE", "LOG_SOFTMAX", "L2_NORMALIZATION", "SIGN"]  # fmt: skip
BINARY = ["ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE", "FLOOR_DIV"]
COMPARED = ["EQUAL", "NOT_EQUAL", "LESS", "LESS_EQUAL", "GREATER", "GREATER_EQUAL"]

CASES: dict[str, Callable[[], tuple[bytes, dict[str, np.ndarray]]]] = {
    **{kind: lambda kind=kind: one(kind, [X], X, options="L2NormOptions" if kind[:2] == "L2" else None)
       for kind in UNARY},
    **{kind: lambda kind=kind: one(kind, [X], X, low=0.1) for kind in ("LOG", "SQRT", "RSQRT")},
    **{kind: lambda kind=kind: one(
        kind, [X, (6, 1)], X, low=0.1 if "DIV" in kind else None,
        options="MaximumMinimumOptions" if kind[-3:] == "MUM" else None,
    ) for kind in BINARY},
    "ADD, relu6": lambda: one("ADD", [X, X], X, fusedActivationFunction=3),
    **{kind: lambda kind=kind: one(kind, [X, (4,)], X, dtype="bool") for kind in COMPARED},
    "SOFTMAX": lambda: one("SOFTMAX", [(2, 7)], (2, 7), beta=0.5),
    "LEAKY_RELU": lambda: one("LEAKY_RELU", [X], X, alpha=0.1),
    "PRELU": lambda: one("PRELU", [X], X, [normal(1, 1, 4)]),
    "GELU": lambda: one("GELU", [X], X, approximate=True),
    "MEAN": lambda: one("MEAN", [X], (2, 4), [[1, 2]], options="ReducerOptions"),
    "SUM": lambda: one("SUM", [X], (2, 5, 1, 4), [[-2]], options="ReducerOptions", keepDims=True),
    "REDUCE_MAX": lambda: one("REDUCE_MAX", [X], (5, 6, 4), [[0]], options="ReducerOptions"),
    "ARG_MAX": lambda: one("ARG_MAX", [X], (2, 5, 6), [3], dtype="int32", outputType=2),
    "BATCH_MATMUL": lambda: one("BATCH_MATMUL", [(2, 3, 4), (2, 5, 4)], (2, 3, 5), options="BatchMatMulOptions",
                                adjY=True),
    "RESHAPE": lambda: one("RESHAPE", [X], (2, 30, 4), [[2, 30, 4]]),
    "EXPAND_DIMS": lambda: one("EXPAND_DIMS", [X], (2, 5, 1, 6, 4), [2]),
    "TRANSPOSE": lambda: one("TRANSPOSE", [X], (4, 2, 6, 5), [[3, 0, 2, 1]]),
    "SLICE": lambda: one("SLICE", [X], (2, 3, 4, 4), [[0, 1, 2, 0], [2, 3, -1, 4]]),
    "STRIDED_SLICE": lambda: one(
        "STRIDED_SLICE", [X], (2, 2, 4), [[0, 4, -1, 0], [0, 0, 0, 4], [1, -2, 1, 1]],
        beginMask=1, endMask=1, shrinkAxisMask=4),
    "GATHER": lambda: one("GATHER", [X], (2, 3, 6, 4), [[4, 0, 4]], axis=1),
    "TILE": lambda: one("TILE", [(2, 3)], (4, 9), [[2, 3]]),
    "BROADCAST_TO": lambda: one("BROADCAST_TO", [(3, 1)], (2, 3, 4), [[2, 3, 4]], version=2),
    "SPLIT": lambda: one("SPLIT", [X], [(2, 5, 3, 4)] * 2, before=[2], numSplits=2),
    "SPLIT_V": lambda: one("SPLIT_V", [X], [(2, 5, 2, 4), (2, 5, 4, 4)], [[2, 4], 2], numSplits=2),
    "UNPACK": lambda: one("UNPACK", [(3, 4)], [(3,)] * 4, num=4, axis=1),
    "PACK": lambda: one("PACK", [(3, 4), (3, 4)], (3, 2, 4), valuesCount=2, axis=1),
    "CONCATENATION": lambda: one("CONCATENATION", [X, (2, 5, 6, 3)], (2, 5, 6, 7), axis=-1),
    "CUMSUM": lambda: one("CUMSUM", [X], X, [2], exclusive=True),
    "TOPK_V2": lambda: one("TOPK_V2", [(3, 9)], [(3, 2)] * 2, [2], options="TopKV2Options",
                           dtypes=["float32", "int32"]),
    "PAD": lambda: one("PAD", [X], (2, 8, 6, 7), [[[0, 0], [1, 2], [0, 0], [3, 0]]]),
    "PADV2": lambda: one("PADV2", [X], (2, 6, 6, 4), [[[0, 0], [1, 0], [0, 0], [0, 0]], np.array(1.5, "float32")]),
    "MIRROR_PAD": lambda: one("MIRROR_PAD", [X], (2, 8, 8, 4), [[[0, 0], [1, 2], [2, 0], [0, 0]]], mode=0),
    **{f"CONV_2D, {stride}, {padding}, {dilation}": lambda s=stride, p=padding, d=dilation: convolution(s, p, d)
       for stride, padding, dilation in ((1, 0, 1), (2, 0, 1), (2, 1, 1), (1, 0, 2), (1, 1, 2))},
    "CONV_2D, groups": lambda: one("CONV_2D", [X], (2, 5, 6, 6), [normal(6, 3, 3, 2), normal(6)],
                                   strideH=1, strideW=1, options="Conv2DOptions"),
    "DEPTHWISE_CONV_2D": lambda: one(
        "DEPTHWISE_CONV_2D", [X], (2, 3, 3, 8), [normal(1, 3, 3, 8), normal(8)], depthMultiplier=2, strideH=2,
        strideW=2, fusedActivationFunction=1, options="DepthwiseConv2DOptions"),
    **{f"TRANSPOSE_CONV, {padding}": lambda p=padding, o=out: one(
        "TRANSPOSE_CONV", [X], (2, *o, 3), [normal(3)], before=[[2, *o, 3], normal(3, 3, 3, 4)], strideH=2, strideW=2,
        padding=p) for padding, out in ((0, (10, 12)), (1, (11, 13)), (1, (12, 14)))},
    "FULLY_CONNECTED": lambda: one("FULLY_CONNECTED", [(3, 8)], (3, 5), [normal(5, 8), normal(5)],
                                   fusedActivationFunction=1),
    "FULLY_CONNECTED, axes kept": lambda: one("FULLY_CONNECTED", [(2, 3, 8)], (2, 3, 5), [normal(5, 8)],
                                              keepNumDims=True),
    **{f"{kind}, {padding}": lambda kind=kind, p=padding, o=out: one(
        kind, [X], (2, *o, 4), options="Pool2DOptions", filterHeight=3, filterWidth=2, strideH=2, strideW=2,
        padding=p) for kind in ("AVERAGE_POOL_2D", "MAX_POOL_2D") for padding, out in ((0, (3, 3)), (1, (2, 3)))},
    **{f"RESIZE_BILINEAR, {a}, {h}": lambda a=a, h=h: one(
        "RESIZE_BILINEAR", [X], (2, 9, 3, 4), [[9, 3]], alignCorners=a, halfPixelCenters=h)
       for a, h in ((False, False), (True, False), (False, True))},
    **{f"RESIZE_NEAREST_NEIGHBOR, {a}, {h}": lambda a=a, h=h: one(
        "RESIZE_NEAREST_NEIGHBOR", [X], (2, 9, 13, 4), [[9, 13]], alignCorners=a, halfPixelCenters=h)
       for a, h in ((False, False), (True, False), (False, True))},
    "SPACE_TO_DEPTH": lambda: one("SPACE_TO_DEPTH", [(1, 4, 6, 3)], (1, 2, 3, 12), blockSize=2),
    "DEPTH_TO_SPACE": lambda: one("DEPTH_TO_SPACE", [(1, 2, 3, 12)], (1, 4, 6, 3), blockSize=2),
    "SPACE_TO_BATCH_ND": lambda: one("SPACE_TO_BATCH_ND", [X], (8, 3, 4, 4), [[2, 2], [[1, 0], [0, 2]]]),
    "BATCH_TO_SPACE_ND": lambda: one("BATCH_TO_SPACE_ND", [(8, 3, 4, 4)], (2, 5, 6, 4), [[2, 2], [[1, 0], [0, 2]]]),
}  # fmt: skip


def convolution(stride: int, padding: int, dilation: int) -> tuple[bytes, dict[str, np.ndarray]]:
    reach = 2 * dilation + 1
    out = [-(-size // stride) if padding == 0 else (size - reach) // stride + 1 for size in X[1:3]]
    return one("CONV_2D", [X], (2, *out, 7), [normal(7, 3, 3, 4), normal(7)], options="Conv2DOptions", strideH=stride,
               strideW=stride, padding=padding, dilationHFactor=dilation, dilationWFactor=dilation)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operator(case: str, tmp_path: Path) -> None:
    check(*CASES[case](), tmp_path)


def quantize(values: np.ndarray, scale: float, zero: int = 0, dtype: str = "int8") -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(dtype)


class Integer(File):
    """A network in 8 bits, layer by layer; every activation has a scale of its own."""

    def layer(
        self, kind: str, x: int, size: tuple[int, ...], weights: np.ndarray, axis: int, step: float, **f: Any
    ) -> int:
        x_scale = float(self.graph.tensors[x].quantization.scale[0])
        others = tuple(n for n in range(weights.ndim) if n != axis)
        scales = np.maximum(np.abs(weights).max(others), 1e-3) / 127
        shape = [-1 if n == axis else 1 for n in range(weights.ndim)]
        codes = np.rint(weights / scales.reshape(shape))
        bias = np.rint(normal(weights.shape[axis]) / (x_scale * scales))
        given = [
            x,
            self.constant(codes, "int8", scale=scales, axis=axis),
            self.constant(bias, "int32", scale=x_scale * scales),
        ]
        out = self.tensor(f"layer{len(self.graph.operators)}", size, "int8", scale=step, zero=3)
        self.add(kind, given, [out], **f)
        return out


def depthwise_separable() -> bytes:
    file = Integer()
    x = file.input("x", (1, 9, 8, 6), "int8", scale=0.05, zero=-4)
    x = file.layer("DEPTHWISE_CONV_2D", x, (1, 5, 4, 6), normal(1, 3, 3, 6), 3, 0.08, options="DepthwiseConv2DOptions",
                   strideH=2, strideW=2, depthMultiplier=1, fusedActivationFunction=3)  # fmt: skip
    x = file.layer("CONV_2D", x, (1, 5, 4, 16), normal(16, 1, 1, 6), 0, 0.11, options="Conv2DOptions", strideH=1,
                   strideW=1, fusedActivationFunction=1)  # fmt: skip
    file.output(x)
    return file.bytes()


def residual() -> bytes:
    """Two branches with scales of their own, added, rectified; then padded and sliced as integers."""
    file = Integer()
    x = file.input("x", (1, 6, 6, 8), "int8", scale=0.05, zero=-4)
    a = file.layer("CONV_2D", x, (1, 6, 6, 8), normal(8, 3, 3, 8), 0, 0.11, options="Conv2DOptions", strideH=1,
                   strideW=1)  # fmt: skip
    total = file.tensor("sum", (1, 6, 6, 8), "int8", scale=0.17, zero=-20)
    file.add("ADD", [a, x], [total], fusedActivationFunction=1)
    padded = file.tensor("padded", (1, 7, 6, 8), "int8", scale=0.17, zero=-20)
    file.add("PAD", [total, file.constant([[0, 0], [1, 0], [0, 0], [0, 0]])], [padded])
    file.output(padded)
    return file.bytes()


def average() -> bytes:
    """An average pool, padded, and its values in one row."""
    file = Integer()
    x = file.input("x", (1, 7, 8, 12), "int8", scale=0.05, zero=-4)
    pooled = file.tensor("pooled", (1, 4, 4, 12), "int8", scale=0.05, zero=-4)
    file.add("AVERAGE_POOL_2D", [x], [pooled], "Pool2DOptions", filterHeight=3, filterWidth=3, strideH=2, strideW=2,
             padding=0)  # fmt: skip
    flat = file.tensor("flat", (1, 192), "int8", scale=0.05, zero=-4)
    file.add("RESHAPE", [pooled, file.constant([1, 192])], [flat])
    file.output(flat)
    return file.bytes()


def dense() -> bytes:
    file = Integer()
    x = file.input("x", (1, 64), "int8", scale=0.05, zero=-4)
    file.output(file.layer("FULLY_CONNECTED", x, (1, 20), normal(20, 64), 0, 0.3))
    return file.bytes()


def probabilities() -> bytes:
    file = Integer()
    x = file.input("x", (1, 30), "int8", scale=0.05, zero=-4)
    out = file.tensor("probabilities", (1, 30), "int8", scale=1 / 256, zero=-128)
    file.add("SOFTMAX", [x], [out], beta=1.0)
    file.output(out)
    return file.bytes()


@pytest.mark.parametrize(
    ("network", "share"),
    # TensorFlow Lite rounds sums twice, and halves of averages away from zero.
    [(depthwise_separable, 0.02), (residual, 0.02), (average, 0.1), (dense, 0.02), (probabilities, 0.02)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_integers(network: Callable[[], bytes], share: float, tmp_path: Path) -> None:
    """All layers become integer ones, and answers are TensorFlow Lite's up to one step; the kernels are exact."""
    data = network()
    mod = merged(data, tmp_path)
    lowered = tvm.transform.Sequential([pipeline.layout_phase(), RealizeInteger()])(mod)
    runner = Runner(build.build(mod, resolve("host")), *signature(mod))
    (input_,) = runner.inputs
    apart = 0
    for seed in range(4):
        x = np.random.default_rng(seed).integers(-128, 128, input_.shape).astype("int8")
        (want,) = answers(data, {"x": x})
        (meant,) = evaluate.executor(lowered)({"x": x})
        got = np.asarray(next(iter(runner.run({"x": x}).values())))
        np.testing.assert_array_equal(got, meant)
        assert got.dtype == want.dtype and got.shape == want.shape
        steps = np.abs(got.astype(int) - want)
        assert steps.max() <= 1
        apart += (steps > 0).sum()
    assert apart <= share * 4 * want.size + 2
    layers = [b.var for b in bindings(lowered["main"]) if b.var.name.startswith("network/layer")]
    assert all(str(layer.ty.dtype) == "int32" for layer in layers), layers
    assert bool(layers) == (network not in (average, probabilities))


def test_weights_of_float16_and_of_8_bits(tmp_path: Path) -> None:
    file = File()
    x = file.input("x", (1, 5, 5, 4))
    half = file.constant(normal(6, 3, 3, 4), "float16")
    whole = file.tensor("whole", (6, 3, 3, 4))
    file.add("DEQUANTIZE", [half], [whole])
    y = file.tensor("y", (1, 5, 5, 6))
    file.add("CONV_2D", [x, whole, file.constant(np.zeros(6), "float32")], [y], "Conv2DOptions", strideH=1, strideW=1)
    file.output(y)
    check(file.bytes(), {"x": normal(1, 5, 5, 4)}, tmp_path)


def test_names_and_what_passes_through(tmp_path: Path) -> None:
    file = File()
    x = file.input("serving_default_x:0", (2, 3))
    y = file.tensor("StatefulPartitionedCall:0", (2, 3))
    file.add("TANH", [x], [y])
    for number in (y, x, y, file.constant([1.5, 2.5], "float32")):
        file.output(number)
    path = tmp_path / "a.tflite"
    path.write_bytes(file.bytes())
    mod = nnfuze_tvm.load([path])
    assert [p.name for p in mod["a"].params] == ["serving_default_x:0"]
    values = normal(2, 3)
    got = evaluate.executor(tvm.IRModule({"main": mod["a"].with_attr("global_symbol", "main")}))(
        {"serving_default_x:0": values}
    )
    for mine, theirs in zip(got, [np.tanh(values), values, np.tanh(values), np.array([1.5, 2.5])], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_refusals_name_all_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = File()
    x = file.input("x", (1, 5, 5, 4))
    a, b, c = (file.tensor(name, (1, 5, 5, 4)) for name in "abc")
    file.add("LOCAL_RESPONSE_NORMALIZATION", [x], [a])
    file.add("RELU", [a], [b])
    file.add("RANK", [b], [c])
    file.output(c)
    path = tmp_path / "odd.tflite"
    path.write_bytes(file.bytes())
    assert cli.run(["compile", str(path), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: node 'a' (LOCAL_RESPONSE_NORMALIZATION): the operator is not supported; node 'c' (RANK)" in line


@pytest.mark.parametrize("cut", [8, 12, 40, 200, 600])
def test_damaged(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.tflite"
    path.write_bytes(depthwise_separable()[:cut])
    with pytest.raises(ModelError, match=r"cut.tflite: (truncated or damaged|holds no network)"):
        nnfuze_tvm.load([path])


@pytest.mark.parametrize("name", ["ds_cnn", "resnet8"])
def test_the_same_network_as_onnx(name: str, tmp_path: Path) -> None:
    """Whole networks, written as both kinds of files, give the same answers."""
    model = networks.build(name)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "network.onnx")
    data = tflite.network(tmp_path / "network.onnx")
    (sample,) = networks.inputs(model, 1).values()
    (x,) = (value.name for value in model.graph.input)
    whole = tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([tmp_path / "network.onnx"]))
    want = evaluate.executor(whole)({x: sample})
    lite = merged(data, tmp_path)
    got = evaluate.executor(lite)({lite["main"].params[0].name: tflite.channels_last(sample)})
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine.ravel(), theirs.ravel(), rtol=0, atol=1e-5 * np.ptp(theirs))
