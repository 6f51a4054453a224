"""Networks without their weights give the answers of those that have them inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.deploy import build, weights
from nnfuze_tvm.deploy.apart import take_apart
from nnfuze_tvm.deploy.runner import LOAD
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.passes.lower.winograd import winograd_weights

HOST = resolve("host")
CHANNELS = 16


def network(dtype: str = "float32") -> tvm.IRModule:
    """Return two 3×3 convolutions, the first with Winograd's algorithm in float32, and a bias twice."""
    rng = np.random.default_rng(0)
    x = relax.Var("x", relax.TensorType((1, 12, 12, CHANNELS), dtype))
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "padding": 1}
    builder = relax.BlockBuilder()
    bias = rng.standard_normal((1, 1, 1, CHANNELS)).astype(dtype)
    with builder.function("main", [x]):
        with builder.dataflow():
            value = x
            for stride in (1, 2):
                kernel = rng.standard_normal((CHANNELS, 3, 3, CHANNELS)).astype(dtype)
                value = builder.emit(relax.op.nn.conv2d(value, relax.const(kernel), strides=stride, **layouts))
                value = builder.emit(relax.op.add(value, relax.const(bias)))
            result = builder.emit_output(relax.Tuple([value]))
        builder.emit_func_output(result)
    return ir.with_task_outputs(builder.get(), [ir.TaskOutput("one", "y")])


@pytest.fixture(scope="module")
def lowered() -> tvm.IRModule:
    return build.lower(network(), HOST)


def test_answers_are_the_same_bits(lowered: tvm.IRModule) -> None:
    apart = take_apart(lowered)
    data = tvm.runtime.tensor(np.random.default_rng(1).standard_normal((1, 12, 12, CHANNELS)).astype("float32"))
    whole = relax.VirtualMachine(build.generate(lowered, HOST), tvm.cpu())
    machine = relax.VirtualMachine(build.generate(apart.mod, HOST), tvm.cpu())
    with pytest.raises(ValueError, match=f"no weights yet, call {LOAD} first"):
        machine["main"](data)
    machine[LOAD](*apart.tensors())
    for _ in range(2):
        np.testing.assert_array_equal(machine["main"](data)[0].numpy(), whole["main"](data)[0].numpy())


def test_weights_are_stored_once_and_small(lowered: tvm.IRModule) -> None:
    apart = take_apart(lowered)
    assert [a.shape for a in apart.spread] == [(9, CHANNELS * CHANNELS)]
    stored = 2 * 9 * CHANNELS * CHANNELS + CHANNELS
    assert sum(a.size for a in apart.arrays) == stored
    assert apart.resident == 4 * (stored + (36 - 9) * CHANNELS * CHANNELS)


def test_the_file_has_them_where_kernels_can_read_them(lowered: tvm.IRModule, tmp_path: Path) -> None:
    apart = take_apart(lowered)
    weights.write(tmp_path / "w", apart.arrays)
    assert (tmp_path / "w").stat().st_size == weights.size(apart.record)
    checksum = weights.loading.sha256(tmp_path / "w")
    for mapped in (False, True):
        found = weights.read(tmp_path / "w", apart.record, checksum, mapped=mapped)
        for one, other in zip(found.arrays, apart.arrays, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.ctypes.data % 64 == 0
        found.forget()
        # What the library has made larger weights of is gone but for the page that it begins on, or the file's again.
        assert (found.arrays[-1].ravel()[-1] != 0) == mapped
        np.testing.assert_array_equal(found.arrays[0], apart.arrays[0])


@pytest.mark.parametrize(("m", "dtype"), [(2, "int8"), (4, "int8"), (2, "float16"), (2, "float32"), (4, "float32")])
def test_taps_at_the_points(m: int, dtype: str) -> None:
    """The kernel gives what NumPy gives, and that is Winograd's transform."""
    rng = np.random.default_rng(0)
    taps = rng.integers(-127, 128, (9, 50)).astype(dtype)
    want = winograd_weights.at_points(taps, m)
    kernel = winograd_weights.prim_func(m, dtype).with_attr("global_symbol", "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": kernel}), target=HOST)
    out = tvm.runtime.empty(want.shape, str(want.dtype))
    library["kernel"](tvm.runtime.tensor(winograd_weights.factors(m, dtype)), tvm.runtime.tensor(taps), out)
    np.testing.assert_array_equal(out.numpy(), want)
    # The last point is infinity in both directions: the last tap alone.
    np.testing.assert_array_equal(want[-1], ({2: 4, 4: 9}[m] if dtype == "int8" else 1) * taps[-1].astype(want.dtype))


@pytest.mark.parametrize("pattern", ["host", "x86-64-v3"])
def test_numbers_of_4_bits_take_half_a_byte_in_the_file(pattern: str) -> None:
    """Two convolutions in integers, of which AVX2 makes the first one Winograd's."""
    rng = np.random.default_rng(0)
    x = relax.Var("x", relax.TensorType((1, 12, 12, CHANNELS), "int8"))
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "padding": 1, "out_dtype": "int32"}
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            kernels = (rng.integers(-8, 8, (CHANNELS, 3, 3, CHANNELS)).astype("int8") for _ in range(2))
            sums = [
                builder.emit(relax.op.nn.conv2d(x, relax.const(kernel), strides=stride, **layouts))
                for stride, kernel in zip((1, 2), kernels, strict=True)
            ]
            result = builder.emit_output(relax.Tuple(sums))
        builder.emit_func_output(result)
    mod = ir.with_task_outputs(builder.get(), [ir.TaskOutput("one", "y"), ir.TaskOutput("one", "z")])
    target = resolve(pattern)
    apart = take_apart(build.lower(mod, target))
    assert sum(array.nbytes for array in apart.spread) == 9 * CHANNELS * CHANNELS
    assert apart.resident >= 2 * 9 * CHANNELS * CHANNELS
    machine = relax.VirtualMachine(build.generate(apart.mod, target), tvm.cpu())
    machine[LOAD](*apart.tensors())
    data = rng.integers(-128, 128, (1, 12, 12, CHANNELS)).astype("int8")
    found = [array.numpy() for array in machine["main"](tvm.runtime.tensor(data))]
    for one, other in zip(found, evaluate.evaluate(mod["main"], {"x": data}), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not take_apart(build.lower(ir.with_small_weights(mod), target)).spread
