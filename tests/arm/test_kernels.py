"""Kernels of every ARM generation, run on emulated boards: integers equal NumPy's, floats but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.devices import toolchain
from nnfuze_tvm.devices.boards import BOARDS
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.lower.bit_serial.bit_serial import BitSerial
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from tests.graph import recurrent
from tests.graph.calls import calls, examples
from tests.passes.lower import test_bit_serial, test_skip_blocks, test_weight_only
from tests.schedules import kernels

Board = Callable[[str], str]
Session = Callable[[str], tvm.rpc.RPCSession]

# Height and width, input and output channels, kernel, stride, groups: whole tiles, tiles that overlap or run on into
# the next row, single pixels, depths that fill one, two, three or four steps, depthwise layers, many pixels of few
# and of many channels, strided pointwise layers, first layers, channels that
# fill no vectors.
SHAPES = (
    ((8, 8), 32, 32, 3, 1, 1),
    ((7, 9), 20, 24, 3, 2, 1),
    ((5, 5), 12, 8, 1, 1, 1),
    ((6, 7), 16, 16, 3, 1, 2),
    ((1, 1), 64, 40, 1, 1, 1),
    ((3, 3), 256, 64, 3, 1, 1),
    ((9, 10), 48, 48, 3, 1, 48),
    ((9, 10), 24, 24, 5, 2, 24),
    ((14, 14), 24, 144, 1, 1, 1),
    ((28, 28), 144, 192, 1, 1, 1),
    ((7, 7), 48, 72, 1, 1, 1),
    ((15, 13), 24, 24, 3, 2, 24),
    ((13, 11), 32, 64, 1, 2, 1),
    ((11, 12), 3, 16, 3, 2, 1),
    ((9, 8), 3, 20, 5, 1, 1),
    ((9, 7), 12, 26, 3, 1, 1),
    ((9, 10), 29, 29, 3, 1, 29),
    ((9, 10), 32, 1, 3, 1, 1),
)


def convolutions(dtype: str, largest: int = 127) -> tuple[tvm.IRModule, dict[str, np.ndarray], list[np.ndarray]]:
    """Return a module of one convolution per shape, their inputs, and the results as NumPy has them.

    ``largest`` is the largest weight of integers.
    """
    rng = np.random.default_rng(0)
    integer = "int" in dtype
    inputs, weights, expected = {}, [], []
    for i, (size, channels, out, kernel, stride, groups) in enumerate(SHAPES):
        shapes = (1, *size, channels), (out, kernel, kernel, channels // groups)
        low = 0 if dtype == "uint8" else -127
        # The largest products, too: they must not overflow where two of them are added in int16.
        data = rng.choice([low, 127], shapes[0]) if integer else rng.standard_normal(shapes[0])
        factors = rng.choice([-largest, largest], shapes[1]) if integer else rng.standard_normal(shapes[1])
        inputs[f"x{i}"], own = data.astype(dtype), factors.astype("int8" if integer else dtype)
        weights.append(own)
        expected.append(convolve(inputs[f"x{i}"], own, stride, groups))

    def body(builder: relax.BlockBuilder, params: list[relax.Var]) -> relax.Expr:
        results = []
        for param, own, (*_, kernel, stride, groups) in zip(params, weights, SHAPES, strict=True):
            call = relax.op.nn.conv2d(
                param,
                relax.const(own),
                strides=stride,
                padding=kernel // 2,
                groups=groups,
                data_layout="NHWC",
                kernel_layout="OHWI",
                out_dtype="int32" if integer else None,
            )
            results.append(builder.emit(call))
        return relax.Tuple(results)

    mod = kernels.single_function({name: (array.shape, dtype) for name, array in inputs.items()}, body)
    return mod, inputs, expected


def convolve(data: np.ndarray, weights: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """Return the exact convolution of NHWC data with OHWI weights, zeros around."""
    wide = np.float64 if data.dtype.kind == "f" else np.int64
    out, kernel, _, depth = weights.shape
    pad = kernel // 2
    padded = np.pad(data.astype(wide), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
    split = windows.reshape(*windows.shape[:3], groups, depth, kernel, kernel)
    own = weights.astype(wide).reshape(groups, out // groups, kernel, kernel, depth)
    return np.einsum("nyxgcij,goijc->nyxgo", split, own).reshape(*windows.shape[:3], out)


# Without dot products, with them, and with products of matrices.
BOARDS_OF_SUMS = ("rpi3", "rpi5", "aarch64+i8mm")

# Of two computed matrices, the right one of which is packed while the kernel runs.
PRODUCT = {"left": (2, 9, 32), "right": (2, 32, 24)}

# Of the range of the results. Sums are float16 where data and weights are, too: of up to 2304 products here.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}


def run_on_board(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    inputs: dict[str, np.ndarray],
    remote: tvm.rpc.RPCSession,
    folder: Path,
    name: str = "kernels.so",
    seed: int | None = None,
) -> list[np.ndarray]:
    """Schedule and build a module, and return what its ``main`` makes of the inputs on a board.

    Of several in one session each has a file of its own: the board has the others still loaded. With a ``seed`` knobs
    are sampled.
    """
    scheduled, _ = kernels.schedule(mod, target, tunable=seed is not None, seed=seed or 1)
    path = toolchain.export_library(tvm.compile(scheduled, target=target), folder / name, target)
    remote.upload(str(path))
    machine = relax.VirtualMachine(remote.load_module(name), remote.cpu())
    machine.set_input("main", *(tvm.runtime.tensor(array, remote.cpu()) for array in inputs.values()))
    machine.invoke_stateful("main")
    return [result.numpy() for result in machine.get_outputs("main")]


ALIKE = {("aarch64+i8mm", "float32"), ("aarch64+i8mm", "float16")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # The first two boards have the same instructions, the last two the same ones for floats.
        pytest.param(name, dtype, marks=pytest.mark.slow if name == "rpi4" or (name, dtype) in ALIKE else ())
        for name in ("rpi3", "rpi4", "rpi5", "aarch64+i8mm")
        for dtype in ("float32", "float16", "uint8", "int8")
        if dtype != "float16" or "fullfp16" in BOARDS[name].features
    ],
)
def test_convolutions_equal_numpy(name: str, dtype: str, session: Session, board: Board, tmp_path: Path) -> None:
    target = resolve(name)
    mod, inputs, expected = convolutions(dtype)
    remote = session(board(str(BOARDS[name].emulated)))
    results = run_on_board(mod, target, inputs, remote, tmp_path)
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        assert got.dtype == (np.int32 if "int" in dtype else dtype)
        if dtype in TOLERANCES:
            near = TOLERANCES[dtype] * np.ptp(want)
            np.testing.assert_allclose(got.astype(np.float64), want, atol=near, rtol=0, err_msg=str(SHAPES[i]))
        else:
            np.testing.assert_array_equal(got, want, err_msg=str(SHAPES[i]))


@pytest.mark.parametrize(
    ("largest", "seed"), [(1, None), (7, None), (7, 1), (7, 2), (15, None), (16, None), (63, None), (63, 1)]
)
def test_sums_of_small_weights_are_the_same_bits(
    largest: int, seed: int | None, session: Session, board: Board, tmp_path: Path
) -> None:
    mod, inputs, _ = convolutions("int8", largest)
    for data in inputs.values():  # as low as int8 can be
        data[data == -127] = -128
    remote = session(board(str(BOARDS["rpi3"].emulated)))
    results = run_on_board(mod, resolve("rpi3"), inputs, remote, tmp_path, seed=seed)
    for shape, got, want in zip(SHAPES, results, evaluate(mod["main"], inputs), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=str(shape))


def test_recurrent_layers_equal_numpy(session: Session, board: Board, tmp_path: Path) -> None:
    mod, inputs = calls(examples("recurrence"))
    remote = session(board(str(BOARDS["rpi5"].emulated)))
    results = run_on_board(mod, resolve("rpi5"), inputs, remote, tmp_path)
    for got, want in zip(results, evaluate(mod["main"], inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["rpi3", "rpi5"])
def test_recurrent_layers_in_integers_equal_numpy(
    name: str, dynamic: bool, session: Session, board: Board, tmp_path: Path
) -> None:
    mod, inputs, want = recurrent.exact_layers(dynamic=dynamic)
    remote = session(board(str(BOARDS[name].emulated)))
    for got, expected in zip(run_on_board(mod, resolve(name), inputs, remote, tmp_path), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_products_of_computed_bytes_equal_numpy(session: Session, board: Board, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = {name: rng.choice([-128, 127], shape).astype("int8") for name, shape in PRODUCT.items()}
    mod = kernels.single_function(
        {name: (shape, "int8") for name, shape in PRODUCT.items()},
        lambda builder, params: relax.Tuple([builder.emit(relax.op.matmul(*params, out_dtype="int32"))]),
    )
    (got,) = run_on_board(mod, resolve("rpi5"), inputs, session(board(str(BOARDS["rpi5"].emulated))), tmp_path)
    left, right = (array.astype("int64") for array in inputs.values())
    np.testing.assert_array_equal(got, left @ right)


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in BOARDS_OF_SUMS for dtype in ("uint8", "int8")])
def test_sums_that_skip_blocks_are_the_same_bits(
    name: str, dtype: str, session: Session, board: Board, tmp_path: Path
) -> None:
    target, remote = resolve(name), session(board(str(BOARDS[name].emulated)))
    for kind in test_skip_blocks.CASES:
        mod = test_skip_blocks.network(kind, dtype, 0.75)
        inputs = {"x": test_skip_blocks.data(dtype, ir.static_shape(mod["main"].params[0]))}
        sparse = test_skip_blocks.skipping(mod, target)
        (got,) = run_on_board(sparse, target, inputs, remote, tmp_path, f"{kind}.so")
        np.testing.assert_array_equal(got, evaluate(mod["main"], inputs)[0], err_msg=kind)


@pytest.mark.parametrize("name", ["rpi3", "rpi5"])
def test_counted_bits_are_the_same_sums(name: str, session: Session, board: Board, tmp_path: Path) -> None:
    target, remote = resolve(name), session(board(str(BOARDS[name].emulated)))
    for n, (bounds, numbers, outputs) in enumerate(test_bit_serial.CASES):
        mod, inputs = test_bit_serial.convolution(bounds, numbers, (5, 7), 72, outputs, (3, 3), 1, padding=[1, 1, 1, 1])
        counting = BitSerial(test_bit_serial.always)(mod)
        (got,) = run_on_board(counting, target, inputs, remote, tmp_path, f"{n}.so")
        np.testing.assert_array_equal(got, evaluate(mod["main"], inputs)[0], err_msg=str(numbers))


def test_weights_of_few_bits_give_the_products(session: Session, board: Board, tmp_path: Path) -> None:
    target, remote = resolve("rpi3"), session(board(str(BOARDS["rpi3"].emulated)))
    for n, case in enumerate(test_weight_only.CASES[1:3]):
        mod, inputs = test_weight_only.network(*case)
        (got,) = run_on_board(WeightOnly()(mod), target, inputs, remote, tmp_path, f"{n}.so")
        (want,) = evaluate(mod["main"], inputs)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=str(case))
